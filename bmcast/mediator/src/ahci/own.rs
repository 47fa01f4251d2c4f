//! The VMM's own commands.

use alloc::boxed::Box;

use bmcast_image::SECTOR;

use super::guest::{offset, put_table};
use super::registers::{
    BUSY, DETECTION, ERROR, FATAL, GHC, INTERRUPTS, LINK_CHANGED, OF_COMMANDS, OVERRIDE, PRESENT,
    RECEIVE, RECEIVING, REQUEST, RUNNING, START, low, port,
};
use super::{Ahci, Identity, QUIET, SETTLE, own_memory};
use crate::ata;
use crate::{Blocks, Failed, Platform, Work};

/// Microseconds that a command may take: as long as Linux waits for one.
const PATIENCE: u64 = 30_000_000;
/// Reads of a register that the controller changes at once, at most 500 ms (10.1.2).
const SPINS: u32 = 500_000;
/// Microseconds of a COMRESET (10.4.2).
const COMRESET: u64 = 1_000;

/// What the guest has in the registers that are used.
#[derive(Clone, Copy, Debug)]
pub struct Saved {
    /// PxCLB.
    pub list: u32,
    /// PxCLBU.
    pub list_high: u32,
    /// PxFB.
    pub received: u32,
    /// PxFBU.
    pub received_high: u32,
    /// PxIE.
    pub enabled: u32,
    /// PxCMD.
    pub command: u32,
    /// PxTFD.
    pub task: u32,
    /// PxSERR.
    errors: u32,
}

/// A command of the VMM's on the device.
#[derive(Debug)]
pub struct Own {
    /// The guest's.
    pub saved: Saved,
    is_identity: bool,
    since: u64,
}

/// Whether the VMM could have its turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It has had it, if it wanted it.
    Taken,
    /// An interrupt is to be taken first, which does not take long.
    Soon,
    /// Not now.
    No,
}

