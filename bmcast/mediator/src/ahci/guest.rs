//! The guest's commands.

use alloc::vec::Vec;

use bmcast_image::Sectors;

use super::own::Turn;
use super::registers::{ERROR, port};
use super::{Ahci, Held, Identity, QUIET, SLOTS, own_memory};
use crate::ata::{self, Command, Fis};
use crate::{Blocks, Platform, Verdict};

/// Bytes of a command's header in a list (4.2.2).
const HEADER: u64 = 32;
/// Bytes from a table's begin to its list of memory (4.2.3).
const REGIONS: u64 = 0x80;
/// Bytes of an entry of it.
const REGION: u64 = 16;
/// Dwords of the FIS of a command, which is all of a register FIS.
const FIS_WORDS: u32 = 5;
/// In a header: dwords of the FIS.
const FIS_LENGTH: u32 = 0x1f;

/// A command whose table is the VMM's.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    slot: usize,
    /// Where its header is.
    header: u64,
    /// What the guest had there.
    saved: [u8; 16],
}

/// A header, read once.
struct Header {
    at: u64,
    bytes: [u8; 16],
}

impl Header {
    fn word(&self, number: usize) -> u32 {
        let bytes = self.bytes.get(number * 4..number * 4 + 4);
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u32::from_le_bytes)
    }

    fn table(&self) -> u64 {
        u64::from(self.word(3)) << 32 | u64::from(self.word(2) & !0x7f)
    }

    /// Entries of its list of memory.
    fn regions(&self) -> u64 {
        u64::from(self.word(0) >> 16)
    }
}

impl Ahci {
    /// The guest issues commands.
    pub(super) fn take<P: Platform>(&mut self, platform: &mut P, bits: u32) {
        let new = bits & !self.issued & !self.held_bits().0;
        for slot in (0..SLOTS).filter(|slot| new & 1 << slot != 0) {
            let queued = self.queued_next & 1 << slot != 0;
            self.queued_next &= !(1 << slot);
            let command = self.command(platform, slot, queued);
            self.held[slot] = Some(Held {
                command,
                queued,
                trim: None,
            });
        }
        self.last_used = platform.now();
    }

    /// What the guest has in a slot.
    fn command<P: Platform>(&mut self, platform: &mut P, slot: usize, queued: bool) -> Command {
        let Some(header) = self.header(platform, slot) else {
            return Command::Refused;
        };
        if header.word(0) & FIS_LENGTH < FIS_WORDS {
            return Command::Refused;
        }
        let Some(fis) = fis(platform, &header) else {
            return Command::Refused;
        };
        // When a command is done is told by PxSACT if it is queued, by its tag, and by PxCI if not.
        if ata::is_queued(&fis) != queued || queued && ata::tag(&fis) != slot {
            return Command::Refused;
        }
        ata::decode(&fis)
    }

    fn header<P: Platform>(&mut self, platform: &mut P, slot: usize) -> Option<Header> {
        let list = u64::from(self.read_port(platform, port::CLBU)) << 32
            | u64::from(self.read_port(platform, port::CLB) & !0x3ff);
        let at = list.checked_add(u64::try_from(slot).ok()? * HEADER)?;
        let mut bytes = [0; 16];
        platform
            .read_memory(at, &mut bytes)
            .then_some(Header { at, bytes })
    }

