//! The VMM's own commands.

use bmcast_image::{SECTOR, Sectors};

use super::command::{ENTRY, Entry, FLUSH, WRITE};
use super::queues::{COMPLETION, Completion};
use super::{Disk, Nvme, QUIET, own_bytes, own_memory, registers};
use crate::{Blocks, Failed, MAX_WORK, Platform, Work};

/// Bytes of a page as PRPs have them.
const PAGE: usize = 4096;
/// Microseconds that the guest's taking the controller away waits for the VMM's command.
const PATIENCE: u64 = 500_000;
/// Looks for it.
const SPINS: u32 = 500_000;

/// What the VMM has on the device.
#[derive(Debug)]
pub struct Own {
    /// What is still to be written: the first part is on the device. None of a flush.
    rest: Option<Sectors>,
    /// Where its data are.
    from: usize,
    /// Bytes of the part.
    part: usize,
}

impl Nvme {
    /// Gives the device what is next, if it has nothing of the VMM's.
    pub(super) fn begin<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        disk: Disk,
    ) {
        if self.own.is_some() || self.is_shut {
            return;
        }
        let held = self.sqs.values().any(super::Sq::waits);
        let since = platform.now().saturating_sub(self.last_used);
        let rest = match blocks.next(!held && since > QUIET) {
            None => return,
            Some(Work::Flush) => None,
            Some(Work::Write { to, data }) => {
                let fits = data.len() <= MAX_WORK
                    && to.count.checked_mul(SECTOR) == u64::try_from(data.len()).ok();
                let is_whole =
                    to.start.is_multiple_of(disk.ratio) && to.count.is_multiple_of(disk.ratio);
                if !fits || !is_whole {
                    blocks.done(Err(Failed { status: 0 }));
                    return;
                }
                if to.is_empty() {
                    blocks.done(Ok(()));
                    return;
                }
                platform.own_memory()[..data.len()].copy_from_slice(&data);
                Some(to)
            }
        };
        self.send(platform, disk, rest, 0);
        // A fast device is done.
        self.finish(platform, blocks, disk);
    }

    /// Gives the device one command: a flush, or as much of a write as may be.
    fn send<P: Platform>(
        &mut self,
        platform: &mut P,
        disk: Disk,
        rest: Option<Sectors>,
        from: usize,
    ) {
        let own = platform.own_address();
        let mut part = 0;
        let entry = match rest {
            None => Entry::new(FLUSH, self.nsid),
            Some(to) => {
                let left = usize::try_from(to.count * SECTOR)
                    .unwrap_or(0)
                    .min(MAX_WORK - from);
                // Parts of whole pages, since the data begin at one.
                part = left.min(disk.most);
                let blocks = u32::try_from(part).unwrap_or(0) / registers::low(disk.ratio * SECTOR);
                let mut entry = Entry::new(WRITE, self.nsid);
                let first = own + own_bytes(from);
                let pages = part.div_ceil(PAGE);
                let second = match pages {
                    0 | 1 => 0,
                    2 => first + own_bytes(PAGE),
                    _ => own + own_bytes(own_memory::LIST),
                };
                entry.set_prps(first, second);
                entry.set_start(to.start / disk.ratio);
                entry.set(12, blocks.saturating_sub(1));
                let list = platform
                    .own_memory()
                    .get_mut(own_memory::LIST..)
                    .unwrap_or_default();
                for (place, page) in list.chunks_exact_mut(8).zip(1..pages) {
                    let address = first + own_bytes(page * PAGE);
                    place.copy_from_slice(&address.to_le_bytes());
                }
                entry
            }
        };
        let number = usize::from(self.own_next);
        let cid = self.own_next.into();
        let place = own_memory::SQ + number * ENTRY;
        if let Some(place) = platform.own_memory().get_mut(place..place + ENTRY) {
            place.copy_from_slice(&entry.with_cid(cid).0);
        }
        self.own = Some(Own { rest, from, part });
        let bell = self.bell(disk.queue, false);
        registers::write(platform, bell, u32::from(self.own_next ^ 1));
    }

    /// Looks whether it is done.
    pub(super) fn finish<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        disk: Disk,
    ) {
        // A write has at most as many parts as sectors.
        while let Some(own) = &self.own {
            let place = own_memory::CQ + usize::from(self.own_next) * COMPLETION;
            // The device writes there.
            registers::barrier();
            let memory = core::hint::black_box(platform.own_memory());
            let bytes = memory.get(place..).and_then(<[u8]>::first_chunk);
            let completion = bytes.and_then(|bytes| Completion::of(bytes, self.own_phase));
            let Some(completion) = completion else { return };
            let (rest, from, part) = (own.rest, own.from, own.part);
            self.own_next ^= 1;
            if self.own_next == 0 {
                self.own_phase = !self.own_phase;
            }
            let bell = self.bell(disk.queue, true);
            registers::write(platform, bell, self.own_next.into());
            self.own = None;
            if completion.status != 0 {
                blocks.done(Err(Failed {
                    status: completion.status.into(),
                }));
                return;
            }
            let done = u64::try_from(part).unwrap_or(0) / SECTOR;
            match rest {
                Some(to) if to.count > done && done != 0 => {
                    let rest = Sectors {
                        start: to.start + done,
                        count: to.count - done,
                    };
                    self.send(platform, disk, Some(rest), from + part);
                }
                _ => {
                    blocks.done(Ok(()));
                    return;
                }
            }
        }
    }

    /// Has it done before the guest takes the controller away, if the device is at all quick.
    pub(super) fn drain<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
    ) {
        let super::State::On(disk) = self.state else {
            return;
        };
        let since = platform.now();
        for _ in 0..SPINS {
            self.finish(platform, blocks, disk);
            if self.own.is_none() || platform.now().saturating_sub(since) > PATIENCE {
                return;
            }
        }
    }
}
