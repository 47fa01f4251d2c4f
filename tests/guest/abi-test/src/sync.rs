//! Waiting and waking between threads, processes and CPUs.

use crate::harness::{Check, Ctx, Note, Verdict, check, equal, require, slow};
use crate::probe;
use crate::sys::{self, Region};
use std::io::{Read, Write};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    slow("sync_futex_ping_pong", 120, futex_ping_pong),
    check("sync_futex_timeout", futex_timeout),
    slow("sync_pipe_ping_pong", 120, pipe_ping_pong),
    slow("sync_yield_storm", 120, yield_storm),
    check("sync_affinity", affinity),
    slow("sync_migration", 120, migration),
    check("sync_eventfd_epoll", eventfd_epoll),
    slow("sync_atomics", 120, atomics),
    slow("sync_signal_other_cpu", 120, signal_other_cpu),
    check("sync_membarrier", membarrier),
    check("sync_rseq", rseq),
    slow("sync_condvar_many", 120, condvar_many),
    check("sync_splice_pipes", big_pipe),
    check("sync_unix_socket", unix_socket),
];

/// `futex(word, op, value)` with a relative timeout in nanoseconds (0: none).
fn futex(word: &AtomicU32, op: i32, value: u32, timeout_ns: i64) -> i64 {
    let t = libc::timespec {
        tv_sec: timeout_ns / 1_000_000_000,
        tv_nsec: timeout_ns % 1_000_000_000,
    };
    let t = if timeout_ns > 0 {
        &raw const t
    } else {
        std::ptr::null()
    };
    // SAFETY: the word outlives the call; the timeout is valid or null.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), op, value, t, 0, 0) }
}

fn wait_while(word: &AtomicU32, value: u32) {
    while word.load(SeqCst) == value {
        futex(word, libc::FUTEX_WAIT, value, 0);
    }
}

fn first_and_last() -> (usize, usize) {
    let cpus = sys::cpus();
    (cpus[0], cpus[cpus.len() - 1])
}

fn futex_ping_pong(ctx: &Ctx) -> Verdict {
    let turn = AtomicU32::new(0);
    let rounds = ctx.n(5000);
    let (first, last) = first_and_last();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = sys::pin(last);
            for _ in 0..rounds {
                wait_while(&turn, 0);
                turn.store(0, SeqCst);
                futex(&turn, libc::FUTEX_WAKE, 1, 0);
            }
        });
        let _ = sys::pin(first);
        for _ in 0..rounds {
            turn.store(1, SeqCst);
            futex(&turn, libc::FUTEX_WAKE, 1, 0);
            wait_while(&turn, 1);
        }
    });
    Ok(Note::Pass)
}

fn futex_timeout(_: &Ctx) -> Verdict {
    let word = AtomicU32::new(5);
    let before = sys::clock_ns(libc::CLOCK_MONOTONIC);
    let r = futex(&word, libc::FUTEX_WAIT, 5, 50_000_000);
    equal("wait", (r, sys::errno()), (-1, libc::ETIMEDOUT))?;
    let slept = sys::clock_ns(libc::CLOCK_MONOTONIC) - before;
    require(slept >= 50_000_000, || {
        format!("50 ms wait took {slept} ns")
    })?;
    let r = futex(&word, libc::FUTEX_WAIT, 6, 0);
    equal(
        "wait for another value",
        (r, sys::errno()),
        (-1, libc::EAGAIN),
    )?;
    Ok(Note::Pass)
}

fn pipe_ping_pong(ctx: &Ctx) -> Verdict {
    let rounds = ctx.n(1000);
    let (first, last) = first_and_last();
    let (mut our_reader, mut their_writer) = std::io::pipe().map_err(|e| e.to_string())?;
    let (mut their_reader, mut our_writer) = std::io::pipe().map_err(|e| e.to_string())?;
    let child = sys::fork(|| {
        let _ = sys::pin(last);
        for _ in 0..rounds {
            let mut word = [0; 4];
            if their_reader.read_exact(&mut word).is_err() {
                return 1;
            }
            let next = u32::from_le_bytes(word) + 1;
            if their_writer.write_all(&next.to_le_bytes()).is_err() {
                return 2;
            }
        }
        0
    })?;
    sys::pin(first)?;
    let mut value = 0_u32;
    for _ in 0..rounds {
        our_writer
            .write_all(&value.to_le_bytes())
            .map_err(|e| e.to_string())?;
        let mut word = [0; 4];
        our_reader
            .read_exact(&mut word)
            .map_err(|e| e.to_string())?;
        equal("answer", u32::from_le_bytes(word), value + 1)?;
        value += 2;
    }
    child.wait_ok("other process")?;
    Ok(Note::Pass)
}

