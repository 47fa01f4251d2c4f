//! A guest and its frontends for tests: everything but the hypervisor is real.

mod blkfront;
mod disk;
mod netfront;

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use blanket_abi::Gfn;
use blanket_abi::xen::domid;
use blanket_abi::xen::grant::flag;
use blanket_xenstore::{ConnId, DomainSpec, Path, Store};
use vm_memory::{Bytes as _, GuestAddress};

use crate::bus::Changed;
use crate::grant::Grants;
use crate::{Guest, GuestMemory, Listener};

pub use blkfront::Blkfront;
pub use disk::{MemoryDisk, Shared};
pub use netfront::{Features, Got, NetQueue, Netfront, tx_slot};

/// Frames of RAM.
const RAM: u64 = 4096;
/// Frames of its grant table.
const GRANT_FRAMES: u64 = 4;
/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// A guest without vCPUs.
pub struct FakeGuest {
    memory: Arc<GuestMemory>,
    grants: Arc<Grants>,
    vcpus: u32,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    store: Store,
    host: ConnId,
    conn: ConnId,
    bus: Option<Changed>,
    listeners: BTreeMap<u32, Arc<dyn Listener>>,
    raised: BTreeMap<u32, u64>,
    next_frame: u64,
    next_gref: u32,
    next_port: u32,
}

