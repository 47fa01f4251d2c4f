//! The guest's commands.

use alloc::vec::Vec;

use bmcast_image::Sectors;

use super::registers::port;
use super::{Ahci, Held, QUIET, SLOTS, own_memory};
use crate::ata::{self, Command, Fis};
use crate::{Blocks, Platform, Verdict};

/// Bytes of a command's header in a list (4.2.2).
const HEADER: u64 = 32;
/// Bytes from a table's begin to its list of memory (4.2.3).
const REGIONS: u64 = 0x80;
/// Bytes of an entry of it.
const REGION: u64 = 16;
/// Blocks of 512 bytes that a TRIM may list: as many as fit one page, which is what Linux sends at most.
const MOST_TRIM: u16 = 8;

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

    fn is_packet(&self) -> bool {
        self.word(0) & 1 << 5 != 0
    }
}

impl Ahci {
    /// The guest issues commands.
    pub(super) fn take<P: Platform>(&mut self, platform: &mut P, bits: u32) {
        let new = bits & !self.issued & !self.held_bits().0;
        for slot in (0..SLOTS).filter(|slot| new & 1 << slot != 0) {
            let queued = self.queued_next & 1 << slot != 0;
            self.queued_next &= !(1 << slot);
            let command = match self.header(platform, slot) {
                Some(header) if header.is_packet() => Command::Other,
                Some(header) => fis(platform, &header).map_or(Command::Refused, |fis| {
                    // A FIS that only sets the device's control register is no command.
                    if fis[1] & 0x80 == 0 {
                        Command::Other
                    } else {
                        ata::decode(&fis)
                    }
                }),
                None => Command::Refused,
            };
            self.held[slot] = Some(Held { command, queued });
        }
        self.last_used = platform.now();
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
        let active = self.port.read(platform, port::CI) | self.port.read(platform, port::SACT);
        self.observe(platform, blocks, active);
        self.issue(platform, blocks, active);
        if self.next.is_none() {
            let held = self.held.iter().any(Option::is_some);
            let since = platform.now().saturating_sub(self.last_used);
            let quiet = !held && self.issued == 0 && since > QUIET;
            self.next = blocks.next(quiet);
        }
        if self.issued == 0 {
            self.begin(platform, blocks);
        }
    }

    /// Commands that are on the device no more.
    fn observe<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        active: u32,
    ) {
        let done = self.issued & !active;
        self.issued &= active;
        for slot in (0..SLOTS).filter(|slot| done & 1 << slot != 0) {
            if let Some(sectors) = self.writes[slot].take() {
                blocks.written(sectors);
            }
            if let Some(answer) = self.answer.take_if(|answer| answer.slot == slot) {
                // A list that is memory no more needs it no more.
                let _ = platform.write_memory(answer.header, &answer.saved);
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
        // The VMM's own turn comes when these are done.
        if self.next.is_some() && active != 0 {
            return;
        }
        for slot in 0..SLOTS {
            let Some(held) = self.held[slot] else {
                continue;
            };
            let end = blocks.visible();
            let verdict = match held.command {
                Command::Read(sectors) | Command::Write(sectors, _) if sectors.end() > end => {
                    self.refuse(platform, slot)
                }
                Command::Read(sectors) => blocks.read(sectors),
                Command::Write(sectors, fua) => {
                    let verdict = blocks.write(sectors, fua);
                    if verdict == Verdict::Pass {
                        self.writes[slot] = Some(sectors);
                    }
                    verdict
                }
                Command::Flush => blocks.flush(),
                Command::Trim(count) => self.trim(platform, blocks, slot, count),
                Command::Identify => self.identify(platform, blocks, slot),
                Command::Other => Verdict::Pass,
                Command::Refused => self.refuse(platform, slot),
            };
            if verdict == Verdict::Hold {
                continue;
            }
            let bit = 1 << slot;
            self.held[slot] = None;
            self.issued |= bit;
            if held.queued {
                self.port.write(platform, port::SACT, bit);
            }
            self.port.write(platform, port::CI, bit);
        }
    }

    /// Has the device abort a command, by a code that it does not know.
    fn refuse<P: Platform>(&mut self, platform: &mut P, slot: usize) -> Verdict {
        let mut fis = [0; 20];
        fis[..3].copy_from_slice(&[0x27, 0x80, ata::ABORTED]);
        self.replace(platform, slot, &fis, 0)
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
        let Some(identity) = &self.identity else {
            self.identity_wanted = true;
            return Verdict::Hold;
        };
        let mut identity = **identity;
        ata::shrink(&mut identity, blocks.visible());
        let Some(header) = self.header(platform, slot) else {
            return self.refuse(platform, slot);
        };
        if !scatter(platform, &header, &identity) {
            return self.refuse(platform, slot);
        }
        let mut fis: Fis = [0; 20];
        fis[..3].copy_from_slice(&[0x27, 0x80, ata::IDENTIFY]);
        self.replace(platform, slot, &fis, 512)
    }

    /// Puts a table of the VMM's under the guest's header: a command, and `bytes` of data to nowhere.
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
            // There is no list: the device finds that out by itself.
            return Verdict::Pass;
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
        new[..4].copy_from_slice(&(5 | regions << 16).to_le_bytes());
        new[8..].copy_from_slice(&table.to_le_bytes());
        if !platform.write_memory(header.at, &new) {
            return Verdict::Pass;
        }
        self.answer = Some(Answer {
            slot,
            header: header.at,
            saved: header.bytes,
        });
        Verdict::Pass
    }

    fn trim<P: Platform, B: Blocks + ?Sized>(
        &mut self,
        platform: &mut P,
        blocks: &mut B,
        slot: usize,
        count: u16,
    ) -> Verdict {
        let header = self.header(platform, slot);
        let list = header
            .filter(|_| count <= MOST_TRIM)
            .and_then(|header| gather(platform, &header, usize::from(count) * 512));
        let Some(list) = list else {
            return self.refuse(platform, slot);
        };
        let entries = list.chunks_exact(8).filter_map(|entry| {
            let sectors = ata::trimmed(entry.try_into().ok()?)?;
            (!sectors.is_empty()).then_some(sectors)
        });
        let sectors: Vec<Sectors> = entries.collect();
        let end = blocks.visible();
        if sectors.iter().any(|sectors| sectors.end() > end) {
            return self.refuse(platform, slot);
        }
        for sectors in sectors {
            if blocks.write(sectors, false) == Verdict::Hold {
                return Verdict::Hold;
            }
            // What the device makes of them is the guest's affair from here on.
            blocks.written(sectors);
        }
        Verdict::Pass
    }
}

fn fis<P: Platform>(platform: &mut P, header: &Header) -> Option<Fis> {
    let mut fis = [0; 20];
    platform
        .read_memory(header.table(), &mut fis)
        .then_some(fis)
}

/// The pieces of memory of a command, as many as make `bytes` bytes.
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