fn yield_storm(ctx: &Ctx) -> Verdict {
    let rounds = ctx.n(5000);
    let done = AtomicU32::new(0);
    std::thread::scope(|scope| {
        for cpu in sys::cpus().into_iter().flat_map(|cpu| [cpu; 4]) {
            let done = &done;
            scope.spawn(move || {
                let _ = sys::pin(cpu);
                for _ in 0..rounds {
                    sys::yield_now();
                }
                done.fetch_add(1, SeqCst);
            });
        }
    });
    equal(
        "threads done",
        done.load(SeqCst) as usize,
        sys::cpus().len() * 4,
    )?;
    Ok(Note::Pass)
}

fn affinity(_: &Ctx) -> Verdict {
    let online = sys::cpus();
    for &cpu in &online {
        sys::pin(cpu)?;
        equal("allowed CPUs", sys::cpus(), vec![cpu])?;
    }
    require(sys::pin(1000).is_err(), || {
        "CPU 1000 was accepted".to_string()
    })?;
    Ok(Note::Pass)
}

/// A thread that moves itself to another CPU on each round.
fn migration(ctx: &Ctx) -> Verdict {
    let cpus = sys::cpus();
    let memory = Region::new(16 * 4096)?;
    for round in 0..ctx.n(2000) as usize {
        let cpu = cpus[round % cpus.len()];
        sys::pin(cpu)?;
        // SAFETY: no arguments.
        let here = unsafe { libc::sched_getcpu() };
        equal("CPU", here as usize, cpu)?;
        let offset = round % 16 * 4096;
        memory.store(offset, round as u64);
        equal("memory", memory.load(offset), round as u64)?;
    }
    Ok(Note::Pass)
}

fn eventfd_epoll(ctx: &Ctx) -> Verdict {
    let rounds = u64::from(ctx.n(2000));
    // SAFETY: new descriptors that live until the process ends.
    let (event, poll) = unsafe { (libc::eventfd(0, 0), libc::epoll_create1(0)) };
    require(event >= 0 && poll >= 0, || {
        format!("eventfd or epoll: {}", sys::last_error())
    })?;
    let mut wanted = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: 4711,
    };
    // SAFETY: valid descriptors and event.
    let r = unsafe { libc::epoll_ctl(poll, libc::EPOLL_CTL_ADD, event, &mut wanted) };
    equal("epoll_ctl", r, 0)?;
    let (first, last) = first_and_last();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = sys::pin(last);
            for _ in 0..rounds {
                let one = 1_u64;
                // SAFETY: eight readable bytes.
                unsafe { libc::write(event, (&raw const one).cast(), 8) };
            }
        });
        sys::pin(first)?;
        let mut sum = 0;
        while sum < rounds {
            let mut got = libc::epoll_event { events: 0, u64: 0 };
            // SAFETY: room for one event.
            let n = unsafe { libc::epoll_wait(poll, &mut got, 1, 20_000) };
            equal("epoll_wait", n, 1)?;
            equal("data", got.u64, 4711)?;
            let mut count = 0_u64;
            // SAFETY: eight writable bytes.
            unsafe { libc::read(event, (&raw mut count).cast(), 8) };
            sum += count;
        }
        equal("events", sum, rounds)
    })?;
    Ok(Note::Pass)
}

/// Locked instructions and plain message passing between CPUs.
fn atomics(ctx: &Ctx) -> Verdict {
    let counter = AtomicU64::new(0);
    let rounds = u64::from(ctx.n(100_000));
    let cpus = sys::cpus();
    std::thread::scope(|scope| {
        for &cpu in &cpus {
            let counter = &counter;
            scope.spawn(move || {
                let _ = sys::pin(cpu);
                for _ in 0..rounds {
                    counter.fetch_add(1, SeqCst);
                }
            });
        }
    });
    equal("sum", counter.load(SeqCst), rounds * cpus.len() as u64)?;
    Ok(Note::Pass)
}

static CAUGHT: AtomicU64 = AtomicU64::new(0);

extern "C" fn caught(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    CAUGHT.fetch_add(1, SeqCst);
}

/// Signals to a thread that spins in user mode on another CPU.
fn signal_other_cpu(ctx: &Ctx) -> Verdict {
    probe::set_handler(libc::SIGUSR1, caught, 0);
    let (first, last) = first_and_last();
    let tid = AtomicU32::new(0);
    let rounds = u64::from(ctx.n(1000));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let _ = sys::pin(last);
            tid.store(sys::gettid() as u32, SeqCst);
            while CAUGHT.load(SeqCst) < rounds {
                std::hint::spin_loop();
            }
        });
        sys::pin(first)?;
        while tid.load(SeqCst) == 0 {
            sys::yield_now();
        }
        for round in 0..rounds {
            let (pid, tid) = (std::process::id() as usize, tid.load(SeqCst) as usize);
            let r = sys::syscall_int(libc::SYS_tgkill, pid, tid, libc::SIGUSR1 as usize);
            equal("tgkill", r, 0)?;
            while CAUGHT.load(SeqCst) <= round {
                sys::yield_now();
            }
        }
        Ok::<(), String>(())
    })?;
    Ok(Note::Pass)
}

