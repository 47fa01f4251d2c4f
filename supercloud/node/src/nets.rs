//! Virtual networks of the cluster. The node with the CA's key has the list and changes it; each list
//! has a number, and a node takes a list with a higher one from any member, as with the list of
//! members. Where a VM is that moves, its new node says to all at once.

mod list;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use supercloud_api::{
    Code, Error, Life, Net, NetAddress, NetMoved, NetNode, NetPort, Nets, NewNet, NewNetAddress,
    Place,
};
use supercloud_network::{Fabric, Mac, Options, PrivateKey, Wanted, names};
use tokio::sync::Notify;

use crate::agent::{Agent, lock};
use crate::client;
use crate::cluster::BEAT;
use crate::networks::{Doing, Given, Networks};
use crate::record::{NET_KEY, NETS, OWN, RELEASES, VMS, VmRecord};

/// How often it is looked whether somebody has changed something of the machine's.
const REPAIR: Duration = Duration::from_secs(60);
/// How long another node may take to hear of a move.
const HEAR: Duration = Duration::from_secs(3);

/// What an agent has of networks beside its store.
#[derive(Default)]
pub(crate) struct State {
    fabric: tokio::sync::Mutex<Option<Fabric>>,
    /// What was applied last, and when.
    applied: Mutex<Option<(Wanted, Instant)>>,
    /// Where VMs are that have moved: what the list does not have yet.
    places: Mutex<HashMap<String, NetMoved>>,
    /// Why the machine is not as it should be; said once.
    trouble: Mutex<Option<String>>,
    changed: Notify,
}

/// An error of the library's, as one of ours.
fn of_network(error: &supercloud_network::Error) -> Error {
    let code = match error {
        supercloud_network::Error::Invalid(_) => Code::BadRequest,
        _ => Code::Failed,
    };
    Error::new(code, error.to_string(), "")
}

impl Agent {
    /// The virtual networks, as this node knows them.
    ///
    /// # Errors
    /// The disk.
    pub fn nets(&self) -> Result<Nets, Error> {
        let mut nets: Nets = self.store.get(NETS, OWN)?.unwrap_or_default();
        list::overlay(&mut nets, lock(&self.nets.places).values());
        Ok(nets)
    }

    /// Whether the list is here that all others are copies of.
    fn has_list(&self) -> bool {
        self.own().identity.ca_key.is_some()
    }

