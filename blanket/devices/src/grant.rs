//! The pages that a guest grants to its backends (`public/grant_table.h`, version 1).
//!
//! [`acquire`] and [`release`] are what a backend does with an entry before and after it
//! uses the granted frame, so that a guest that revokes a grant sees whether it is in use.
//! [`Grants`] does it for a VM's table, which lies in memory that the guest shares.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use blanket_abi::xen::domid;
use blanket_abi::xen::grant::{PER_FRAME, flag};
use blanket_abi::{Gfn, PAGE_SIZE};
use blanket_disk::Buffer;
use vm_memory::GuestMemoryError;

use crate::page::Frames;
use crate::sync::lock;
use crate::written::Written;
use crate::{GuestMemory, Page};

/// A guest's grant entries as a backend sees them: shared memory that the guest
/// changes at any time. `gref` is below the number that [`acquire`] was given.
pub trait Entries {
    /// The entry's first word: flags in the low half, domain in the high half.
    fn head(&self, gref: u32) -> u32;
    /// Replaces the first word if it is still `old`, with acquire order on success.
    ///
    /// # Errors
    /// The word that was there instead.
    fn exchange_head(&self, gref: u32, old: u32, new: u32) -> Result<(), u32>;
    /// Clears bits of the flags atomically, with release order, leaving all others.
    fn clear_flags(&self, gref: u32, bits: u16);
    /// The entry's frame.
    fn frame(&self, gref: u32) -> u32;
}

/// Why a grant cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// No such entry.
    #[error("there is no such entry")]
    BadRef,
    /// The entry grants nothing, or to somebody else.
    #[error("it grants nothing to the backend")]
    NotGranted,
    /// Writing was asked for and the grant is read-only.
    #[error("it is read-only")]
    ReadOnly,
    /// The guest changes the entry faster than it can be taken.
    #[error("the guest keeps changing it")]
    Unstable,
}

/// Times that an entry is tried, as in Xen.
const TRIES: u32 = 5;

/// Takes entry `gref` of a table with `nr_entries` for domain `dom` (the backend):
/// marks it as being read, and written if `write`, and returns the granted frame.
/// The frame number is the guest's word and must be checked against its memory.
/// The caller serialises uses of one entry, with a [`Pins`] for each.
///
/// # Errors
/// [`Denied`]; the entry is then as it was.
pub fn acquire(
    entries: &impl Entries,
    nr_entries: u64,
    gref: u32,
    dom: u16,
    write: bool,
) -> Result<Gfn, Denied> {
    if u64::from(gref) >= nr_entries {
        return Err(Denied::BadRef);
    }
    let mut head = entries.head(gref);
    for _ in 0..TRIES {
        let [f0, f1, d0, d1] = head.to_le_bytes();
        let flags = u16::from_le_bytes([f0, f1]);
        if flags & flag::TYPE_MASK != flag::PERMIT_ACCESS || u16::from_le_bytes([d0, d1]) != dom {
            return Err(Denied::NotGranted);
        }
        if write && flags & flag::READONLY != 0 {
            return Err(Denied::ReadOnly);
        }
        let mark = flag::READING | if write { flag::WRITING } else { 0 };
        if flags & mark == mark {
            // Already marked by another use of the same grant.
            return Ok(Gfn(u64::from(entries.frame(gref))));
        }
        match entries.exchange_head(gref, head, head | u32::from(mark)) {
            Ok(()) => return Ok(Gfn(u64::from(entries.frame(gref)))),
            Err(now) => head = now,
        }
    }
    Err(Denied::Unstable)
}

/// Gives an entry back: clears the marks that [`Pins::remove`] says.
pub fn release(entries: &impl Entries, gref: u32, marks: u16) {
    if marks != 0 {
        entries.clear_flags(gref, marks);
    }
}

/// Uses of one grant by a backend. The marks in the entry stay until the last use
/// of their kind ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pins {
    readers: u32,
    writers: u32,
}

impl Pins {
    /// Counts a use that [`acquire`] allowed.
    pub fn add(&mut self, write: bool) {
        let count = if write {
            &mut self.writers
        } else {
            &mut self.readers
        };
        *count = count.saturating_add(1);
    }

    /// Ends a use. Returns the marks to clear with [`release`].
    #[must_use]
    pub fn remove(&mut self, write: bool) -> u16 {
        let count = if write {
            &mut self.writers
        } else {
            &mut self.readers
        };
        if *count == 0 {
            return 0;
        }
        *count -= 1;
        let mut marks = 0;
        if write && self.writers == 0 {
            marks |= flag::WRITING;
        }
        if self.is_unused() {
            marks |= flag::READING;
        }
        marks
    }

