//! A machine: the controller, what is on its disk, the mediator between it and a driver, and that driver. It looks at its
//! queues when it is interrupted, or polls.

use std::collections::{BTreeMap, BTreeSet};

use bmcast_image::Sectors;
use bmcast_mediator::{Mediator, Nvme, Platform as _};

use super::blocks::{self, Oracle, VISIBLE};
use super::controller::*;

/// Most sectors of a command.
pub const MOST: u64 = 24;
const OF_IMAGE: u8 = 0x11;
const ADMIN: u64 = 0x1000;
const IO: u64 = 0x1_0000;
const DATA: u64 = 0x4_0000;
const ROOM: u64 = 0x4000;
const ROOMS: u64 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Compare,
    Write,
    Fua,
    Zeros,
    Discard,
    Flush,
    /// One that is to be refused.
    Strange,
}

#[derive(Clone, Debug)]
pub struct Command {
    pub kind: Kind,
    pub sectors: Vec<Sectors>,
    stamp: u8,
    must_fail: Option<u16>,
}

/// A pair of queues as a driver has it.
#[derive(Clone, Debug)]
pub struct Queue {
    id: u16,
    sq: (u64, u32),
    cq: (u64, u32),
    tail: u32,
    /// What the controller has said of its head.
    head: u32,
    next: u32,
    phase: bool,
    pub next_cid: u16,
    pub outstanding: BTreeMap<u16, Command>,
    answers: Vec<(u16, u16, u32)>,
}

impl Queue {
    fn new(id: u16, base: u64, sq: u32, cq: u32) -> Self {
        Self {
            id,
            sq: (base, sq),
            cq: (base + 0x4000, cq),
            tail: 0,
            head: 0,
            next: 0,
            phase: true,
            next_cid: 0,
            outstanding: BTreeMap::new(),
            answers: Vec::new(),
        }
    }
}

pub struct World {
    pub device: Controller,
    pub blocks: Oracle,
    /// None once it has left.
    pub mediator: Option<Nvme>,
    pub queues: Vec<Queue>,
    known: Vec<BTreeSet<u8>>,
    stamp: u8,
    pub done: u32,
    pub failed: u32,
    pub dropped: u32,
    pub by_interrupt: bool,
}

fn index(n: u64) -> usize {
    usize::try_from(n).unwrap()
}

fn set(entry: &mut [u8; 64], n: usize, value: u32) {
    entry[n * 4..n * 4 + 4].copy_from_slice(&value.to_le_bytes());
}

fn set_long(entry: &mut [u8; 64], n: usize, value: u64) {
    entry[n * 4..n * 4 + 8].copy_from_slice(&value.to_le_bytes());
}

impl World {
    pub fn new(ratio: u64, stride: u32) -> Self {
        let mut device = Controller::new(ratio);
        device.stride = stride;
        // Behind the image the disk has what it had.
        device.fresh[index(blocks::IMAGE)..].fill(true);
        let window = Nvme::window(device.get(4));
        Self {
            device,
            blocks: Oracle::new(),
            mediator: Some(Nvme::new(NSID, window)),
            queues: Vec::new(),
            known: (0..DISK)
                .map(|n| BTreeSet::from([if n < blocks::IMAGE { OF_IMAGE } else { GARBAGE }]))
                .collect(),
            stamp: 0x11,
            done: 0,
            failed: 0,
            dropped: 0,
            by_interrupt: false,
        }
    }

    pub fn read(&mut self, offset: u32) -> u32 {
        u32::try_from(self.read_width(offset, 4)).unwrap()
    }

    pub fn read_width(&mut self, offset: u32, width: u8) -> u64 {
        let value = match &mut self.mediator {
            Some(mediator) => mediator.read(&mut self.device, &mut self.blocks, offset, width),
            None => self.device.read_register(offset, 4),
        };
        self.check();
        value
    }

    pub fn write_width(&mut self, offset: u32, width: u8, value: u64) {
        match &mut self.mediator {
            Some(mediator) => {
                mediator.write(&mut self.device, &mut self.blocks, offset, width, value);
            }
            None => self.device.write_register(offset, width, value),
        }
        self.check();
    }

    pub fn write(&mut self, offset: u32, value: u32) {
        self.write_width(offset, 4, value.into());
    }

