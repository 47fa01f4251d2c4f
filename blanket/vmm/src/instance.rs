//! A VM as its user sees it: from the files it is made of, over its reboots, to
//! the way it ended.

mod error;
mod spec;

use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blanket_abi::PAGE_SIZE;
use blanket_abi::device::{Audit, VmStats};
use blanket_abi::xen::domid;
use blanket_devices::Guest as _;
use blanket_devices::bus::Bus;
use blanket_devices::grant::Grants;
use blanket_xenstore::DomainSpec;
use libc::EFD_CLOEXEC;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::balloon::{Balloon, Memory};
use crate::boot;
use crate::builder::{self, CONSOLE_PORT, STORE_PORT};
use crate::console::Console;
use crate::cpu::{Names, Profile};
use crate::device;
use crate::devices::Devices;
use crate::entropy;
use crate::generation::Generation;
use crate::hub::Hub;
use crate::hypervisor::{HostExits, Hypervisor, Machine};
use crate::migration::Arrival;
use crate::saved::Resumed;
use crate::sync::lock;
use crate::trace;
use crate::vm::{self, Backends, EarlyConsole, End, Ports, Vm};
use crate::xenstore::Xenstore;

pub use error::{BalloonError, Error, StopError};
pub use spec::{OnReboot, Opened, Spec};

/// The least that a guest can be asked to have, bytes.
pub const LEAST_MEMORY: u64 = 16 << 20;

/// A VM over all its reboots.
pub struct Instance {
    spec: Spec,
    uuid: Mutex<String>,
    /// Another one when the VM comes from elsewhere, where it has not begun anew.
    generation: Mutex<Generation>,
    /// What it has of its host's CPU, wherever it goes, if that is not all.
    only: Mutex<Option<Names>>,
    hypervisor: Arc<dyn Hypervisor>,
    pub(crate) console: Arc<Console>,
    /// Kept over reboots.
    pub(crate) devices: Mutex<Devices>,
    /// Readable once the VM is to end.
    pub(crate) killed: EventFd,
    /// The migration that goes out, or went out last.
    pub(crate) outgoing: Mutex<Option<Arc<crate::migration::Outgoing>>>,
    /// The VM that has come here.
    pub(crate) incoming: Mutex<Option<Arc<crate::migration::Given>>>,
    /// None is to come any more. Written with `incoming` held.
    pub(crate) dismissed: AtomicBool,
    /// The part of its memory that follows it.
    pub(crate) arrival: Mutex<Option<Arc<Arrival>>>,
    started: Instant,
    pub(crate) now: Mutex<Now>,
}

/// What a VM has counted.
#[derive(Clone, Debug)]
pub struct Counters {
    /// By the core and its host adapter.
    pub vm: VmStats,
    /// By the hypervisor below; empty where it counts nothing.
    pub host: Vec<HostExits>,
    /// The guest's memory.
    pub memory: Memory,
}

/// What runs at the moment.
#[derive(Default)]
pub(crate) struct Now {
    pub(crate) running: Option<Running>,
    boots: u32,
    killed: bool,
    /// Somebody waits for the guest to end: a reboot ends it too.
    stopping: u32,
    /// The trace is on, also over reboots.
    traced: bool,
    /// What the guest is asked to have, bytes, also over reboots.
    pub(crate) target: u64,
    last_stats: Option<Counters>,
    /// Which kernel runs, or ran last.
    pub(crate) booted: String,
}

#[derive(Clone)]
pub(crate) struct Running {
    machine: Arc<dyn Machine>,
    pub(crate) handle: vm::Handle,
    pub(crate) domain: Arc<builder::Domain>,
    pub(crate) xenstore: Arc<Xenstore>,
    balloon: Arc<Balloon>,
    pub(crate) bus: Arc<Bus>,
    /// What its backends reach of its memory.
    pub(crate) grants: Arc<Grants>,
}

impl Instance {
    /// A VM that has not been started.
    ///
    /// # Errors
    /// The host gave no random bytes, or cannot give such a CPU.
    pub fn new(
        spec: Spec,
        hypervisor: Arc<dyn Hypervisor>,
        console: Arc<Console>,
    ) -> Result<Arc<Self>, Error> {
        let traced = spec.trace;
        let target = spec.balloon.unwrap_or(spec.memory);
        let most = spec.most_memory();
        if most < spec.memory {
            return Err(Error::MaxMemory {
                memory: spec.memory,
                most,
            });
        }
        target_fits(target, most)?;
        let only = spec.cpu.from(|only| hypervisor.profile(only))?;
        let uuid = match &spec.uuid {
            Some(uuid) => uuid.clone(),
            None => uuid().map_err(Error::Identity)?,
        };
        Ok(Arc::new(Self {
            spec,
            uuid: Mutex::new(uuid),
            generation: Mutex::new(Generation::fresh().map_err(Error::Identity)?),
            only: Mutex::new(only),
            hypervisor,
            console,
            devices: Mutex::default(),
            killed: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(Error::Identity)?,
            outgoing: Mutex::default(),
            incoming: Mutex::default(),
            dismissed: AtomicBool::new(false),
            arrival: Mutex::default(),
            started: Instant::now(),
            now: Mutex::new(Now {
                traced,
                target,
                ..Now::default()
            }),
        }))
    }

