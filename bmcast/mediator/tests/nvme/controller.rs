//! An NVMe controller with one namespace (NVMe 1.4), which does something only when it is told to, or once in so many
//! accesses; and which knows what must not happen.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};

use bmcast_mediator::{OWN_MEMORY, Platform};

pub const MEMORY: usize = 8 << 20;
pub const OWN: u64 = 0x1_0000_0000;
/// Sectors of the disk.
pub const DISK: u64 = 320;
/// What a disk has that nobody has written yet.
pub const GARBAGE: u8 = 0xee;
pub const NSID: u32 = 1;

pub const CAP: u32 = 0;
pub const CC: u32 = 0x14;
pub const CSTS: u32 = 0x1c;
pub const AQA: u32 = 0x24;
pub const ASQ: u32 = 0x28;
pub const ACQ: u32 = 0x30;
pub const CMBSZ: u32 = 0x3c;

pub const INVALID_OPCODE: u16 = 0x01;
const INVALID_FIELD: u16 = 0x02;
const SEQUENCE: u16 = 0x0c;
pub const LBA_RANGE: u16 = 0x80;
const INVALID_CQ: u16 = 0x100;
pub const INVALID_QUEUE: u16 = 0x101;
const MEDIA: u16 = 0x281;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sq {
    base: u64,
    size: u32,
    pub head: u32,
    pub tail: u32,
    cq: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cq {
    base: u64,
    size: u32,
    pub head: u32,
    pub tail: u32,
    pub phase: bool,
    vector: Option<u16>,
}

#[derive(Clone, Debug)]
struct Running {
    queue: u16,
    entry: [u8; 64],
}

pub struct Controller {
    pub memory: Vec<u8>,
    own: Vec<u8>,
    pub stride: u32,
    pub ratio: u64,
    /// MDTS.
    pub most: u8,
    /// Pairs of I/O queues.
    pub pairs: u16,
    cc: u32,
    csts: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    pub sqs: BTreeMap<u16, Sq>,
    pub cqs: BTreeMap<u16, Cq>,
    running: Vec<Running>,
    /// Steps until it is ready, or is not any more.
    pub slowness: u32,
    changing: Option<u32>,
    pub disk: Vec<u8>,
    /// Sectors that somebody has written, or may have.
    pub fresh: Vec<bool>,
    clock: Cell<u64>,
    /// It does something by itself after so many accesses.
    pub eager: u32,
    accesses: u32,
    /// So many commands of the VMM's fail.
    pub fail_own: u32,
    pub own_commands: u32,
    pub admin_commands: u32,
    pub interrupts: BTreeSet<u16>,
    /// It knows of a feature that was set.
    pub queues_asked: u32,
    /// Sectors that the guest has written or discarded.
    pub guests: Vec<bool>,
    /// Nothing happens that a guest makes happen only if it wants to.
    pub is_strict: bool,
    nowhere: Vec<u8>,
}

/// What a sector has: 0 is what a discarded one has.
pub fn content(stamp: u8, sector: u64) -> [u8; 512] {
    let mut data = [stamp; 512];
    if stamp != 0 {
        data[..8].copy_from_slice(&sector.to_le_bytes());
    }
    data
}

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap()
}

fn dword(entry: &[u8], n: usize) -> u32 {
    u32::from_le_bytes(entry[n * 4..n * 4 + 4].try_into().unwrap())
}

fn long(entry: &[u8], n: usize) -> u64 {
    u64::from_le_bytes(entry[n * 4..n * 4 + 8].try_into().unwrap())
}

