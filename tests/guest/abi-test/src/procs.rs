//! Processes and threads: fork, exec, exit, wait.

use crate::harness::{Check, Ctx, Note, Verdict, check, equal, require, slow};
use crate::sys::{self, Region, Status};
use std::ffi::CString;
use std::process::Command;
use std::sync::Mutex;

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    slow("proc_fork_exit_thousands", 300, fork_exit),
    slow("proc_fork_parallel", 300, fork_parallel),
    slow("proc_fork_deep", 120, fork_deep),
    slow("proc_exec_loop", 300, exec_loop),
    slow("proc_vfork_spawn", 300, vfork_spawn),
    check("proc_exec_arguments", exec_arguments),
    check("proc_wait_statuses", wait_statuses),
    check("proc_orphans", orphans),
    slow("proc_threads_churn", 120, threads_churn),
    slow("proc_threads_many", 120, threads_many),
    slow("proc_fork_with_threads", 120, fork_with_threads),
    check("proc_core_limits_stack", big_stack),
];

/// Exit code of a helper that found everything right.
pub const HELPER_OK: i32 = 33;

/// Executes this program again as `exec-helper WHAT`; returns only on failure.
pub fn exec_self(what: &str) -> i32 {
    let Ok(what) = CString::new(what) else {
        return 97;
    };
    let argv = [
        c"abi-test".as_ptr(),
        c"exec-helper".as_ptr(),
        what.as_ptr(),
        std::ptr::null(),
    ];
    let envp = [c"ABI_TEST=helper".as_ptr(), std::ptr::null()];
    // SAFETY: null-terminated arrays of C strings.
    unsafe { libc::execve(c"/proc/self/exe".as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    96
}

/// What the program does when it is started as `exec-helper`.
pub fn helper(what: &str) -> i32 {
    let right = match what {
        "exit" => true,
        "fp-state" => crate::fpu::fresh_state(),
        "environment" => std::env::vars().eq([("ABI_TEST".to_string(), "helper".to_string())]),
        _ => false,
    };
    if right { HELPER_OK } else { 1 }
}

fn fork_exit(ctx: &Ctx) -> Verdict {
    for i in 0..ctx.n(3000) {
        let code = (i & 0x7f) as i32;
        equal("exit code", sys::fork(|| code)?.wait(), Status::Exit(code))?;
    }
    Ok(Note::Pass)
}

/// Forks from one process per CPU at once, each child touching memory.
fn fork_parallel(ctx: &Ctx) -> Verdict {
    let rounds = ctx.n(500);
    let workers: Vec<_> = (0..sys::cpus().len() * 2)
        .map(|_| {
            sys::fork(|| {
                let Ok(memory) = Region::new(64 * 4096) else {
                    return 1;
                };
                for i in 0..64 {
                    memory.store(i * 4096, i as u64);
                }
                for _ in 0..rounds {
                    let child = sys::fork(|| {
                        for i in 0..64 {
                            memory.store(i * 4096, memory.load(i * 4096) + 1);
                        }
                        i32::from((0..64).any(|i| memory.load(i * 4096) != i as u64 + 1))
                    });
                    if child.and_then(|c| c.wait_ok("grandchild")).is_err() {
                        return 2;
                    }
                }
                i32::from((0..64).any(|i| memory.load(i * 4096) != i as u64))
            })
        })
        .collect::<Result<_, _>>()?;
    for worker in workers {
        worker.wait_ok("worker")?;
    }
    Ok(Note::Pass)
}

/// A chain: each process forks the next and waits for it.
fn fork_deep(ctx: &Ctx) -> Verdict {
    fn descend(left: u32) -> i32 {
        if left == 0 {
            return 0;
        }
        match sys::fork(|| descend(left - 1)).map(sys::Child::wait) {
            Ok(Status::Exit(code)) => code,
            _ => 1,
        }
    }
    equal("bottom's exit code", descend(ctx.n(200)), 0)?;
    Ok(Note::Pass)
}

fn exec_loop(ctx: &Ctx) -> Verdict {
    for i in 0..ctx.n(500) {
        let status = sys::fork(|| exec_self("exit"))?.wait();
        require(status == Status::Exit(HELPER_OK), || {
            format!("run {i} ended with {status}")
        })?;
    }
    Ok(Note::Pass)
}

/// The standard library starts programs by a vfork-like clone.
fn vfork_spawn(ctx: &Ctx) -> Verdict {
    for _ in 0..ctx.n(200) {
        let status = Command::new("/proc/self/exe")
            .args(["exec-helper", "exit"])
            .status()
            .map_err(|e| format!("spawn: {e}"))?;
        equal("exit code", status.code(), Some(HELPER_OK))?;
    }
    Ok(Note::Pass)
}

fn exec_arguments(_: &Ctx) -> Verdict {
    let status = sys::fork(|| exec_self("environment"))?.wait();
    equal("helper", status, Status::Exit(HELPER_OK))?;
    // Half a megabyte of arguments crosses many pages of the new stack.
    let long = "x".repeat(100_000);
    let output = Command::new("/proc/self/exe")
        .args(["exec-helper", "exit"])
        .args([&long, &long, &long, &long, &long])
        .status()
        .map_err(|e| format!("spawn: {e}"))?;
    equal("with long arguments", output.code(), Some(HELPER_OK))?;
    Ok(Note::Pass)
}

fn wait_statuses(_: &Ctx) -> Verdict {
    for code in [0, 1, 127, 255] {
        equal("exit", sys::fork(|| code)?.wait(), Status::Exit(code))?;
    }
    for sig in [libc::SIGKILL, libc::SIGTERM, libc::SIGUSR1, libc::SIGHUP] {
        let child = sys::fork(|| {
            loop {
                // SAFETY: waits for a signal.
                unsafe { libc::pause() };
            }
        })?;
        child.kill(sig);
        equal("killed", child.wait(), Status::Signal(sig))?;
    }
    Ok(Note::Pass)
}

/// Grandchildren whose parent has gone go on, and report by a shared page.
fn orphans(_: &Ctx) -> Verdict {
    let page = Region::shared(4096)?;
    let parent = sys::fork(|| {
        page.store(8, u64::from(std::process::id()));
        let orphan = sys::fork(|| {
            while sys::syscall_int(libc::SYS_getppid, 0, 0, 0) as u64 == page.load_volatile(8) {
                sys::yield_now();
            }
            page.store(0, 1);
            0
        });
        i32::from(orphan.is_err())
    })?;
    parent.wait_ok("parent of the orphan")?;
    while page.load_volatile(0) == 0 {
        sys::yield_now();
    }
    Ok(Note::Pass)
}

fn threads_churn(ctx: &Ctx) -> Verdict {
    let mut sum = 0_u64;
    let n = ctx.n(2000);
    for i in 0..n {
        let thread = std::thread::spawn(move || u64::from(i) * 2);
        sum += thread.join().map_err(|_| "thread panicked".to_string())?;
    }
    equal("sum of results", sum, u64::from(n) * u64::from(n - 1))?;
    Ok(Note::Pass)
}

fn threads_many(ctx: &Ctx) -> Verdict {
    let total = Mutex::new(0_u64);
    let rounds = ctx.n(500);
    std::thread::scope(|scope| {
        for _ in 0..64 {
            scope.spawn(|| {
                for _ in 0..rounds {
                    if let Ok(mut total) = total.lock() {
                        *total += 1;
                    }
                }
            });
        }
    });
    let total = total.into_inner().map_err(|e| e.to_string())?;
    equal("increments", total, u64::from(rounds) * 64)?;
    Ok(Note::Pass)
}

/// fork in one thread while others change the same address space.
fn fork_with_threads(ctx: &Ctx) -> Verdict {
    let memory = Region::new(64 * 4096)?;
    let stop = std::sync::atomic::AtomicBool::new(false);
    let rounds = ctx.n(300);
    std::thread::scope(|scope| {
        for thread in 0..2_usize {
            let (memory, stop) = (&memory, &stop);
            scope.spawn(move || {
                let mut value = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    value += 1;
                    for page in 0..32 {
                        memory.store((thread * 32 + page) * 4096, value);
                    }
                }
            });
        }
        let forks = || -> Result<(), String> {
            for _ in 0..rounds {
                // The child checks that its pages do not change any more.
                let child = sys::fork(|| {
                    let take = || (0..64).map(|p| memory.load_volatile(p * 4096)).sum::<u64>();
                    let before = take();
                    for _ in 0..20 {
                        sys::yield_now();
                    }
                    i32::from(take() != before)
                })?;
                child.wait_ok("child with a changing copy")?;
            }
            Ok(())
        };
        let result = forks();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        result
    })?;
    Ok(Note::Pass)
}

/// A stack that grows by 4 MiB, page by page.
fn big_stack(_: &Ctx) -> Verdict {
    #[inline(never)]
    fn descend(left: usize) -> u64 {
        let block = std::hint::black_box([left as u8; 4096]);
        let below = if left > 0 { descend(left - 1) } else { 0 };
        below + u64::from(std::hint::black_box(&block)[left % 4096] == left as u8)
    }
    equal("intact stack blocks", descend(1000), 1001)?;
    Ok(Note::Pass)
}
