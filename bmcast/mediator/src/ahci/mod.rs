//! The mediator of an AHCI controller with a disk at one of its ports (AHCI 1.3.1). Other ports are passed through.
//!
//! The VMM's own commands use a command list of the VMM's, and received FISes go to memory of the VMM's: the port is
//! stopped while the guest has none outstanding, pointed there, and pointed back afterwards. No memory of the guest's
//! is touched for them. What is shown and held when is in `docs/bmcast-mediators.md`.

mod guest;
mod own;
mod registers;

use alloc::boxed::Box;
use alloc::vec::Vec;

use bmcast_image::Sectors;

use crate::ata::Command;
use crate::{Blocks, MAX_WORK, Mediator, Platform, Work};
use guest::Answer;
use own::Own;
use registers::{GHC, IS, Port, low, port};

/// Command slots of a port.
const SLOTS: usize = 32;
/// Microseconds without a command of the guest's after which its disk counts as quiet.
const QUIET: u64 = 5_000;
/// Microseconds after a command has failed in which the guest may want to know why, before the device is used for
/// what nobody waits for; and in which it takes an interrupt.
const SETTLE: u64 = 1_000_000;

/// Offsets in the VMM's own memory, behind the data: command list, command table, table and data of an
/// answer, received FISes.
mod own_memory {
    use super::MAX_WORK;
    pub const LIST: usize = MAX_WORK;
    pub const TABLE: usize = MAX_WORK + 0x1000;
    pub const ANSWER: usize = MAX_WORK + 0x2000;
    pub const ANSWER_DATA: usize = MAX_WORK + 0x3000;
    pub const RECEIVED: usize = MAX_WORK + 0x4000;
}

/// A command that the guest has issued and the device has not seen.
#[derive(Debug)]
struct Held {
    command: Command,
    queued: bool,
    /// Of a TRIM that was looked at: what is still to be asked about.
    trim: Option<Vec<Sectors>>,
}

/// See the module.
pub struct Ahci {
    port: Port,
    held: [Option<Held>; SLOTS],
    /// Queued commands whose issue is to come: PxSACT is written first.
    queued_next: u32,
    /// What of commands' sectors [`Blocks::write`] has let pass: of those on the device, and of TRIMs of which
    /// not all may pass yet.
    writes: [Vec<Sectors>; SLOTS],
    /// Slots of the guest's on the device.
    issued: u32,
    /// A command that the VMM answers.
    answer: Option<Answer>,
    own: Option<Own>,
    /// What is to be done once the guest has nothing outstanding.
    next: Option<Work>,
    /// Interrupt status that was there when the port was taken, and that the guest has not cleared.
    owed: u32,
    /// What the guest is to see of PxTFD: a command of the VMM's has failed since the guest's last.
    task: Option<u32>,
    /// The device is in the guest's software reset.
    resetting: bool,
    /// Since when the VMM's turn waits for an interrupt to be taken.
    waits_since: Option<u64>,
    identity: Identity,
    last_used: u64,
}

/// The disk's IDENTIFY data, which is asked for anew for each of the guest's: SET FEATURES may change it.
#[derive(Debug)]
enum Identity {
    None,
    /// A command of the guest's waits for it.
    Wanted,
    Known(Box<[u8; 512]>),
    /// The disk does not say it.
    Failed,
}

impl Ahci {
    /// Of the disk at port `number`.
    pub fn new(number: u8) -> Self {
        Self {
            port: Port::new(number),
            held: [const { None }; SLOTS],
            queued_next: 0,
            writes: [const { Vec::new() }; SLOTS],
            issued: 0,
            answer: None,
            own: None,
            next: None,
            owed: 0,
            task: None,
            resetting: false,
            waits_since: None,
            identity: Identity::None,
            last_used: 0,
        }
    }

    /// Bits of held commands: all, queued ones.
    fn held_bits(&self) -> (u32, u32) {
        let mut bits = (0, 0);
        for (slot, held) in (0u32..).zip(&self.held) {
            if let Some(held) = held {
                bits.0 |= 1 << slot;
                if held.queued {
                    bits.1 |= 1 << slot;
                }
            }
        }
        bits
    }

    /// Whether a held command would have the device busy.
    fn is_busy(&self) -> bool {
        let mut held = self.held.iter().flatten();
        held.any(|held| !held.queued)
    }

    fn read_port<P: Platform>(&mut self, platform: &mut P, register: u32) -> u32 {
        let (held, queued) = self.held_bits();
        if let Some(own) = &self.own {
            let saved = own.saved;
            return match register {
                port::CI => held,
                port::SACT => queued | self.queued_next,
                port::IS => {
                    let status = self.port.read(platform, register);
                    self.owed | status & !registers::OF_COMMANDS
                }
                port::TFD if self.is_busy() => saved.task | registers::BUSY,
                port::TFD => saved.task,
                port::CLB => saved.list,
                port::CLBU => saved.list_high,
                port::FB => saved.received,
                port::FBU => saved.received_high,
                port::IE => saved.enabled,
                port::CMD => saved.command,
                _ => self.port.read(platform, register),
            };
        }
        let value = self.port.read(platform, register);
        match register {
            port::CI => value | held,
            port::SACT => value | queued | self.queued_next,
            port::IS => value | self.owed,
            port::TFD => {
                let value = self.task.unwrap_or(value);
                let busy = if self.is_busy() { registers::BUSY } else { 0 };
                value | busy
            }
            _ => value,
        }
    }

    /// The global interrupt status: the port's bit is what it would be if the guest were alone.
    fn global_status<P: Platform>(&mut self, platform: &mut P, value: u32) -> u32 {
        let bit = self.port.bit();
        let (value, enabled) = match &self.own {
            Some(own) => (value & !bit, own.saved.enabled),
            None if self.owed == 0 => return value,
            None => (value, self.port.read(platform, port::IE)),
        };
        if self.owed & enabled == 0 {
            value
        } else {
            value | bit
        }
    }

