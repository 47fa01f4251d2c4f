//! The heap: of the application while it is the firmware's, of the resident copy in reserved memory.

use core::alloc::{GlobalAlloc, Layout};
use core::ptr::{self, NonNull};

use linked_list_allocator::Heap;
use spin::Mutex;

struct Locked(Mutex<Heap>);

#[global_allocator]
static HEAP: Locked = Locked(Mutex::new(Heap::empty()));

// SAFETY: the heap hands out each byte once, under its lock.
unsafe impl GlobalAlloc for Locked {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.0
            .lock()
            .allocate_first_fit(layout)
            .map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        if let Some(memory) = NonNull::new(memory) {
            // SAFETY: the caller has it from `alloc` with this layout.
            unsafe { self.0.lock().deallocate(memory, layout) };
        }
    }
}

/// Gives the heap its memory.
///
/// # Safety
///
/// `bytes` bytes at `start` must be nobody else's, for good, and the heap must have none yet.
pub unsafe fn give(start: *mut u8, bytes: usize) {
    // SAFETY: as the caller says.
    unsafe { HEAP.0.lock().init(start, bytes) };
}

/// Bytes that are free.
pub fn free() -> usize {
    HEAP.0.lock().free()
}