    /// Whether no use is left.
    #[must_use]
    pub const fn is_unused(&self) -> bool {
        self.readers == 0 && self.writers == 0
    }
}

/// Why a grant cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The entry does not allow it.
    #[error("grant {gref} cannot be used: {why}")]
    Denied {
        /// The entry.
        gref: u32,
        /// What is wrong with it.
        why: Denied,
    },
    /// The entry names a frame that is not RAM of the VM.
    #[error("grant {gref} is of frame {frame:#x}, which is not the guest's RAM")]
    Frame {
        /// The entry.
        gref: u32,
        /// What it names.
        frame: u64,
    },
}

/// Locks of the counts, so that threads of different queues seldom meet.
const SHARDS: usize = 64;

/// A VM's grant table, as its backends use it.
pub struct Grants {
    ram: Frames,
    /// Its frames; all of them, those that the guest has not asked for are empty.
    table: Frames,
    /// Uses of each entry: entry `n` is number `n / SHARDS` of shard `n % SHARDS`.
    pins: Vec<Mutex<Box<[Pins]>>>,
    written: Written,
}

impl std::fmt::Debug for Grants {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grants")
            .field("table", &self.table)
            .finish_non_exhaustive()
    }
}

impl Grants {
    /// The table of `frames` frames from `base` on, of a VM with `ram_frames` frames of RAM.
    ///
    /// # Errors
    /// The table or the RAM is not in its memory, or not in one piece.
    pub fn new(
        memory: &Arc<GuestMemory>,
        ram_frames: u64,
        base: Gfn,
        frames: u64,
    ) -> Result<Self, GuestMemoryError> {
        let entries = usize::try_from(frames).unwrap_or(usize::MAX / ENTRIES) * ENTRIES;
        let shard = || Mutex::new(vec![Pins::default(); entries.div_ceil(SHARDS)].into());
        Ok(Self {
            ram: Frames::new(memory, Gfn(0), ram_frames)?,
            table: Frames::new(memory, base, frames)?,
            pins: (0..SHARDS).map(|_| shard()).collect(),
            written: Written::new(ram_frames),
        })
    }

    /// The VM's memory, to be kept while a [`Page::buffer`] of a granted page is in use.
    #[must_use]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        self.ram.memory()
    }

    /// The frames of RAM that lie in a [`Page::buffer`] as a whole: the first one, how many bytes of
    /// the buffer come before it, and how many they are.
    pub(crate) fn frames_in(&self, buffer: &Buffer) -> Option<(u64, usize, u64)> {
        self.ram.whole(buffer)
    }

    /// Begins or ceases to note which frames backends write.
    pub fn log(&self, on: bool) {
        self.written.set(on);
    }

    /// Adds the frames of RAM that backends may write at any moment, among them their rings.
    pub fn add_written(&self, to: &mut [u64]) {
        for (shard, pins) in (0u32..).zip(&self.pins) {
            for (gref, pins) in (shard..).step_by(SHARDS).zip(&lock(pins)[..]) {
                // The guest's word, which it must not change while it is in use. One that does
                // loses what was written there, and nothing of others'.
                let frame = u64::from(self.frame(gref));
                if pins.writers > 0
                    && frame < self.ram.count()
                    && let Ok(word) = usize::try_from(frame / 64)
                    && let Some(word) = to.get_mut(word)
                {
                    *word |= 1 << (frame % 64);
                }
            }
        }
    }

    /// Adds the frames of RAM that backends have written since this was asked last, and
    /// those that they may write at any moment, to `to`: a bit for each frame.
    pub fn take_log(&self, to: &mut [u64]) {
        // In this order: a use that ends in between has noted what it wrote.
        self.add_written(to);
        self.written.take(to);
    }

    /// Maps the page that an entry grants to domain 0. The guest cannot revoke it before
    /// the [`Mapping`] is dropped.
    ///
    /// # Errors
    /// What the entry lacks.
    pub fn map(self: &Arc<Self>, gref: u32, write: bool) -> Result<Mapping, Error> {
        let used = self.begin(gref, write)?;
        Ok(Mapping {
            used,
            grants: Arc::clone(self),
        })
    }

    /// Begins a use of an entry.
    fn begin(&self, gref: u32, write: bool) -> Result<Used, Error> {
        let denied = |why| Error::Denied { gref, why };
        let bad = || denied(Denied::BadRef);
        let entries = self.table.count() * PER_FRAME;
        let (shard, index) = self.pin_of(gref).ok_or_else(bad)?;
        let mut pins = lock(shard);
        let pin = pins.get_mut(index).ok_or_else(bad)?;
        let gfn = acquire(self, entries, gref, domid::BACKEND, write).map_err(denied)?;
        pin.add(write);
        if gfn.0 >= self.ram.count() {
            release(self, gref, pin.remove(write));
            return Err(Error::Frame { gref, frame: gfn.0 });
        }
        Ok(Used { gfn, gref, write })
    }

    /// Ends it.
    fn end(&self, used: Used) {
        let Used { gfn, gref, write } = used;
        if write {
            self.written.note(gfn);
        }
        if let Some((shard, index)) = self.pin_of(gref) {
            let mut pins = lock(shard);
            if let Some(pin) = pins.get_mut(index) {
                release(self, gref, pin.remove(write));
            }
        }
    }

    fn pin_of(&self, gref: u32) -> Option<(&Mutex<Box<[Pins]>>, usize)> {
        let gref = gref as usize;
        Some((self.pins.get(gref % SHARDS)?, gref / SHARDS))
    }

    /// The page of a use that has begun.
    fn page(&self, used: Used) -> Page<'_> {
        // It was looked at when the use began.
        let page = self.ram.page(used.gfn.0);
        page.expect("a frame of RAM")
    }

    /// A word of an entry that exists.
    fn word(&self, gref: u32, at: usize) -> &AtomicU32 {
        let gref = gref as usize;
        let page = self.table.page((gref / ENTRIES) as u64);
        page.expect("an entry of the table")
            .word(gref % ENTRIES * 8 + at)
    }
}