    pub fn poll(&mut self) {
        if let Some(mediator) = &mut self.mediator {
            mediator.poll(&mut self.device, &mut self.blocks);
        }
        self.check();
    }

    /// What the mediator has said of writes is not sooner than it is so.
    fn check(&self) {
        if self.mediator.is_none() || !self.device.is_strict {
            return;
        }
        for sectors in self.device.writes() {
            let known = self.blocks.guest.contains(&sectors);
            assert!(known, "{sectors:?} is still being written");
        }
    }

    /// Enables the controller, with admin queues of these sizes, and creates pairs of queues.
    pub fn start(&mut self, admin: (u32, u32), pairs: u16, size: u32) {
        self.device.memory[..index(DATA)].fill(0);
        // What a driver may have there already, of the wrong phase.
        self.device.memory[index(ADMIN)..index(ADMIN) + 64].fill(0x5a);
        let queue = Queue::new(0, ADMIN, admin.0, admin.1);
        let before = self.device.memory[..index(DATA)].to_vec();
        self.write(AQA, (admin.0 - 1) | (admin.1 - 1) << 16);
        self.write_width(ASQ, 8, queue.sq.0);
        self.write(ACQ, u32::try_from(queue.cq.0).unwrap());
        self.write(ACQ + 4, 0);
        self.write(CC, 0x46_0001);
        for tries in 0.. {
            assert!(tries < 100_000, "it does not become ready");
            if self.read(CSTS) & 3 != 0 {
                break;
            }
            self.device.pass(50);
        }
        assert_eq!(self.read(CSTS) & 3, 1);
        assert!(
            self.device.memory[..index(DATA)] == before,
            "memory of the guest's was changed"
        );
        let (sq, cq) = (&self.device.sqs[&0], &self.device.cqs[&0]);
        assert_eq!((sq.head, sq.tail), (0, 0));
        assert_eq!((cq.head, cq.tail, cq.phase), (0, 0, true));
        self.queues = vec![queue];
        self.device.interrupts.clear();
        self.identify();
        // As many as there can be.
        let (status, most) = self.admin(0x09, 0, 0, 7, 0xfffe_fffe);
        assert_eq!(status, 0);
        let most = most & 0xffff;
        if self.mediator.is_some() {
            assert_eq!(most, u32::from(self.device.pairs) - 2);
            assert_ne!(self.device.queues_asked, 0);
        }
        for id in 1..=pairs {
            assert!(u32::from(id) <= most + 1);
            self.create(id, size);
        }
    }

    pub fn create(&mut self, id: u16, size: u32) {
        let queue = Queue::new(id, IO + u64::from(id) * 0x8000, size, size);
        self.device.memory[index(queue.cq.0)..][..0x4000].fill(0);
        let both = (size - 1) << 16 | u32::from(id);
        let vector = u32::from(id) << 16 | 3;
        assert_eq!(self.admin_at(0x05, 0, queue.cq.0, both, vector).0, 0);
        let to = u32::from(id) << 16 | 1;
        assert_eq!(self.admin_at(0x01, 0, queue.sq.0, both, to).0, 0);
        self.queues.push(queue);
    }

    fn identify(&mut self) {
        let ratio = self.device.ratio;
        let data = index(DATA);
        assert_eq!(self.admin_at(0x06, NSID, DATA, 0, 0).0, 0);
        let field = |world: &Self, at: usize| {
            let bytes = &world.device.memory[data + at..data + at + 8];
            u64::from_le_bytes(bytes.try_into().unwrap())
        };
        if self.mediator.is_none() {
            return;
        }
        assert_eq!(field(self, 0), VISIBLE / ratio);
        assert_eq!(field(self, 8), VISIBLE / ratio);
        // In two pieces.
        assert_eq!(self.admin_at(0x06, 0, DATA + 0xf00, 1, 0).0, 0);
        let identity = &self.device.memory[data + 0xf00..data + 0x1000];
        assert_eq!(identity[77], self.device.most);
        let second = index(SECOND);
        let rest = &self.device.memory[second..second + 0xf00];
        assert_eq!((rest[0] & 0xcf, rest[1] & 1), (0x00, 0));
        assert_eq!(rest[256 + 8 + 2], 0);
    }

    pub fn admin(&mut self, opcode: u8, nsid: u32, prp: u64, ten: u32, eleven: u32) -> (u16, u32) {
        self.admin_at(opcode, nsid, prp, ten, eleven)
    }