    /// Has the list changed: here if this node has the CA's key, else there. `work` is what `path` does.
    async fn at_the_list<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
        work: impl FnOnce(&mut Nets) -> Result<T, Error>,
    ) -> Result<T, Error> {
        if !self.has_list() {
            let members = self.members()?.members;
            let ca = members.into_iter().find(|member| member.has_ca);
            let ca = ca.ok_or_else(|| Error::failed("no node has the CA's key"))?;
            let mut agent = self.connect(&ca.name).await.map_err(|error| Error {
                hint: format!(
                    "networks and addresses are given by {}, which has the CA's key",
                    ca.name
                ),
                ..error
            })?;
            return agent.ask(method, path, body, client::ANSWER).await;
        }
        let done = self.store.change(|change| {
            let mut nets: Nets = change.get(NETS, OWN)?.unwrap_or_default();
            let before = nets.clone();
            let done = work(&mut nets)?;
            if nets != before {
                nets.version += 1;
                change.put(NETS, OWN, &nets)?;
            }
            Ok(done)
        })?;
        self.nets.changed.notify_one();
        Ok(done)
    }

    /// At which addresses members are.
    async fn reached(&self) -> Result<HashMap<String, IpAddr>, Error> {
        let mut reached = HashMap::new();
        for member in self.members()?.members {
            if let Some(ip) = ip_of(&member.address).await {
                reached.insert(member.name, ip);
            }
        }
        Ok(reached)
    }

    /// Whether a node may be at this address: none that a network has.
    ///
    /// # Errors
    /// The disk.
    pub(crate) fn is_outside_nets(&self, address: &str) -> Result<(), Error> {
        let Ok(at) = address.parse::<SocketAddr>() else {
            return Ok(());
        };
        let nets: Nets = self.store.get(NETS, OWN)?.unwrap_or_default();
        list::covering(&nets, at.ip())?.map_or(Ok(()), |net| {
            Err(Error::new(
                Code::Conflict,
                format!(
                    "the virtual network {} has {}, and {} among it",
                    net.name,
                    net.subnet,
                    at.ip()
                ),
                "give another address of the node by --advertise, or make that network anew elsewhere",
            ))
        })
    }

    /// Has a network.
    ///
    /// # Errors
    /// There is another one, its addresses are taken, or the list cannot be reached.
    pub async fn put_net(&self, name: &str, wanted: &NewNet) -> Result<Net, Error> {
        let path = format!("/v1/nets/{name}");
        // Whoever has the list looks.
        let reached = if self.has_list() {
            self.reached().await?
        } else {
            HashMap::new()
        };
        let made = self
            .at_the_list(Method::PUT, &path, Some(wanted), |nets| {
                list::make(nets, name, wanted, &reached)
            })
            .await?;
        self.catch_up().await;
        Ok(made)
    }

    /// Removes a network.
    ///
    /// # Errors
    /// It has VMs, or the list cannot be reached.
    pub async fn remove_net(&self, name: &str) -> Result<Nets, Error> {
        let path = format!("/v1/nets/{name}");
        let left = self
            .at_the_list(Method::DELETE, &path, None::<&()>, |nets| {
                list::remove(nets, name)?;
                Ok(nets.clone())
            })
            .await?;
        self.catch_up().await;
        Ok(left)
    }

    /// Gives a VM an address, or notes where it is.
    ///
    /// # Errors
    /// The list has none, or cannot be reached.
    pub async fn put_port(
        &self,
        name: &str,
        mac: &str,
        wanted: &NewNetAddress,
    ) -> Result<Net, Error> {
        let path = format!("/v1/nets/{name}/ports/{mac}");
        self.at_the_list(Method::PUT, &path, Some(wanted), |nets| {
            list::place(nets, name, mac, wanted)
        })
        .await
    }

    /// Takes a VM's address back.
    ///
    /// # Errors
    /// The list cannot be reached.
    pub async fn remove_port(&self, name: &str, mac: &str) -> Result<Nets, Error> {
        let path = format!("/v1/nets/{name}/ports/{mac}");
        self.at_the_list(Method::DELETE, &path, None::<&()>, |nets| {
            list::release(nets, name, mac);
            Ok(nets.clone())
        })
        .await
    }

    /// Gives back the addresses of VMs that were removed, and of none that is here again.
    async fn release_ports(&self) -> Result<(), Error> {
        for port in self.store.all(RELEASES)? {
            let vms = self.store.all(VMS)?;
            let again = vms.iter().any(|vm| {
                vm.life != Life::Removing && vm.ports.iter().any(|it| it.mac == port.mac)
            });
            if !again {
                let name = port.net.split(',').next().unwrap_or_default();
                self.remove_port(name, &port.mac).await?;
            }
            self.store
                .change(|change| change.remove(RELEASES, &port.mac))?;
        }
        Ok(())
    }

    /// Gives a node a number.
    ///
    /// # Errors
    /// The key is none, or the list cannot be reached.
    pub async fn put_net_node(&self, wanted: &NetNode) -> Result<Nets, Error> {
        let path = format!("/v1/net-nodes/{}", wanted.node);
        self.at_the_list(Method::PUT, &path, Some(wanted), |nets| {
            list::number(nets, wanted)?;
            Ok(nets.clone())
        })
        .await
    }

    /// Takes a newer list.
    pub(crate) fn take_nets(&self, newer: &Nets) -> Result<(), Error> {
        if self.has_list() {
            return Ok(());
        }
        let taken = self.store.change(|change| {
            let present: Nets = change.get(NETS, OWN)?.unwrap_or_default();
            let is_newer = newer.version > present.version;
            if is_newer {
                change.put(NETS, OWN, newer)?;
            }
            Ok(is_newer)
        })?;
        if taken {
            lock(&self.nets.places).retain(|_, place| list::is_news(newer, place));
            self.nets.changed.notify_one();
        }
        Ok(())
    }

    /// The list as its owner has it now; if he cannot be reached, the next beat brings it.
    async fn catch_up(&self) {
        if self.has_list() {
            return;
        }
        let asked = async {
            let members = self.members()?.members;
            let Some(ca) = members.into_iter().find(|member| member.has_ca) else {
                return Ok(());
            };
            let mut agent = self.connect(&ca.name).await?;
            let nets: Nets = agent
                .ask(Method::GET, "/v1/nets", None::<&()>, HEAR)
                .await?;
            self.take_nets(&nets)
        };
        if let Err(error) = asked.await {
            let error: Error = error;
            tracing::info!("the list of networks: {error}");
        }
    }

    /// This node's WireGuard key, made when it is first wanted.
    fn net_key(&self) -> Result<PrivateKey, Error> {
        let text = self.store.change(|change| {
            if let Some(text) = change.get(NET_KEY, OWN)? {
                return Ok(text);
            }
            let text = PrivateKey::generate().to_text();
            change.put(NET_KEY, OWN, &text)?;
            Ok(text)
        })?;
        text.parse()
            .map_err(|error: supercloud_network::Invalid| Error::failed(error.to_string()))
    }

    /// Makes this machine as the list says. Nothing is made before there is a network.
    async fn sync_nets(&self) -> Result<(), Error> {
        let mut nets = self.nets()?;
        if nets.nets.is_empty() && lock(&self.nets.applied).is_none() {
            return Ok(());
        }
        let key = self.net_key()?;
        let own = self.name();
        let public = key.public().to_string();
        let known = |nets: &Nets| {
            let mut nodes = nets.nodes.iter();
            nodes.any(|node| node.node == own && node.public_key == public)
        };
        if !known(&nets) {
            let wanted = NetNode {
                node: own.clone(),
                number: 0,
                public_key: public.clone(),
            };
            let newer = self.put_net_node(&wanted).await?;
            self.take_nets(&newer)?;
            nets = self.nets()?;
        }
        self.claim_places(&nets, &self.store.all(VMS)?).await;
        // From here on alone, so that what is older is not done after what is newer.
        let mut fabric = self.nets.fabric.lock().await;
        let (nets, vms) = (self.nets()?, self.store.all(VMS)?);
        let reached = self.reached().await?;
        // Also one that has just come: until the list says so, it is elsewhere by it.
        let coming = vms
            .iter()
            .filter(|vm| matches!(vm.place, Place::Coming { .. } | Place::Here));
        let coming: Vec<&str> = coming
            .flat_map(|vm| &vm.ports)
            .map(|port| port.mac.as_str())
            .collect();
        let wanted = list::wanted(&nets, &own, &reached, &coming)?;
        let fresh = lock(&self.nets.applied)
            .as_ref()
            .is_some_and(|(old, at)| *old == wanted && at.elapsed() < REPAIR);
        if fresh {
            return Ok(());
        }
        if fabric.is_none() {
            *fabric = Some(self.open_fabric(key)?);
        }
        if let Some(fabric) = fabric.as_mut() {
            let report = fabric.apply(&wanted).await.map_err(|e| of_network(&e))?;
            for line in report.done {
                tracing::info!("networks: {line}");
            }
        }
        *lock(&self.nets.applied) = Some((wanted, Instant::now()));
        Ok(())
    }

    fn open_fabric(&self, key: PrivateKey) -> Result<Fabric, Error> {
        if !rustix::process::geteuid().is_root() {
            return Err(Error::new(
                Code::NotAllowed,
                "virtual networks need an agent of root's",
                "run the agent as root, or use --net user",
            ));
        }
        let dir = self.config.run.with_file_name("supercloud-network");
        Fabric::open(Options { key, dir }).map_err(|error| of_network(&error))
    }

    /// VMs of this node of which the list says that they are elsewhere: it was not to be reached when they
    /// came.
    async fn claim_places(&self, nets: &Nets, vms: &[VmRecord]) {
        let here = vms.iter().filter(|vm| matches!(vm.place, Place::Here));
        let own = self.name();
        for port in here.flat_map(|vm| &vm.ports) {
            let Some((net, at)) = list::port(nets, port) else {
                continue;
            };
            let listed: Nets = match self.store.get(NETS, OWN) {
                Ok(listed) => listed.unwrap_or_default(),
                Err(_) => return,
            };
            let stale = list::port(&listed, port).is_none_or(|(_, it)| it.node != own);
            if at.node == own && !stale {
                continue;
            }
            let wanted = NewNetAddress {
                vm: at.vm.clone(),
                node: own.clone(),
                moves: if at.node == own {
                    at.moves
                } else {
                    at.moves + 1
                },
                publish: at.publish.clone(),
            };
            if let Err(error) = self.put_port(&net.name, &port.mac, &wanted).await {
                tracing::info!("where {} is: {error}", at.vm);
                return;
            }
        }
    }

    /// Makes it so, again and again.
    pub(crate) async fn watch_nets(self: Arc<Self>) {
        loop {
            if let Err(error) = self.release_ports().await {
                tracing::debug!("addresses of VMs that were removed: {error}");
            }
            let said = self.sync_nets().await.err().map(|error| error.to_string());
            let before = std::mem::replace(&mut *lock(&self.nets.trouble), said.clone());
            if let Some(said) = said.filter(|said| before.as_ref() != Some(said)) {
                tracing::warn!("networks: {said}");
                self.say("net.trouble", "networks", said);
            }
            tokio::select! {
                () = tokio::time::sleep(BEAT) => {}
                () = self.nets.changed.notified() => {}
            }
        }
    }

    /// A VM runs on another node now, as that node says: what is sent to it goes there.
    ///
    /// # Errors
    /// The kernel.
    pub async fn net_moved(&self, moved: &NetMoved) -> Result<(), Error> {
        let listed: Nets = self.store.get(NETS, OWN)?.unwrap_or_default();
        if !list::is_news(&listed, moved) {
            return Ok(());
        }
        {
            let mut places = lock(&self.nets.places);
            let old = places.get(&moved.mac);
            if old.is_some_and(|old| old.moves >= moved.moves) {
                return Ok(());
            }
            places.insert(moved.mac.clone(), moved.clone());
        }
        self.forward(moved).await?;
        self.nets.changed.notify_one();
        Ok(())
    }

    /// The forwarding entries of this node.
    async fn forward(&self, moved: &NetMoved) -> Result<(), Error> {
        let mac: Mac = moved
            .mac
            .parse()
            .map_err(|error: supercloud_network::Invalid| Error::failed(error.to_string()))?;
        let nets = self.nets()?;
        let number = nets.nodes.iter().find(|node| node.node == moved.node);
        let number = number.and_then(|node| node.number.try_into().ok());
        let mut fabric = self.nets.fabric.lock().await;
        let applied = lock(&self.nets.applied).clone();
        if let (Some(fabric), Some((mut wanted, _)), Some(number)) =
            (fabric.as_mut(), applied, number)
        {
            fabric
                .moved(&mut wanted, mac, number)
                .await
                .map_err(|error| of_network(&error))?;
        }
        Ok(())
    }

    /// A VM has come to this node: all others hear of it at once.
    async fn has_come(self: &Arc<Self>, port: &NetPort) -> Result<(), Error> {
        let nets = self.nets()?;
        let Some((net, at)) = list::port(&nets, port) else {
            return Ok(());
        };
        let own = self.name();
        if at.node == own {
            return Ok(());
        }
        let moved = NetMoved {
            node: own.clone(),
            mac: port.mac.clone(),
            moves: at.moves + 1,
        };
        let mut telling = Vec::new();
        for member in self.members()?.members {
            if member.name != own {
                let (agent, moved) = (Arc::clone(self), moved.clone());
                telling.push(tokio::spawn(async move {
                    let mut there = agent.connect(&member.name).await?;
                    let path = "/v1/net-moves";
                    let _: serde_json::Value =
                        there.ask(Method::POST, path, Some(&moved), HEAR).await?;
                    Ok::<(), Error>(())
                }));
            }
        }
        self.net_moved(&moved).await?;
        for told in telling {
            // Who was not reached takes it from the list.
            if let Ok(Err(error)) = told.await {
                tracing::info!("{}: {error}", at.vm);
            }
        }
        let wanted = NewNetAddress {
            vm: at.vm.clone(),
            node: own,
            moves: moved.moves,
            publish: at.publish.clone(),
        };
        self.put_port(&net.name, &port.mac, &wanted).await?;
        Ok(())
    }

    async fn attach_net(&self, vm: &str, port: &NetPort) -> Result<String, Error> {
        let (name, options) = port.net.split_once(',').unwrap_or((&port.net, ""));
        if list::port(&self.nets()?, port).is_none() {
            let record: Option<VmRecord> = self.store.get(VMS, vm)?;
            let record =
                record.ok_or_else(|| Error::failed(format!("there is no VM {vm} here")))?;
            let first = record.ports.iter().position(|it| it == port) == Some(0);
            let wanted = NewNetAddress {
                vm: vm.into(),
                node: self.name(),
                moves: 0,
                publish: if first {
                    record.spec.publish
                } else {
                    Vec::new()
                },
            };
            self.put_port(name, &port.mac, &wanted).await?;
            self.catch_up().await;
        }
        self.sync_nets().await?;
        let mac: Mac = port
            .mac
            .parse()
            .map_err(|error: supercloud_network::Invalid| Error::failed(error.to_string()))?;
        let comma = if options.is_empty() { "" } else { "," };
        Ok(format!(
            "tap={},mac={mac},filter{comma}{options}",
            names::tap(mac)
        ))
    }
}

