//! What the logic needs from below: memory, a CPU, and a host.
//!
//! Three traits, one implementor each in the hal and one set of fakes in the
//! host tests. [`Host`] is the small one that differs between the module and a
//! KVM VM; [`Memory`] and [`Cpu`] are the same on both.

use crate::time::Clock;
use blanket_abi::device::{Switch, VmPage};
use blanket_abi::trace::Ring;
use blanket_abi::{Gfn, Va};
use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

/// A guest frame or pool page as words. Guests and other vCPUs change them at
/// any time, hence atomics; relaxed accesses compile to plain moves.
pub type Words = [AtomicU64; 512];

/// Memory that the core reaches: guest frames by gfn, pool pages by number, and
/// guest virtual addresses of the address space that is loaded.
pub trait Memory {
    /// The frame's words, or `None` while the host has not given the frame.
    /// `gfn` must be below the VM's frame count. The host takes frames back only
    /// while no vCPU is in the core world: what is here stays until [`Host::exit`].
    fn frame(&self, gfn: Gfn) -> Option<&Words>;
    /// The same frame as bytes.
    fn frame_bytes(&self, gfn: Gfn) -> Option<&[AtomicU8; 4096]>;
    /// Copies from a frame; false while the host has not given it. The range must be
    /// inside of the frame.
    fn copy_from_frame(&self, gfn: Gfn, offset: usize, to: &mut [u8]) -> bool;
    /// Copies to a frame; as [`Self::copy_from_frame`].
    fn copy_to_frame(&self, gfn: Gfn, offset: usize, from: &[u8]) -> bool;
    /// Host-frame bits for a leaf that maps `gfn` (0 while it is absent).
    fn frame_pte(&self, gfn: Gfn) -> u64;
    /// A pool page's words. `page` must be below the number of pool pages.
    fn pool(&self, page: u32) -> &Words;
    /// Host-frame bits of a pool page.
    fn pool_pte(&self, page: u32) -> u64;
    /// Bit per frame of block `block` ([`REVOKED_BLOCK`] frames) of the VM: the host
    /// took it back, and its leaves are still there. All zero unless the block's bit
    /// in [`VmPage::revoked`] is set.
    ///
    /// [`REVOKED_BLOCK`]: blanket_abi::layout::REVOKED_BLOCK
    fn revoked(&self, block: usize) -> &[AtomicU64; 64];
    /// The array that says which gfn each entry of a leaf shadow maps.
    fn gfns(&self, page: u32) -> &[AtomicU32; 512];
    /// Copies from the guest's current address space; `va` must have passed
    /// [`Va::is_guest`] for its whole range.
    ///
    /// # Errors
    /// The address whose translation is missing in the shadow.
    fn copy_from_guest(&self, va: Va, to: &mut [u8]) -> Result<(), Va>;
    /// Copies to the guest's current address space, with the guest's own rights.
    ///
    /// # Errors
    /// The address whose translation is missing in the shadow.
    fn copy_to_guest(&self, va: Va, from: &[u8]) -> Result<(), Va>;
}

/// The physical CPU under the vCPU.
pub trait Cpu {
    /// Loads a root (physical address for CR3); flushes the TLB. Where the core runs on
    /// a root of its own, which has flushed all that was the guest's, the root is loaded
    /// at the return to the guest.
    fn load_root(&self, cr3: u64);
    /// Flushes one address.
    fn invlpg(&self, va: Va);
    /// Exchanges active and inactive GS base.
    fn swapgs(&self);
    /// FS base.
    fn fs_base(&self) -> u64;
    /// Sets the FS base (canonical).
    fn set_fs_base(&self, base: u64);
    /// Active GS base.
    fn gs_base(&self) -> u64;
    /// Sets the active GS base (canonical).
    fn set_gs_base(&self, base: u64);
    /// Inactive GS base.
    fn inactive_gs_base(&self) -> u64;
    /// Sets the inactive GS base (canonical).
    fn set_inactive_gs_base(&self, base: u64);
    /// Loads a selector into the inactive (user) GS; null if the CPU refuses it.
    fn load_user_gs(&self, sel: u16);
    /// Data segment selectors DS, ES, FS, GS.
    fn data_selectors(&self) -> [u16; 4];
    /// Loads DS, ES, FS, GS selectors; a selector that the CPU refuses becomes
    /// null and `false` is returned. The GS base is preserved.
    fn load_data_selectors(&self, sel: [u16; 4]) -> bool;
    /// Time-stamp counter.
    fn tsc(&self) -> u64;
    /// Sets a debug register (checked by the caller).
    fn set_dr(&self, nr: u8, val: u64);
    /// Address of the last page fault.
    fn cr2(&self) -> u64;
    /// Status of the last debug exception; reading resets it.
    fn take_dr6(&self) -> u64;
    /// Writes entry `index` of the core's copy of the guest GDT.
    fn write_gdt(&self, index: u32, desc: u64);
    /// Writes entry `index` of the core's copy of the guest LDT.
    fn write_ldt(&self, index: u32, desc: u64);
    /// The descriptor that a selector names in the core's copies of the guest's
    /// tables, or 0.
    fn descriptor(&self, selector: u16) -> u64;
    /// Activates the first `entries` of the LDT copy (0 = no LDT).
    fn load_ldt(&self, entries: u32);
    /// Sets TSC_AUX.
    fn set_tsc_aux(&self, val: u64);
    /// Writes the FPU's registers to a zeroed image: by XSAVE, all that XCR0 has, or by
    /// FXSAVE.
    fn save_fpu(&self, to: &mut FpuImage, xsave: bool);
    /// Loads the FPU's registers; false if the CPU refuses the image, and they are then
    /// what they were.
    fn load_fpu(&self, from: &FpuImage, xsave: bool) -> bool;
}

