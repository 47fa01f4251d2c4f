//! The mediator of an NVMe controller with a disk as one of its namespaces (NVMe 1.4). Others are passed through.
//!
//! The VMM's own commands have a pair of queues of their own, beside the guest's; how it comes to be is in
//! [`start`]. A command of the guest's is held by telling the controller of the entries before it only. What is shown and
//! held when is in `docs/bmcast-mediators.md`.

mod command;
mod guest;
mod identify;
mod own;
mod queues;
mod registers;
mod start;

use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use crate::{Blocks, Failed, MAX_WORK, Mediator, Platform};
use command::Command;
use guest::Pending;
use own::Own;
use queues::{Cq, Sq};
use registers::{
    BUFFER, CAP, CC, CMBLOC, CMBMSC, CMBSZ, CSTS, DOORBELLS, ENABLE, ENTRIES, FATAL, NSSR, PAGES,
    READY, RESET, SHUTDOWN, USUAL_ENTRIES, low,
};
use start::{Progress, Start};

/// Microseconds without a command of the guest's after which its disk counts as quiet.
const QUIET: u64 = 5_000;

/// Offsets in the VMM's own memory, behind the data.
mod own_memory {
    use super::MAX_WORK;
    /// The submission queue.
    pub const SQ: usize = MAX_WORK;
    /// The completion queue.
    pub const CQ: usize = MAX_WORK + 0x1000;
    /// The list of the data's pages.
    pub const LIST: usize = MAX_WORK + 0x2000;
    /// What the controller says of itself.
    pub const CONTROLLER: usize = MAX_WORK + 0x3000;
    /// What it says of the namespace.
    pub const NAMESPACE: usize = MAX_WORK + 0x4000;
    /// Where what nobody reads goes.
    pub const NOWHERE: usize = MAX_WORK + 0x5000;
}

/// An offset as a part of an address.
fn own_bytes(offset: usize) -> u64 {
    u64::try_from(offset).unwrap_or(0)
}

/// What is known of the disk once its controller is enabled.
#[derive(Clone, Copy, Debug)]
struct Disk {
    /// The number of the VMM's queues, which is the last one.
    queue: u16,
    /// Sectors of a logical block.
    ratio: u64,
    /// Most bytes of a command.
    most: usize,
}

/// What the controller is.
#[derive(Debug)]
enum State {
    /// In use since before there was a mediator: its queues are not known.
    Unknown,
    /// Disabled, or about to be.
    Stopping,
    /// Disabled.
    Off,
    /// Enabled by the guest, which is to see it ready later.
    Starting(Box<Start>),
    /// Ready.
    On(Disk),
    /// Not to be mediated as the guest wants it: shown as failed. What it has written to CC, if the controller has not seen
    /// that.
    Refused(Option<u32>),
}

/// See the module.
pub struct Nvme {
    nsid: u32,
    /// Bytes of the registers that are seen.
    window: u32,
    /// Bytes from a doorbell to the next.
    stride: u32,
    /// Where doorbells end.
    doorbells_end: u32,
    state: State,
    /// The guest has asked for a shutdown.
    is_shut: bool,
    admin: Option<Sq<()>>,
    pending: Vec<(u16, Pending)>,
    sqs: BTreeMap<u16, Sq<Command>>,
    cqs: BTreeMap<u16, Cq>,
    /// The queue whose list of ranges has passed in part.
    discarding: Option<u16>,
    own: Option<Own>,
    /// The next entry of the VMM's queues: 0 or 1; and its phase.
    own_next: u8,
    own_phase: bool,
    last_used: u64,
}

impl Nvme {
    /// Of the disk that is namespace `nsid`. Of the registers, the first `window` bytes are watched.
    pub fn new(nsid: u32, window: u32) -> Self {
        Self {
            nsid,
            window,
            stride: 4,
            doorbells_end: DOORBELLS + 8,
            state: State::Unknown,
            is_shut: false,
            admin: None,
            pending: Vec::new(),
            sqs: BTreeMap::new(),
            cqs: BTreeMap::new(),
            discarding: None,
            own: None,
            own_next: 0,
            own_phase: true,
            last_used: 0,
        }
    }

