//! The commands that talk to running VMs.

use std::io::{self, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use blanket_vmm::console::RawMode;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::args::Format;
use crate::control::{Answer, Info, Request, ask};
use crate::exit::{self, hint, output, show};
use crate::prometheus;
use crate::registry::Registry;
use crate::table::table;

/// Ctrl-]: detaches.
const ESCAPE: u8 = 0x1d;

/// `blanket ps`.
pub fn ps(json: bool) -> Result<ExitCode> {
    let registry = Registry::open()?;
    let mut found: Vec<Info> = Vec::new();
    for name in registry.names()? {
        // One that ends just now is not an error.
        let Ok(stream) = registry.connect(&name) else {
            continue;
        };
        match ask(&stream, &Request::Info) {
            Ok(Answer::Info(info)) => found.push(*info),
            Ok(_) => {}
            Err(error) => tracing::warn!("{name}: {error:#}"),
        }
    }
    show(&found[..], json, listing)?;
    Ok(ExitCode::SUCCESS)
}

fn listing(found: &[Info]) -> String {
    let header = [
        "NAME", "PID", "HOST", "CPUS", "MEMORY", "UPTIME", "BOOTS", "CONSOLE", "KERNEL",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(found.iter().map(|vm| {
        [
            vm.name.clone(),
            vm.pid.to_string(),
            vm.host.clone(),
            vm.vcpus.to_string(),
            memory(vm),
            duration(vm.uptime_seconds),
            vm.boots.to_string(),
            vm.console.clone(),
            vm.kernel.clone(),
        ]
    }));
    table(&rows)
}

/// The most memory of a VM, behind what its guest has of it if that is less.
fn memory(vm: &Info) -> String {
    let current = vm.balloon.current_bytes;
    let most = vm.balloon.most_bytes.max(vm.memory);
    if current == 0 || current == most {
        format!("{}M", most >> 20)
    } else {
        format!("{}M/{}M", current >> 20, most >> 20)
    }
}

fn duration(seconds: f64) -> String {
    let total = Duration::try_from_secs_f64(seconds)
        .unwrap_or_default()
        .as_secs();
    match (total / 3600, total / 60 % 60, total % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}

/// `blanket stats`.
pub fn stats(name: Option<&str>, format: Format) -> Result<ExitCode> {
    let registry = Registry::open()?;
    let counters = |name: &str| {
        let stream = registry.connect(name)?;
        match ask(&stream, &Request::Stats).with_context(|| name.to_owned())? {
            Answer::Stats(stats) => Ok(*stats),
            _ => bail!("{name} answered something else than counters"),
        }
    };
    let with_info = |name: &str| {
        let stream = registry.connect(name)?;
        match ask(&stream, &Request::Info).with_context(|| name.to_owned())? {
            Answer::Info(info) => Ok((*info, counters(name)?)),
            _ => bail!("{name} answered something else than what it is"),
        }
    };
    match (name, format) {
        (Some(name), Format::Text) => output(&counters(name)?.to_string())?,
        (Some(name), Format::Json) => output(&format!(
            "{}\n",
            serde_json::to_string_pretty(&counters(name)?)?
        ))?,
        (Some(name), Format::Prometheus) => output(&prometheus::text(&[with_info(name)?]))?,
        (None, _) => {
            let mut all = Vec::new();
            for name in registry.names()? {
                // One that is just starting or ending has no counters, and is no error.
                match with_info(&name) {
                    Ok(vm) => all.push(vm),
                    Err(error) => tracing::debug!("{name}: {error:#}"),
                }
            }
            output(&prometheus::text(&all))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// `blanket audit`.
pub fn audit(name: &str, json: bool) -> Result<ExitCode> {
    let stream = Registry::open()?.connect(name)?;
    let Answer::Audit(report) = ask(&stream, &Request::Audit).with_context(|| name.to_owned())?
    else {
        bail!("{name} answered something else than an audit");
    };
    show(&report, json, ToString::to_string)?;
    Ok(if report.broken == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(exit::FAILURE)
    })
}

/// `blanket balloon`.
pub fn balloon(name: &str, size: u64, timeout: Duration, json: bool) -> Result<ExitCode> {
    let stream = Registry::open()?.connect(name)?;
    let request = Request::Balloon {
        bytes: size,
        timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
    };
    let Answer::Balloon(memory) = ask(&stream, &request).with_context(|| name.to_owned())? else {
        bail!("{name} ended before its guest had changed its memory");
    };
    let reached = memory.current_bytes == memory.target_bytes;
    if json {
        output(&format!("{}\n", serde_json::to_string_pretty(&memory)?))?;
    } else {
        let mib = |bytes: u64| bytes >> 20;
        let rest = if reached {
            String::new()
        } else {
            format!(", and is to have {}", mib(memory.target_bytes))
        };
        output(&format!(
            "{name} has {} of {} MiB{rest}\n",
            mib(memory.current_bytes),
            mib(memory.most_bytes)
        ))?;
    }
    if reached {
        return Ok(ExitCode::SUCCESS);
    }
    let error = anyhow!(
        "the guest of {name} has not got there within {} seconds",
        timeout.as_secs()
    );
    let next = if memory.current_bytes == memory.most_bytes {
        "its kernel needs a balloon driver (CONFIG_XEN_BALLOON), and must have booted"
    } else if memory.current_bytes < memory.target_bytes {
        "it goes on by itself; `blanket ps` shows how far it is. A kernel needs a balloon driver \
         (CONFIG_XEN_BALLOON) for it and must have booted. Up to Linux 6.9 it takes no more than 11 times \
         its --memory; later it adds memory, which must come online by itself \
         (CONFIG_XEN_BALLOON_MEMORY_HOTPLUG; /sys/devices/system/memory/auto_online_blocks in the guest)"
    } else {
        "it goes on by itself; `blanket ps` shows how far it is, and a guest that is short of \
         memory cannot give up more"
    };
    Err(hint(&error, next))
}

/// `blanket upgrade`: a VM is bound to the process that made it (`docs/operations.md`
/// says why), so all there is to do is to see whether it runs this program.
pub fn upgrade(name: &str) -> Result<ExitCode> {
    let stream = Registry::open()?.connect(name)?;
    let Answer::Info(info) = ask(&stream, &Request::Info).with_context(|| name.to_owned())? else {
        bail!("{name} answered something else than what it is");
    };
    let program = |process: &str| {
        let path = format!("/proc/{process}/exe");
        let found = std::fs::metadata(&path).with_context(|| format!("cannot look at {path}"))?;
        Ok::<_, anyhow::Error>((found.dev(), found.ino()))
    };
    if program(&info.pid.to_string())? == program("self")? {
        output(&format!("{name} runs this blanket already\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let error = anyhow!(
        "{name} runs another blanket, and goes on with it: a running VM cannot change to a new one"
    );
    let next = format!("when it suits: blanket stop {name}, then start it again");
    Err(hint(&error, next))
}

/// `blanket stop`.
pub fn stop(name: &str, timeout: Duration) -> Result<ExitCode> {
    let stream = Registry::open()?.connect(name)?;
    let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
    // If it is gone before it answers, it has done what it was asked for.
    ask(&stream, &Request::Stop { timeout_ms })
        .with_context(|| format!("{name} was not stopped"))
        .map_err(|error| hint(&error, format!("`blanket kill {name}` ends it at once")))?;
    wait_gone(&stream);
    Ok(ExitCode::SUCCESS)
}

/// `blanket reboot`.
pub fn reboot(name: &str, timeout: Duration) -> Result<ExitCode> {
    let stream = Registry::open()?.connect(name)?;
    let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
    ask(&stream, &Request::Reboot { timeout_ms })
        .with_context(|| format!("{name} was not rebooted"))
        .map_err(|error| hint(&error, "its guest may be hung: `blanket console` tells"))?;
    Ok(ExitCode::SUCCESS)
}

/// `blanket kill`.
pub fn kill(name: &str, waiting: bool) -> Result<ExitCode> {
    let registry = Registry::open()?;
    let stream = registry.connect(name)?;
    let request = if waiting {
        Request::Dismiss
    } else {
        Request::Kill
    };
    ask(&stream, &request).with_context(|| format!("{name} was not killed"))?;
    wait_gone(&stream);
    Ok(ExitCode::SUCCESS)
}

/// Waits until the VM's process, which holds the connection, is gone, so that what
/// the VM held is free again.
pub fn wait_gone(mut stream: &UnixStream) {
    // A connection that breaks says the same as one that ends.
    let _ = io::copy(&mut stream, &mut io::sink());
}

/// `blanket console`.
pub fn console(name: &str) -> Result<ExitCode> {
    let stream = Registry::open()?.connect(name)?;
    ask(&stream, &Request::Console).with_context(|| format!("{name} has no console to give"))?;
    let raw = RawMode::enable().context("cannot use the terminal")?;
    if raw.is_some() {
        eprint!("[attached to {name}; Ctrl-] detaches]\r\n");
    }
    let end = exchange(&stream, raw.is_some());
    drop(raw);
    match end? {
        Left::Detached => eprintln!("\n[detached from {name}]"),
        Left::Ended => eprintln!("\n[{name} has ended]"),
    }
    Ok(ExitCode::SUCCESS)
}

enum Left {
    Detached,
    Ended,
}

fn exchange(stream: &UnixStream, terminal: bool) -> Result<Left> {
    let stdin = io::stdin();
    let mut stdin_open = true;
    let mut bytes = [0; 4096];
    loop {
        let (from_stream, from_stdin) = {
            let mut fds = vec![PollFd::new(stream, PollFlags::IN)];
            if stdin_open {
                fds.push(PollFd::new(&stdin, PollFlags::IN));
            }
            match poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error).context("cannot wait for the console"),
            }
            let ready = |n: usize| fds.get(n).is_some_and(|fd| !fd.revents().is_empty());
            (ready(0), ready(1))
        };
        if from_stream {
            match rustix::io::read(stream, &mut bytes) {
                Ok(0) | Err(Errno::CONNRESET) => return Ok(Left::Ended),
                Ok(count) => {
                    let mut stdout = io::stdout().lock();
                    stdout
                        .write_all(&bytes[..count])
                        .and_then(|()| stdout.flush())?;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("the console is lost"),
            }
        }
        if from_stdin {
            match rustix::io::read(&stdin, &mut bytes) {
                Ok(0) => stdin_open = false,
                Ok(count) => {
                    let typed = &bytes[..count];
                    let end = typed.iter().position(|&b| terminal && b == ESCAPE);
                    let mut writer = stream;
                    if writer.write_all(&typed[..end.unwrap_or(count)]).is_err() {
                        return Ok(Left::Ended);
                    }
                    if end.is_some() {
                        return Ok(Left::Detached);
                    }
                }
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(_) => stdin_open = false,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_aligned() {
        let rows = [["A", "LONG"], ["wide", "b"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "A     LONG\nwide  b\n");
    }

    #[test]
    fn durations_are_short() {
        assert_eq!(duration(5.9), "5s");
        assert_eq!(duration(65.0), "1m05s");
        assert_eq!(duration(7300.0), "2h01m");
        assert_eq!(duration(-1.0), "0s");
    }
}
