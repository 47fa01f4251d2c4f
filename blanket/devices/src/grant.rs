//! The pages that a guest grants to its backends (`public/grant_table.h`, version 1).
//!
//! [`acquire`] and [`release`] are what a backend does with an entry before and after it
//! uses the granted frame, so that a guest that revokes a grant sees whether it is in use.
//! [`Grants`] does it for a VM's table, which lies in memory that the guest shares.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use blanket_abi::xen::domid;
use blanket_abi::xen::grant::{PER_FRAME, flag};
use blanket_abi::{Gfn, PAGE_SIZE};
use vm_memory::GuestMemoryError;

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
    /// The table or the frame cannot be reached.
    #[error("grant {gref}: {source}")]
    Memory {
        /// The entry.
        gref: u32,
        /// The cause.
        source: GuestMemoryError,
    },
}

/// Locks of the counts, so that threads of different queues seldom meet.
const SHARDS: usize = 64;

/// A VM's grant table, as its backends use it.
pub struct Grants {
    memory: Arc<GuestMemory>,
    ram_frames: u64,
    /// Its frames; all of them, those that the guest has not asked for are empty.
    table: Vec<Page>,
    /// Uses of each entry: entry `n` is number `n / SHARDS` of shard `n % SHARDS`.
    pins: Vec<Mutex<Box<[Pins]>>>,
    written: Written,
}

impl std::fmt::Debug for Grants {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grants")
            .field("frames", &self.table.len())
            .finish_non_exhaustive()
    }
}

impl Grants {
    /// The table of `frames` frames from `base` on, of a VM with `ram_frames` frames of RAM.
    ///
    /// # Errors
    /// The table is not in its memory.
    pub fn new(
        memory: &Arc<GuestMemory>,
        ram_frames: u64,
        base: Gfn,
        frames: u64,
    ) -> Result<Self, GuestMemoryError> {
        let table: Vec<Page> = (0..frames)
            .map(|index| Page::new(memory, Gfn(base.0 + index)))
            .collect::<Result<_, _>>()?;
        let each = (table.len() * ENTRIES).div_ceil(SHARDS);
        let shard = || Mutex::new(vec![Pins::default(); each].into_boxed_slice());
        Ok(Self {
            memory: Arc::clone(memory),
            ram_frames,
            table,
            pins: (0..SHARDS).map(|_| shard()).collect(),
            written: Written::new(ram_frames),
        })
    }

    /// Begins or ceases to note which frames backends write.
    pub fn log(&self, on: bool) {
        self.written.set(on);
    }

    /// Adds the frames of RAM that backends have written since this was asked last, and
    /// those that they may write at any moment, to `to`: a bit for each frame.
    pub fn take_log(&self, to: &mut [u64]) {
        for (shard, pins) in (0u32..).zip(&self.pins) {
            for (gref, pins) in (shard..).step_by(SHARDS).zip(&lock(pins)[..]) {
                if pins.writers > 0 {
                    // The guest's word, which it must not change while it is in use. One
                    // that does loses what was written there, and nothing of others'.
                    self.written.note(Gfn(u64::from(self.frame(gref))));
                }
            }
        }
        self.written.take(to);
    }

    /// Maps the page that an entry grants to domain 0. The guest cannot revoke it before
    /// the [`Mapping`] is dropped.
    ///
    /// # Errors
    /// What the entry lacks.
    pub fn map(self: &Arc<Self>, gref: u32, write: bool) -> Result<Mapping, Error> {
        let shard = self.shard(gref).ok_or(Error::Denied {
            gref,
            why: Denied::BadRef,
        })?;
        let mut pins = lock(shard);
        let entries = self.table.len() as u64 * PER_FRAME;
        let gfn = acquire(&**self, entries, gref, domid::BACKEND, write)
            .map_err(|why| Error::Denied { gref, why })?;
        let page = if gfn.0 < self.ram_frames {
            Page::new(&self.memory, gfn).map_err(|source| Error::Memory { gref, source })
        } else {
            Err(Error::Frame { gref, frame: gfn.0 })
        };
        let pin = pins.get_mut(gref as usize / SHARDS).ok_or(Error::Denied {
            gref,
            why: Denied::BadRef,
        })?;
        pin.add(write);
        match page {
            Ok(page) => Ok(Mapping {
                page,
                gfn,
                gref,
                write,
                grants: Arc::clone(self),
            }),
            Err(error) => {
                release(&**self, gref, pin.remove(write));
                Err(error)
            }
        }
    }

    fn unmap(&self, gref: u32, write: bool) {
        if let Some(shard) = self.shard(gref) {
            let mut pins = lock(shard);
            if let Some(pin) = pins.get_mut(gref as usize / SHARDS) {
                release(self, gref, pin.remove(write));
            }
        }
    }

    fn shard(&self, gref: u32) -> Option<&Mutex<Box<[Pins]>>> {
        self.pins.get(gref as usize % SHARDS)
    }

    /// Page and offset of an entry that exists.
    fn place(&self, gref: u32) -> (&Page, usize) {
        let gref = gref as usize;
        (&self.table[gref / ENTRIES], gref % ENTRIES * 8)
    }
}

const ENTRIES: usize = (PAGE_SIZE / 8) as usize;
const _: () = assert!(ENTRIES as u64 == PER_FRAME);

impl Entries for Grants {
    fn head(&self, gref: u32) -> u32 {
        let (page, at) = self.place(gref);
        page.load(at)
    }

    fn exchange_head(&self, gref: u32, old: u32, new: u32) -> Result<(), u32> {
        let (page, at) = self.place(gref);
        page.word(at)
            .compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
            .map(|_| ())
    }

    fn clear_flags(&self, gref: u32, bits: u16) {
        let (page, at) = self.place(gref);
        page.word(at).fetch_and(!u32::from(bits), Ordering::Release);
    }

    fn frame(&self, gref: u32) -> u32 {
        let (page, at) = self.place(gref);
        page.load(at + 4)
    }
}

/// A page that the guest grants, in use by a backend until this is dropped.
#[derive(Debug)]
pub struct Mapping {
    page: Page,
    gfn: Gfn,
    gref: u32,
    write: bool,
    grants: Arc<Grants>,
}

impl Mapping {
    /// The page.
    #[must_use]
    pub fn page(&self) -> &Page {
        &self.page
    }

    /// Whether the backend may write it.
    #[must_use]
    pub fn writable(&self) -> bool {
        self.write
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.write {
            self.grants.written.note(self.gfn);
        }
        self.grants.unmap(self.gref, self.write);
    }
}

#[cfg(test)]
#[path = "grant/tests.rs"]
mod tests;
