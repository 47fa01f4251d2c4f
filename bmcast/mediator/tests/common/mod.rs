//! A machine: the controller, what is on its disk, the mediator between it and a driver, and that driver. It is
//! Linux's as far as registers go, or firmware's, which polls.

pub mod blocks;
pub mod hba;
pub mod hostile;

use std::collections::BTreeSet;

use bmcast_image::Sectors;
use bmcast_mediator::{Ahci, Mediator};

use blocks::{Oracle, VISIBLE, image};
use hba::*;

const LIST: u32 = 0x1000;
const RECEIVED: u32 = 0x2000;
const TABLES: u32 = 0x1_0000;
const DATA: u32 = 0x4_0000;
const ROOM: u32 = 0x8000;
/// What Linux has enabled.
const ENABLED: u32 = 0x7dc0_007f;
const FATAL: u32 = 0x7800_0000;
/// Most sectors of a command.
pub const MOST: u64 = 24;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Fua,
    Flush,
    Trim,
    Identify,
    /// One that is to be aborted.
    Strange,
    /// Neither reads nor writes.
    Other,
}

#[derive(Clone, Debug)]
pub struct Command {
    pub kind: Kind,
    pub sectors: Vec<Sectors>,
    queued: bool,
    stamp: u8,
    must_fail: bool,
    header: [u8; 32],
}

pub struct World {
    pub hba: Hba,
    pub blocks: Oracle,
    pub mediator: Ahci,
    pub slots: Vec<Option<Command>>,
    /// What each sector may have, as far as the guest knows.
    known: Vec<BTreeSet<u8>>,
    stamp: u8,
    pub done: u32,
    pub failed: u32,
    pub dropped: u32,
    pub by_message: bool,
    messages: u32,
    pub port: u32,
}

/// What the first bytes of a sector of the image stand for.
const OF_IMAGE: u8 = 1;
const ZEROS: u8 = 0;

impl World {
    pub fn new(number: u8) -> Self {
        let mut hba = Hba::new(u32::from(number));
        // Behind the image the disk has what it had.
        let sector = |n: u64| usize::try_from(n).unwrap();
        hba.fresh[sector(blocks::IMAGE)..sector(VISIBLE)].fill(true);
        Self {
            hba,
            blocks: Oracle::new(),
            mediator: Ahci::new(number),
            slots: vec![None; 32],
            known: (0..VISIBLE)
                .map(|n| BTreeSet::from([if n < blocks::IMAGE { OF_IMAGE } else { GARBAGE }]))
                .collect(),
            stamp: 1,
            done: 0,
            failed: 0,
            dropped: 0,
            by_message: false,
            messages: 0,
            port: 0x100 + u32::from(number) * 0x80,
        }
    }

    pub fn read_width(&mut self, offset: u32, width: u8) -> u64 {
        let Self {
            hba,
            blocks,
            mediator,
            ..
        } = self;
        mediator.read(hba, blocks, offset, width)
    }

    pub fn write_width(&mut self, offset: u32, width: u8, value: u64) {
        let Self {
            hba,
            blocks,
            mediator,
            ..
        } = self;
        mediator.write(hba, blocks, offset, width, value);
    }

    pub fn read_global(&mut self, offset: u32) -> u32 {
        u32::try_from(self.read_width(offset, 4)).unwrap()
    }

    pub fn write_global(&mut self, offset: u32, value: u32) {
        self.write_width(offset, 4, value.into());
    }

    pub fn read(&mut self, register: u32) -> u32 {
        self.read_global(self.port + register)
    }

    pub fn write(&mut self, register: u32, value: u32) {
        self.write_global(self.port + register, value);
    }

    pub fn poll(&mut self) {
        let Self {
            hba,
            blocks,
            mediator,
            ..
        } = self;
        mediator.poll(hba, blocks);
    }

    pub fn transparent(&self) -> bool {
        Mediator::<Hba, Oracle>::transparent(&self.mediator)
    }

    /// Sets the port up.
    pub fn start(&mut self, interrupts: bool) {
        self.write(CLB, LIST);
        self.write(CLBU, 0);
        self.write(FB, RECEIVED);
        self.write(FBU, 0);
        self.write(CMD, FRE);
        self.write(SERR, !0);
        self.write(IS, !0);
        self.write_global(GLOBAL_IS, 1 << self.hba.number);
        self.write(CMD, FRE | ST);
        self.write(IE, if interrupts { ENABLED } else { 0 });
        self.write_global(GHC, 0x8000_0000 | if interrupts { 2 } else { 0 });
    }

    /// Stops it, as far as a driver waits for that.
    pub fn stop(&mut self) {
        let command = self.read(CMD);
        self.write(CMD, command & !ST);
        let waited = (0..100).any(|_| self.read(CMD) & CR == 0);
        assert!(waited, "the port does not stop");
    }