/// The address of a node, of where it is reached.
async fn ip_of(address: &str) -> Option<IpAddr> {
    if let Ok(at) = address.parse::<SocketAddr>() {
        return Some(at.ip()).filter(|ip| !ip.is_unspecified());
    }
    tokio::net::lookup_host(address)
        .await
        .ok()?
        .next()
        .map(|at| at.ip())
}

/// Virtual networks by their names, and what [`Given`] has.
#[derive(Default)]
pub struct Virtual {
    agent: OnceLock<Weak<Agent>>,
}

impl Virtual {
    /// Says whose they are; once, before anything is asked.
    pub(crate) fn of(&self, agent: &Arc<Agent>) {
        let _ = self.agent.set(Arc::downgrade(agent));
    }

    /// The agent, if the network is a virtual one.
    async fn agent(&self, port: &NetPort) -> Result<Option<Arc<Agent>>, Error> {
        let name = port.net.split(',').next().unwrap_or_default();
        let agent = self.agent.get().and_then(Weak::upgrade);
        let Some(agent) = agent.filter(|_| name != "user" && !name.starts_with("tap=")) else {
            return Ok(None);
        };
        let is_known =
            || -> Result<bool, Error> { Ok(agent.nets()?.nets.iter().any(|net| net.name == name)) };
        if !is_known()? {
            // It may be younger than what this node has heard.
            agent.catch_up().await;
        }
        Ok(is_known()?.then_some(agent))
    }
}