    /// An admin command, to its end.
    fn admin_at(&mut self, opcode: u8, nsid: u32, prp: u64, ten: u32, eleven: u32) -> (u16, u32) {
        let mut entry = [0; 64];
        entry[0] = opcode;
        set(&mut entry, 1, nsid);
        set_long(&mut entry, 6, prp);
        set_long(&mut entry, 8, SECOND);
        set(&mut entry, 10, ten);
        set(&mut entry, 11, eleven);
        let cid = self.submit(0, entry);
        for tries in 0.. {
            assert!(tries < 1000, "{opcode:#x} is not answered");
            self.device.step(tries, false);
            self.handler(0);
            let mut answers = self.queues[0].answers.drain(..);
            if let Some((found, status, result)) = answers.next() {
                assert_eq!(found, cid);
                assert_eq!(answers.next(), None);
                return (status, result);
            }
            drop(answers);
            self.device.pass(20);
            self.poll();
        }
        unreachable!()
    }

    pub fn submit(&mut self, number: usize, mut entry: [u8; 64]) -> u16 {
        let queue = &mut self.queues[number];
        let cid = queue.next_cid;
        queue.next_cid += 1;
        entry[2..4].copy_from_slice(&cid.to_le_bytes());
        let at = index(queue.sq.0) + queue.tail as usize * 64;
        queue.tail = (queue.tail + 1) % queue.sq.1;
        let (id, tail) = (u32::from(queue.id), queue.tail);
        self.device.memory[at..at + 64].copy_from_slice(&entry);
        let bell = 0x1000 + id * 2 * self.device.stride;
        self.write(bell, tail);
        cid
    }

    /// Issues a command, if it makes sense; sectors are rounded to blocks.
    pub fn issue(&mut self, number: usize, kind: Kind, start: u64, count: u64) -> Option<u16> {
        let ratio = self.device.ratio;
        let (start, count) = (start / ratio * ratio, count.next_multiple_of(ratio));
        let queue = &self.queues[number];
        if (queue.tail + 1) % queue.sq.1 == queue.head || queue.outstanding.len() > 60 {
            return None;
        }
        let all = Sectors { start, count };
        let mut sectors = match kind {
            Kind::Flush | Kind::Strange => Vec::new(),
            Kind::Discard if count >= 3 * ratio => {
                let middle = start + ratio;
                vec![
                    Sectors {
                        start,
                        count: ratio,
                    },
                    Sectors {
                        start: middle + ratio,
                        count: count - 2 * ratio,
                    },
                ]
            }
            _ => vec![all],
        };
        sectors.retain(|sectors| !sectors.is_empty());
        let writes = !matches!(kind, Kind::Read | Kind::Compare);
        // What two commands at the same sectors do, nobody promises.
        let others = self
            .queues
            .iter()
            .flat_map(|queue| queue.outstanding.values());
        let mut others =
            others.filter(|other| writes || !matches!(other.kind, Kind::Read | Kind::Compare));
        if others.any(|other| {
            let mut theirs = other.sectors.iter();
            theirs.any(|a| sectors.iter().any(|b| a.meets(*b)))
        }) {
            return None;
        }
        let is_beyond = sectors.iter().any(|sectors| sectors.end() > VISIBLE);
        let must_fail = match kind {
            Kind::Strange => Some(INVALID_OPCODE),
            _ if is_beyond && self.mediator.is_some() => Some(LBA_RANGE),
            _ if sectors.iter().any(|sectors| sectors.end() > DISK) => Some(LBA_RANGE),
            _ => None,
        };
        self.stamp = if self.stamp >= 0xe0 {
            0x12
        } else {
            self.stamp + 1
        };
        let stamp = if matches!(kind, Kind::Zeros | Kind::Discard) {
            0
        } else {
            self.stamp
        };
        let mut entry = [0; 64];
        entry[0] = match kind {
            Kind::Read => 0x02,
            Kind::Compare => 0x05,
            Kind::Write | Kind::Fua => 0x01,
            Kind::Zeros => 0x08,
            Kind::Discard => 0x09,
            Kind::Flush => 0x00,
            Kind::Strange => [0x19, 0x0d, 0x85, 0x7d][usize::from(self.stamp % 4)],
        };
        set(&mut entry, 1, NSID);
        // Memory that nothing outstanding uses.
        let queue = &mut self.queues[number];
        let is_used = |cid: u16| {
            let mut used = queue.outstanding.keys();
            used.any(|other| u64::from(other.abs_diff(cid)).is_multiple_of(ROOMS))
        };
        queue.next_cid += (0..).find(|n| !is_used(queue.next_cid + n)).unwrap();
        let data = self.room(number, self.queues[number].next_cid);
        // Not at a page's begin.
        let first = data + 0x600;
        let bytes = count * 512;
        set_long(&mut entry, 6, first);
        if bytes + 0x600 > 0x2000 {
            for n in 1..=bytes.div_ceil(4096) {
                let at = index(data) + index(n) * 8 - 8;
                let page = data + n * 0x1000;
                self.device.memory[at..at + 8].copy_from_slice(&page.to_le_bytes());
            }
            set_long(&mut entry, 8, data);
        } else {
            set_long(&mut entry, 8, data + 0x1000);
        }
        match kind {
            Kind::Discard => {
                for (n, range) in sectors.iter().enumerate() {
                    let at = index(first) + n * 16;
                    let blocks = u32::try_from(range.count / ratio).unwrap();
                    let room = &mut self.device.memory[at..at + 16];
                    room[4..8].copy_from_slice(&blocks.to_le_bytes());
                    room[8..].copy_from_slice(&(range.start / ratio).to_le_bytes());
                }
                set(&mut entry, 10, u32::try_from(sectors.len()).unwrap() - 1);
                set(&mut entry, 11, 4);
            }
            _ => {
                set_long(&mut entry, 10, start / ratio);
                let fua = u32::from(kind == Kind::Fua) << 30;
                set(
                    &mut entry,
                    12,
                    u32::try_from(count / ratio - 1).unwrap() | fua,
                );
            }
        }
        if matches!(kind, Kind::Write | Kind::Fua) {
            let bytes: Vec<u8> = (start..start + count)
                .flat_map(|n| content(stamp, n))
                .collect();
            self.device.memory[index(first)..][..bytes.len()].copy_from_slice(&bytes);
        }
        if writes && must_fail.is_none() {
            for n in sectors
                .iter()
                .flat_map(|sectors| sectors.start..sectors.end())
            {
                self.known[index(n)].insert(stamp);
            }
        }
        let command = Command {
            kind,
            sectors,
            stamp,
            must_fail,
        };
        let cid = self.queues[number].next_cid;
        self.queues[number].outstanding.insert(cid, command);
        assert_eq!(self.submit(number, entry), cid);
        Some(cid)
    }

