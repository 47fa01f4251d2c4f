//! `storm`: workers that all make processes, mappings or pipe traffic at once, as fast
//! as the kernel lets them, and check each result.
//!
//! For each kind it prints how many operations were done, in which time, and on which
//! CPUs. It ends with `STORM-OK`, or with 1 as soon as a result is wrong.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "counts, process ids and CPU numbers are far below the limits of the types"
)]

mod kinds;

use kinds::{KINDS, Kind};
use std::ffi::CString;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// CPUs that are told apart.
const CPUS: usize = 64;

/// What all workers share.
pub struct Shared {
    /// Workers that are ready.
    ready: AtomicU32,
    /// Set when they may begin.
    go: AtomicU32,
    /// Set when they shall end.
    stop: AtomicU32,
    /// Operations by the CPU that they ended on.
    done: [AtomicU64; CPUS],
}

impl Shared {
    /// Zeroed memory that stays shared over fork.
    fn new() -> &'static Self {
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Self>(),
                access,
                flags,
                -1,
                0,
            )
        };
        if p == libc::MAP_FAILED {
            fail("mmap of the shared page");
        }
        // SAFETY: zeroed, large enough, aligned to a page, and never unmapped; all of
        // it is atomic.
        unsafe { &*p.cast::<Self>() }
    }

    /// Operations of each CPU so far.
    fn by_cpu(&self) -> impl Iterator<Item = u64> {
        let done = self.done.iter().take(online());
        done.map(|n| n.load(Ordering::SeqCst))
    }

    /// Waits for the start, and then does `op` until the end.
    pub fn work(&self, mut op: impl FnMut(u64)) {
        self.ready.fetch_add(1, Ordering::SeqCst);
        wait_while(&self.go, 0);
        let mut n = 0;
        while self.stop.load(Ordering::Relaxed) == 0 {
            op(n);
            n += 1;
            // SAFETY: no arguments.
            let cpu = unsafe { libc::sched_getcpu() };
            if let Some(done) = self.done.get(cpu.max(0) as usize) {
                done.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Sleeps until a word is not `value`.
fn wait_while(word: &AtomicU32, value: u32) {
    while word.load(Ordering::SeqCst) == value {
        // SAFETY: a futex on a word that lives as long as the program.
        unsafe { libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAIT, value, 0) };
    }
}

/// Ends the program with the call that failed.
#[cold]
pub fn fail(what: &str) -> ! {
    eprintln!("FAILED: {what}: {}", std::io::Error::last_os_error());
    // SAFETY: ends the process, a forked child too, without running anything else.
    unsafe { libc::_exit(1) }
}

/// Forks; the child runs `body` and exits with its result.
pub fn fork(body: impl FnOnce() -> i32) -> i32 {
    // SAFETY: forks while the program has one thread.
    match unsafe { libc::fork() } {
        0 => {
            let code = body();
            // SAFETY: ends the child without running exit handlers.
            unsafe { libc::_exit(code) }
        }
        -1 => fail("fork"),
        pid => pid,
    }
}

/// CPUs that are on line; they are taken to be the first ones.
pub fn online() -> usize {
    // SAFETY: no memory is involved.
    let n = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_ONLN) };
    n.clamp(1, CPUS as i64) as usize
}

/// Ties this thread to a CPU, and what it forks.
pub fn pin(cpu: usize) {
    let mask = 1u64 << cpu;
    // SAFETY: the mask is as long as is said.
    let done = unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, 8, &raw const mask) };
    if done < 0 {
        fail("sched_setaffinity");
    }
}

/// Waits for a child; its exit code, or a negative signal number.
pub fn wait(pid: i32) -> i32 {
    let mut status = 0;
    // SAFETY: `status` is a valid place for the word.
    if unsafe { libc::waitpid(pid, &raw mut status, 0) } != pid {
        fail("waitpid");
    }
    if libc::WIFEXITED(status) {
        libc::WEXITSTATUS(status)
    } else {
        -libc::WTERMSIG(status)
    }
}

/// What the command line says.
pub struct Options {
    workers: u32,
    time: Duration,
    /// Program that `exec` runs.
    pub program: CString,
    /// Workers are tied to CPUs, and a storm lasts until each CPU has done so many
    /// operations, instead of a time.
    pub each: Option<u64>,
    kinds: Vec<&'static Kind>,
}

const USAGE: &str =
    "usage: storm [--workers N] [--milliseconds N] [--program PATH] [--each N] [KIND...]";

fn options() -> Result<Options, String> {
    let mut options = Options {
        workers: 8,
        time: Duration::from_secs(3),
        program: c"/bin/hello".into(),
        each: None,
        kinds: Vec::new(),
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} wants a value; {USAGE}"));
        let number = |text: String| text.parse().map_err(|_| format!("{text} is no number"));
        match arg.as_str() {
            "--workers" => options.workers = number(value()?)?,
            "--milliseconds" => options.time = Duration::from_millis(number(value()?)?.into()),
            "--program" => {
                options.program = CString::new(value()?).map_err(|e| format!("--program: {e}"))?;
            }
            "--each" => options.each = Some(number(value()?)?.into()),
            name => options.kinds.push(
                KINDS
                    .iter()
                    .find(|kind| kind.name == name)
                    .ok_or(format!("no kind {name}; {USAGE}"))?,
            ),
        }
    }
    if options.kinds.is_empty() {
        options.kinds = KINDS.iter().collect();
    }
    Ok(options)
}

/// One storm.
fn storm(options: &Options, kind: &Kind) {
    let shared = Shared::new();
    let workers = (kind.start)(options, shared, options.workers);
    // The workers count themselves; those of a pair count as one.
    while shared.ready.load(Ordering::SeqCst) < options.workers {
        std::thread::sleep(Duration::from_millis(1));
    }
    println!("STORM-BEGIN {}", kind.name);
    let begun = Instant::now();
    shared.go.store(1, Ordering::SeqCst);
    // SAFETY: a futex on a word that lives as long as the program.
    unsafe { libc::syscall(libc::SYS_futex, &shared.go, libc::FUTEX_WAKE, i32::MAX) };
    match options.each {
        None => std::thread::sleep(options.time),
        Some(least) => {
            while shared.by_cpu().any(|n| n < least) {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
    }
    shared.stop.store(1, Ordering::SeqCst);
    let took = begun.elapsed();
    let ops: u64 = shared.by_cpu().sum();
    println!("STORM {} ops={ops} us={}", kind.name, took.as_micros());
    for pid in workers {
        let code = wait(pid);
        if code != 0 {
            eprintln!("FAILED: a worker of {} ended with {code}", kind.name);
            std::process::exit(1);
        }
    }
    let cpus: Vec<u64> = shared.by_cpu().collect();
    println!("STORM-CPUS {} {cpus:?}", kind.name);
}

fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(error) => {
            eprintln!("storm: {error}");
            return ExitCode::from(2);
        }
    };
    for kind in &options.kinds {
        storm(&options, kind);
    }
    println!("STORM-OK");
    ExitCode::SUCCESS
}
