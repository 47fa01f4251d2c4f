//! The hypervisor hole: what the core world maps where.
//!
//! The Xen PV ABI reserves L4 slots 256 to 271 for the hypervisor in every
//! address space of the guest (`HYPERVISOR_VIRT_START`,
//! `xen/include/public/arch-x86/xen-x86_64.h`). Blanket uses four of them. The
//! module builds all of these tables; the core only fills shadow tables.
//!
//! | slot | content | access |
//! |---|---|---|
//! | 256 | M2P, the identity table that the guest reads | user, read-only |
//! | 257 | core image, vCPU areas, metadata arrays | supervisor |
//! | 258 | window: guest frame *g* at `WINDOW + g * 4096` | supervisor |
//! | 259 | pool: page tables' pages *p* at `POOL + p * 4096` | supervisor |
//!
//! Slots 258 and 259 carry a recursive entry at index 511 of their L3, so that
//! their own leaf entries appear as one linear array ([`WINDOW_PTES`],
//! [`POOL_PTES`]): the host frame of guest frame *g* is entry *g* of that array,
//! and there is no second copy of it to go stale.

/// Frames that Linux adds at a time while it runs (a section, 128 MiB).
pub const SECTION: u64 = (128 << 20) / crate::PAGE_SIZE;
/// Frame 4 GiB.
const HIGH: u64 = (4 << 30) / crate::PAGE_SIZE;

/// Numbers for the frames that a guest adds to its RAM while it runs, when it starts with
/// `start` frames and may have `most`: the first, and the one after the last.
///
/// A guest has two ways to get more. An older Linux has records of its memory up to `most`
/// from the start, and asks for the frames up to there. A newer one uses those records for
/// other things, and adds whole sections above: it asks for other numbers.
///
/// Linux does not add memory around the last 2 MiB below 4 GiB: the numbers lie on one side.
#[must_use]
pub const fn added_later(start: u64, most: u64) -> (u64, u64) {
    let mut first = most.next_multiple_of(SECTION);
    let room = most.saturating_sub(start).next_multiple_of(SECTION);
    if first < HIGH && first + room > HIGH - SECTION {
        first = HIGH;
    }
    // There must be room for what lies above RAM.
    let (end, last) = (first + room, MAX_FRAMES - SECTION);
    let end = if end < last { end } else { last };
    if room == 0 || end <= first {
        return (most, most);
    }
    (first, end)
}

/// First L4 slot of the hole.
pub const HOLE_FIRST_SLOT: usize = 256;
/// One past the last L4 slot of the hole.
pub const HOLE_END_SLOT: usize = 272;

/// Identity machine-to-physical table, readable by the guest kernel.
pub const M2P: u64 = 0xffff_8000_0000_0000;
/// Link address of the core image.
pub const IMAGE: u64 = 0xffff_8080_0000_0000;
/// Upper bound of the core image, bytes.
pub const IMAGE_MAX: u64 = 16 << 20;
/// First vCPU area.
pub const VCPU: u64 = 0xffff_8080_1000_0000;
/// Distance between vCPU areas, bytes.
pub const VCPU_STRIDE: u64 = 0x8_0000;
/// Page shared between the module and the core of one VM ([`crate::device::VmPage`]).
pub const VM_PAGE: u64 = 0xffff_8080_3000_0000;
/// CPUID as the host gives it ([`crate::device::CpuidEntry`]); only inside KVM.
pub const CPUID_TABLE: u64 = VM_PAGE + 0x1000;
/// Bit per frame of the VM: the host took it back, and its leaves are still there
/// ([`crate::device::VmPage::revoked`]); only under the module.
pub const REVOKED: u64 = 0xffff_8080_3800_0000;
/// Frames of one block of [`REVOKED`].
pub const REVOKED_BLOCK: u64 = 4096;
/// Array of per-gfn records, one for each frame of the VM.
pub const GFN_INFO: u64 = 0xffff_8080_4000_0000;
/// Bytes of a per-gfn record.
pub const GFN_INFO_SIZE: u64 = 16;
/// Bytes of a per-pool-page record.
pub const POOL_INFO_SIZE: u64 = 24;
/// Offset of the level in a per-pool-page record.
pub const POOL_INFO_LEVEL: u64 = 12;
/// Offset of the page's state in a per-pool-page record.
pub const POOL_INFO_STATE: u64 = 13;
/// State of a pool page that is a shadow table.
pub const POOL_SHADOW: u64 = 1;
/// State of a pool page whose memory the host has: it is not mapped under the module.
pub const POOL_GONE: u64 = 4;
/// Level of a shadow of a kernel root.
pub const POOL_KERNEL_ROOT: u64 = 4;
/// Level of a shadow of a user root.
pub const POOL_USER_ROOT: u64 = 5;
/// Array of per-pool-page records.
pub const POOL_INFO: u64 = 0xffff_8090_0000_0000;
/// Per-pool-page arrays of 512 u32: which gfn each shadow leaf maps.
pub const POOL_GFNS: u64 = 0xffff_80a0_0000_0000;
/// Window onto guest frames, indexed by gfn.
pub const WINDOW: u64 = 0xffff_8100_0000_0000;
/// Leaf entries of the window as a linear array of u64.
pub const WINDOW_PTES: u64 = WINDOW + (511 << 30);
/// Window onto pool pages, indexed by pool page number.
pub const POOL: u64 = 0xffff_8180_0000_0000;
/// Leaf entries of the pool as a linear array of u64.
pub const POOL_PTES: u64 = POOL + (511 << 30);

