//! Page-table entry bits (Intel SDM vol. 3, 4.5; AMD APM vol. 2, 5.4).

/// Present.
pub const P: u64 = 1 << 0;
/// Writable.
pub const RW: u64 = 1 << 1;
/// User.
pub const U: u64 = 1 << 2;
/// Accessed.
pub const A: u64 = 1 << 5;
/// Dirty.
pub const D: u64 = 1 << 6;
/// Large page.
pub const PS: u64 = 1 << 7;
/// No execute.
pub const NX: u64 = 1 << 63;
/// Bits of the frame number.
pub const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// Frame number of an entry.
#[inline]
#[must_use]
pub const fn frame(pte: u64) -> u64 {
    (pte & FRAME) >> 12
}

/// Page-fault error code: the page was present.
pub const PF_PRESENT: u64 = 1 << 0;
/// Page-fault error code: the access was a write.
pub const PF_WRITE: u64 = 1 << 1;
/// Page-fault error code: the access came from user mode.
pub const PF_USER: u64 = 1 << 2;
/// Page-fault error code: a reserved bit was set.
pub const PF_RESERVED: u64 = 1 << 3;
/// Page-fault error code: the access was an instruction fetch.
pub const PF_FETCH: u64 = 1 << 4;
