//! The page that a vCPU's descriptor shares with the kernel: `/dev/blanket`'s and KVM's.

use std::io;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

const SIZE: usize = 4096;

/// A shared mapping of a descriptor's first page, which begins with a `T`.
pub(crate) struct SharedPage<T>(NonNull<T>);

// SAFETY: the pointer is to a mapping that lives as long as the value. What may be
// accessed from which thread, and how, is said where it is done.
unsafe impl<T> Send for SharedPage<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for SharedPage<T> {}

impl<T> SharedPage<T> {
    const FITS: () = assert!(size_of::<T>() <= SIZE);

    pub(crate) fn map(fd: impl AsFd) -> io::Result<Self> {
        let () = Self::FITS;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let address = unsafe {
            mmap(
                std::ptr::null_mut(),
                SIZE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                fd,
                0,
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
        let _ = unsafe { munmap(self.0.as_ptr().cast(), SIZE) };
    }
}
