//! An AHCI controller with one disk (AHCI 1.3.1), which does something only when it is told to, or once in
//! so many accesses to its registers; and which knows what must not happen.

use std::cell::Cell;

use bmcast_mediator::{OWN_MEMORY, Platform};

pub const MEMORY: usize = 2 << 20;
pub const OWN: u64 = 0x1_0000_0000;
/// Sectors of the disk.
pub const DISK: u64 = 320;
/// What a disk has that nobody has written yet.
pub const GARBAGE: u8 = 0xee;

pub const GHC: u32 = 4;
pub const GLOBAL_IS: u32 = 8;
pub const CLB: u32 = 0;
pub const CLBU: u32 = 4;
pub const FB: u32 = 8;
pub const FBU: u32 = 0xc;
pub const IS: u32 = 0x10;
pub const IE: u32 = 0x14;
pub const CMD: u32 = 0x18;
pub const TFD: u32 = 0x20;
pub const SSTS: u32 = 0x28;
pub const SCTL: u32 = 0x2c;
pub const SERR: u32 = 0x30;
pub const SACT: u32 = 0x34;
pub const CI: u32 = 0x38;

pub const ST: u32 = 1;
pub const FRE: u32 = 1 << 4;
pub const FR: u32 = 1 << 14;
pub const CR: u32 = 1 << 15;
pub const TFES: u32 = 1 << 30;

const BUSY: u32 = 0x80;
const READY: u32 = 0x50;
const ABRT: u32 = 0x451;
const IDNF: u32 = 0x1051;

#[derive(Clone, Debug)]
struct Accepted {
    slot: u32,
    fis: [u8; 20],
    queued: bool,
    own: bool,
    table: u64,
    regions: u64,
    header: u64,
    clears_busy: bool,
}

pub struct Hba {
    pub number: u32,
    pub memory: Vec<u8>,
    own: Vec<u8>,
    pub ghc: u32,
    pub global: u32,
    /// The port's registers.
    pub port: [u32; 32],
    accepted: Vec<Accepted>,
    is_halted: bool,
    /// Reads of PxCMD until CR is cleared.
    stopping: u32,
    pub stop_reads: u32,
    /// PxCI is cleared when CR is, and not when ST is.
    pub is_lazy: bool,
    ncq_error: bool,
    in_reset: bool,
    pub disk: Vec<u8>,
    /// Sectors that somebody has written, or may have.
    pub fresh: Vec<bool>,
    /// Sectors that the guest has written or discarded.
    pub guests: Vec<bool>,
    pub identity: [u8; 512],
    clock: Cell<u64>,
    /// It does something by itself after so many accesses.
    pub eager: u32,
    accesses: u32,
    pub hangs: bool,
    /// It keeps to the specification, and so is whoever drives it to.
    pub strict: bool,
    /// Times that it has interrupted by a message.
    pub messages: u32,
    pub own_commands: u32,
    /// So many of the VMM's commands fail.
    pub fail_own: u32,
    pub seen: Vec<u8>,
}

pub fn garbage() -> Vec<u8> {
    vec![GARBAGE; usize::try_from(DISK * 512).unwrap()]
}

impl Hba {
    pub fn new(number: u32) -> Self {
        let mut identity = [0; 512];
        identity[120..124].copy_from_slice(&u32::try_from(DISK).unwrap().to_le_bytes());
        identity[200..208].copy_from_slice(&DISK.to_le_bytes());
        identity[152..156].fill(0xff);
        identity[510] = 0xa5;
        let mut hba = Self {
            number,
            memory: vec![0; MEMORY],
            own: vec![0; OWN_MEMORY],
            ghc: 0x8000_0000,
            global: 0,
            port: [0; 32],
            accepted: Vec::new(),
            is_halted: false,
            stopping: 0,
            stop_reads: 2,
            is_lazy: false,
            ncq_error: false,
            in_reset: false,
            disk: garbage(),
            fresh: vec![false; usize::try_from(DISK).unwrap()],
            guests: vec![false; usize::try_from(DISK).unwrap()],
            identity,
            clock: Cell::new(1),
            eager: 0,
            accesses: 0,
            hangs: false,
            strict: true,
            messages: 0,
            own_commands: 0,
            fail_own: 0,
            seen: Vec::new(),
        };
        *hba.at(TFD) = READY;
        *hba.at(SSTS) = 0x123;
        hba
    }