    /// Loads the files, builds the domain and starts its vCPUs.
    ///
    /// # Errors
    /// Which of the steps failed and on what; nothing is left running.
    pub fn boot(&self) -> Result<Vm, Error> {
        let spec = &self.spec;
        let begun = Instant::now();
        let domain = {
            let start = self.start()?;
            tracing::info!(kernel = start.description, elapsed = ?begun.elapsed(), "kernel read");
            lock(&self.now).booted = start.description;
            let config = builder::Config {
                memory: spec.memory,
                vcpus: spec.vcpus,
                max_memory: spec.most_memory(),
                cmdline: start.cmdline,
                verbose: spec.verbose,
                mergeable: spec.mergeable,
                inject: spec.inject,
            };
            builder::build(&start.kernel, start.initrd.as_deref(), &config)?
        };
        tracing::info!(elapsed = ?begun.elapsed(), "domain built");
        let vm = self.launch(domain, None, || Ok(()))?;
        tracing::info!(elapsed = ?begun.elapsed(), "vCPUs started");
        Ok(vm)
    }

    /// Starts the vCPUs of a domain: from its beginning, or from a state that was saved.
    /// `gate` is asked before the first thing is done that another host could see: the
    /// backends begin, and then the vCPUs.
    pub(crate) fn launch(
        &self,
        domain: builder::Domain,
        saved: Option<Resumed>,
        gate: impl FnOnce() -> Result<(), Error>,
    ) -> Result<Vm, Error> {
        let spec = &self.spec;
        let domain = Arc::new(domain);
        let machine = self.hypervisor.create(
            &domain,
            spec.vcpus,
            spec.pool_limit,
            spec.isolation,
            &self.profile(),
        )?;
        let target = lock(&self.now).target;
        machine.target(target / PAGE_SIZE)?;
        let description = DomainSpec {
            domain: domid::GUEST,
            name: spec.name.clone(),
            uuid: self.uuid(),
            generation: self.generation().to_string(),
            memory_kib: target >> 10,
            max_memory_kib: spec.most_memory() >> 10,
            vcpus: spec.vcpus,
            store_ring: (domain.store.0, STORE_PORT),
            console_ring: (domain.console.0, CONSOLE_PORT),
        };
        let goes_on = saved.is_some();
        let mut frames = domain.boot.start_frames;
        let mut arrival = None;
        let (xenstore, console) = match saved {
            None => {
                let fresh = Xenstore::new(&domain, &description, Arc::clone(&machine));
                (fresh.map_err(Error::Xenstore)?, [0; 2])
            }
            Some(Resumed {
                state,
                moved,
                arrival: follows,
            }) => {
                arrival = follows;
                let away = state.away();
                frames = state.lay(&domain, machine.system_time()?, away)?;
                let (store, console) = state.backends(&domain, &machine)?;
                // What is another one's now, as its guest finds it.
                let node = |name, value: &str| store.write(name, value.as_bytes());
                node("name", &description.name).map_err(Error::Xenstore)?;
                let id = "platform/generation-id";
                if moved {
                    let text = store.read(id).unwrap_or_default();
                    if let Ok(found) = String::from_utf8_lossy(&text).parse() {
                        *lock(&self.generation) = found;
                    }
                } else {
                    node(id, &description.generation).map_err(Error::Xenstore)?;
                }
                (store, console)
            }
        };
        let xenstore = Arc::new(xenstore);
        gate()?;
        self.console.connect(&domain, Arc::clone(&machine), console);

        if lock(&self.now).traced {
            machine.trace(true)?;
        }
        let ports = Arc::new(Ports::default());
        ports.set(STORE_PORT, Some(Arc::clone(&xenstore) as _));
        ports.set(CONSOLE_PORT, Some(Arc::clone(&self.console) as _));
        // Until the bus is known: nobody attaches or detaches one in between.
        let mut devices = lock(&self.devices);
        devices.prune(None);
        let (bus, grants) = self.bus(&devices, &domain, &machine, &ports, &xenstore, goes_on)?;
        let balloon = Balloon::new(Arc::clone(&domain.memory), frames, arrival);
        let balloon = Arc::new(balloon);
        let backends = Backends {
            ports,
            early_console: Arc::clone(&self.console) as Arc<dyn EarlyConsole>,
            balloon: Arc::clone(&balloon),
        };
        let vm = Vm::start(Arc::clone(&machine), spec.vcpus, backends)?;

        give_back();
        let mut now = lock(&self.now);
        now.boots += 1;
        if now.killed {
            vm.handle().kill();
        }
        now.running = Some(Running {
            machine,
            handle: vm.handle(),
            domain,
            xenstore,
            balloon,
            bus,
            grants,
        });
        Ok(vm)
    }

