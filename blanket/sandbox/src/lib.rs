#![doc = include_str!("../README.md")]

mod calls;
pub mod cgroup;
pub mod user;

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus,
};
pub use rustix::thread::CapabilitySet;
use rustix::thread::{CapabilitySets, UnshareFlags};
pub use user::User;

/// What a process may still do.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Files, or directories with all below, that it reads.
    pub read: Vec<PathBuf>,
    /// Files and devices that it reads and writes, or directories of such.
    pub write: Vec<PathBuf>,
    /// Directories in which it makes, writes and removes files and sockets.
    pub manage: Vec<PathBuf>,
    /// Directories in which it makes sockets, and removes what is there; it reads and writes
    /// no file in them.
    pub sockets: Vec<PathBuf>,
    /// Capabilities that it keeps, if it has them.
    pub keep: CapabilitySet,
    /// More of them, which it keeps where Landlock holds, that bounds them to the files above.
    pub keep_for_files: CapabilitySet,
    /// The user that it becomes, with the group of the same name and no other; it must be
    /// root for that. `None`: it stays who it is.
    pub user: Option<User>,
}

/// Which layers hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What holds, in a word each.
    pub layers: Vec<&'static str>,
    /// What does not, with the reason.
    pub missing: Vec<String>,
}

/// Why the box could not be closed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A step that the kernel has, and refused.
    #[error("cannot confine the VM's process: {what}: {source}; --no-sandbox runs it without")]
    Refused {
        /// The step.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A path of the policy.
    #[error("cannot confine the VM's process: {}: {source}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// Why it cannot be named in a rule.
        source: landlock::PathFdError,
    },
}

/// The newest version of Landlock whose rights are asked for; older kernels enforce what
/// they know.
const LANDLOCK: ABI = ABI::V5;

/// Closes the box around this process for good. It must have one thread.
///
/// # Errors
/// A layer that the kernel has could not be put in force: the process must not go on.
pub fn enter(policy: &Policy) -> Result<Report, Error> {
    let mut report = Report::default();
    let refused = |what| {
        move |error: rustix::io::Errno| Error::Refused {
            what,
            source: error.into(),
        }
    };
    if rustix::process::geteuid().is_root() {
        // Taps and sockets that are open stay what they are.
        let spaces = UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWNET;
        // SAFETY: none of these namespaces is about memory or descriptors.
        match unsafe { rustix::thread::unshare_unsafe(spaces) } {
            Ok(()) => report.layers.push("namespaces"),
            Err(error) => report.missing.push(format!("namespaces: {error}")),
        }
    }
    rustix::thread::set_no_new_privs(true).map_err(refused("no_new_privs"))?;
    report.layers.push("no-new-privileges");
    // Before the user changes, who may not be able to come to all that is named.
    let mut keep = policy.keep;
    match restrict_files(policy)? {
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => {
            report.layers.push("landlock");
            keep |= policy.keep_for_files;
        }
        RulesetStatus::NotEnforced => report
            .missing
            .push("landlock: this kernel does not have it, or it is not in its lsm= list".into()),
    }
    drop_capabilities(keep, policy.user).map_err(refused("capabilities"))?;
    report.layers.push("capabilities");
    if policy.user.is_some() {
        report.layers.push("user");
    }
    restrict_calls()?;
    report.layers.push("seccomp");
    Ok(report)
}

fn drop_capabilities(keep: CapabilitySet, user: Option<User>) -> Result<(), rustix::io::Errno> {
    let now = rustix::thread::capabilities(None)?;
    for capability in CapabilitySet::all() {
        // A process without CAP_SETPCAP has no bounding set to change, and nothing to gain
        // from it: no_new_privs is set.
        if !keep.contains(capability)
            && rustix::thread::remove_capability_from_bounding_set(capability).is_err()
        {
            break;
        }
    }
    rustix::thread::clear_ambient_capability_set().or_else(|error| match error {
        rustix::io::Errno::INVAL => Ok(()),
        other => Err(other),
    })?;
    if let Some(user) = user {
        // Of this thread; threads that are there already lose all.
        rustix::thread::set_keep_capabilities(true)?;
        user.enter()?;
        rustix::thread::set_keep_capabilities(false)?;
    }
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: now.effective & keep,
            permitted: now.permitted & keep,
            inheritable: CapabilitySet::empty(),
        },
    )
}

fn restrict_files(policy: &Policy) -> Result<RulesetStatus, Error> {
    let all = AccessFs::from_all(LANDLOCK);
    let refused = |error: landlock::RulesetError| Error::Refused {
        what: "landlock",
        source: io::Error::other(error),
    };
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)
        .map_err(refused)?
        .create()
        .map_err(refused)?;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let write = read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
    let manage =
        write | AccessFs::MakeReg | AccessFs::MakeSock | AccessFs::RemoveFile | AccessFs::Refer;
    for (paths, rights) in [
        (&policy.read, read),
        (&policy.write, write),
        (&policy.manage, manage),
        (&policy.sockets, AccessFs::MakeSock | AccessFs::RemoveFile),
    ] {
        for path in paths {
            let Some(rule) = rule(path, rights)? else {
                continue;
            };
            rules = rules.add_rule(rule).map_err(refused)?;
        }
    }
    Ok(rules.restrict_self().map_err(refused)?.ruleset)
}

/// A rule for a path; none if there is nothing there.
fn rule(path: &Path, rights: BitFlags<AccessFs>) -> Result<Option<PathBeneath<PathFd>>, Error> {
    let rights = if path.is_dir() {
        rights
    } else {
        rights & AccessFs::from_file(LANDLOCK)
    };
    if !path.exists() {
        return Ok(None);
    }
    let fd = PathFd::new(path).map_err(|source| Error::Path {
        path: path.to_owned(),
        source,
    })?;
    Ok(Some(PathBeneath::new(fd, rights)))
}

fn restrict_calls() -> Result<(), Error> {
    let refused = |error: String| Error::Refused {
        what: "seccomp",
        source: io::Error::other(error),
    };
    for filter in calls::filters().map_err(refused)? {
        seccompiler::apply_filter_all_threads(&filter)
            .map_err(|error| refused(error.to_string()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
