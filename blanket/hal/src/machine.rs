//! The hal as the logic sees it: windows and CPU. The host is in [`crate::host`].

use crate::cpu::{self, msr};
use crate::entry::{self, FAST};
use blanket_abi::device::Switch;
use blanket_abi::kvm::Pv;
use blanket_abi::layout::{
    GFN_INFO, POOL, POOL_GFNS, POOL_INFO, POOL_PTES, REVOKED, REVOKED_BLOCK, VCPU, VCPU_STRIDE,
    WINDOW, WINDOW_PTES, sel, vcpu as area,
};
use blanket_abi::{Gfn, PAGE_SIZE, Va};
use blanket_core::machine::{Cpu, FpuImage, Host as _, Memory, Words};
use blanket_core::mmu::{GfnInfo, PoolInfo};
use blanket_core::pte;
use blanket_core::vcpu::{Fast, TrapFrame};
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

/// What the hal keeps for a vCPU, behind [`Fast`] in the hardware page.
#[repr(C)]
pub struct Local {
    /// Debug registers 0 to 3 of the guest.
    pub(crate) dr: [AtomicU64; 4],
    /// CR3 of the core's own root; 0 if it runs on the guest's.
    pub(crate) core_cr3: AtomicU64,
    /// CR3 for the return to the guest, if the core has its own root.
    pub(crate) guest_cr3: AtomicU64,
    /// LDT entries of the guest.
    ldt: AtomicU32,
}

/// Offset of [`Local`] in the hardware page.
pub(crate) const LOCAL: usize = FAST + 0x200;
const _: () = assert!(size_of::<Fast>() <= 0x200 && LOCAL + size_of::<Local>() <= 0x1c00);

/// The machine under one vCPU. Made from an address inside the vCPU's area.
pub struct Hal {
    area: u64,
}

/// Reference to a `T` at a fixed address of the hole.
///
/// # Safety
/// The module has mapped a valid `T` there, for as long as the VM lives, and all
/// of its fields that change are atomics.
pub(crate) unsafe fn at<T>(va: u64) -> &'static T {
    // SAFETY: the caller's promise.
    unsafe { &*(va as *const T) }
}

impl Hal {
    /// The vCPU whose area `address` lies in.
    ///
    /// # Safety
    /// `address` lies in the area of the vCPU that runs on this CPU.
    pub unsafe fn containing(address: u64) -> Self {
        Self {
            area: address & !(VCPU_STRIDE - 1),
        }
    }

    /// The vCPU's id.
    pub fn id(&self) -> u32 {
        self.switch().vcpu_id
    }

    pub(crate) fn hw(&self) -> u64 {
        self.area + area::HW
    }

    pub(crate) fn trace(&self) -> u64 {
        self.area + area::TRACE
    }

