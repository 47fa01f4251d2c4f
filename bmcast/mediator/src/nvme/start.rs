//! From CC.EN on: commands of the VMM's by the guest's admin queues, before the guest may use them.
//!
//! A controller takes its admin queues' addresses when it is enabled, and never others after that. So the VMM's first
//! commands go through the guest's queues, while the guest is still shown a controller that is not ready; and then as many
//! more without effect until both queues are where they began: the next entries are their first ones, of the phase that
//! the guest expects. From then on the admin queues are the guest's alone.

use super::command::{
    CREATE_CQ, CREATE_SQ, ENTRY, Entry, GET_FEATURES, IDENTIFY, NUMBER_OF_QUEUES, SET_FEATURES,
};
use super::identify::{self, CONTROLLER, NAMESPACE};
use super::queues::{COMPLETION, Ring, completion};
use super::registers::{self, ACQ, AQA, ASQ, DOORBELLS, word};
use super::{Disk, own_bytes, own_memory};
use crate::Platform;

/// Most commands that it may take to have both queues where they began. With queues of one size of up to 4,096 entries it
/// is twice that.
const MOST: u64 = 1 << 15;
/// Commands at a call.
const AT_ONCE: u32 = 256;
/// Looks for the answer to each of them.
const SPINS: u32 = 2_000;
/// Microseconds of that.
const PATIENCE: u64 = 200;
/// As many I/O queues as a controller may have, less one (5.21.1.7).
const QUEUES: u32 = 0xfffe;
/// What has an effect.
const STEPS: u64 = 5;

/// How far it is.
#[derive(Debug)]
pub struct Start {
    sq: Ring,
    cq: Ring,
    total: u64,
    next: u64,
    /// What the guest has where the command and its answer are.
    saved: Option<([u8; ENTRY], [u8; COMPLETION])>,
    /// The number of the VMM's queues.
    queue: u16,
}

/// Whether it goes on.
#[derive(Debug)]
pub enum Progress {
    /// The controller is at it.
    Waits,
    /// All is done.
    Done(Disk),
    /// This controller, or what the guest has made of it, cannot be mediated.
    Failed,
}

impl Start {
    /// With what the guest has in the registers, while CC.EN is 0; none if the queues are such that they would not come
    /// back to where they began, or not memory.
    pub fn new<P: Platform>(platform: &mut P) -> Option<Self> {
        let sizes = registers::read(platform, AQA);
        let entries = |field: u32| (field & 0xfff) + 1;
        let sq = Ring {
            base: registers::read_long(platform, ASQ) & !0xfff,
            size: entries(sizes),
        };
        let cq = Ring {
            base: registers::read_long(platform, ACQ) & !0xfff,
            size: entries(sizes >> 16),
        };
        let around = common(u64::from(sq.size), u64::from(cq.size) * 2);
        let mut last = [0; 1];
        let is_memory = platform.read_memory(sq.at(0, ENTRY)?, &mut last)
            && platform.read_memory(sq.at(sq.size - 1, ENTRY)?, &mut last)
            && platform.read_memory(cq.at(0, COMPLETION)?, &mut last)
            && platform.read_memory(cq.at(cq.size - 1, COMPLETION)?, &mut last);
        if sq.size < 2 || cq.size < 2 || around > MOST || !is_memory {
            return None;
        }
        Some(Self {
            sq,
            cq,
            total: STEPS.next_multiple_of(around),
            next: 0,
            saved: None,
            queue: 0,
        })
    }

    /// The guest's admin queues.
    pub fn rings(&self) -> (Ring, Ring) {
        (self.sq, self.cq)
    }

    /// Goes on, for as long as the controller is quick.
    pub fn go_on<P: Platform>(&mut self, platform: &mut P, nsid: u32, stride: u32) -> Progress {
        for _ in 0..AT_ONCE {
            if self.saved.is_none() {
                if self.next == self.total {
                    return self.done(platform).map_or(Progress::Failed, Progress::Done);
                }
                if self.submit(platform, nsid).is_none() {
                    return Progress::Failed;
                }
            }
            match self.answer(platform, stride) {
                Some(Ok(())) => {}
                Some(Err(Refused)) => return Progress::Failed,
                None => return Progress::Waits,
            }
        }
        Progress::Waits
    }

    fn index(&self, size: u32) -> u32 {
        u32::try_from(self.next % u64::from(size)).unwrap_or(0)
    }

    /// Where the next command and its answer are.
    fn places(&self) -> Option<(u64, u64)> {
        let command = self.sq.at(self.index(self.sq.size), ENTRY)?;
        Some((command, self.cq.at(self.index(self.cq.size), COMPLETION)?))
    }

