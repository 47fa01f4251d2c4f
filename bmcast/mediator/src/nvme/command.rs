//! Commands of NVMe 1.4: the admin set (5), and the NVM set (6).

use bmcast_image::Sectors;

/// Admin: Delete I/O Submission Queue (5.6).
pub const DELETE_SQ: u8 = 0x00;
/// Admin: Create I/O Submission Queue (5.4).
pub const CREATE_SQ: u8 = 0x01;
/// Admin: Delete I/O Completion Queue (5.5).
pub const DELETE_CQ: u8 = 0x04;
/// Admin: Create I/O Completion Queue (5.3).
pub const CREATE_CQ: u8 = 0x05;
/// Admin: Identify (5.15).
pub const IDENTIFY: u8 = 0x06;
/// Admin: Set Features (5.21).
pub const SET_FEATURES: u8 = 0x09;
/// Admin: Get Features (5.9).
pub const GET_FEATURES: u8 = 0x0a;
/// The feature Number of Queues (5.21.1.7).
pub const NUMBER_OF_QUEUES: u32 = 0x07;
/// The feature Namespace Write Protection Config (5.21.1.29).
const WRITE_PROTECTION: u32 = 0x84;
/// NVM: Flush (6.8).
pub const FLUSH: u8 = 0x00;
/// NVM: Write (6.15).
pub const WRITE: u8 = 0x01;
/// NVM: Read (6.9).
pub const READ: u8 = 0x02;
/// A code that neither set has, and that moves no data: devices answer Invalid Command Opcode (4.6.1.2.1).
pub const UNKNOWN: u8 = 0x74;
/// A namespace that stands for all.
pub const ALL: u32 = u32::MAX;
/// A queue that there is never: 65,535 are the most.
pub const NO_QUEUE: u16 = 0xffff;

/// Bytes of a submission queue's entry.
pub const ENTRY: usize = 64;

/// An entry of a submission queue (4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(pub [u8; ENTRY]);

impl Entry {
    /// A command of the VMM's.
    pub fn new(opcode: u8, nsid: u32) -> Self {
        let mut entry = Self([0; ENTRY]);
        entry.0[0] = opcode;
        entry.set(1, nsid);
        entry
    }

    /// Its command.
    pub fn opcode(&self) -> u8 {
        self.0[0]
    }

    /// Its command identifier.
    pub fn cid(&self) -> u16 {
        u16::from_le_bytes([self.0[2], self.0[3]])
    }

    /// With another.
    pub fn with_cid(mut self, cid: u16) -> Self {
        self.0[2..4].copy_from_slice(&cid.to_le_bytes());
        self
    }

    /// Whether it is one of a pair (FUSE).
    pub fn is_fused(&self) -> bool {
        self.0[1] & 3 != 0
    }

    /// How its data are described: 0 by PRPs (PSDT).
    pub fn description(&self) -> u8 {
        self.0[1] >> 6
    }

    /// Its dword of a number below 16.
    pub fn dword(&self, number: usize) -> u32 {
        let bytes = self.0.get(number * 4..number * 4 + 4);
        bytes
            .and_then(|bytes| bytes.try_into().ok())
            .map_or(0, u32::from_le_bytes)
    }

    /// Sets it.
    pub fn set(&mut self, number: usize, value: u32) {
        if let Some(bytes) = self.0.get_mut(number * 4..number * 4 + 4) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Two dwords, the lower half first.
    pub fn long(&self, number: usize) -> u64 {
        u64::from(self.dword(number + 1)) << 32 | u64::from(self.dword(number))
    }

    /// Sets them.
    pub fn set_long(&mut self, number: usize, value: u64) {
        self.set(number, super::registers::low(value));
        self.set(number + 1, super::registers::low(value >> 32));
    }

    /// PRP entry 1 or 2.
    pub fn prp(&self, number: usize) -> u64 {
        self.long(6 + number * 2)
    }

    /// Sets both.
    pub fn set_prps(&mut self, first: u64, second: u64) {
        self.set_long(6, first);
        self.set_long(8, second);
    }

    /// The same as one that devices do not know.
    pub fn refused(&self) -> Self {
        Self::new(UNKNOWN, 0).with_cid(self.cid())
    }

    /// Sets where a command for logical blocks begins.
    pub fn set_start(&mut self, lba: u64) {
        self.set_long(10, lba);
    }

    /// The sectors of a command for logical blocks, of `ratio` sectors each; none if there are no such numbers.
    fn sectors(&self, ratio: u64) -> Option<Sectors> {
        let start = self.long(10).checked_mul(ratio)?;
        let count = (u64::from(self.dword(12) & 0xffff) + 1) * ratio;
        Sectors::new(start, count)
    }
}

/// What a command of an I/O queue asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// To read.
    Read(Sectors),
    /// To write, and whether past the cache.
    Write(Sectors, bool),
    /// That what was written be durable.
    Flush,
    /// To discard so many ranges of a list.
    Discard(u16),
    /// Nothing about blocks of the disk.
    Other,
    /// What is past every end.
    Beyond,
    /// What the VMM does not let pass.
    Refused,
}

/// What a command of an I/O queue asks of namespace `nsid`, whose blocks have `ratio` sectors.
pub fn decode(entry: &Entry, nsid: u32, ratio: u64) -> Command {
    // Of a pair one could pass and the other be held.
    if entry.is_fused() {
        return Command::Refused;
    }
    let named = entry.dword(1);
    if named != nsid && named != ALL {
        return Command::Other;
    }
    let sectors = |make: fn(Sectors) -> Command| entry.sectors(ratio).map_or(Command::Beyond, make);
    match entry.opcode() {
        FLUSH => Command::Flush,
        // Read, Compare, Verify.
        READ | 0x05 | 0x0c => sectors(Command::Read),
        // Write and Write Zeroes have FUA; Write Uncorrectable not.
        WRITE | 0x08 if entry.dword(12) & 1 << 30 != 0 => {
            sectors(|sectors| Command::Write(sectors, true))
        }
        WRITE | 0x04 | 0x08 => sectors(|sectors| Command::Write(sectors, false)),
        // Dataset Management: bit 2 is Deallocate, the others are hints (6.7).
        0x09 if entry.dword(11) & 1 << 2 == 0 => Command::Other,
        0x09 => Command::Discard(u16::from(entry.0[40]) + 1),
        _ => Command::Refused,
    }
}

/// A range of a Dataset Management command's list (6.7.1.1); none if there are no such numbers.
pub fn range(bytes: &[u8; 16], ratio: u64) -> Option<Sectors> {
    let entry = |from: usize| bytes.get(from..from + 8)?.try_into().ok();
    let lengths = u64::from_le_bytes(entry(0)?);
    let start = u64::from_le_bytes(entry(8)?);
    let count = (lengths >> 32) * ratio;
    Sectors::new(start.checked_mul(ratio)?, count)
}

/// Whether an admin command may pass as it is. What changes what the disk has behind the VMM's back may not, and what
/// is not known.
pub fn may_pass(entry: &Entry) -> bool {
    if entry.is_fused() || entry.description() != 0 {
        return false;
    }
    match entry.opcode() {
        SET_FEATURES => entry.dword(10) & 0xff != WRITE_PROTECTION,
        // Get Log Page, Abort, Get Features, Asynchronous Event Request, Device Self-test, Keep Alive, Directives,
        // NVMe-MI Receive, Get LBA Status.
        0x02 | 0x08 | GET_FEATURES | 0x0c | 0x14 | 0x18 | 0x19 | 0x1a | 0x1e | 0x86 => true,
        _ => false,
    }
}
