//! Who belongs to the cluster. One node has the CA's key, and it alone changes the list; each
//! list has a number, and a node takes a list with a higher one from any member.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::Method;
use supercloud_api::{
    Code, Error, JoinAnswer, JoinRequest, JoinToken, Member, Members, NewToken, Node, NodeStatus,
    Remove, TokenText, VERSION,
};

use crate::agent::{Agent, Heard, lock, random};
use crate::client;
use crate::events::now_ms;
use crate::pki::{self, Identity, no_ca};
use crate::record::{IDENTITY, JOINING, Joining, MEMBERS, NETS, OWN, TOKENS, Token, VMS};
use crate::store::Store;
use crate::{fail, tls};

/// How long a token that is too old is kept for who has lost the answer, milliseconds.
const HOUR: u64 = 3_600_000;
/// How often other nodes are asked how they are.
pub const BEAT: Duration = Duration::from_secs(5);
/// How old what was heard may be.
const FRESH: Duration = Duration::from_secs(8);

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Joins the cluster of a token. Called again after whatever has gone wrong, it goes on.
///
/// # Errors
/// The token, or the node that gave it.
pub(crate) async fn join(
    store: &Store,
    name: &str,
    address: &str,
    token: &JoinToken,
) -> Result<Identity, Error> {
    let begun = store.get(JOINING, OWN)?;
    let begun = begun.filter(|it: &Joining| it.token == token.to_string());
    let (key, request) = match begun {
        Some(it) => {
            let request = pki::request_of(name, &it.key)?;
            (it.key, request)
        }
        None => pki::new_request(name)?,
    };
    let joining = Joining {
        token: token.to_string(),
        key: key.clone(),
    };
    store.change(|change| change.put(JOINING, OWN, &joining))?;
    fail::point("join.begun");
    let asked = JoinRequest {
        version: VERSION,
        secret: token.secret.clone(),
        name: name.into(),
        address: address.into(),
        request,
    };
    let mut agent = client::Agent::of_ca(&token.address, tls::joining(&token.ca)?).await?;
    let answer: JoinAnswer = agent
        .ask(Method::POST, "/v1/join", Some(&asked), client::ANSWER)
        .await?;
    if pki::sum(&pki::certificate(&answer.ca)?) != token.ca {
        return Err(Error::failed("the CA is not the one that the token is of"));
    }
    fail::point("join.answered");
    let identity = Identity {
        name: name.into(),
        key,
        certificate: answer.certificate,
        ca: answer.ca,
        ca_key: None,
    };
    store.change(|change| {
        change.put(IDENTITY, OWN, &identity)?;
        change.put(MEMBERS, OWN, &answer.members)?;
        // Those of the cluster in which it was alone.
        change.remove(NETS, OWN)?;
        change.remove(JOINING, OWN)
    })?;
    Ok(identity)
}

impl Agent {
    /// Makes a token by which nodes join.
    ///
    /// # Errors
    /// This node lets nobody in.
    pub fn new_token(&self, wanted: &NewToken) -> Result<TokenText, Error> {
        let own = self.own();
        if own.identity.ca_key.is_none() {
            return Err(no_ca());
        }
        if !(1..=1000).contains(&wanted.uses) || !(1..=30 * 86_400).contains(&wanted.seconds) {
            return Err(Error::new(
                Code::BadRequest,
                "a token is for 1 to 1000 nodes, and for 30 days at most",
                "",
            ));
        }
        let secret = hex(&random::<16>()?);
        let until_ms = now_ms().saturating_add(wanted.seconds.saturating_mul(1000));
        let record = Token {
            left: wanted.uses,
            until_ms,
            used: Vec::new(),
        };
        let token = JoinToken {
            ca: pki::sum(&own.identity.ca()?),
            address: self.config.address()?,
            secret: secret.clone(),
        };
        let now = now_ms();
        self.store.change(|change| {
            // Who came by one that is too old, and lost the answer, has had an hour and more.
            change.retain(TOKENS, |token| token.until_ms.saturating_add(HOUR) > now)?;
            change.put(TOKENS, &pki::sum(secret.as_bytes()), &record)
        })?;
        Ok(TokenText {
            token: token.to_string(),
            until_ms,
        })
    }

