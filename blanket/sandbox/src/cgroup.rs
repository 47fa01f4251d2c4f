//! Control groups (`Documentation/admin-guide/cgroup-v2.rst`): the limits of a VM's process
//! and of all that is started for it.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long ended processes may take to leave their group.
const PATIENCE: Timespec = Timespec {
    tv_sec: 10,
    tv_nsec: 0,
};
/// The period of `cpu.max`, microseconds: the kernel's own.
const PERIOD: u64 = 100_000;

/// Limits. What is `None` has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Memory, bytes.
    pub memory: Option<u64>,
    /// CPU time, per cent of one CPU.
    pub cpu: Option<u32>,
    /// Processes and threads.
    pub pids: Option<u64>,
}

/// Why there is no group.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No version 2.
    #[error("no control groups of version 2 are mounted here")]
    NotMounted,
    /// The process is in none that it can see.
    #[error("this process's control group is outside of what it can see")]
    Outside,
    /// A controller that the group above does not give.
    #[error("the control group {} has no {controller} controller to give", group.display())]
    Controller {
        /// The group above.
        group: PathBuf,
        /// Which.
        controller: &'static str,
    },
    /// The rule that processes are in leaves only.
    #[error(
        "the control group {} has processes of its own, so that the kernel lets none below it have limits",
        group.display()
    )]
    Busy {
        /// The group above.
        group: PathBuf,
    },
    /// A file or directory.
    #[error("control group: {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
}

/// Where version 2 is mounted, by a text as `/proc/self/mountinfo` is (proc(5)).
#[must_use]
pub fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        kind.starts_with("cgroup2 ")
            .then(|| mount.split(' ').nth(4).map(PathBuf::from))?
    })
}

/// The group of a process below that, by a text as `/proc/self/cgroup` is (cgroups(7)).
#[must_use]
pub fn own(cgroup: &str) -> Option<PathBuf> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::/"))?;
    (!path.starts_with("..")).then(|| path.into())
}

/// The directory of this process's group.
///
/// # Errors
/// There is none.
pub fn current() -> Result<PathBuf, Error> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mount = mount_point(&read("/proc/self/mountinfo")).ok_or(Error::NotMounted)?;
    let own = own(&read("/proc/self/cgroup")).ok_or(Error::Outside)?;
    Ok(mount.join(own))
}

/// A group that was made here. It stays until [`remove`].
#[derive(Debug, PartialEq, Eq)]
pub struct Group(PathBuf);

impl Group {
    /// Makes the group `name` below `parent`, with limits.
    ///
    /// # Errors
    /// Which step the host refused; nothing is left.
    pub fn make(parent: &Path, name: &str, limits: &Limits) -> Result<Self, Error> {
        available(parent, limits)?;
        give(parent, limits)?;
        let path = parent.join(name);
        fs::create_dir(&path).map_err(at(&path))?;
        let this = Self(path);
        match this.limit(limits) {
            Ok(()) => Ok(this),
            Err(error) => {
                let _ = fs::remove_dir(&this.0);
                Err(error)
            }
        }
    }

    fn limit(&self, limits: &Limits) -> Result<(), Error> {
        let set = |file: &str, value: &dyn fmt::Display| {
            let path = self.0.join(file);
            fs::write(&path, value.to_string()).map_err(at(&path))
        };
        if let Some(bytes) = limits.memory {
            set("memory.max", &bytes)?;
            end_as_one(&self.0)?;
        }
        if let Some(percent) = limits.cpu {
            let quota = u64::from(percent) * PERIOD / 100;
            set("cpu.max", &format_args!("{quota} {PERIOD}"))?;
        }
        if let Some(pids) = limits.pids {
            set("pids.max", &pids)?;
        }
        Ok(())
    }

