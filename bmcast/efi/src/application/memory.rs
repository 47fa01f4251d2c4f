//! The VMM's own memory: one region that the OS is told is reserved, mapped to itself.

use alloc::alloc::{Layout, alloc_zeroed};
use core::ptr::NonNull;
use core::slice;

use bmcast_svm::paging::Frames;

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Pages of zeros of the VMM's own, one behind the other in physical memory too; none when the region is used up.
pub fn pages(count: usize) -> Option<NonNull<u8>> {
    let layout = Layout::from_size_align(count.max(1) * PAGE, PAGE).ok()?;
    // SAFETY: the layout is not empty.
    NonNull::new(unsafe { alloc_zeroed(layout) })
}

/// The same as bytes, for good.
pub fn bytes(pages_wanted: usize) -> Option<&'static mut [u8]> {
    let start = pages(pages_wanted)?;
    // SAFETY: `pages` gives zeroed memory to nobody else, and it is never given back.
    Some(unsafe { slice::from_raw_parts_mut(start.as_ptr(), pages_wanted * PAGE) })
}

/// A number that an address is; the VMM's addresses are physical ones.
pub fn address<T: ?Sized>(of: *const T) -> u64 {
    u64::try_from(of.addr()).unwrap_or(0)
}

/// A pointer to physical memory.
pub fn pointer<T>(address: u64) -> *mut T {
    core::ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap_or(0))
}

/// Page tables from the heap.
pub struct Tables;

impl Frames for Tables {
    fn frame(&mut self) -> Option<u64> {
        pages(1).map(|page| u64::try_from(page.as_ptr().expose_provenance()).unwrap_or(0))
    }

    fn table(&mut self, address: u64) -> &mut [u64; 512] {
        // SAFETY: the address is that of a page from `frame`, which is never given back; the caller has the
        // tables of one root to itself.
        unsafe { &mut *pointer(address) }
    }
}