    pub fn at(&mut self, register: u32) -> &mut u32 {
        &mut self.port[usize::try_from(register / 4).unwrap()]
    }

    pub fn get(&self, register: u32) -> u32 {
        self.port[usize::try_from(register / 4).unwrap()]
    }

    pub fn pass(&self, micros: u64) {
        self.clock.set(self.clock.get() + micros);
    }

    /// Whether an interrupt is asserted.
    pub fn line(&self) -> bool {
        self.global != 0 && self.ghc & 2 != 0
    }

    fn update(&mut self) {
        if self.get(IS) & self.get(IE) != 0 {
            let before = self.line();
            self.global |= 1 << self.number;
            self.messages += u32::from(self.line() && !before);
        }
    }

    fn interrupt(&mut self, bits: u32) {
        *self.at(IS) |= bits;
        self.update();
    }

    /// Commands that the disk works on, or that are to be fetched.
    pub fn outstanding(&self) -> bool {
        !self.accepted.is_empty() || self.get(CI) | self.get(SACT) != 0
    }

    pub fn plug(&mut self, is_there: bool) {
        self.forget(true);
        *self.at(SSTS) = if is_there { 0x123 } else { 0 };
        *self.at(TFD) = if is_there { READY } else { 0x7f };
        *self.at(SERR) |= 1 << 26 | 1 << 16;
        self.interrupt(1 << 22 | 1 << 6);
    }

    fn dma(&self, address: u64, bytes: usize) -> bool {
        let end = address.saturating_add(u64::try_from(bytes).unwrap());
        end <= u64::try_from(MEMORY).unwrap()
            || address >= OWN && end <= OWN + u64::try_from(OWN_MEMORY).unwrap()
    }

    fn load(&self, address: u64, into: &mut [u8]) {
        if !self.dma(address, into.len()) {
            into.fill(0xff);
            return;
        }
        let (memory, at) = if address >= OWN {
            (&self.own, address - OWN)
        } else {
            (&self.memory, address)
        };
        let at = usize::try_from(at).unwrap();
        into.copy_from_slice(&memory[at..at + into.len()]);
    }

    fn store(&mut self, own: bool, address: u64, from: &[u8]) {
        if !self.dma(address, from.len()) {
            return;
        }
        assert!(
            !own || address >= OWN,
            "a command of the VMM's writes the guest's memory at {address:#x}"
        );
        let (memory, at) = if address >= OWN {
            (&mut self.own, address - OWN)
        } else {
            (&mut self.memory, address)
        };
        let at = usize::try_from(at).unwrap();
        memory[at..at + from.len()].copy_from_slice(from);
    }

    fn list(&self) -> u64 {
        u64::from(self.get(CLBU)) << 32 | u64::from(self.get(CLB))
    }

    fn command(&self, slot: u32) -> Accepted {
        let header = self.list() + u64::from(slot) * 32;
        let mut bytes = [0; 16];
        self.load(header, &mut bytes);
        let word = |n: usize| u32::from_le_bytes(bytes[n * 4..n * 4 + 4].try_into().unwrap());
        let table = u64::from(word(3)) << 32 | u64::from(word(2) & !0x7f);
        let mut fis = [0; 20];
        self.load(table, &mut fis);
        Accepted {
            slot,
            queued: self.get(SACT) & 1 << slot != 0,
            own: self.list() >= OWN,
            table,
            regions: u64::from(word(0) >> 16),
            header,
            clears_busy: word(0) & 1 << 10 != 0,
            fis,
        }
    }

