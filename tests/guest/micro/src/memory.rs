//! Page faults, mappings, protection and memory bandwidth.

use crate::sys::{Bench, MB, checked, close, fork, get, handle, map, map_private, pipe, timed};
use crate::sys::{unmap, wait};
use std::hint::black_box;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering::Relaxed};

const PAGE: usize = 4096;

/// Stores to one address; the compiler may not leave it out.
#[inline]
fn poke(p: *mut u8, offset: usize, value: u8) {
    // SAFETY: callers stay inside a mapping that they made. A store to a
    // read-only page ends in the handler of `protection_fault`.
    unsafe { p.add(offset).write_volatile(value) }
}

#[inline]
fn peek(p: *mut u8, offset: usize) {
    // SAFETY: callers stay inside a mapping that they made.
    unsafe { p.add(offset).read_volatile() };
}

static FAULTS_LEFT: AtomicU64 = AtomicU64::new(0);
static FAULT_PAGE: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());

/// Returns into the store until it has faulted often enough, then lets it pass.
extern "C" fn on_fault(_: i32) {
    let left = FAULTS_LEFT.load(Relaxed) - 1;
    FAULTS_LEFT.store(left, Relaxed);
    if left == 0 {
        let page = FAULT_PAGE.load(Relaxed);
        // SAFETY: the page belongs to the row that runs.
        unsafe { libc::mprotect(page.cast(), PAGE, libc::PROT_READ | libc::PROT_WRITE) };
    }
}

/// A store to a read-only page: fault, signal, return to the store.
pub fn protection_fault(_: &Bench, n: u64) -> f64 {
    handle(libc::SIGSEGV, on_fault, libc::SA_NODEFER);
    let page = map(
        PAGE,
        libc::PROT_READ,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        -1,
    );
    peek(page, 0);
    FAULT_PAGE.store(page, Relaxed);
    FAULTS_LEFT.store(n, Relaxed);
    let time = timed(|| poke(page, 0, 1));
    unmap(page, PAGE);
    // SAFETY: back to the default action.
    unsafe { libc::signal(libc::SIGSEGV, libc::SIG_DFL) };
    time
}

fn map_file(bench: &Bench) -> *mut u8 {
    map(MB, libc::PROT_READ, libc::MAP_SHARED, bench.file)
}

/// Maps 1 MiB again and again until `n` steps of `stride` bytes were touched;
/// only the touching is timed.
fn touches(
    n: u64,
    stride: usize,
    make: impl Fn() -> *mut u8,
    touch: impl Fn(*mut u8, usize),
) -> f64 {
    let mut total = 0.0;
    let mut done = 0;
    while done < n {
        let p = make();
        total += timed(|| {
            let mut offset = 0;
            while offset < MB && done < n {
                touch(p, offset);
                offset += stride;
                done += 1;
            }
        });
        unmap(p, MB);
    }
    total
}

/// A read fault on a mapped file; the kernel maps 16 pages around it.
pub fn fault_file(bench: &Bench, n: u64) -> f64 {
    touches(n, 65536, || map_file(bench), peek)
}

/// A write fault on fresh anonymous memory.
pub fn fault_anonymous(_: &Bench, n: u64) -> f64 {
    touches(n, PAGE, || map_private(MB), |p, offset| poke(p, offset, 1))
}

/// A write fault on a page that a child shares.
pub fn fault_copy(_: &Bench, n: u64) -> f64 {
    let p = map_private(MB);
    // SAFETY: the mapping is 1 MiB long.
    unsafe { libc::memset(p.cast(), 1, MB) };
    let mut total = 0.0;
    let mut done = 0;
    while done < n {
        let hold = pipe();
        let child = fork(|| {
            close(hold.1);
            get(hold.0);
        });
        total += timed(|| {
            let mut offset = 0;
            while offset < MB && done < n {
                poke(p, offset, 2);
                offset += PAGE;
                done += 1;
            }
        });
        close(hold.0);
        close(hold.1);
        wait(child);
    }
    unmap(p, MB);
    total
}

