//! Queues in memory (NVMe 1.4, 4).

use alloc::vec::Vec;
use core::sync::atomic::{Ordering, compiler_fence};

use bmcast_image::Sectors;

use super::command::{ENTRY, Entry};
use crate::Platform;

/// Bytes of a completion queue's entry.
pub const COMPLETION: usize = 16;

/// Where a queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ring {
    /// Its first entry.
    pub base: u64,
    /// Its entries: at most 65,536.
    pub size: u32,
}

impl Ring {
    /// An entry's address.
    pub fn at(&self, index: u32, bytes: usize) -> Option<u64> {
        let offset = u64::from(index).checked_mul(u64::try_from(bytes).ok()?)?;
        self.base.checked_add(offset)
    }

    /// The index behind an index.
    pub fn after(&self, index: u32) -> u32 {
        if index + 1 >= self.size { 0 } else { index + 1 }
    }
}

/// A completion (4.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Command specific.
    pub result: u32,
    /// Its submission queue.
    pub queue: u16,
    /// Its command.
    pub cid: u16,
    /// 0 if it has gone well.
    pub status: u16,
}

impl Completion {
    /// What is in these bytes, if it is of a phase.
    pub fn of(bytes: &[u8; COMPLETION], phase: bool) -> Option<Self> {
        let [a, b, c, d, _, _, _, _, _, _, e, f, g, h, i, j] = *bytes;
        let status = u16::from_le_bytes([i, j]);
        (status & 1 == u16::from(phase)).then(|| Self {
            result: u32::from_le_bytes([a, b, c, d]),
            queue: u16::from_le_bytes([e, f]),
            cid: u16::from_le_bytes([g, h]),
            status: status >> 1,
        })
    }
}

/// The completion at an address of guest memory, if it is of a phase: the phase is looked at first.
pub fn completion<P: Platform>(platform: &mut P, at: u64, phase: bool) -> Option<Completion> {
    let mut bytes = [0; COMPLETION];
    let there = platform.read_memory(at.checked_add(12)?, &mut bytes[12..]);
    if !there || (bytes[14] & 1 != 0) != phase {
        return None;
    }
    compiler_fence(Ordering::SeqCst);
    let there = platform.read_memory(at, &mut bytes);
    Completion::of(&bytes, phase).filter(|_| there)
}

/// A completion queue of the guest's.
#[derive(Debug)]
pub struct Cq {
    ring: Ring,
    /// The next entry that was not seen.
    index: u32,
    phase: bool,
}

impl Cq {
    /// A new one.
    pub fn new(ring: Ring) -> Self {
        Self {
            ring,
            index: 0,
            phase: true,
        }
    }

    /// Its entries.
    pub fn size(&self) -> u32 {
        self.ring.size
    }

    /// What the controller has posted since, one by one, with its address.
    pub fn next<P: Platform>(&mut self, platform: &mut P) -> Option<(u64, Completion)> {
        let at = self.ring.at(self.index, COMPLETION)?;
        let found = completion(platform, at, self.phase)?;
        self.index = self.ring.after(self.index);
        if self.index == 0 {
            self.phase = !self.phase;
        }
        Some((at, found))
    }
}

/// The first entry that the controller was not told of.
#[derive(Debug)]
pub struct Held<C> {
    /// The command's identifier.
    pub cid: u16,
    /// What it asks.
    pub command: C,
    /// Of a list: what was not asked about yet.
    pub ranges: Option<Vec<Sectors>>,
}

/// A submission queue of the guest's.
#[derive(Debug)]
pub struct Sq<C> {
    ring: Ring,
    /// Where its completions go.
    pub cq: u16,
    /// Where the guest's tail is.
    pub tail: u32,
    /// Where the controller's is.
    pub issued: u32,
    /// The entry there, once it was read.
    pub held: Option<Held<C>>,
    /// What has passed of writes whose completion was not seen: their commands' identifiers and sectors.
    pub writes: Vec<(u16, Sectors)>,
    /// It is being deleted.
    pub closing: bool,
}

impl<C> Sq<C> {
    /// A new one.
    pub fn new(ring: Ring, cq: u16) -> Self {
        Self {
            ring,
            cq,
            tail: 0,
            issued: 0,
            held: None,
            writes: Vec::new(),
            closing: false,
        }
    }

    /// Its entries.
    pub fn size(&self) -> u32 {
        self.ring.size
    }

    /// Whether there is something that the controller was not told of.
    pub fn waits(&self) -> bool {
        self.issued != self.tail
    }

    /// The first of that.
    pub fn read<P: Platform>(&self, platform: &mut P) -> Option<Entry> {
        let mut entry = Entry([0; ENTRY]);
        let at = self.ring.at(self.issued, ENTRY)?;
        platform.read_memory(at, &mut entry.0).then_some(entry)
    }

    /// Has the controller find another one there.
    #[must_use]
    pub fn replace<P: Platform>(&self, platform: &mut P, entry: &Entry) -> bool {
        let at = self.ring.at(self.issued, ENTRY);
        at.is_some_and(|at| platform.write_memory(at, &entry.0))
    }

    /// It passes.
    pub fn pass(&mut self) {
        self.held = None;
        self.issued = self.ring.after(self.issued);
    }
}