impl Controller {
    pub fn new(ratio: u64) -> Self {
        let sectors = (0..DISK).flat_map(|n| content(GARBAGE, n));
        Self {
            memory: vec![0; MEMORY],
            own: vec![0; OWN_MEMORY],
            stride: 4,
            ratio,
            most: 5,
            pairs: 8,
            cc: 0,
            csts: 0,
            aqa: 0,
            asq: 0,
            acq: 0,
            sqs: BTreeMap::new(),
            cqs: BTreeMap::new(),
            running: Vec::new(),
            slowness: 3,
            changing: None,
            disk: sectors.collect(),
            fresh: vec![false; index(DISK)],
            clock: Cell::new(0),
            eager: 1,
            accesses: 0,
            fail_own: 0,
            own_commands: 0,
            admin_commands: 0,
            interrupts: BTreeSet::new(),
            queues_asked: 0,
            guests: vec![false; index(DISK)],
            is_strict: true,
            nowhere: vec![0; 1 << 20],
        }
    }

    pub fn pass(&self, micros: u64) {
        self.clock.set(self.clock.get() + micros);
    }

    pub fn is_own(queue: &Sq) -> bool {
        queue.base >= OWN
    }

    fn at(&mut self, address: u64, length: usize) -> &mut [u8] {
        let has = |offset: u64, bytes: usize| index(offset).saturating_add(length) <= bytes;
        match address.checked_sub(OWN) {
            Some(offset) if has(offset, OWN_MEMORY) => &mut self.own[index(offset)..][..length],
            None if has(address, MEMORY) => &mut self.memory[index(address)..][..length],
            _ => {
                assert!(!self.is_strict, "no memory at {address:#x}");
                &mut self.nowhere[..length]
            }
        }
    }

    /// Where a command's data are (4.3).
    fn pieces(&mut self, entry: &[u8; 64], bytes: usize) -> Vec<(u64, usize)> {
        let (first, second) = (long(entry, 6), long(entry, 8));
        let now = bytes.min(4096 - index(first % 4096));
        let mut pieces = vec![(first, now)];
        let mut left = bytes - now;
        if left > 4096 {
            let mut at = second;
            assert!(
                !self.is_strict || at % 4096 == 0,
                "a list that begins within a page"
            );
            while left > 0 {
                let page = long(self.at(at, 8), 0);
                assert!(!self.is_strict || page.is_multiple_of(4096));
                pieces.push((page, left.min(4096)));
                left -= left.min(4096);
                at += 8;
            }
        } else if left > 0 {
            assert!(!self.is_strict || second.is_multiple_of(4096));
            pieces.push((second, left));
        }
        pieces
    }

    fn scatter(&mut self, entry: &[u8; 64], data: &[u8]) {
        let mut data = data;
        for (at, length) in self.pieces(entry, data.len()) {
            let (now, later) = data.split_at(length);
            self.at(at, length).copy_from_slice(now);
            data = later;
        }
    }

    fn gather(&mut self, entry: &[u8; 64], bytes: usize) -> Vec<u8> {
        let pieces = self.pieces(entry, bytes);
        let data = pieces
            .into_iter()
            .flat_map(|(at, length)| self.at(at, length).to_vec());
        data.collect()
    }

    fn tick(&mut self) {
        self.accesses += 1;
        if self.eager != 0 && self.accesses.is_multiple_of(self.eager) {
            self.step(self.accesses as usize, false);
        }
    }

    /// Writes of the guest's that are given up, of one queue or all, count as done: by no means have their sectors what
    /// the image has.
    fn abort(&mut self, queue: Option<u16>) {
        let is_wanted = |id: u16| id != 0 && queue.is_none_or(|wanted| wanted == id);
        let mut given_up: Vec<[u8; 64]> = Vec::new();
        for (id, sq) in self.sqs.clone() {
            if !is_wanted(id) || Self::is_own(&sq) {
                continue;
            }
            let of_it = self.running.iter().filter(|running| running.queue == id);
            given_up.extend(of_it.map(|running| running.entry));
            let mut head = sq.head;
            while head != sq.tail {
                let at = sq.base + u64::from(head) * 64;
                given_up.push(self.at(at, 64).try_into().unwrap());
                head = (head + 1) % sq.size;
            }
        }
        for entry in given_up {
            let count = u64::from(dword(&entry, 12) & 0xffff) + 1;
            let mut ranges = Vec::new();
            if matches!(entry[0], 0x01 | 0x08) {
                ranges.push((long(&entry, 10), count));
            } else if entry[0] == 0x09 {
                let list = self.gather(&entry, (index(dword(&entry, 10).into()) + 1) * 16);
                let named = list.chunks(16);
                ranges.extend(named.map(|range| (long(range, 2), dword(range, 1).into())));
            }
            for (start, count) in ranges {
                if let Some(sectors) = self.range(start, count) {
                    self.fresh[index(sectors.start)..index(sectors.end)].fill(true);
                }
            }
        }
    }

