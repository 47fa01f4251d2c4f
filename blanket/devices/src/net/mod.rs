//! The network backend: what `xen-netfront` of a guest finds behind its interfaces.
//!
//! One thread for each queue moves packets both ways between the guest's rings and a
//! [`Link`] of the host's. What the guest sends is written from its own pages, but for the
//! first bytes, which are copied and then checked; what it gets is read into pages that it
//! has posted. Checksums and the cutting into segments are left to whoever takes the
//! packet, and made here for one who cannot.

pub mod headers;
pub mod link;
mod mac;
pub mod offload;
pub mod protocol;
mod rx;
mod scratch;
mod streams;
mod tx;
mod wait;
mod worker;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::block::count;
use crate::bus::{ConnectError, Connection, Device, Fault, Frontend, Nodes};
use crate::ring::Ring;
use crate::running::{Running, stop_all};
use crate::sync::lock;
use crate::{Guest, Limiter, Limits};

pub use link::{Link, LinkState};
pub use mac::{BadMac, Mac};
use offload::Offloads;

/// Class of network devices.
pub const CLASS: &str = "vif";

/// Most queues of a device; Linux takes at most as many.
pub const MAX_QUEUES: u32 = 8;

/// Most multicast addresses that a guest subscribes to (Linux, `XEN_NETBK_MCAST_MAX`).
const MAX_GROUPS: usize = 64;

/// How a network is given to a guest.
#[derive(Clone, Debug)]
pub struct Config {
    /// Number of the device: 0 is the first that the guest finds.
    pub index: u32,
    /// Its address.
    pub mac: Mac,
    /// Most queues; never more than one for each vCPU.
    pub queues: Option<u32>,
    /// The MTU that the guest is told. Linux does not look.
    pub mtu: Option<u16>,
    /// Packets from the guest with another source than its address are dropped.
    pub filter: bool,
    /// Checksums and segmentation may be left to who takes a packet.
    pub offloads: bool,
    /// Bytes and packets for each second to the guest.
    pub to_guest: Limits,
    /// And from it.
    pub from_guest: Limits,
}

impl Config {
    /// Without limits, with everything that makes it fast.
    #[must_use]
    pub fn new(index: u32, mac: Mac) -> Self {
        Self {
            index,
            mac,
            queues: None,
            mtu: None,
            filter: false,
            offloads: true,
            to_guest: Limits::default(),
            from_guest: Limits::default(),
        }
    }
}

/// What a device has done in one direction.
#[derive(Debug, Default)]
pub struct Direction {
    /// Packets that were passed on.
    pub packets: AtomicU64,
    /// Their bytes.
    pub bytes: AtomicU64,
    /// Packets that were dropped: the link is down; the guest takes none so long, or did
    /// not subscribe to its group.
    pub dropped: AtomicU64,
    /// Packets with a source that is not the guest's.
    pub filtered: AtomicU64,
    /// Packets or pages of the guest's that were wrong, and packets that the host refused.
    pub errors: AtomicU64,
}

/// What a device has done.
#[derive(Debug, Default)]
pub struct Counters {
    /// To the guest.
    pub to_guest: Direction,
    /// From the guest.
    pub from_guest: Direction,
    /// Notifications sent to the guest.
    pub notifications: AtomicU64,
}

/// What the queues of a device share.
struct Shared {
    counters: Arc<Counters>,
    to_guest: Option<Arc<Mutex<Limiter>>>,
    from_guest: Option<Arc<Mutex<Limiter>>>,
    /// The only source that the guest may use.
    filter: Option<Mac>,
}

/// The multicast addresses that a frontend subscribed to.
#[derive(Debug, Default)]
struct Groups {
    /// It asked for those only.
    controlled: AtomicBool,
    list: Mutex<Vec<Mac>>,
}

impl Groups {
    /// Whether there was room for it.
    fn add(&self, group: Mac) -> bool {
        let mut list = lock(&self.list);
        if list.contains(&group) {
            return true;
        }
        if list.len() == MAX_GROUPS {
            return false;
        }
        list.push(group);
        true
    }

