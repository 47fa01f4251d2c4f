//! Newtypes for the three kinds of number that must never be mixed.

use core::fmt;

/// log2 of the page size.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a page.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

/// Guest frame number: index of a 4 KiB page of the VM's pseudo-physical memory.
/// The guest's machine frame number (mfn) is always the same value.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Gfn(pub u64);

/// Host frame number: a physical page of the instance (L1).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Hfn(pub u64);

/// Guest virtual address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[repr(transparent)]
pub struct Va(pub u64);

impl Gfn {
    /// The frame that holds guest-physical (machine) address `pa`.
    #[must_use]
    pub const fn containing(pa: u64) -> Self {
        Self(pa >> PAGE_SHIFT)
    }
    /// Guest-physical address of the frame's first byte.
    #[must_use]
    pub const fn base(self) -> u64 {
        self.0 << PAGE_SHIFT
    }
}

impl Va {
    /// Index into the page table of `level` (1 = leaf table, 4 = root).
    #[must_use]
    pub const fn index(self, level: u8) -> usize {
        ((self.0 >> (12 + 9 * (level as u32 - 1))) & 511) as usize
    }
    /// Whether the address is canonical for 48-bit virtual addresses.
    #[must_use]
    pub const fn is_canonical(self) -> bool {
        let top = self.0 >> 47;
        top == 0 || top == 0x1_ffff
    }
    /// Whether the address lies in the range that the Xen ABI reserves for the
    /// hypervisor (`xen/include/public/arch-x86/xen-x86_64.h`,
    /// `HYPERVISOR_VIRT_START`..`HYPERVISOR_VIRT_END`).
    #[must_use]
    pub const fn in_hole(self) -> bool {
        self.0 >> 43 == 0x1f_fff0
    }
    /// Whether a guest may hand this address to the hypervisor: canonical and
    /// outside the hypervisor's range.
    #[must_use]
    pub const fn is_guest(self) -> bool {
        self.is_canonical() && !self.in_hole()
    }
}

impl fmt::Debug for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gfn {:#x}", self.0)
    }
}
impl fmt::Debug for Hfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hfn {:#x}", self.0)
    }
}
impl fmt::Debug for Va {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "va {:#x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hole_is_l4_slots_256_to_271() {
        assert!(!Va(0xffff_7fff_ffff_ffff).in_hole());
        assert!(Va(0xffff_8000_0000_0000).in_hole());
        assert!(Va(0xffff_87ff_ffff_ffff).in_hole());
        assert!(!Va(0xffff_8800_0000_0000).in_hole());
        for va in [0xffff_8000_0000_0000u64, 0xffff_87ff_ffff_ffff] {
            assert!((256..272).contains(&Va(va).index(4)));
        }
    }

    #[test]
    fn canonical_means_bits_63_to_47_are_equal() {
        assert!(Va(0x7fff_ffff_ffff).is_canonical());
        assert!(!Va(0x8000_0000_0000).is_canonical());
        assert!(!Va(0xffff_7fff_ffff_ffff).is_canonical());
        assert!(Va(0xffff_8000_0000_0000).is_canonical());
    }
}