/// mmap and munmap of 1 MiB of a file, untouched.
pub fn map_unmap(bench: &Bench, n: u64) -> f64 {
    timed(|| {
        for _ in 0..n {
            unmap(map_file(bench), MB);
        }
    })
}

/// The same with every page read.
pub fn touch_file(bench: &Bench, n: u64) -> f64 {
    timed(|| {
        for _ in 0..n {
            let p = map_file(bench);
            for offset in (0..MB).step_by(PAGE) {
                peek(p, offset);
            }
            unmap(p, MB);
        }
    })
}

/// The same with anonymous memory, every page written.
pub fn touch_anonymous(_: &Bench, n: u64) -> f64 {
    timed(|| {
        for _ in 0..n {
            let p = map_private(MB);
            for offset in (0..MB).step_by(PAGE) {
                poke(p, offset, 1);
            }
            unmap(p, MB);
        }
    })
}

/// A store, mprotect to read-only, mprotect back.
pub fn mprotect_pair(_: &Bench, n: u64) -> f64 {
    let page = map(
        PAGE,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        -1,
    );
    let protect = |prot| {
        // SAFETY: the page belongs to this row.
        checked(
            unsafe { libc::mprotect(page.cast(), PAGE, prot) },
            "mprotect",
        );
    };
    let time = timed(|| {
        for _ in 0..n {
            poke(page, 0, 1);
            protect(libc::PROT_READ);
            protect(libc::PROT_READ | libc::PROT_WRITE);
        }
    });
    unmap(page, PAGE);
    time
}

/// Sums 1 MiB of 64-bit words.
pub fn read_bandwidth(bench: &Bench, n: u64) -> f64 {
    let mut sum = 0_u64;
    let time = timed(|| {
        for i in 0..n {
            // SAFETY: one of the buffer's four mebibytes; all of it is filled.
            let words = unsafe {
                let at = bench.buffer_a.add((i as usize & 3) * MB).cast::<u64>();
                std::slice::from_raw_parts(at, MB / 8)
            };
            for line in words.chunks_exact(8) {
                // SAFETY: a line is eight words long. Assembly, because a
                // vectorised sum would measure something else.
                unsafe {
                    std::arch::asm!(
                        "add {sum}, [{at}]", "add {sum}, [{at} + 8]",
                        "add {sum}, [{at} + 16]", "add {sum}, [{at} + 24]",
                        "add {sum}, [{at} + 32]", "add {sum}, [{at} + 40]",
                        "add {sum}, [{at} + 48]", "add {sum}, [{at} + 56]",
                        sum = inout(reg) sum, at = in(reg) line.as_ptr(),
                        options(nostack, readonly)
                    );
                }
            }
        }
    });
    black_box(sum);
    time
}

/// Stores 1 MiB of 64-bit words.
pub fn write_bandwidth(bench: &Bench, n: u64) -> f64 {
    timed(|| {
        for i in 0..n {
            // SAFETY: one of the buffer's four mebibytes.
            let at = unsafe { bench.buffer_a.add((i as usize & 3) * MB).cast::<u64>() };
            for k in (0..MB / 8).step_by(4) {
                for word in 0..4 {
                    // SAFETY: inside that mebibyte.
                    unsafe { at.add(k + word).write_volatile(i) };
                }
            }
        }
    })
}

/// memcpy of 1 MiB.
pub fn copy_bandwidth(bench: &Bench, n: u64) -> f64 {
    timed(|| {
        for i in 0..n {
            let offset = (i as usize & 3) * MB;
            // SAFETY: both buffers are 4 MiB long and apart.
            unsafe {
                let (from, to) = (bench.buffer_a.add(offset), bench.buffer_b.add(offset));
                libc::memcpy(to.cast(), from.cast(), MB);
            }
        }
    })
}