    /// What of the guest's is being written.
    pub fn writes(&self) -> Vec<bmcast_image::Sectors> {
        let guests = self
            .running
            .iter()
            .filter(|running| running.queue != 0 && !Self::is_own(&self.sqs[&running.queue]));
        let writes = guests.filter(|running| matches!(running.entry[0], 0x01 | 0x08));
        let sectors = writes.filter_map(|running| {
            let count = u64::from(dword(&running.entry, 12) & 0xffff) + 1;
            let range = self.range(long(&running.entry, 10), count)?;
            let count = range.end - range.start;
            let start = range.start;
            Some(bmcast_image::Sectors { start, count })
        });
        sectors.collect()
    }

    /// Does one thing, if there is something to do.
    pub fn step(&mut self, which: usize, fails: bool) -> bool {
        if let Some(left) = &mut self.changing {
            *left = left.saturating_sub(1);
            if *left == 0 {
                self.changing = None;
                if self.cc & 1 != 0 {
                    self.enable();
                } else {
                    self.csts &= !1;
                    self.abort(None);
                    self.sqs.clear();
                    self.cqs.clear();
                    self.running.clear();
                    self.interrupts.clear();
                }
            } else if self.cc & 1 == 0 && !self.running.is_empty() {
                // What it is at may be done yet, and nobody is told.
                let running = self.running.swap_remove(which % self.running.len());
                self.execute(&running, fails);
            }
            return true;
        }
        if self.csts & 1 == 0 {
            return false;
        }
        let ready: Vec<u16> = self
            .sqs
            .iter()
            .filter_map(|(id, sq)| (sq.head != sq.tail).then_some(*id))
            .collect();
        let done: Vec<usize> = (0..self.running.len())
            .filter(|n| self.has_room(self.running[*n].queue))
            .collect();
        let choices = ready.len() + done.len();
        if choices == 0 {
            return false;
        }
        let choice = which % choices;
        if choice < ready.len() {
            let queue = ready[choice];
            let sq = self.sqs.get_mut(&queue).unwrap();
            let at = sq.base + u64::from(sq.head) * 64;
            sq.head = (sq.head + 1) % sq.size;
            let entry = self.at(at, 64).try_into().unwrap();
            self.running.push(Running { queue, entry });
        } else {
            let running = self.running.remove(done[choice - ready.len()]);
            let (status, result) = self.execute(&running, fails);
            self.post(&running, status, result);
        }
        true
    }

    fn has_room(&self, queue: u16) -> bool {
        let cq = &self.cqs[&self.sqs[&queue].cq];
        (cq.tail + 1) % cq.size != cq.head
    }

