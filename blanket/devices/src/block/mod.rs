//! The block backend: what `xen-blkfront` of a guest finds behind its disks.
//!
//! One thread for each queue takes requests off its ring, maps what they grant, and gives
//! them to the disk; it answers them as the disk completes them, in any order. Data goes
//! between the disk and the guest's own pages, without a copy where the image's format
//! has none.

mod origins;
pub mod protocol;
mod queue;
mod worker;
mod written;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use blanket_disk::{Disk, SECTOR};

use crate::Guest;
use crate::bus::{ConnectError, Connection, Device, Fault, Frontend, Nodes};
use crate::grant::Mapping;
use crate::ring::Ring;
use crate::running::{Running, stop_all};

use protocol::{MAX_SEGMENTS, SLOT};
use written::Blocks;

pub use origins::Origins;
pub use written::BLOCK;

/// Most queues of a disk.
const MAX_QUEUES: u32 = 4;
/// Logarithm of the most pages of a ring: 16.
const MAX_RING_ORDER: u32 = 4;

/// Class of block devices.
pub const CLASS: &str = "vbd";

/// What the backend does when the host has no space left for the image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// Requests wait until there is space.
    #[default]
    Wait,
    /// They fail.
    Fail,
}

/// How a disk is given to a guest.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Number of the disk: 0 is `xvda`.
    pub index: u32,
    /// Most queues; the frontend takes at most one for each vCPU.
    pub queues: Option<u32>,
    /// Offer grants that stay mapped. The guest then copies all data through pages that
    /// it keeps granted. That spares a backend that must map them one by one by
    /// hypercalls; this one need not, so it is off.
    pub persistent: bool,
    /// When the host's space runs out.
    pub when_full: WhenFull,
    /// Bytes and requests for each second.
    pub limits: crate::Limits,
    /// Remember from which of its blocks each page was read ([`Vbd::origins`]): it stands on what
    /// others have too.
    pub origins: bool,
}

/// What a disk has done.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests that read.
    pub reads: AtomicU64,
    /// Bytes that they read.
    pub read_bytes: AtomicU64,
    /// Requests that wrote.
    pub writes: AtomicU64,
    /// Bytes that they wrote.
    pub written_bytes: AtomicU64,
    /// Flushes.
    pub flushes: AtomicU64,
    /// Discards.
    pub discards: AtomicU64,
    /// Requests that failed, or were no requests.
    pub errors: AtomicU64,
    /// Notifications sent to the guest.
    pub notifications: AtomicU64,
    /// Requests that wait for space on the host.
    pub waiting_for_space: AtomicU64,
}

/// A disk of a VM, over its reboots.
pub struct Vbd {
    config: Config,
    disk: Arc<dyn Disk>,
    counters: Arc<Counters>,
    limiter: Arc<Mutex<crate::Limiter>>,
    written: Arc<Blocks>,
    origins: Option<Arc<Origins>>,
    /// vCPUs of the VM.
    vcpus: u32,
}

impl Vbd {
    /// A disk that no guest uses yet.
    #[must_use]
    pub fn new(disk: Arc<dyn Disk>, config: Config, vcpus: u32) -> Self {
        Self {
            limiter: Arc::new(Mutex::new(crate::Limiter::new(config.limits))),
            origins: config.origins.then(Arc::default),
            config,
            disk,
            counters: Arc::default(),
            written: Arc::default(),
            vcpus,
        }
    }

    /// What it has done.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Its image.
    #[must_use]
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// Begins or ceases to note which blocks its guest writes.
    pub fn log(&self, on: bool) {
        self.written.set(on);
    }

    /// The blocks of [`BLOCK`] bytes that its guest has written since this was asked last.
    #[must_use]
    pub fn take_log(&self) -> Vec<u64> {
        self.written.take()
    }

    /// From which of its blocks its guest's pages were read, if that is remembered.
    #[must_use]
    pub fn origins(&self) -> Option<&Arc<Origins>> {
        self.origins.as_ref()
    }

    /// How it is given to the guest.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Nodes that tell the guest its size; to be written anew when it was resized.
    #[must_use]
    pub fn size_nodes(&self) -> Nodes {
        vec![("sectors".into(), (self.disk.size() / SECTOR).to_string())]
    }

    fn queues(&self) -> u32 {
        let most = self.config.queues.unwrap_or(MAX_QUEUES);
        most.min(self.vcpus).clamp(1, MAX_QUEUES)
    }
}

/// The number by which a guest knows disk `index` (`xen-vbd-interface.7`): `xvda` is 0.
#[must_use]
pub fn device_number(index: u32) -> u32 {
    if index < 16 {
        202 << 8 | index << 4
    } else {
        1 << 28 | index << 8
    }
}

/// The name that Linux gives disk `index`: `xvda` to `xvdz`, then `xvdaa`.
#[must_use]
pub fn device_name(index: u32) -> String {
    let mut letters = Vec::new();
    let mut left = index;
    loop {
        letters.push(char::from(b'a' + u8::try_from(left % 26).unwrap_or(0)));
        left /= 26;
        if left == 0 {
            break;
        }
        left -= 1;
    }
    format!("xvd{}", letters.iter().rev().collect::<String>())
}