    /// What the guest has given to the disk may be done, or not, when it is aborted.
    fn forget(&mut self, device: bool) {
        let slots = (0..32).filter(|slot| self.get(CI) & 1 << slot != 0);
        let fetched: Vec<_> = slots.map(|slot| self.command(slot)).collect();
        for command in fetched.iter().chain(&self.accepted.clone()) {
            self.spoil(command);
        }
        self.accepted.clear();
        if device {
            self.in_reset = false;
            self.ncq_error = false;
        }
    }

    /// What the sectors of a write that has come to nothing have is the disk's affair.
    fn spoil(&mut self, command: &Accepted) {
        let (write, start, count) = extent(&command.fis);
        if command.own {
            return;
        }
        let ranges = if command.fis[2] == 6 {
            self.trimmed(command)
        } else if write {
            vec![(start, count)]
        } else {
            Vec::new()
        };
        for (start, count) in ranges {
            for sector in start..(start + count).min(DISK) {
                let at = usize::try_from(sector).unwrap();
                self.fresh[at] = true;
                self.guests[at] = true;
            }
        }
    }

    fn stopped(&mut self) {
        self.is_halted = false;
        *self.at(CI) = 0;
        *self.at(SACT) = 0;
    }

    fn pieces(&self, command: &Accepted) -> Vec<(u64, usize)> {
        let entries = (0..command.regions.min(300)).map(|n| {
            let mut entry = [0; 16];
            self.load(command.table + 0x80 + n * 16, &mut entry);
            let length = u32::from_le_bytes(entry[12..].try_into().unwrap()) & 0x3f_ffff;
            let base = u64::from_le_bytes(entry[..8].try_into().unwrap());
            (base, usize::try_from(length).unwrap() + 1)
        });
        entries.collect()
    }

    fn deliver(&mut self, command: &Accepted, data: &[u8]) {
        let mut rest = data;
        for (base, length) in self.pieces(command) {
            let (now, later) = rest.split_at(length.min(rest.len()));
            self.store(command.own, base, now);
            rest = later;
        }
        let done = u32::try_from(data.len() - rest.len()).unwrap();
        self.store(command.own, command.header + 4, &done.to_le_bytes());
    }

    fn collect(&self, command: &Accepted, bytes: usize) -> Vec<u8> {
        let mut data = Vec::new();
        for (base, length) in self.pieces(command) {
            let mut piece = vec![0; length.min(bytes - data.len())];
            self.load(base, &mut piece);
            data.extend(piece);
        }
        data.resize(bytes, 0xdd);
        data
    }

    fn trimmed(&self, command: &Accepted) -> Vec<(u64, u64)> {
        let bytes = usize::from(u16::from_le_bytes([command.fis[12], command.fis[13]])) * 512;
        let list = self.collect(command, bytes);
        let entry = |entry: &[u8]| {
            let number = u64::from_le_bytes(entry.try_into().unwrap());
            (number & 0xffff_ffff_ffff, number >> 48)
        };
        list.chunks_exact(8).map(entry).collect()
    }

    fn post(&mut self, own: bool, offset: u64, kind: u8) {
        if self.get(CMD) & FRE == 0 {
            return;
        }
        let base = u64::from(self.get(FBU)) << 32 | u64::from(self.get(FB));
        let [status, error, ..] = self.get(TFD).to_le_bytes();
        self.store(own, base + offset, &[kind, 0x40, status, error]);
    }

