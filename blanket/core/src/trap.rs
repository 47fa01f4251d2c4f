//! Entries from the guest: exceptions, host interrupts, slow system calls.

use crate::context::{Context, Shape};
use crate::machine::Machine;
use crate::mmu::{Access, Fault};
use crate::pte;
use crate::vcpu::{State, entry};
use blanket_abi::device::{counter, crash, exit};
use blanket_abi::layout::sel;
use blanket_abi::{Gfn, Va};

/// Exception vectors (Intel SDM vol. 3, table 6-1).
pub mod vector {
    /// Debug.
    pub const DB: u8 = 1;
    /// Non-maskable interrupt.
    pub const NMI: u8 = 2;
    /// Breakpoint.
    pub const BP: u8 = 3;
    /// Overflow.
    pub const OF: u8 = 4;
    /// Invalid opcode.
    pub const UD: u8 = 6;
    /// Double fault.
    pub const DF: u8 = 8;
    /// General protection.
    pub const GP: u8 = 13;
    /// Page fault.
    pub const PF: u8 = 14;
    /// Machine check.
    pub const MC: u8 = 18;
}

/// Whether the CPU pushes an error code.
const fn has_error(v: u8) -> bool {
    matches!(v, 8 | 10..=14 | 17 | 21 | 29 | 30)
}

