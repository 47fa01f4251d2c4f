//! Registers of AHCI 1.3.1, as far as they are looked at.

use crate::Platform;

/// Global: interrupt status, a bit for each port (3.1.3).
pub const IS: u32 = 0x08;
/// Global: control (3.1.2).
pub const GHC: u32 = 0x04;
/// First port's registers, and bytes from one to the next (3.3).
const PORTS: u32 = 0x100;
const PORT: u32 = 0x80;

/// Bytes from a port's first register on.
pub mod port {
    /// Command list, lower and upper half.
    pub const CLB: u32 = 0x00;
    /// Its upper half.
    pub const CLBU: u32 = 0x04;
    /// Where received FISes go, lower half.
    pub const FB: u32 = 0x08;
    /// Its upper half.
    pub const FBU: u32 = 0x0c;
    /// Interrupt status.
    pub const IS: u32 = 0x10;
    /// Interrupt enable.
    pub const IE: u32 = 0x14;
    /// Command and status.
    pub const CMD: u32 = 0x18;
    /// Task file.
    pub const TFD: u32 = 0x20;
    /// SATA status.
    pub const SSTS: u32 = 0x28;
    /// SATA control.
    pub const SCTL: u32 = 0x2c;
    /// SATA errors.
    pub const SERR: u32 = 0x30;
    /// Queued commands that are outstanding.
    pub const SACT: u32 = 0x34;
    /// Commands that are outstanding.
    pub const CI: u32 = 0x38;
}

/// PxCMD: the list is processed.
pub const START: u32 = 1 << 0;
/// PxCMD: command list override: BSY and DRQ are cleared.
pub const OVERRIDE: u32 = 1 << 3;
/// PxCMD: received FISes are written to memory.
pub const RECEIVE: u32 = 1 << 4;
/// PxCMD: they are.
pub const RECEIVING: u32 = 1 << 14;
/// PxCMD: the list is being processed.
pub const RUNNING: u32 = 1 << 15;
/// PxIS: task file, host bus and interface errors that stop the port.
pub const FATAL: u32 = 1 << 30 | 1 << 29 | 1 << 28 | 1 << 27;
/// PxIS: what commands make, and no change of the link or of what is at it (3.3.5).
pub const OF_COMMANDS: u32 = FATAL | 1 << 26 | 1 << 24 | 1 << 23 | 0x3f;
/// PxSERR: another device may be at the link, PhyRdy has changed (3.3.12).
pub const LINK_CHANGED: u32 = 1 << 26 | 1 << 16;
/// PxSSTS, PxSCTL: what DET is in.
pub const DETECTION: u32 = 0xf;
/// PxSSTS.DET: a device is there, and can be talked to.
pub const PRESENT: u32 = 3;
/// GHC: the controller is reset.
pub const RESET: u32 = 1 << 0;
/// GHC: interrupts of the controller are on.
pub const INTERRUPTS: u32 = 1 << 1;
/// PxTFD: busy.
pub const BUSY: u32 = 1 << 7;
/// Data are requested.
pub const REQUEST: u32 = 1 << 3;
/// The command has failed.
pub const ERROR: u32 = 1 << 0;

/// A port's registers.
#[derive(Clone, Copy, Debug)]
pub struct Port {
    number: u8,
}

impl Port {
    /// The port of this number, 0 to 31.
    pub fn new(number: u8) -> Self {
        Self {
            number: number & 31,
        }
    }

    /// Its bit in [`IS`].
    pub fn bit(self) -> u32 {
        1 << self.number
    }

    /// Its register at an offset of the controller, if that is one of its own.
    pub fn register(self, offset: u32) -> Option<u32> {
        offset
            .checked_sub(PORTS + PORT * u32::from(self.number))
            .filter(|register| *register < PORT)
    }

    /// Reads a register.
    pub fn read(self, platform: &mut impl Platform, register: u32) -> u32 {
        let offset = PORTS + PORT * u32::from(self.number) + register;
        low(platform.read_register(offset, 4))
    }

    /// Writes a register.
    pub fn write(self, platform: &mut impl Platform, register: u32, value: u32) {
        let offset = PORTS + PORT * u32::from(self.number) + register;
        platform.write_register(offset, 4, u64::from(value));
    }
}

/// The lower half.
pub fn low(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}
