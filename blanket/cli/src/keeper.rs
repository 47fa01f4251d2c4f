//! A process beside the VM's, which outlives it and clears away what the VM's own process
//! cannot when it has a user and a control group of its own, or is killed.

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result};
use blanket_sandbox::{cgroup, user};
use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{PidfdFlags, getpid, pidfd_open};

/// What is to be cleared away when the process has ended that standard input is (a pidfd).
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub struct Left {
    /// The VM's control group
    #[arg(long)]
    pub group: Option<PathBuf>,
    /// The directory of the users' locks
    #[arg(long, requires = "uid")]
    pub locks: Option<PathBuf>,
    /// The VM's user
    #[arg(long, requires = "locks")]
    pub uid: Option<u32>,
    /// A socket that the VM listens at
    #[arg(long)]
    pub socket: Vec<PathBuf>,
    /// A file, if it is empty
    #[arg(long)]
    pub empty: Vec<PathBuf>,
}

impl Left {
    /// Starts the process that clears away after this one.
    pub fn keep(&self) -> Result<()> {
        let this =
            pidfd_open(getpid(), PidfdFlags::empty()).context("cannot watch this process")?;
        let mut command = Command::new("/proc/self/exe");
        command.arg("keep");
        let mut option = |name: &str, value: &Path| {
            command.arg(name).arg(value);
        };
        for (name, path) in [("--group", &self.group), ("--locks", &self.locks)] {
            if let Some(path) = path {
                option(name, path);
            }
        }
        for path in &self.socket {
            option("--socket", path);
        }
        for path in &self.empty {
            option("--empty", path);
        }
        if let Some(uid) = self.uid {
            command.args(["--uid", &uid.to_string()]);
        }
        command
            .stdin(Stdio::from(this))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            // A Ctrl-C for the VM is not for it.
            .process_group(0)
            .spawn()
            .context("cannot start the process that clears away after the VM")?;
        Ok(())
    }

    fn clear(&self, sockets: &[(PathBuf, u64)]) {
        let done = |what: &Path, outcome: std::io::Result<()>| {
            if let Err(error) = outcome {
                tracing::warn!("cannot clear {} away: {error}", what.display());
            }
        };
        if let Some(group) = &self.group {
            done(group, cgroup::remove(group));
        }
        for (path, inode) in sockets {
            done(path, remove_stale(path, *inode));
        }
        for path in &self.empty {
            if std::fs::metadata(path).is_ok_and(|file| file.is_file() && file.len() == 0) {
                done(path, std::fs::remove_file(path));
            }
        }
        // The last one: whoever sees that it is gone sees all gone.
        if let (Some(locks), Some(uid)) = (&self.locks, self.uid) {
            done(locks, user::release(locks, uid));
        }
    }
}

/// `blanket keep`.
pub fn command(left: &Left) -> Result<ExitCode> {
    let sockets: Vec<(PathBuf, u64)> = left
        .socket
        .iter()
        .filter_map(|path| Some((path.clone(), std::fs::symlink_metadata(path).ok()?.ino())))
        .collect();
    let process: OwnedFd = std::io::stdin().as_fd().try_clone_to_owned()?;
    loop {
        let mut fds = [PollFd::new(&process, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("cannot wait for the VM's process"),
        }
    }
    left.clear(&sockets);
    Ok(ExitCode::SUCCESS)
}

/// Removes the socket with this inode, if nobody listens at it.
fn remove_stale(path: &Path, inode: u64) -> std::io::Result<()> {
    let _lock = path.parent().map(locked).transpose()?;
    match std::fs::symlink_metadata(path) {
        Ok(found)
            if found.file_type().is_socket()
                && found.ino() == inode
                && UnixStream::connect(path).is_err() =>
        {
            std::fs::remove_file(path)
        }
        _ => Ok(()),
    }
}

/// A directory of sockets, in which nobody else replaces one as long as this is held.
pub fn locked(directory: &Path) -> std::io::Result<File> {
    let file = File::open(directory)?;
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn what_a_vm_left_is_cleared_away_and_nothing_else() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        let inode = |path: &Path| std::fs::symlink_metadata(path).expect("there").ino();
        drop(UnixListener::bind(at("stale")).expect("bound"));
        let _listener = UnixListener::bind(at("alive")).expect("bound");
        drop(UnixListener::bind(at("another")).expect("bound"));
        std::fs::write(at("empty"), "").expect("written");
        std::fs::write(at("report"), "it crashed").expect("written");
        let claim = user::claim_any(&at("users"), |_| false).expect("free");
        let uid = claim.user.uid;
        let left = Left {
            group: Some(at("no-group")),
            locks: Some(at("users")),
            uid: Some(uid),
            socket: Vec::new(),
            empty: vec![at("empty"), at("report"), at("never")],
        };
        let sockets = [
            (at("stale"), inode(&at("stale"))),
            (at("alive"), inode(&at("alive"))),
            (at("another"), inode(&at("another")) + 1_000_000),
        ];
        drop(claim);
        left.clear(&sockets);
        for (name, stays) in [
            ("stale", false),
            ("alive", true),
            ("another", true),
            ("empty", false),
            ("report", true),
        ] {
            assert_eq!(at(name).exists(), stays, "{name}");
        }
        assert!(!at("users").join(uid.to_string()).exists());
    }
}