    fn post(&mut self, running: &Running, status: u16, result: u32) {
        // The queue may be gone by this very command.
        let Some(sq) = self.sqs.get(&running.queue) else {
            return;
        };
        let (cq_id, head) = (sq.cq, sq.head);
        let cq = self.cqs.get_mut(&cq_id).unwrap();
        let at = cq.base + u64::from(cq.tail) * 16;
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&result.to_le_bytes());
        bytes[4..8].fill(0xcd);
        bytes[8..10].copy_from_slice(&u16::try_from(head).unwrap().to_le_bytes());
        bytes[10..12].copy_from_slice(&running.queue.to_le_bytes());
        bytes[12..14].copy_from_slice(&running.entry[2..4]);
        bytes[14..].copy_from_slice(&(status << 1 | u16::from(cq.phase)).to_le_bytes());
        cq.tail = (cq.tail + 1) % cq.size;
        if cq.tail == 0 {
            cq.phase = !cq.phase;
        }
        self.interrupts.extend(cq.vector);
        self.at(at, 16).copy_from_slice(&bytes);
    }

    fn enable(&mut self) {
        self.csts |= 1;
        let sq = Sq {
            base: self.asq,
            size: (self.aqa & 0xfff) + 1,
            head: 0,
            tail: 0,
            cq: 0,
        };
        let cq = Cq {
            base: self.acq,
            size: (self.aqa >> 16) + 1,
            head: 0,
            tail: 0,
            phase: true,
            vector: Some(0),
        };
        self.sqs.insert(0, sq);
        self.cqs.insert(0, cq);
    }

    fn execute(&mut self, running: &Running, fails: bool) -> (u16, u32) {
        if running.queue == 0 {
            self.admin_commands += 1;
            return self.administer(&running.entry);
        }
        let own = Self::is_own(&self.sqs[&running.queue]);
        if own {
            self.own_commands += 1;
            if self.fail_own > 0 {
                self.fail_own -= 1;
                return (MEDIA, 0);
            }
        }
        (self.transfer(&running.entry, own, fails && !own), 0)
    }

    fn administer(&mut self, entry: &[u8; 64]) -> (u16, u32) {
        let (ten, eleven) = (dword(entry, 10), dword(entry, 11));
        let [id, high] = [ten, ten >> 16].map(|half| u16::try_from(half & 0xffff).unwrap());
        let ring = (long(entry, 6), u32::from(high) + 1);
        let is_new = |taken: bool| id != 0 && id <= self.pairs && !taken;
        match entry[0] {
            0x00 if id != 0 && self.sqs.contains_key(&id) => {
                self.abort(Some(id));
                self.running.retain(|running| running.queue != id);
                self.sqs.remove(&id);
                (0, 0)
            }
            0x01 if is_new(self.sqs.contains_key(&id)) => {
                let cq = u16::try_from(eleven >> 16).unwrap();
                if cq == 0 || !self.cqs.contains_key(&cq) {
                    return (INVALID_CQ, 0);
                }
                let (base, size) = ring;
                let (head, tail) = (0, 0);
                self.sqs.insert(
                    id,
                    Sq {
                        base,
                        size,
                        head,
                        tail,
                        cq,
                    },
                );
                (0, 0)
            }
            0x04 if id != 0 && self.cqs.contains_key(&id) => {
                if self.sqs.values().any(|sq| sq.cq == id) {
                    return (0x10c, 0);
                }
                self.cqs.remove(&id);
                (0, 0)
            }
            0x05 if is_new(self.cqs.contains_key(&id)) => {
                let sizes = self.cc >> 16 & 0xff;
                assert!(!self.is_strict || sizes == 0x46, "entries have no size yet");
                let vector = (eleven & 2 != 0).then_some(u16::try_from(eleven >> 16).unwrap());
                let cq = Cq {
                    base: ring.0,
                    size: ring.1,
                    head: 0,
                    tail: 0,
                    phase: true,
                    vector,
                };
                self.cqs.insert(id, cq);
                (0, 0)
            }
            0x00 | 0x01 | 0x04 | 0x05 => (INVALID_QUEUE, 0),
            0x06 => {
                let identity = match (ten & 0xff, dword(entry, 1)) {
                    (1, _) => self.identity(),
                    (0, NSID) => self.namespace(),
                    _ => return (INVALID_FIELD, 0),
                };
                self.scatter(entry, &identity);
                (0, 0)
            }
            0x08 => (0, 1),
            0x09 | 0x0a if ten & 0xff == 7 => {
                if entry[0] == 9 {
                    if self.sqs.len() > 1 || self.cqs.len() > 1 {
                        return (SEQUENCE, 0);
                    }
                    self.queues_asked = eleven;
                }
                let most = u32::from(self.pairs) - 1;
                (0, most << 16 | most)
            }
            0x0a => (0, 0),
            0x80 | 0x84 | 0x10 | 0x11 | 0x0d | 0x15 | 0x7c | 0x81 => {
                assert!(!self.is_strict, "what is to be refused: {:#x}", entry[0]);
                (INVALID_OPCODE, 0)
            }
            _ => (INVALID_OPCODE, 0),
        }
    }

    fn identity(&self) -> Vec<u8> {
        let mut identity = vec![0; 4096];
        identity[77] = self.most;
        identity[256..258].fill(0xff);
        identity[520..522].fill(0xff);
        identity[522] = 1;
        identity
    }

    fn namespace(&self) -> Vec<u8> {
        let mut namespace = vec![0; 4096];
        let blocks = (DISK / self.ratio).to_le_bytes();
        for at in [0, 8, 16] {
            namespace[at..at + 8].copy_from_slice(&blocks);
        }
        namespace[26] = 2;
        namespace[128 + 10] = u8::try_from((self.ratio * 512).ilog2()).unwrap();
        namespace
    }

    fn range(&self, start: u64, count: u64) -> Option<std::ops::Range<u64>> {
        let end = start.checked_add(count)?;
        (end <= DISK / self.ratio).then(|| start * self.ratio..end * self.ratio)
    }

    fn transfer(&mut self, entry: &[u8; 64], own: bool, fails: bool) -> u16 {
        let twelve = dword(entry, 12);
        let sectors = self.range(long(entry, 10), u64::from(twelve & 0xffff) + 1);
        assert!(!self.is_strict || entry[1] & 3 == 0, "fused");
        match entry[0] {
            0x00 => {}
            0x01 | 0x02 | 0x05 | 0x08 => {
                let Some(sectors) = sectors else {
                    return LBA_RANGE;
                };
                let bytes = index((sectors.end - sectors.start) * 512);
                if self.most != 0 && entry[0] < 5 && bytes > 4096 << self.most {
                    return INVALID_FIELD;
                }
                let range = index(sectors.start * 512)..index(sectors.end * 512);
                if entry[0] == 0x02 || entry[0] == 0x05 {
                    assert!(!own);
                    for n in sectors {
                        let is_there = self.fresh[index(n)] || !self.is_strict;
                        assert!(is_there, "sector {n} is read and is not there");
                    }
                    if fails {
                        return MEDIA;
                    }
                    if entry[0] == 0x02 {
                        let data = self.disk[range].to_vec();
                        self.scatter(entry, &data);
                    }
                    return 0;
                }
                if fails {
                    // Some of it may be there.
                    self.fresh[index(sectors.start)..index(sectors.end)].fill(true);
                    return MEDIA;
                }
                let data = if entry[0] == 0x08 {
                    vec![0; bytes]
                } else {
                    self.gather(entry, bytes)
                };
                for guests in &mut self.guests[index(sectors.start)..index(sectors.end)] {
                    assert!(!own || !*guests || !self.is_strict, "the guest's");
                    *guests |= !own;
                }
                self.disk[range].copy_from_slice(&data);
                self.fresh[index(sectors.start)..index(sectors.end)].fill(true);
            }
            0x09 => {
                let list = self.gather(entry, (index(dword(entry, 10).into()) + 1) * 16);
                for range in list.chunks(16) {
                    let sectors = self.range(long(range, 2), dword(range, 1).into());
                    let Some(sectors) = sectors else {
                        return LBA_RANGE;
                    };
                    self.disk[index(sectors.start * 512)..index(sectors.end * 512)].fill(0);
                    self.guests[index(sectors.start)..index(sectors.end)].fill(true);
                    self.fresh[index(sectors.start)..index(sectors.end)].fill(true);
                }
            }
            _ => return INVALID_OPCODE,
        }
        if fails { MEDIA } else { 0 }
    }

    /// A register as it is.
    pub fn get(&self, offset: u32) -> u32 {
        let half = |value: u64, shift: u32| u32::try_from(value >> shift & 0xffff_ffff).unwrap();
        match offset {
            CAP => 0xff,
            4 => (self.stride.ilog2() - 2) | 1 << 25,
            CC => self.cc,
            CSTS => self.csts,
            AQA => self.aqa,
            ASQ => half(self.asq, 0),
            0x2c => half(self.asq, 32),
            ACQ => half(self.acq, 0),
            0x34 => half(self.acq, 32),
            CMBSZ => 0x1001,
            _ => 0,
        }
    }

    fn set(&mut self, offset: u32, value: u32) {
        let halves = |old: u64, at: u32| {
            let keep = old & !(0xffff_ffff << at);
            keep | u64::from(value) << at
        };
        match offset {
            CC => {
                if (self.cc ^ value) & 1 != 0 {
                    self.changing = Some(self.slowness.max(1));
                }
                self.cc = value;
                if value & 3 << 14 != 0 {
                    self.csts |= 2 << 2;
                }
            }
            AQA => self.aqa = value,
            ASQ => self.asq = halves(self.asq, 0),
            0x2c => self.asq = halves(self.asq, 32),
            ACQ => self.acq = halves(self.acq, 0),
            0x34 => self.acq = halves(self.acq, 32),
            0x1000.. => {
                let number = (offset - 0x1000) / self.stride;
                let queue = u16::try_from(number / 2).unwrap();
                let is_right = self.csts & 1 == 1
                    && match number % 2 {
                        0 => self.sqs.get(&queue).is_some_and(|sq| value < sq.size),
                        _ => self.cqs.get(&queue).is_some_and(|cq| value < cq.size),
                    };
                assert!(
                    is_right || !self.is_strict,
                    "a doorbell: {offset:#x}, {value}"
                );
                if !is_right {
                    return;
                }
                if number.is_multiple_of(2) {
                    self.sqs.get_mut(&queue).unwrap().tail = value;
                } else {
                    self.cqs.get_mut(&queue).unwrap().head = value;
                }
            }
            _ => {}
        }
    }
}

