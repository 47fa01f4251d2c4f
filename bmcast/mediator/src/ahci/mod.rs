//! The mediator of an AHCI controller with a disk at one of its ports (AHCI 1.3.1). Other ports are passed through.
//!
//! The VMM's own commands use a command list of the VMM's: the port is stopped while the guest has none outstanding,
//! pointed there, and pointed back afterwards. No memory of the guest's is touched for them.

mod guest;
mod own;
mod registers;

use alloc::boxed::Box;

use bmcast_image::Sectors;

use crate::ata::Command;
use crate::{Blocks, MAX_WORK, Mediator, Platform, Work};
use guest::Answer;
use own::Own;
use registers::{GHC, IS, Port, READY, low, port};

/// Command slots of a port.
const SLOTS: usize = 32;
/// Microseconds without a command of the guest's after which its disk counts as quiet.
const QUIET: u64 = 5_000;

/// Offsets in the VMM's own memory, behind the data: command list, command table, table and data of an
/// answer, identity.
mod own_memory {
    use super::MAX_WORK;
    pub const LIST: usize = MAX_WORK;
    pub const TABLE: usize = MAX_WORK + 0x1000;
    pub const ANSWER: usize = MAX_WORK + 0x2000;
    pub const ANSWER_DATA: usize = MAX_WORK + 0x3000;
}

/// A command that the guest has issued and the device has not seen.
#[derive(Clone, Copy, Debug)]
struct Held {
    command: Command,
    queued: bool,
}

/// See the module.
pub struct Ahci {
    port: Port,
    held: [Option<Held>; SLOTS],
    /// Queued commands whose issue is to come: PxSACT is written first.
    queued_next: u32,
    /// What the commands on the device write.
    writes: [Option<Sectors>; SLOTS],
    /// Slots of the guest's on the device.
    issued: u32,
    /// A command that the VMM answers.
    answer: Option<Answer>,
    own: Option<Own>,
    /// What is to be done once the guest has nothing outstanding.
    next: Option<Work>,
    /// Interrupt status that was there when the port was taken, and that the guest has not cleared.
    owed: u32,
    identity: Option<Box<[u8; 512]>>,
    /// It is needed, and not known.
    identity_wanted: bool,
    last_used: u64,
}

impl Ahci {
    /// Of the disk at port `number`.
    pub fn new(number: u8) -> Self {
        Self {
            port: Port::new(number),
            held: [None; SLOTS],
            queued_next: 0,
            writes: [None; SLOTS],
            issued: 0,
            answer: None,
            own: None,
            next: None,
            owed: 0,
            identity: None,
            identity_wanted: false,
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

    fn read_port<P: Platform>(&mut self, platform: &mut P, register: u32) -> u32 {
        let (held, queued) = self.held_bits();
        if let Some(own) = &self.own {
            return match register {
                port::CI => held,
                port::SACT => queued,
                port::IS => self.owed,
                port::TFD => READY,
                port::CLB => own.saved.list,
                port::CLBU => own.saved.list_high,
                port::IE => own.saved.enabled,
                port::CMD => own.saved.command,
                _ => self.port.read(platform, register),
            };
        }
        let value = self.port.read(platform, register);
        match register {
            port::CI => value | held,
            port::SACT => value | queued,
            port::IS => value | self.owed,
            _ => value,
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
            port::CI => {
                self.take(platform, value);
                self.go_on(platform, blocks);
                return;
            }
            port::SACT => {
                self.queued_next |= value;
                return;
            }
            port::IS => self.owed &= !value,
            _ => {}
        }
        if let Some(own) = &mut self.own {
            match register {
                port::IS => return,
                port::IE => {
                    own.saved.enabled = value;
                    return;
                }
                port::CLB | port::CLBU | port::CMD | port::SCTL => {
                    self.finish_now(platform, blocks);
                }
                _ => {}
            }
        }
        if register == port::CMD && value & registers::START == 0 {
            self.drop_held();
        }
        self.port.write(platform, register, value);
        self.go_on(platform, blocks);
    }

    fn drop_held(&mut self) {
        self.held = [None; SLOTS];
        self.queued_next = 0;
    }
}

impl<P: Platform, B: Blocks + ?Sized> Mediator<P, B> for Ahci {
    fn read(&mut self, platform: &mut P, blocks: &mut B, offset: u32, width: u8) -> u64 {
        self.go_on(platform, blocks);
        let mut whole = |at: u32| {
            if let Some(register) = self.port.register(at) {
                return self.read_port(platform, register);
            }
            let value = low(platform.read_register(at, 4));
            if at == IS {
                let bit = self.port.bit();
                let value = if self.own.is_some() {
                    value & !bit
                } else {
                    value
                };
                let owed = if self.owed == 0 { 0 } else { bit };
                return value | owed;
            }
            value
        };
        let at = offset & !3;
        let value = match width {
            8 => u64::from(whole(at)) | u64::from(whole(at + 4)) << 32,
            _ => u64::from(whole(at)) >> ((offset & 3) * 8),
        };
        match width {
            1 => value & 0xff,
            2 => value & 0xffff,
            _ => value,
        }
    }

    fn write(&mut self, platform: &mut P, blocks: &mut B, offset: u32, width: u8, value: u64) {
        let at = offset & !3;
        match (self.port.register(at), width) {
            (Some(register), 8) => {
                self.write_port(platform, blocks, register, low(value));
                self.write_port(platform, blocks, register + 4, low(value >> 32));
            }
            // Registers are written in words (AHCI 1.3.1, 3).
            (Some(register), _) => self.write_port(platform, blocks, register, low(value)),
            (None, _) => {
                if at == GHC && value & 1 != 0 {
                    self.finish_now(platform, blocks);
                    self.drop_held();
                    self.owed = 0;
                }
                platform.write_register(offset, width, value);
            }
        }
        self.last_used = platform.now();
    }

    fn poll(&mut self, platform: &mut P, blocks: &mut B) {
        self.go_on(platform, blocks);
    }

    fn transparent(&self) -> bool {
        self.own.is_none()
            && self.answer.is_none()
            && self.owed == 0
            && self.next.is_none()
            && self.queued_next == 0
            && self.held.iter().all(Option::is_none)
    }
}