    /// Moves this process into it.
    ///
    /// # Errors
    /// The host's answer.
    pub fn enter(&self) -> Result<(), Error> {
        add(&self.0, std::process::id())
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

/// Moves a process into a group.
///
/// # Errors
/// The host's answer.
pub fn add(group: &Path, process: u32) -> Result<(), Error> {
    let path = group.join("cgroup.procs");
    fs::write(&path, process.to_string()).map_err(at(&path))
}

/// Has the kernel end all that is in a group when its memory is used up: half a VM is none.
///
/// # Errors
/// The host's answer.
pub fn end_as_one(group: &Path) -> Result<(), Error> {
    let path = group.join("memory.oom.group");
    fs::write(&path, "1").map_err(at(&path))
}

/// The limits that a group has.
#[must_use]
pub fn limits(group: &Path) -> Limits {
    let words = |file: &str| {
        let text = fs::read_to_string(group.join(file)).unwrap_or_default();
        let numbers = text.split_whitespace().map(|word| word.parse().ok());
        numbers.collect::<Vec<Option<u64>>>()
    };
    let first = |file: &str| words(file).first().copied().flatten();
    let cpu = match words("cpu.max")[..] {
        [Some(quota), Some(period @ 1..)] => u32::try_from(quota * 100 / period).ok(),
        _ => None,
    };
    Limits {
        memory: first("memory.max"),
        cpu,
        pids: first("pids.max"),
    }
}

/// Ends what is left in a group, waits until it has ended, and removes the group. One that
/// is not there is no error.
///
/// # Errors
/// The host's answer.
pub fn remove(group: &Path) -> io::Result<()> {
    let gone = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    };
    match fs::remove_dir(group) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
        other => return other.or_else(gone),
    }
    // Linux 5.14 has it; before, what is left must end by itself.
    let _ = fs::write(group.join("cgroup.kill"), "1");
    let mut events = match File::open(group.join("cgroup.events")) {
        Err(error) => return gone(error),
        Ok(events) => events,
    };
    let mut text = String::new();
    loop {
        text.clear();
        events.seek(SeekFrom::Start(0))?;
        events.read_to_string(&mut text)?;
        if text.contains("populated 0") {
            return fs::remove_dir(group).or_else(gone);
        }
        // The kernel says so when it changes.
        let mut fds = [PollFd::from_borrowed_fd(events.as_fd(), PollFlags::PRI)];
        match poll(&mut fds, Some(&PATIENCE)) {
            Ok(0) => return Err(io::ErrorKind::ResourceBusy.into()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The controller of a limit that was asked for and is not there, if there is one.
#[must_use]
pub fn lacking(asked: &Limits, got: &Limits) -> Option<&'static str> {
    controllers(asked).find(|name| !controllers(got).any(|has| has == *name))
}

/// The controllers that limits need.
fn controllers(limits: &Limits) -> impl Iterator<Item = &'static str> {
    let all = [
        ("memory", limits.memory.is_some()),
        ("cpu", limits.cpu.is_some()),
        ("pids", limits.pids.is_some()),
    ];
    all.into_iter()
        .filter_map(|(name, used)| used.then_some(name))
}

/// Whether groups below `parent` could have these limits.
///
/// # Errors
/// Why not.
pub fn available(parent: &Path, limits: &Limits) -> Result<(), Error> {
    let path = parent.join("cgroup.controllers");
    let text = fs::read_to_string(&path).map_err(at(&path))?;
    let missing = controllers(limits).find(|name| !text.split_whitespace().any(|one| one == *name));
    match missing {
        Some(controller) => Err(Error::Controller {
            group: parent.into(),
            controller,
        }),
        None => Ok(()),
    }
}

/// Gives the controllers on to groups below `parent`.
fn give(parent: &Path, limits: &Limits) -> Result<(), Error> {
    let path = parent.join("cgroup.subtree_control");
    let given = fs::read_to_string(&path).map_err(at(&path))?;
    for name in controllers(limits) {
        if given.split_whitespace().any(|one| one == name) {
            continue;
        }
        fs::write(&path, format!("+{name}")).map_err(|source| match source.kind() {
            io::ErrorKind::ResourceBusy => Error::Busy {
                group: parent.into(),
            },
            _ => at(&path)(source),
        })?;
    }
    Ok(())
}

fn at(path: &Path) -> impl Fn(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::File {
        path: path.clone(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_one_is() {
        let mounts = "24 30 0:22 / /proc rw shared:13 - proc proc rw\n\
                      29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(mount_point(mounts), Some("/sys/fs/cgroup".into()));
        let old = "29 23 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        assert_eq!(mount_point(old), None);
        assert_eq!(own("3:cpu:/x\n0::/a/b\n"), Some("a/b".into()));
        assert_eq!(own("0::/\n"), Some("".into()));
        assert_eq!(own("0::/../x\n"), None);
        assert_eq!(own("3:cpu:/x\n"), None);
    }

    /// A directory as the kernel's would be, but that files have to be there already.
    fn hierarchy(controllers: &str) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        for (file, text) in [
            ("cgroup.controllers", controllers),
            ("cgroup.subtree_control", "pids\n"),
        ] {
            fs::write(root.path().join(file), text).expect("written");
        }
        root
    }

    #[test]
    fn a_group_has_its_limits() {
        let root = hierarchy("cpu memory pids\n");
        let limits = Limits {
            memory: Some(300 << 20),
            cpu: Some(150),
            pids: Some(99),
        };
        let group = Group::make(root.path(), "vm", &limits).expect("made");
        let read = |file: &str| fs::read_to_string(group.path().join(file)).expect("there");
        assert_eq!(read("memory.max"), (300 << 20).to_string());
        assert_eq!(read("memory.oom.group"), "1");
        assert_eq!(read("cpu.max"), "150000 100000");
        assert_eq!(read("pids.max"), "99");
        assert_eq!(super::limits(group.path()), limits);
        group.enter().expect("entered");
        assert_eq!(read("cgroup.procs"), std::process::id().to_string());
        let none = Group::make(root.path(), "free", &Limits::default()).expect("made");
        fs::write(none.path().join("memory.max"), "max\n").expect("written");
        fs::write(none.path().join("cpu.max"), "max 100000\n").expect("written");
        assert_eq!(super::limits(none.path()), Limits::default());
    }

    #[test]
    fn a_limit_that_is_not_there() {
        let asked = Limits {
            memory: Some(1),
            cpu: Some(50),
            pids: None,
        };
        assert_eq!(lacking(&asked, &asked), None);
        assert_eq!(lacking(&Limits::default(), &asked), None);
        let got = Limits { cpu: None, ..asked };
        assert_eq!(lacking(&asked, &got), Some("cpu"));
    }

    #[test]
    fn what_is_missing_is_named() {
        let root = hierarchy("cpu pids\n");
        let limits = Limits {
            memory: Some(1),
            ..Limits::default()
        };
        let error = Group::make(root.path(), "vm", &limits).expect_err("no memory");
        assert!(
            error.to_string().contains("no memory controller"),
            "{error}"
        );
        let error = Group::make(Path::new("/no/group"), "vm", &limits).expect_err("no group");
        assert!(error.to_string().contains("/no/group"), "{error}");
        remove(Path::new("/no/group")).expect("nothing to do");
    }
}