    /// Goes on with whatever can go on.
    pub(super) fn go_on<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
    ) {
        if !self.finish(platform, blocks) {
            return;
        }
        let active = self.observe(platform, blocks);
        if self.wants_turn() && active == 0 {
            let turn = self.begin(platform, blocks);
            if self.own.is_some() || turn == Turn::Soon {
                return;
            }
        }
        self.issue(platform, blocks, active);
        if self.next.is_none() {
            let held = self.held.iter().any(Option::is_some);
            let since = platform.now().saturating_sub(self.last_used);
            let quiet = !held && self.issued == 0 && since > QUIET;
            self.next = blocks.next(quiet);
        }
        if active == 0 && self.issued == 0 {
            self.begin(platform, blocks);
        }
    }

    /// Whether the VMM has something for the device. What the guest issues waits then.
    pub(super) fn wants_turn(&self) -> bool {
        self.next.is_some() || matches!(self.identity, Identity::Wanted)
    }

    /// Looks what is on the device, and for commands that are there no more.
    pub(super) fn observe<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
    ) -> u32 {
        // PxSACT of a queued command is set before PxCI and cleared after it.
        let active = self.port.read(platform, port::CI) | self.port.read(platform, port::SACT);
        self.gone(platform, blocks, self.issued & !active);
        active
    }

    /// Commands that are on the device no more.
    pub(super) fn gone<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        done: u32,
    ) {
        self.issued &= !done;
        for slot in (0..SLOTS).filter(|slot| done & 1 << slot != 0) {
            for sectors in self.writes[slot].drain(..) {
                blocks.written(sectors);
            }
            if let Some(answer) = self.answer.take_if(|answer| answer.slot == slot) {
                // The bytes between are the device's (4.2.2: PRDBC). A list that is memory no more needs it no more.
                let [flags, table] = [&answer.saved[..4], &answer.saved[8..]];
                let _ = platform.write_memory(answer.header, flags);
                let _ = platform.write_memory(answer.header + 8, table);
            }
        }
    }

    /// Gives the device what may pass.
    fn issue<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        active: u32,
    ) {
        if self.held.iter().all(Option::is_none) {
            return;
        }
        // The VMM's own turn comes when these are done.
        if self.wants_turn() && active != 0 {
            return;
        }
        // After an error a port does nothing until it is started anew (6.2.2): what is given to it is lost.
        if active != 0 && self.port.read(platform, port::TFD) & ERROR != 0 {
            return;
        }
        for slot in 0..SLOTS {
            let Some(mut held) = self.held[slot].take() else {
                continue;
            };
            if self.verdict(platform, blocks, slot, &mut held) == Verdict::Hold {
                self.held[slot] = Some(held);
                continue;
            }
            if let Command::Control(reset) = held.command {
                self.resetting = reset;
            }
            let bit = 1 << slot;
            self.issued |= bit;
            self.task = None;
            self.waits_since = None;
            if held.queued {
                self.port.write(platform, port::SACT, bit);
            }
            self.port.write(platform, port::CI, bit);
        }
    }

    fn verdict<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        slot: usize,
        held: &mut Held,
    ) -> Verdict {
        let end = blocks.visible();
        match held.command {
            Command::Read(sectors) | Command::Write(sectors, _) if sectors.end() > end => {
                self.refuse(platform, slot, held.queued)
            }
            Command::Read(sectors) => blocks.read(sectors),
            Command::Write(sectors, fua) => {
                let verdict = blocks.write(sectors, fua);
                if verdict == Verdict::Pass {
                    self.writes[slot].push(sectors);
                }
                verdict
            }
            Command::Flush => blocks.flush(),
            Command::Trim(count) => self.trim(platform, blocks, slot, count, held),
            Command::Identify => self.identify(platform, blocks, slot),
            Command::Control(_) | Command::Other => Verdict::Pass,
            Command::Refused => self.refuse(platform, slot, held.queued),
        }
    }

    /// Has the device abort a command: by a code that it does not know, or sectors that it has not.
    fn refuse<P: Platform>(&mut self, platform: &mut P, slot: usize, queued: bool) -> Verdict {
        if queued {
            self.replace(platform, slot, &ata::behind_the_end(slot), 512)
        } else {
            self.replace(platform, slot, &ata::bare(ata::ABORTED), 0)
        }
    }

    fn identify<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        slot: usize,
    ) -> Verdict {
        if self.answer.is_some() {
            return Verdict::Hold;
        }
        let mut identity = match core::mem::replace(&mut self.identity, Identity::Wanted) {
            Identity::None | Identity::Wanted => return Verdict::Hold,
            Identity::Known(identity) => {
                self.identity = Identity::None;
                identity
            }
            Identity::Failed => {
                self.identity = Identity::None;
                return self.refuse(platform, slot, false);
            }
        };
        ata::shrink(&mut identity, blocks.visible());
        let header = self.header(platform, slot);
        if !header.is_some_and(|header| scatter(platform, &header, &*identity)) {
            return self.refuse(platform, slot, false);
        }
        self.replace(platform, slot, &ata::bare(ata::IDENTIFY), 512)
    }

    /// Puts a table of the VMM's under the guest's header: a command, and `bytes` of data to nowhere. A command
    /// whose header is not memory of the guest's is never done.
    fn replace<P: Platform>(
        &mut self,
        platform: &mut P,
        slot: usize,
        fis: &Fis,
        bytes: u32,
    ) -> Verdict {
        if self.answer.is_some() {
            return Verdict::Hold;
        }
        let Some(header) = self.header(platform, slot) else {
            return Verdict::Hold;
        };
        let own = platform.own_address();
        put_table(
            platform,
            own_memory::ANSWER,
            fis,
            own_memory::ANSWER_DATA,
            bytes,
        );
        let table = own + offset(own_memory::ANSWER);
        let regions = if bytes == 0 { 0 } else { 1u32 };
        // Of the guest's flags only the length of the FIS, which is 5 words.
        let mut new = [0; 16];
        new[..4].copy_from_slice(&(FIS_WORDS | regions << 16).to_le_bytes());
        new[8..].copy_from_slice(&table.to_le_bytes());
        if !platform.write_memory(header.at, &new) {
            return Verdict::Hold;
        }
        self.answer = Some(Answer {
            slot,
            header: header.at,
            saved: header.bytes,
        });
        Verdict::Pass
    }

    /// All sectors of a TRIM are asked about before it passes; what has passed is not asked about again.
    fn trim<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        slot: usize,
        count: u16,
        held: &mut Held,
    ) -> Verdict {
        // Two that have passed in part would wait for each other if only so many sectors may be written at once.
        let mut others = self.held.iter().zip(&self.writes);
        if others.any(|(held, writes)| held.is_some() && !writes.is_empty()) {
            return Verdict::Hold;
        }
        let sectors = match &mut held.trim {
            Some(sectors) => sectors,
            none => {
                let header = self.header(platform, slot);
                let list = header
                    .filter(|_| count <= ata::MOST_TRIM)
                    .and_then(|header| gather(platform, &header, usize::from(count) * 512));
                let Some(list) = list else {
                    return self.refuse(platform, slot, held.queued);
                };
                let sectors = trimmed(&list);
                let end = blocks.visible();
                if sectors.iter().any(|sectors| sectors.end() > end) {
                    return self.refuse(platform, slot, held.queued);
                }
                none.insert(sectors)
            }
        };
        while let Some(next) = sectors.last() {
            if blocks.write(*next, false) == Verdict::Hold {
                return Verdict::Hold;
            }
            self.writes[slot].extend(sectors.pop());
        }
        Verdict::Pass
    }
}