    fn room(&self, number: usize, cid: u16) -> u64 {
        DATA + 0x2000 + (number as u64 * ROOMS + u64::from(cid) % ROOMS) * ROOM
    }

    /// A driver's handler: looks at a queue.
    pub fn handler(&mut self, number: usize) {
        let mut found = Vec::new();
        let queue = &mut self.queues[number];
        if self.by_interrupt && !self.device.interrupts.remove(&queue.id) {
            return;
        }
        loop {
            let at = index(queue.cq.0) + queue.next as usize * 16;
            let bytes = &self.device.memory[at..at + 16];
            let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
            if half(14) & 1 != u16::from(queue.phase) {
                break;
            }
            assert_eq!(half(10), queue.id);
            queue.head = half(8).into();
            let result = u32::from_le_bytes(bytes[..4].try_into().unwrap());
            found.push((half(12), half(14) >> 1, result));
            queue.next += 1;
            if queue.next == queue.cq.1 {
                queue.next = 0;
                queue.phase = !queue.phase;
            }
        }
        let (id, next) = (u32::from(queue.id), queue.next);
        if found.is_empty() {
            return;
        }
        if number == 0 {
            queue.answers.extend(found);
        } else {
            for (cid, status, _) in found {
                let command = self.queues[number].outstanding.remove(&cid);
                let command = command.expect("a command that is outstanding");
                self.completed(&command, status, self.room(number, cid));
            }
        }
        let bell = 0x1000 + (id * 2 + 1) * self.device.stride;
        self.write(bell, next);
    }