impl Platform for Controller {
    fn read_register(&mut self, offset: u32, width: u8) -> u64 {
        assert_eq!((width, offset % 4), (4, 0));
        self.tick();
        self.get(offset).into()
    }

    fn write_register(&mut self, offset: u32, width: u8, value: u64) {
        let half = |shift: u32| u32::try_from(value >> shift & 0xffff_ffff).unwrap();
        self.set(offset, half(0));
        if width == 8 {
            self.set(offset + 4, half(32));
        }
        self.tick();
    }

    fn read_memory(&mut self, address: u64, into: &mut [u8]) -> bool {
        self.tick();
        let Some(end) = address.checked_add(into.len() as u64) else {
            return false;
        };
        if end > MEMORY as u64 {
            return false;
        }
        into.copy_from_slice(self.at(address, into.len()));
        true
    }

    fn write_memory(&mut self, address: u64, from: &[u8]) -> bool {
        let Some(end) = address.checked_add(from.len() as u64) else {
            return false;
        };
        if end > MEMORY as u64 {
            return false;
        }
        self.at(address, from.len()).copy_from_slice(from);
        true
    }

    fn own_address(&self) -> u64 {
        OWN
    }

    fn own_memory(&mut self) -> &mut [u8] {
        self.tick();
        &mut self.own
    }

    fn now(&self) -> u64 {
        self.pass(1);
        self.clock.get()
    }
}