    /// The page that the vCPU shares with KVM. Only inside KVM.
    pub(crate) fn pv(&self) -> &'static Pv {
        // SAFETY: inside KVM the VMM maps a zeroed page there, for which zero is a
        // valid `Pv`; what KVM changes is atomic.
        unsafe { at(self.area + area::PV) }
    }

    /// As [`Self::pv`], another vCPU's; `vcpu` is one of this VM's.
    pub(crate) fn pv_of(&self, vcpu: u32) -> &'static Pv {
        // SAFETY: as for `pv`; the pages of all vCPUs are mapped from the start.
        unsafe { at(VCPU + u64::from(vcpu) * VCPU_STRIDE + area::PV) }
    }

    /// The trap frame on top of the main stack.
    pub fn frame(&self) -> *mut TrapFrame {
        (self.hw() - size_of::<TrapFrame>() as u64) as *mut TrapFrame
    }

    /// The fields of the fast paths.
    pub fn fast(&self) -> *mut Fast {
        (self.hw() + FAST as u64) as *mut Fast
    }

    /// The hal's own fields.
    pub fn local(&self) -> &Local {
        // SAFETY: the module maps two zeroed pages there for the VM's life, and
        // zero is a valid `Local`, whose fields are all atomics.
        unsafe { at(self.hw() + LOCAL as u64) }
    }

    pub(crate) fn raw_switch(&self) -> *mut Switch {
        self.hw() as *mut Switch
    }

    /// An address of the entry section, as seen in this vCPU's area.
    pub fn entry_alias(&self, label: *const u8) -> u64 {
        let start = &raw const entry::blanket_entry_start;
        self.area + area::ENTRY + (label as u64 - start as u64)
    }

    fn bytes_present(gfn: Gfn) -> bool {
        Self::window_pte(gfn) & pte::P != 0
    }

    fn window_pte(gfn: Gfn) -> u64 {
        // SAFETY: the module builds leaf tables for every frame of the VM at
        // creation, and the logic asks only for frames below that count.
        unsafe { at::<AtomicU64>(WINDOW_PTES + gfn.0 * 8) }.load(Ordering::Acquire)
    }

    /// The metadata arrays, for the one `Mmu` of this VM.
    ///
    /// # Safety
    /// Called once for each VM.
    pub unsafe fn metadata(&self, pool: u64) -> (&'static mut [GfnInfo], &'static mut [PoolInfo]) {
        let frames = self.vm_page().nr_frames;
        // SAFETY: the module maps zeroed arrays of these lengths there; zero is a
        // valid value of both types; the caller calls this once, so the slices
        // are the only references.
        unsafe {
            (
                core::slice::from_raw_parts_mut(GFN_INFO as *mut GfnInfo, frames as usize),
                core::slice::from_raw_parts_mut(POOL_INFO as *mut PoolInfo, pool as usize),
            )
        }
    }

    /// Restores the guest's segment registers after the host had the CPU.
    pub(crate) fn restore_segments(&self, selectors: [u16; 4], bases: [u64; 3]) -> bool {
        let ldt = self.local().ldt.load(Ordering::Relaxed);
        if ldt != 0 {
            self.load_ldt(ldt);
        }
        let [ds, es, fs, gs] = selectors.map(u32::from);
        // SAFETY: loading a data selector at CPL 0 changes nothing that 64-bit
        // code uses except the FS and GS bases, which follow.
        let faults = unsafe { entry::blanket_load_selectors(ds, es, fs, gs) };
        cpu::wrmsr(msr::FS_BASE, bases[0]);
        cpu::wrmsr(msr::GS_BASE, bases[1]);
        cpu::wrmsr(msr::KERNEL_GS_BASE, bases[2]);
        faults == 0
    }

    /// Tells the module which system call MSRs the core world has.
    pub fn set_syscall_msrs(&self, msrs: [u64; 4]) {
        // SAFETY: this vCPU's own block; the module reads it in the host world.
        unsafe { (&raw mut (*self.raw_switch()).syscall_msrs).write_volatile(msrs) };
    }
}