    /// Does one thing: fetches a command, or completes one. False if there is nothing to do.
    pub fn step(&mut self, which: usize, fails: bool) -> bool {
        let is_there = self.get(SSTS) & 0xf == 3;
        if self.is_halted || !is_there || self.get(CMD) & ST == 0 {
            return false;
        }
        let busy = self.accepted.iter().any(|command| !command.queued);
        let next = (0..32).find(|slot| self.get(CI) & !self.slots_busy() & 1 << slot != 0);
        let fetch = next.filter(|_| !busy && self.get(TFD) & BUSY == 0);
        let choices = self.accepted.len() + usize::from(fetch.is_some());
        if choices == 0 {
            return false;
        }
        match (which % choices, fetch) {
            (0, Some(slot)) => self.fetch(slot),
            // A device that hangs takes a command, and is busy with it for ever.
            _ if self.hangs => return false,
            (n, fetch) => {
                let command = self.accepted.remove(n - usize::from(fetch.is_some()));
                self.complete(&command, fails);
            }
        }
        true
    }

    fn slots_busy(&self) -> u32 {
        let bits = self.accepted.iter().map(|command| 1 << command.slot);
        bits.fold(0, |all, bit: u32| all | bit)
    }

    fn fetch(&mut self, slot: u32) {
        let command = self.command(slot);
        if command.fis[1] & 0x80 == 0 {
            // Software reset, or its end.
            self.in_reset = command.fis[15] & 4 != 0;
            self.ncq_error = false;
            *self.at(CI) &= !(1 << slot);
            if !command.clears_busy {
                *self.at(TFD) = READY;
                self.interrupt(1);
            }
            return;
        }
        if self.in_reset {
            *self.at(TFD) |= BUSY;
            return;
        }
        self.seen.push(command.fis[2]);
        self.own_commands += u32::from(command.own);
        if command.queued && matches!(command.fis[2], 0x60 | 0x61) {
            *self.at(CI) &= !(1 << slot);
        } else {
            *self.at(TFD) = READY | BUSY;
        }
        self.accepted.push(command);
    }

    fn complete(&mut self, command: &Accepted, fails: bool) {
        let fails = if command.own {
            let fails = self.fail_own > 0;
            self.fail_own -= u32::from(fails);
            fails
        } else {
            fails
        };
        let mixes = !command.queued && !self.accepted.is_empty();
        let result = if mixes || self.ncq_error && command.fis[2] != 0x2f {
            Err(ABRT)
        } else if fails {
            Err(IDNF)
        } else {
            self.execute(command)
        };
        let bit = 1 << command.slot;
        if let Err(task) = result {
            self.spoil(command);
            *self.at(TFD) = task;
            self.is_halted = true;
            self.ncq_error |= command.queued;
            self.post(command.own, if command.queued { 0x58 } else { 0x40 }, 0x34);
            self.interrupt(TFES | 1);
            return;
        }
        *self.at(TFD) = READY;
        if command.queued {
            *self.at(SACT) &= !bit;
            self.post(command.own, 0x58, 0xa1);
            self.interrupt(1 << 3);
        } else {
            *self.at(CI) &= !bit;
            let is_pio = matches!(command.fis[2], 0xec | 0x20 | 0x24 | 0x2f);
            self.post(command.own, if is_pio { 0x20 } else { 0x40 }, 0x34);
            self.interrupt(if is_pio { 2 } else { 1 });
        }
    }

    fn execute(&mut self, command: &Accepted) -> Result<(), u32> {
        let (is_write, start, count) = extent(&command.fis);
        let bytes = |start: u64, count: u64| {
            let at = |sector: u64| usize::try_from(sector * 512).unwrap();
            at(start)..at(start + count)
        };
        match command.fis[2] {
            0x06 => {
                for (start, count) in self.trimmed(command) {
                    if start + count > DISK {
                        return Err(IDNF);
                    }
                    self.disk[bytes(start, count)].fill(0);
                    self.mark(command.own, start, count);
                }
            }
            0x2f => self.ncq_error = false,
            0xec => {
                let identity = self.identity;
                self.deliver(command, &identity);
            }
            0xe7 | 0xea | 0xef | 0xe5 | 0x00 => {}
            0x20 | 0x24 | 0x25 | 0x60 | 0xc8 | 0x30 | 0x35 | 0x3d | 0x61 | 0xca => {
                if (command.fis[2] & !1 == 0x60) != command.queued {
                    return Err(ABRT);
                }
                if start + count > DISK {
                    return Err(IDNF);
                }
                if !self.strict && count > 64 {
                    return Ok(());
                }
                let at = bytes(start, count);
                if is_write {
                    let data = self.collect(command, at.len());
                    self.disk[at].copy_from_slice(&data);
                    self.mark(command.own, start, count);
                } else {
                    for sector in start..start + count {
                        assert!(
                            command.own
                                || !self.strict
                                || self.fresh[usize::try_from(sector).unwrap()],
                            "the guest reads sector {sector}, which is not there"
                        );
                    }
                    let data = self.disk[at].to_vec();
                    self.deliver(command, &data);
                }
            }
            _ => return Err(ABRT),
        }
        Ok(())
    }