    /// Lets a node in.
    ///
    /// # Errors
    /// The token, the name, or this node lets nobody in.
    pub fn let_in(&self, asked: &JoinRequest) -> Result<JoinAnswer, Error> {
        let own = self.own();
        let identity = &own.identity;
        if identity.ca_key.is_none() {
            return Err(no_ca());
        }
        if asked.version != VERSION {
            return Err(Error::new(
                Code::Conflict,
                format!(
                    "nodes here speak version {VERSION}, and it speaks {}",
                    asked.version
                ),
                "install the same release of supercloud on both",
            ));
        }
        let refused = |why: &str| {
            Error::new(
                Code::Token,
                format!("the token is {why}"),
                "make another one: supercloud node token",
            )
        };
        let at = pki::sum(asked.secret.as_bytes());
        // The token before anything else that it says.
        let known = self.store.get(TOKENS, &at)?;
        let known: Token = known.ok_or_else(|| refused("unknown here"))?;
        supercloud_api::name("a node", &asked.name)?;
        let key = pki::key_of(&asked.request)?;
        let who = (asked.name.clone(), key);
        let certificate = identity.sign(&asked.name, &asked.request)?;
        let sum = pki::sum(&pki::certificate(&certificate)?);
        if now_ms() > known.until_ms && !known.used.contains(&who) {
            return Err(refused("too old"));
        }
        let members = self.store.change(|change| {
            let mut token: Token = change
                .get(TOKENS, &at)?
                .ok_or_else(|| refused("unknown here"))?;
            let mut members: Members = change.get(MEMBERS, OWN)?.unwrap_or_default();
            // The same node, whose answer was lost, is let in again.
            if !token.used.contains(&who) {
                if token.left == 0 {
                    return Err(refused("used up"));
                }
                if members.members.iter().any(|other| other.name == asked.name) {
                    return Err(Error::new(
                        Code::Conflict,
                        format!("there is a node {} already", asked.name),
                        format!(
                            "choose another --name, or remove that one: supercloud node remove {}",
                            asked.name
                        ),
                    ));
                }
                self.is_outside_nets(&asked.address)?;
                token.left -= 1;
                token.used.push(who);
                change.put(TOKENS, &at, &token)?;
            }
            let old = members
                .members
                .iter()
                .find(|other| other.name == asked.name);
            if let Some(old) = old {
                members.removed.push(old.certificate.clone());
            }
            members.members.retain(|other| other.name != asked.name);
            members.members.push(Member {
                name: asked.name.clone(),
                address: asked.address.clone(),
                certificate: sum,
                has_ca: false,
            });
            members.version += 1;
            change.put(MEMBERS, OWN, &members)?;
            Ok(members)
        })?;
        fail::point("join.recorded");
        self.removed.set(members.removed.clone());
        self.say(
            "node.joined",
            &asked.name,
            format!("{} is at {}", asked.name, asked.address),
        );
        Ok(JoinAnswer {
            certificate,
            ca: identity.ca.clone(),
            members,
        })
    }

    /// This node, which is alone, joins another cluster.
    ///
    /// # Errors
    /// It is not alone, or the token.
    pub async fn join_another(&self, token: &str) -> Result<Members, Error> {
        let token: JoinToken = token.parse()?;
        let own = self.own();
        if pki::sum(&own.identity.ca()?) == token.ca {
            return Err(Error::new(
                Code::Conflict,
                "this node belongs to that cluster already",
                "",
            ));
        }
        if self.members()?.members.len() > 1 {
            return Err(Error::new(
                Code::Conflict,
                "this node belongs to a cluster with other nodes",
                "a node that is to go to another cluster is removed from its own, and its data too",
            ));
        }
        let address = self.config.address()?;
        let identity = join(&self.store, &own.identity.name, &address, &token).await?;
        self.become_another(identity)?;
        let members = self.members()?;
        self.removed.set(members.removed.clone());
        self.say(
            "node.joined",
            &token.address,
            "this node has joined a cluster",
        );
        Ok(members)
    }