const ENTRIES: usize = (PAGE_SIZE / 8) as usize;
const _: () = assert!(ENTRIES as u64 == PER_FRAME);

impl Entries for Grants {
    fn head(&self, gref: u32) -> u32 {
        self.word(gref, 0).load(Ordering::Acquire)
    }

    fn exchange_head(&self, gref: u32, old: u32, new: u32) -> Result<(), u32> {
        self.word(gref, 0)
            .compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
            .map(|_| ())
    }

    fn clear_flags(&self, gref: u32, bits: u16) {
        self.word(gref, 0)
            .fetch_and(!u32::from(bits), Ordering::Release);
    }

    fn frame(&self, gref: u32) -> u32 {
        self.word(gref, 4).load(Ordering::Acquire)
    }
}

/// A use of a grant.
#[derive(Clone, Copy, Debug)]
struct Used {
    gfn: Gfn,
    gref: u32,
    write: bool,
}

/// A page that the guest grants, in use by a backend until this is dropped.
#[derive(Debug)]
pub struct Mapping {
    used: Used,
    grants: Arc<Grants>,
}

impl Mapping {
    /// The page.
    #[must_use]
    pub fn page(&self) -> Page<'_> {
        self.grants.page(self.used)
    }

    /// Whether the backend may write it.
    #[must_use]
    pub fn writable(&self) -> bool {
        self.used.write
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.grants.end(self.used);
    }
}

/// Pages that the guest grants for one request, in use by a backend until this is cleared or
/// dropped.
#[derive(Debug)]
pub struct Mappings {
    used: Vec<Used>,
    grants: Arc<Grants>,
}

impl Mappings {
    /// None yet.
    #[must_use]
    pub fn new(grants: &Arc<Grants>) -> Self {
        Self {
            used: Vec::new(),
            grants: Arc::clone(grants),
        }
    }

    /// Adds one, as [`Grants::map`] does.
    ///
    /// # Errors
    /// What the entry lacks. Those that were added stay in use.
    pub fn map(&mut self, gref: u32, write: bool) -> Result<Page<'_>, Error> {
        let used = self.grants.begin(gref, write)?;
        self.used.push(used);
        Ok(self.grants.page(used))
    }

    /// Ends their use.
    pub fn clear(&mut self) {
        for used in self.used.drain(..) {
            self.grants.end(used);
        }
    }

    /// In the order in which they were added.
    pub fn pages(&self) -> impl Iterator<Item = Page<'_>> {
        self.used.iter().map(|used| self.grants.page(*used))
    }
}

impl Drop for Mappings {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
#[path = "grant/tests.rs"]
mod tests;
