//! A page of guest memory. All pointers into it are made here.

use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use blanket_abi::{Gfn, PAGE_SIZE};
use blanket_disk::Buffer;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryError, VolatileSlice};

use crate::GuestMemory;

/// Bytes of a page.
pub(crate) const SIZE: usize = 4096;
const _: () = assert!(SIZE as u64 == PAGE_SIZE);

/// Frames of guest memory that lie beside each other.
#[derive(Clone)]
pub(crate) struct Frames {
    start: NonNull<u8>,
    count: u64,
    /// Keeps them mapped.
    memory: Arc<GuestMemory>,
}

// SAFETY: the pointer is to memory that is mapped as long as `memory` lives, and that is
// only accessed by volatile copies and atomics, which any thread may do.
unsafe impl Send for Frames {}
// SAFETY: as above.
unsafe impl Sync for Frames {}

impl Frames {
    /// `count` frames from `first` on.
    ///
    /// # Errors
    /// The VM has no such frames, or not beside each other.
    pub(crate) fn new(
        memory: &Arc<GuestMemory>,
        first: Gfn,
        count: u64,
    ) -> Result<Self, GuestMemoryError> {
        let at = GuestAddress(first.base());
        let outside = || GuestMemoryError::InvalidGuestAddress(at);
        let length = usize::try_from(count * PAGE_SIZE).map_err(|_| outside())?;
        let start = memory.get_slice(at, length)?.ptr_guard_mut().as_ptr();
        Ok(Self {
            start: NonNull::new(start).ok_or_else(outside)?,
            count,
            memory: Arc::clone(memory),
        })
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The memory that they are of, to be kept while a [`Page::buffer`] is in use.
    pub(crate) fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The whole pages in a buffer: the first one, counted from the first of these, how many bytes
    /// of the buffer come before it, and how many they are.
    pub(crate) fn whole(&self, buffer: &Buffer) -> Option<(u64, usize, u64)> {
        let (start, first) = (self.start.addr().get(), buffer.start().addr().get());
        let before = first.checked_sub(start)?;
        let skipped = before.next_multiple_of(SIZE) - before;
        let count = buffer.length().checked_sub(skipped)? / SIZE;
        let (first, count) = ((before + skipped) / SIZE, count as u64);
        let first = u64::try_from(first).ok()?;
        let end = first.checked_add(count)?;
        (count > 0 && end <= self.count).then_some((first, skipped, count))
    }

    /// One of them, counted from the first.
    pub(crate) fn page(&self, index: u64) -> Option<Page<'_>> {
        if index >= self.count {
            return None;
        }
        // All of them together fit in an address, by `new`.
        let offset = usize::try_from(index * PAGE_SIZE).ok()?;
        Some(Page {
            // SAFETY: inside of what is mapped from `start` on, by the line above.
            start: unsafe { self.start.add(offset) },
            _memory: PhantomData,
        })
    }
}

impl std::fmt::Debug for Frames {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Frames").field(&self.count).finish()
    }
}

/// A page that the guest shares: it may change at any time. What it was found through keeps
/// it mapped.
#[derive(Clone, Copy)]
pub struct Page<'a> {
    start: NonNull<u8>,
    _memory: PhantomData<&'a GuestMemory>,
}

// SAFETY: as for `Frames`, which outlives it.
unsafe impl Send for Page<'_> {}
// SAFETY: as above.
unsafe impl Sync for Page<'_> {}

impl std::fmt::Debug for Page<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Page").field(&self.start).finish()
    }
}

impl<'a> Page<'a> {
    fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: the page is mapped, readable and writable, as long as `self` lives, and
        // no reference leads to it.
        unsafe { VolatileSlice::new(self.start.as_ptr(), SIZE) }
    }

    /// Copies bytes out of the page. What is beyond its end is left as it was.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        // A read that begins in the page is cut off at its end; there is no other error.
        let _ = self.slice().read(into, offset);
    }

    /// Copies bytes into the page; those beyond its end are left out.
    pub fn write(&self, offset: usize, from: &[u8]) {
        let _ = self.slice().write(from, offset);
    }

    /// A word of the page with acquire order; `offset` is a multiple of 4 within it.
    #[must_use]
    pub fn load(&self, offset: usize) -> u32 {
        self.word(offset).load(Ordering::Acquire)
    }

    /// Sets a word of the page with release order.
    pub fn store(&self, offset: usize, value: u32) {
        self.word(offset).store(value, Ordering::Release);
    }

    /// A word of the page for atomic operations.
    pub(crate) fn word(&self, offset: usize) -> &'a AtomicU32 {
        assert!(
            offset.is_multiple_of(4) && offset < SIZE,
            "no word of a page"
        );
        // SAFETY: inside the page and aligned, by the line above; the page is mapped as
        // long as what it was found through. The guest changes words with plain stores and locked
        // instructions, of which a word-sized atomic is the counterpart.
        unsafe { AtomicU32::from_ptr(self.start.as_ptr().add(offset).cast()) }
    }

    /// Bytes of the page for a disk's request, which must keep the memory. Cut off at the
    /// page's end.
    #[must_use]
    pub fn buffer(&self, offset: usize, length: usize) -> Buffer {
        let offset = offset.min(SIZE);
        let length = length.min(SIZE - offset);
        // SAFETY: inside the page. It stays mapped while its memory is kept, which the
        // contract of a request says; all access is by the rules of this module.
        unsafe { Buffer::new(self.start.add(offset), length) }
    }
}
