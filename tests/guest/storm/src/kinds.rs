//! What the workers do.

use crate::{Options, Shared, fail, fork, online, pin, wait};
use std::ptr::null_mut;

/// One kind of storm.
pub struct Kind {
    /// Its name.
    pub name: &'static str,
    /// Starts so many workers, which wait for [`Shared::work`]; their process ids.
    pub start: fn(&Options, &'static Shared, u32) -> Vec<i32>,
}

/// All of them.
pub const KINDS: &[Kind] = &[
    Kind {
        name: "fork",
        start: |options, shared, n| processes(options, n, |_| shared.work(fork_exit)),
    },
    Kind {
        name: "exec",
        start: |options, shared, n| processes(options, n, |_| shared.work(|_| fork_exec(options))),
    },
    Kind {
        name: "mmap",
        start: |options, shared, n| processes(options, n, |_| shared.work(map_unmap)),
    },
    Kind {
        name: "mprotect",
        start: |options, shared, n| {
            processes(options, n, |_| {
                let area = map();
                shared.work(|i| protect(area, i));
            })
        },
    },
    Kind {
        name: "threads",
        start: |options, shared, n| processes(options, 1, |_| threads(options, shared, n)),
    },
    Kind {
        name: "pipe",
        start: |options, shared, n| processes(options, n, |i| pipes(options, shared, i)),
    },
];

const PAGE: usize = 4096;
/// Pages of an area.
const PAGES: usize = 16;

/// The CPU of worker `i`, where workers are tied to one.
fn place(options: &Options, i: u32) {
    if options.each.is_some() {
        pin(i as usize % online());
    }
}

fn processes(options: &Options, n: u32, body: impl Fn(u32)) -> Vec<i32> {
    (0..n)
        .map(|i| {
            fork(|| {
                place(options, i);
                body(i);
                0
            })
        })
        .collect()
}

/// fork, exit, wait: the exit code must arrive.
fn fork_exit(n: u64) {
    let code = (n % 100) as i32;
    if wait(fork(|| code)) != code {
        fail("exit code of a child");
    }
}

/// fork, execve, wait: the program must succeed.
fn fork_exec(options: &Options) {
    let path = options.program.as_ptr();
    let child = fork(|| {
        let argv = [path, std::ptr::null()];
        let environment = [std::ptr::null()];
        // SAFETY: null-terminated arrays of C strings.
        unsafe { libc::execve(path, argv.as_ptr(), environment.as_ptr()) };
        9
    });
    if wait(child) != 0 {
        fail("the program that was executed");
    }
}

/// A private area.
fn map() -> *mut u8 {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let p = unsafe { libc::mmap(null_mut(), PAGES * PAGE, access, flags, -1, 0) };
    if p == libc::MAP_FAILED {
        fail("mmap");
    }
    p.cast()
}

/// Pages of a new area are empty, and keep what is written.
fn map_unmap(n: u64) {
    let area = map();
    for i in 0..PAGES {
        // SAFETY: inside the area, which is mapped for reading and writing.
        unsafe {
            let word = area.add(i * PAGE).cast::<u64>();
            if word.read_volatile() != 0 {
                fail("a new page is not empty");
            }
            word.write_volatile(n + i as u64);
            if word.read_volatile() != n + i as u64 {
                fail("a page does not keep what was written");
            }
        }
    }
    // SAFETY: the whole mapping, not used again.
    if unsafe { libc::munmap(area.cast(), PAGES * PAGE) } != 0 {
        fail("munmap");
    }
}

/// Takes the right to write away and gives it back; what was written stays.
fn protect(area: *mut u8, n: u64) {
    let set = |access| {
        // SAFETY: the whole mapping, in which nothing is borrowed.
        if unsafe { libc::mprotect(area.cast(), PAGES * PAGE, access) } != 0 {
            fail("mprotect");
        }
    };
    for i in 0..PAGES {
        // SAFETY: inside the area, which is mapped for reading and writing here.
        unsafe { area.add(i * PAGE).cast::<u64>().write_volatile(n) };
    }
    set(libc::PROT_READ);
    for i in 0..PAGES {
        // SAFETY: inside the area, which may be read.
        if unsafe { area.add(i * PAGE).cast::<u64>().read_volatile() } != n {
            fail("a page changed while it was protected");
        }
    }
    set(libc::PROT_READ | libc::PROT_WRITE);
}

/// As `mprotect`, by the threads of one process: each change must reach all CPUs that
/// run one.
fn threads(options: &Options, shared: &'static Shared, n: u32) {
    std::thread::scope(|scope| {
        for i in 0..n {
            scope.spawn(move || {
                place(options, i);
                let area = map();
                shared.work(|i| protect(area, i));
            });
        }
    });
}

/// A byte goes to another process, on another CPU where they are tied to one, and
/// comes back, one higher.
fn pipes(options: &Options, shared: &'static Shared, worker: u32) {
    let pipe = || {
        let mut ends = [0; 2];
        // SAFETY: room for two descriptors.
        if unsafe { libc::pipe(ends.as_mut_ptr()) } != 0 {
            fail("pipe");
        }
        ends
    };
    let (there, back) = (pipe(), pipe());
    let put = |end: i32, byte: u8| {
        // SAFETY: one byte is readable there.
        unsafe { libc::write(end, (&raw const byte).cast(), 1) == 1 }
    };
    let get = |end: i32| {
        let mut byte = 0u8;
        // SAFETY: one byte is writable there.
        let n = unsafe { libc::read(end, (&raw mut byte).cast(), 1) };
        (n == 1).then_some(byte)
    };
    let close = |end: i32| {
        // SAFETY: a descriptor of ours that is not used again.
        unsafe { libc::close(end) };
    };
    let partner = fork(|| {
        place(options, worker + 1);
        close(there[1]);
        close(back[0]);
        while let Some(byte) = get(there[0]) {
            if !put(back[1], byte.wrapping_add(1)) {
                return 1;
            }
        }
        0
    });
    close(there[0]);
    close(back[1]);
    shared.work(|n| {
        let byte = (n & 0xff) as u8;
        if !put(there[1], byte) || get(back[0]) != Some(byte.wrapping_add(1)) {
            fail("a byte through two pipes");
        }
    });
    close(there[1]);
    if wait(partner) != 0 {
        fail("the other end of the pipes");
    }
}
