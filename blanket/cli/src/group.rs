//! The control group of a VM's process: its limits of memory, CPU and threads.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use blanket_abi::PAGE_SIZE;
use blanket_abi::layout::added_later;
use blanket_sandbox::cgroup::{self, Group, Limits};
use serde::{Deserialize, Serialize};

use crate::args::Run;
use crate::exit::hint;

/// Threads and processes that a VM may have, unless it is said otherwise.
const PIDS: u64 = 1024;
/// How long systemd may take to make a scope.
const PATIENCE: Duration = Duration::from_secs(20);
/// There is systemd if this is (sd_booted(3)).
const SYSTEMD: &str = "/run/systemd/system";

/// What to do where systemd makes no scope, or one without limits.
const NEXT_OF_SYSTEMD: &str = "leave the limits out, or give --cgroup a group of yours; users other \
than root need a login session with a bus of theirs (Debian: apt install dbus-user-session, and \
log in again)";

/// What `--cgroup` is.
pub const HELP: &str = "\
Which control group (version 2) the VM's process is moved into, so that what it uses has limits. `auto`: where \
systemd runs, a scope of its own; else a group that is made below the one that `blanket` was started in; if neither \
can be, none, unless a limit was asked for. `none`: it stays in the group that it was started in. PATH: a group that \
is made below that one, a directory as /sys/fs/cgroup/vms, which must be without processes. It is removed when the \
VM has ended (docs/confinement.md).";

/// Where a VM's group is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// Where it can be.
    #[default]
    Auto,
    /// Nowhere.
    None,
    /// Below this one.
    Below(PathBuf),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            path if path.starts_with('/') => Ok(Self::Below(path.into())),
            _ => Err("one of auto, none, and the absolute path of a control group".into()),
        }
    }
}

/// Which limits a VM's process has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limited {
    /// The directory of its control group, if it has one of its own.
    pub cgroup: Option<PathBuf>,
    /// Memory, bytes.
    pub memory_max_bytes: Option<u64>,
    /// CPU time, per cent of one CPU.
    pub cpu_max_percent: Option<u32>,
    /// Threads and processes.
    pub pids_max: Option<u64>,
    /// Why it has no group of its own, or not all of its limits.
    pub unlimited: Option<String>,
}

/// The group that is made.
pub enum Place {
    /// None.
    Nowhere(String),
    /// A directory of ours.
    Group(Group),
    /// A scope of systemd's, to be made by it.
    Scope(String, Limits),
}

/// What a VM may use beside its memory, bytes: shadow tables with their records, which may be as
/// many pages as the module allows unless the user says (docs/module-abi.md#memory), the tables
/// of its memory, its process with disks' and networks' buffers, and passt.
fn beside(memory: u64, cpus: u32, shadow: Option<u64>) -> u64 {
    let shadow = shadow.unwrap_or((4 << 20) + memory / 16);
    (64 << 20) + u64::from(cpus) * (1 << 20) + shadow / 2 * 3 + memory / 256
}

/// Tables for the numbers of frames that the guest may add above its RAM, bytes.
fn numbers(memory: u64, most: u64) -> u64 {
    let frames = most / PAGE_SIZE;
    let (_, end) = added_later(memory / PAGE_SIZE, frames);
    32 * (end - frames)
}

/// The limits that were asked for, or that a VM has anyhow.
fn limits(run: &Run) -> Limits {
    // As much as it may ever be given.
    let memory = run.max_memory.unwrap_or(run.memory);
    let most = memory
        .saturating_add(beside(memory, run.cpus, run.shadow_memory))
        .saturating_add(numbers(run.memory, memory));
    Limits {
        memory: Some(run.memory_max.unwrap_or(most)),
        cpu: run.cpu_max,
        pids: Some(run.pids_max.unwrap_or(PIDS)),
    }
}

/// Whether a limit was asked for, without which the VM must not run.
fn asked(run: &Run) -> bool {
    run.memory_max.is_some() || run.cpu_max.is_some() || run.pids_max.is_some()
}

