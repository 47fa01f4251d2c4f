//! The bus on which frontends and backends find each other: states in the xenstore
//! (`public/io/xenbus.h`, Linux `drivers/xen/xenbus`), for all devices of a VM.
//!
//! One thread looks at what the frontends say whenever something in their directories
//! changed, and leads each device from one state to the next:
//!
//! ```text
//! backend   1 Initialising -> 2 InitWait -> 4 Connected -> 5 Closing -> 6 Closed
//! frontend  1 Initialising ->    3 Initialised or 4 Connected    -> 5 -> 6
//! ```
//!
//! It looks at states, not at events, so a lost or doubled event changes nothing. A
//! frontend that begins anew (1 after 6: another driver, kexec) is connected anew.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blanket_abi::xen::domid;
use blanket_xenstore::{DeviceId, Errno, Path};

use crate::Guest;
use crate::limit::Seldom;
use crate::sync::lock;

/// Names and values of nodes in a directory.
pub type Nodes = Vec<(String, String)>;

/// `enum xenbus_state`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum State {
    /// No directory, or nothing that is a state.
    Unknown = 0,
    /// It exists.
    Initialising = 1,
    /// The backend has said what it can.
    InitWait = 2,
    /// The frontend has said where its rings are.
    Initialised = 3,
    /// In use.
    Connected = 4,
    /// About to close.
    Closing = 5,
    /// Not in use.
    Closed = 6,
}

impl State {
    fn parse(value: &[u8]) -> Self {
        match value {
            b"1" => Self::Initialising,
            b"2" => Self::InitWait,
            b"3" => Self::Initialised,
            b"4" => Self::Connected,
            b"5" => Self::Closing,
            b"6" => Self::Closed,
            _ => Self::Unknown,
        }
    }

    fn text(self) -> String {
        (self as u8).to_string()
    }
}

/// A device of a VM, as the bus knows it.
pub trait Device: Send + Sync {
    /// Its class: `vbd`, `vif`.
    fn class(&self) -> &'static str;

    /// Its number, which the guest knows it by.
    fn number(&self) -> u32;

    /// What the frontend's directory has from the start, beside the bus's own nodes.
    fn frontend_nodes(&self) -> Nodes;

    /// What the backend's directory has from the start: what the backend can do.
    fn backend_nodes(&self) -> Nodes;

    /// Connects to a frontend that has said where its rings are.
    ///
    /// # Errors
    /// What the frontend said wrong, or the host refused: the device is then closed.
    fn connect(
        &self,
        guest: &Arc<dyn Guest>,
        frontend: &Frontend<'_>,
        fault: Fault,
    ) -> Result<Box<dyn Connection>, ConnectError>;
}

/// A backend at work. Dropping it ends it: requests that it has begun are carried out
/// and answered first, and no grant of the guest is in use afterwards.
pub trait Connection: Send {
    /// What the backend's directory has from now on, before the state is connected.
    fn nodes(&self) -> Nodes;
}

/// Why a backend cannot connect.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// A node that must be there, or is not what it must be.
    #[error("the frontend's node {name} is {}", value.as_deref().map_or("missing".into(), |v| format!("{v:?}")))]
    Node {
        /// The node.
        name: String,
        /// What is there.
        value: Option<String>,
    },
    /// A ring's page.
    #[error("a ring cannot be mapped: {0}")]
    Grant(#[from] crate::grant::Error),
    /// The host.
    #[error("the host refused {what}: {source}")]
    Host {
        /// What.
        what: &'static str,
        /// Its answer.
        source: std::io::Error,
    },
}

/// The frontend's directory.
pub struct Frontend<'a> {
    guest: &'a dyn Guest,
    directory: String,
}