fn membarrier(_: &Ctx) -> Verdict {
    let supported = sys::syscall_int(libc::SYS_membarrier, 0, 0, 0);
    require(supported > 0, || format!("membarrier query: {supported}"))?;
    for (name, command) in [
        ("global", 1),
        ("register private", 16),
        ("private expedited", 8),
    ] {
        if supported & command != 0 {
            let r = sys::syscall_int(libc::SYS_membarrier, command as usize, 0, 0);
            equal(name, r, 0)?;
        }
    }
    // Registering for, and making, core serialisation.
    if supported & 64 != 0 {
        equal(
            "register",
            sys::syscall_int(libc::SYS_membarrier, 64, 0, 0),
            0,
        )?;
        equal(
            "sync core",
            sys::syscall_int(libc::SYS_membarrier, 32, 0, 0),
            0,
        )?;
    }
    Ok(Note::Pass)
}

/// A restartable sequence area in a thread of its own: the kernel keeps the
/// CPU number in it up to date.
fn rseq(ctx: &Ctx) -> Verdict {
    const SIGNATURE: usize = 0x5305_3053;
    let area = Region::new(4096)?;
    area.store(0, 0xffff_ffff_0000_0000); // cpu_id_start 0, cpu_id: uninitialised
    let register = |flags: usize| {
        // SAFETY: 32 aligned bytes that live until they are unregistered.
        unsafe { libc::syscall(libc::SYS_rseq, area.addr(), 32, flags, SIGNATURE) }
    };
    if register(0) != 0 {
        // The C library has registered one for the main thread already (or
        // the kernel has none): read what it keeps.
        return Ok(Note::Info(format!("not registered: {}", sys::last_error())));
    }
    let check = || -> Result<(), String> {
        for cpu in sys::cpus().into_iter().cycle().take(ctx.n(200) as usize) {
            sys::pin(cpu)?;
            equal("cpu_id", area.load_volatile(0) >> 32, cpu as u64)?;
        }
        Ok(())
    };
    let result = check();
    equal("unregister", register(1), 0)?;
    result?;
    Ok(Note::Info("kept up to date".to_string()))
}

fn condvar_many(ctx: &Ctx) -> Verdict {
    let turn = std::sync::Mutex::new(0_usize);
    let changed = std::sync::Condvar::new();
    let rounds = ctx.n(200) as usize;
    const THREADS: usize = 8;
    std::thread::scope(|scope| {
        for me in 0..THREADS {
            let (turn, changed) = (&turn, &changed);
            scope.spawn(move || {
                for round in 0..rounds {
                    let Ok(guard) = turn.lock() else { return };
                    let mine = round * THREADS + me;
                    let Ok(mut guard) = changed.wait_while(guard, |t| *t != mine) else {
                        return;
                    };
                    *guard += 1;
                    changed.notify_all();
                }
            });
        }
    });
    let turn = turn.into_inner().map_err(|e| e.to_string())?;
    equal("turns", turn, rounds * THREADS)?;
    Ok(Note::Pass)
}

/// Large reads and writes through pipes keep their order and content.
fn big_pipe(ctx: &Ctx) -> Verdict {
    let (mut reader, mut writer) = std::io::pipe().map_err(|e| e.to_string())?;
    let total = ctx.n(200) as usize * 10_007;
    let child = sys::fork(|| {
        let bytes: Vec<u8> = (0..total).map(|i| (i * 31 % 251) as u8).collect();
        i32::from(writer.write_all(&bytes).is_err())
    })?;
    drop(writer);
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).map_err(|e| e.to_string())?;
    child.wait_ok("writer")?;
    equal("length", bytes.len(), total)?;
    let wrong = bytes
        .iter()
        .enumerate()
        .position(|(i, &b)| b != (i * 31 % 251) as u8);
    equal("first wrong byte", wrong, None)?;
    Ok(Note::Pass)
}

fn unix_socket(ctx: &Ctx) -> Verdict {
    let (mut ours, mut theirs) =
        std::os::unix::net::UnixStream::pair().map_err(|e| e.to_string())?;
    let rounds = ctx.n(500);
    let child = sys::fork(|| {
        for _ in 0..rounds {
            let mut block = [0; 1000];
            if theirs.read_exact(&mut block).is_err() {
                return 1;
            }
            block.reverse();
            if theirs.write_all(&block).is_err() {
                return 2;
            }
        }
        0
    })?;
    for round in 0..rounds {
        let block: Vec<u8> = (0..1000_u32).map(|i| (i + round) as u8).collect();
        ours.write_all(&block).map_err(|e| e.to_string())?;
        let mut answer = [0; 1000];
        ours.read_exact(&mut answer).map_err(|e| e.to_string())?;
        answer.reverse();
        require(answer[..] == block[..], || {
            format!("round {round}: wrong block")
        })?;
    }
    child.wait_ok("other side")?;
    Ok(Note::Pass)
}