    /// What it boots.
    fn start(&self) -> Result<boot::Start, Error> {
        if let Some(kernel) = &self.spec.kernel {
            return boot::from_files(&self.spec, kernel);
        }
        let file = self.first_disk().ok_or(Error::NothingToBoot)?;
        boot::from_disk(&self.spec, &file.path, file.reader)
    }

    /// Which kernel runs, or ran last; empty before the first boot.
    #[must_use]
    pub fn booted(&self) -> String {
        lock(&self.now).booted.clone()
    }

    /// The VM's bus, with the devices that it has, and what they reach of its memory.
    fn bus(
        &self,
        devices: &Devices,
        domain: &builder::Domain,
        machine: &Arc<dyn Machine>,
        ports: &Arc<Ports>,
        xenstore: &Arc<Xenstore>,
        goes_on: bool,
    ) -> Result<(Arc<Bus>, Arc<Grants>), Error> {
        let hub = Hub::new(
            domain,
            Arc::clone(machine),
            Arc::clone(ports),
            Arc::clone(xenstore),
            self.spec.vcpus,
        )
        .map_err(Error::Grants)?;
        let grants = Arc::clone(hub.grants());
        let bus = Bus::new(Arc::new(hub)).map_err(Error::Bus)?;
        xenstore.set_bus(bus.changed());
        for device in devices.iter() {
            if goes_on {
                bus.adopt(device.as_device())?;
            } else {
                bus.attach(device.as_device())?;
            }
        }
        Ok((Arc::new(bus), grants))
    }

    /// What its guest is asked to have, bytes.
    #[must_use]
    pub(crate) fn target(&self) -> u64 {
        lock(&self.now).target
    }

    /// What its guests find in the CPU of this host.
    fn profile(&self) -> Profile {
        self.hypervisor.profile(self.only().as_ref())
    }

    /// What a guest finds in the CPU of this host that is given `only` these features of it.
    pub(crate) fn profile_of(&self, only: Option<&Names>) -> Profile {
        self.hypervisor.profile(only)
    }

    /// What it has of its host's CPU, wherever it goes, if that is not all.
    pub(crate) fn only(&self) -> Option<Names> {
        lock(&self.only).clone()
    }

    /// It has no more of its host's CPU than this, from its next start on.
    pub(crate) fn has_only(&self, only: Option<Names>) {
        *lock(&self.only) = only;
    }

    /// Waits for the end of a VM, starting it again when it reboots.
    ///
    /// # Errors
    /// It cannot be started again.
    pub fn run(&self, mut vm: Vm) -> Result<End, Error> {
        loop {
            let (mut end, mut finished) = vm.wait_unless(&|| self.is_stranded());
            self.console.disconnect();
            let running = lock(&self.now).running.take();
            if let Some(running) = &running {
                running.balloon.end();
                finished = finished && self.end_bus(&running.bus);
            }
            if !finished {
                // Threads stand on memory that will never come, some perhaps in the middle of
                // writing it to a disk: they end with the process, and not a moment before, or
                // they would find zeros there.
                std::mem::forget(running);
                return Ok(end);
            }
            self.end_arrival();
            let (killed, stopping) = {
                let mut now = lock(&self.now);
                if let Some(running) = running {
                    match self.counters(&running, now.target) {
                        Ok(stats) => now.last_stats = Some(stats),
                        Err(error) => tracing::warn!(%error, "the last counters are lost"),
                    }
                    if let End::Crash(crash) = &mut end {
                        match running.machine.trace_records() {
                            Ok(records) => trace::add_to(crash, &records, self.tsc_khz()),
                            Err(error) => tracing::warn!(%error, "the trace is lost"),
                        }
                    }
                }
                (now.killed, now.stopping > 0)
            };
            match (&end, self.spec.on_reboot) {
                (End::Reboot, OnReboot::Restart) if killed => return Ok(End::Killed),
                (End::Reboot, OnReboot::Restart) if !stopping => {
                    tracing::info!("the guest reboots");
                    vm = self.boot()?;
                }
                _ => return Ok(end),
            }
        }
    }

