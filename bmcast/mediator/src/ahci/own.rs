//! The VMM's own commands.

use alloc::boxed::Box;

use super::guest::{offset, put_table};
use super::registers::{BUSY, ERROR, FATAL, OVERRIDE, REQUEST, RUNNING, START, port};
use super::{Ahci, own_memory};
use crate::ata::{self, Fis};
use crate::{Blocks, Failed, Platform, Work};

/// Microseconds that a command may take: as long as Linux waits for one.
const PATIENCE: u64 = 30_000_000;
/// Reads of a register that the controller changes at once, at most 500 ms (10.1.2).
const SPINS: u32 = 500_000;

/// What the guest has in the registers that are used.
#[derive(Clone, Copy, Debug)]
pub struct Saved {
    /// PxCLB.
    pub list: u32,
    /// PxCLBU.
    pub list_high: u32,
    /// PxIE.
    pub enabled: u32,
    /// PxCMD.
    pub command: u32,
}

/// A command of the VMM's on the device.
#[derive(Debug)]
pub struct Own {
    /// The guest's.
    pub saved: Saved,
    is_identity: bool,
    since: u64,
}

impl Ahci {
    /// Gives the device what is next, if the guest's interrupts allow it.
    pub(super) fn begin<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
    ) {
        if self.next.is_none() && !self.identity_wanted {
            return;
        }
        let command = self.port.read(platform, port::CMD);
        let enabled = self.port.read(platform, port::IE);
        let status = self.port.read(platform, port::IS);
        // A port that does not run is being set up; an interrupt that is on its way is to find its cause.
        if command & START == 0 || status & enabled != 0 {
            return;
        }
        self.port.write(platform, port::IE, 0);
        if !self.stop(platform, command) {
            self.port.write(platform, port::CMD, command);
            self.port.write(platform, port::IE, enabled);
            return;
        }
        self.owed |= status;
        let saved = Saved {
            list: self.port.read(platform, port::CLB),
            list_high: self.port.read(platform, port::CLBU),
            enabled,
            command,
        };
        let is_identity = self.identity_wanted;
        let (fis, bytes, is_write) = if is_identity {
            let mut fis: Fis = [0; 20];
            fis[..3].copy_from_slice(&[0x27, 0x80, ata::IDENTIFY]);
            (fis, 512, false)
        } else {
            match self.next.take() {
                Some(Work::Write { to, data }) => {
                    let room = platform.own_memory();
                    let length = data.len().min(own_memory::LIST);
                    room[..length].copy_from_slice(&data[..length]);
                    let bytes = u32::try_from(length).unwrap_or(0);
                    (ata::long(ata::WRITE_DMA_EXT, to), bytes, true)
                }
                _ => {
                    let mut fis: Fis = [0; 20];
                    fis[..3].copy_from_slice(&[0x27, 0x80, ata::FLUSH_CACHE_EXT]);
                    fis[7] = 1 << 6;
                    (fis, 0, false)
                }
            }
        };
        put_table(platform, own_memory::TABLE, &fis, 0, bytes);
        let own = platform.own_address();
        let table = own + offset(own_memory::TABLE);
        if let Some(header) = platform
            .own_memory()
            .get_mut(own_memory::LIST..own_memory::LIST + 32)
        {
            header.fill(0);
            let regions = if bytes == 0 { 0 } else { 1u32 };
            let flags = 5 | u32::from(is_write) << 6 | regions << 16;
            header[..4].copy_from_slice(&flags.to_le_bytes());
            header[8..16].copy_from_slice(&table.to_le_bytes());
        }
        let list = own + offset(own_memory::LIST);
        let [a, b, c, d, e, f, g, h] = list.to_le_bytes();
        self.port
            .write(platform, port::CLB, u32::from_le_bytes([a, b, c, d]));
        self.port
            .write(platform, port::CLBU, u32::from_le_bytes([e, f, g, h]));
        self.port.write(platform, port::IS, status);
        self.port.write(platform, port::CMD, command | START);
        self.port.write(platform, port::CI, 1);
        self.own = Some(Own {
            saved,
            is_identity,
            since: platform.now(),
        });
        // A fast device is done.
        self.finish(platform, blocks);
    }

    /// Whether nothing of the VMM's is on the device, after looking.
    pub(super) fn finish<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
    ) -> bool {
        let Some(own) = &self.own else { return true };
        let status = self.port.read(platform, port::IS);
        let outstanding = self.port.read(platform, port::CI) != 0;
        let late = platform.now().saturating_sub(own.since) > PATIENCE;
        if outstanding && status & FATAL == 0 && !late {
            return false;
        }
        let task = self.port.read(platform, port::TFD);
        let failed = outstanding || status & FATAL != 0 || task & ERROR != 0;
        self.give_back(platform, blocks, failed.then_some(Failed { status: task }));
        true
    }

    /// The same, without patience: the guest takes the port.
    pub(super) fn finish_now<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
    ) {
        for _ in 0..SPINS {
            if self.finish(platform, blocks) {
                return;
            }
        }
        let task = self.port.read(platform, port::TFD);
        self.give_back(platform, blocks, Some(Failed { status: task }));
    }

    fn give_back<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        failed: Option<Failed>,
    ) {
        let Some(own) = self.own.take() else { return };
        let command = own.saved.command;
        self.stop(platform, command);
        if failed.is_some() {
            let errors = self.port.read(platform, port::SERR);
            self.port.write(platform, port::SERR, errors);
            if self.port.read(platform, port::TFD) & (BUSY | REQUEST) != 0 {
                self.port
                    .write(platform, port::CMD, command & !START | OVERRIDE);
                self.spin(platform, |command| command & OVERRIDE == 0);
            }
        }
        let status = self.port.read(platform, port::IS);
        self.port.write(platform, port::IS, status);
        platform.write_register(super::IS, 4, u64::from(self.port.bit()));
        self.port.write(platform, port::CLB, own.saved.list);
        self.port.write(platform, port::CLBU, own.saved.list_high);
        self.port.write(platform, port::CMD, command);
        self.port.write(platform, port::IE, own.saved.enabled);
        if !own.is_identity {
            blocks.done(failed.map_or(Ok(()), Err));
            return;
        }
        self.identity_wanted = false;
        let bytes = platform.own_memory().first_chunk::<512>();
        // A disk that does not say what it is: the guest is told the same.
        let identity = bytes
            .filter(|_| failed.is_none())
            .map_or([0; 512], |bytes| *bytes);
        self.identity = Some(Box::new(identity));
    }

    /// Stops the port; whether it has.
    fn stop<P: Platform>(&self, platform: &mut P, command: u32) -> bool {
        self.port.write(platform, port::CMD, command & !START);
        self.spin(platform, |command| command & RUNNING == 0)
    }

    fn spin<P: Platform>(&self, platform: &mut P, wanted: impl Fn(u32) -> bool) -> bool {
        (0..SPINS).any(|_| wanted(self.port.read(platform, port::CMD)))
    }
}
