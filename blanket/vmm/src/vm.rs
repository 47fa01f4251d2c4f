//! A running VM: one thread per vCPU, and what their exits lead to.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blanket_abi::device::{VmStats, pause};
use blanket_abi::xen::hypercall::sched;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::balloon::Balloon;
use crate::device;
use crate::hypervisor::{Crash, Exit, Kick, Machine, Vcpu};
use crate::pressure::{self, Pressure};
use crate::sync::lock;
use crate::watch::{self, Watched};

/// How long the vCPU that knows why a VM died may take to say so.
const REPORT_PATIENCE: Duration = Duration::from_secs(5);

/// How often vCPUs are looked at.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// The VMM's end of an event channel.
pub use blanket_devices::Listener as Backend;

/// The VMM's ends of a VM's event channels. They come and go while it runs.
#[derive(Default)]
pub struct Ports(RwLock<BTreeMap<u32, Arc<dyn Backend>>>);

impl Ports {
    /// Sets who is told when the guest notifies a port.
    pub fn set(&self, port: u32, backend: Option<Arc<dyn Backend>>) {
        let mut ports = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match backend {
            Some(backend) => ports.insert(port, backend),
            None => ports.remove(&port),
        };
    }

    fn get(&self, port: u32) -> Option<Arc<dyn Backend>> {
        let ports = self.0.read().unwrap_or_else(PoisonError::into_inner);
        ports.get(&port).cloned()
    }
}

/// Takes what a guest writes with `console_io`, before it has a console.
pub trait EarlyConsole: Send + Sync {
    /// Must not wait.
    fn write(&self, bytes: &[u8]);
}

/// How a VM ended.
#[derive(Debug)]
pub enum End {
    /// The guest powered itself off.
    Poweroff,
    /// The guest asks for a restart.
    Reboot,
    /// The guest reported its own crash (a kernel panic).
    Panic,
    /// The guest's watchdog expired.
    Watchdog,
    /// The guest asked for something that is not supported, by reason number.
    Unsupported(u64),
    /// The hypervisor ended the guest.
    Crash(Crash),
    /// The VM was killed from outside.
    Killed,
    /// It was written down, and goes on elsewhere or later.
    Saved,
    /// It runs elsewhere.
    Moved,
    /// The VMM or the host failed.
    Failed(Failure),
}

/// What failed on this side.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The device.
    #[error(transparent)]
    Device(#[from] device::Error),
    /// A thread could not be started.
    #[error("cannot start a thread for vCPU {vcpu}: {source}")]
    Thread {
        /// The vCPU.
        vcpu: u32,
        /// The host's answer.
        source: io::Error,
    },
    /// The thread that watches the vCPUs could not be started.
    #[error("cannot start the thread that watches the vCPUs: {0}")]
    Watch(io::Error),
    /// The thread that looks out for a host that is short of memory could not be started.
    #[error("cannot start the thread that looks at the host's memory: {0}")]
    Pressure(io::Error),
    /// The module ended the VM and no vCPU said why.
    #[error("the module `blanket` ended the VM without a reason; `dmesg` may tell")]
    Dead,
    /// A vCPU's thread panicked: a bug of this program.
    #[error("the thread of vCPU {0} panicked")]
    Panicked(u32),
}

/// What serves a VM.
pub struct Backends {
    /// By event channel port.
    pub ports: Arc<Ports>,
    /// `console_io`.
    pub early_console: Arc<dyn EarlyConsole>,
    /// Takes the memory that the guest gives up.
    pub balloon: Arc<Balloon>,
}

struct Shared {
    machine: Arc<dyn Machine>,
    backends: Backends,
    kicks: Vec<Arc<dyn Kick>>,
    /// Thread ids of the vCPUs; 0 before they run.
    tids: Vec<AtomicI32>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Held while the VM is paused.
    pause: Mutex<()>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    end: Option<End>,
    ended: bool,
    /// vCPUs are to wait before their next RUN.
    paused: bool,
    /// How many do.
    parked: usize,
    /// How many of them are where their core's state is whole.
    at_rest: usize,
    /// What vCPUs do that stand still in their core.
    still: Still,
    /// How many do.
    standing: usize,
    /// Why one of them could not write its state down, a negative errno.
    unwritten: Option<i64>,
}

/// See [`Handle::standing_still`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Still {
    /// They go on.
    #[default]
    No,
    /// They wait.
    Wait,
    /// vCPU 0 runs once more, to do what is asked for.
    Shared,
}