/// Chooses where the VM `name` is limited, and makes its group.
pub fn prepare(run: &Run, name: &str) -> Result<Place> {
    let limits = limits(run);
    // A name that is never somebody else's.
    let unit = format!("blanket-{name}-{}", std::process::id());
    match &run.cgroup {
        Choice::None => Ok(Place::Nowhere("--cgroup none".into())),
        Choice::Below(parent) => {
            let group = Group::make(parent, &unit, &limits).map_err(|error| next(error, run))?;
            Ok(Place::Group(group))
        }
        Choice::Auto => {
            if Path::new(SYSTEMD).exists() {
                return Ok(Place::Scope(format!("{unit}.scope"), limits));
            }
            let made = cgroup::current().and_then(|parent| {
                clear_old(&parent);
                Group::make(&parent, &unit, &limits)
            });
            match made {
                Ok(group) => Ok(Place::Group(group)),
                Err(error) if asked(run) => Err(next(error, run)),
                Err(error) => Ok(Place::Nowhere(error.to_string())),
            }
        }
    }
}

impl Place {
    /// The directory that somebody has to remove when the VM has ended.
    pub fn left(&self) -> Option<PathBuf> {
        match self {
            Self::Group(group) => Some(group.path().to_owned()),
            Self::Nowhere(_) | Self::Scope(..) => None,
        }
    }

    /// Moves this process there.
    pub fn enter(self, run: &Run) -> Result<Limited> {
        match self {
            Self::Nowhere(why) => Ok(unlimited(why)),
            Self::Group(group) => {
                group.enter()?;
                Ok(limited(group.path().to_owned()))
            }
            Self::Scope(unit, limits) => {
                let found = scope(&unit, &limits).map(limited);
                let missing = match &found {
                    Ok(limited) => limited.lacking(&limits),
                    Err(error) => Some(format!("{error:#}")),
                };
                match missing {
                    Some(why) if asked(run) => Err(hint(&anyhow!(why), NEXT_OF_SYSTEMD)),
                    Some(why) => Ok(Limited {
                        unlimited: Some(told(why)),
                        ..found.unwrap_or_default()
                    }),
                    None => found,
                }
            }
        }
    }
}

impl Limited {
    /// What systemd left out of what it was asked for: a manager has the controllers that it
    /// was given.
    fn lacking(&self, asked: &Limits) -> Option<String> {
        let got = Limits {
            memory: self.memory_max_bytes,
            cpu: self.cpu_max_percent,
            pids: self.pids_max,
        };
        let controller = cgroup::lacking(asked, &got)?;
        let scope = self.cgroup.as_deref().unwrap_or(Path::new("")).display();
        Some(format!("systemd gave {scope} no limit of {controller}"))
    }
}

/// The limits of a group that this process is in.
fn limited(path: PathBuf) -> Limited {
    let limits = cgroup::limits(&path);
    Limited {
        cgroup: Some(path),
        memory_max_bytes: limits.memory,
        cpu_max_percent: limits.cpu,
        pids_max: limits.pids,
        unlimited: None,
    }
}

fn unlimited(why: String) -> Limited {
    Limited {
        unlimited: Some(told(why)),
        ..Limited::default()
    }
}

fn told(why: String) -> String {
    tracing::info!("the VM has not all limits: {why}");
    why
}

/// Whether VMs that are started as this process was can have limits, and by what.
pub fn outlook() -> Result<String, String> {
    if Path::new(SYSTEMD).exists() {
        return bus().map(|()| "VMs get scopes of systemd's".into());
    }
    let all = Limits {
        memory: Some(0),
        cpu: Some(1),
        pids: Some(1),
    };
    let found = cgroup::current().and_then(|group| {
        cgroup::available(&group, &all)?;
        Ok(group)
    });
    match found {
        Ok(group) if rustix::fs::access(&group, rustix::fs::Access::WRITE_OK).is_ok() => {
            Ok(format!("VMs get control groups below {}", group.display()))
        }
        Ok(group) => Err(format!("{} may not be written", group.display())),
        Err(error) => Err(error.to_string()),
    }
}

