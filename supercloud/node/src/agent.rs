//! The agent: what it has, and who it is.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Instant;

use rustls::{ClientConfig, ServerConfig};
use supercloud_api::{Code, Error, JoinToken, Member, Members, NodeStatus, Progress};
use tokio::sync::{Notify, OwnedMutexGuard};

use crate::blanket::{Blanket, Process};
use crate::client;
use crate::config::Config;
use crate::events::Events;
use crate::networks::Networks;
use crate::pki::{self, Identity};
use crate::record::{IDENTITY, MEMBERS, OWN};
use crate::store::Store;
use crate::tls::{self, Removed};

/// A node's agent.
pub struct Agent {
    pub(crate) config: Config,
    pub(crate) store: Store,
    pub(crate) blanket: Blanket,
    pub(crate) networks: Arc<dyn Networks>,
    pub(crate) nets: crate::nets::State,
    pub(crate) events: Events,
    pub(crate) removed: Removed,
    own: RwLock<Arc<Own>>,
    /// What was said last by each node, or why it did not.
    pub(crate) peers: Mutex<HashMap<String, Heard>>,
    /// Processes, as they were seen last.
    pub(crate) processes: Mutex<HashMap<String, Process>>,
    /// How far moves are that go on.
    pub(crate) progress: Mutex<HashMap<String, Progress>>,
    /// Moves that somebody drives.
    pub(crate) driven: Mutex<HashMap<String, Arc<Notify>>>,
    locks: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Something of a VM has changed.
    pub(crate) wake: Notify,
    /// Read by who needs an image that nothing on the disk says yet that he needs; written by
    /// who removes some.
    pub(crate) images: tokio::sync::RwLock<()>,
}

/// Who this node is, ready for use.
pub(crate) struct Own {
    pub(crate) identity: Identity,
    pub(crate) server: Arc<ServerConfig>,
    pub(crate) client: Arc<ClientConfig>,
}

/// What was heard of a node last.
#[derive(Clone, Debug)]
pub(crate) struct Heard {
    pub(crate) at: Instant,
    pub(crate) what: Result<(NodeStatus, i64), Error>,
}

/// A mutex that nobody can spoil: what is under it is whole at each moment.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Own {
    fn new(identity: Identity, removed: &Removed) -> Result<Arc<Self>, Error> {
        Ok(Arc::new(Self {
            server: tls::server(&identity, removed)?,
            client: tls::client(&identity, removed)?,
            identity,
        }))
    }
}

/// The node's name if the user gives none: the machine's, as far as it is one.
fn own_name() -> String {
    let system = rustix::system::uname();
    let name = system.nodename().to_string_lossy();
    let name = name.split('.').next().unwrap_or_default();
    if supercloud_api::is_name(name) {
        name.to_owned()
    } else {
        "node".into()
    }
}

impl Agent {
    /// Opens what it remembers; at its first start it becomes the first node of a cluster, or
    /// joins the one that it has a token of.
    ///
    /// # Errors
    /// The disk, another agent, the token.
    pub async fn open(config: Config, networks: Arc<dyn Networks>) -> Result<Arc<Self>, Error> {
        let store = Store::open(&config.data)?;
        let present = store.get(IDENTITY, OWN)?;
        let token = match &config.join {
            Some(text) => Some(text.parse::<JoinToken>()?),
            None => None,
        };
        let identity = match (present, token) {
            (Some(identity), _) => identity,
            (None, token) => {
                let name = config.name.clone().unwrap_or_else(own_name);
                supercloud_api::name("a node", &name)?;
                match token {
                    Some(token) => {
                        let address = config.address()?;
                        crate::cluster::join(&store, &name, &address, &token).await?
                    }
                    None => found(&store, &config, &name)?,
                }
            }
        };
        if let Some(name) = &config.name
            && *name != identity.name
        {
            return Err(Error::new(
                Code::Conflict,
                format!("this node is {}, and not {name}", identity.name),
                "a node keeps its name: leave --name out, or remove the node and its data",
            ));
        }
        let removed = Removed::default();
        let members: Members = store.get(MEMBERS, OWN)?.unwrap_or_default();
        removed.set(members.removed);
        let own = Own::new(identity, &removed)?;
        Ok(Arc::new(Self {
            blanket: Blanket::new(config.blanket.clone()),
            config,
            store,
            networks,
            nets: Default::default(),
            events: Events::default(),
            removed,
            own: RwLock::new(own),
            peers: Mutex::default(),
            processes: Mutex::default(),
            progress: Mutex::default(),
            driven: Mutex::default(),
            locks: Mutex::default(),
            wake: Notify::new(),
            images: tokio::sync::RwLock::default(),
        }))
    }