    /// The phase of its answer: 1 the first time around.
    fn phase(&self) -> bool {
        (self.next / u64::from(self.cq.size)).is_multiple_of(2)
    }

    fn command<P: Platform>(&self, platform: &P, nsid: u32) -> Entry {
        let own = |place: usize| platform.own_address() + own_bytes(place);
        match self.next {
            0 => {
                let mut entry = Entry::new(SET_FEATURES, 0);
                entry.set(10, NUMBER_OF_QUEUES);
                entry.set(11, QUEUES << 16 | QUEUES);
                entry
            }
            1 | 2 => {
                let (nsid, cns, place) = if self.next == 1 {
                    (0, CONTROLLER, own_memory::CONTROLLER)
                } else {
                    (nsid, NAMESPACE, own_memory::NAMESPACE)
                };
                let mut entry = Entry::new(IDENTIFY, nsid);
                entry.set_prps(own(place), 0);
                entry.set(10, cns);
                entry
            }
            3 | 4 => {
                // Two entries, physically contiguous; no interrupts; of the submission queue's completions to the other.
                let (opcode, place, more) = if self.next == 3 {
                    (CREATE_CQ, own_memory::CQ, 0)
                } else {
                    (CREATE_SQ, own_memory::SQ, u32::from(self.queue) << 16)
                };
                let mut entry = Entry::new(opcode, 0);
                entry.set_prps(own(place), 0);
                entry.set(10, 1 << 16 | u32::from(self.queue));
                entry.set(11, more | 1);
                entry
            }
            _ => {
                let mut entry = Entry::new(GET_FEATURES, 0);
                entry.set(10, NUMBER_OF_QUEUES);
                entry
            }
        }
    }

    fn submit<P: Platform>(&mut self, platform: &mut P, nsid: u32) -> Option<()> {
        let (command, answer) = self.places()?;
        let mut saved = ([0; ENTRY], [0; COMPLETION]);
        let mut none = [0; COMPLETION];
        none[14] = u8::from(!self.phase());
        if self.next == 3 {
            platform
                .own_memory()
                .get_mut(own_memory::CQ..own_memory::CQ + 0x1000)?
                .fill(0);
        }
        let entry = self.command(platform, nsid);
        let all = platform.read_memory(command, &mut saved.0)
            && platform.read_memory(answer, &mut saved.1)
            && platform.write_memory(command, &entry.0)
            && platform.write_memory(answer, &none);
        self.saved = Some(saved);
        let tail = (self.index(self.sq.size) + 1) % self.sq.size;
        registers::write(platform, DOORBELLS, tail);
        all.then_some(())
    }

    /// Waits a little for the answer.
    fn answer<P: Platform>(
        &mut self,
        platform: &mut P,
        stride: u32,
    ) -> Option<Result<(), Refused>> {
        let Some((command, answer)) = self.places() else {
            return Some(Err(Refused));
        };
        let since = platform.now();
        let mut found = None;
        for _ in 0..SPINS {
            found = completion(platform, answer, self.phase());
            if found.is_some() || platform.now().saturating_sub(since) > PATIENCE {
                break;
            }
        }
        let found = found?;
        let saved = self.saved.take()?;
        let restored =
            platform.write_memory(command, &saved.0) && platform.write_memory(answer, &saved.1);
        let head = (self.index(self.cq.size) + 1) % self.cq.size;
        registers::write(platform, DOORBELLS + stride, head);
        // How many queues there are, less one, of either kind.
        if self.next == 0 {
            self.queue = word(found.result)
                .min(word(found.result >> 16))
                .saturating_add(1);
            // One is for the guest.
            if self.queue < 2 {
                return Some(Err(Refused));
            }
        }
        let failed = self.next < STEPS && found.status != 0;
        self.next += 1;
        Some(if failed || !restored {
            Err(Refused)
        } else {
            Ok(())
        })
    }

    fn done<P: Platform>(&self, platform: &mut P) -> Option<Disk> {
        let memory = platform.own_memory();
        let controller = memory.get(own_memory::CONTROLLER..)?;
        let namespace = memory.get(own_memory::NAMESPACE..)?;
        Some(Disk {
            queue: self.queue,
            ratio: identify::ratio(namespace)?,
            most: identify::most_data(controller)?,
        })
    }
}

/// A command of the VMM's has failed.
struct Refused;

/// The least common multiple.
fn common(a: u64, b: u64) -> u64 {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x.max(1) * b
}