impl Networks for Virtual {
    fn can_attach<'a>(&'a self, port: &'a NetPort) -> Doing<'a, ()> {
        Box::pin(async {
            match self.agent(port).await? {
                Some(agent) => agent.sync_nets().await,
                None => Given.can_attach(port).await,
            }
        })
    }

    fn attach<'a>(&'a self, vm: &'a str, port: &'a NetPort) -> Doing<'a, String> {
        Box::pin(async {
            match self.agent(port).await? {
                Some(agent) => agent.attach_net(vm, port).await,
                None => Given.attach(vm, port).await,
            }
        })
    }

    fn moved<'a>(&'a self, _vm: &'a str, port: &'a NetPort) -> Doing<'a, ()> {
        Box::pin(async {
            match self.agent(port).await? {
                Some(agent) => agent.has_come(port).await,
                None => Ok(()),
            }
        })
    }

    fn detach<'a>(&'a self, _vm: &'a str, port: &'a NetPort) -> Doing<'a, ()> {
        Box::pin(async {
            // Its tap goes when the list says that it is elsewhere, or nowhere.
            if let Some(agent) = self.agent(port).await? {
                agent.nets.changed.notify_one();
            }
            Ok(())
        })
    }

    fn release<'a>(&'a self, _vm: &'a str, port: &'a NetPort) -> Doing<'a, ()> {
        Box::pin(async {
            let Some(agent) = self.agent(port).await? else {
                return Ok(());
            };
            // Who has the list may be away now.
            agent
                .store
                .change(|change| change.put(RELEASES, &port.mac, port))?;
            agent.release_ports().await?;
            agent.catch_up().await;
            Ok(())
        })
    }
}

/// An entry of the list.
pub(crate) type Entry<'a> = (&'a Net, &'a NetAddress);