impl Memory for Hal {
    #[inline]
    fn frame(&self, gfn: Gfn) -> Option<&Words> {
        // SAFETY: a present window entry maps a frame of this VM that stays until
        // the core world is left (frames.c of the module); all access is atomic.
        Self::bytes_present(gfn).then(|| unsafe { at(WINDOW + gfn.base()) })
    }
    #[inline]
    fn frame_bytes(&self, gfn: Gfn) -> Option<&[AtomicU8; 4096]> {
        // SAFETY: as for `frame`.
        Self::bytes_present(gfn).then(|| unsafe { at(WINDOW + gfn.base()) })
    }
    fn copy_from_frame(&self, gfn: Gfn, offset: usize, to: &mut [u8]) -> bool {
        let from = (WINDOW + gfn.base()) as usize + offset;
        // SAFETY: the logic passes a frame of the VM and a range inside of it; a window
        // entry that is absent ends the copy through the exception table.
        Self::bytes_present(gfn)
            && unsafe { entry::blanket_copy(to.as_mut_ptr(), from as *const u8, to.len()) } == 0
    }
    fn copy_to_frame(&self, gfn: Gfn, offset: usize, from: &[u8]) -> bool {
        let to = (WINDOW + gfn.base()) as usize + offset;
        // SAFETY: as for `copy_from_frame`.
        Self::bytes_present(gfn)
            && unsafe { entry::blanket_copy(to as *mut u8, from.as_ptr(), from.len()) } == 0
    }
    #[inline]
    fn frame_pte(&self, gfn: Gfn) -> u64 {
        let entry = Self::window_pte(gfn);
        if entry & pte::P == 0 {
            0
        } else {
            entry & pte::FRAME
        }
    }
    #[inline]
    fn pool(&self, page: u32) -> &Words {
        // SAFETY: the logic uses only pages below `VmPage::pool_pages`, which the
        // module mapped before it raised that number.
        unsafe { at(POOL + u64::from(page) * PAGE_SIZE) }
    }
    #[inline]
    fn pool_pte(&self, page: u32) -> u64 {
        // SAFETY: as for `pool`.
        unsafe { at::<AtomicU64>(POOL_PTES + u64::from(page) * 8) }.load(Ordering::Relaxed)
            & pte::FRAME
    }
    #[inline]
    fn revoked(&self, block: usize) -> &[AtomicU64; 64] {
        // SAFETY: the module maps a bit for every frame of the VM, in whole pages,
        // and alone notes blocks: the logic asks for none that was not noted.
        unsafe { at(REVOKED + block as u64 * (REVOKED_BLOCK / 8)) }
    }
    #[inline]
    fn gfns(&self, page: u32) -> &[AtomicU32; 512] {
        // SAFETY: as for `pool`; the array grows together with the pool.
        unsafe { at(POOL_GFNS + u64::from(page) * 2048) }
    }
    #[inline]
    fn copy_from_guest(&self, va: Va, to: &mut [u8]) -> Result<(), Va> {
        // SAFETY: the logic checked that the guest's range lies outside the
        // hypervisor's; `to` is a valid buffer; a missing translation ends the
        // copy through the exception table.
        let r = unsafe { entry::blanket_copy(to.as_mut_ptr(), va.0 as *const u8, to.len()) };
        if r == 0 { Ok(()) } else { Err(Va(cpu::cr2())) }
    }
    #[inline]
    fn copy_to_guest(&self, va: Va, from: &[u8]) -> Result<(), Va> {
        // SAFETY: as for `copy_from_guest`; CR0.WP makes the guest's own rights hold.
        let r = unsafe { entry::blanket_copy(va.0 as *mut u8, from.as_ptr(), from.len()) };
        if r == 0 { Ok(()) } else { Err(Va(cpu::cr2())) }
    }
}