    fn remove(&self, group: Mac) {
        lock(&self.list).retain(|it| *it != group);
    }

    /// Whether the frontend does not want packets to that address.
    fn unwanted(&self, to: Mac) -> bool {
        to.is_multicast()
            && to != Mac::BROADCAST
            && self.controlled.load(Ordering::Relaxed)
            && !lock(&self.list).contains(&to)
    }
}

/// A network device of a VM, over its reboots.
pub struct Vif {
    config: Config,
    link: Box<dyn Link>,
    shared: Arc<Shared>,
    /// vCPUs of the VM.
    vcpus: u32,
}

impl Vif {
    /// A device that no guest uses yet.
    #[must_use]
    pub fn new(link: Box<dyn Link>, config: Config, vcpus: u32) -> Self {
        let limiter = |limits: Limits| {
            (limits != Limits::default()).then(|| Arc::new(Mutex::new(Limiter::new(limits))))
        };
        Self {
            shared: Arc::new(Shared {
                counters: Arc::default(),
                to_guest: limiter(config.to_guest),
                from_guest: limiter(config.from_guest),
                filter: config.filter.then_some(config.mac),
            }),
            config,
            link,
            vcpus,
        }
    }

    /// What it has done.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// What it is connected to.
    #[must_use]
    pub fn link(&self) -> &dyn Link {
        &*self.link
    }

    /// How it is given to the guest.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Tells the network that the guest is here now, which has been somewhere else: bridges
    /// and switches learn where its address is from a packet of it.
    pub fn announce(&self) {
        self.link.announce(&self.config.mac.announcement());
    }

    /// The guest's address.
    #[must_use]
    pub fn mac(&self) -> Mac {
        self.config.mac
    }

    fn queues(&self) -> u32 {
        let most = self.config.queues.unwrap_or(MAX_QUEUES);
        most.min(self.vcpus)
            .min(self.link.max_queues())
            .clamp(1, MAX_QUEUES)
    }
}