/// The FPU's registers in memory, as XSAVE (SDM vol. 1, 13.4) and FXSAVE have them.
#[repr(C, align(64))]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FpuImage(pub [u8; 4096]);

impl FpuImage {
    /// Zero: XSAVE reads some of the header that it writes.
    pub const ZERO: Self = Self([0; 4096]);
    /// Bytes that FXSAVE writes.
    pub const FXSAVE: u64 = 512;
    /// Bytes that are kept of what XSAVE writes; x87, SSE, AVX, AVX-512 and PKRU have
    /// less.
    pub const XSAVE: u64 = 4096;

    /// Whether all of it that is not initial is among the components of `mask`, and the
    /// image is not compacted.
    #[must_use]
    pub fn is_within(&self, mask: u64) -> bool {
        let header = self.0.get(512..576).unwrap_or(&[]);
        let Some((present, rest)) = header.split_first_chunk::<8>() else {
            return false;
        };
        u64::from_le_bytes(*present) & !mask == 0 && rest.iter().all(|byte| *byte == 0)
    }
}

/// What a host gives the core: the whole difference between the module below a
/// stock kernel and a VM inside KVM.
///
/// | need | under the module | inside KVM |
/// |---|---|---|
/// | leave for the VMM | world switch | one `out`, arguments in shared memory |
/// | a frame (`FRAME`) | found through the host's page tables | always there |
/// | deadline, idle | exits to an hrtimer and a wait queue | TSC-deadline MSR, `sti; hlt` |
/// | kick | exit, the module sends an IPI | x2APIC interrupt command |
/// | flush of others | exit, the module waits | a bit in the pending word and an IPI |
/// | interrupt | exit, the host's handler runs | end of interrupt |
/// | XCR0, CPUID | the instructions | the VMM's |
/// | clock | the module's parameters | kvmclock |
///
/// Whatever a world switch implies (segments, MSRs, debug registers) is put right
/// below this trait.
pub trait Host {
    /// Asks the host for `reason` (`blanket_abi::device::exit`) and returns its
    /// answer. All guest state is as before. Unless [`Self::in_place`], other vCPUs
    /// must be able to count on this one's translations being gone: the caller has
    /// left its epoch, and loads a root afterwards.
    fn exit(&self, reason: u32, args: [u64; 4]) -> i64;
    /// Whether `reason` is answered without the vCPU going anywhere, so that its
    /// translations stay.
    fn in_place(&self, reason: u32) -> bool;
    /// The time parameters.
    fn clock(&self) -> Clock;
    /// Wall clock at system time 0: seconds, nanoseconds.
    fn wall_clock(&self) -> (u64, u32);
    /// CPUID as eax, ebx, ecx, edx.
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4];
    /// Sets XCR0 (checked by the caller).
    fn set_xcr0(&self, val: u64);
    /// This vCPU's switch block: deadline, pending flags, counters.
    fn switch(&self) -> &Switch;
    /// Another vCPU's pending flags.
    fn pending_of(&self, vcpu: u32) -> &AtomicU32;
    /// Whether the host says that another vCPU, which is in the core world, does not
    /// run. Never below the module: the core world has interrupts off.
    fn preempted(&self, vcpu: u32) -> bool;
    /// The page that module and core share.
    fn vm_page(&self) -> &VmPage;
    /// Gives a text to the next CONSOLE or CRASH exit; cut to what fits.
    fn set_data(&self, text: &[u8]) -> usize;
    /// What the entry code calls, for [`crate::vcpu::Fast::trap`]: traced or not.
    fn trap_entry(&self, traced: bool) -> u64;
    /// This vCPU's trace, which is there once [`VmPage::trace`] was not 0.
    fn trace_ring(&self) -> &Ring;
}

/// All three together.
pub trait Machine: Memory + Cpu + Host {}
impl<T: Memory + Cpu + Host> Machine for T {}