/// Whether `busctl` can find this user's manager.
fn bus() -> Result<(), String> {
    let socket = if rustix::process::geteuid().is_root() {
        PathBuf::from("/run/dbus/system_bus_socket")
    } else if std::env::var_os("DBUS_SESSION_BUS_ADDRESS").is_some() {
        return Ok(());
    } else if let Some(directory) = std::env::var_os("XDG_RUNTIME_DIR") {
        Path::new(&directory).join("bus")
    } else {
        return Err(
            "systemd makes scopes only for who has a bus, and XDG_RUNTIME_DIR is not set".into(),
        );
    };
    if socket.exists() {
        Ok(())
    } else {
        let socket = socket.display();
        Err(format!(
            "systemd makes scopes only for who has a bus, and there is no {socket}"
        ))
    }
}

fn next(error: cgroup::Error, run: &Run) -> anyhow::Error {
    let next = match (&error, &run.cgroup) {
        (cgroup::Error::NotMounted, _) => {
            "as root: mkdir -p /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup"
        }
        (_, Choice::Below(_)) => {
            "name a control group of version 2 that is yours and has no processes, \
             or leave --cgroup out"
        }
        _ => "leave the limits out, or give --cgroup a group that is yours and has no processes",
    };
    hint(&anyhow::Error::new(error), next)
}

/// Removes groups of VMs that ended while nobody could clear away after them.
fn clear_old(parent: &Path) {
    let entries = std::fs::read_dir(parent).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let process = name
            .to_str()
            .and_then(|name| name.strip_prefix("blanket-")?.rsplit_once('-'))
            .and_then(|(_, process)| process.parse::<u32>().ok());
        if process.is_some_and(|process| !Path::new(&format!("/proc/{process}")).exists()) {
            // The kernel refuses it for one that is in use.
            let _ = std::fs::remove_dir(entry.path());
        }
    }
}

/// The arguments by which `busctl` has systemd make a scope of a process
/// (org.freedesktop.systemd1(5), `StartTransientUnit`).
fn call(unit: &str, process: u32, limits: &Limits) -> Vec<String> {
    let mut properties = vec![
        ["PIDs", "au"].map(str::to_owned).to_vec(),
        ["CollectMode", "s", "inactive-or-failed"]
            .map(str::to_owned)
            .to_vec(),
    ];
    properties[0].extend(["1".into(), process.to_string()]);
    let mut number = |name: &str, value: Option<u64>| {
        if let Some(value) = value {
            properties.push(vec![name.into(), "t".into(), value.to_string()]);
        }
    };
    number("MemoryMax", limits.memory);
    number("TasksMax", limits.pids);
    // Microseconds of each second.
    number(
        "CPUQuotaPerSecUSec",
        limits.cpu.map(|percent| u64::from(percent) * 10_000),
    );
    let mut all: Vec<String> = [
        "--quiet",
        "call",
        "org.freedesktop.systemd1",
        "/org/freedesktop/systemd1",
        "org.freedesktop.systemd1.Manager",
        "StartTransientUnit",
        "ssa(sv)a(sa(sv))",
        unit,
        "fail",
    ]
    .map(str::to_owned)
    .to_vec();
    all.push(properties.len().to_string());
    all.extend(properties.into_iter().flatten());
    // No other units.
    all.push("0".into());
    all
}