    fn mark(&mut self, own: bool, start: u64, count: u64) {
        for sector in start..start + count {
            let at = usize::try_from(sector).unwrap();
            self.fresh[at] = true;
            self.guests[at] |= !own;
            let is_lost = own && self.guests[at] && self.strict;
            assert!(!is_lost, "a write of the guest's is lost");
        }
    }

    fn tick(&mut self) {
        self.pass(1);
        self.accesses = self.accesses.wrapping_add(1);
        if self.eager != 0 && self.accesses.is_multiple_of(self.eager) {
            let which = usize::try_from(self.accesses / self.eager).unwrap();
            self.step(which, false);
        }
    }

    fn write_port(&mut self, register: u32, value: u32) {
        let command = self.get(CMD);
        match register {
            IS => *self.at(IS) &= !(value & !(1 << 22 | 1 << 6)),
            SERR => {
                *self.at(SERR) &= !value;
                for (error, status) in [(26, 6), (16, 22)] {
                    if value & 1 << error != 0 {
                        *self.at(IS) &= !(1 << status);
                    }
                }
            }
            IE => *self.at(IE) = value,
            CMD => {
                let kept = command & (CR | FR);
                let mut new = value & !(CR | FR | 1 << 3) | kept;
                if value & 1 << 3 != 0 && command & ST == 0 {
                    *self.at(TFD) &= !0x88;
                }
                if new & ST != 0 && command & ST == 0 {
                    if self.strict {
                        assert!(new & FRE != 0, "starts, and receives nothing");
                        assert!(command & CR == 0, "starts while it stops");
                        if self.get(SSTS) & 0xf == 3 && !self.hangs {
                            assert_eq!(self.get(TFD) & 0x88, 0, "starts while BSY");
                        }
                    }
                    new |= CR;
                    self.stopping = 0;
                }
                if new & ST == 0 && command & ST != 0 {
                    self.forget(false);
                    self.stopping = self.stop_reads;
                    if !self.is_lazy || self.stopping == 0 {
                        self.stopped();
                    }
                    if self.stopping == 0 {
                        new &= !CR;
                    }
                }
                assert!(
                    !self.strict || new & CR == 0 || new & FRE != 0,
                    "what it receives is lost"
                );
                new = if new & FRE != 0 { new | FR } else { new & !FR };
                *self.at(CMD) = new;
            }
            CLB | CLBU => {
                let changes = self.get(register) != value;
                assert!(
                    !self.strict || !changes || command & CR == 0,
                    "moves a list in use"
                );
                *self.at(register) = value & if register == CLB { !0x3ff } else { !0 };
            }
            FB | FBU => {
                let changes = self.get(register) != value;
                assert!(
                    !self.strict || !changes || command & FR == 0,
                    "moves FISes in use"
                );
                *self.at(register) = value & if register == FB { !0xff } else { !0 };
            }
            SCTL => {
                if value & 0xf == 1 {
                    self.forget(true);
                    *self.at(TFD) = BUSY;
                } else if self.get(SCTL) & 0xf == 1 {
                    self.hangs = false;
                    self.plug(self.get(SSTS) & 0xf == 3);
                }
                *self.at(SCTL) = value;
            }
            SACT | CI => {
                assert!(
                    !self.strict || command & ST != 0,
                    "issues to a port that is off"
                );
                if command & ST != 0 {
                    if self.list() >= OWN {
                        let others = self.outstanding() && self.strict;
                        assert!(!others, "the VMM's among the guest's");
                    }
                    *self.at(register) |= value;
                }
            }
            _ => {}
        }
        self.update();
    }