impl Device for Vbd {
    fn class(&self) -> &'static str {
        CLASS
    }

    fn number(&self) -> u32 {
        device_number(self.config.index)
    }

    fn frontend_nodes(&self) -> Nodes {
        let number = self.number();
        let mut nodes = vec![
            ("virtual-device".into(), number.to_string()),
            ("device-type".into(), "disk".into()),
            ("trusted".into(), "1".into()),
        ];
        if number >> 28 != 0 {
            nodes.push(("virtual-device-ext".into(), number.to_string()));
        }
        nodes
    }

    fn backend_nodes(&self) -> Nodes {
        let flag = |on: bool| u32::from(on).to_string();
        let granularity = self.disk.discard_granularity();
        let mode = if self.disk.read_only() { "r" } else { "w" };
        let mut nodes: Nodes = vec![
            ("dev".into(), device_name(self.config.index)),
            ("mode".into(), mode.into()),
            ("device-type".into(), "disk".into()),
            ("removable".into(), "0".into()),
            ("feature-flush-cache".into(), flag(!self.disk.read_only())),
            ("feature-persistent".into(), flag(self.config.persistent)),
            (
                "feature-max-indirect-segments".into(),
                MAX_SEGMENTS.to_string(),
            ),
            ("max-ring-page-order".into(), MAX_RING_ORDER.to_string()),
            ("multi-queue-max-queues".into(), self.queues().to_string()),
        ];
        if granularity > 0 && !self.disk.read_only() {
            nodes.push(("feature-discard".into(), "1".into()));
            nodes.push(("discard-granularity".into(), granularity.to_string()));
            nodes.push(("discard-alignment".into(), "0".into()));
        }
        nodes
    }

    fn connect(
        &self,
        guest: &Arc<dyn Guest>,
        frontend: &Frontend<'_>,
        fault: Fault,
    ) -> Result<Box<dyn Connection>, ConnectError> {
        if let Some(protocol) = frontend.text("protocol")
            && protocol != "x86_64-abi"
        {
            return Err(frontend.wrong("protocol"));
        }
        let queues = frontend.optional("multi-queue-num-queues")?.unwrap_or(1);
        if queues == 0 || queues > self.queues() {
            return Err(frontend.wrong("multi-queue-num-queues"));
        }
        let persistent =
            self.config.persistent && frontend.optional("feature-persistent")? == Some(1);
        let mut connected = Connected {
            queues: Vec::new(),
            nodes: self.connected_nodes(),
        };
        for index in 0..queues {
            let prefix = Frontend::queue_prefix(queues, index);
            let ring = map_ring(guest, frontend, &prefix)?;
            let port = frontend.number(&format!("{prefix}event-channel"))?;
            let kick = Running::kick()?;
            let disk = self
                .disk
                .queue(ring.slots())
                .map_err(|source| ConnectError::Host {
                    what: "a queue of the disk",
                    source,
                })?;
            let queue = queue::Queue::new(
                Arc::clone(guest),
                ring,
                disk,
                queue::Setup {
                    name: device_name(self.config.index),
                    written: Arc::clone(&self.written),
                    // What is read by way of pages that stay granted is copied to others.
                    origins: self.origins.clone().filter(|_| !persistent),
                    persistent,
                    read_only: self.disk.read_only(),
                    when_full: self.config.when_full,
                },
                Arc::clone(&self.counters),
            );
            let worker = worker::Worker {
                guest: Arc::clone(guest),
                kick: Arc::clone(&kick),
                port,
                queue,
                limiter: Arc::clone(&self.limiter),
                fault: fault.clone(),
                again: None,
            };
            let name = format!("{}-{index}", device_name(self.config.index));
            let running = Running::start(guest, &[port], kick, name, move || worker.run())?;
            connected.queues.push(running);
        }
        Ok(Box::new(connected))
    }
}

impl Vbd {
    fn connected_nodes(&self) -> Nodes {
        let mut nodes = self.size_nodes();
        nodes.push(("sector-size".into(), SECTOR.to_string()));
        nodes.push(("physical-sector-size".into(), "4096".into()));
        // VDISK_READONLY.
        let info = if self.disk.read_only() { 4 } else { 0 };
        nodes.push(("info".into(), info.to_string()));
        nodes
    }
}

fn map_ring(
    guest: &Arc<dyn Guest>,
    frontend: &Frontend<'_>,
    prefix: &str,
) -> Result<Ring<SLOT>, ConnectError> {
    let order = frontend.optional("ring-page-order")?;
    let grefs: Vec<u32> = match order {
        None => vec![frontend.number(&format!("{prefix}ring-ref"))?],
        Some(order) if order <= MAX_RING_ORDER => (0..1 << order)
            .map(|page| {
                // With one page a frontend uses the old name.
                let name = if order == 0 {
                    format!("{prefix}ring-ref")
                } else {
                    format!("{prefix}ring-ref{page}")
                };
                frontend.number(&name)
            })
            .collect::<Result<_, _>>()?,
        Some(_) => return Err(frontend.wrong("ring-page-order")),
    };
    let pages: Vec<Mapping> = grefs
        .iter()
        .map(|gref| guest.grants().map(*gref, true))
        .collect::<Result<_, _>>()?;
    Ring::new(pages).ok_or_else(|| frontend.wrong(&format!("{prefix}ring-ref")))
}

/// A connected frontend.
struct Connected {
    queues: Vec<Running>,
    nodes: Nodes,
}

impl Connection for Connected {
    fn nodes(&self) -> Nodes {
        self.nodes.clone()
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        stop_all(&self.queues);
    }
}

pub(crate) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

#[cfg(test)]
mod tests;