    /// Bytes of the registers to be watched, by the upper half of CAP: registers, and doorbells of the first queues. All
    /// controllers have them (PCI header and MLBAR: 16 KiB).
    pub fn window(capabilities: u32) -> u32 {
        if capabilities & 0xf == 0 {
            0x2000
        } else {
            0x4000
        }
    }

    /// How many I/O queues the guest may have: those before the VMM's whose doorbells are seen.
    fn most_queues(&self, disk: Disk) -> u16 {
        let pairs = (self.window - DOORBELLS) / (self.stride * 2);
        let seen = u16::try_from(pairs.saturating_sub(1)).unwrap_or(u16::MAX);
        seen.min(disk.queue - 1)
    }

    /// The doorbell of a submission queue's tail, or of a completion queue's head.
    fn bell(&self, queue: u16, is_head: bool) -> u32 {
        DOORBELLS + (u32::from(queue) * 2 + u32::from(is_head)) * self.stride
    }

    /// Goes on with whatever can go on.
    fn go_on<P: Platform, B: Blocks + ?Sized>(&mut self, platform: &mut P, blocks: &mut B) {
        match &mut self.state {
            State::Unknown | State::Off | State::Refused(_) => {}
            State::Stopping => {
                if registers::read(platform, CSTS) & READY == 0 {
                    self.stopped(blocks);
                }
            }
            State::Starting(start) => {
                if registers::read(platform, CSTS) & READY == 0 {
                    return;
                }
                match start.go_on(platform, self.nsid, self.stride) {
                    Progress::Waits => {}
                    Progress::Failed => self.state = State::Refused(None),
                    Progress::Done(disk) => {
                        let (sq, cq) = start.rings();
                        self.admin = Some(Sq::new(sq, 0));
                        self.cqs.insert(0, Cq::new(cq));
                        self.doorbells_end = self.bell(disk.queue, true) + self.stride;
                        self.own_next = 0;
                        self.own_phase = true;
                        self.state = State::On(disk);
                    }
                }
            }
            State::On(disk) => {
                let disk = *disk;
                self.finish(platform, blocks, disk);
                self.look(platform, blocks, disk);
                self.issue(platform, blocks, disk);
                self.begin(platform, blocks, disk);
            }
        }
    }

    /// The controller does nothing any more.
    fn stopped<B: Blocks + ?Sized>(&mut self, blocks: &mut B) {
        self.state = State::Off;
        self.is_shut = false;
        self.admin = None;
        self.pending.clear();
        self.cqs.clear();
        self.discarding = None;
        for (_, sq) in core::mem::take(&mut self.sqs) {
            for (_, sectors) in sq.writes {
                blocks.written(sectors);
            }
        }
        if self.own.take().is_some() {
            blocks.done(Err(Failed { status: 0 }));
        }
    }

