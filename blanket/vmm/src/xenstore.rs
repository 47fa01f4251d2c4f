//! The xenstore as a guest reaches it: a ring page, and the store behind it.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use blanket_abi::xen::io::xenstore as page;
use blanket_devices::bus::Changed;
use blanket_xenstore::state::{ConnectionState, RestoreError, StoreState};
use blanket_xenstore::{ConnId, Connection, DomId, DomainSpec, Errno, Path, Quotas, Store, wire};
use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::builder::{Domain, STORE_PORT};
use crate::hypervisor::Machine;
use crate::ring::{Place, Ring};
use crate::sync::lock;
use crate::vm::Backend;

/// Values of the ring page's error field (`XENSTORE_ERROR_*`, `public/io/xs_wire.h`).
mod ring_error {
    /// An index is out of range.
    pub const INDEX: u32 = 2;
    /// The protocol was violated.
    pub const PROTOCOL: u32 = 3;
}

/// Times that requests are taken from the ring before whoever else wants the store has
/// it: other vCPUs of the guest may write and read as fast as they are served.
const ROUNDS: u32 = 64;

/// A domain's store and its ring.
pub struct Xenstore {
    domain: DomId,
    machine: Arc<dyn Machine>,
    inner: Mutex<Inner>,
    /// How many of the host's threads want it.
    waiting: AtomicU32,
}

/// A store and its ring as plain data (`docs/formats.md`, "A saved VM").
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    store: StoreState,
    connection: ConnectionState,
    /// Number of the host's client.
    host: u32,
    /// Our indices: of the requests, of the replies.
    indices: [u32; 2],
    /// Taken from the ring, and not carried out.
    unread: Vec<u8>,
    /// The guest has broken its ring.
    closed: bool,
}

struct Inner {
    store: Store,
    host: ConnId,
    guest: Connection,
    requests: Ring,
    replies: Ring,
    /// Taken from the ring, and waiting for the guest to read its replies.
    unread: Vec<u8>,
    /// Where to report a broken ring; `None` once that is done.
    error: Option<(Arc<crate::builder::GuestMemory>, GuestAddress)>,
    /// Told of changes in the guest's device directories.
    bus: Option<Changed>,
}

impl Xenstore {
    /// A store with the domain's first nodes, connected to its ring page.
    ///
    /// # Errors
    /// Only for a name or UUID that cannot be in a path.
    pub fn new(
        domain: &Domain,
        spec: &DomainSpec,
        machine: Arc<dyn Machine>,
    ) -> Result<Self, Errno> {
        let mut store = Store::default();
        let host = store.connect(0);
        store.introduce(host, spec)?;
        store.watch(host, &format!("{}/device", Path::home(spec.domain)), b"bus")?;
        let guest = Connection::new(&mut store, spec.domain);
        let features = GuestAddress(domain.store.base() + page::SERVER_FEATURES as u64);
        // A page of the domain's own RAM; a guest that does not read them has the oldest
        // protocol.
        let _ = domain
            .memory
            .store(wire::FEATURES, features, Ordering::Release);
        Ok(Self {
            domain: spec.domain,
            machine,
            waiting: AtomicU32::new(0),
            inner: Mutex::new(Inner::new(domain, store, host, guest, [0; 2])),
        })
    }

    /// The store of a domain that was saved, which may hold what another program than
    /// this one wrote: all of it is checked.
    ///
    /// # Errors
    /// Which part of it cannot be.
    pub fn restore(
        domain: &Domain,
        id: DomId,
        state: State,
        machine: Arc<dyn Machine>,
    ) -> Result<Self, RestoreError> {
        let store = Store::restore(state.store, Quotas::default())?;
        let guest = Connection::restore(state.connection, &store)?;
        let host = store
            .client_by_number(state.host)
            .ok_or(RestoreError::Client(state.host))?;
        let mut inner = Inner::new(domain, store, host, guest, state.indices);
        inner.unread = state.unread;
        if state.closed {
            inner.error = None;
        }
        Ok(Self {
            domain: id,
            machine,
            waiting: AtomicU32::new(0),
            inner: Mutex::new(inner),
        })
    }

    /// Does `work` with the state of store and ring, which stay as they are meanwhile.
    pub(crate) fn standing_still<T>(&self, work: impl FnOnce(State) -> T) -> T {
        let inner = self.for_host();
        let state = State {
            store: inner.store.save(),
            connection: inner.guest.save(),
            host: inner.host.number(),
            indices: [inner.requests.index(), inner.replies.index()],
            unread: inner.unread.clone(),
            closed: inner.error.is_none(),
        };
        work(state)
    }

    /// Asks the guest to end itself: `poweroff` or `reboot`.
    ///
    /// # Errors
    /// Those of a write.
    pub fn request_shutdown(&self, how: &str) -> Result<(), Errno> {
        self.write("control/shutdown", how.as_bytes())
    }

    /// Writes a node below the domain's home as the host.
    ///
    /// # Errors
    /// `EINVAL` for the path.
    pub fn write(&self, path: &str, value: &[u8]) -> Result<(), Errno> {
        let path = Path::parse(path, self.domain)?;
        let mut inner = self.for_host();
        let host = inner.host;
        inner.store.write(host, None, &path, value)?;
        self.pump(&mut inner);
        Ok(())
    }

