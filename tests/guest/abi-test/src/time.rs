//! Clocks, timers and the time stamp counter.

use crate::harness::{Check, Ctx, Note, Verdict, check, equal, require, slow};
use crate::sys::{self, clock_ns};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("time_monotonic_one_thread", monotonic_one),
    slow("time_monotonic_across_threads", 60, monotonic_across),
    check("time_realtime_sane", realtime),
    check("time_clocks_agree", clocks_agree),
    check("time_vdso_and_call_agree", vdso_and_call),
    check("time_tsc_monotonic", tsc),
    check("time_raw_rate", raw_rate),
    check("time_cpu_clocks", cpu_clocks),
    check("time_nanosleep", nanosleep),
    check("time_nanosleep_short_many", nanosleep_many),
    check("time_nanosleep_absolute", nanosleep_absolute),
    check("time_timerfd", timerfd),
    check("time_setitimer", setitimer),
    check("time_posix_timer", posix_timer),
    check("time_poll_timeout", poll_timeout),
    check("time_sleepers_parallel", sleepers),
    check("time_getcpu", cpu_number),
];

const MS: i64 = 1_000_000;

fn monotonic_one(ctx: &Ctx) -> Verdict {
    for clock in [
        libc::CLOCK_MONOTONIC,
        libc::CLOCK_MONOTONIC_RAW,
        libc::CLOCK_BOOTTIME,
    ] {
        let mut last = clock_ns(clock);
        for _ in 0..ctx.n(50_000) {
            let now = clock_ns(clock);
            require(now >= last, || {
                format!("clock {clock} went back by {} ns", last - now)
            })?;
            last = now;
        }
    }
    Ok(Note::Pass)
}

/// Threads on all CPUs hand the newest time round; nobody may read an older one.
fn monotonic_across(ctx: &Ctx) -> Verdict {
    let newest = AtomicI64::new(0);
    let back = AtomicI64::new(0);
    let rounds = ctx.n(50_000);
    std::thread::scope(|scope| {
        for cpu in sys::cpus().into_iter().flat_map(|cpu| [cpu, cpu]) {
            let (newest, back) = (&newest, &back);
            scope.spawn(move || {
                let _ = sys::pin(cpu);
                for round in 0..rounds {
                    let before = newest.load(SeqCst);
                    let now = clock_ns(libc::CLOCK_MONOTONIC);
                    back.fetch_max(before - now, SeqCst);
                    newest.fetch_max(now, SeqCst);
                    if round % 256 == 0 {
                        sys::yield_now();
                    }
                }
            });
        }
    });
    let back = back.load(SeqCst);
    require(back <= 0, || {
        format!("time went back by {back} ns between threads")
    })?;
    Ok(Note::Pass)
}

fn realtime(_: &Ctx) -> Verdict {
    let seconds = clock_ns(libc::CLOCK_REALTIME) / 1_000_000_000;
    // 2020 to 2100: a machine without a wall clock starts in 1970.
    require((1_577_836_800..4_102_444_800).contains(&seconds), || {
        format!("{seconds} s since 1970")
    })?;
    Ok(Note::Pass)
}

/// REALTIME and MONOTONIC keep their distance over 300 ms.
fn clocks_agree(_: &Ctx) -> Verdict {
    let distance = || {
        // The tightest of some readings: a switch may come between the two.
        (0..200)
            .map(|_| {
                let before = clock_ns(libc::CLOCK_MONOTONIC);
                let real = clock_ns(libc::CLOCK_REALTIME);
                let after = clock_ns(libc::CLOCK_MONOTONIC);
                (after - before, real - i64::midpoint(before, after))
            })
            .min()
            .map_or(0, |(_, distance)| distance)
    };
    let first = distance();
    sleep(300 * MS)?;
    let drift = distance() - first;
    require(drift.abs() < MS, || {
        format!("distance changed by {drift} ns in 300 ms")
    })?;
    Ok(Note::Pass)
}

fn call_clock_ns(clock: i32) -> i64 {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes one timespec.
    unsafe { libc::syscall(libc::SYS_clock_gettime, clock, &raw mut t) };
    t.tv_sec * 1_000_000_000 + t.tv_nsec
}