impl<M: Machine> Context<'_, M> {
    /// Handles what brought the guest into the core. Call
    /// [`Self::prepare_return`] afterwards.
    #[allow(clippy::cast_possible_truncation, reason = "vectors are below 256")]
    pub fn enter(&mut self) {
        let error = self.f.error;
        match self.f.vector {
            entry::SYSCALL if self.kernel_mode() => self.hypercall(),
            entry::SYSCALL => {
                self.count(counter::SLOW_SYSCALL);
                self.syscall(self.v.syscall.address, self.v.syscall.mask);
            }
            entry::SYSCALL32 => self.syscall(self.v.syscall32.address, self.v.syscall32.mask),
            entry::IRET_FAULT => self.iret_fault(),
            14 => self.page_fault(),
            13 => self.general_protection(),
            6 => self.invalid_opcode(),
            1 => {
                self.v.dr6 |= self.m.take_dr6() & 0xe00f;
                self.inject(vector::DB, None);
            }
            2 => {
                self.exit(exit::NMI, [0; 4]);
            }
            18 => {
                self.exit(exit::MCE, [0; 4]);
            }
            v @ 0..32 => {
                let v = v as u8;
                self.inject(v, has_error(v).then_some(error));
            }
            v => {
                self.exit(exit::INTR, [v & 0xff, 0, 0, 0]);
            }
        }
    }

    /// A system call of the guest's user mode. RCX and R11 hold RIP and RFLAGS.
    fn syscall(&mut self, handler: u64, mask: bool) {
        if handler == 0 || self.kernel_mode() {
            // No callback: the instruction does not exist (xen-pv-abi, 6.3).
            self.f.rip = self.f.rip.wrapping_sub(2);
            self.inject(vector::UD, None);
        } else {
            self.bounce(handler, mask, None);
            self.f.rflags &= !crate::vcpu::rflags::DF;
        }
    }

    /// The return to the guest faulted: the selectors or the instruction pointer
    /// that the guest asked for are bad. The failsafe callback sorts it out.
    fn iret_fault(&mut self) {
        let callback = self.v.failsafe;
        if callback.address == 0 {
            self.crash(
                crash::GUEST,
                format_args!("bad return frame and no failsafe callback"),
            );
        }
        // The guest sees the selectors that it asked for in the frame.
        let selectors = self.m.data_selectors().map(u64::from);
        self.bounce_as(callback.address, callback.mask, Shape::Selectors(selectors));
    }

    /// Whether the present mode may use gate `n` with `int n`. The guest kernel
    /// counts as ring 1, as in Xen.
    fn gate_open(&self, n: u8) -> bool {
        let cpl = if self.kernel_mode() { 1 } else { 3 };
        let gate = self.v.traps[usize::from(n)];
        gate.address != 0 && gate.flags & 3 >= cpl
    }

    /// `int n`, whose gates in the hardware table are closed to guests.
    pub fn software_interrupt(&mut self, n: u8, len: u8) -> bool {
        if !self.gate_open(n) {
            return false;
        }
        self.f.rip = self.f.rip.wrapping_add(u64::from(len));
        self.inject(n, None);
        true
    }

    fn page_fault(&mut self) {
        let va = Va(self.m.cr2());
        let error = self.f.error;
        if !va.is_canonical() {
            // Only with 5-level paging: for a 4-level guest it is not an address.
            self.inject(vector::GP, Some(0));
            return;
        }
        if va.in_hole() {
            self.inject_page_fault(va, error & pte::PF_PRESENT != 0);
            return;
        }
        if error & pte::PF_RESERVED != 0 {
            self.crash(
                crash::CORE,
                format_args!("reserved bit in a shadow entry for {va:?}"),
            );
        }
        let access = Access {
            write: error & pte::PF_WRITE != 0,
            fetch: error & pte::PF_FETCH != 0,
        };
        let root = self.root();
        match self.mmu(|mmu, m, ep| mmu.fault(m, ep, root, va, access)) {
            Fault::Fixed => self.count(counter::PF_SHADOW),
            Fault::Guest { present } => self.inject_page_fault(va, present),
            Fault::Table { gfn } => {
                if !(self.kernel_mode() && self.emulate_table_write(gfn, va)) {
                    self.inject_page_fault(va, true);
                }
            }
        }
    }

    fn inject_page_fault(&mut self, va: Va, present: bool) {
        self.count(counter::PF_GUEST);
        let keep = pte::PF_WRITE | pte::PF_FETCH;
        let mut code = self.f.error & keep;
        if present {
            code |= pte::PF_PRESENT;
        }
        if !self.kernel_mode() {
            code |= pte::PF_USER;
        }
        // CR2 goes to the vcpu_info before the frame, as the handler reads it first.
        self.set_cr2(va.0);
        self.inject(vector::PF, Some(code));
    }

    /// Starts the first vCPU as the domain builder left it (xen-pv-abi, 2.3).
    pub fn boot(&mut self) {
        let boot = self.vm.boot;
        self.fast.kernel_mode = 1;
        // The record comes from the VMM. Before anything looks at a frame by it: one
        // outside the VM would reach the core's own memory.
        let (root, shared) = (Gfn(boot.cr3), Gfn(boot.shared_info));
        if root.0 >= self.vm.nr_frames
            || shared.0 >= self.vm.nr_frames
            || boot.ram_frames > self.vm.nr_frames
            || boot.start_frames > boot.most()
            || boot.most() > boot.ram_frames
            || !self.mmu(|mmu, _, _| Ok(mmu.has(root) && mmu.has(shared)))
            || !Va(boot.rip).is_guest()
        {
            self.crash(
                crash::GUEST,
                format_args!(
                    "the boot record names root {root:?}, shared info {shared:?}, {:#x} frames of \
                     RAM with {:#x} at the start, and rip {:#x}",
                    boot.ram_frames, boot.start_frames, boot.rip
                ),
            );
        }
        self.default_info();
        self.f.rip = boot.rip;
        self.f.rsp = boot.rsp;
        self.f.rsi = boot.start_info;
        self.f.cs = u64::from(sel::GUEST_CS64);
        self.f.ss = u64::from(sel::GUEST_SS);
        self.f.rflags = crate::vcpu::rflags::IF | crate::vcpu::rflags::ONE;
        self.v.kernel_ss = u64::from(sel::GUEST_SS);
        self.v.kernel_sp = boot.rsp;
        for port in [boot.store_port, boot.console_port] {
            // The builder chose the ports; two equal or bad ones leave one unbound,
            // which the guest notices, not the core.
            let _lock = self.vm.ports_lock.lock();
            let _taken = self
                .vm
                .ports
                .reserve_static(port, blanket_abi::xen::domid::BACKEND);
        }
        let (page, cr3) = self.mmu(|mmu, m, ep| {
            let page = mmu.root_get(m, ep, root, false)?;
            Ok((page, mmu.root_cr3(m, page)))
        });
        self.v.kernel_root = page;
        self.v.root_gfns[0] = root;
        self.fast.kernel_cr3 = cr3;
        self.set_events_masked(true);
        self.publish_wall_clock();
        self.v.check_timers = true;
        self.set_runstate(blanket_abi::xen::shared::runstate::RUNNING);
        self.vm.states[self.v.id as usize].set(State::UP);
        self.load_root();
    }
}
