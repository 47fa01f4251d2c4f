//! `blanket run`.

use std::fs::File;
use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use blanket_vmm::builder::EXTRA_MEM_RATIO;
use blanket_vmm::console::{Console, IoThread, Sink};
use blanket_vmm::device::Error as DeviceError;
use blanket_vmm::hypervisor::Isolation;
use blanket_vmm::instance::{Instance, OnReboot, Spec};
use blanket_vmm::migration::{Incoming, UserFaults};
use blanket_vmm::vm::End;
use serde::Serialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::args::{self, Run};
use crate::disk::DiskSpec;
use crate::exit::{self, hint};
use crate::registry::{Entry, Registry};
use crate::setting::Setting;
use crate::stats::Stats;
use crate::{confine, control, crash, host, limits, migrate, saved};

/// Set in the environment of the process that `--detach` leaves behind.
const DETACHED: &str = "BLANKET_DETACHED";
/// How long a guest has to power off after a signal.
const SIGNAL_PATIENCE: Duration = Duration::from_secs(15);

/// How often a Linux guest has its --memory at most.
const LINUX_GROWS: u64 = 1 + EXTRA_MEM_RATIO;

/// The first signal that asked us to end, or 0.
static SIGNAL: AtomicI32 = AtomicI32::new(0);

/// Whether this is the process that `--detach` leaves behind.
fn detached() -> bool {
    std::env::var_os(DETACHED).is_some()
}

/// Runs a VM to its end.
pub fn command(run: &mut Run) -> Result<ExitCode> {
    let saved = saved::open(run)?;
    let run = &*run;
    let detached = detached();
    if run.detach && !detached {
        return detach(run);
    }
    if let Some(kernel) = &run.kernel {
        readable("kernel", kernel)?;
    }
    if let Some(initrd) = &run.initrd {
        readable("initrd", initrd)?;
    }
    let hypervisor = host::open(run.host)?;
    for warning in limits::warnings(Path::new("/"), run.memory) {
        tracing::warn!("{warning}");
    }
    if run
        .max_memory
        .is_some_and(|most| most > LINUX_GROWS.saturating_mul(run.memory))
    {
        tracing::warn!(
            "Linux up to 6.9 takes at most {LINUX_GROWS} times the memory that it starts \
             with, and leaves the rest of --max-memory alone"
        );
    }
    let registry = Registry::open()?;
    let (entry, listener) = registry.claim(run.name.as_deref())?;
    let mut setting = Setting::new(run, detached, &registry, &entry)?;

    let spec = Spec {
        name: entry.name.clone(),
        kernel: run.kernel.clone(),
        initrd: run.initrd.clone(),
        opened: setting.files.clone(),
        memory: run.memory,
        max_memory: run.max_memory,
        balloon: run.balloon,
        vcpus: run.cpus,
        cpu: run.cpu.clone(),
        boot_entry: run.boot_entry.clone(),
        cmdline: run.cmdline.clone(),
        on_reboot: match run.on_reboot {
            args::OnReboot::Restart => OnReboot::Restart,
            args::OnReboot::Exit => OnReboot::Exit,
        },
        verbose: run.verbose_core,
        mergeable: run.mergeable,
        trace: run.trace,
        inject: run.inject,
        uuid: run
            .uuid
            .clone()
            .or_else(|| saved.as_ref().map(|(machine, _)| machine.uuid.clone())),
        pool_limit: run.shadow_memory.map_or(0, |bytes| bytes.div_ceil(4096)),
        isolation: match run.isolate {
            args::Isolate::Auto => Isolation::Auto,
            args::Isolate::On => Isolation::On,
            args::Isolate::Off => Isolation::Off,
        },
    };
    let console = Console::new().context("cannot make a console")?;
    let vcpus = spec.vcpus;
    let instance = Instance::new(spec, hypervisor, console)?;
    let disks: Vec<&DiskSpec> = run.image.iter().chain(&run.disk).collect();
    for (index, disk) in (0..).zip(&disks) {
        instance.attach(disk.open(index, vcpus)?)?;
    }
    if let Some(cloud_init) = &run.cloud_init {
        let index = u32::try_from(disks.len()).unwrap_or(u32::MAX);
        instance.attach(cloud_init.disk(index, &entry.name, vcpus)?)?;
    }
    for (index, net) in (0..).zip(&run.net) {
        instance.attach(net.open(index, &entry.name, vcpus)?)?;
    }
    let kept_at = registry.crash(&entry.name);
    let report = setting.crash.take();
    let origin = match (saved, migrate::incoming(run)?) {
        (Some((_, file)), _) => {
            // While this process may.
            let faults = run.lazy.then(UserFaults::open).transpose();
            let faults = faults.map_err(|why| {
                let error = anyhow!("its memory cannot stay in its file: {why}");
                hint(&error, "or leave --lazy away")
            })?;
            Origin::Saved(file, faults)
        }
        (None, Some(incoming)) => Origin::Elsewhere(incoming),
        (None, None) => Origin::Boot,
    };
    let end = live(
        run,
        &registry,
        (entry, listener),
        &instance,
        setting,
        origin,
    )?;
    let counters = instance.stats().ok().flatten();
    let kept = match crash::keep(&kept_at, report, &instance, &end) {
        Ok(kept) => kept,
        Err(error) => {
            tracing::error!("{error:#}");
            None
        }
    };
    Ok(finish(
        run,
        &instance,
        &end,
        counters.map(Stats::from),
        kept,
    ))
}