    pub fn put(&mut self, address: u32, bytes: &[u8]) {
        let at = usize::try_from(address).unwrap();
        self.hba.memory[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub fn get<const N: usize>(&self, address: u32) -> [u8; N] {
        let at = usize::try_from(address).unwrap();
        self.hba.memory[at..at + N].try_into().unwrap()
    }

    pub fn header(&self, slot: u32) -> [u8; 32] {
        self.get(LIST + slot * 32)
    }

    pub fn data(&self, slot: u32) -> &[u8] {
        let at = usize::try_from(DATA + slot * ROOM).unwrap();
        &self.hba.memory[at..at + usize::try_from(ROOM).unwrap()]
    }

    /// Header, table, and pieces of memory of odd lengths.
    pub fn build(&mut self, slot: u32, fis: [u8; 20], bytes: u32, flags: u32) -> [u8; 32] {
        let (table, data) = (TABLES + slot * 0x1000, DATA + slot * ROOM);
        self.put(table, &fis);
        let mut rest = bytes;
        let mut at = data;
        let mut regions = 0;
        while rest > 0 {
            let piece = rest.min(if regions == 0 { 192 } else { 4096 });
            let mut entry = [0; 16];
            entry[..4].copy_from_slice(&at.to_le_bytes());
            entry[12..].copy_from_slice(&(piece - 1).to_le_bytes());
            self.put(table + 0x80 + regions * 16, &entry);
            (at, rest, regions) = (at + piece, rest - piece, regions + 1);
        }
        let mut header = [0; 32];
        header[..4].copy_from_slice(&(5 | flags | regions << 16).to_le_bytes());
        header[8..12].copy_from_slice(&table.to_le_bytes());
        header[20] = 0x77;
        self.put(LIST + slot * 32, &header);
        header
    }

    fn next_stamp(&mut self) -> u8 {
        self.stamp = if self.stamp >= 200 { 2 } else { self.stamp + 1 };
        self.stamp
    }

    pub fn active(&self) -> bool {
        self.slots.iter().any(Option::is_some)
    }

    /// Whether sectors are those of a command that is outstanding; `writes`: one that writes.
    fn meets(&self, sectors: &[Sectors], writes: bool) -> bool {
        let commands = self.slots.iter().flatten();
        let mut others = commands
            .filter(|command| !writes || command.kind != Kind::Read)
            .flat_map(|command| &command.sectors);
        others.any(|other| sectors.iter().any(|sectors| other.meets(*sectors)))
    }

    /// Issues a command, unless the rules of ATA or good sense forbid it just now.
    pub fn issue(&mut self, kind: Kind, start: u64, count: u64, queued: bool) -> Option<u32> {
        let can_queue = matches!(kind, Kind::Read | Kind::Write | Kind::Fua | Kind::Strange);
        let queued = queued && can_queue;
        let mut slots = self.slots.iter();
        let slot = slots.position(Option::is_none)?;
        let mixes = |command: &Command| !queued || !command.queued;
        if self.slots.iter().flatten().any(mixes) {
            return None;
        }
        let sectors = Sectors { start, count };
        let mut all = vec![sectors];
        if kind == Kind::Trim {
            let more = [start + 40, start + 80];
            all.extend(more.map(|start| Sectors { start, count }));
        }
        let has_sectors = matches!(kind, Kind::Read | Kind::Write | Kind::Fua | Kind::Trim);
        if !has_sectors {
            all.clear();
        }
        if self.meets(&all, matches!(kind, Kind::Read)) {
            return None;
        }
        let slot = u32::try_from(slot).unwrap();
        let stamp = self.next_stamp();
        let past = all.iter().any(|sectors| sectors.end() > VISIBLE);
        let mut fis = [0u8; 20];
        fis[..2].copy_from_slice(&[0x27, 0x80]);
        let [a, b, c, d, ..] = start.to_le_bytes();
        fis[4..11].copy_from_slice(&[a, b, c, 0x40, d, 0, 0]);
        let [low, high, ..] = count.to_le_bytes();
        fis[12..14].copy_from_slice(&[low, high]);
        let writes = matches!(kind, Kind::Write | Kind::Fua | Kind::Trim);
        let mut bytes = u32::try_from(count).unwrap() * 512;
        fis[2] = match (kind, queued) {
            (Kind::Read, true) => 0x60,
            (Kind::Read, false) if count < 16 => 0xc8,
            (Kind::Read, false) => 0x25,
            (Kind::Write | Kind::Fua, true) => 0x61,
            (Kind::Write, false) if count < 16 => 0xca,
            (Kind::Write, false) => 0x35,
            (Kind::Fua, false) => 0x3d,
            (Kind::Flush, _) => 0xea,
            (Kind::Trim, _) => 0x06,
            (Kind::Identify, _) => 0xec,
            (Kind::Strange, true) => 0x64,
            (Kind::Strange, false) => 0xf4,
            (Kind::Other, _) => 0xe5,
        };
        match kind {
            Kind::Trim => {
                fis[3] = 1;
                fis[12..14].copy_from_slice(&[1, 0]);
                bytes = 512;
            }
            Kind::Identify => bytes = 512,
            Kind::Flush | Kind::Other => bytes = 0,
            _ => {}
        }
        if queued {
            fis.copy_within(12..13, 3);
            fis.copy_within(13..14, 11);
            fis[12..14].copy_from_slice(&[u8::try_from(slot << 3).unwrap(), 0]);
            fis[7] |= if kind == Kind::Fua { 0x80 } else { 0 };
        }
        let header = self.build(slot, fis, bytes, u32::from(writes) << 6);
        let mut data = vec![0xcc; usize::try_from(bytes).unwrap()];
        if kind == Kind::Trim {
            data.fill(0);
            for (entry, sectors) in data.chunks_exact_mut(8).zip(&all) {
                entry.copy_from_slice(&(sectors.start | sectors.count << 48).to_le_bytes());
            }
        } else if writes {
            data.fill(stamp);
        }
        self.put(DATA + slot * ROOM, &data);
        let stamp = if kind == Kind::Trim { ZEROS } else { stamp };
        if writes && !past {
            self.learn(&all, stamp, false);
        }
        self.slots[usize::try_from(slot).unwrap()] = Some(Command {
            kind,
            sectors: all,
            queued,
            stamp,
            must_fail: past || kind == Kind::Strange,
            header,
        });
        if queued {
            self.write(SACT, 1 << slot);
        }
        self.write(CI, 1 << slot);
        Some(slot)
    }

    fn learn(&mut self, sectors: &[Sectors], stamp: u8, is_sure: bool) {
        for sectors in sectors {
            for n in sectors.start..sectors.end().min(VISIBLE) {
                let known = &mut self.known[usize::try_from(n).unwrap()];
                if is_sure {
                    known.clear();
                }
                known.insert(stamp);
            }
        }
    }

    fn check_sector(&self, n: u64, data: &[u8]) {
        let known = &self.known[usize::try_from(n).unwrap()];
        let is_known = known.iter().any(|stamp| match *stamp {
            OF_IMAGE => *data == image(n),
            stamp => data.iter().all(|byte| *byte == stamp),
        });
        // What was there when a write was aborted is the device's affair.
        let uncertain = known.len() > 1;
        assert!(is_known || uncertain, "sector {n} has {:?}", &data[..8]);
    }

    /// A command is done, as far as the driver can see.
    fn complete(&mut self, slot: u32) {
        let place = &mut self.slots[usize::try_from(slot).unwrap()];
        let command = place.take().expect("a command");
        assert!(!command.must_fail, "{command:?} is not to succeed");
        self.done += 1;
        let mut header = self.header(slot);
        header[4..8].fill(0);
        assert_eq!(header, command.header, "a header is not the guest's");
        match command.kind {
            Kind::Read => {
                let sectors = command.sectors[0];
                let data = self.data(slot).to_vec();
                for (n, sector) in (sectors.start..sectors.end()).zip(data.chunks_exact(512)) {
                    self.check_sector(n, sector);
                }
            }
            Kind::Write | Kind::Fua | Kind::Trim => {
                self.learn(&command.sectors, command.stamp, true);
            }
            Kind::Identify => {
                let data = &self.data(slot)[..512];
                assert_eq!(data[200..208], VISIBLE.to_le_bytes());
                let sum = data.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
                assert_eq!(sum, 0);
                assert_eq!(self.header(slot)[4..8], 512u32.to_le_bytes());
            }
            _ => {}
        }
    }

    /// Completes what is outstanding no more.
    pub fn look(&mut self) {
        let active = self.read(SACT) | self.read(CI);
        for slot in 0..32 {
            let issued = self.slots[usize::try_from(slot).unwrap()].is_some();
            if issued && active & 1 << slot == 0 {
                self.complete(slot);
            }
        }
    }

    /// All that is outstanding has come to nothing.
    pub fn abandon(&mut self) {
        for slot in 0..32 {
            if let Some(command) = self.slots[usize::try_from(slot).unwrap()].take() {
                let mut header = self.header(slot);
                header[4..8].fill(0);
                assert_eq!(header, command.header, "a header is not the guest's");
                self.dropped += 1;
            }
        }
    }

    /// Whether an interrupt comes to the CPU, by its line or a message.
    pub fn interrupted(&mut self) -> bool {
        if self.by_message {
            let news = self.hba.messages != self.messages;
            self.messages = self.hba.messages;
            news
        } else {
            self.hba.line()
        }
    }

    /// What Linux's handler does; then what its error handler does.
    pub fn handler(&mut self) {
        let bit = 1 << self.hba.number;
        if self.read_global(GLOBAL_IS) & bit == 0 {
            return;
        }
        let status = self.read(IS);
        self.write(IS, status);
        if status & FATAL == 0 {
            self.look();
            if status & (1 << 22 | 1 << 6) != 0 {
                self.write(SERR, 1 << 26 | 1 << 16);
            }
            self.write_global(GLOBAL_IS, bit);
            return;
        }
        self.write(IE, 0);
        self.write_global(GLOBAL_IS, bit);
        self.look();
        self.failed += 1;
        self.recover(false);
    }

    pub fn recover(&mut self, hard: bool) {
        self.write(IE, 0);
        self.stop();
        self.abandon();
        // A device that is at something is not left at it (AHCI 1.3.1, 6.2.2).
        let hard = hard || self.read(TFD) & 0x88 != 0;
        if hard {
            let control = self.read(SCTL) & !0xf;
            self.write(SCTL, control | 1);
            self.hba.pass(1000);
            self.write(SCTL, control);
        }
        let errors = self.read(SERR);
        self.write(SERR, errors);
        self.write(IS, !0);
        let command = self.read(CMD);
        self.write(CMD, command | ST);
        if !hard {
            self.read_log();
        }
        self.write(IS, !0);
        self.write_global(GLOBAL_IS, 1 << self.hba.number);
        self.write(IE, ENABLED);
    }

    /// READ LOG EXT of the errors of queued commands, polled.
    fn read_log(&mut self) {
        let mut fis = [0; 20];
        fis[..5].copy_from_slice(&[0x27, 0x80, 0x2f, 0, 0x10]);
        fis[12] = 1;
        self.build(31, fis, 512, 0);
        self.write(CI, 1 << 31);
        for n in 0..4000 {
            if self.read(CI) & 1 << 31 == 0 {
                return;
            }
            self.world(n);
        }
        panic!("the log is not read");
    }

    /// Everything but the guest does one thing.
    pub fn world(&mut self, which: usize) {
        self.hba.step(which, false);
        self.blocks.fetched();
        self.hba.pass(100);
        self.poll();
    }

    /// Until the guest has nothing outstanding, by interrupts alone.
    pub fn settle(&mut self) {
        for n in 0..20_000 {
            if self.interrupted() {
                self.handler();
            }
            if !self.active() && !self.hba.outstanding() {
                return;
            }
            self.world(n % 7);
        }
        panic!("{:?} are never done", self.slots);
    }

    /// One command, as firmware does it.
    pub fn polled(&mut self, kind: Kind, start: u64, count: u64) -> Result<u32, u32> {
        self.write(IS, !0);
        let slot = self.issue(kind, start, count, false).expect("a slot");
        for n in 0..20_000 {
            let status = self.read(IS);
            if status & FATAL != 0 {
                let task = self.read(TFD);
                self.stop();
                self.slots[usize::try_from(slot).unwrap()] = None;
                self.write(CMD, FRE | ST);
                return Err(task);
            }
            if self.read(CI) & 1 << slot == 0 {
                assert_eq!(self.read(TFD) & 0x89, 0);
                assert_ne!(self.read(IS) & 3, 0, "what firmware waits for");
                self.complete(slot);
                return Ok(slot);
            }
            self.world(n);
        }
        panic!("{kind:?} is never done");
    }

    /// What the guest has set, when the mediator may go.
    pub fn audit(&mut self) {
        assert!(self.transparent());
        assert_eq!(self.hba.get(CLB), LIST);
        assert_eq!(self.hba.get(FB), RECEIVED);
        assert_eq!(self.hba.get(CLBU) | self.hba.get(FBU), 0);
        assert_eq!(self.hba.get(CMD) & (ST | FRE), ST | FRE);
        for register in [CLB, CLBU, FB, FBU, IE, CMD, TFD, SACT, CI, IS] {
            let real = self.hba.get(register);
            assert_eq!(self.read(register), real, "register {register:#x}");
        }
    }

    /// Everything is installed, and the mediator may go.
    pub fn finish(&mut self) {
        for n in 0..50_000 {
            if self.interrupted() {
                self.handler();
            }
            if self.blocks.complete() && self.transparent() {
                break;
            }
            self.world(n % 5);
            self.hba.pass(10_000);
        }
        assert!(self.blocks.complete(), "not installed");
        self.audit();
        let disk = self.hba.disk.clone();
        for (n, sector) in (0..VISIBLE).zip(disk.chunks_exact(512)) {
            self.check_sector(n, sector);
        }
        assert!(
            disk[usize::try_from(VISIBLE * 512).unwrap()..]
                .iter()
                .all(|b| *b == GARBAGE)
        );
    }
}
