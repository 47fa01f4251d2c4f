//! Memory of this process that packets pass through, beside the guest's own.

use std::cell::UnsafeCell;
use std::ptr::NonNull;

use blanket_disk::Buffer;
use vm_memory::{Bytes as _, VolatileSlice};

/// Bytes that the kernel reads and writes, used through copies only.
pub(super) struct Scratch(Box<[UnsafeCell<u8>]>);

// SAFETY: all access is by copies through `&self` of one thread at a time: a `Scratch` has
// one owner, and is not `Sync`.
unsafe impl Send for Scratch {}

impl Scratch {
    pub(super) fn new(length: usize) -> Self {
        // Asked for as zeroes, so that the host gives pages only as they are used.
        let zeroes = Box::into_raw(vec![0u8; length].into_boxed_slice());
        // SAFETY: the box was let go of above, and a cell has the layout of what is in it.
        Self(unsafe { Box::from_raw(zeroes as *mut [UnsafeCell<u8>]) })
    }

    fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: the bytes are there as long as `self`, and no reference leads to them:
        // they are in cells.
        unsafe { VolatileSlice::new(self.0.as_ptr().cast_mut().cast(), self.0.len()) }
    }

    /// Copies bytes out; what is beyond the end is left as it was.
    pub(super) fn read(&self, offset: usize, into: &mut [u8]) {
        // A read that begins inside is cut off at the end; there is no other error.
        let _ = self.slice().read(into, offset);
    }

    /// Copies bytes in; those beyond the end are left out.
    pub(super) fn write(&self, offset: usize, from: &[u8]) {
        let _ = self.slice().write(from, offset);
    }

    /// The first bytes, for the kernel; to be used up before this is dropped.
    pub(super) fn buffer(&self, length: usize) -> Buffer {
        let start = NonNull::from(&*self.0).cast::<u8>();
        let length = length.min(self.0.len());
        // SAFETY: the bytes are there as long as `self`, which the caller keeps, and no
        // reference leads to them.
        unsafe { Buffer::new(start, length) }
    }
}