impl Frontend<'_> {
    /// The value of a node; `None` if there is none, or no text.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<String> {
        let value = read(self.guest, &format!("{}/{name}", self.directory)).ok()?;
        String::from_utf8(value).ok()
    }

    /// Where queue `index` of `queues` has its nodes: with one queue, in the directory
    /// itself (`public/io/blkif.h`, `public/io/netif.h`).
    #[must_use]
    pub fn queue_prefix(queues: u32, index: u32) -> String {
        match queues {
            1 => String::new(),
            _ => format!("queue-{index}/"),
        }
    }

    /// The error for a node that is not what it must be.
    #[must_use]
    pub fn wrong(&self, name: &str) -> ConnectError {
        ConnectError::Node {
            name: name.to_owned(),
            value: self.text(name),
        }
    }

    /// The number in a node; `None` if there is no node.
    ///
    /// # Errors
    /// It is no number.
    pub fn optional(&self, name: &str) -> Result<Option<u32>, ConnectError> {
        match self.text(name) {
            None => Ok(None),
            Some(value) => match value.trim().parse() {
                Ok(number) => Ok(Some(number)),
                Err(_) => Err(self.wrong(name)),
            },
        }
    }

    /// The number in a node.
    ///
    /// # Errors
    /// It is missing, or no number.
    pub fn number(&self, name: &str) -> Result<u32, ConnectError> {
        self.optional(name)?.ok_or_else(|| self.wrong(name))
    }
}

/// The way for a backend to say that its frontend broke the rules: the device is closed.
#[derive(Clone)]
pub struct Fault {
    signal: Arc<Signal>,
    key: Key,
}

impl Fault {
    /// Has the device closed. `why` goes to the log, and to who asks for its state.
    pub fn raise(&self, why: impl fmt::Display) {
        let mut news = self.signal.lock();
        news.faults.insert(self.key, why.to_string());
        news.changed = true;
        drop(news);
        self.signal.changed.notify_all();
    }
}

type Key = (&'static str, u32);

/// What the bus's thread waits for. Its lock is never held while another is taken.
#[derive(Default)]
struct Signal {
    news: Mutex<News>,
    changed: Condvar,
}

#[derive(Default)]
struct News {
    changed: bool,
    stop: bool,
    faults: BTreeMap<Key, String>,
}

impl Signal {
    fn lock(&self) -> MutexGuard<'_, News> {
        lock(&self.news)
    }
}

struct Slot {
    device: Arc<dyn Device>,
    backend: State,
    frontend: State,
    connection: Option<Box<dyn Connection>>,
    leaving: bool,
    fault: Option<String>,
    words: Seldom,
}

impl Slot {
    /// Says why the frontend was closed: to who asks, and to the log, where the guest
    /// does not have it said as often as it likes.
    fn fail(&mut self, key: Key, what: &str, why: String) {
        if self.words.may_speak(Instant::now()) {
            tracing::warn!("{} {}: {what}: {why}", key.0, key.1);
        } else {
            tracing::debug!("{} {}: {what}: {why}", key.0, key.1);
        }
        self.fault = Some(why);
    }
}

/// Why a device was not attached or detached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is one with that number.
    #[error("the VM has a device {class} {number} already")]
    Exists {
        /// Its class.
        class: &'static str,
        /// Its number.
        number: u32,
    },
    /// There is none with that number.
    #[error("the VM has no device {class} {number}")]
    Missing {
        /// Its class.
        class: &'static str,
        /// Its number.
        number: u32,
    },
    /// The guest did not let go of it.
    #[error(
        "the guest did not let go of {class} {number} within {} seconds; it is still in use there, \
         and is detached as soon as it is not", timeout.as_secs()
    )]
    Busy {
        /// Its class.
        class: &'static str,
        /// Its number.
        number: u32,
        /// How long it had.
        timeout: Duration,
    },
    /// The store.
    #[error("cannot write the device's nodes: {0}")]
    Xenstore(Errno),
}

/// What a device is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// The backend's state.
    pub backend: State,
    /// The frontend's state.
    pub frontend: State,
    /// It is being detached.
    pub leaving: bool,
    /// Why the frontend was closed, if it broke the rules.
    pub fault: Option<String>,
}

/// How long a guest may take to forget a device that is gone.
const FORGET: Duration = Duration::from_secs(5);
/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(5);