    /// Reads a node below the domain's home as the host.
    ///
    /// # Errors
    /// `ENOENT`; `EINVAL` for the path.
    pub fn read(&self, path: &str) -> Result<Vec<u8>, Errno> {
        let path = Path::parse(path, self.domain)?;
        let mut inner = self.for_host();
        let host = inner.host;
        inner.store.read(host, None, &path)
    }

    /// Sets what is told of changes in the guest's device directories.
    pub fn set_bus(&self, bus: Changed) {
        self.for_host().bus = Some(bus);
    }

    /// The store, for one of the host's threads: the guest's stand back for it.
    fn for_host(&self) -> MutexGuard<'_, Inner> {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let inner = lock(&self.inner);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        inner
    }

    /// Uses the store as domain 0.
    pub fn with_store(&self, act: &mut dyn FnMut(&mut Store, ConnId)) {
        let mut inner = self.for_host();
        let host = inner.host;
        act(&mut inner.store, host);
        self.pump(&mut inner);
    }

    /// Moves bytes both ways until nothing moves or the guest has had its turn, and tells
    /// the guest if any did. Whether requests may be left: those of which the guest has
    /// notified are for [`Backend::notified`], which is still at it then or about to come.
    fn pump(&self, inner: &mut Inner) -> bool {
        let mut left = false;
        match inner.pump() {
            Ok(moved) => {
                if moved.any
                    && let Err(error) = self.machine.raise(STORE_PORT)
                {
                    tracing::warn!(%error, "cannot signal the xenstore ring");
                }
                left = moved.requests_left;
            }
            Err((code, text)) => {
                if let Some((memory, at)) = inner.error.take() {
                    tracing::warn!("the guest's xenstore ring is closed: {text}");
                    // For the guest's eyes only; a failure changes nothing here.
                    let _ = memory.store(code, at, Ordering::Release);
                }
            }
        }
        inner.tell_bus();
        left
    }
}

/// What [`Inner::pump`] did.
struct Moved {
    any: bool,
    requests_left: bool,
}

impl Inner {
    /// A store, whose clients are `host` and `guest`, and a ring in which our indices are
    /// the requests' and the replies'.
    fn new(
        domain: &Domain,
        store: Store,
        host: ConnId,
        guest: Connection,
        [requests, replies]: [u32; 2],
    ) -> Self {
        let ring = |data, producer, consumer, index| {
            let place = Place {
                data,
                size: page::RING_SIZE,
                producer,
                consumer,
            };
            Ring::new(Arc::clone(&domain.memory), domain.store, place, index)
        };
        let error = GuestAddress(domain.store.base() + page::ERROR as u64);
        Self {
            store,
            host,
            guest,
            requests: ring(page::REQ, page::REQ_PROD, page::REQ_CONS, requests),
            replies: ring(page::RSP, page::RSP_PROD, page::RSP_CONS, replies),
            unread: Vec::new(),
            error: Some((Arc::clone(&domain.memory), error)),
            bus: None,
        }
    }

    /// Tells the bus if domain 0's watch fired.
    fn tell_bus(&mut self) {
        let mut fired = false;
        while self.store.next_event(self.host).is_some() {
            fired = true;
        }
        if fired && let Some(bus) = &self.bus {
            bus.notify();
        }
    }

    fn pump(&mut self) -> Result<Moved, (u32, String)> {
        let mut moved = Moved {
            any: false,
            requests_left: false,
        };
        if self.error.is_none() {
            return Ok(moved);
        }
        let mut rounds = 0;
        loop {
            self.guest.collect_events(&mut self.store);
            let mut progress = false;
            // To its end, which comes: a guest that has not read notifies when it does.
            while !self.guest.output().is_empty() {
                let sent = self
                    .replies
                    .produce(self.guest.output())
                    .map_err(|e| (ring_error::INDEX, e.to_string()))?;
                if sent == 0 {
                    break;
                }
                self.guest.sent(sent);
                progress = true;
            }
            if rounds < ROUNDS {
                progress |= self.take_requests()?;
                rounds += 1;
            } else {
                moved.requests_left = true;
            }
            if !progress {
                return Ok(moved);
            }
            moved.any = true;
        }
    }

    /// Takes what is in the ring of requests, and carries it out. Whether there was any.
    fn take_requests(&mut self) -> Result<bool, (u32, String)> {
        let mut progress = false;
        if self.unread.is_empty() && self.guest.ready() {
            self.unread = self
                .requests
                .consume(page::RING_SIZE as usize)
                .map_err(|e| (ring_error::INDEX, e.to_string()))?;
            progress |= !self.unread.is_empty();
        }
        let taken = self
            .guest
            .receive(&mut self.store, &self.unread)
            .map_err(|e| (ring_error::PROTOCOL, e.to_string()))?;
        self.unread.drain(..taken);
        Ok(progress || taken > 0)
    }
}

impl Backend for Xenstore {
    fn notified(&self) {
        while self.pump(&mut lock(&self.inner)) {
            // Whoever gives the lock back would have it again before others wake.
            while self.waiting.load(Ordering::SeqCst) > 0 {
                std::thread::yield_now();
            }
        }
    }
}