    /// Removes a node: its certificate is not accepted any more.
    ///
    /// # Errors
    /// This node cannot, or the other one has VMs.
    pub async fn remove_node(&self, name: &str, wanted: &Remove) -> Result<Members, Error> {
        if self.own().identity.ca_key.is_none() {
            return Err(no_ca());
        }
        let members = self.members()?;
        let Some(member) = members.members.iter().find(|it| it.name == name) else {
            return Ok(members);
        };
        if member.has_ca {
            return Err(Error::new(
                Code::Conflict,
                format!("{name} has the CA's key, and so cannot be removed"),
                "remove the others, or end the cluster: stop the agents and remove their data",
            ));
        }
        if !wanted.force {
            let mut agent = self.connect(name).await.map_err(|error| Error {
                hint: format!("if it is gone for good: supercloud node remove {name} --force"),
                ..error
            })?;
            let vms: Vec<supercloud_api::Vm> = agent
                .ask(Method::GET, "/v1/vms", None::<&()>, client::ANSWER)
                .await?;
            if !vms.is_empty() {
                return Err(Error::new(
                    Code::Conflict,
                    format!("{name} has {} VMs", vms.len()),
                    format!("move them first: supercloud node drain {name}"),
                ));
            }
        }
        let members = self.store.change(|change| {
            let mut members: Members = change.get(MEMBERS, OWN)?.unwrap_or_default();
            let gone = members.members.iter().filter(|it| it.name == name);
            let gone: Vec<String> = gone.map(|it| it.certificate.clone()).collect();
            members.removed.extend(gone);
            members.members.retain(|it| it.name != name);
            members.version += 1;
            change.put(MEMBERS, OWN, &members)?;
            // It knows the secrets by which it came, and would be let in again.
            change.retain(TOKENS, |token| {
                token.used.iter().all(|(node, _)| node != name)
            })?;
            Ok(members)
        })?;
        self.removed.set(members.removed.clone());
        lock(&self.peers).remove(name);
        self.say("node.removed", name, format!("{name} was removed"));
        Ok(members)
    }

    /// Takes a newer list of members.
    fn take(&self, newer: &Members) -> Result<(), Error> {
        // Here is the list that all others are copies of.
        if self.own().identity.ca_key.is_some() {
            return Ok(());
        }
        let taken = self.store.change(|change| {
            let present: Members = change.get(MEMBERS, OWN)?.unwrap_or_default();
            let is_newer = newer.version > present.version;
            if is_newer {
                change.put(MEMBERS, OWN, newer)?;
            }
            Ok(is_newer)
        })?;
        if taken {
            self.removed.set(newer.removed.clone());
            let names = newer.members.iter().map(|it| it.name.as_str());
            lock(&self.peers).retain(|name, _| names.clone().any(|other| other == name));
            self.say(
                "nodes.changed",
                "members",
                format!("{} nodes", newer.members.len()),
            );
        }
        Ok(())
    }

    /// On the node with the CA's key: the list has where it is reached now.
    ///
    /// # Errors
    /// The disk.
    pub(crate) fn renew_address(&self) -> Result<(), Error> {
        let own = self.own();
        let Ok(address) = self.config.address() else {
            return Ok(());
        };
        if own.identity.ca_key.is_none() {
            return Ok(());
        }
        self.store.change(|change| {
            let mut members: Members = change.get(MEMBERS, OWN)?.unwrap_or_default();
            let name = &own.identity.name;
            if let Some(it) = members.members.iter_mut().find(|it| it.name == *name)
                && it.address != address
            {
                it.address = address;
                members.version += 1;
                change.put(MEMBERS, OWN, &members)?;
            }
            Ok(())
        })
    }

