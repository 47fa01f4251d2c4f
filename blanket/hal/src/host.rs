//! The host under the core. The same image runs below `blanket.ko` and inside a KVM
//! VM; which of the two is a word in the page that the VM shares with its maker.

use crate::machine::{Hal, at};
use crate::{kvm, module};
use blanket_abi::device::{RUN_DATA, Switch, VmPage, host};
use blanket_abi::layout::{VCPU, VCPU_STRIDE, VM_PAGE, vcpu as area};
use blanket_abi::trace::Ring;
use blanket_core::machine::Host;
use blanket_core::time::Clock;
use core::sync::atomic::{AtomicU32, Ordering};

impl Hal {
    /// Whether the core runs inside KVM.
    #[inline]
    pub(crate) fn inside_kvm(&self) -> bool {
        self.vm_page().host == host::KVM
    }

    /// Loads the core's own root, if it has one: the world is entered on another.
    pub(crate) fn load_core_root(&self) {
        let cr3 = self.local().core_cr3.load(Ordering::Relaxed);
        if cr3 != 0 {
            crate::cpu::write_cr3(cr3);
        }
    }

    /// Another vCPU's switch block; `vcpu` is one of this VM's.
    pub(crate) fn switch_of(&self, vcpu: u32) -> &Switch {
        let hw = VCPU + u64::from(vcpu) * VCPU_STRIDE + area::HW;
        // SAFETY: the areas of all vCPUs are mapped before any vCPU runs, and what
        // others read of a switch block is atomic.
        unsafe { at::<Switch>(hw) }
    }

    /// Sets what the world switch, or the VMM, must know of XCR0.
    pub(crate) fn note_xcr0(&self, val: u64) {
        // SAFETY: only this vCPU and, while it is away, its host touch the field.
        unsafe { (&raw mut (*self.raw_switch()).guest_xcr0).write_volatile(val) };
    }

    /// Puts `text` at byte `at` of the data of an exit; how much there was room for.
    pub(crate) fn put_data(&self, at: usize, text: &[u8]) -> usize {
        let n = text.len().min(RUN_DATA.saturating_sub(at));
        if n != 0 {
            // SAFETY: `data` has RUN_DATA bytes, of which `n` from `at` on are written;
            // the host reads it only while this vCPU is with it.
            unsafe {
                let to = (&raw mut (*self.raw_switch()).data).cast::<u8>().add(at);
                core::ptr::copy_nonoverlapping(text.as_ptr(), to, n);
            }
        }
        n
    }

    /// Puts an exit into the switch block, lets `leave` take it to the host, and
    /// answers with what the host says.
    pub(crate) fn call(&self, reason: u32, args: [u64; 4], leave: impl FnOnce(*mut Switch)) -> i64 {
        let sw = self.raw_switch();
        // SAFETY: the switch block of this vCPU; the host touches these fields only
        // during `leave`.
        unsafe {
            (&raw mut (*sw).exit).write_volatile(reason);
            (&raw mut (*sw).args).write_volatile(args);
            leave(sw);
            (&raw const (*sw).ret).read_volatile()
        }
    }
}

impl Host for Hal {
    fn exit(&self, reason: u32, args: [u64; 4]) -> i64 {
        if self.inside_kvm() {
            kvm::exit(self, reason, args)
        } else {
            module::exit(self, reason, args)
        }
    }
    #[inline]
    fn in_place(&self, reason: u32) -> bool {
        self.inside_kvm() && kvm::in_place(reason)
    }
    #[inline]
    fn clock(&self) -> Clock {
        if self.inside_kvm() {
            kvm::clock(self)
        } else {
            Clock::of_page(self.vm_page())
        }
    }
    fn wall_clock(&self) -> (u64, u32) {
        if self.inside_kvm() {
            return kvm::wall_clock(self);
        }
        let page = self.vm_page();
        (
            page.wall_sec.load(Ordering::Acquire),
            page.wall_nsec.load(Ordering::Acquire),
        )
    }
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        if self.inside_kvm() {
            return kvm::cpuid(self, leaf, subleaf);
        }
        let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
        [r.eax, r.ebx, r.ecx, r.edx]
    }
    fn set_xcr0(&self, val: u64) {
        if self.inside_kvm() {
            kvm::set_xcr0(self, val);
        } else {
            crate::cpu::xsetbv(val);
        }
        self.note_xcr0(val);
    }
    #[inline]
    fn switch(&self) -> &Switch {
        // SAFETY: mapped for the VM's life. The plain fields that the logic reads
        // through this are constant; those that change are atomics or written
        // through raw pointers.
        unsafe { at(self.hw()) }
    }
    fn pending_of(&self, vcpu: u32) -> &AtomicU32 {
        &self.switch_of(vcpu).pending
    }
    fn preempted(&self, vcpu: u32) -> bool {
        self.inside_kvm() && kvm::preempted(self, vcpu)
    }
    #[inline]
    fn vm_page(&self) -> &VmPage {
        // SAFETY: mapped for the VM's life; what changes is atomic.
        unsafe { at(VM_PAGE) }
    }
    fn trap_entry(&self, traced: bool) -> u64 {
        crate::start::trap_entry(traced)
    }
    fn trace_ring(&self) -> &Ring {
        // SAFETY: whoever sets `VmPage::trace` has mapped a zeroed ring there before,
        // for the VM's life; the logic asks for it only afterwards. All of it is atomic.
        unsafe { at(self.trace()) }
    }
    fn set_data(&self, text: &[u8]) -> usize {
        self.put_data(0, text)
    }
}