fn vdso_and_call(ctx: &Ctx) -> Verdict {
    for clock in [libc::CLOCK_MONOTONIC, libc::CLOCK_REALTIME] {
        for _ in 0..ctx.n(5000) {
            let a = clock_ns(clock);
            let b = call_clock_ns(clock);
            let c = clock_ns(clock);
            require(a <= b && b <= c, || {
                format!("clock {clock}: {a}, {b} by call, {c}")
            })?;
        }
    }
    Ok(Note::Pass)
}

fn rdtsc() -> u64 {
    use core::arch::x86_64::{_mm_lfence, _rdtsc};
    // SAFETY: both are always there in 64-bit mode. The fences keep the read
    // in its place among the loads around it.
    unsafe {
        _mm_lfence();
        let ticks = _rdtsc();
        _mm_lfence();
        ticks
    }
}

fn tsc(ctx: &Ctx) -> Verdict {
    let newest = AtomicU64::new(0);
    let wrong = AtomicU64::new(0);
    let rounds = ctx.n(50_000);
    std::thread::scope(|scope| {
        let mut last = rdtsc();
        for _ in 0..rounds {
            let now = rdtsc();
            wrong.fetch_max(last.saturating_sub(now), SeqCst);
            last = now;
        }
        for cpu in sys::cpus() {
            let (newest, wrong) = (&newest, &wrong);
            scope.spawn(move || {
                let _ = sys::pin(cpu);
                for _ in 0..rounds {
                    let before = newest.load(SeqCst);
                    let now = rdtsc();
                    wrong.fetch_max(before.saturating_sub(now), SeqCst);
                    newest.fetch_max(now, SeqCst);
                }
            });
        }
    });
    equal("ticks that rdtsc went back", wrong.load(SeqCst), 0)?;
    Ok(Note::Pass)
}

/// MONOTONIC against MONOTONIC_RAW and against the time stamp counter.
fn raw_rate(_: &Ctx) -> Verdict {
    let (mono, raw, ticks) = (
        clock_ns(libc::CLOCK_MONOTONIC),
        clock_ns(libc::CLOCK_MONOTONIC_RAW),
        rdtsc(),
    );
    sleep(500 * MS)?;
    let mono = clock_ns(libc::CLOCK_MONOTONIC) - mono;
    let raw = clock_ns(libc::CLOCK_MONOTONIC_RAW) - raw;
    let ticks = rdtsc() - ticks;
    // The clock may be slewed by 500 ppm and a switch may come between reads.
    require((mono - raw).abs() < 20 * MS, || {
        format!("{mono} ns monotonic, {raw} ns raw")
    })?;
    Ok(Note::Info(format!(
        "{:.3} TSC ticks per ns",
        ticks as f64 / mono as f64
    )))
}

fn cpu_clocks(_: &Ctx) -> Verdict {
    // Wall first: what may come between the two readings counts as wall time.
    let wall = Instant::now();
    let cpu = clock_ns(libc::CLOCK_PROCESS_CPUTIME_ID);
    while clock_ns(libc::CLOCK_PROCESS_CPUTIME_ID) - cpu < 50 * MS {
        require(wall.elapsed() < Duration::from_secs(20), || {
            "CPU clock hardly moves".to_string()
        })?;
    }
    let busy = wall.elapsed().as_nanos() as i64;
    require(busy >= 49 * MS, || {
        format!("50 ms of CPU time in {busy} ns")
    })?;
    let cpu = clock_ns(libc::CLOCK_PROCESS_CPUTIME_ID);
    sleep(200 * MS)?;
    let asleep = clock_ns(libc::CLOCK_PROCESS_CPUTIME_ID) - cpu;
    require(asleep < 50 * MS, || {
        format!("{asleep} ns of CPU time while asleep for 200 ms")
    })?;
    Ok(Note::Pass)
}

fn sleep(ns: i64) -> Result<(), String> {
    let t = libc::timespec {
        tv_sec: ns / 1_000_000_000,
        tv_nsec: ns % 1_000_000_000,
    };
    // SAFETY: a valid timespec; the rest is not asked for.
    let r = unsafe { libc::nanosleep(&t, std::ptr::null_mut()) };
    equal("nanosleep", r, 0)
}

