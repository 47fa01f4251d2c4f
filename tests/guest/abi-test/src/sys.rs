//! Thin safe wrappers over the system calls that many checks need.

use std::fmt;
use std::time::Duration;

/// The calling thread's `errno` as text.
pub fn last_error() -> String {
    std::io::Error::last_os_error().to_string()
}

/// The calling thread's `errno`.
pub fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// How a child process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Exit code.
    Exit(i32),
    /// Killed by this signal.
    Signal(i32),
    /// Stopped by this signal (only seen by a tracer).
    Stopped(i32),
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit(code) => write!(f, "exit code {code}"),
            Self::Signal(sig) => write!(f, "signal {sig}"),
            Self::Stopped(sig) => write!(f, "stop by signal {sig}"),
        }
    }
}

impl Status {
    /// Decodes the word that `waitpid` gives.
    pub fn from_raw(raw: i32) -> Self {
        if libc::WIFEXITED(raw) {
            Self::Exit(libc::WEXITSTATUS(raw))
        } else if libc::WIFSTOPPED(raw) {
            Self::Stopped(raw >> 8)
        } else {
            Self::Signal(libc::WTERMSIG(raw))
        }
    }
}

/// A child process made by [`fork`].
#[derive(Clone, Copy)]
pub struct Child {
    /// Its process id.
    pub pid: i32,
}

impl Child {
    /// Waits for the next change of state.
    pub fn wait(self) -> Status {
        let mut raw = 0;
        loop {
            // SAFETY: `raw` is a valid place for the status word.
            let r = unsafe { libc::waitpid(self.pid, &mut raw, libc::__WALL) };
            if r == self.pid {
                return Status::from_raw(raw);
            }
            if r < 0 && errno() != libc::EINTR {
                return Status::Exit(-1);
            }
        }
    }

    /// Sends a signal to the child.
    pub fn kill(self, sig: i32) {
        // SAFETY: the call takes two integers.
        unsafe { libc::kill(self.pid, sig) };
    }

    /// Kills the process group that the child leads.
    pub fn kill_group(self) {
        // SAFETY: the call takes two integers.
        unsafe { libc::kill(-self.pid, libc::SIGKILL) };
    }

    /// Waits and fails unless the child ended with exit code 0.
    pub fn wait_ok(self, what: &str) -> Result<(), String> {
        match self.wait() {
            Status::Exit(0) => Ok(()),
            status => Err(format!("{what}: child ended with {status}")),
        }
    }
}

/// Forks; the child runs `body` and exits with its value.
pub fn fork(body: impl FnOnce() -> i32) -> Result<Child, String> {
    // SAFETY: callers fork from processes where no other thread holds a lock
    // that the child needs: each check starts with one thread.
    match unsafe { libc::fork() } {
        0 => {
            let code = body();
            exit_now(code)
        }
        pid if pid > 0 => Ok(Child { pid }),
        _ => Err(format!("fork: {}", last_error())),
    }
}

/// Ends the process without running exit handlers.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: `_exit` has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Prepares a check's process: it leads a group, dies with its parent, and has
/// default signal actions (Rust's start-up code changes some).
pub fn become_check_process() {
    // SAFETY: integers and default actions only.
    unsafe {
        for sig in [libc::SIGSEGV, libc::SIGBUS, libc::SIGPIPE] {
            libc::signal(sig, libc::SIG_DFL);
        }
        libc::setpgid(0, 0);
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
    }
}

/// Writes all bytes to a descriptor, ignoring errors (the reader notices).
pub fn write_all(fd: i32, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        // SAFETY: pointer and length describe `bytes`.
        let n = unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
        match usize::try_from(n) {
            Ok(n) => bytes = &bytes[n..],
            Err(_) if errno() == libc::EINTR => {}
            Err(_) => return,
        }
    }
}

/// Waits until a descriptor can be read (or is closed); false on timeout.
pub fn wait_readable(fd: i32, limit: Duration) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let ms = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX).max(1);
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&mut poll, 1, ms) != 0 }
}

/// Makes a raw system call with integer arguments that are no pointers.
pub fn syscall_int(nr: i64, a: usize, b: usize, c: usize) -> i64 {
    // SAFETY: callers pass numbers only, and calls that take numbers.
    unsafe { libc::syscall(nr, a, b, c) }
}

/// The CPUs that the calling process may run on.
pub fn cpus() -> Vec<usize> {
    // SAFETY: an all-zero cpu_set_t is valid and the size is its own.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set);
        set
    };
    // SAFETY: the index stays below CPU_SETSIZE.
    (0..libc::CPU_SETSIZE as usize)
        .filter(|&c| unsafe { libc::CPU_ISSET(c, &set) })
        .collect()
}

/// Binds the calling thread to one CPU.
pub fn pin(cpu: usize) -> Result<(), String> {
    // SAFETY: an all-zero cpu_set_t is valid and the size is its own.
    let r = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set)
    };
    if r == 0 {
        Ok(())
    } else {
        Err(format!("sched_setaffinity to CPU {cpu}: {}", last_error()))
    }
}

/// Reads a clock in nanoseconds.
pub fn clock_ns(clock: i32) -> i64 {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `t` is a valid timespec.
    unsafe { libc::clock_gettime(clock, &mut t) };
    t.tv_sec * 1_000_000_000 + t.tv_nsec
}