/// What a TRIM's list names. Entries that go on where the one before ends are one.
fn trimmed(list: &[u8]) -> Vec<Sectors> {
    let mut all: Vec<Sectors> = Vec::new();
    for entry in list.chunks_exact(8) {
        let sectors = entry.try_into().ok().and_then(ata::trimmed);
        match (sectors, all.last_mut()) {
            (Some(sectors), _) if sectors.is_empty() => {}
            (Some(sectors), Some(last)) if last.end() == sectors.start => {
                last.count += sectors.count;
            }
            (Some(sectors), _) => all.push(sectors),
            (None, _) => {}
        }
    }
    all
}

fn fis<P: Platform>(platform: &mut P, header: &Header) -> Option<Fis> {
    let mut fis = [0; 20];
    platform
        .read_memory(header.table(), &mut fis)
        .then_some(fis)
}

/// The pieces of memory of a command, as many as make `bytes` bytes.
///
/// There are at most as many as bytes: an entry has one or more.
fn pieces<P: Platform>(
    platform: &mut P,
    header: &Header,
    bytes: usize,
) -> Option<Vec<(u64, usize)>> {
    let mut pieces = Vec::new();
    let mut left = bytes;
    for number in 0..header.regions() {
        if left == 0 {
            break;
        }
        let mut entry = [0; 16];
        let at = header.table().checked_add(REGIONS + number * REGION)?;
        if !platform.read_memory(at, &mut entry) {
            return None;
        }
        let base = u64::from_le_bytes(entry[..8].try_into().ok()?);
        let length = u32::from_le_bytes(entry[12..].try_into().ok()?) & 0x3f_ffff;
        let length = left.min(usize::try_from(length).ok()? + 1);
        pieces.push((base, length));
        left -= length;
    }
    (left == 0).then_some(pieces)
}

/// Writes a command's data to the guest's memory.
fn scatter<P: Platform>(platform: &mut P, header: &Header, data: &[u8]) -> bool {
    let Some(pieces) = pieces(platform, header, data.len()) else {
        return false;
    };
    let mut data = data;
    pieces.into_iter().all(|(base, length)| {
        let (now, later) = data.split_at(length);
        data = later;
        platform.write_memory(base, now)
    })
}

/// Reads a command's data out of the guest's memory.
fn gather<P: Platform>(platform: &mut P, header: &Header, bytes: usize) -> Option<Vec<u8>> {
    let mut data = alloc::vec![0; bytes];
    let mut place = &mut data[..];
    for (base, length) in pieces(platform, header, bytes)? {
        let (now, later) = place.split_at_mut(length);
        place = later;
        if !platform.read_memory(base, now) {
            return None;
        }
    }
    Some(data)
}

/// Writes a command table into the VMM's memory at `at`, with at most one piece of data there at `data`.
pub(super) fn put_table<P: Platform>(
    platform: &mut P,
    at: usize,
    fis: &Fis,
    data: usize,
    bytes: u32,
) {
    let address = platform.own_address() + offset(data);
    let Some(table) = platform.own_memory().get_mut(at..at + 0x90) else {
        return;
    };
    table.fill(0);
    table[..20].copy_from_slice(fis);
    table[0x80..0x88].copy_from_slice(&address.to_le_bytes());
    table[0x8c..].copy_from_slice(&bytes.saturating_sub(1).to_le_bytes());
}

pub(super) fn offset(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(0)
}