/// Never early; how late depends on the machine's load.
fn at_least(what: &str, slept: i64, asked: i64) -> Result<(), String> {
    require(slept >= asked, || {
        format!("{what} woke {} ns early", asked - slept)
    })?;
    require(slept < asked + 5_000 * MS, || {
        format!("{what} woke {} ms late", (slept - asked) / MS)
    })
}

fn nanosleep(_: &Ctx) -> Verdict {
    let mut best = i64::MAX;
    for _ in 0..5 {
        let before = clock_ns(libc::CLOCK_MONOTONIC);
        sleep(100 * MS)?;
        let slept = clock_ns(libc::CLOCK_MONOTONIC) - before;
        at_least("nanosleep(100 ms)", slept, 100 * MS)?;
        best = best.min(slept);
    }
    Ok(Note::Info(format!(
        "100 ms took {:.2} ms at best",
        best as f64 / MS as f64
    )))
}

fn nanosleep_many(ctx: &Ctx) -> Verdict {
    for i in 0..i64::from(ctx.n(300)) {
        let asked = (i % 10) * 100_000 + 1;
        let before = clock_ns(libc::CLOCK_MONOTONIC);
        sleep(asked)?;
        at_least("nanosleep", clock_ns(libc::CLOCK_MONOTONIC) - before, asked)?;
    }
    Ok(Note::Pass)
}

fn nanosleep_absolute(_: &Ctx) -> Verdict {
    for clock in [libc::CLOCK_MONOTONIC, libc::CLOCK_REALTIME] {
        let until = clock_ns(clock) + 50 * MS;
        let t = libc::timespec {
            tv_sec: until / 1_000_000_000,
            tv_nsec: until % 1_000_000_000,
        };
        // SAFETY: a valid timespec.
        let r =
            unsafe { libc::clock_nanosleep(clock, libc::TIMER_ABSTIME, &t, std::ptr::null_mut()) };
        equal("clock_nanosleep", r, 0)?;
        at_least("absolute sleep", clock_ns(clock), until)?;
    }
    Ok(Note::Pass)
}

fn timerfd(_: &Ctx) -> Verdict {
    let every = libc::timespec {
        tv_sec: 0,
        tv_nsec: 10 * MS,
    };
    let setting = libc::itimerspec {
        it_interval: every,
        it_value: every,
    };
    let mut total = 0_u64;
    let begun = clock_ns(libc::CLOCK_MONOTONIC);
    // SAFETY: valid settings; reads of eight bytes into a word.
    unsafe {
        let fd = libc::timerfd_create(libc::CLOCK_MONOTONIC, 0);
        require(fd >= 0, || format!("timerfd_create: {}", sys::last_error()))?;
        equal(
            "timerfd_settime",
            libc::timerfd_settime(fd, 0, &setting, std::ptr::null_mut()),
            0,
        )?;
        while total < 20 {
            let mut expired = 0_u64;
            equal("read", libc::read(fd, (&raw mut expired).cast(), 8), 8)?;
            total += expired;
        }
    }
    let slept = clock_ns(libc::CLOCK_MONOTONIC) - begun;
    at_least("timerfd", slept, total as i64 * 10 * MS)?;
    Ok(Note::Pass)
}

static TICKS: AtomicU64 = AtomicU64::new(0);

extern "C" fn tick(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    TICKS.fetch_add(1, SeqCst);
}

/// Interval timers for real time, and for CPU time of a busy process.
fn setitimer(_: &Ctx) -> Verdict {
    for (which, sig) in [
        (libc::ITIMER_REAL, libc::SIGALRM),
        (libc::ITIMER_VIRTUAL, libc::SIGVTALRM),
        (libc::ITIMER_PROF, libc::SIGPROF),
    ] {
        TICKS.store(0, SeqCst);
        crate::probe::set_handler(sig, tick, 0);
        let every = libc::timeval {
            tv_sec: 0,
            tv_usec: 10_000,
        };
        let setting = libc::itimerval {
            it_interval: every,
            it_value: every,
        };
        let stop = libc::itimerval {
            it_interval: libc::timeval {
                tv_sec: 0,
                tv_usec: 0,
            },
            it_value: libc::timeval {
                tv_sec: 0,
                tv_usec: 0,
            },
        };
        let begun = clock_ns(libc::CLOCK_MONOTONIC);
        // SAFETY: valid settings.
        unsafe { libc::setitimer(which, &setting, std::ptr::null_mut()) };
        while TICKS.load(SeqCst) < 10 {
            std::hint::spin_loop();
        }
        let took = clock_ns(libc::CLOCK_MONOTONIC) - begun;
        // SAFETY: valid settings.
        unsafe { libc::setitimer(which, &stop, std::ptr::null_mut()) };
        // CPU-time timers count whole kernel ticks of up to 10 ms.
        require(took >= 60 * MS, || {
            format!("timer {which}: ten ticks of 10 ms in {took} ns")
        })?;
    }
    Ok(Note::Pass)
}

