//! Device mediators (BMcast, ASPLOS'15, section 3.2): between a guest's driver and the real
//! controller, they know what each command asks, hold those that must wait, and slip the
//! VMM's own commands in while the guest has none outstanding.
//!
//! A mediator emulates no device. It sees each access to the registers ([`Mediator::read`],
//! [`Mediator::write`]), asks [`Blocks`] about each command, and does what `Blocks` wants done
//! ([`Blocks::next`]). A read of sectors that are not on the disk yet is held until they are; then the
//! guest's own command goes to the device as the guest wrote it, so that data, status and
//! interrupt are the device's. See `docs/bmcast.md`.
#![no_std]

extern crate alloc;

mod ahci;
pub mod ata;
mod nvme;

pub use ahci::Ahci;
pub use nvme::Nvme;

use alloc::vec::Vec;

use bmcast_image::Sectors;

/// What a mediator may touch of the machine.
pub trait Platform {
    /// Reads `width` (1, 2, 4 or 8) bytes of the device's registers at `offset` bytes.
    fn read_register(&mut self, offset: u32, width: u8) -> u64;
    /// Writes them.
    fn write_register(&mut self, offset: u32, width: u8, value: u64);
    /// Reads guest memory at a physical address; false if that is not all of it memory of the guest
    /// (the VMM's own is not).
    #[must_use]
    fn read_memory(&mut self, address: u64, into: &mut [u8]) -> bool;
    /// Writes guest memory.
    #[must_use]
    fn write_memory(&mut self, address: u64, from: &[u8]) -> bool;
    /// The VMM's own memory for this device's DMA, [`OWN_MEMORY`] bytes, page-aligned and
    /// physically contiguous: its address as the device sees it.
    fn own_address(&self) -> u64;
    /// Its bytes.
    fn own_memory(&mut self) -> &mut [u8];
    /// Microseconds, from any moment on.
    fn now(&self) -> u64;
}

/// Bytes of a mediator's own memory: data of [`MAX_WORK`] bytes, and 64 KiB for lists and tables.
pub const OWN_MEMORY: usize = MAX_WORK + (64 << 10);

/// Most bytes of one [`Work::Write`].
pub const MAX_WORK: usize = 256 << 10;

/// Whether a guest's command may go to the device now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may. What it is asked about again later is another command.
    Pass,
    /// Not yet: ask again (whatever must happen first is on its way).
    Hold,
}

/// What the VMM has for the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// Write these sectors.
    Write {
        /// Where.
        to: Sectors,
        /// What, at most [`MAX_WORK`] bytes.
        data: Vec<u8>,
    },
    /// Have the device's cache written.
    Flush,
}

/// A command of the VMM's own has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the disk says that it failed (status {status:#x})")]
pub struct Failed {
    /// What the device says: PxTFD of AHCI, the status field of NVMe.
    pub status: u32,
}

/// What decides: which sectors are on the disk, and what is to be written to it.
pub trait Blocks {
    /// Sectors that the guest is to see of the disk; the rest is the VMM's.
    fn visible(&self) -> u64;
    /// The guest reads these sectors.
    fn read(&mut self, sectors: Sectors) -> Verdict;
    /// The guest writes these sectors (`fua`: and they are to be durable when it is told so). From `Pass` on they
    /// are the guest's. So it is with sectors that it discards, or wants zeros in.
    fn write(&mut self, sectors: Sectors, fua: bool) -> Verdict;
    /// A write that had passed is not on the device any more: it is done, as the device says, or has failed,
    /// or was aborted by a reset. What its sectors have then is the device's affair, as without a VMM.
    fn written(&mut self, sectors: Sectors);
    /// The guest wants what it has written to be durable.
    fn flush(&mut self) -> Verdict;
    /// What the device is to do next. `quiet`: the guest has not used the device for a while, so that
    /// work that nobody waits for may be done.
    fn next(&mut self, quiet: bool) -> Option<Work>;
    /// The last work is done.
    fn done(&mut self, result: Result<(), Failed>);
}

/// A mediator of one controller.
pub trait Mediator<P: Platform, B: Blocks + ?Sized> {
    /// The guest reads a register.
    fn read(&mut self, platform: &mut P, blocks: &mut B, offset: u32, width: u8) -> u64;
    /// The guest writes a register.
    fn write(&mut self, platform: &mut P, blocks: &mut B, offset: u32, width: u8, value: u64);
    /// Goes on with what can go on. To be called often: at each exit, and while a CPU has nothing to do.
    fn poll(&mut self, platform: &mut P, blocks: &mut B);
    /// Whether nothing is held, nothing of the VMM's is on the device and all registers are the guest's: the
    /// mediator may be taken away.
    fn transparent(&self) -> bool;
}