/// Largest VM, in frames (64 GiB): bounds every array above.
pub const MAX_FRAMES: u64 = 1 << 24;
/// Largest shadow pool, in pages.
pub const MAX_POOL: u64 = 1 << 22;
/// Most vCPUs of a VM.
pub const MAX_VCPUS: u32 = 64;

/// Offsets inside a vCPU area.
pub mod vcpu {
    /// The image's entry section again, so that entry code finds its vCPU
    /// relative to its own address.
    pub const ENTRY: u64 = 0x0;
    /// Bytes that the entry section may have.
    pub const ENTRY_MAX: u64 = 0x8000;
    /// Main stack, lowest address (one unmapped page below it).
    pub const STACK: u64 = 0x1_0000;
    /// Bytes of main stack; it ends where [`HW`] begins.
    pub const STACK_SIZE: u64 = 0x1_0000;
    /// The vCPU's hardware page: switch block, entry fields, TSS.
    pub const HW: u64 = 0x2_0000;
    /// Bytes at [`HW`].
    pub const HW_SIZE: u64 = 0x2000;
    /// CR3 of the guest's kernel root, 0 while there is none.
    pub const KERNEL_CR3: u64 = HW + 0x1020;
    /// CR3 of the guest's user root, 0 while there is none.
    pub const USER_CR3: u64 = HW + 0x1028;
    /// A page that the vCPU shares with KVM ([`crate::kvm`]); absent under the module.
    pub const PV: u64 = 0x2_2000;
    /// Interrupt stacks for #DF, NMI, #DB, #MC in this order, each one page with
    /// an unmapped page below: stack *i* ends at `IST + (2 * i + 2) * 4096`.
    pub const IST: u64 = 0x2_4000;
    /// GDT of the core world, 15 pages used: guest frames 0 to 13, page 14 ours.
    pub const GDT: u64 = 0x3_0000;
    /// LDT copy, 16 pages.
    pub const LDT: u64 = 0x4_0000;
    /// Transition GDT: page 0 is a copy of the host's first GDT page, page 14 is
    /// the same page as in [`GDT`]. Both worlds' selectors are valid in it.
    pub const TRANS_GDT: u64 = 0x5_0000;
    /// The vCPU's trace ([`crate::trace::Ring`]). Present once it was switched on.
    pub const TRACE: u64 = 0x6_0000;
    /// Bytes of it.
    pub const TRACE_SIZE: u64 = 0x4000;
    /// End of what is used.
    pub const END: u64 = 0x6_4000;
}

/// Selectors of the core world: Xen's reserved GDT page 14
/// (`xen/include/public/arch-x86/xen-x86_64.h`, `FLAT_RING3_*`).
pub mod sel {
    /// Ring-0 code.
    pub const CORE_CS: u16 = 0xe008;
    /// Ring-0 data.
    pub const CORE_SS: u16 = 0xe010;
    /// Guest 32-bit code.
    pub const GUEST_CS32: u16 = 0xe023;
    /// Guest data and stack.
    pub const GUEST_SS: u16 = 0xe02b;
    /// Guest 64-bit code.
    pub const GUEST_CS64: u16 = 0xe033;
    /// Core TSS (two slots).
    pub const CORE_TSS: u16 = 0xe040;
    /// Guest LDT (two slots).
    pub const CORE_LDT: u16 = 0xe050;
    /// Byte offset of the reserved page in the GDT.
    pub const RESERVED_PAGE: u16 = 0xe000;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_all_that_a_guest_may_add() {
        assert_eq!(added_later(512, 512), (512, 512));
        for (start, most) in [
            (512, 513),
            (2 * SECTION, 4 * SECTION),
            (SECTION - 1, 8 * SECTION + 1),
            (SECTION, HIGH - 1),
            (HIGH - SECTION, HIGH),
            (SECTION, 3 * HIGH),
        ] {
            let (first, end) = added_later(start, most);
            assert!(first >= most && first.is_multiple_of(SECTION));
            // Whole sections are added until there is enough, and on one side of 4 GiB.
            assert_eq!(end, first + (most - start).div_ceil(SECTION) * SECTION);
            assert!(first >= HIGH || end < HIGH);
        }
    }

    #[test]
    fn no_number_beyond_the_largest_vm() {
        let (first, end) = added_later(SECTION, MAX_FRAMES - 8 * SECTION);
        assert_eq!(
            (first, end),
            (MAX_FRAMES - 8 * SECTION, MAX_FRAMES - SECTION)
        );
        let most = MAX_FRAMES - SECTION;
        assert_eq!(added_later(SECTION, most), (most, most));
        assert_eq!(
            added_later(0, u64::MAX >> 12),
            (u64::MAX >> 12, u64::MAX >> 12)
        );
    }
}