    fn read_port(&mut self, register: u32) -> u32 {
        if register == CMD && self.get(CMD) & (ST | CR) == CR {
            self.stopping = self.stopping.saturating_sub(1);
            if self.stopping == 0 {
                *self.at(CMD) &= !CR;
                self.stopped();
            }
        }
        self.get(register)
    }
}

/// Whether a command writes, from where on, how many sectors.
fn extent(fis: &[u8; 20]) -> (bool, u64, u64) {
    let number = |at: [usize; 6]| {
        at.iter()
            .rev()
            .fold(0, |n, at| n << 8 | u64::from(fis[*at]))
    };
    let long = number([4, 5, 6, 8, 9, 10]);
    let pair = |low: usize, high: usize| match u16::from_le_bytes([fis[low], fis[high]]) {
        0 => 65536,
        count => u64::from(count),
    };
    let short = long & 0xff_ffff | u64::from(fis[7] & 0xf) << 24;
    let few = if fis[12] == 0 {
        256
    } else {
        u64::from(fis[12])
    };
    match fis[2] {
        0x60 => (false, long, pair(3, 11)),
        0x61 => (true, long, pair(3, 11)),
        0x24 | 0x25 => (false, long, pair(12, 13)),
        0x35 | 0x3d => (true, long, pair(12, 13)),
        0x20 | 0xc8 => (false, short, few),
        0x30 | 0xca => (true, short, few),
        _ => (false, 0, 0),
    }
}

impl Platform for Hba {
    fn read_register(&mut self, offset: u32, _width: u8) -> u64 {
        self.tick();
        let value = match offset {
            GHC => self.ghc,
            GLOBAL_IS => self.global,
            _ => match offset.checked_sub(0x100 + self.number * 0x80) {
                Some(register) if register < 0x80 => self.read_port(register & !3),
                _ => 0,
            },
        };
        u64::from(value)
    }

    fn write_register(&mut self, offset: u32, _width: u8, value: u64) {
        self.tick();
        let value = u32::try_from(value & 0xffff_ffff).unwrap();
        match offset {
            GHC if value & 1 != 0 => {
                self.forget(true);
                self.stopped();
                let (status, task) = (self.get(SSTS), READY);
                self.port = [0; 32];
                *self.at(SSTS) = status;
                *self.at(TFD) = task;
                self.ghc = 0x8000_0000;
                self.global = 0;
                self.hangs = false;
            }
            GHC => self.ghc = value,
            GLOBAL_IS => {
                self.global &= !value;
                self.update();
            }
            _ => match offset.checked_sub(0x100 + self.number * 0x80) {
                Some(register) if register < 0x80 => self.write_port(register & !3, value),
                _ => {}
            },
        }
    }

    fn read_memory(&mut self, address: u64, into: &mut [u8]) -> bool {
        let there = address < OWN && self.dma(address, into.len());
        if there {
            self.load(address, into);
        }
        there
    }

    fn write_memory(&mut self, address: u64, from: &[u8]) -> bool {
        let there = address < OWN && self.dma(address, from.len());
        if there {
            self.store(false, address, from);
        }
        there
    }

    fn own_address(&self) -> u64 {
        OWN
    }

    fn own_memory(&mut self) -> &mut [u8] {
        &mut self.own
    }

    fn now(&self) -> u64 {
        self.clock.get()
    }
}
