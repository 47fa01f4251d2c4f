//! A hypervisor whose guests are closures, for tests of everything above the device.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use blanket_abi::device::{Audit, Boot, COUNTERS, EXIT_REASONS, Info, VmStats};

use blanket_abi::trace::kind;

use crate::builder::{Domain, GuestMemory, STORE_PORT};
use crate::cpu::{Names, Profile};
use crate::device::Error;
use crate::hypervisor::{Exit, Hypervisor, Isolation, Kick, Machine, Vcpu};
use crate::sync::lock;
use crate::trace::Record;

/// What a vCPU does at each RUN.
pub type Program = Box<dyn FnMut(&Guest) -> Result<Exit, Error> + Send>;

/// Makes VMs whose vCPUs run what `programs` gives for (boot number, vCPU).
pub struct Fake<F> {
    programs: F,
    boots: Mutex<u32>,
    cpu: Mutex<Option<Cpu>>,
    given: Mutex<Vec<Profile>>,
}

/// What VMs find in the CPU: all of it, or only these features.
pub type Cpu = Box<dyn Fn(Option<&Names>) -> Profile + Send>;

/// The guest's view of its VM.
pub struct Guest {
    /// Its memory.
    pub memory: Arc<GuestMemory>,
    /// What the builder said.
    pub boot: Boot,
    events: Mutex<Events>,
    changed: Condvar,
}

#[derive(Default)]
struct Events {
    raised: VecDeque<u32>,
    stop: bool,
    traced: bool,
    target: u64,
    records: Vec<Record>,
}

impl Guest {
    /// Frames that it may have at most; 0 = all.
    ///
    /// # Panics
    /// If another thread of the test panicked.
    pub fn target(&self) -> u64 {
        lock(&self.events).target
    }

    /// Whether the vCPU is to leave.
    ///
    /// # Panics
    /// If another thread of the test panicked.
    pub fn stops(&self) -> bool {
        lock(&self.events).stop
    }

    /// Waits for an event; `None` when the vCPU is to leave.
    ///
    /// # Panics
    /// If another thread of the test panicked.
    pub fn wait(&self) -> Option<u32> {
        let mut events = lock(&self.events);
        loop {
            if events.stop {
                return None;
            }
            if let Some(port) = events.raised.pop_front() {
                return Some(port);
            }
            events = self.changed.wait(events).expect("no panics under the lock");
        }
    }
}

impl<F: Fn(u32, u32) -> Program + Send + Sync> Fake<F> {
    /// A hypervisor for these programs.
    pub fn new(programs: F) -> Arc<Self> {
        Arc::new(Self {
            programs,
            boots: Mutex::new(0),
            cpu: Mutex::default(),
            given: Mutex::default(),
        })
    }

    /// The same, with a CPU.
    ///
    /// # Panics
    /// If another thread of the test panicked.
    #[must_use]
    pub fn with_cpu(self: Arc<Self>, cpu: Cpu) -> Arc<Self> {
        *lock(&self.cpu) = Some(cpu);
        self
    }

    /// What its VMs were given of it, in the order in which they were made.
    ///
    /// # Panics
    /// If another thread of the test panicked.
    pub fn given(&self) -> Vec<Profile> {
        lock(&self.given).clone()
    }
}

struct FakeMachine {
    guest: Arc<Guest>,
    programs: Mutex<Vec<Option<Program>>>,
}

struct FakeVcpu {
    guest: Arc<Guest>,
    program: Program,
    rests: AtomicU32,
}

struct FakeKick(Arc<Guest>);

impl<F: Fn(u32, u32) -> Program + Send + Sync> Hypervisor for Fake<F> {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn info(&self) -> Info {
        Info {
            max_vcpus: 64,
            max_frames: 1 << 24,
            ..Info::default()
        }
    }

    fn profile(&self, only: Option<&Names>) -> Profile {
        let here = lock(&self.cpu);
        here.as_ref().map_or_else(Profile::default, |of| of(only))
    }

