//! The subcommands that look at the whole machine: CPU hotplug, idleness and
//! clocks to compare with the instance below.

use crate::sys;
use std::path::PathBuf;

/// Reads /proc/stat's first line: busy and total ticks of all CPUs.
fn cpu_ticks() -> Result<(u64, u64), String> {
    let text = std::fs::read_to_string("/proc/stat").map_err(|e| format!("/proc/stat: {e}"))?;
    let first = text.lines().next().unwrap_or("");
    let ticks: Vec<u64> = first
        .split_whitespace()
        .skip(1)
        .filter_map(|w| w.parse().ok())
        .collect();
    if ticks.len() < 8 {
        return Err(format!("/proc/stat begins with {first:?}"));
    }
    let total = ticks[..8].iter().sum::<u64>();
    // idle and iowait are the fourth and fifth
    Ok((total - ticks[3] - ticks[4], total))
}

/// Sleeps and prints how busy the machine was meanwhile, by its own count.
pub fn idle(seconds: &str) -> Result<(), String> {
    let seconds: u64 = seconds
        .parse()
        .map_err(|_| format!("{seconds} is not a number of seconds"))?;
    let interrupts = || -> Result<u64, String> {
        let text = std::fs::read_to_string("/proc/stat").map_err(|e| e.to_string())?;
        let line = text.lines().find_map(|l| l.strip_prefix("intr "));
        line.and_then(|l| l.split_whitespace().next()?.parse().ok())
            .ok_or_else(|| "no intr line in /proc/stat".to_string())
    };
    let (ticks, interrupted) = (cpu_ticks()?, interrupts()?);
    std::thread::sleep(std::time::Duration::from_secs(seconds));
    let (after, interrupted_after) = (cpu_ticks()?, interrupts()?);
    let (busy, total) = (after.0 - ticks.0, after.1 - ticks.1);
    println!(
        "IDLE seconds {seconds} busy_ticks {busy} total_ticks {total} busy_percent {:.2} interrupts {}",
        busy as f64 * 100.0 / total.max(1) as f64,
        interrupted_after - interrupted
    );
    Ok(())
}

/// Prints the clocks on one line, in nanoseconds.
pub fn clock() {
    println!(
        "CLOCK realtime {} monotonic {} boottime {}",
        sys::clock_ns(libc::CLOCK_REALTIME),
        sys::clock_ns(libc::CLOCK_MONOTONIC),
        sys::clock_ns(libc::CLOCK_BOOTTIME)
    );
}

fn online_file(cpu: usize) -> PathBuf {
    PathBuf::from(format!("/sys/devices/system/cpu/cpu{cpu}/online"))
}

fn set_online(cpu: usize, online: bool) -> Result<(), String> {
    let file = online_file(cpu);
    std::fs::write(&file, if online { "1" } else { "0" })
        .map_err(|e| format!("{}: {e}", file.display()))
}

/// The CPU that the calling process runs on must be one of `allowed`.
fn work_on(allowed: &[usize]) -> Result<(), String> {
    for &cpu in allowed {
        let child = sys::fork(|| {
            let on_it = || -> Result<(), String> {
                sys::pin(cpu)?;
                let memory = sys::Region::new(1 << 20)?;
                for page in 0..256 {
                    memory.store(page * 4096, page as u64);
                    sys::yield_now();
                }
                // A timer must fire on a CPU that came back.
                std::thread::sleep(std::time::Duration::from_millis(5));
                let right = (0..256).all(|page| memory.load(page * 4096) == page as u64);
                if right {
                    Ok(())
                } else {
                    Err("memory is wrong".to_string())
                }
            };
            i32::from(on_it().is_err())
        })?;
        child.wait_ok(&format!("work on CPU {cpu}"))?;
    }
    Ok(())
}

/// Takes every CPU but the first off line and back, with load on the others.
pub fn hotplug(rounds: u32) -> Result<u32, String> {
    let all: Vec<usize> = sys::cpus()
        .into_iter()
        .filter(|&cpu| online_file(cpu).exists())
        .collect();
    if all.is_empty() {
        return Err("there is no CPU that can be taken off line".to_string());
    }
    let first = sys::cpus()[0];
    let busy = sys::fork(|| {
        loop {
            let spin = sys::fork(|| {
                for _ in 0..1000 {
                    sys::yield_now();
                }
                0
            });
            if spin.and_then(|c| c.wait_ok("load")).is_err() {
                return 1;
            }
        }
    })?;
    let mut done = 0;
    let turn = |cpu: usize| -> Result<(), String> {
        set_online(cpu, false)?;
        if sys::pin(cpu).is_ok() {
            return Err(format!("CPU {cpu} is off line and still takes threads"));
        }
        let left: Vec<usize> = std::iter::once(first)
            .chain(all.iter().copied().filter(|&c| c != cpu))
            .collect();
        work_on(&left)?;
        set_online(cpu, true)?;
        work_on(&[cpu])
    };
    let result = (0..rounds).try_for_each(|_| {
        for &cpu in &all {
            turn(cpu)?;
            done += 1;
        }
        Ok::<(), String>(())
    });
    busy.kill(libc::SIGKILL);
    busy.wait();
    result.map(|()| done)
}

/// What CPUID leaf 0x40000000 says, as hypervisors name themselves there.
pub fn hypervisor() -> String {
    let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
    let bytes: Vec<u8> = [leaf.ebx, leaf.ecx, leaf.edx]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