/// How a VM begins.
enum Origin {
    /// By its kernel.
    Boot,
    /// Where it was when it was saved; what its memory comes by that stays in the file.
    Saved(File, Option<UserFaults>),
    /// Where it is on another host.
    Elsewhere(Incoming),
}

/// From the first boot to the end.
fn live(
    run: &Run,
    registry: &Registry,
    (entry, listener): (Entry, UnixListener),
    instance: &Arc<Instance>,
    setting: Setting,
    origin: Origin,
) -> Result<End> {
    let confinement = setting.confinement(run);
    let Setting {
        sink,
        place,
        log,
        user,
        ..
    } = setting;
    // Nobody else gets its user before this process has ended.
    let user = user.map(|claim| std::mem::ManuallyDrop::new(claim).user);
    // While this process has one thread, and before a guest runs.
    confine::enter(run, registry, &sink, user)?;
    let incoming = match &origin {
        Origin::Elsewhere(incoming) => Some(incoming.address().context("its address")?),
        Origin::Boot | Origin::Saved(..) => None,
    };
    let killer = Arc::clone(instance);
    let io = IoThread::start_at(
        Arc::clone(instance.console()),
        place,
        Box::new(move || killer.kill()),
    )?;
    let place = match (&sink, io.pty()) {
        (_, Some(path)) => path.display().to_string(),
        (Sink::File(path) | Sink::Socket(path), _) => path.display().to_string(),
        (Sink::Stdio, _) => "stdio".into(),
        (Sink::Pty | Sink::None, _) => "none".into(),
    };
    // Before the boot, which takes a while: whoever finds the VM can ask and kill it.
    let unanswered = control::serve(
        listener,
        Arc::clone(instance),
        control::About {
            name: entry.name.clone(),
            console: place.clone(),
            incoming,
            socket: registry.socket(&entry.name),
            confinement,
        },
    )?;
    watch_signals(instance)?;
    // It may wait for long: whoever started it in the background does not.
    let mut log = log;
    if matches!(origin, Origin::Elsewhere(_))
        && let Some(log) = log.take()
    {
        become_background(&log, &entry, &place, instance.host())?;
    }
    let waited = matches!(origin, Origin::Elsewhere(_)) && detached();
    let vm = match origin {
        Origin::Boot => instance.boot().map_err(boot_hint)?,
        Origin::Saved(file, None) => instance.resume(BufReader::new(file))?,
        Origin::Saved(file, Some(faults)) => instance.resume_lazily(file, faults)?,
        Origin::Elsewhere(incoming) => instance.receive_from(incoming)?,
    };

    if let Some(log) = log {
        become_background(&log, &entry, &place, instance.host())?;
    } else if !waited {
        if !run.json {
            let on = host::sentence(instance.host());
            eprintln!("blanket: {} runs {on}", entry.name);
        }
        if let Some(path) = io.pty() {
            eprintln!("console: {}", path.display());
        }
    }
    let end = instance.run(vm);
    unanswered.settle();
    // Its last output first, then whatever there is to say about the end.
    io.finish();
    drop(entry);
    Ok(end?)
}

/// Says how it ended.
fn finish(
    run: &Run,
    instance: &Instance,
    end: &End,
    stats: Option<Stats>,
    report: Option<PathBuf>,
) -> ExitCode {
    #[derive(Serialize)]
    struct Summary<'a> {
        name: &'a str,
        host: &'a str,
        end: &'a str,
        exit_code: u8,
        detail: Option<String>,
        /// File with the report of a crash.
        #[serde(skip_serializing_if = "Option::is_none")]
        report: Option<PathBuf>,
        boots: u32,
        seconds: f64,
        #[serde(skip_serializing_if = "Option::is_none")]
        stats: Option<Stats>,
    }
    let signal = SIGNAL.load(Ordering::Acquire);
    let exit_code = match u8::try_from(signal) {
        Ok(signal @ 1..) => 128 | signal,
        _ => exit::code(end),
    };
    let core = instance.core_build_id();
    let detail = exit::sentence(end).map(|text| crash::named(&text, &core));
    if run.json {
        let summary = Summary {
            name: &instance.spec().name,
            host: instance.host(),
            end: exit::word(end),
            exit_code,
            detail,
            report,
            boots: instance.boots(),
            seconds: instance.uptime().as_secs_f64(),
            stats: stats.filter(|_| run.stats_on_exit),
        };
        match serde_json::to_string(&summary) {
            Ok(line) => eprintln!("{line}"),
            Err(error) => tracing::error!(%error, "the summary is lost"),
        }
    } else {
        if let Some(detail) = detail {
            eprintln!("blanket: {}: {detail}", instance.spec().name);
        }
        if let Some(report) = report {
            eprintln!("  the whole report is in {}", report.display());
        }
        if let Some(stats) = stats.filter(|_| run.stats_on_exit) {
            eprint!("{stats}");
        }
    }
    ExitCode::from(exit_code)
}

