//! System calls and signals.

use crate::sys::{Bench, checked, close, fail, get, handle, put, timed};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// getppid, the cheapest call.
pub fn null(_: &Bench, n: u64) -> f64 {
    timed(|| {
        for _ in 0..n {
            // SAFETY: no arguments.
            unsafe { libc::syscall(libc::SYS_getppid) };
        }
    })
}

/// clock_gettime(CLOCK_MONOTONIC), usually without entering the kernel.
pub fn clock_gettime(_: &Bench, n: u64) -> f64 {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    timed(|| {
        for _ in 0..n {
            // SAFETY: `t` is a valid timespec.
            unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
        }
    })
}

fn open(path: &std::ffi::CStr, flags: i32) -> i32 {
    // SAFETY: a valid path.
    let fd = unsafe { libc::open(path.as_ptr(), flags) };
    checked(fd, "open")
}

/// One byte from /dev/zero.
pub fn read_zero(_: &Bench, n: u64) -> f64 {
    let fd = open(c"/dev/zero", libc::O_RDONLY);
    let time = timed(|| {
        for _ in 0..n {
            if !get(fd) {
                fail("read");
            }
        }
    });
    close(fd);
    time
}

/// One byte to /dev/null.
pub fn write_null(_: &Bench, n: u64) -> f64 {
    let fd = open(c"/dev/null", libc::O_WRONLY);
    let time = timed(|| {
        for _ in 0..n {
            if !put(fd) {
                fail("write");
            }
        }
    });
    close(fd);
    time
}

/// stat of the data file.
pub fn stat(bench: &Bench, n: u64) -> f64 {
    // SAFETY: an all-zero stat is valid.
    let mut result: libc::stat = unsafe { std::mem::zeroed() };
    timed(|| {
        for _ in 0..n {
            // SAFETY: a valid path and a valid place for the result.
            checked(
                unsafe { libc::stat(bench.path.as_ptr(), &mut result) },
                "stat",
            );
        }
    })
}

/// open and close of the data file.
pub fn open_close(bench: &Bench, n: u64) -> f64 {
    timed(|| {
        for _ in 0..n {
            close(open(&bench.path, libc::O_RDONLY));
        }
    })
}

/// select on 64 descriptors that are ready.
pub fn select64(_: &Bench, n: u64) -> f64 {
    let fds: [i32; 64] = std::array::from_fn(|_| open(c"/dev/null", libc::O_RDONLY));
    let mut zero = libc::timeval {
        tv_sec: 0,
        tv_usec: 0,
    };
    let time = timed(|| {
        for _ in 0..n {
            // SAFETY: the set is cleared before use, descriptors are small
            // numbers, and all pointers are valid or null.
            unsafe {
                let mut set = std::mem::MaybeUninit::<libc::fd_set>::uninit();
                libc::FD_ZERO(set.as_mut_ptr());
                for &fd in &fds {
                    libc::FD_SET(fd, set.as_mut_ptr());
                }
                libc::select(
                    fds[63] + 1,
                    null_mut(),
                    null_mut(),
                    set.as_mut_ptr(),
                    &mut zero,
                );
            }
        }
    });
    fds.into_iter().for_each(close);
    time
}

/// sched_yield with nobody to yield to.
pub fn sched_yield(_: &Bench, n: u64) -> f64 {
    timed(|| {
        for _ in 0..n {
            // SAFETY: no arguments.
            unsafe { libc::sched_yield() };
        }
    })
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: i32) {
    SIGNALS.store(SIGNALS.load(Relaxed) + 1, Relaxed);
}

/// sigaction.
pub fn signal_install(_: &Bench, n: u64) -> f64 {
    // SAFETY: an all-zero sigaction is valid.
    let (mut action, mut old): (libc::sigaction, libc::sigaction) =
        unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    action.sa_sigaction = count as *const () as usize;
    timed(|| {
        for _ in 0..n {
            // SAFETY: both structures are valid.
            unsafe { libc::sigaction(libc::SIGUSR1, &action, &mut old) };
        }
    })
}

/// kill to oneself, handler, return.
pub fn signal_deliver(_: &Bench, n: u64) -> f64 {
    handle(libc::SIGUSR1, count, 0);
    let before = SIGNALS.load(Relaxed);
    // SAFETY: no arguments.
    let pid = unsafe { libc::getpid() };
    let time = timed(|| {
        for _ in 0..n {
            // SAFETY: integers only.
            unsafe { libc::kill(pid, libc::SIGUSR1) };
        }
    });
    if SIGNALS.load(Relaxed) - before != n {
        fail("signals were lost");
    }
    time
}