    fn completed(&mut self, command: &Command, status: u16, data: u64) {
        if let Some(expected) = command.must_fail {
            assert_eq!(status, expected, "{command:?}");
            self.failed += 1;
            return;
        }
        if status != 0 {
            self.failed += 1;
            self.unsure(command);
            return;
        }
        self.done += 1;
        match command.kind {
            Kind::Read => {
                let mut at = index(data) + 0x600;
                for n in command.sectors[0].start..command.sectors[0].end() {
                    let found = &self.device.memory[at..at + 512];
                    let may = &self.known[index(n)];
                    let fits = may.iter().any(|stamp| found == content(*stamp, n));
                    assert!(fits, "sector {n} has {:#x}, not one of {may:x?}", found[9]);
                    at += 512;
                }
            }
            Kind::Write | Kind::Fua | Kind::Zeros | Kind::Discard => {
                for n in command.sectors.iter().flat_map(|all| all.start..all.end()) {
                    self.known[index(n)] = BTreeSet::from([command.stamp]);
                }
            }
            _ => {}
        }
    }

    /// A write has failed, or was given up: the device may have what it had.
    fn unsure(&mut self, command: &Command) {
        if matches!(
            command.kind,
            Kind::Write | Kind::Fua | Kind::Zeros | Kind::Discard
        ) && command.must_fail.is_none()
        {
            for n in command.sectors.iter().flat_map(|all| all.start..all.end()) {
                self.known[index(n)].insert(GARBAGE);
            }
        }
    }

    /// A queue is no more.
    pub fn drop(&mut self, queue: &Queue) {
        for command in queue.outstanding.values() {
            self.unsure(command);
            // What of a list had passed is the guest's, though the controller was not told of it.
            if command.kind == Kind::Discard && command.must_fail.is_none() {
                for n in command.sectors.iter().flat_map(|all| all.start..all.end()) {
                    self.device.fresh[index(n)] = true;
                }
            }
            self.dropped += 1;
        }
    }

    /// Everything goes on.
    pub fn turn(&mut self, n: usize) {
        self.blocks.fetched();
        self.device.step(n * 7, false);
        self.device.pass(100);
        self.poll();
        for number in 1..self.queues.len() {
            self.handler(number);
        }
    }

    pub fn outstanding(&self) -> usize {
        self.queues
            .iter()
            .map(|queue| queue.outstanding.len())
            .sum()
    }

    /// Until the guest has everything.
    pub fn settle(&mut self) {
        for n in 0.. {
            if self.outstanding() == 0 {
                break;
            }
            assert!(n < 20_000, "what is outstanding: {:?}", self.queues);
            self.turn(n);
        }
        assert_eq!(self.blocks.guest, []);
    }

    /// A driver gives up.
    pub fn disable(&mut self) {
        self.write(CC, 0x46_0000);
        for tries in 0.. {
            assert!(tries < 1000, "it does not stop");
            if self.read(CSTS) & 1 == 0 {
                break;
            }
        }
        assert_eq!(self.blocks.guest, []);
        for queue in core::mem::take(&mut self.queues) {
            self.drop(&queue);
        }
    }

    pub fn leave(&mut self) -> bool {
        let is_transparent = self
            .mediator
            .as_ref()
            .is_some_and(Mediator::<Controller, Oracle>::transparent);
        if is_transparent {
            self.mediator = None;
        }
        is_transparent
    }

    /// All of the image comes; then the mediator leaves, and the driver goes on.
    pub fn finish(&mut self) {
        for n in 0.. {
            assert!(n < 50_000, "the image does not come");
            if self.blocks.complete() && self.leave() {
                break;
            }
            self.device.pass(10_000);
            self.turn(n);
        }
        let count = self.queues.len();
        for n in 0..3 * 64 {
            let number = 1 + n % (count - 1);
            let start = n as u64 * 5 % 280;
            let kind = [Kind::Read, Kind::Write, Kind::Flush][n % 3];
            self.issue(number, kind, start, 8);
            self.turn(n);
        }
        self.settle();
        for n in 0..DISK {
            let found = &self.device.disk[index(n) * 512..][..512];
            let may = &self.known[index(n)];
            assert!(
                may.iter().any(|stamp| found == content(*stamp, n)),
                "sector {n}"
            );
        }
        // A reset does away with what the VMM has left there.
        self.device.eager = 1;
        self.disable();
        self.start((32, 32), 2, 8);
    }
}

/// Where the second piece of an admin command's data is.
const SECOND: u64 = DATA + 0x1000;