impl Device for Vif {
    fn class(&self) -> &'static str {
        CLASS
    }

    fn number(&self) -> u32 {
        self.config.index
    }

    fn frontend_nodes(&self) -> Nodes {
        let mut nodes: Nodes = vec![
            ("handle".into(), self.config.index.to_string()),
            ("mac".into(), self.config.mac.to_string()),
            ("trusted".into(), "1".into()),
        ];
        if let Some(mtu) = self.config.mtu {
            nodes.push(("mtu".into(), mtu.to_string()));
        }
        nodes
    }

    fn backend_nodes(&self) -> Nodes {
        let takes = self.link.takes();
        let node = |name: &str, on: bool| (name.to_owned(), u32::from(on).to_string());
        let offloads = self.config.offloads;
        vec![
            ("handle".into(), self.config.index.to_string()),
            ("mac".into(), self.config.mac.to_string()),
            ("multi-queue-max-queues".into(), self.queues().to_string()),
            node("feature-rx-copy", true),
            node("feature-rx-flip", false),
            node("feature-sg", true),
            node("feature-gso-tcpv4", offloads && takes.tso4),
            node("feature-gso-tcpv6", offloads && takes.tso6),
            // Made here for a link that does not.
            node("feature-ipv6-csum-offload", offloads),
            node("feature-no-csum-offload", !offloads),
            node("feature-split-event-channels", true),
            node("feature-multicast-control", true),
        ]
    }

    fn connect(
        &self,
        guest: &Arc<dyn Guest>,
        frontend: &Frontend<'_>,
        fault: Fault,
    ) -> Result<Box<dyn Connection>, ConnectError> {
        // Without the first, pages would change hands; without the second, the backend
        // would have to look again and again whether the guest has posted pages.
        for name in ["request-rx-copy", "feature-rx-notify"] {
            if frontend.number(name)? != 1 {
                return Err(frontend.wrong(name));
            }
        }
        let queues = frontend.optional("multi-queue-num-queues")?.unwrap_or(1);
        if queues == 0 || queues > self.queues() {
            return Err(frontend.wrong("multi-queue-num-queues"));
        }
        let (offloads, scattered) = self.takes(frontend)?;
        let groups = Arc::new(Groups::default());
        let controlled = flag(frontend, "request-multicast-control")?;
        groups.controlled.store(controlled, Ordering::Relaxed);
        let ports = self
            .link
            .open(queues, offloads)
            .map_err(|source| ConnectError::Host {
                what: "the network's queues",
                source,
            })?;
        let mut connected = Connected { queues: Vec::new() };
        for (index, link) in (0..queues).zip(ports) {
            let prefix = Frontend::queue_prefix(queues, index);
            let name = |name: &str| format!("{prefix}{name}");
            let (tx_port, rx_port) = match frontend.optional(&name("event-channel-tx"))? {
                Some(tx) => (tx, frontend.number(&name("event-channel-rx"))?),
                None => {
                    let both = frontend.number(&name("event-channel"))?;
                    (both, both)
                }
            };
            let tx = tx::Tx::new(
                guest,
                map_ring(guest, frontend, &name("tx-ring-ref"))?,
                Arc::clone(&self.shared),
                Arc::clone(&groups),
                self.link.takes(),
                self.link.room(),
            );
            let rx = rx::Rx::new(
                Arc::clone(guest),
                map_ring(guest, frontend, &name("rx-ring-ref"))?,
                Arc::clone(&self.shared),
                Arc::clone(&groups),
                offloads,
                scattered,
            );
            let kick = Running::kick()?;
            let waiter = wait::Waiter::new(&kick).map_err(|source| ConnectError::Host {
                what: "a queue's descriptors",
                source,
            })?;
            let worker = worker::Worker {
                guest: Arc::clone(guest),
                kick: Arc::clone(&kick),
                waiter,
                tx,
                tx_port,
                rx,
                rx_port,
                link,
                fault: fault.clone(),
            };
            let name = format!("vif{}-{index}", self.config.index);
            let ports = [tx_port, rx_port];
            let running = Running::start(guest, &ports, kick, name, move || worker.run())?;
            connected.queues.push(running);
        }
        Ok(Box::new(connected))
    }
}

impl Vif {
    /// What a frontend takes undone, and whether it takes packets in pieces.
    fn takes(&self, frontend: &Frontend<'_>) -> Result<(Offloads, bool), ConnectError> {
        let scattered = flag(frontend, "feature-sg")?;
        let csum4 = !flag(frontend, "feature-no-csum-offload")?;
        let csum6 = flag(frontend, "feature-ipv6-csum-offload")?;
        let offloads = Offloads {
            csum4,
            csum6,
            tso4: scattered && csum4 && flag(frontend, "feature-gso-tcpv4")?,
            tso6: scattered && csum6 && flag(frontend, "feature-gso-tcpv6")?,
        };
        if self.config.offloads {
            Ok((offloads, scattered))
        } else {
            Ok((Offloads::default(), scattered))
        }
    }
}

/// Whether a node says that a feature is there.
fn flag(frontend: &Frontend<'_>, name: &str) -> Result<bool, ConnectError> {
    Ok(frontend.optional(name)?.unwrap_or(0) != 0)
}

fn map_ring<const SLOT: usize>(
    guest: &Arc<dyn Guest>,
    frontend: &Frontend<'_>,
    name: &str,
) -> Result<Ring<SLOT>, ConnectError> {
    let page = guest.grants().map(frontend.number(name)?, true)?;
    Ring::new(vec![page]).ok_or_else(|| frontend.wrong(name))
}

/// A connected frontend.
struct Connected {
    queues: Vec<Running>,
}

impl Connection for Connected {
    fn nodes(&self) -> Nodes {
        Nodes::new()
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        stop_all(&self.queues);
    }
}

#[cfg(test)]
mod tests;
