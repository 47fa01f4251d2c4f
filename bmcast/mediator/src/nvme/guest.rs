//! The guest's commands.

use alloc::vec::Vec;

use bmcast_image::Sectors;

use super::command::{
    self, CREATE_CQ, CREATE_SQ, Command, DELETE_CQ, DELETE_SQ, Entry, GET_FEATURES, IDENTIFY,
    NO_QUEUE, NUMBER_OF_QUEUES, READ, SET_FEATURES,
};
use super::identify::{self, ALLOCATED, CONTROLLER, IDENTITY, NAMESPACE};
use super::queues::{Completion, Cq, Held, Ring, Sq};
use super::registers::{self, DOORBELLS, word};
use super::{Disk, Nvme, own_bytes, own_memory};
use crate::{Blocks, Platform, Verdict};

/// Most admin commands whose completion is waited for.
const MOST_PENDING: usize = 8192;
/// Looks for the completion of one whose answer is changed.
const SPINS: u32 = 100_000;
/// Microseconds of that.
const PATIENCE: u64 = 50_000;
/// Bytes of a page.
const PAGE: u64 = 4096;
/// Bytes of an entry of a list of ranges.
const RANGE: usize = 16;
/// A logical block behind every end.
const BEYOND: u64 = u64::MAX - 0xffff;

/// An admin command of which something depends.
#[derive(Clone, Copy, Debug)]
pub enum Pending {
    /// Creates a submission queue, with completions to another.
    CreateSq(u16, Ring, u16),
    /// Creates a completion queue.
    CreateCq(u16, Ring),
    /// Deletes a submission queue.
    DeleteSq(u16),
    /// Deletes a completion queue.
    DeleteCq(u16),
    /// Asks how many queues there are.
    Queues,
}