    /// Whether the VM was killed while a part of its memory is missing, and does not come. `None`:
    /// nothing is missing.
    fn is_stranded(&self) -> Option<bool> {
        let arrival = lock(&self.arrival).clone().filter(|it| it.is_apart())?;
        Some(lock(&self.now).killed && arrival.is_cut())
    }

    /// Ends its backends. False: they stand on memory that does not come.
    fn end_bus(&self, bus: &Arc<Bus>) -> bool {
        if self.is_stranded().is_none() {
            bus.end();
            return true;
        }
        let ends = Arc::clone(bus);
        let Ok(thread) = crate::thread::named("end").spawn(move || ends.end()) else {
            return false;
        };
        while !thread.is_finished() {
            if self.is_stranded() == Some(true) {
                return false;
            }
            std::thread::sleep(vm::LOOK);
        }
        thread.join().is_ok()
    }

    /// Asks the guest to power itself off and waits until it has.
    ///
    /// # Errors
    /// It did not within the time.
    pub fn stop(&self, timeout: Duration) -> Result<(), StopError> {
        let running = self.present_run()?;
        lock(&self.now).stopping += 1;
        let result = ask_to_end(&running, "poweroff", timeout);
        if result.is_err() {
            // From here on a reboot is a reboot again.
            lock(&self.now).stopping -= 1;
        }
        result
    }

    /// Asks the guest to reboot and waits until it has ended for it: it is started again
    /// then, unless a reboot is to end the VM.
    ///
    /// # Errors
    /// It did not within the time.
    pub fn reboot(&self, timeout: Duration) -> Result<(), StopError> {
        ask_to_end(&self.present_run()?, "reboot", timeout)
    }

    /// What runs now.
    fn present_run(&self) -> Result<Running, StopError> {
        let now = lock(&self.now);
        let none = if now.boots == 0 {
            StopError::NotStarted
        } else {
            StopError::Ended
        };
        now.running.clone().ok_or(none)
    }

    /// Ends the VM at once, also one that is just rebooting.
    pub fn kill(&self) {
        let mut now = lock(&self.now);
        now.killed = true;
        // If the number is as large as it gets, it has been written before.
        let _ = self.killed.write(1);
        if let Some(running) = &now.running {
            running.handle.kill();
        }
    }

    /// Counters of the running VM, or of the last one.
    ///
    /// # Errors
    /// What the host refused.
    pub fn stats(&self) -> Result<Option<Counters>, device::Error> {
        let (running, last, target) = {
            let now = lock(&self.now);
            (now.running.clone(), now.last_stats.clone(), now.target)
        };
        match running {
            Some(running) => self.counters(&running, target).map(Some),
            None => Ok(last),
        }
    }

    fn counters(&self, running: &Running, target: u64) -> Result<Counters, device::Error> {
        Ok(Counters {
            vm: running.machine.stats()?,
            host: running.machine.host_exits(),
            memory: Memory {
                most: self.spec.most_memory(),
                target,
                current: running.balloon.current(),
            },
        })
    }

    /// The guest's memory. One that does not run has none.
    pub fn memory(&self) -> Memory {
        let now = lock(&self.now);
        Memory {
            most: self.spec.most_memory(),
            target: now.target,
            current: now.running.as_ref().map_or(0, |now| now.balloon.current()),
        }
    }

    /// Asks the guest to have `bytes` of its memory, and waits until it has, for
    /// `patience` at most. What is no whole page is cut off. The answer is how far it
    /// came; it goes on afterwards, and over reboots.
    ///
    /// # Errors
    /// It cannot be asked.
    pub fn balloon(&self, bytes: u64, patience: Duration) -> Result<Memory, BalloonError> {
        let bytes = bytes & !(PAGE_SIZE - 1);
        target_fits(bytes, self.spec.most_memory())?;
        let running = {
            let mut now = lock(&self.now);
            let running = now.running.clone().ok_or(BalloonError::NotRunning)?;
            // First what the guest may have: it asks when it reads what it is to have.
            running.machine.target(bytes / PAGE_SIZE)?;
            now.target = bytes;
            running
        };
        let kib = (bytes >> 10).to_string();
        running
            .xenstore
            .write("memory/target", kib.as_bytes())
            .map_err(BalloonError::Xenstore)?;
        running.balloon.wait(bytes, patience);
        Ok(Memory {
            most: self.spec.most_memory(),
            target: bytes,
            current: running.balloon.current(),
        })
    }

