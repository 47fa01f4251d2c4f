//! A vCPU in KVM: its first state, RUN, and what the core leaves for.

use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use blanket_abi::device::{exit, pending};
use blanket_abi::kvm::EXIT_PORT;
use blanket_abi::layout::{IMAGE, VCPU, VCPU_STRIDE, sel, vcpu as area};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_RUNNABLE, kvm_dtable, kvm_mp_state, kvm_regs, kvm_run,
    kvm_segment, kvm_xcrs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::{Error, KvmVm, refused, space};
use crate::device;
use crate::hypervisor::{Crash, CrashKind, Exit, Kick, Pulse, Vcpu};
use crate::shared_page::SharedPage;

/// CR0: PG, AM, WP, NE, ET, MP, PE.
const CR0: u64 = 0x8005_0033;
/// CR4: DE, PAE, OSFXSR, OSXMMEXCPT.
const CR4: u64 = 1 << 3 | 1 << 5 | 1 << 9 | 1 << 10;
const CR4_OSXSAVE: u64 = 1 << 18;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
/// EFER: SCE, LME, LMA, NXE.
const EFER: u64 = 1 | 1 << 8 | 1 << 10 | 1 << 11;
/// APIC base: enabled, x2APIC; the first CPU is the boot CPU.
const APIC_BASE: u64 = 0xfee0_0000 | 1 << 11 | 1 << 10;
const APIC_BOOT: u64 = 1 << 8;

/// Vectors below are exceptions (AMD APM vol. 2, 8.1).
const FIRST_INTERRUPT: u8 = 32;
/// What is said of a core that was given up.
const LOST: &str = "the core is in a loop that does not end";

/// A vCPU.
pub struct KvmVcpu {
    fd: VcpuFd,
    id: u32,
    stop: Arc<StopPage>,
    pulse: Arc<CorePulse>,
    // Behind the descriptor: fields are dropped in order.
    vm: Arc<KvmVm>,
}