impl FakeGuest {
    /// A guest with its store.
    ///
    /// # Panics
    /// The host has no memory for it.
    #[must_use]
    pub fn new(vcpus: u32) -> Arc<Self> {
        let size = usize::try_from((RAM + GRANT_FRAMES) << 12).expect("small");
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), size)]).expect("memory");
        let memory = Arc::new(memory);
        let grants = Grants::new(&memory, RAM, Gfn(RAM), GRANT_FRAMES).expect("inside");
        let mut store = Store::default();
        let host = store.connect(domid::BACKEND);
        let spec = DomainSpec {
            domain: domid::GUEST,
            name: "test".into(),
            uuid: "0".into(),
            generation: "0:0".into(),
            memory_kib: 1,
            max_memory_kib: 1,
            vcpus,
            store_ring: (0, 1),
            console_ring: (0, 2),
        };
        store.introduce(host, &spec).expect("a domain");
        let home = Path::home(domid::GUEST);
        store
            .watch(host, &format!("{home}/device"), b"bus")
            .expect("a watch");
        let conn = store.connect(domid::GUEST);
        Arc::new(Self {
            memory,
            grants: Arc::new(grants),
            vcpus,
            state: Mutex::new(State {
                store,
                host,
                conn,
                bus: None,
                listeners: BTreeMap::new(),
                raised: BTreeMap::new(),
                next_frame: 16,
                // The first ones are for the console and the store.
                next_gref: 8,
                next_port: 3,
            }),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the bus that is told of changes.
    pub fn set_bus(&self, bus: Changed) {
        self.lock().bus = Some(bus);
    }

    /// Its memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// A frame that nothing uses.
    pub fn frame(&self) -> u64 {
        let mut state = self.lock();
        state.next_frame += 1;
        assert!(state.next_frame < RAM, "the test uses too many frames");
        state.next_frame
    }

    /// Grants a frame to the backend.
    pub fn grant(&self, frame: u64, readonly: bool) -> u32 {
        let gref = {
            let mut state = self.lock();
            state.next_gref += 1;
            state.next_gref
        };
        self.grant_as(gref, frame, readonly);
        gref
    }

    /// Grants a frame by a given entry.
    pub fn grant_as(&self, gref: u32, frame: u64, readonly: bool) {
        let flags = flag::PERMIT_ACCESS | if readonly { flag::READONLY } else { 0 };
        let frame = u32::try_from(frame).expect("small");
        let at = self.entry(gref);
        self.write(at + 4, &frame.to_le_bytes());
        self.write(at, &u32::from(flags).to_le_bytes());
    }

    /// Takes a grant back. Whether that is possible: the backend does not use it.
    pub fn revoke(&self, gref: u32) -> bool {
        let at = self.entry(gref);
        let flags = u16::from_le_bytes(self.read(at));
        if flags & (flag::READING | flag::WRITING) != 0 {
            return false;
        }
        self.write(at, &0u16.to_le_bytes());
        true
    }

    fn entry(&self, gref: u32) -> u64 {
        (RAM << 12) + u64::from(gref) * 8
    }

    /// Writes memory.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(at))
            .expect("inside");
    }

    /// Reads memory.
    pub fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .expect("inside");
        bytes
    }

    /// A port for the backend.
    pub fn port(&self) -> u32 {
        let mut state = self.lock();
        state.next_port += 1;
        state.next_port
    }

    /// Notifies the backend.
    pub fn notify(&self, port: u32) {
        let listener = self.lock().listeners.get(&port).cloned();
        if let Some(listener) = listener {
            listener.notified();
        }
    }

    /// Times that the backend has notified a port.
    pub fn raised(&self, port: u32) -> u64 {
        self.lock().raised.get(&port).copied().unwrap_or(0)
    }

    /// Waits until the backend has notified a port more often than `seen`.
    ///
    /// # Panics
    /// It never does.
    pub fn wait_raised(&self, port: u32, seen: u64) {
        self.wait(&format!("port {port} is notified"), |state| {
            state.raised.get(&port).copied().unwrap_or(0) > seen
        });
    }

    /// Writes a node as the guest.
    ///
    /// # Panics
    /// The guest may not.
    pub fn put(&self, path: &str, value: &str) {
        let path = Path::parse(path, domid::GUEST).expect("a path");
        let mut state = self.lock();
        let conn = state.conn;
        state
            .store
            .write(conn, None, &path, value.as_bytes())
            .expect("the guest may write it");
        state.tell();
        drop(state);
        self.changed.notify_all();
    }

    /// Watches a node as the guest.
    ///
    /// # Panics
    /// It does already.
    pub fn watch(&self, path: &str) {
        let mut state = self.lock();
        let conn = state.conn;
        let done = state.store.watch(conn, path, b"a token");
        done.expect("the guest may");
    }

    /// What the guest is told next.
    pub fn told(&self) -> Option<String> {
        let mut state = self.lock();
        let conn = state.conn;
        state.store.next_event(conn).map(|event| event.path)
    }

    /// Whether there is a directory, by the guest.
    ///
    /// # Panics
    /// That is no path.
    pub fn looks_at(&self, path: &str) -> bool {
        let path = Path::parse(path, domid::GUEST).expect("a path");
        let mut state = self.lock();
        let conn = state.conn;
        state.store.directory(conn, None, &path).is_ok()
    }

    /// Removes a node, and all below it, as the guest.
    ///
    /// # Panics
    /// The guest may not.
    pub fn remove(&self, path: &str) {
        let path = Path::parse(path, domid::GUEST).expect("a path");
        let mut state = self.lock();
        let conn = state.conn;
        let removed = state.store.remove(conn, None, &path);
        removed.expect("the guest may remove it");
        state.tell();
        drop(state);
        self.changed.notify_all();
    }

    /// Reads a node as the guest.
    pub fn get(&self, path: &str) -> Option<String> {
        let path = Path::parse(path, domid::GUEST).expect("a path");
        let mut state = self.lock();
        let conn = state.conn;
        let value = state.store.read(conn, None, &path).ok()?;
        String::from_utf8(value).ok()
    }

    /// Waits until a node has a value; `None` is no node.
    ///
    /// # Panics
    /// It never has.
    pub fn wait_for(&self, path: &str, value: Option<&str>) {
        let parsed = Path::parse(path, domid::GUEST).expect("a path");
        self.wait(&format!("{path} is {value:?}"), |state| {
            let conn = state.conn;
            let now = state.store.read(conn, None, &parsed).ok();
            now.as_deref() == value.map(str::as_bytes)
        });
    }

    fn wait(&self, what: &str, mut until: impl FnMut(&mut State) -> bool) {
        let end = Instant::now() + PATIENCE;
        let mut state = self.lock();
        while !until(&mut state) {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "it never happened that {what}");
            let (guard, _) = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
            state = guard;
        }
    }
}

impl State {
    fn tell(&mut self) {
        let mut fired = false;
        while self.store.next_event(self.host).is_some() {
            fired = true;
        }
        if fired && let Some(bus) = &self.bus {
            bus.notify();
        }
    }
}

impl Guest for FakeGuest {
    fn grants(&self) -> &Arc<Grants> {
        &self.grants
    }

    fn raise(&self, port: u32) {
        *self.lock().raised.entry(port).or_default() += 1;
        self.changed.notify_all();
    }

    fn listen(&self, port: u32, listener: Option<Arc<dyn Listener>>) {
        let mut state = self.lock();
        match listener {
            Some(listener) => state.listeners.insert(port, listener),
            None => state.listeners.remove(&port),
        };
    }

    fn store(&self, act: &mut dyn FnMut(&mut Store, ConnId)) {
        let mut state = self.lock();
        let host = state.host;
        act(&mut state.store, host);
        state.tell();
        drop(state);
        self.changed.notify_all();
    }

    fn vcpus(&self) -> u32 {
        self.vcpus
    }
}