    /// The guest reads a register of 4 bytes.
    fn read_word<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        at: u32,
    ) -> u32 {
        let Some(register) = self.port.register(at) else {
            let value = low(platform.read_register(at, 4));
            return if at == IS {
                self.global_status(platform, value)
            } else {
                value
            };
        };
        let value = self.read_port(platform, register);
        // By what it reads the guest may know that a command is done, and use its slot and header anew.
        if self.own.is_none() && self.issued != 0 {
            self.observe(platform, blocks);
        }
        value
    }

    /// The guest writes a register of 4 bytes.
    fn write_word<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        at: u32,
        value: u32,
    ) {
        if let Some(register) = self.port.register(at) {
            self.write_port(platform, blocks, register, value);
            self.last_used = platform.now();
        } else if at == GHC && value & registers::RESET != 0 {
            self.finish_now(platform, blocks);
            platform.write_register(at, 4, u64::from(value));
            self.drop_held(blocks);
            self.gone(platform, blocks, self.issued);
            self.owed = 0;
            self.task = None;
            self.resetting = false;
        } else {
            platform.write_register(at, 4, u64::from(value));
        }
    }

    fn write_port<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        register: u32,
        value: u32,
    ) {
        match register {
            // A list is not moved while it is used (10.3.1): commands were looked at where it is.
            port::CLB | port::CLBU
                if self.read_port(platform, port::CMD) & registers::START != 0 =>
            {
                return;
            }
            // A port that does not run takes no commands (3.3.13, 3.3.14), whatever a controller makes of them.
            port::CI | port::SACT
                if self.read_port(platform, port::CMD) & registers::START == 0 =>
            {
                return;
            }
            port::CI => {
                // Slots that are free since the last look.
                if self.own.is_none() {
                    self.observe(platform, blocks);
                }
                self.take(platform, value);
                self.go_on(platform, blocks);
                return;
            }
            port::SACT => {
                self.queued_next |= value;
                return;
            }
            port::IS => {
                self.owed &= !value;
                self.waits_since = None;
            }
            _ => {}
        }
        if let Some(own) = &mut self.own {
            match register {
                port::IS => {
                    let others = value & !registers::OF_COMMANDS;
                    self.port.write(platform, register, others);
                    return;
                }
                port::IE => {
                    own.saved.enabled = value;
                    return;
                }
                port::CLB | port::CLBU | port::FB | port::FBU | port::CMD | port::SCTL => {
                    self.finish_now(platform, blocks);
                }
                _ => {}
            }
        }
        if register == port::CMD && value & registers::START == 0 {
            self.drop_held(blocks);
        }
        let is_reset = register == port::SCTL && value & registers::DETECTION != 0;
        if is_reset {
            self.resetting = false;
            self.task = None;
        }
        if register == port::CMD && value & registers::OVERRIDE != 0 {
            self.task = None;
        }
        self.port.write(platform, register, value);
        self.go_on(platform, blocks);
    }

    /// Commands that the guest takes back.
    fn drop_held<B: Blocks + ?Sized>(&mut self, blocks: &mut B) {
        for (held, writes) in self.held.iter_mut().zip(&mut self.writes) {
            if held.take().is_some() {
                for sectors in writes.drain(..) {
                    blocks.written(sectors);
                }
            }
        }
        self.queued_next = 0;
        self.identity = Identity::None;
    }
}

/// Bytes of a value: all of it.
fn mask(width: u8) -> u64 {
    match width {
        1 => 0xff,
        2 => 0xffff,
        8 => u64::MAX,
        _ => 0xffff_ffff,
    }
}

impl<P: Platform, B: Blocks + ?Sized> Mediator<P, B> for Ahci {
    fn read(&mut self, platform: &mut P, blocks: &mut B, offset: u32, width: u8) -> u64 {
        self.go_on(platform, blocks);
        let at = offset & !3;
        let mut value = u64::from(self.read_word(platform, blocks, at));
        if width == 8 {
            let high = self.read_word(platform, blocks, at.wrapping_add(4));
            value |= u64::from(high) << 32;
        }
        value >> ((offset & 3) * 8) & mask(width)
    }

    fn write(&mut self, platform: &mut P, blocks: &mut B, offset: u32, width: u8, value: u64) {
        let at = offset & !3;
        match width {
            8 => {
                self.write_word(platform, blocks, at, low(value));
                let high = low(value >> 32);
                self.write_word(platform, blocks, at.wrapping_add(4), high);
            }
            1 | 2 => {
                let shift = (offset & 3) * 8;
                let bits = low((value & mask(width)) << shift);
                let others = !low(mask(width) << shift);
                // Bytes that are not written keep their value, where writing ones does not do something.
                let keeps = match self.port.register(at) {
                    Some(port::IS | port::SERR | port::SACT | port::CI) => 0,
                    Some(register) => self.read_port(platform, register),
                    None if at == IS => 0,
                    None if at == GHC => low(platform.read_register(at, 4)) & !registers::RESET,
                    None => {
                        platform.write_register(offset, width, value);
                        return;
                    }
                };
                self.write_word(platform, blocks, at, bits | keeps & others);
            }
            _ => self.write_word(platform, blocks, at, low(value)),
        }
    }

    fn poll(&mut self, platform: &mut P, blocks: &mut B) {
        self.go_on(platform, blocks);
    }

    fn transparent(&self) -> bool {
        self.own.is_none()
            && self.answer.is_none()
            && self.owed == 0
            && self.task.is_none()
            && self.next.is_none()
            && self.queued_next == 0
            && self.held.iter().all(Option::is_none)
    }
}
