//! Registers of the physical CPU.

use blanket_core::machine::FpuImage;
use core::arch::asm;

/// Model-specific registers.
pub mod msr {
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
}

/// Reads an MSR that every x86-64 CPU has.
#[inline]
pub fn rdmsr(nr: u32) -> u64 {
    let (lo, hi): (u32, u32);
    // SAFETY: the core runs at CPL 0 and names only MSRs that exist; reading has
    // no side effect.
    unsafe {
        asm!("rdmsr", in("ecx") nr, out("eax") lo, out("edx") hi, options(nomem, nostack, preserves_flags));
    }
    u64::from(hi) << 32 | u64::from(lo)
}

/// Writes a base register (a canonical value) or a system call MSR.
#[inline]
#[allow(
    clippy::cast_possible_truncation,
    reason = "the halves are what the instruction takes"
)]
pub fn wrmsr(nr: u32, val: u64) {
    // SAFETY: CPL 0; the callers pass base MSRs with canonical values, or the
    // system call MSRs, none of which the core itself depends on.
    unsafe {
        asm!("wrmsr", in("ecx") nr, in("eax") val as u32, in("edx") (val >> 32) as u32,
             options(nomem, nostack, preserves_flags));
    }
}

/// Loads CR3.
#[inline]
pub fn write_cr3(root: u64) {
    // SAFETY: every root that the core loads holds the hypervisor's slots, so the
    // code and the stack stay mapped.
    unsafe { asm!("mov cr3, {}", in(reg) root, options(nostack, preserves_flags)) };
}

/// The root that is loaded.
#[inline]
pub fn cr3() -> u64 {
    let v;
    // SAFETY: reading CR3 has no side effect.
    unsafe { asm!("mov {}, cr3", out(reg) v, options(nomem, nostack, preserves_flags)) };
    v
}

/// Address of the last page fault.
#[inline]
pub fn cr2() -> u64 {
    let v;
    // SAFETY: reading CR2 has no side effect.
    unsafe { asm!("mov {}, cr2", out(reg) v, options(nomem, nostack, preserves_flags)) };
    v
}

/// Flushes one address.
#[inline]
pub fn invlpg(va: u64) {
    // SAFETY: flushing a translation is always allowed.
    unsafe { asm!("invlpg [{}]", in(reg) va, options(nostack, preserves_flags)) };
}

/// Exchanges the GS bases.
#[inline]
pub fn swapgs() {
    // SAFETY: the core does not use GS.
    unsafe { asm!("swapgs", options(nomem, nostack, preserves_flags)) };
}

/// Time-stamp counter.
#[inline]
pub fn rdtsc() -> u64 {
    let (lo, hi): (u32, u32);
    // SAFETY: RDTSC at CPL 0 always works.
    unsafe {
        asm!("rdtsc", out("eax") lo, out("edx") hi, options(nomem, nostack, preserves_flags))
    };
    u64::from(hi) << 32 | u64::from(lo)
}

/// Data segment selectors DS, ES, FS, GS.
#[inline]
pub fn selectors() -> [u16; 4] {
    let (d, e, f, g): (u16, u16, u16, u16);
    // SAFETY: reading selectors has no side effect.
    unsafe {
        asm!("mov {:x}, ds", "mov {:x}, es", "mov {:x}, fs", "mov {:x}, gs",
             out(reg) d, out(reg) e, out(reg) f, out(reg) g,
             options(nomem, nostack, preserves_flags));
    }
    [d, e, f, g]
}

/// Loads LDTR.
#[inline]
pub fn lldt(sel: u16) {
    // SAFETY: `sel` is null or our own descriptor, which names the vCPU's LDT copy.
    unsafe { asm!("lldt {:x}", in(reg) sel, options(nostack, preserves_flags)) };
}

/// Sets a debug register.
#[inline]
pub fn set_dr(nr: u8, val: u64) {
    // SAFETY: the logic lets only addresses outside the hypervisor's range and
    // valid control bits through, so the core never hits a breakpoint of a guest.
    unsafe {
        match nr {
            0 => asm!("mov dr0, {}", in(reg) val, options(nostack, preserves_flags)),
            1 => asm!("mov dr1, {}", in(reg) val, options(nostack, preserves_flags)),
            2 => asm!("mov dr2, {}", in(reg) val, options(nostack, preserves_flags)),
            3 => asm!("mov dr3, {}", in(reg) val, options(nostack, preserves_flags)),
            6 => asm!("mov dr6, {}", in(reg) val, options(nostack, preserves_flags)),
            7 => asm!("mov dr7, {}", in(reg) val, options(nostack, preserves_flags)),
            _ => {}
        }
    }
}

/// DR6.
#[inline]
pub fn dr6() -> u64 {
    let v;
    // SAFETY: reading DR6 has no side effect.
    unsafe { asm!("mov {}, dr6", out(reg) v, options(nomem, nostack, preserves_flags)) };
    v
}

/// Writes a byte to a port.
#[inline]
pub fn out8(port: u16, val: u8) {
    // SAFETY: CPL 0. Used inside KVM only, where the port is the VMM's, which may
    // change shared memory meanwhile: hence no `nomem`.
    unsafe { asm!("out dx, al", in("dx") port, in("al") val, options(nostack, preserves_flags)) };
}

/// Waits for an interrupt, which is served on the way, with interrupts off before
/// and after. STI delays interrupts by one instruction (Intel SDM vol. 2, STI), so
/// none comes between a look at memory and HLT.
#[inline]
pub fn halt() {
    // SAFETY: CPL 0. Used inside KVM only, where an interrupt at CPL 0 is served by
    // `blanket_core_fault` on this stack; no red zone is in use.
    unsafe { asm!("sti", "hlt", "cli", options()) };
}

/// Sets XCR0.
#[inline]
#[allow(
    clippy::cast_possible_truncation,
    reason = "the halves are what the instruction takes"
)]
pub fn xsetbv(val: u64) {
    // SAFETY: the logic checked `val` against the mask that the module derived
    // from this CPU's own XCR0; CR4.OSXSAVE is set when that mask is not zero.
    unsafe {
        asm!("xsetbv", in("ecx") 0, in("eax") val as u32, in("edx") (val >> 32) as u32,
             options(nomem, nostack, preserves_flags));
    }
}

/// Writes the FPU's registers to a zeroed image. XSAVE of what XCR0 may have under either
/// host (x87, SSE, AVX, AVX-512, PKRU) takes less than there is.
pub fn save_fpu(to: &mut FpuImage, xsave: bool) {
    let to = to.0.as_mut_ptr();
    // SAFETY: the image is aligned to 64 bytes and large enough, as said above.
    unsafe {
        if xsave {
            asm!("xsave64 [{0}]", in(reg) to, in("eax") -1, in("edx") -1,
                 options(nostack, preserves_flags));
        } else {
            asm!("fxsave64 [{0}]", in(reg) to, options(nostack, preserves_flags));
        }
    }
}