impl KvmVcpu {
    /// Makes vCPU `id` and puts it before the core's first instruction.
    pub fn new(vm: Arc<KvmVm>, id: u32) -> Result<Self, Error> {
        let fd = vm
            .fd
            .create_vcpu(id.into())
            .map_err(refused("create a vCPU"))?;
        fd.set_cpuid2(&vm.cpuid.for_vcpu(id)?)
            .map_err(refused("take our CPUID"))?;
        let base = VCPU + u64::from(id) * VCPU_STRIDE;
        let header = &vm.image.header;
        let mut sregs = fd.get_sregs().map_err(refused("tell its registers"))?;
        sregs.cr0 = CR0;
        sregs.cr3 = vm.space.root();
        sregs.cr4 = CR4;
        if vm.cpuid.xsave() {
            sregs.cr4 |= CR4_OSXSAVE;
        }
        if vm.cpuid.smep {
            sregs.cr4 |= CR4_SMEP;
        }
        if vm.cpuid.smap {
            sregs.cr4 |= CR4_SMAP;
        }
        sregs.efer = EFER;
        sregs.apic_base = APIC_BASE | if id == 0 { APIC_BOOT } else { 0 };
        sregs.cs = segment(sel::CORE_CS, 0xb, true);
        sregs.ss = segment(sel::CORE_SS, 0x3, false);
        for data in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ldt,
        ] {
            *data = kvm_segment {
                unusable: 1,
                ..Default::default()
            };
        }
        sregs.tr = kvm_segment {
            base: base + area::HW + space::TSS,
            limit: space::TSS_LIMIT,
            selector: sel::CORE_TSS,
            type_: 0xb,
            present: 1,
            ..Default::default()
        };
        sregs.gdt = kvm_dtable {
            base: base + area::GDT,
            limit: space::GDT_LIMIT,
            ..Default::default()
        };
        sregs.idt = kvm_dtable {
            base: IMAGE + header.idt,
            limit: 4095,
            ..Default::default()
        };
        fd.set_sregs(&sregs)
            .map_err(refused("take our registers"))?;
        fd.set_regs(&kvm_regs {
            rip: IMAGE + header.start,
            rsp: base + area::HW - 64,
            rflags: 2,
            ..Default::default()
        })
        .map_err(refused("take our registers"))?;
        // All wait in the core until the guest brings them up.
        fd.set_mp_state(kvm_mp_state {
            mp_state: KVM_MP_STATE_RUNNABLE,
        })
        .map_err(refused("start a vCPU"))?;
        vm.stats.add(id, &fd);
        Ok(Self {
            stop: Arc::new(StopPage::map(&fd)?),
            pulse: Arc::new(CorePulse {
                vm: Arc::clone(&vm),
                id,
                given_up: AtomicBool::new(false),
            }),
            fd,
            id,
            vm,
        })
    }

    /// Serves what the core left for; `None` if it may go on at once.
    fn served(&mut self) -> Result<Option<Exit>, Error> {
        let (reason, [arg, second, _, length]) = self.vm.space.exit(self.id)?;
        Ok(match reason {
            exit::SEND => Some(Exit::Send(u32::try_from(arg).unwrap_or(u32::MAX))),
            exit::CONSOLE => Some(Exit::Console(self.vm.space.text(self.id, length)?)),
            exit::SHUTDOWN => Some(Exit::Shutdown(arg)),
            exit::BALLOON => Some(Exit::Balloon {
                given_up: self.vm.space.text(self.id, length)?,
                frames: second,
            }),
            exit::PAUSED => Some(Exit::Paused(arg.cast_signed())),
            exit::CRASH => {
                let text = self.vm.space.text(self.id, length)?;
                Some(Exit::Crash(Crash {
                    kind: arg.into(),
                    report: String::from_utf8_lossy(&text).into_owned(),
                }))
            }
            exit::YIELD => {
                std::thread::yield_now();
                None
            }
            exit::TRIM => {
                self.vm.space.trim(self.id, length)?;
                None
            }
            exit::XCR0 => {
                self.set_xcr0(arg)?;
                None
            }
            other => Some(self.crash(&format!("the core left for no known reason ({other})"))),
        })
    }

    /// Also checked by KVM, against the CPUID that it was given.
    fn set_xcr0(&self, value: u64) -> Result<(), Error> {
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0].value = value;
        self.fd.set_xcrs(&xcrs).map_err(refused("set XCR0"))
    }

    /// Takes back an exception that KVM wants to inject and no CPU takes: one with the
    /// vector of an interrupt. True if there was one, and the vCPU may go on.
    ///
    /// Such exceptions are made by QEMU's emulation of SVM. It can deliver an interrupt
    /// that VMRUN injected a second time, calls that one an exception, and if it needs a
    /// nested page fault, says so in EXITINTINFO (`do_interrupt_all` in
    /// `target/i386/tcg/seg_helper.c`). KVM queues what it was told, and VMRUN refuses
    /// it. The interrupt itself has been delivered before.
    fn drop_false_exception(&self) -> Result<bool, Error> {
        let mut events = self
            .fd
            .get_vcpu_events()
            .map_err(refused("tell its pending events"))?;
        if events.exception.injected == 0 || events.exception.nr < FIRST_INTERRUPT {
            return Ok(false);
        }
        events.exception = Default::default();
        self.fd
            .set_vcpu_events(&events)
            .map_err(refused("take a vCPU's pending events"))?;
        Ok(true)
    }

    /// The VM stopped in a way that the core has no part in.
    fn crash(&self, what: &str) -> Exit {
        let mut report = format!("vCPU {}: {what}\n", self.id);
        if let (Ok(r), Ok(s)) = (self.fd.get_regs(), self.fd.get_sregs()) {
            // Writing to a string cannot fail.
            let end = IMAGE + self.vm.image.header.text_end;
            if (IMAGE..end).contains(&r.rip) {
                let _ = writeln!(report, "core at core+{:#x}", r.rip - IMAGE);
            }
            let _ = write!(
                report,
                "rip {:#018x} cs {:#x} rflags {:#x} rsp {:#018x} ss {:#x}\n\
                 rax {:#018x} rbx {:#018x} rcx {:#018x} rdx {:#018x}\n\
                 rsi {:#018x} rdi {:#018x} rbp {:#018x} r8 {:#018x}\n\
                 cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}\n",
                r.rip,
                s.cs.selector,
                r.rflags,
                r.rsp,
                s.ss.selector,
                r.rax,
                r.rbx,
                r.rcx,
                r.rdx,
                r.rsi,
                r.rdi,
                r.rbp,
                r.r8,
                s.cr0,
                s.cr2,
                s.cr3,
                s.cr4,
                s.efer,
            );
        }
        if let Ok(events) = self.fd.get_vcpu_events() {
            let (exception, interrupt) = (events.exception, events.interrupt);
            let _ = writeln!(
                report,
                "exception {:#x} (injected {}, pending {}, error code {:#x}) \
                 interrupt {:#x} (injected {})",
                exception.nr,
                exception.injected,
                exception.pending,
                exception.error_code,
                interrupt.nr,
                interrupt.injected,
            );
        }
        Exit::Crash(Crash {
            kind: CrashKind::Core,
            report,
        })
    }
}