/// The devices of a VM. Dropping it ends all backends.
pub struct Bus {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    guest: Arc<dyn Guest>,
    signal: Arc<Signal>,
    slots: Mutex<BTreeMap<Key, Slot>>,
    /// A device is gone.
    gone: Condvar,
    /// Nothing is led anywhere.
    held: AtomicBool,
}

/// Told of changes in the guest's device directories.
#[derive(Clone)]
pub struct Changed(Arc<Signal>);

impl Changed {
    /// Something may have changed. Takes no lock that the bus holds while it uses the
    /// store.
    pub fn notify(&self) {
        self.0.lock().changed = true;
        self.0.changed.notify_all();
    }
}

impl Bus {
    /// The bus of a VM, with no device yet.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn new(guest: Arc<dyn Guest>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            guest,
            signal: Arc::default(),
            slots: Mutex::default(),
            gone: Condvar::new(),
            held: AtomicBool::new(false),
        });
        let run = Arc::clone(&shared);
        let thread = crate::thread::named("bus").spawn(move || run.run())?;
        Ok(Self {
            shared,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// What is to be told when something changes beneath `/local/domain/N/device`.
    #[must_use]
    pub fn changed(&self) -> Changed {
        Changed(Arc::clone(&self.shared.signal))
    }

    /// Adds a device; the guest finds it at once, or when it boots.
    ///
    /// # Errors
    /// There is one with its class and number; the store.
    pub fn attach(&self, device: Arc<dyn Device>) -> Result<(), Error> {
        let (class, number) = (device.class(), device.number());
        let mut slots = self.shared.lock();
        if slots.contains_key(&(class, number)) {
            return Err(Error::Exists { class, number });
        }
        let id = id((class, number));
        let (front, back) = (device.frontend_nodes(), device.backend_nodes());
        let mut result = Ok(());
        self.shared.guest.store(&mut |store, conn| {
            result = store.add_device(conn, &id, &front, &back);
        });
        result.map_err(Error::Xenstore)?;
        let slot = Slot {
            device,
            backend: State::Initialising,
            frontend: State::Initialising,
            connection: None,
            leaving: false,
            fault: None,
            words: Seldom::default(),
        };
        slots.insert((class, number), slot);
        drop(slots);
        self.changed().notify();
        Ok(())
    }

    /// Takes over a device whose nodes are in the store already, with a frontend that may
    /// be connected: it finds a backend that goes on where the last one stopped.
    ///
    /// # Errors
    /// There is one with its class and number.
    pub fn adopt(&self, device: Arc<dyn Device>) -> Result<(), Error> {
        let key @ (class, number) = (device.class(), device.number());
        let mut slots = self.shared.lock();
        if slots.contains_key(&key) {
            return Err(Error::Exists { class, number });
        }
        let slot = Slot {
            device,
            backend: self.shared.unconnected(key),
            frontend: State::Unknown,
            connection: None,
            leaving: false,
            fault: None,
            words: Seldom::default(),
        };
        slots.insert(key, slot);
        drop(slots);
        self.changed().notify();
        Ok(())
    }

    /// Ends all backends as [`Self::end`] does, and connects none, until [`Self::go_on`].
    /// The guest is not told.
    pub fn hold(&self) {
        let mut slots = self.shared.lock();
        self.shared.held.store(true, Ordering::SeqCst);
        for (key, slot) in slots.iter_mut() {
            if slot.connection.take().is_some() {
                slot.backend = self.shared.unconnected(*key);
            }
        }
    }

    /// Connects the backends again that were connected before [`Self::hold`].
    pub fn go_on(&self) {
        self.shared.held.store(false, Ordering::SeqCst);
        self.changed().notify();
    }

    /// Asks the guest to let go of a device, and waits until it has.
    ///
    /// # Errors
    /// There is none; the guest does not let go. It goes on being asked.
    pub fn detach(&self, class: &'static str, number: u32, timeout: Duration) -> Result<(), Error> {
        let key = (class, number);
        let mut slots = self.shared.lock();
        let slot = slots
            .get_mut(&key)
            .ok_or(Error::Missing { class, number })?;
        slot.leaving = true;
        self.changed().notify();
        let until = Instant::now() + timeout;
        while slots.contains_key(&key) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Busy {
                    class,
                    number,
                    timeout,
                });
            }
            let (guard, _) = self
                .shared
                .gone
                .wait_timeout(slots, left)
                .unwrap_or_else(PoisonError::into_inner);
            slots = guard;
        }
        drop(slots);
        self.shared.forgotten(key, until);
        Ok(())
    }

    /// Writes nodes of a backend anew, and its state after them, which makes a connected
    /// frontend read them.
    ///
    /// # Errors
    /// There is no such device; the store.
    pub fn refresh(&self, class: &'static str, number: u32, nodes: &Nodes) -> Result<(), Error> {
        let slots = self.shared.lock();
        let key = (class, number);
        let slot = slots.get(&key).ok_or(Error::Missing { class, number })?;
        self.shared
            .write_backend(key, nodes)
            .map_err(Error::Xenstore)?;
        if slot.backend == State::Connected {
            let state = [("state".to_owned(), State::Connected.text())];
            self.shared
                .write_backend(key, &state)
                .map_err(Error::Xenstore)?;
        }
        Ok(())
    }

    /// What a device is doing.
    #[must_use]
    pub fn report(&self, class: &'static str, number: u32) -> Option<Report> {
        self.shared.lock().get(&(class, number)).map(|slot| Report {
            backend: slot.backend,
            frontend: slot.frontend,
            leaving: slot.leaving,
            fault: slot.fault.clone(),
        })
    }

    /// Ends all backends: what they have begun is carried out and answered first. No
    /// device is attached any more.
    pub fn end(&self) {
        self.shared.signal.lock().stop = true;
        self.shared.signal.changed.notify_all();
        let thread = lock(&self.thread).take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the bus's thread panicked");
        }
        self.shared.lock().clear();
        self.shared.gone.notify_all();
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        self.end();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Slot>> {
        lock(&self.slots)
    }

    /// The life of the bus's thread.
    fn run(&self) {
        loop {
            let faults = {
                let mut news = self.signal.lock();
                while !news.changed && !news.stop {
                    news = self
                        .signal
                        .changed
                        .wait(news)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                if news.stop {
                    return;
                }
                news.changed = false;
                std::mem::take(&mut news.faults)
            };
            let mut slots = self.lock();
            for (key, why) in faults {
                if let Some(slot) = slots.get_mut(&key) {
                    slot.fail(key, "closed", why);
                }
            }
            if !self.held.load(Ordering::SeqCst) {
                slots.retain(|&key, slot| self.step(key, slot));
            }
            drop(slots);
            self.gone.notify_all();
        }
    }

    /// Leads a device to its next state. Whether it is still there.
    fn step(&self, key: Key, slot: &mut Slot) -> bool {
        let front = read(&*self.guest, &format!("{}/state", id(key).frontend()));
        slot.frontend = front.map_or(State::Unknown, |value| State::parse(&value));
        if slot.fault.is_some() && slot.connection.take().is_some() {
            self.go(key, slot, State::Closing);
        }
        match slot.frontend {
            State::Initialising if slot.leaving => return self.gone(key, slot),
            State::Initialising => {
                if slot.backend != State::InitWait {
                    slot.connection = None;
                    slot.fault = None;
                    self.go(key, slot, State::InitWait);
                }
            }
            State::Initialised | State::Connected
                if matches!(slot.backend, State::Initialising | State::InitWait) =>
            {
                if slot.leaving {
                    self.go(key, slot, State::Closing);
                } else {
                    // One that did not wait for it, and was seen late.
                    self.go(key, slot, State::InitWait);
                    self.connect(key, slot);
                }
            }
            State::Initialised | State::Connected => {
                if slot.leaving && slot.backend == State::Connected {
                    // The frontend closes when nobody uses it any more.
                    let online = [("online".to_owned(), "0".to_owned())];
                    let _ = self.write_backend(key, &online);
                    self.go(key, slot, State::Closing);
                }
            }
            State::Closing => {
                slot.connection = None;
                self.go(key, slot, State::Closing);
            }
            State::Closed | State::Unknown | State::InitWait => {
                slot.connection = None;
                if slot.leaving {
                    return self.gone(key, slot);
                }
                self.go(key, slot, State::Closed);
            }
        }
        true
    }

    /// Waits until the guest has forgotten a device that is gone: another one of that number would be
    /// taken for this one by a guest that is still at it.
    fn forgotten(&self, key: Key, until: Instant) {
        let device = id(key);
        self.guest.store(&mut |store, conn| {
            if let Err(error) = store.tell_of_nothing(conn, &device) {
                tracing::warn!("{} {}: nodes: {error}", key.0, key.1);
            }
        });
        let until = until.min(Instant::now() + FORGET);
        let mut forgotten = false;
        loop {
            self.guest
                .store(&mut |store, _| forgotten = store.is_forgotten(&device));
            if forgotten || Instant::now() >= until {
                break;
            }
            // Nothing tells of it.
            std::thread::sleep(LOOK);
        }
        if !forgotten {
            tracing::warn!(
                "{} {}: the guest has not yet seen that it is gone, and may take the next one of that \
                 number for it",
                key.0,
                key.1
            );
        }
        self.guest
            .store(&mut |store, _| store.await_no_more(&device));
    }

    /// The backend's state by the store, for one that is not connected: a frontend that
    /// believes it to be waits for one.
    fn unconnected(&self, key: Key) -> State {
        let state = read(&*self.guest, &format!("{}/state", id(key).backend()));
        match state.map_or(State::Unknown, |value| State::parse(&value)) {
            State::Connected => State::InitWait,
            other => other,
        }
    }

    fn connect(&self, key: Key, slot: &mut Slot) {
        let frontend = Frontend {
            guest: &*self.guest,
            directory: id(key).frontend(),
        };
        let fault = Fault {
            signal: Arc::clone(&self.signal),
            key,
        };
        match slot.device.connect(&self.guest, &frontend, fault) {
            Ok(connection) => {
                let written = self.write_backend(key, &connection.nodes());
                slot.connection = Some(connection);
                if let Err(error) = written {
                    tracing::warn!("{} {}: nodes: {error}", key.0, key.1);
                }
                self.go(key, slot, State::Connected);
            }
            Err(error) => {
                slot.fail(key, "cannot connect", error.to_string());
                self.go(key, slot, State::Closing);
            }
        }
    }

    /// Ends a device.
    fn gone(&self, key: Key, slot: &mut Slot) -> bool {
        slot.connection = None;
        self.guest.store(&mut |store, conn| {
            if let Err(error) = store.remove_device(conn, &id(key)) {
                tracing::warn!("{} {}: nodes: {error}", key.0, key.1);
            }
        });
        false
    }

    /// Sets the backend's state, if it is another one.
    fn go(&self, key: Key, slot: &mut Slot, state: State) {
        if slot.backend == state {
            return;
        }
        tracing::debug!("{} {}: {:?} -> {state:?}", key.0, key.1, slot.backend);
        slot.backend = state;
        let node = [("state".to_owned(), state.text())];
        if let Err(error) = self.write_backend(key, &node) {
            tracing::warn!("{} {}: state: {error}", key.0, key.1);
        }
    }

    fn write_backend(&self, key: Key, nodes: &[(String, String)]) -> Result<(), Errno> {
        let directory = id(key).backend();
        let mut result = Ok(());
        self.guest.store(&mut |store, conn| {
            result = nodes.iter().try_for_each(|(name, value)| {
                let path = Path::parse(&format!("{directory}/{name}"), 0)?;
                store.write(conn, None, &path, value.as_bytes())
            });
        });
        result
    }
}

fn id((class, number): Key) -> DeviceId {
    DeviceId {
        domain: domid::GUEST,
        class,
        number,
    }
}

fn read(guest: &dyn Guest, path: &str) -> Result<Vec<u8>, Errno> {
    let path = Path::parse(path, 0)?;
    let mut result = Err(Errno::NoEnt);
    guest.store(&mut |store, conn| result = store.read(conn, None, &path));
    result
}

#[cfg(test)]
mod tests;
