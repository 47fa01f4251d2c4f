//! A user of its own for each VM, so that one VM's process can neither signal nor look into
//! another's, nor touch what belongs to whoever started it.
//!
//! Users are numbers without a name, from [`FIRST`] on. Who has one holds a lock on a file of
//! that number, so that no two VMs of a machine have the same, and a number is free again
//! when its process has ended, however that was.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// The first of the numbers. 0x70000000 to 0x7fffffff are nobody's by the table of
/// <https://systemd.io/UIDS-GIDS>, but for its last 128 KiB.
pub const FIRST: u32 = 0x7000_0000;
/// How many there are.
pub const COUNT: u32 = 0x1_0000;

/// A user and its group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// The user's number; not 0.
    pub uid: u32,
    /// The group's.
    pub gid: u32,
}

/// Why there is no user for a VM.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The directory of the locks, or one in it.
    #[error("cannot claim a user for the VM: {}: {source}", path.display())]
    Lock {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// A VM has it.
    #[error("the user {0} is another VM's")]
    Taken(u32),
    /// All are taken.
    #[error("all {COUNT} users from {FIRST} on are other VMs'")]
    None,
}

/// A user that is this process's until the claim is dropped, or it ends.
#[derive(Debug)]
pub struct Claim {
    /// The user.
    pub user: User,
    /// Held for its lock.
    lock: File,
}

impl Drop for Claim {
    /// Gives the lock back. A child that was forked and has not yet become another program has
    /// a descriptor of the same open file, and would keep it.
    fn drop(&mut self) {
        // It goes with the last descriptor at the latest.
        let _ = flock(&self.lock, FlockOperation::Unlock);
    }
}

/// The first user that is free; `taken` says which are somebody's all the same.
///
/// # Errors
/// The locks, in the directory `locks`, cannot be used.
pub fn claim_any(locks: &Path, taken: impl Fn(u32) -> bool) -> Result<Claim, Error> {
    for uid in (FIRST..FIRST + COUNT).filter(|uid| !taken(*uid)) {
        match claim(locks, User { uid, gid: uid }) {
            Err(Error::Taken(_)) => {}
            other => return other,
        }
    }
    Err(Error::None)
}

/// Claims a user.
///
/// # Errors
/// A VM has it, or the locks cannot be used.
pub fn claim(locks: &Path, user: User) -> Result<Claim, Error> {
    let path = locks.join(user.uid.to_string());
    let failed = |source: io::Error| Error::Lock {
        path: path.clone(),
        source,
    };
    match DirBuilder::new().mode(0o700).create(locks) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    loop {
        let lock = open(&path, true).map_err(failed)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::AGAIN) => return Err(Error::Taken(user.uid)),
            Err(error) => return Err(failed(error.into())),
        }
        // Whoever had it may have removed the file meanwhile: then this locks nothing.
        if is_at(&lock, &path).map_err(failed)? {
            return Ok(Claim { user, lock });
        }
    }
}

/// Removes the lock of a user whose VM has ended. Of one that is in use, nothing happens.
///
/// # Errors
/// The host's answer.
pub fn release(locks: &Path, uid: u32) -> io::Result<()> {
    let path = locks.join(uid.to_string());
    let lock = match open(&path, false) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) if is_at(&lock, &path)? => std::fs::remove_file(&path),
        Ok(()) | Err(Errno::AGAIN) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The user that `text` names, by its name or number, in a text as `/etc/passwd` is.
#[must_use]
pub fn look_up(passwd: &str, text: &str) -> Option<User> {
    let number = text.parse::<u32>().ok();
    let found = passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let (name, _, uid, gid) = (
            fields.next()?,
            fields.next()?,
            fields.next()?.parse().ok()?,
            fields.next()?.parse().ok()?,
        );
        (name == text || Some(uid) == number).then_some(User { uid, gid })
    });
    found.or(number.map(|uid| User { uid, gid: uid }))
}

impl User {
    /// Becomes it, with no other groups, in all threads.
    pub(crate) fn enter(self) -> Result<(), Errno> {
        let done = |result: libc::c_int| match result {
            0 => Ok(()),
            _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::PERM)),
        };
        // The C library's, since the kernel's own calls are about one thread only.
        // SAFETY: reads no group.
        done(unsafe { libc::setgroups(0, std::ptr::null()) })?;
        // SAFETY: takes numbers.
        done(unsafe { libc::setresgid(self.gid, self.gid, self.gid) })?;
        // SAFETY: takes numbers.
        done(unsafe { libc::setresuid(self.uid, self.uid, self.uid) })
    }
}

fn open(path: &Path, create: bool) -> io::Result<File> {
    File::options()
        .write(true)
        .create(create)
        .truncate(false)
        .mode(0o600)
        .open(path)
}

/// Whether it is this file that is at the path.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match std::fs::symlink_metadata(path) {
        Ok(there) => Ok((ours.dev(), ours.ino()) == (there.dev(), there.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_have_the_same() {
        let directory = tempfile::tempdir().expect("a directory");
        let locks = directory.path().join("users");
        let none = |_| false;
        let first = claim_any(&locks, none).expect("free");
        let second = claim_any(&locks, none).expect("free");
        assert_eq!((first.user.uid, second.user.uid), (FIRST, FIRST + 1));
        assert!(matches!(
            claim(&locks, first.user),
            Err(Error::Taken(FIRST))
        ));
        let third = claim_any(&locks, |uid| uid == FIRST + 2).expect("free");
        assert_eq!(third.user.uid, FIRST + 3);

        // In use: the lock stays.
        release(&locks, FIRST).expect("no error");
        assert!(locks.join(FIRST.to_string()).exists());
        drop(first);
        release(&locks, FIRST).expect("no error");
        assert!(!locks.join(FIRST.to_string()).exists());
        release(&locks, FIRST).expect("no error");
        // A lock that its holder left behind is free.
        drop(second);
        assert_eq!(claim_any(&locks, none).expect("free").user.uid, FIRST);
        assert_eq!(claim_any(&locks, none).expect("free").user.uid, FIRST);
    }

    #[test]
    fn users_by_name_and_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\n# no user\nvm:x:990:991::/:/bin/false\n";
        let vm = User { uid: 990, gid: 991 };
        for text in ["vm", "990"] {
            assert_eq!(look_up(passwd, text), Some(vm), "{text}");
        }
        assert_eq!(look_up(passwd, "7"), Some(User { uid: 7, gid: 7 }));
        for text in ["", "nobody", "-1", "4294967296"] {
            assert_eq!(look_up(passwd, text), None, "{text}");
        }
    }
}