/// Gives up the CPU once.
pub fn yield_now() {
    // SAFETY: no arguments.
    unsafe { libc::sched_yield() };
}

/// This thread's kernel id.
pub fn gettid() -> i32 {
    // SAFETY: no arguments.
    unsafe { libc::gettid() }
}

/// An anonymous memory mapping that is unmapped when dropped.
///
/// All accesses go through volatile loads and stores: other threads, other
/// processes and the kernel look at this memory at the same time.
pub struct Region {
    addr: usize,
    len: usize,
}

impl Region {
    fn map(len: usize, prot: i32, flags: i32) -> Result<Self, String> {
        // SAFETY: a new anonymous mapping at an address of the kernel's choice.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                prot,
                flags | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(format!("mmap of {len} bytes: {}", last_error()));
        }
        Ok(Self {
            addr: p as usize,
            len,
        })
    }

    /// Private readable and writable memory.
    pub fn new(len: usize) -> Result<Self, String> {
        Self::map(
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_NORESERVE,
        )
    }

    /// Memory shared with children.
    pub fn shared(len: usize) -> Result<Self, String> {
        Self::map(len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED)
    }

    /// Readable, writable and executable memory below 4 GiB.
    pub fn low_code(len: usize) -> Result<Self, String> {
        let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        Self::map(len, prot, libc::MAP_PRIVATE | libc::MAP_32BIT)
    }

    /// First address.
    pub fn addr(&self) -> u64 {
        self.addr as u64
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    fn at(&self, offset: usize, size: usize) -> usize {
        assert!(
            offset + size <= self.len,
            "offset {offset:#x} outside the region"
        );
        self.addr + offset
    }

    /// Loads a 64-bit word.
    pub fn load(&self, offset: usize) -> u64 {
        // SAFETY: `at` checked the bounds; any bit pattern is a u64.
        unsafe { (self.at(offset, 8) as *const u64).read_unaligned() }
    }

    /// Loads a 64-bit word that other threads change; `offset` is aligned.
    pub fn load_volatile(&self, offset: usize) -> u64 {
        // SAFETY: `at` checked the bounds; callers pass aligned offsets.
        unsafe { (self.at(offset & !7, 8) as *const u64).read_volatile() }
    }

    /// Stores a 64-bit word; `offset` is rounded down to eight bytes.
    pub fn store(&self, offset: usize, value: u64) {
        // SAFETY: `at` checked the bounds.
        unsafe { (self.at(offset & !7, 8) as *mut u64).write_volatile(value) }
    }

    /// Copies bytes in.
    pub fn fill(&self, offset: usize, bytes: &[u8]) {
        let to = self.at(offset, bytes.len());
        // SAFETY: `at` checked the bounds; the source is a separate slice.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, bytes.len()) }
    }

    /// Changes the protection of the whole region.
    pub fn protect(&self, prot: i32) -> Result<(), String> {
        self.protect_part(0, self.len, prot)
    }

    /// Changes the protection of a part.
    pub fn protect_part(&self, offset: usize, len: usize, prot: i32) -> Result<(), String> {
        // SAFETY: only this region's pages change.
        let r = unsafe { libc::mprotect(self.at(offset, len) as *mut _, len, prot) };
        if r == 0 {
            Ok(())
        } else {
            Err(format!("mprotect: {}", last_error()))
        }
    }

    /// `madvise` on the whole region.
    pub fn advise(&self, advice: i32) -> Result<(), String> {
        // SAFETY: only this region's pages are concerned.
        let r = unsafe { libc::madvise(self.addr as *mut _, self.len, advice) };
        if r == 0 {
            Ok(())
        } else {
            Err(format!("madvise {advice}: {}", last_error()))
        }
    }

    /// Puts fresh private pages with protection `prot` in place of the region.
    pub fn replace(&self, prot: i32) -> Result<(), String> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: replaces this region's own pages.
        let p = unsafe { libc::mmap(self.addr as *mut _, self.len, prot, flags, -1, 0) };
        if p == libc::MAP_FAILED {
            Err(format!("mmap fixed: {}", last_error()))
        } else {
            Ok(())
        }
    }

    /// Unmaps the pages; the region must not be touched until [`Region::replace`].
    pub fn unmap(&self) {
        // SAFETY: the region owns these pages.
        unsafe { libc::munmap(self.addr as *mut _, self.len) };
    }

    /// Moves and resizes the mapping.
    pub fn remap(&mut self, new_len: usize) -> Result<(), String> {
        // SAFETY: the region owns the pages and takes the new address.
        let p =
            unsafe { libc::mremap(self.addr as *mut _, self.len, new_len, libc::MREMAP_MAYMOVE) };
        if p == libc::MAP_FAILED {
            return Err(format!("mremap to {new_len}: {}", last_error()));
        }
        self.addr = p as usize;
        self.len = new_len;
        Ok(())
    }

    /// Moves the mapping to the place of `target`, which is consumed.
    pub fn remap_onto(&mut self, target: Region) -> Result<(), String> {
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: both regions are owned; the target's pages are given up.
        let p = unsafe {
            libc::mremap(
                self.addr as *mut _,
                self.len,
                target.len,
                flags,
                target.addr as *mut libc::c_void,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(format!("mremap fixed: {}", last_error()));
        }
        self.addr = target.addr;
        self.len = target.len;
        std::mem::forget(target);
        Ok(())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        self.unmap();
    }
}