fn segment(selector: u16, type_: u8, code: bool) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Result<Exit, device::Error> {
        loop {
            let what = match self.fd.run() {
                Ok(VcpuExit::IoOut(EXIT_PORT, _)) => match self.served()? {
                    Some(exit) => return Ok(exit),
                    None => continue,
                },
                Ok(VcpuExit::Intr) if self.pulse.lost() => LOST.to_owned(),
                Ok(VcpuExit::Intr) => return Ok(Exit::Interrupted),
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    if self.drop_false_exception()? {
                        continue;
                    }
                    format!("KVM cannot enter it (reason {reason:#x}, CPU {cpu})")
                }
                Ok(VcpuExit::Shutdown) => "it stopped with a triple fault".to_owned(),
                Ok(other) => format!("KVM stopped it: {other:?}"),
                Err(error) => match error.errno() {
                    libc::EINTR if self.pulse.lost() => LOST.to_owned(),
                    libc::EINTR | libc::EAGAIN => return Ok(Exit::Interrupted),
                    libc::ENOMEM => return Err(Error::NoMemory("run a vCPU").into()),
                    // A frame that the host cannot give.
                    libc::EFAULT => {
                        return Ok(Exit::Crash(Crash {
                            kind: CrashKind::Memory,
                            report: format!("vCPU {}: the host has no memory for it", self.id),
                        }));
                    }
                    errno => {
                        return Err(Error::Refused {
                            what: "run a vCPU",
                            source: io::Error::from_raw_os_error(errno),
                        }
                        .into());
                    }
                },
            };
            return Ok(self.crash(&what));
        }
    }

    fn at_rest(&self) -> bool {
        // At CPL 3, or in the core's HLT: it holds no lock and has changed nothing by half.
        let user = self.fd.get_sregs().is_ok_and(|s| s.cs.selector & 3 == 3);
        user || self
            .fd
            .get_mp_state()
            .is_ok_and(|state| state.mp_state == KVM_MP_STATE_HALTED)
    }

    fn kick(&self) -> Arc<dyn Kick> {
        Arc::clone(&self.stop) as Arc<dyn Kick>
    }

    fn pulse(&self) -> Option<Arc<dyn Pulse>> {
        Some(Arc::clone(&self.pulse) as Arc<dyn Pulse>)
    }
}

/// Questions to the core: the bit for a kick, which it takes as it takes any other.
struct CorePulse {
    vm: Arc<KvmVm>,
    id: u32,
    given_up: AtomicBool,
}

impl CorePulse {
    /// Whether the core was given up, and has not answered meanwhile.
    fn lost(&self) -> bool {
        self.given_up.load(Ordering::SeqCst) && !self.answered()
    }
}

impl Pulse for CorePulse {
    fn ask(&self) {
        let asked = self.vm.space.pending(self.id).and_then(|word| {
            word.fetch_or(pending::KICK, Ordering::SeqCst);
            self.vm.interrupt(self.id)
        });
        if let Err(error) = asked {
            tracing::warn!(vcpu = self.id, %error, "cannot ask the core");
        }
    }

    fn answered(&self) -> bool {
        self.vm
            .space
            .pending(self.id)
            .is_ok_and(|word| word.load(Ordering::SeqCst) & pending::KICK == 0)
    }

    fn give_up(&self) {
        self.given_up.store(true, Ordering::SeqCst);
    }
}

/// A second mapping of the page that a vCPU shares with KVM, for other threads: they
/// touch one byte of it, atomically, which KVM reads when it enters.
struct StopPage(SharedPage<kvm_run>);

impl StopPage {
    fn map(fd: &VcpuFd) -> Result<Self, Error> {
        // SAFETY: the descriptor is open for as long as this borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        SharedPage::map(fd)
            .map(Self)
            .map_err(|source| Error::Refused {
                what: "share a vCPU's page",
                source,
            })
    }
}

impl StopPage {
    fn set(&self, value: u8) {
        // SAFETY: a byte inside of the mapping, which lives as long as `self`; this
        // program accesses it through this atomic only.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.0.as_ptr()).immediate_exit) }
            .store(value, Ordering::Release);
    }
}

impl Kick for StopPage {
    fn stop(&self) {
        self.set(1);
    }

    fn go(&self) {
        self.set(0);
    }
}