fn posix_timer(_: &Ctx) -> Verdict {
    TICKS.store(0, SeqCst);
    crate::probe::set_handler(libc::SIGUSR2, tick, 0);
    let every = libc::timespec {
        tv_sec: 0,
        tv_nsec: 5 * MS,
    };
    let setting = libc::itimerspec {
        it_interval: every,
        it_value: every,
    };
    let begun;
    // SAFETY: valid structures; the timer ends with the process.
    unsafe {
        let mut event: libc::sigevent = std::mem::zeroed();
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = libc::SIGUSR2;
        let mut timer: libc::timer_t = std::mem::zeroed();
        equal(
            "timer_create",
            libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer),
            0,
        )?;
        // Before it is armed: this thread may lose its CPU right after.
        begun = clock_ns(libc::CLOCK_MONOTONIC);
        equal(
            "timer_settime",
            libc::timer_settime(timer, 0, &setting, std::ptr::null_mut()),
            0,
        )?;
    }
    while TICKS.load(SeqCst) < 20 {
        // SAFETY: waits for a signal.
        unsafe { libc::pause() };
    }
    let took = clock_ns(libc::CLOCK_MONOTONIC) - begun;
    require(took >= 100 * MS, || {
        format!("20 ticks of 5 ms in {took} ns")
    })?;
    Ok(Note::Pass)
}

fn poll_timeout(_: &Ctx) -> Verdict {
    let before = clock_ns(libc::CLOCK_MONOTONIC);
    // SAFETY: no descriptors.
    let r = unsafe { libc::poll(std::ptr::null_mut(), 0, 50) };
    equal("poll", r, 0)?;
    at_least(
        "poll(50 ms)",
        clock_ns(libc::CLOCK_MONOTONIC) - before,
        50 * MS,
    )?;
    Ok(Note::Pass)
}

/// Many threads asleep at once wake in their order, none early.
fn sleepers(_: &Ctx) -> Verdict {
    let early = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for i in 0..32 {
            let early = &early;
            scope.spawn(move || {
                let asked = (i % 8 + 1) * 20 * MS;
                let before = clock_ns(libc::CLOCK_MONOTONIC);
                let slept = sleep(asked).is_ok();
                if !slept || clock_ns(libc::CLOCK_MONOTONIC) - before < asked {
                    early.store(true, SeqCst);
                }
            });
        }
    });
    equal("somebody woke early", early.load(SeqCst), false)?;
    Ok(Note::Pass)
}

unsafe extern "C" {
    /// The C library's call, which goes to the vDSO.
    fn getcpu(cpu: *mut u32, node: *mut u32) -> i32;
}

/// The CPU number by system call, by the C library (which reads what the
/// kernel keeps in the thread's rseq area) and by affinity. The vDSO's answer
/// is told only: see seg_cpu_number_by_lsl.
fn cpu_number(ctx: &Ctx) -> Verdict {
    let mut by_vdso = Vec::new();
    for round in 0..ctx.n(50) {
        for cpu in sys::cpus() {
            sys::pin(cpu)?;
            let (mut by_call, mut vdso) = (0_u32, 0_u32);
            // SAFETY: one word each is written; sched_getcpu has no arguments.
            let by_library = unsafe {
                libc::syscall(libc::SYS_getcpu, &raw mut by_call, 0, 0);
                getcpu(&raw mut vdso, std::ptr::null_mut());
                libc::sched_getcpu()
            };
            equal("by system call", by_call as usize, cpu)?;
            equal("by library", by_library as usize, cpu)?;
            if round == 0 {
                by_vdso.push(vdso);
            }
        }
    }
    Ok(Note::Info(format!("right; vDSO says {by_vdso:?}")))
}