    pub(crate) fn own(&self) -> Arc<Own> {
        Arc::clone(&self.own.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// From now on it is another one: it has joined a cluster.
    pub(crate) fn become_another(&self, identity: Identity) -> Result<(), Error> {
        let own = Own::new(identity, &self.removed)?;
        *self.own.write().unwrap_or_else(PoisonError::into_inner) = own;
        Ok(())
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> String {
        self.own().identity.name.clone()
    }

    /// Who belongs to the cluster.
    ///
    /// # Errors
    /// The disk.
    pub fn members(&self) -> Result<Members, Error> {
        Ok(self.store.get(MEMBERS, OWN)?.unwrap_or_default())
    }

    /// Another node.
    ///
    /// # Errors
    /// There is none by that name.
    pub fn member(&self, name: &str) -> Result<Member, Error> {
        let members = self.members()?.members;
        let known: Vec<&str> = members.iter().map(|member| member.name.as_str()).collect();
        let known = known.join(", ");
        members
            .into_iter()
            .find(|member| member.name == name)
            .ok_or_else(|| {
                Error::not_found(
                    format!("there is no node {name}"),
                    format!("there are: {known}"),
                )
            })
    }

    /// A connection to another node.
    ///
    /// # Errors
    /// There is none by that name, or it cannot be reached.
    pub(crate) async fn connect(&self, name: &str) -> Result<client::Agent, Error> {
        let member = self.member(name)?;
        client::Agent::there(name, &member.address, Arc::clone(&self.own().client)).await
    }

    /// Nobody else does something with this VM as long as this is held.
    pub(crate) async fn alone_with(&self, vm: &str) -> OwnedMutexGuard<()> {
        let mutex = Arc::clone(lock(&self.locks).entry(vm.to_owned()).or_default());
        mutex.lock_owned().await
    }

    pub(crate) fn say(&self, kind: &str, about: &str, text: impl Into<String>) {
        self.events.say(&self.name(), kind, about, text);
    }

    /// A new identity, of an operation or a VM.
    pub(crate) fn new_id() -> Result<String, Error> {
        Ok(supercloud_api::new_id(random()?))
    }
}

/// Random bytes of the kernel.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], Error> {
    let mut bytes = [0; N];
    let mut got = 0;
    while let Some(rest) = bytes.get_mut(got..).filter(|rest| !rest.is_empty()) {
        let read = rustix::rand::getrandom(rest, rustix::rand::GetRandomFlags::empty());
        got += read.map_err(|error| Error::failed(format!("no random bytes: {error}")))?;
    }
    Ok(bytes)
}

/// This node is the first one of a cluster.
fn found(store: &Store, config: &Config, name: &str) -> Result<Identity, Error> {
    let identity = Identity::first(name)?;
    let members = Members {
        version: 1,
        members: vec![Member {
            name: name.into(),
            address: config
                .address()
                .unwrap_or_else(|_| config.listen.to_string()),
            certificate: pki::sum(&identity.certificate()?),
            has_ca: true,
        }],
        removed: Vec::new(),
    };
    store.change(|change| {
        change.put(IDENTITY, OWN, &identity)?;
        change.put(MEMBERS, OWN, &members)
    })?;
    Ok(identity)
}