impl Ahci {
    /// Gives the device what is next, if the guest's interrupts allow it. The guest has nothing outstanding.
    pub(super) fn begin<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
    ) -> Turn {
        if !self.wants_turn() {
            return Turn::Taken;
        }
        let command = self.port.read(platform, port::CMD);
        let task = self.port.read(platform, port::TFD);
        let link = self.port.read(platform, port::SSTS) & DETECTION;
        // A port that does not run is being set up.
        if command & START == 0
            || command & RECEIVE == 0
            || task & (BUSY | REQUEST) != 0
            || link != PRESENT
            || self.resetting
        {
            return Turn::No;
        }
        let now = platform.now();
        // The guest may ask the device what the failure was, which another command would change.
        let is_idle = self.held.iter().all(Option::is_none);
        if task & ERROR != 0
            && self.task.is_none()
            && is_idle
            && now.saturating_sub(self.last_used) < SETTLE
        {
            return Turn::No;
        }
        let enabled = self.port.read(platform, port::IE);
        let status = self.port.read(platform, port::IS);
        // An interrupt that is on its way is to find its cause. But a guest that polls may leave it there for ever.
        if status & enabled != 0 && low(platform.read_register(GHC, 4)) & INTERRUPTS != 0 {
            let since = *self.waits_since.get_or_insert(now);
            let waited = now.saturating_sub(since);
            if waited < SETTLE {
                return if waited < QUIET { Turn::Soon } else { Turn::No };
            }
        }
        self.waits_since = None;
        self.port.write(platform, port::IE, 0);
        let saved = Saved {
            list: self.port.read(platform, port::CLB),
            list_high: self.port.read(platform, port::CLBU),
            received: self.port.read(platform, port::FB),
            received_high: self.port.read(platform, port::FBU),
            enabled,
            command,
            task: self.task.unwrap_or(task),
            errors: self.port.read(platform, port::SERR),
        };
        if !self.stop(platform, command) {
            self.restart(platform, saved);
            return Turn::No;
        }
        let own = platform.own_address();
        let list = own + offset(own_memory::LIST);
        let received = own + offset(own_memory::RECEIVED);
        if !self.point(platform, list, received) {
            // A controller of 32 bits, and memory behind them: there is no way to the disk.
            self.restart(platform, saved);
            self.failed(blocks, Failed { status: 0 });
            return Turn::Taken;
        }
        let is_identity = matches!(self.identity, Identity::Wanted);
        let (fis, bytes, is_write) = if is_identity {
            (ata::bare(ata::IDENTIFY), 512, false)
        } else {
            match self.next.take() {
                Some(Work::Write { to, data }) => {
                    let room = platform.own_memory();
                    let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
                    if data.len() > own_memory::LIST || to.count.checked_mul(SECTOR) != Some(length)
                    {
                        self.restart(platform, saved);
                        blocks.done(Err(Failed { status: 0 }));
                        return Turn::Taken;
                    }
                    room[..data.len()].copy_from_slice(&data);
                    let bytes = u32::try_from(length).unwrap_or(0);
                    (ata::long(ata::WRITE_DMA_EXT, to), bytes, true)
                }
                _ => (ata::bare(ata::FLUSH_CACHE_EXT), 0, false),
            }
        };
        self.owed |= status & OF_COMMANDS;
        put_table(platform, own_memory::TABLE, &fis, 0, bytes);
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
        self.port.write(platform, port::IS, status & OF_COMMANDS);
        self.start(platform, command);
        self.port.write(platform, port::CI, 1);
        self.own = Some(Own {
            saved,
            is_identity,
            since: platform.now(),
        });
        // A fast device is done.
        self.finish(platform, blocks);
        Turn::Taken
    }

    /// Whether nothing of the VMM's is on the device, after looking.
    pub(super) fn finish<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
    ) -> bool {
        let Some(own) = &self.own else { return true };
        let since = own.since;
        let outstanding = self.port.read(platform, port::CI) != 0;
        let status = self.port.read(platform, port::IS);
        if outstanding && status & FATAL == 0 {
            let is_late = platform.now().saturating_sub(since) > PATIENCE;
            let link = self.port.read(platform, port::SSTS) & DETECTION;
            if !is_late && link == PRESENT {
                return false;
            }
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
        let saved = own.saved;
        // The device may be at it still.
        let is_at_it = self.port.read(platform, port::CI) != 0
            && self.port.read(platform, port::IS) & FATAL == 0;
        let mut is_stopped = self.stop(platform, saved.command);
        if failed.is_some() {
            let mut mine = !saved.errors & !LINK_CHANGED;
            let is_busy = self.port.read(platform, port::TFD) & (BUSY | REQUEST) != 0;
            let link = self.port.read(platform, port::SSTS) & DETECTION;
            if (is_at_it || is_busy || !is_stopped) && link == PRESENT {
                // It must not be when the guest writes there.
                self.reset_link(platform);
                is_stopped = self.stop(platform, saved.command);
                if is_stopped {
                    self.override_busy(platform, saved.command);
                }
                mine |= LINK_CHANGED & !saved.errors;
            }
            let errors = self.port.read(platform, port::SERR);
            self.port.write(platform, port::SERR, errors & mine);
        }
        let status = self.port.read(platform, port::IS);
        self.port.write(platform, port::IS, status & OF_COMMANDS);
        self.restart(platform, saved);
        self.task = failed.map(|_| saved.task);
        if !own.is_identity {
            blocks.done(failed.map_or(Ok(()), Err));
            return;
        }
        let bytes = platform.own_memory().first_chunk::<512>();
        self.identity = match bytes.filter(|_| failed.is_none()) {
            Some(bytes) => Identity::Known(Box::new(*bytes)),
            None => Identity::Failed,
        };
    }

    /// What wanted its turn has failed before the device had it.
    fn failed<B: Blocks + ?Sized>(&mut self, blocks: &mut B, failed: Failed) {
        if matches!(self.identity, Identity::Wanted) {
            self.identity = Identity::Failed;
        } else if self.next.take().is_some() {
            blocks.done(Err(failed));
        }
    }

    /// Gives a stopped port its registers back, and starts it.
    fn restart<P: Platform>(&self, platform: &mut P, saved: Saved) {
        self.port.write(platform, port::CLB, saved.list);
        self.port.write(platform, port::CLBU, saved.list_high);
        self.port.write(platform, port::FB, saved.received);
        self.port.write(platform, port::FBU, saved.received_high);
        self.start(platform, saved.command);
        self.port.write(platform, port::IE, saved.enabled);
    }

    /// Has a stopped port use a command list and memory for received FISes; whether it does.
    fn point<P: Platform>(&self, platform: &mut P, list: u64, received: u64) -> bool {
        let mut all = true;
        for (register, address) in [(port::CLB, list), (port::FB, received)] {
            for (register, half) in [(register, low(address)), (register + 4, low(address >> 32))] {
                self.port.write(platform, register, half);
                all &= self.port.read(platform, register) == half;
            }
        }
        all
    }

    /// Stops the port, and what it receives (10.3.1, 10.3.2); whether it has.
    fn stop<P: Platform>(&self, platform: &mut P, command: u32) -> bool {
        let stopped = command & !START;
        self.port.write(platform, port::CMD, stopped);
        if !self.spin(platform, |command| command & RUNNING == 0) {
            return false;
        }
        self.port.write(platform, port::CMD, stopped & !RECEIVE);
        self.spin(platform, |command| command & RECEIVING == 0)
    }

    /// The other way round.
    fn start<P: Platform>(&self, platform: &mut P, command: u32) {
        self.port.write(platform, port::CMD, command & !START);
        self.port.write(platform, port::CMD, command);
    }

    /// Has the device forget what it does (10.4.2).
    fn reset_link<P: Platform>(&self, platform: &mut P) {
        let control = self.port.read(platform, port::SCTL) & !DETECTION;
        self.port.write(platform, port::SCTL, control | 1);
        let since = platform.now();
        for _ in 0..SPINS {
            if platform.now().saturating_sub(since) > COMRESET {
                break;
            }
            self.port.read(platform, port::SCTL);
        }
        self.port.write(platform, port::SCTL, control);
        let _ = (0..SPINS).any(|_| {
            let link = self.port.read(platform, port::SSTS) & DETECTION;
            let task = self.port.read(platform, port::TFD);
            link == PRESENT && task & (BUSY | REQUEST) == 0
        });
    }

    /// Clears BSY and DRQ, without which a port does not start, if the controller can (3.3.7: CLO).
    fn override_busy<P: Platform>(&self, platform: &mut P, command: u32) {
        if self.port.read(platform, port::TFD) & (BUSY | REQUEST) != 0 {
            let stopped = command & !START & !RECEIVE;
            self.port.write(platform, port::CMD, stopped | OVERRIDE);
            self.spin(platform, |command| command & OVERRIDE == 0);
        }
    }

    fn spin<P: Platform>(&self, platform: &mut P, wanted: impl Fn(u32) -> bool) -> bool {
        (0..SPINS).any(|_| wanted(self.port.read(platform, port::CMD)))
    }
}
