//! A VM on a fake machine.

use super::{ARGS, ARGS_SIZE, Crash, FakeMachine, Setup, hole};
use blanket_abi::Va;
use blanket_abi::device::{Boot, counter, exit};
use blanket_core::context::Context;
use blanket_core::evtchn::Ports;
use blanket_core::machine::Host;
use blanket_core::mmu::{AuditReport, Broken, GfnInfo, Mmu, PoolInfo};
use blanket_core::vcpu::{Fast, TrapFrame, Vcpu};
use blanket_core::vm::Vm;
use spin::Mutex;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

/// Where an access of the guest ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reached {
    /// At a frame.
    Frame(u64),
    /// In the guest's fault handler.
    Fault,
    /// It faults for ever, without harm to others: a guest that writes its own
    /// tables through themselves.
    Never,
}

/// A VM on a fake machine.
pub struct World {
    pub m: FakeMachine,
    pub vm: &'static Vm,
    pub fast: Vec<Fast>,
    pub regs: Vec<TrapFrame>,
    pub setup: Setup,
}

impl World {
    /// A VM that has not started. What the core keeps for ever is leaked, as it is
    /// in the image.
    pub fn new(setup: Setup, boot: Boot) -> Self {
        let m = FakeMachine::new(setup, boot);
        let gfns = vec![GfnInfo::default(); setup.frames() as usize].leak();
        let pool = vec![PoolInfo::default(); setup.pool as usize].leak();
        let mmu = Mmu::new(gfns, pool, hole(), setup.la57, setup.vcpus);
        let vcpus: Vec<_> = (0..setup.vcpus)
            .map(|id| Mutex::new(Vcpu::new(id)))
            .collect();
        let vm: &'static Vm = Box::leak(Box::new(Vm::new(
            boot,
            setup.frames(),
            setup.vcpus,
            mmu,
            Box::leak(Box::new(Ports::new())),
            vcpus.leak(),
        )));
        assert!(m.vm.set(vm).is_ok());
        Self {
            m,
            vm,
            fast: (0..setup.vcpus).map(|_| Fast::default()).collect(),
            regs: vec![TrapFrame::default(); setup.vcpus as usize],
            setup,
        }
    }

    /// Runs `f` as vCPU `id`.
    pub fn on<R>(&mut self, id: u32, f: impl FnOnce(&mut Context<'_, FakeMachine>) -> R) -> R {
        let i = id as usize;
        self.m.current.set(i);
        let mut v = self.vm.vcpus[i].try_lock().expect("a vCPU runs once");
        let mut c = Context {
            m: &self.m,
            vm: self.vm,
            v: &mut v,
            fast: &mut self.fast[i],
            f: &mut self.regs[i],
        };
        // The host has brought it out of the core world to take frames.
        if self.m.page.revocations.load(SeqCst) != c.v.revocations {
            c.exit(exit::INTR, [0; 4]);
        }
        f(&mut c)
    }

    /// As [`Self::on`] for vCPU 0.
    pub fn cpu0<R>(&mut self, f: impl FnOnce(&mut Context<'_, FakeMachine>) -> R) -> R {
        self.on(0, f)
    }

    /// Runs something that must end the VM and returns the report.
    pub fn crashes(&mut self, f: impl FnOnce(&mut Context<'_, FakeMachine>)) -> Crash {
        let run = std::panic::AssertUnwindSafe(|| self.on(0, f));
        let ended = std::panic::catch_unwind(run);
        let crash = self.m.crashed.borrow_mut().take();
        match (ended, crash) {
            (Ok(()), _) => panic!("the VM goes on"),
            (Err(_), Some(crash)) => crash,
            (Err(e), None) => std::panic::resume_unwind(e),
        }
    }

    /// Makes another vCPU current without running it (for walks).
    pub fn switch_to(&self, id: u32) {
        self.m.current.set(id as usize);
    }

    /// The shadows that vCPUs hold as roots.
    pub fn roots(&self) -> Vec<u32> {
        self.vm
            .vcpus
            .iter()
            .flat_map(|v| {
                let v = v.try_lock().expect("no vCPU runs");
                [v.kernel_root, v.user_root]
            })
            .filter(|&r| r != 0)
            .collect()
    }

    /// Checks all rules of the shadow MMU.
    pub fn try_audit(&self) -> Result<AuditReport, Broken> {
        let roots = self.roots();
        let mut mmu = self.vm.mmu.try_lock().expect("no operation runs");
        // No vCPU walks the shadows before this is done.
        while !mmu.revoke_noted(&self.m, &self.vm.epochs) {}
        self.m.check_caches(&mmu);
        mmu.audit(&self.m, &roots)
    }

    /// As [`Self::try_audit`], for tests in which no rule may be broken.
    pub fn audit(&self) -> AuditReport {
        self.try_audit().unwrap_or_else(|e| panic!("{e:?}"))
    }

    /// What the notifier does: takes a frame from the VM.
    pub fn revoke(&self, gfn: u64) {
        self.m.revoke(gfn);
    }

    /// One access of the guest's code at CPL 3, handled as the CPU and the entry
    /// code would: fault, core, again. No instruction is emulated.
    pub fn try_access(&mut self, id: u32, va: u64, write: bool, fetch: bool) -> Reached {
        for _ in 0..8 {
            self.on(id, |_| ());
            let error = match self.m.walk(Va(va), write, fetch, true) {
                Ok((gfn, _)) => return Reached::Frame(gfn),
                Err(error) => error,
            };
            let faults = |w: &Self| w.m.switch().counters[counter::PF_GUEST].load(Relaxed);
            let before = faults(self);
            self.m.cpu().cr2.set(va);
            self.on(id, |c| {
                // No code can be read there.
                c.f.rip = ARGS + ARGS_SIZE;
                c.f.vector = 14;
                c.f.error = error;
                c.enter();
                c.f.rsp = ARGS + ARGS_SIZE;
            });
            self.switch_to(id);
            if faults(self) != before {
                return Reached::Fault;
            }
        }
        Reached::Never
    }

    /// As [`Self::try_access`]: the gfn, or `None` if the guest got the fault.
    pub fn access(&mut self, id: u32, va: u64, write: bool, fetch: bool) -> Option<u64> {
        match self.try_access(id, va, write, fetch) {
            Reached::Frame(gfn) => Some(gfn),
            Reached::Fault => None,
            Reached::Never => panic!("the fault at {va:#x} is never solved"),
        }
    }

    /// A store of the guest's code; false if the guest got a fault.
    pub fn store(&mut self, id: u32, va: u64, val: u64) -> bool {
        match self.access(id, va, true, false) {
            Some(gfn) => {
                self.m.words(gfn)[(va >> 3) as usize & 511].store(val, SeqCst);
                true
            }
            None => false,
        }
    }
}