    fn create(
        &self,
        domain: &Domain,
        vcpus: u32,
        _: u64,
        _: Isolation,
        cpu: &Profile,
    ) -> Result<Arc<dyn Machine>, Error> {
        lock(&self.given).push(cpu.clone());
        let mut boots = lock(&self.boots);
        let programs = (0..vcpus)
            .map(|id| Some((self.programs)(*boots, id)))
            .collect();
        *boots += 1;
        let guest = Arc::new(Guest {
            memory: Arc::clone(&domain.memory),
            boot: domain.boot,
            events: Mutex::default(),
            changed: Condvar::new(),
        });
        Ok(Arc::new(FakeMachine {
            guest,
            programs: Mutex::new(programs),
        }))
    }
}

impl Machine for FakeMachine {
    fn vcpu(&self, id: u32) -> Result<Box<dyn Vcpu>, Error> {
        let program = lock(&self.programs)[id as usize]
            .take()
            .expect("each vCPU once");
        Ok(Box::new(FakeVcpu {
            guest: Arc::clone(&self.guest),
            program,
            rests: AtomicU32::new(0),
        }))
    }

    fn raise(&self, port: u32) -> Result<(), Error> {
        lock(&self.guest.events).raised.push_back(port);
        self.guest.changed.notify_all();
        Ok(())
    }

    fn stats(&self) -> Result<VmStats, Error> {
        Ok(VmStats {
            exits: [1; EXIT_REASONS],
            counters: [2; COUNTERS],
            frames: 3,
            pool: 4,
            guest_ns: 5,
            revocations: 0,
            revoked: 0,
        })
    }

    fn target(&self, frames: u64) -> Result<(), Error> {
        let mut events = lock(&self.guest.events);
        if std::mem::replace(&mut events.target, frames) != 0 {
            // The guest hears of it by its xenstore.
            events.raised.push_back(STORE_PORT);
        }
        drop(events);
        self.guest.changed.notify_all();
        Ok(())
    }

    fn reclaim(&self) -> Result<(), Error> {
        Ok(())
    }

    fn pause(&self, _: u32) -> Result<(), Error> {
        Ok(())
    }

    fn system_time(&self) -> Result<u64, Error> {
        Ok(0)
    }

    fn audit(&self) -> Result<Audit, Error> {
        // As a host that cannot while a vCPU runs.
        assert!(lock(&self.guest.events).stop, "the VM runs");
        Ok(Audit {
            roots: 2,
            frames: 3,
            ..Audit::default()
        })
    }

    fn trace(&self, on: bool) -> Result<(), Error> {
        lock(&self.guest.events).traced = on;
        Ok(())
    }

    /// One for each time that it is asked while the trace is on.
    fn trace_records(&self) -> Result<Vec<Record>, Error> {
        let mut events = lock(&self.guest.events);
        if events.traced {
            let number = events.records.len() as u64 + 1;
            events.records.push(Record {
                vcpu: 0,
                number,
                tsc: number,
                kind: kind::EXIT,
                what: 4,
                kernel: true,
                rip: 0,
                args: [0; 4],
            });
        }
        Ok(events.records.clone())
    }
}

impl Vcpu for FakeVcpu {
    fn at_rest(&self) -> bool {
        // Every other time it is not, as a vCPU inside KVM may be.
        self.rests.fetch_add(1, Ordering::Relaxed) % 2 == 1
    }

    fn run(&mut self) -> Result<Exit, Error> {
        if lock(&self.guest.events).stop {
            return Ok(Exit::Interrupted);
        }
        (self.program)(&self.guest)
    }

    fn kick(&self) -> Arc<dyn Kick> {
        Arc::new(FakeKick(Arc::clone(&self.guest)))
    }
}

impl Kick for FakeKick {
    fn stop(&self) {
        lock(&self.0.events).stop = true;
        self.0.changed.notify_all();
    }

    fn go(&self) {
        lock(&self.0.events).stop = false;
    }
}
