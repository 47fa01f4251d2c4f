//! Pages that a descriptor shares with the kernel: `/dev/blanket`'s and KVM's.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A shared mapping of whole pages of a descriptor, which begin with a `T`.
pub(crate) struct SharedPage<T>(NonNull<T>);

// SAFETY: the pointer is to a mapping that lives as long as the value. What may be
// accessed from which thread, and how, is said where it is done.
unsafe impl<T> Send for SharedPage<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for SharedPage<T> {}

impl<T> SharedPage<T> {
    const SIZE: usize = size_of::<T>().next_multiple_of(4096);

    /// Maps what is at the beginning.
    pub(crate) fn map(fd: impl AsFd) -> io::Result<Self> {
        Self::map_at(fd, 0)
    }

    /// Maps what is at `offset`.
    pub(crate) fn map_at(fd: impl AsFd, offset: u64) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            mmap(
                std::ptr::null_mut(),
                Self::SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                offset,
            )
        }?;
        NonNull::new(address.cast())
            .map(Self)
            .ok_or_else(|| io::Error::other("mapped at address 0"))
    }

    /// Valid for reads and writes as long as `self`; the kernel writes there too.
    pub(crate) fn as_ptr(&self) -> *mut T {
        self.0.as_ptr()
    }
}

impl<T> Drop for SharedPage<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map`, and no reference into it is left.
        // It cannot fail for a whole mapping.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), Self::SIZE) };
    }
}