/// A file that cannot be read is better named before anything is started.
fn readable(what: &str, path: &std::path::Path) -> Result<()> {
    let Err(error) = File::open(path) else {
        return Ok(());
    };
    let next = match error.kind() {
        ErrorKind::NotFound => format!("give the path of a file that exists with --{what}"),
        ErrorKind::PermissionDenied => {
            format!("sudo chmod +r {}, or run blanket as root", path.display())
        }
        _ => return Err(error).with_context(|| format!("{what} {}", path.display())),
    };
    let error = anyhow::Error::new(error).context(format!("{what} {}", path.display()));
    Err(exit::hint(&error, next))
}

/// The first signal asks the guest to power off, the second one ends the VM.
fn watch_signals(instance: &Arc<Instance>) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot watch signals")?;
    let instance = Arc::clone(instance);
    blanket_vmm::thread::named("signals")
        .spawn(move || {
            for signal in signals.forever() {
                let first = SIGNAL.compare_exchange(0, signal, Ordering::AcqRel, Ordering::Acquire);
                if first.is_err() {
                    instance.kill();
                    continue;
                }
                tracing::info!(signal, "asking the guest to power off");
                let instance = Arc::clone(&instance);
                let stopper = blanket_vmm::thread::named("stop").spawn(move || {
                    if let Err(error) = instance.stop(SIGNAL_PATIENCE) {
                        tracing::info!("{error}; killing it");
                        instance.kill();
                    }
                });
                if let Err(error) = stopper {
                    tracing::warn!(%error, "cannot wait for the guest");
                }
            }
        })
        .context("cannot start the signal thread")?;
    Ok(())
}

/// Starts this program again in the background and waits until its VM runs.
fn detach(run: &Run) -> Result<ExitCode> {
    if run.console == Some(Sink::Stdio) {
        bail!("--console stdio and --detach exclude each other");
    }
    let mut child = Command::new(std::env::current_exe().context("cannot find this program")?)
        .args(std::env::args_os().skip(1))
        .env(DETACHED, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the VM's process")?;
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        BufReader::new(stdout)
            .read_line(&mut line)
            .context("the VM's process does not answer")?;
    }
    if line.is_empty() {
        // It has said why on standard error, which is ours.
        let status = child.wait().context("the VM's process is lost")?;
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        return Ok(ExitCode::from(
            code.filter(|code| *code != 0).unwrap_or(exit::FAILURE),
        ));
    }
    let started: Started = serde_json::from_str(&line).context("the VM's process")?;
    if run.json {
        exit::output(&line)?;
    } else {
        exit::output(&format!("{}\n", started.name))?;
        if started.console != "none" {
            eprintln!("console: {}", started.console);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What the process in the background says once its VM runs.
#[derive(Serialize, serde::Deserialize)]
struct Started {
    name: String,
    pid: u32,
    console: String,
    host: String,
}

/// Leaves the terminal of the process that started us.
fn become_background(log: &File, entry: &Entry, console: &str, host: &str) -> Result<()> {
    // Fails only for a leader of a process group, who has no terminal to leave.
    let _ = rustix::process::setsid();
    let null = File::options()
        .write(true)
        .open("/dev/null")
        .context("cannot open /dev/null")?;
    let started = Started {
        name: entry.name.clone(),
        pid: std::process::id(),
        console: console.to_owned(),
        host: host.to_owned(),
    };
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{}", serde_json::to_string(&started)?)?;
    stdout.flush()?;
    rustix::stdio::dup2_stdout(null.as_fd())?;
    rustix::stdio::dup2_stderr(log.as_fd())?;
    Ok(())
}

fn boot_hint(error: blanket_vmm::instance::Error) -> anyhow::Error {
    match error {
        blanket_vmm::instance::Error::Device(
            error @ (DeviceError::NoMemory(_) | DeviceError::Quota),
        ) => host::module_hint(error),
        other => other.into(),
    }
}