impl Nvme {
    /// The guest rings a doorbell.
    pub(super) fn ring<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        disk: Disk,
        at: u32,
        value: u32,
    ) {
        let number = (at - DOORBELLS) / self.stride;
        let queue = u16::try_from(number / 2).unwrap_or(NO_QUEUE);
        let value = u32::from(word(value));
        self.last_used = platform.now();
        if number % 2 == 1 {
            // The entries before the head may be used anew when the controller knows of it: they are looked at before.
            self.scan(platform, blocks, disk, queue);
            if self.cqs.get(&queue).is_some_and(|cq| value < cq.size()) {
                registers::write(platform, at, value);
            }
        } else if queue == 0 {
            if let Some(sq) = self.admin.as_mut().filter(|sq| value < sq.size()) {
                sq.tail = value;
            }
        } else if let Some(sq) = self.sqs.get_mut(&queue).filter(|sq| value < sq.size()) {
            sq.tail = value;
        }
        self.go_on(platform, blocks);
    }

    /// Looks for completions that something waits for.
    pub(super) fn look<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        disk: Disk,
    ) {
        if !self.pending.is_empty() {
            self.scan(platform, blocks, disk, 0);
        }
        let waiting = self.sqs.values().filter(|sq| !sq.writes.is_empty());
        let mut queues: Vec<u16> = waiting.map(|sq| sq.cq).collect();
        queues.dedup();
        for queue in queues {
            self.scan(platform, blocks, disk, queue);
        }
    }

    /// Looks at what the controller has posted to a queue.
    fn scan<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        disk: Disk,
        queue: u16,
    ) {
        let size = self.cqs.get(&queue).map_or(0, Cq::size);
        for _ in 0..size {
            let cq = self.cqs.get_mut(&queue);
            let Some((at, completion)) = cq.and_then(|cq| cq.next(platform)) else {
                return;
            };
            if queue == 0 {
                self.answered(platform, blocks, disk, at, completion);
            } else if let Some(sq) = self.sqs.get_mut(&completion.queue)
                && sq.cq == queue
            {
                sq.writes.retain(|(cid, sectors)| {
                    let others = *cid != completion.cid;
                    if !others {
                        blocks.written(*sectors);
                    }
                    others
                });
            }
        }
    }

    /// An admin command is done.
    fn answered<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        disk: Disk,
        at: u64,
        completion: Completion,
    ) {
        let found = self
            .pending
            .iter()
            .position(|(cid, _)| *cid == completion.cid);
        let Some(found) = found else { return };
        let (_, pending) = self.pending.swap_remove(found);
        let done = completion.status == 0;
        match pending {
            Pending::CreateSq(queue, ring, cq) if done => {
                self.sqs.insert(queue, Sq::new(ring, cq));
            }
            Pending::CreateCq(queue, ring) if done => {
                self.cqs.insert(queue, Cq::new(ring));
            }
            Pending::DeleteSq(queue) if done => {
                if let Some(sq) = self.sqs.remove(&queue) {
                    for (_, sectors) in sq.writes {
                        blocks.written(sectors);
                    }
                }
                self.discarding = self.discarding.filter(|other| *other != queue);
            }
            Pending::DeleteSq(queue) => {
                if let Some(sq) = self.sqs.get_mut(&queue) {
                    sq.closing = false;
                }
            }
            Pending::DeleteCq(queue) if done => {
                self.cqs.remove(&queue);
            }
            Pending::Queues if done => {
                let most = self.most_queues(disk) - 1;
                let [low, high] =
                    [completion.result, completion.result >> 16].map(|count| word(count).min(most));
                let result = u32::from(high) << 16 | u32::from(low);
                // A queue that is memory no more has nobody who reads it.
                let _ = platform.write_memory(at, &result.to_le_bytes());
            }
            _ => {}
        }
    }

    /// Tells the controller of what may pass.
    pub(super) fn issue<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        disk: Disk,
    ) {
        self.issue_admin(platform, blocks, disk);
        let mut sqs = core::mem::take(&mut self.sqs);
        for (queue, sq) in &mut sqs {
            let before = sq.issued;
            for _ in 0..sq.size() {
                if sq.closing
                    || !sq.waits()
                    || self.verdict(platform, blocks, disk, *queue, sq) == Verdict::Hold
                {
                    break;
                }
                sq.pass();
            }
            if sq.issued != before {
                registers::write(platform, self.bell(*queue, false), sq.issued);
            }
        }
        self.sqs = sqs;
    }

    /// Whether the first command that the controller was not told of may pass.
    fn verdict<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        disk: Disk,
        queue: u16,
        sq: &mut Sq<Command>,
    ) -> Verdict {
        let mut held = match sq.held.take() {
            Some(held) => held,
            None => match self.read(platform, blocks.visible(), disk, sq) {
                Some(held) => held,
                None => return Verdict::Hold,
            },
        };
        // By its completion it is known when a write is done.
        let is_twice = sq.writes.iter().any(|(cid, _)| *cid == held.cid) && held.ranges.is_none();
        let verdict = match held.command {
            _ if is_twice => Verdict::Hold,
            Command::Read(sectors) => blocks.read(sectors),
            Command::Write(sectors, fua) => {
                let verdict = blocks.write(sectors, fua);
                if verdict == Verdict::Pass {
                    sq.writes.push((held.cid, sectors));
                }
                verdict
            }
            Command::Flush => blocks.flush(),
            Command::Discard(_) => self.discard(blocks, queue, sq, &mut held),
            Command::Other | Command::Beyond | Command::Refused => Verdict::Pass,
        };
        if verdict == Verdict::Hold {
            sq.held = Some(held);
        }
        verdict
    }

    /// Reads it. What is not to pass is made into something that the controller refuses; none if there is no entry.
    fn read<P: Platform>(
        &mut self,
        platform: &mut P,
        visible: u64,
        disk: Disk,
        sq: &Sq<Command>,
    ) -> Option<Held<Command>> {
        let entry = sq.read(platform)?;
        let mut command = command::decode(&entry, self.nsid, disk.ratio);
        let mut ranges = None;
        match command {
            Command::Read(sectors) | Command::Write(sectors, _) if sectors.end() > visible => {
                command = Command::Beyond;
            }
            Command::Discard(count) => {
                ranges = discarded(platform, &entry, count, disk.ratio);
                match &ranges {
                    None => command = Command::Refused,
                    Some(ranges) if ranges.iter().any(|range| range.end() > visible) => {
                        command = Command::Beyond;
                    }
                    Some(_) => {}
                }
            }
            _ => {}
        }
        let replaced = match command {
            // A list cannot be changed so: instead of it there is a read, which is to fail too.
            Command::Beyond => {
                let mut entry = entry;
                if ranges.take().is_some() {
                    entry = Entry::new(READ, self.nsid).with_cid(entry.cid());
                    let nowhere = platform.own_address() + own_bytes(own_memory::NOWHERE);
                    entry.set_prps(nowhere, 0);
                }
                entry.set_start(BEYOND);
                Some(entry)
            }
            Command::Refused => Some(entry.refused()),
            _ => None,
        };
        if let Some(replaced) = replaced
            && !sq.replace(platform, &replaced)
        {
            return None;
        }
        Some(Held {
            cid: entry.cid(),
            command,
            ranges,
        })
    }

    /// All ranges of a list are asked about before it passes; what has passed is not asked about again.
    fn discard<B: Blocks + ?Sized>(
        &mut self,
        blocks: &mut B,
        queue: u16,
        sq: &mut Sq<Command>,
        held: &mut Held<Command>,
    ) -> Verdict {
        // Two that have passed in part would wait for each other if only so many sectors may be written at once.
        if self.discarding.is_some_and(|other| other != queue) {
            return Verdict::Hold;
        }
        let ranges = held.ranges.get_or_insert_default();
        while let Some(next) = ranges.last() {
            if blocks.write(*next, false) == Verdict::Hold {
                return Verdict::Hold;
            }
            self.discarding = Some(queue);
            sq.writes
                .extend(ranges.pop().map(|range| (held.cid, range)));
        }
        self.discarding = None;
        Verdict::Pass
    }

    fn issue_admin<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        disk: Disk,
    ) {
        let Some(mut sq) = self.admin.take() else {
            return;
        };
        let before = sq.issued;
        for _ in 0..sq.size() {
            if !sq.waits() || self.pass_admin(platform, blocks, disk, &sq).is_none() {
                break;
            }
            sq.pass();
        }
        if sq.issued != before {
            registers::write(platform, DOORBELLS, sq.issued);
        }
        self.admin = Some(sq);
        // The answer is changed before the guest is likely to see it.
        let since = platform.now();
        for _ in 0..SPINS {
            let is_asked = |(_, pending): &(u16, Pending)| matches!(pending, Pending::Queues);
            if !self.pending.iter().any(is_asked) || platform.now().saturating_sub(since) > PATIENCE
            {
                break;
            }
            self.scan(platform, blocks, disk, 0);
        }
    }

    /// Has an admin command pass, as it is or changed; none if there is no entry, or too many are on their way.
    fn pass_admin<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        disk: Disk,
        sq: &Sq<()>,
    ) -> Option<()> {
        let entry = sq.read(platform)?;
        if self.pending.len() >= MOST_PENDING {
            return None;
        }
        let most = self.most_queues(disk);
        let queue = word(entry.dword(10));
        let is_there = queue != 0 && queue <= most;
        let ring = Ring {
            base: entry.prp(0) & !(PAGE - 1),
            size: (entry.dword(10) >> 16) + 1,
        };
        let is_contiguous = entry.dword(11) & 1 != 0;
        let mut changed = entry;
        let mut pending = None;
        match entry.opcode() {
            CREATE_SQ | CREATE_CQ | DELETE_SQ | DELETE_CQ if !is_there => {
                changed.set(10, entry.dword(10) | u32::from(NO_QUEUE));
            }
            CREATE_SQ | CREATE_CQ if !is_contiguous => changed = entry.refused(),
            CREATE_SQ => {
                let cq = word(entry.dword(11) >> 16);
                if cq == disk.queue {
                    changed.set(11, entry.dword(11) | u32::from(NO_QUEUE) << 16);
                } else {
                    pending = Some(Pending::CreateSq(queue, ring, cq));
                }
            }
            CREATE_CQ => pending = Some(Pending::CreateCq(queue, ring)),
            DELETE_SQ => {
                if let Some(sq) = self.sqs.get_mut(&queue) {
                    sq.closing = true;
                    pending = Some(Pending::DeleteSq(queue));
                }
            }
            DELETE_CQ => pending = Some(Pending::DeleteCq(queue)),
            IDENTIFY => changed = self.identify(platform, blocks.visible(), disk, &entry),
            // The VMM has set it, which may be done only before there are queues.
            SET_FEATURES | GET_FEATURES if entry.dword(10) & 0xff == NUMBER_OF_QUEUES => {
                changed = Entry::new(GET_FEATURES, 0).with_cid(entry.cid());
                changed.set(10, NUMBER_OF_QUEUES);
                pending = Some(Pending::Queues);
            }
            _ if command::may_pass(&entry) => {}
            _ => changed = entry.refused(),
        }
        if changed != entry && !sq.replace(platform, &changed) {
            return None;
        }
        // A number that is used twice is one that the guest does not tell apart either.
        self.pending.retain(|(cid, _)| *cid != entry.cid());
        self.pending
            .extend(pending.map(|pending| (entry.cid(), pending)));
        Some(())
    }

    /// What there is to know of the controller and of the disk goes to the guest's memory before its command
    /// passes, and what the controller says then, nowhere.
    fn identify<P: Platform>(
        &self,
        platform: &mut P,
        visible: u64,
        disk: Disk,
        entry: &Entry,
    ) -> Entry {
        let what = entry.dword(10) & 0xff;
        let place = match what {
            CONTROLLER => own_memory::CONTROLLER,
            NAMESPACE | ALLOCATED if entry.dword(1) == self.nsid => own_memory::NAMESPACE,
            _ => return *entry,
        };
        if entry.is_fused() || entry.description() != 0 {
            return entry.refused();
        }
        let known = platform.own_memory().get(place..place + IDENTITY);
        let mut known = known.map(<[u8]>::to_vec).unwrap_or_default();
        if what == CONTROLLER {
            identify::hide(&mut known);
        } else {
            identify::shrink(&mut known, visible, disk.ratio);
        }
        let both = pieces(entry, known.len()).is_some_and(|[first, second]| {
            let (now, later) = known.split_at(first.1);
            platform.write_memory(first.0, now)
                && (later.is_empty() || platform.write_memory(second.0, later))
        });
        if !both {
            return entry.refused();
        }
        let mut changed = *entry;
        let nowhere = platform.own_address() + own_bytes(own_memory::NOWHERE);
        changed.set_prps(nowhere, 0);
        changed
    }
}