    /// Walks all page tables that a CPU may use for the VM, while it stands still.
    /// `None` if it does not run, or never stands still.
    ///
    /// # Errors
    /// What the host refused.
    pub fn audit(&self) -> Result<Option<Audit>, device::Error> {
        let cut = lock(&self.arrival).as_ref().is_some_and(|it| it.is_cut());
        let running = lock(&self.now).running.clone();
        running
            .filter(|_| !cut)
            .and_then(|now| now.handle.paused(|| now.machine.audit()))
            .transpose()
    }

    /// Switches the trace on or off. The answer is whether it was on before.
    ///
    /// # Errors
    /// What the host refused.
    pub fn trace(&self, on: bool) -> Result<bool, device::Error> {
        let mut now = lock(&self.now);
        if let Some(running) = &now.running {
            running.machine.trace(on)?;
        }
        Ok(std::mem::replace(&mut now.traced, on))
    }

    /// The last records of all vCPUs in the order of time, and how often the VM had
    /// been booted when they were made: their numbers begin again with each boot.
    ///
    /// # Errors
    /// What the host refused.
    pub fn trace_records(&self) -> Result<(u32, Vec<trace::Record>), device::Error> {
        let (boots, running) = {
            let now = lock(&self.now);
            (now.boots, now.running.clone())
        };
        let mut records = match running {
            Some(running) => running.machine.trace_records()?,
            None => Vec::new(),
        };
        trace::sort(&mut records);
        Ok((boots, records))
    }

    /// Frequency of the time-stamps in its trace.
    #[must_use]
    pub fn tsc_khz(&self) -> u64 {
        self.hypervisor.info().tsc_khz
    }

    /// What it is made of.
    #[must_use]
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// What it runs on: [`Hypervisor::name`].
    #[must_use]
    pub fn host(&self) -> &'static str {
        self.hypervisor.name()
    }

    /// Build id of the core that it runs on.
    #[must_use]
    pub fn core_build_id(&self) -> [u8; 32] {
        self.hypervisor.info().build_id
    }

    /// The bus of its devices, while it runs.
    pub(crate) fn running_bus(&self) -> Option<Arc<Bus>> {
        let now = lock(&self.now);
        now.running.as_ref().map(|running| Arc::clone(&running.bus))
    }

    /// Its xenstore, while it runs.
    #[cfg(test)]
    pub(crate) fn running_store(&self) -> Option<Arc<Xenstore>> {
        let now = lock(&self.now);
        now.running
            .as_ref()
            .map(|running| Arc::clone(&running.xenstore))
    }

    /// Its identity, kept over reboots.
    #[must_use]
    pub fn uuid(&self) -> String {
        lock(&self.uuid).clone()
    }

    /// It is the VM of another host.
    pub(crate) fn become_uuid(&self, uuid: &str) {
        uuid.clone_into(&mut lock(&self.uuid));
    }

    /// Which life of it this is: another at each start, the same over reboots.
    #[must_use]
    pub fn generation(&self) -> Generation {
        *lock(&self.generation)
    }

    /// Its console.
    #[must_use]
    pub fn console(&self) -> &Arc<Console> {
        &self.console
    }

    /// How often it was started.
    #[must_use]
    pub fn boots(&self) -> u32 {
        lock(&self.now).boots
    }

    /// Time since it was made.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }
}

fn target_fits(wanted: u64, most: u64) -> Result<(), BalloonError> {
    if wanted > most {
        return Err(BalloonError::TooMuch { wanted, most });
    }
    if wanted < LEAST_MEMORY.min(most) {
        return Err(BalloonError::TooLittle);
    }
    Ok(())
}

/// Gives the host what the allocator keeps of the kernel's and the initrd's buffers:
/// two MiB, which a small VM should not cost.
fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes a number and may be called by any thread at any time (malloc_trim(3)).
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Asks a guest to end itself in this way, and waits until it has.
fn ask_to_end(running: &Running, how: &str, timeout: Duration) -> Result<(), StopError> {
    running
        .xenstore
        .request_shutdown(how)
        .map_err(StopError::Xenstore)?;
    if running.handle.wait_ended(timeout) {
        return Ok(());
    }
    let listening = running
        .xenstore
        .read(&format!("control/feature-{how}"))
        .is_ok_and(|value| value.starts_with(b"1"));
    Err(StopError::Timeout { timeout, listening })
}

/// A random UUID (RFC 9562, version 4).
fn uuid() -> io::Result<String> {
    let mut bytes: [u8; 16] = entropy::bytes()?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok([
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ]
    .join("-"))
}

#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "small numbers of the tests' own making"
)]
mod tests;