    /// The guest writes CC.
    fn control<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        value: u32,
    ) {
        let was = registers::read(platform, CC) & ENABLE != 0;
        let will = value & ENABLE != 0;
        if !was && will {
            self.stopped(blocks);
            self.stride = 4 << (registers::read(platform, CAP + 4) & 0xf);
            self.doorbells_end = self.bell(0, true) + self.stride;
            // Pages of the VMM's own memory are of 4 KiB.
            let start = Start::new(platform).filter(|_| value & PAGES == 0);
            let Some(start) = start else {
                self.state = State::Refused(Some(value));
                return;
            };
            self.state = State::Starting(Box::new(start));
        } else if was && !will {
            self.drain(platform, blocks);
            self.state = State::Stopping;
        } else if !will {
            self.state = State::Off;
        } else if value & SHUTDOWN != 0 {
            self.drain(platform, blocks);
            self.is_shut = true;
        }
        // The VMM creates queues before the guest need have said how large entries are.
        let sizes = if will && value & ENTRIES == 0 {
            USUAL_ENTRIES
        } else {
            0
        };
        registers::write(platform, CC, value | sizes);
        self.go_on(platform, blocks);
    }

    /// The guest reads a register of 4 bytes.
    fn read_word<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        at: u32,
    ) -> u32 {
        let value = registers::read(platform, at);
        if at == CSTS && value & READY == 0 && matches!(self.state, State::Stopping) {
            self.stopped(blocks);
        }
        match (at, &self.state) {
            (CMBLOC | CMBSZ, _) => 0,
            (at, _) if at == CMBMSC || at == CMBMSC + 4 => 0,
            (at, _) if at == CAP + 4 => value & !BUFFER,
            (CC, State::Refused(Some(control))) => *control,
            (CSTS, State::Starting(_)) => value & !READY,
            (CSTS, State::Refused(_)) => value & !READY | FATAL,
            _ => value,
        }
    }

    /// Whether [`Self::write_word`] is to see what is written there.
    fn is_looked_at(&self, at: u32) -> bool {
        matches!(at, CC | NSSR)
            || (CMBMSC..CMBMSC + 8).contains(&at)
            || (DOORBELLS..self.doorbells_end).contains(&at)
    }

    /// The guest writes a register of 4 bytes that is looked at; false if it is another one.
    fn write_word<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        at: u32,
        value: u32,
    ) -> bool {
        match at {
            CC => self.control(platform, blocks, value),
            NSSR if value == RESET => {
                registers::write(platform, NSSR, value);
                self.state = State::Stopping;
            }
            _ if at == CMBMSC || at == CMBMSC + 4 => {}
            _ if (DOORBELLS..self.doorbells_end).contains(&at) => match self.state {
                State::Unknown => return false,
                State::On(disk) => self.ring(platform, blocks, disk, at, value),
                _ => {}
            },
            _ => return false,
        }
        true
    }
}

impl<P: Platform, B: Blocks + ?Sized> Mediator<P, B> for Nvme {
    fn read(&mut self, platform: &mut P, blocks: &mut B, offset: u32, width: u8) -> u64 {
        self.go_on(platform, blocks);
        let at = offset & !3;
        let mut value = u64::from(self.read_word(platform, blocks, at));
        if width == 8 {
            value |= u64::from(self.read_word(platform, blocks, at.wrapping_add(4))) << 32;
        }
        let value = value >> ((offset & 3) * 8);
        match width {
            1 => value & 0xff,
            2 => value & 0xffff,
            8 => value,
            _ => value & 0xffff_ffff,
        }
    }

    fn write(&mut self, platform: &mut P, blocks: &mut B, offset: u32, width: u8, value: u64) {
        let at = offset & !3;
        let shift = (offset & 3) * 8;
        let known = match width {
            // Addresses of queues, and messages of MSI-X, in one as they come.
            8 if !self.is_looked_at(at) && !self.is_looked_at(at.wrapping_add(4)) => false,
            8 => {
                for (at, value) in [(at, value), (at.wrapping_add(4), value >> 32)] {
                    if !self.write_word(platform, blocks, at, low(value)) {
                        registers::write(platform, at, low(value));
                    }
                }
                true
            }
            1 | 2 if at == CC => {
                let mask = low((1 << (u32::from(width) * 8)) - 1) << shift;
                let others = self.read_word(platform, blocks, CC) & !mask;
                let value = low(value << shift) & mask | others;
                self.write_word(platform, blocks, at, value)
            }
            1 => self.write_word(platform, blocks, at, low(value & 0xff) << shift),
            2 => self.write_word(platform, blocks, at, low(value & 0xffff) << shift),
            _ => self.write_word(platform, blocks, at, low(value)),
        };
        if !known {
            registers::barrier();
            platform.write_register(offset, width, value);
        }
    }

    fn poll(&mut self, platform: &mut P, blocks: &mut B) {
        self.go_on(platform, blocks);
    }

    fn transparent(&self) -> bool {
        matches!(self.state, State::Unknown | State::Off | State::On(_))
            && self.own.is_none()
            && self.pending.is_empty()
            && self.admin.as_ref().is_none_or(|sq| !sq.waits())
            && self.sqs.values().all(|sq| !sq.waits())
    }
}