    /// What this node says of itself.
    ///
    /// # Errors
    /// The disk.
    pub fn status(&self) -> Result<NodeStatus, Error> {
        let own = self.own();
        let members = self.members()?;
        let listed = members
            .members
            .iter()
            .find(|it| it.name == own.identity.name);
        let (memory, memory_available) = memory();
        let running = self.store.all(VMS)?;
        let processes = lock(&self.processes);
        let running = running.iter().filter(|vm| processes.contains_key(&vm.uuid));
        Ok(NodeStatus {
            name: own.identity.name.clone(),
            address: listed.map_or_else(String::new, |it| it.address.clone()),
            release: env!("CARGO_PKG_VERSION").into(),
            version: VERSION,
            has_ca: own.identity.ca_key.is_some(),
            members_version: members.version,
            nets_version: self.nets()?.version,
            now_ms: now_ms(),
            memory,
            memory_available,
            cpus: std::thread::available_parallelism()
                .map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
            vms: u32::try_from(running.count()).unwrap_or(u32::MAX),
        })
    }

    /// Asks a node how it is, and takes its list of members if that is newer.
    async fn hear(&self, member: &Member) {
        let asked = async {
            let mut agent = self.connect(&member.name).await?;
            let before = now_ms();
            let status: NodeStatus = agent
                .ask(Method::GET, "/v1/node", None::<&()>, BEAT)
                .await?;
            let middle = before.midpoint(now_ms());
            let ahead = i64::try_from(status.now_ms).unwrap_or(i64::MAX)
                - i64::try_from(middle).unwrap_or(i64::MAX);
            if status.members_version > self.members()?.version {
                let newer: Members = agent
                    .ask(Method::GET, "/v1/members", None::<&()>, BEAT)
                    .await?;
                self.take(&newer)?;
            }
            if status.nets_version > self.nets()?.version {
                let newer: supercloud_api::Nets = agent
                    .ask(Method::GET, "/v1/nets", None::<&()>, BEAT)
                    .await?;
                self.take_nets(&newer)?;
            }
            Ok((status, ahead))
        };
        let what = asked.await;
        let at = Instant::now();
        if self.member(&member.name).is_ok() {
            lock(&self.peers).insert(member.name.clone(), Heard { at, what });
        }
    }

    /// Asks all other nodes how they are.
    async fn hear_all(self: &Arc<Self>, only_old: bool) -> Result<(), Error> {
        let own = self.name();
        let mut asking = Vec::new();
        for member in self.members()?.members {
            let fresh = lock(&self.peers)
                .get(&member.name)
                .is_some_and(|heard| heard.at.elapsed() < FRESH);
            if member.name != own && !(only_old && fresh) {
                let agent = Arc::clone(self);
                asking.push(tokio::spawn(async move { agent.hear(&member).await }));
            }
        }
        for asked in asking {
            // One that panicked is a node that was not heard.
            let _ = asked.await;
        }
        Ok(())
    }

    /// Asks other nodes how they are, again and again.
    pub async fn beat(self: Arc<Self>) {
        let mut beats = tokio::time::interval(BEAT);
        beats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            beats.tick().await;
            if let Err(error) = self.hear_all(false).await {
                tracing::warn!("{error}");
            }
        }
    }

    /// The nodes, as this one sees them now.
    ///
    /// # Errors
    /// The disk.
    pub async fn nodes(self: &Arc<Self>) -> Result<Vec<Node>, Error> {
        self.hear_all(true).await?;
        let own = self.name();
        let mut all = Vec::new();
        for member in self.members()?.members {
            let here = member.name == own;
            let heard = if here {
                Ok((self.status()?, 0))
            } else {
                let heard = lock(&self.peers).get(&member.name).cloned();
                heard.map_or_else(
                    || Err(Error::failed("it was not asked yet")),
                    |heard| heard.what,
                )
            };
            let (status, ahead, error) = match heard {
                Ok((status, ahead)) => (Some(status), Some(ahead), None),
                Err(error) => (None, None, Some(error.message)),
            };
            all.push(Node {
                name: member.name,
                address: member.address,
                here,
                reachable: status.is_some(),
                status,
                clock_ahead_ms: ahead.filter(|_| !here),
                error,
            });
        }
        Ok(all)
    }
}

