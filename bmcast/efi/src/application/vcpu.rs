//! A CPU: its VMCB and its loop.

use alloc::boxed::Box;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bmcast_svm::{Control, Intercepts1, Intercepts2, Registers, Vmcb, exit};
use spin::Once;

use super::cpu::{self, SVME};
use super::host;
use super::leave;
use super::memory::{address, pages};
use super::switch::{self, Fx};
use super::{exits, machine, windows};
use crate::say;

/// Bytes of a CPU's stack in the VMM.
pub const STACK_PAGES: usize = 16;

/// One CPU.
pub struct Cpu {
    /// Its APIC ID.
    pub id: u8,
    /// Its VMCB, in a page of its own.
    pub vmcb: Box<Vmcb>,
    /// The guest's general registers.
    pub registers: Registers,
    /// The guest's SSE registers.
    pub fx: Box<Fx>,
    /// Where VMRUN saves the host's state: physical.
    pub save_area: u64,
    /// End of its stack.
    pub stack: u64,
    /// A window for interrupts has been asked for, to leave through.
    pub leaving: bool,
    /// Changes of the nested tables that its TLB knows.
    changes: u64,
}

/// What all VMCBs have in common.
pub struct Common {
    /// Root of the nested page tables.
    pub nested: u64,
    /// Permission map of ports, physical.
    pub iopm: u64,
    /// Permission map of MSRs, physical.
    pub msrpm: u64,
}

/// Set once before the first CPU is a guest.
pub static COMMON: Once<Common> = Once::new();

/// All mediation is over: each CPU leaves at its next chance.
pub static LEAVE: AtomicBool = AtomicBool::new(false);

/// Exits of all CPUs.
pub static EXITS: AtomicU64 = AtomicU64::new(0);

