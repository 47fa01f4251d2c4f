//! Registers of NVMe 1.4, as far as they are looked at (3.1).

use core::sync::atomic::{Ordering, compiler_fence};

use crate::Platform;

/// Controller capabilities, 8 bytes (3.1.1).
pub const CAP: u32 = 0x00;
/// Controller configuration (3.1.5).
pub const CC: u32 = 0x14;
/// Controller status (3.1.6).
pub const CSTS: u32 = 0x1c;
/// NVM subsystem reset (3.1.7).
pub const NSSR: u32 = 0x20;
/// Admin queue attributes (3.1.8).
pub const AQA: u32 = 0x24;
/// Admin submission queue base address, 8 bytes (3.1.9).
pub const ASQ: u32 = 0x28;
/// Admin completion queue base address, 8 bytes (3.1.10).
pub const ACQ: u32 = 0x30;
/// Controller memory buffer: location (3.1.11).
pub const CMBLOC: u32 = 0x38;
/// Its size (3.1.12).
pub const CMBSZ: u32 = 0x3c;
/// Its memory space control, 8 bytes (3.1.16).
pub const CMBMSC: u32 = 0x50;
/// The first doorbell (3.1.23).
pub const DOORBELLS: u32 = 0x1000;

/// CAP, upper half: a memory buffer of the controller's is supported (CMBS).
pub const BUFFER: u32 = 1 << 25;
/// CC.EN.
pub const ENABLE: u32 = 1 << 0;
/// CC.MPS: pages of 4 KiB if 0.
pub const PAGES: u32 = 0xf << 7;
/// CC.SHN.
pub const SHUTDOWN: u32 = 3 << 14;
/// CC.IOSQES, CC.IOCQES.
pub const ENTRIES: u32 = 0xff << 16;
/// The only sizes of entries that the NVM command set has: 64 and 16 bytes.
pub const USUAL_ENTRIES: u32 = 6 << 16 | 4 << 20;
/// CSTS.RDY.
pub const READY: u32 = 1 << 0;
/// CSTS.CFS: the controller has failed.
pub const FATAL: u32 = 1 << 1;
/// What resets a subsystem when it is written to [`NSSR`]: "NVMe".
pub const RESET: u32 = 0x4e56_4d65;

/// Reads a register of 4 bytes.
pub fn read(platform: &mut impl Platform, register: u32) -> u32 {
    low(platform.read_register(register, 4))
}

/// Writes one: what was written to memory before is there before.
pub fn write(platform: &mut impl Platform, register: u32, value: u32) {
    barrier();
    platform.write_register(register, 4, u64::from(value));
}

/// What was written to memory before is there before what is written to registers after; CPUs with SVM keep that order.
pub fn barrier() {
    compiler_fence(Ordering::SeqCst);
}

/// Reads a register of 8 bytes.
pub fn read_long(platform: &mut impl Platform, register: u32) -> u64 {
    let half = read(platform, register);
    u64::from(read(platform, register + 4)) << 32 | u64::from(half)
}

/// The lower half.
pub fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// The lower half of that.
pub fn word(value: u32) -> u16 {
    let [a, b, ..] = value.to_le_bytes();
    u16::from_le_bytes([a, b])
}