/// The pieces of memory of a command of at most a page: addresses and lengths.
fn pieces(entry: &Entry, bytes: usize) -> Option<[(u64, usize); 2]> {
    let first = entry.prp(0) & !3;
    let room = usize::try_from(PAGE - first % PAGE).ok()?;
    let length = bytes.min(room);
    Some([
        (first, length),
        (entry.prp(1) & !(PAGE - 1), bytes - length),
    ])
}

/// What a list names: by PRPs, or in one piece by an SGL (4.4); none if it is not there, or names what there is not.
fn discarded<P: Platform>(
    platform: &mut P,
    entry: &Entry,
    count: u16,
    ratio: u64,
) -> Option<Vec<Sectors>> {
    let bytes = usize::from(count) * RANGE;
    let mut list = alloc::vec![0; bytes];
    let [first, second] = match entry.description() {
        0 => pieces(entry, bytes)?,
        // One descriptor of a data block: its type is 0, in the last byte.
        1 if entry.0[39] == 0 && usize::try_from(entry.dword(8)).ok()? >= bytes => {
            [(entry.prp(0), bytes), (0, 0)]
        }
        _ => return None,
    };
    let (now, later) = list.split_at_mut(first.1);
    let there = platform.read_memory(first.0, now)
        && (later.is_empty() || platform.read_memory(second.0, later));
    if !there {
        return None;
    }
    let mut all = Vec::new();
    for bytes in list.as_chunks::<RANGE>().0 {
        let sectors = command::range(bytes, ratio)?;
        if !sectors.is_empty() {
            all.push(sectors);
        }
    }
    Some(all)
}