impl Cpu {
    /// A CPU with a VMCB that has nothing of a guest yet; none when memory is used up.
    pub fn new(id: u8) -> Option<Box<Self>> {
        let page = pages(1)?;
        // SAFETY: a page of zeros that is nobody else's, aligned as a VMCB is; all its fields are numbers. The heap takes
        // it back with the same size and alignment.
        let vmcb = unsafe { Box::from_raw(page.as_ptr().cast::<Vmcb>()) };
        let mut fx = Box::new(Fx([0; 512]));
        // FCW and MXCSR as after INIT (APM volume 2, table 14-1).
        fx.0[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        fx.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        let stack = pages(STACK_PAGES)?;
        let bytes = STACK_PAGES * super::memory::PAGE;
        let mut cpu = Self {
            id,
            vmcb,
            registers: [0; 16],
            fx,
            save_area: address(pages(1)?.as_ptr()),
            stack: address(stack.as_ptr().wrapping_add(bytes)),
            leaving: false,
            changes: 0,
        };
        let common = COMMON.get()?;
        let control = &mut cpu.vmcb.control;
        control.intercepts1 =
            Intercepts1::HLT | Intercepts1::IOIO | Intercepts1::MSR | Intercepts1::SHUTDOWN;
        // Five levels of paging: leaf 7, ECX, bit 16.
        if cpu::cpuid(0)[0] >= 7 && cpu::cpuid_at(7, 0)[2] & 1 << 16 != 0 {
            control.intercepts1 |= Intercepts1::CPUID;
        }
        control.intercepts2 = Intercepts2::VMRUN
            | Intercepts2::VMLOAD
            | Intercepts2::VMSAVE
            | Intercepts2::STGI
            | Intercepts2::CLGI
            | Intercepts2::SKINIT;
        control.iopm = common.iopm;
        control.msrpm = common.msrpm;
        control.asid = 1;
        control.tlb_control = 1;
        control.nested_paging = 1;
        control.nested_cr3 = common.nested;
        Some(Box::new(cpu))
    }

    /// Has this CPU ready to run guests.
    ///
    /// # Safety
    ///
    /// This CPU has SVM, and nobody else uses it.
    pub unsafe fn turn_on(&self) {
        // SAFETY: as the caller says; GIF is 0 from here on, so that interrupts and NMIs wait for the guest.
        unsafe {
            cpu::wrmsr(cpu::EFER, cpu::rdmsr(cpu::EFER) | SVME | cpu::NXE);
            cpu::wrmsr(cpu::HSAVE, self.save_area);
            core::arch::asm!("clgi", options(nostack, preserves_flags));
        }
    }

    /// Runs the guest, for as long as there is a VMM.
    pub fn run(&mut self) -> ! {
        loop {
            // SAFETY: `turn_on` has been called on this CPU, and the VMCB is by `new`.
            unsafe {
                switch::run(
                    address(&raw const *self.vmcb),
                    &mut self.registers,
                    &mut self.fx,
                )
            };
            EXITS.fetch_add(1, Ordering::Relaxed);
            self.is_guests();
            self.registers[0] = self.vmcb.save.rax;
            self.registers[4] = self.vmcb.save.rsp;
            let control = &mut self.vmcb.control;
            control.clean = 0;
            control.intercepts1 |= Intercepts1::HLT;
            let changes = windows::CHANGES.load(Ordering::Acquire);
            control.tlb_control = u32::from(changes != self.changes);
            self.changes = changes;
            // What was being delivered is delivered again (APM 15.7.2); bits of old events stay there, so the valid bit
            // decides.
            control.event_injection = match control.exit_int_info {
                event if event & 1 << 31 != 0 => event,
                _ => 0,
            };
            match control.exit_code {
                exit::NPF => exits::nested_fault(self),
                exit::HLT => exits::halted(self),
                exit::MSR => exits::msr(self),
                exit::IOIO => exits::port(self),
                exit::CPUID => exits::cpuid(self),
                exit::VINTR => {
                    control.vintr &= !(Control::V_IRQ | Control::V_IGN_TPR);
                    control.intercepts1 &= !Intercepts1::VINTR;
                    self.leaving = false;
                    if control.event_injection == 0 {
                        leave::leave(self);
                    }
                }
                exit::VMRUN..=exit::SKINIT => control.event_injection = Control::INJECT_UD,
                exit::SHUTDOWN => exits::reset(),
                code => {
                    say!(
                        "exit {code:#x} ({:#x}, {:#x}) at {:#x}: cannot go on",
                        control.exit_info1,
                        control.exit_info2,
                        self.vmcb.save.rip
                    );
                    cpu::stop();
                }
            }
            machine::turn();
            if LEAVE.load(Ordering::Acquire) && !self.leaving && leave::possible(self) {
                // The next moment in which the guest would take an interrupt: none is half delivered then, no NMI
                // is being handled, and there is no interrupt shadow.
                self.leaving = true;
                self.vmcb.control.vintr |= Control::V_IRQ | Control::V_IGN_TPR;
                self.vmcb.control.intercepts1 |= Intercepts1::VINTR;
            }
            self.vmcb.save.rax = self.registers[0];
            self.vmcb.save.rsp = self.registers[4];
        }
    }

    /// That the CPU has not saved the VMM's state as the guest's, as QEMU's SVM does once in a great many exits when
    /// the host is busy: by all signs it exits twice. The guest's state is lost then.
    fn is_guests(&self) {
        let save = &self.vmcb.save;
        if save.cr3 != host::cr3() || save.rip != switch::behind_vmrun() {
            return;
        }
        let control = &self.vmcb.control;
        say!(
            "CPU {}: the VMM's own state was saved as the guest's at exit {:#x} ({:#x}, {:#x}): cannot go on",
            self.id,
            control.exit_code,
            control.exit_info1,
            control.exit_info2
        );
        cpu::stop();
    }

    /// Goes behind an instruction of `length` bytes.
    pub fn skip(&mut self, length: u64) {
        self.vmcb.save.rip = self.vmcb.save.rip.wrapping_add(length);
        self.vmcb.control.interrupt_shadow = 0;
    }
}