impl Cpu for Hal {
    #[inline]
    fn load_root(&self, cr3: u64) {
        let local = self.local();
        if local.core_cr3.load(Ordering::Relaxed) == 0 {
            cpu::write_cr3(cr3);
        } else {
            // The entry to the core has flushed all of the guest's translations, and
            // the return loads this.
            local.guest_cr3.store(cr3, Ordering::Relaxed);
        }
    }
    #[inline]
    fn invlpg(&self, va: Va) {
        cpu::invlpg(va.0);
    }
    #[inline]
    fn swapgs(&self) {
        cpu::swapgs();
    }
    fn fs_base(&self) -> u64 {
        cpu::rdmsr(msr::FS_BASE)
    }
    fn set_fs_base(&self, base: u64) {
        cpu::wrmsr(msr::FS_BASE, base);
    }
    fn gs_base(&self) -> u64 {
        cpu::rdmsr(msr::GS_BASE)
    }
    fn set_gs_base(&self, base: u64) {
        cpu::wrmsr(msr::GS_BASE, base);
    }
    fn inactive_gs_base(&self) -> u64 {
        cpu::rdmsr(msr::KERNEL_GS_BASE)
    }
    fn set_inactive_gs_base(&self, base: u64) {
        cpu::wrmsr(msr::KERNEL_GS_BASE, base);
    }
    fn load_user_gs(&self, sel: u16) {
        // The base that the descriptor gives becomes the user's, the kernel's stays.
        let kernel = cpu::rdmsr(msr::GS_BASE);
        let [ds, es, fs, _] = cpu::selectors().map(u32::from);
        let fs_base = cpu::rdmsr(msr::FS_BASE);
        // SAFETY: see `restore_segments`.
        unsafe { entry::blanket_load_selectors(ds, es, fs, u32::from(sel)) };
        cpu::wrmsr(msr::FS_BASE, fs_base);
        let user = cpu::rdmsr(msr::GS_BASE);
        cpu::wrmsr(
            msr::KERNEL_GS_BASE,
            if sel & 0xfffc == 0 { 0 } else { user },
        );
        cpu::wrmsr(msr::GS_BASE, kernel);
    }
    fn data_selectors(&self) -> [u16; 4] {
        cpu::selectors()
    }
    fn load_data_selectors(&self, s: [u16; 4]) -> bool {
        let bases = [
            cpu::rdmsr(msr::FS_BASE),
            cpu::rdmsr(msr::GS_BASE),
            cpu::rdmsr(msr::KERNEL_GS_BASE),
        ];
        self.restore_segments(s, bases)
    }
    #[inline]
    fn tsc(&self) -> u64 {
        cpu::rdtsc()
    }
    fn set_dr(&self, nr: u8, val: u64) {
        if let Some(dr) = self.local().dr.get(usize::from(nr)) {
            dr.store(val, Ordering::Relaxed);
        }
        if nr == 7 {
            // SAFETY: only this vCPU and the module while it is in the host world
            // touch the field.
            unsafe { (&raw mut (*self.raw_switch()).guest_dr7).write_volatile(val) };
        }
        cpu::set_dr(nr, val);
    }
    #[inline]
    fn cr2(&self) -> u64 {
        cpu::cr2()
    }
    fn take_dr6(&self) -> u64 {
        let v = cpu::dr6();
        cpu::set_dr(6, 0xffff_0ff0);
        v
    }
    fn write_gdt(&self, index: u32, desc: u64) {
        if index < 14 * 512 {
            let va = self.area + area::GDT + u64::from(index) * 8;
            // SAFETY: the guest's part of this vCPU's GDT, mapped by the module;
            // the CPU sets accessed bits in it, hence an atomic.
            unsafe { at::<AtomicU64>(va) }.store(desc, Ordering::Relaxed);
        }
    }
    fn write_ldt(&self, index: u32, desc: u64) {
        if index < 8192 {
            let va = self.area + area::LDT + u64::from(index) * 8;
            // SAFETY: this vCPU's LDT copy, mapped by the module.
            unsafe { at::<AtomicU64>(va) }.store(desc, Ordering::Relaxed);
        }
    }
    fn descriptor(&self, selector: u16) -> u64 {
        let index = u64::from(selector >> 3);
        let (table, entries) = if selector & 4 != 0 {
            (
                area::LDT,
                u64::from(self.local().ldt.load(Ordering::Relaxed)),
            )
        } else {
            (area::GDT, 15 * 512)
        };
        if index >= entries {
            return 0;
        }
        // SAFETY: inside this vCPU's GDT or LDT copy, mapped by the module.
        unsafe { at::<AtomicU64>(self.area + table + index * 8) }.load(Ordering::Relaxed)
    }
    fn load_ldt(&self, entries: u32) {
        self.local().ldt.store(entries, Ordering::Relaxed);
        if entries == 0 {
            cpu::lldt(0);
            return;
        }
        // An LDT descriptor (SDM vol. 3, 3.5): type 2, present, 16 bytes.
        let base = self.area + area::LDT;
        let limit = u64::from(entries) * 8 - 1;
        let low = limit & 0xffff
            | (base & 0xff_ffff) << 16
            | 0x82 << 40
            | (limit >> 16 & 0xf) << 48
            | (base >> 24 & 0xff) << 56;
        let gdt = self.area + area::GDT + u64::from(sel::CORE_LDT);
        // SAFETY: our own two slots in the reserved page of this vCPU's GDT.
        unsafe {
            at::<AtomicU64>(gdt).store(low, Ordering::Relaxed);
            at::<AtomicU64>(gdt + 8).store(base >> 32, Ordering::Relaxed);
        }
        cpu::lldt(sel::CORE_LDT);
    }
    fn set_tsc_aux(&self, val: u64) {
        // SAFETY: only this vCPU and the module while it is in the host world touch
        // the field. The module loads it at each entry where the CPU has it; inside
        // KVM guests are not shown it.
        unsafe { (&raw mut (*self.raw_switch()).guest_tsc_aux).write_volatile(val) };
    }
    fn save_fpu(&self, to: &mut FpuImage, xsave: bool) {
        cpu::save_fpu(to, xsave);
    }
    fn load_fpu(&self, from: &FpuImage, xsave: bool) -> bool {
        // SAFETY: the image has the size and alignment that both instructions want, and
        // the core keeps nothing in these registers; what the CPU refuses ends through
        // the exception table.
        unsafe { entry::blanket_load_fpu(from.0.as_ptr(), xsave.into()) == 0 }
    }
}