/// What becomes of a VM that stood still.
#[derive(Debug)]
pub enum Then {
    /// It goes on where it was.
    GoOn,
    /// It ends, since it goes on elsewhere or nowhere.
    End(End),
}

/// Why a VM did not stand still.
#[derive(Debug, thiserror::Error)]
pub enum StillError {
    /// It ended.
    #[error("the VM has ended")]
    Ended,
    /// A vCPU did not come to a stop.
    #[error("the VM did not stand still within {} seconds", STILL_PATIENCE.as_secs())]
    Timeout,
    /// Its core could not write its state down.
    #[error("the VM's core could not write its state down (error {0})")]
    Unwritten(i64),
    /// The host.
    #[error(transparent)]
    Device(#[from] device::Error),
}

/// How long a hypercall may take.
const STILL_PATIENCE: Duration = Duration::from_secs(60);

/// How often it is looked whether threads have ended.
pub(crate) const LOOK: Duration = Duration::from_millis(10);

/// How often a VM is paused again whose core was in the middle of something.
const PAUSES: u32 = 500;
/// How long it runs in between.
const BETWEEN_PAUSES: Duration = Duration::from_millis(2);

/// A running VM. Dropping it kills it.
pub struct Vm {
    shared: Arc<Shared>,
    watch: Option<JoinHandle<()>>,
    pressure: Option<JoinHandle<()>>,
}

/// Refers to a VM from other threads; does not keep it alive.
#[derive(Clone)]
pub struct Handle(Weak<Shared>);

impl Vm {
    /// Creates the vCPUs and starts them.
    ///
    /// # Errors
    /// What the host refused. Nothing is left running.
    pub fn start(
        machine: Arc<dyn Machine>,
        vcpus: u32,
        backends: Backends,
    ) -> Result<Self, Failure> {
        // The handler does nothing: the signal is there to interrupt RUN.
        let _ = register_signal_handler(SIGRTMIN(), nothing);

        let vcpus: Vec<Box<dyn Vcpu>> = (0..vcpus)
            .map(|id| machine.vcpu(id))
            .collect::<Result<_, _>>()?;
        let shared = Arc::new(Shared {
            machine,
            backends,
            kicks: vcpus.iter().map(|vcpu| vcpu.kick()).collect(),
            tids: vcpus.iter().map(|_| AtomicI32::new(0)).collect(),
            threads: Mutex::default(),
            pause: Mutex::default(),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let mut vm = Self {
            shared: Arc::clone(&shared),
            watch: None,
            pressure: None,
        };
        let watched: Vec<(usize, Watched)> = vcpus
            .iter()
            .enumerate()
            .filter_map(|(id, vcpu)| Some((id, Watched::new(vcpu.pulse()?))))
            .collect();
        for (id, vcpu) in (0u32..).zip(vcpus) {
            let shared = Arc::clone(&shared);
            let thread =
                crate::thread::named(format!("vcpu-{id}")).spawn(move || run(&shared, id, vcpu));
            match thread {
                Ok(thread) => lock(&vm.shared.threads).push(thread),
                // Dropping `vm` stops those that run already.
                Err(source) => return Err(Failure::Thread { vcpu: id, source }),
            }
        }
        let pressed = Arc::clone(&shared);
        vm.pressure = Some(
            crate::thread::named("pressure")
                .spawn(move || give_way(&pressed))
                .map_err(Failure::Pressure)?,
        );
        if !watched.is_empty() {
            let shared = Arc::clone(&shared);
            vm.watch = Some(
                crate::thread::named("watch")
                    .spawn(move || watch(&shared, watched))
                    .map_err(Failure::Watch)?,
            );
        }
        Ok(vm)
    }

    /// A reference for other threads.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle(Arc::downgrade(&self.shared))
    }

    /// Waits until the VM has ended and its vCPUs have stopped.
    #[must_use]
    pub fn wait(self) -> End {
        self.wait_unless(&|| None).0
    }

    /// Waits until the VM has ended and its vCPUs have stopped, or cannot as `stranded` says: then
    /// they are left alone, and the process is to end. Whether they have stopped. `None`: there
    /// is nothing that they could stand on.
    pub(crate) fn wait_unless(mut self, stranded: &dyn Fn() -> Option<bool>) -> (End, bool) {
        let mut state = lock(&self.shared.state);
        while !state.ended {
            state = self
                .shared
                .changed
                .wait(state)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        drop(state);
        let ended = |this: &Self| lock(&this.shared.state).end.take().unwrap_or(End::Killed);
        while !lock(&self.shared.threads)
            .iter()
            .all(JoinHandle::is_finished)
        {
            let Some(stranded) = stranded() else { break };
            if stranded {
                let end = ended(&self);
                std::mem::forget(self);
                return (end, false);
            }
            self.interrupt();
            // Only those that stand on memory that has not come yet take longer.
            std::thread::sleep(LOOK);
        }
        self.stop_threads();
        (ended(&self), true)
    }

    /// Makes all vCPUs return.
    fn interrupt(&self) {
        for kick in &self.shared.kicks {
            kick.stop();
        }
        for thread in &*lock(&self.shared.threads) {
            // Also reaches a thread that is blocked in a system call. One that is
            // between two calls sees its kick at the next RUN.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    /// Makes all vCPUs return and joins their threads.
    fn stop_threads(&mut self) {
        self.interrupt();
        let threads = std::mem::take(&mut *lock(&self.shared.threads));
        for (id, thread) in (0u32..).zip(threads) {
            if thread.join().is_err() {
                tracing::error!(vcpu = id, "a vCPU thread panicked");
            }
        }
        if self.watch.take().is_some_and(|watch| watch.join().is_err()) {
            tracing::error!("the watch over the vCPUs panicked");
        }
        if self.pressure.take().is_some_and(|it| it.join().is_err()) {
            tracing::error!("the look-out for pressure panicked");
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.shared.end(End::Killed);
        self.stop_threads();
    }
}

impl Handle {
    /// Ends the VM now.
    pub fn kill(&self) {
        if let Some(shared) = self.0.upgrade() {
            shared.end(End::Killed);
        }
    }

    /// Counters; `None` if the VM is gone.
    ///
    /// # Errors
    /// What the host refused.
    pub fn stats(&self) -> Option<Result<VmStats, device::Error>> {
        self.0.upgrade().map(|shared| shared.machine.stats())
    }

    /// Does `work` while no vCPU runs and the core is in the middle of nothing. `None`
    /// if the VM has ended, or was busy in its core whenever it was looked at.
    pub fn paused<T>(&self, work: impl FnOnce() -> T) -> Option<T> {
        self.0.upgrade()?.paused(work)
    }

    /// No vCPU enters its guest any more, until [`Self::paused`] or the end. Not waited for: some
    /// may stand on memory that does not come.
    pub(crate) fn hold(&self) {
        if let Some(shared) = self.0.upgrade() {
            shared.stop_now();
        }
    }

    /// Does `work` while all vCPUs stand where they would return to their guest, and
    /// their core has written their states down (`blanket_abi::state`). `drain` comes
    /// before the core writes down what the vCPUs share: whoever serves the VM finishes
    /// what it has begun there, and begins nothing new.
    ///
    /// # Errors
    /// The VM has ended or does not come to a stop, or its core could not write; if it
    /// has not ended, it goes on.
    pub fn standing_still<T>(
        &self,
        drain: impl FnOnce(),
        work: impl FnOnce() -> (T, Then),
    ) -> Result<T, StillError> {
        self.shared()?.standing_still(drain, &[pause::VM], work)
    }

    /// As [`Self::standing_still`]; the core writes the dirty log down as well, for the
    /// last time.
    ///
    /// # Errors
    /// As there.
    pub fn standing_still_logged<T>(
        &self,
        drain: impl FnOnce(),
        work: impl FnOnce() -> (T, Then),
    ) -> Result<T, StillError> {
        let asked = [pause::LOG, pause::NO_LOG, pause::VM];
        self.shared()?.standing_still(drain, &asked, work)
    }

    /// Has the core write down which frames were written since it did so last; the first
    /// time it begins to note that. `read` reads it, while the VM stands still.
    ///
    /// # Errors
    /// As for [`Self::standing_still`].
    pub fn log<T>(&self, read: impl FnOnce() -> T) -> Result<T, StillError> {
        let read = || (read(), Then::GoOn);
        self.shared()?.standing_still(|| (), &[pause::LOG], read)
    }

    /// The core need not note any more what is written.
    ///
    /// # Errors
    /// As for [`Self::standing_still`].
    pub fn end_log(&self) -> Result<(), StillError> {
        let nothing = || ((), Then::GoOn);
        let asked = [pause::NO_LOG];
        self.shared()?.standing_still(|| (), &asked, nothing)
    }

    fn shared(&self) -> Result<Arc<Shared>, StillError> {
        self.0.upgrade().ok_or(StillError::Ended)
    }

    /// Waits until the VM has ended. Returns whether it did so in time.
    #[must_use]
    pub fn wait_ended(&self, timeout: Duration) -> bool {
        self.0
            .upgrade()
            .is_none_or(|shared| shared.wait_ended(timeout))
    }
}

impl Shared {
    /// Notes how the VM ended, the first reason only, and stops all vCPUs.
    fn end(&self, end: End) {
        let mut state = lock(&self.state);
        if state.ended {
            return;
        }
        state.ended = true;
        state.end = Some(end);
        drop(state);
        self.changed.notify_all();
        for kick in &self.kicks {
            kick.stop();
        }
    }

    /// Waits until the VM has ended. Returns whether it did so in time.
    fn wait_ended(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = lock(&self.state);
        while !state.ended {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return false;
            };
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .0;
        }
        true
    }

    fn has_ended(&self) -> bool {
        lock(&self.state).ended
    }

    /// See [`Handle::paused`].
    fn paused<T>(&self, work: impl FnOnce() -> T) -> Option<T> {
        let _alone = lock(&self.pause);
        for _ in 0..PAUSES {
            if self.stop_all()? {
                let done = work();
                self.resume();
                return Some(done);
            }
            self.resume();
            // There is nothing to wait for: the vCPUs must only get on a little.
            std::thread::sleep(BETWEEN_PAUSES);
        }
        None
    }

    /// Makes all vCPUs wait where they come to a stop next.
    fn stop_now(&self) {
        lock(&self.state).paused = true;
        for kick in &self.kicks {
            kick.stop();
        }
        for thread in &*lock(&self.threads) {
            // As in `Vm::interrupt`.
            let _ = thread.kill(SIGRTMIN());
        }
    }

    /// Makes all vCPUs wait. Returns whether they stand where the core's state is
    /// whole; `None` if the VM has ended.
    fn stop_all(&self) -> Option<bool> {
        self.stop_now();
        let mut state = lock(&self.state);
        while state.parked < self.kicks.len() {
            if state.ended {
                return None;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        Some(state.at_rest == self.kicks.len())
    }

    /// Lets the vCPUs go on, unless the VM is to end.
    fn resume(&self) {
        let mut state = lock(&self.state);
        state.paused = false;
        if !state.ended {
            for kick in &self.kicks {
                kick.go();
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    /// See [`Handle::standing_still`].
    fn standing_still<T>(
        &self,
        drain: impl FnOnce(),
        asked: &[u32],
        work: impl FnOnce() -> (T, Then),
    ) -> Result<T, StillError> {
        let _alone = lock(&self.pause);
        let stood = self.stand().and_then(|()| {
            drain();
            for what in asked {
                self.ask(*what)?;
            }
            Ok(work())
        });
        let stood = stood.map(|(done, then)| match then {
            Then::End(end) => {
                // Before anything lets them go: not one instruction more.
                self.end(end);
                (done, true)
            }
            Then::GoOn => (done, false),
        });
        let went_on = self.machine.pause(pause::NONE);
        lock(&self.state).still = Still::No;
        self.changed.notify_all();
        let (done, ended) = stood?;
        // What has ended has nowhere to go on to, and its work is done all the same.
        if !ended {
            went_on?;
        }
        Ok(done)
    }

    /// Has all vCPUs stand still.
    fn stand(&self) -> Result<(), StillError> {
        {
            let mut state = lock(&self.state);
            state.still = Still::Wait;
            state.unwritten = None;
        }
        self.machine.pause(pause::VCPUS)?;
        self.all_stand()
    }

    /// Has vCPU 0 do something for all: one of `blanket_abi::device::pause`.
    fn ask(&self, what: u32) -> Result<(), StillError> {
        self.machine.pause(what)?;
        lock(&self.state).still = Still::Shared;
        self.changed.notify_all();
        self.all_stand()
    }

    fn all_stand(&self) -> Result<(), StillError> {
        let deadline = Instant::now() + STILL_PATIENCE;
        let mut state = lock(&self.state);
        while state.standing < self.kicks.len() || state.still == Still::Shared {
            if state.ended {
                return Err(StillError::Ended);
            }
            let left = deadline
                .checked_duration_since(Instant::now())
                .ok_or(StillError::Timeout)?;
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        state
            .unwritten
            .map_or(Ok(()), |error| Err(StillError::Unwritten(error)))
    }

    /// A vCPU stands still, until it is told otherwise.
    fn stand_still(&self, vcpu: u32, error: i64) {
        let mut state = lock(&self.state);
        if error != 0 {
            state.unwritten.get_or_insert(error);
        }
        state.standing += 1;
        self.changed.notify_all();
        while state.still != Still::No && !state.ended {
            if state.still == Still::Shared && vcpu == 0 {
                state.still = Still::Wait;
                break;
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.standing -= 1;
    }

    /// Waits while the VM is paused.
    fn park(&self, vcpu: &dyn Vcpu) {
        let mut state = lock(&self.state);
        if !state.paused || state.ended {
            return;
        }
        let at_rest = usize::from(vcpu.at_rest());
        state.parked += 1;
        state.at_rest += at_rest;
        self.changed.notify_all();
        while state.paused && !state.ended {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        state.parked -= 1;
        state.at_rest -= at_rest;
    }

    /// Serves an exit. Returns how the VM ended, if it did.
    fn serve(&self, vcpu: u32, exit: Exit) -> Option<End> {
        match exit {
            Exit::Send(port) => {
                match self.backends.ports.get(port) {
                    Some(backend) => backend.notified(),
                    None => tracing::debug!(port, "the guest notified a port without a backend"),
                }
                None
            }
            Exit::Console(bytes) => {
                self.backends.early_console.write(&bytes);
                None
            }
            Exit::Balloon { given_up, frames } => {
                self.backends.balloon.changed(&given_up, frames);
                None
            }
            Exit::Shutdown(reason) => Some(match reason {
                sched::SHUTDOWN_POWEROFF => End::Poweroff,
                sched::SHUTDOWN_REBOOT => End::Reboot,
                sched::SHUTDOWN_CRASH => End::Panic,
                sched::SHUTDOWN_WATCHDOG => End::Watchdog,
                other => End::Unsupported(other),
            }),
            Exit::Crash(crash) => Some(End::Crash(crash)),
            Exit::Paused(error) => {
                self.stand_still(vcpu, error);
                None
            }
            Exit::Interrupted => None,
            // Its own report comes from another vCPU's thread, and must win.
            Exit::Dead => (!self.wait_ended(REPORT_PATIENCE)).then_some(End::Failed(Failure::Dead)),
        }
    }
}

/// The life of a vCPU's thread.
fn run(shared: &Shared, id: u32, mut vcpu: Box<dyn Vcpu>) {
    /// Ends the VM if the thread unwinds.
    struct OnPanic<'a>(&'a Shared, u32);
    impl Drop for OnPanic<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                self.0.end(End::Failed(Failure::Panicked(self.1)));
            }
        }
    }
    let _guard = OnPanic(shared, id);
    if let Some(thread) = shared.tids.get(id as usize) {
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        thread.store(own, Ordering::Release);
    }
    while !shared.has_ended() {
        shared.park(&*vcpu);
        let end = match vcpu.run() {
            Ok(exit) => shared.serve(id, exit),
            Err(error) => Some(End::Failed(error.into())),
        };
        if let Some(end) = end {
            tracing::debug!(vcpu = id, ?end, "the VM ends");
            shared.end(end);
        }
    }
}

/// The life of the thread that asks the core for shadow memory when the host is short.
fn give_way(shared: &Shared) {
    let mut pressure = Pressure::new(Path::new("/"));
    while !shared.wait_ended(pressure::EVERY) {
        if pressure.rose()
            && let Err(error) = shared.machine.reclaim()
        {
            tracing::warn!(%error, "the host is short of memory, and the core is not told");
        }
    }
}

/// The life of the thread that watches the vCPUs.
fn watch(shared: &Shared, mut vcpus: Vec<(usize, Watched)>) {
    while !shared.wait_ended(WATCH_EVERY) {
        for (id, watched) in &mut vcpus {
            let Some(thread) = shared.tids.get(*id) else {
                continue;
            };
            let thread = thread.load(Ordering::Acquire);
            if thread != 0
                && let Some(used) = watch::cpu_time(thread)
                && watched.look(used)
            {
                tracing::error!(vcpu = id, "the core does not answer");
                interrupt(thread);
            }
        }
    }
}

/// Interrupts the system call that a thread of this process is in.
fn interrupt(thread: i32) {
    // SAFETY: tgkill takes numbers. The signal's handler does nothing, so it does no
    // harm should the number be another thread's by now.
    unsafe {
        libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN());
    }
}

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