/// Bytes of memory, and those that are available.
pub(crate) fn memory() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line
            .trim_start_matches(':')
            .split_whitespace()
            .next()?
            .parse()
            .ok()?;
        Some(kib << 10)
    };
    (
        value("MemTotal").unwrap_or(0),
        value("MemAvailable").unwrap_or(0),
    )
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use supercloud_api::{Code, Nets, NewNet, NewToken, Remove};

    use super::*;
    use crate::config::Config;
    use crate::networks::Given;
    use crate::record::NETS;

    /// The first node, and a token that is good twice.
    async fn first(directory: &Path) -> (Arc<Agent>, JoinToken) {
        let config = Config {
            data: directory.join("data"),
            run: directory.join("run"),
            listen: ([127, 0, 0, 1], 1).into(),
            advertise: None,
            name: Some("a".into()),
            join: None,
            blanket: "/bin/false".into(),
        };
        let agent = Agent::open(config, Arc::new(Given)).await.expect("opened");
        let wanted = NewToken {
            uses: 2,
            seconds: 3600,
        };
        let token = agent.new_token(&wanted).expect("a token").token;
        (agent, token.parse().expect("one"))
    }

    fn asks(
        agent: &Agent,
        token: &JoinToken,
        name: &str,
        address: &str,
        request: &str,
    ) -> Result<JoinAnswer, Error> {
        agent.let_in(&JoinRequest {
            version: VERSION,
            secret: token.secret.clone(),
            name: name.into(),
            address: address.into(),
            request: request.into(),
        })
    }

    #[tokio::test]
    async fn no_node_has_an_address_of_a_network() {
        let directory = tempfile::tempdir().expect("a directory");
        let (agent, token) = first(directory.path()).await;
        let asks = |address, request: &str| asks(&agent, &token, "b", address, request);
        let (_, request) = pki::new_request("b").expect("a key");
        let net = |subnet: &str| NewNet {
            subnet: Some(subnet.into()),
        };
        agent
            .put_net("demo", &net("10.5.0.0/16"))
            .await
            .expect("made");
        let error = asks("10.5.3.4:7700", &request).expect_err("demo has it");
        assert_eq!(error.code, Code::Conflict);
        asks("10.6.3.4:7700", &request).expect("its token is still good");
        let other = agent.put_net("other", &net("10.6.0.0/16")).await;
        assert_eq!(other.expect_err("b is there").code, Code::BadRequest);
        // Its answer was lost, and its address is a network's by now: it is one all the same.
        agent
            .store
            .change(|change| {
                let mut nets: Nets = change.get(NETS, OWN)?.expect("a list");
                nets.nets[0].subnet = "10.6.0.0/16".into();
                change.put(NETS, OWN, &nets)
            })
            .expect("written");
        asks("10.6.3.4:7700", &request).expect("the same once more");
    }

    #[tokio::test]
    async fn who_was_removed_is_not_let_in_again() {
        let directory = tempfile::tempdir().expect("a directory");
        let (agent, token) = first(directory.path()).await;
        let asks = |name, request: &str| asks(&agent, &token, name, "127.0.0.1:2", request);
        let (_, request) = pki::new_request("b").expect("a key");
        let first = asks("b", &request).expect("it joins");
        // Its answer was lost.
        let again = asks("b", &request).expect("the same once more");
        assert_eq!(again.members.members.len(), 2);
        let sum = |answer: &JoinAnswer| {
            pki::sum(&pki::certificate(&answer.certificate).expect("a certificate"))
        };
        assert!(agent.removed.has(&sum(&first)) && !agent.removed.has(&sum(&again)));

        let force = Remove { force: true };
        agent.remove_node("b", &force).await.expect("removed");
        assert!(agent.removed.has(&sum(&again)));
        for (name, request) in [
            ("b", request),
            ("c", pki::new_request("c").expect("a key").1),
        ] {
            let error = asks(name, &request).expect_err("it knows the secret");
            assert_eq!(error.code, Code::Token, "{name}");
        }
    }
}
