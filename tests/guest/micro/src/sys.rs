//! What every row needs: the clock, the data file, buffers, and system calls
//! that end the program when they fail.

use std::ffi::CString;
use std::ptr::null_mut;

/// One mebibyte.
pub const MB: usize = 1 << 20;

/// CLOCK_MONOTONIC in nanoseconds.
pub fn now() -> f64 {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `t` is a valid timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
    t.tv_sec as f64 * 1e9 + t.tv_nsec as f64
}

/// The time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: rdtsc is always there in 64-bit mode.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Nanoseconds that `work` takes.
pub fn timed(work: impl FnOnce()) -> f64 {
    let begun = now();
    work();
    now() - begun
}

/// Ends the program with the name of the call that failed.
#[cold]
pub fn fail(what: &str) -> ! {
    eprintln!("micro: {what}: {}", std::io::Error::last_os_error());
    // SAFETY: ends the process without running anything else.
    unsafe { libc::_exit(1) }
}

/// `value` unless it is negative, which ends the program.
pub fn checked(value: i32, what: &str) -> i32 {
    if value < 0 { fail(what) } else { value }
}

/// Forks; the child runs `body` and exits with 0.
pub fn fork(body: impl FnOnce()) -> i32 {
    // SAFETY: the program has one thread.
    match unsafe { libc::fork() } {
        0 => {
            body();
            // SAFETY: ends the child without running exit handlers.
            unsafe { libc::_exit(0) }
        }
        pid => checked(pid, "fork"),
    }
}

/// Waits for a child and returns its status word.
pub fn wait(pid: i32) -> i32 {
    let mut status = 0;
    // SAFETY: `status` is a valid place for the word.
    unsafe { libc::waitpid(pid, &mut status, 0) };
    status
}

/// A pipe: read end, write end.
pub fn pipe() -> (i32, i32) {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    checked(unsafe { libc::pipe(fds.as_mut_ptr()) }, "pipe");
    (fds[0], fds[1])
}

/// A pair of connected Unix stream sockets.
pub fn socket_pair() -> (i32, i32) {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    let r = unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, fds.as_mut_ptr()) };
    checked(r, "socketpair");
    (fds[0], fds[1])
}

/// Closes a descriptor.
pub fn close(fd: i32) {
    // SAFETY: descriptors are owned by the rows that opened them.
    unsafe { libc::close(fd) };
}

/// Writes one byte; false when the other side is gone.
#[inline]
pub fn put(fd: i32) -> bool {
    let byte = b'x';
    // SAFETY: one byte is readable there.
    unsafe { libc::write(fd, (&raw const byte).cast(), 1) == 1 }
}

/// Reads one byte; false at the end.
#[inline]
pub fn get(fd: i32) -> bool {
    let mut byte = 0_u8;
    // SAFETY: one byte is writable there.
    unsafe { libc::read(fd, (&raw mut byte).cast(), 1) == 1 }
}

/// Maps memory; `fd` is -1 for anonymous memory.
pub fn map(len: usize, prot: i32, flags: i32, fd: i32) -> *mut u8 {
    // SAFETY: a new mapping at an address of the kernel's choice.
    let p = unsafe { libc::mmap(null_mut(), len, prot, flags, fd, 0) };
    if p == libc::MAP_FAILED {
        fail("mmap")
    } else {
        p.cast()
    }
}

/// Private anonymous memory without huge pages.
pub fn map_private(len: usize) -> *mut u8 {
    let p = map(
        len,
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
        -1,
    );
    // SAFETY: the mapping was just made.
    unsafe { libc::madvise(p.cast(), len, libc::MADV_NOHUGEPAGE) };
    p
}

/// Unmaps what [`map`] gave.
pub fn unmap(p: *mut u8, len: usize) {
    // SAFETY: callers pass a whole mapping that they own and do not use again.
    unsafe { libc::munmap(p.cast(), len) };
}

/// Installs a plain signal handler.
pub fn handle(signal: i32, handler: extern "C" fn(i32), flags: i32) {
    // SAFETY: the handlers touch atomics only, or call async-signal-safe functions.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = flags;
        checked(libc::sigaction(signal, &action, null_mut()), "sigaction");
    }
}

/// What the rows share.
pub struct Bench {
    /// Path of the data file.
    pub path: CString,
    /// The open data file, 1 MiB long.
    pub file: i32,
    /// Path of the program to execute.
    pub hello: CString,
    /// 4 MiB of shared memory, filled.
    pub buffer_a: *mut u8,
    /// Another 4 MiB.
    pub buffer_b: *mut u8,
}

impl Bench {
    /// Makes the data file and the buffers.
    pub fn new(path: &str, hello: &str) -> Result<Self, String> {
        let path = CString::new(path).map_err(|e| format!("file path: {e}"))?;
        let hello = CString::new(hello).map_err(|e| format!("program path: {e}"))?;
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC;
        // SAFETY: a valid path.
        let file = unsafe { libc::open(path.as_ptr(), flags, 0o600) };
        if file < 0 {
            return Err(format!(
                "{}: {}",
                path.to_string_lossy(),
                std::io::Error::last_os_error()
            ));
        }
        let buffer = |value| {
            let p = map(
                4 * MB,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
            );
            // SAFETY: the mapping is 4 MiB long.
            unsafe { libc::memset(p.cast(), value, 4 * MB) };
            p
        };
        let (buffer_a, buffer_b) = (buffer(1), buffer(2));
        // SAFETY: the buffer holds 1 MiB and more.
        if unsafe { libc::write(file, buffer_a.cast(), MB) } != MB as isize {
            fail("filling the data file");
        }
        Ok(Self {
            path,
            file,
            hello,
            buffer_a,
            buffer_b,
        })
    }

    /// Removes the data file.
    pub fn remove_file(&self) {
        // SAFETY: a valid path.
        unsafe { libc::unlink(self.path.as_ptr()) };
    }
}