/// Has systemd make a scope of this process; its directory.
fn scope(unit: &str, limits: &Limits) -> Result<PathBuf> {
    let before = cgroup::current()?;
    let manager = if rustix::process::geteuid().is_root() {
        "--system"
    } else {
        "--user"
    };
    let done = Command::new("busctl")
        .arg(manager)
        .args(call(unit, std::process::id(), limits))
        .output()
        .context("cannot start busctl, by which systemd is asked for a scope")?;
    if !done.status.success() {
        bail!(
            "systemd makes no scope for the VM: {}",
            String::from_utf8_lossy(&done.stderr).trim()
        );
    }
    // It answers before it has done so, and there is nothing to wait for but the move itself.
    let until = Instant::now() + PATIENCE;
    loop {
        let now = cgroup::current()?;
        if now != before && now.ends_with(unit) {
            // Scopes have OOMPolicy= only since systemd 253.
            if limits.memory.is_some()
                && let Err(error) = cgroup::end_as_one(&now)
            {
                tracing::info!("{error}");
            }
            return Ok(now);
        }
        if Instant::now() > until {
            return Err(anyhow!("systemd has not made the scope {unit} in time"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Arguments, Command};

    #[test]
    fn choices() {
        assert_eq!("auto".parse(), Ok(Choice::Auto));
        assert_eq!("none".parse(), Ok(Choice::None));
        assert_eq!("/a/b".parse(), Ok(Choice::Below("/a/b".into())));
        assert!("a/b".parse::<Choice>().is_err());
    }

    #[test]
    fn what_a_vm_may_use_beside_its_memory() {
        let mib = |bytes: u64| bytes >> 20;
        assert_eq!(mib(beside(256 << 20, 1, None)), 64 + 1 + 30 + 1);
        assert_eq!(mib(beside(256 << 20, 4, Some(8 << 20))), 64 + 4 + 12 + 1);
    }

    #[test]
    fn a_vm_that_may_grow_has_room_for_it() {
        let limit = |more: &[&str]| {
            let words = ["blanket", "run", "--kernel", "k", "--memory", "256M"];
            let cli = Arguments::try_parse_from(words.iter().chain(more)).expect("arguments");
            let Command::Run(run) = cli.command else {
                panic!("not run");
            };
            limits(&run).memory.expect("a limit")
        };
        assert_eq!(limit(&[]), (256 << 20) + beside(256 << 20, 1, None));
        // The guest may add six sections of 128 MiB.
        let largest = (1 << 30) + beside(1 << 30, 1, None) + (6 << 20);
        assert_eq!(limit(&["--max-memory", "1G"]), largest);
        assert_eq!(limit(&["--memory-max", "300M"]), 300 << 20);
    }

    #[test]
    fn what_systemd_is_asked_for() {
        let limits = Limits {
            memory: Some(1 << 20),
            cpu: Some(150),
            pids: Some(9),
        };
        let text = call("blanket-a-7.scope", 7, &limits).join(" ");
        assert!(
            text.ends_with(
                "blanket-a-7.scope fail 5 PIDs au 1 7 CollectMode s inactive-or-failed \
                 MemoryMax t 1048576 TasksMax t 9 CPUQuotaPerSecUSec t 1500000 0"
            ),
            "{text}"
        );
        let none = call("x.scope", 7, &Limits::default()).join(" ");
        assert!(
            none.ends_with("fail 2 PIDs au 1 7 CollectMode s inactive-or-failed 0"),
            "{none}"
        );
    }

    #[test]
    fn what_systemd_left_out_is_named() {
        let asked = Limits {
            memory: Some(1 << 20),
            cpu: Some(50),
            pids: Some(9),
        };
        let mut got = Limited {
            cgroup: Some("/sys/fs/cgroup/a.scope".into()),
            memory_max_bytes: asked.memory,
            cpu_max_percent: asked.cpu,
            pids_max: asked.pids,
            unlimited: None,
        };
        assert_eq!(got.lacking(&asked), None);
        got.cpu_max_percent = None;
        let why = got.lacking(&asked).expect("no CPU time");
        assert_eq!(why, "systemd gave /sys/fs/cgroup/a.scope no limit of cpu");
    }

    #[test]
    fn groups_of_processes_that_are_gone() {
        let parent = tempfile::tempdir().expect("a directory");
        let own = format!("blanket-vm-{}", std::process::id());
        for name in [
            &*own,
            "blanket-vm-1-4294967295",
            "blanket-vm",
            "other-4294967295",
        ] {
            std::fs::create_dir(parent.path().join(name)).expect("made");
        }
        clear_old(parent.path());
        assert!(!parent.path().join("blanket-vm-1-4294967295").exists());
        assert_eq!(std::fs::read_dir(parent.path()).expect("there").count(), 3);
    }
}
