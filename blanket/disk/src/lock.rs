//! Locks of image files, so that no two VMs write one disk.
//!
//! They are OFD locks on the bytes that QEMU locks (`include/block/block-common.h`,
//! `block/file-posix.c`), so a QEMU that has the image counts too: byte 100 + n is locked, shared,
//! by who uses permission n, byte 200 + n by who does not let others use it. They go with the
//! last descriptor of the open file at the latest, so with the process.

use std::fs::{self, File};
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const USED: i64 = 100;
const UNSHARED: i64 = 200;
const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// The file of an image, and its lock if it has one.
#[derive(Debug)]
pub(crate) struct ImageFile {
    file: File,
    locked: bool,
}

impl ImageFile {
    /// Without a lock.
    pub(crate) fn new(file: File) -> Self {
        Self {
            file,
            locked: false,
        }
    }

    /// Takes the lock, or says `false` because another has it.
    pub(crate) fn lock(&mut self, wanted: Use) -> io::Result<bool> {
        self.locked = take(&self.file, wanted)?;
        Ok(self.locked)
    }
}

impl Deref for ImageFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

impl Drop for ImageFile {
    /// Gives the lock back. A child that was forked and has not yet become another program has
    /// a descriptor of the same open file, and would keep it.
    fn drop(&mut self) {
        if self.locked
            && let Err(error) = release(&self.file)
        {
            tracing::warn!(%error, "the lock of an image cannot be given back");
        }
    }
}

/// What a holder wants to do with the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// Others may read, none may write.
    Read,
    /// Others may do nothing with it, for a reader wants no writer.
    Write,
}

/// See [`ImageFile::lock`].
fn take(file: &File, wanted: Use) -> io::Result<bool> {
    let used: &[i64] = match wanted {
        Use::Read => &[CONSISTENT_READ],
        Use::Write => &[CONSISTENT_READ, WRITE, RESIZE],
    };
    let unshared: &[i64] = &[WRITE, RESIZE];
    // First all are taken, then conflicts are looked for: of two that come at the same time at
    // least one sees the other.
    for &permission in used {
        control(file, libc::F_OFD_SETLK, libc::F_RDLCK, USED + permission)?;
    }
    for &permission in unshared {
        control(
            file,
            libc::F_OFD_SETLK,
            libc::F_RDLCK,
            UNSHARED + permission,
        )?;
    }
    let mut free = true;
    for &permission in used {
        free &= !held(file, UNSHARED + permission)?;
    }
    for &permission in unshared {
        free &= !held(file, USED + permission)?;
    }
    if !free {
        // Others that ask while the file is still open must not take this for a holder.
        release(file)?;
    }
    Ok(free)
}

fn release(file: &File) -> io::Result<()> {
    for permission in [CONSISTENT_READ, WRITE, RESIZE] {
        for byte in [USED + permission, UNSHARED + permission] {
            control(file, libc::F_OFD_SETLK, libc::F_UNLCK, byte)?;
        }
    }
    Ok(())
}

/// Whether another open file has a lock on the byte.
fn held(file: &File, byte: i64) -> io::Result<bool> {
    Ok(control(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte)? != libc::F_UNLCK)
}

/// One fcntl(2) on one byte; the kind of lock that it leaves in the structure.
fn control(file: &File, command: i32, kind: i32, byte: i64) -> io::Result<i32> {
    // SAFETY: all zeroes is a valid value of this structure of integers.
    let mut lock: libc::flock64 = unsafe { std::mem::zeroed() };
    lock.l_type = i16::try_from(kind).unwrap_or_default();
    lock.l_whence = i16::try_from(libc::SEEK_SET).unwrap_or_default();
    lock.l_start = byte;
    lock.l_len = 1;
    // SAFETY: the descriptor is open, and these commands read and write a `flock64`.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(lock.l_type.into())
}

/// Who has the file open, for a message: as far as one may look into other processes.
pub(crate) fn holders(file: &File) -> String {
    let Ok(wanted) = file.metadata() else {
        return String::new();
    };
    let own = std::process::id().to_string();
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = process.file_name().to_string_lossy().into_owned();
        if pid == own || !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let descriptors = fs::read_dir(process.path().join("fd"));
        let has = descriptors.into_iter().flatten().flatten().any(|one| {
            fs::metadata(one.path())
                .is_ok_and(|it| (it.dev(), it.ino()) == (wanted.dev(), wanted.ino()))
        });
        if has {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(format!("{pid} ({})", name.trim()));
        }
    }
    if found.is_empty() {
        // OFD locks do not say who has them.
        "it is this process, or one that may not be looked into".into()
    } else {
        format!("process {} has it open", found.join(", "))
    }
}

/// Whether somebody has the image open for writing; for information only.
pub(crate) fn written(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| held(&file, USED + WRITE).unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_readers_or_one_writer() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let open = || {
            let mut options = File::options();
            ImageFile::new(options.read(true).write(true).open(path.path()).unwrap())
        };
        let (mut first, mut second, mut third) = (open(), open(), open());
        assert!(first.lock(Use::Read).unwrap());
        assert!(second.lock(Use::Read).unwrap());
        assert!(!third.lock(Use::Write).unwrap());
        assert!(!written(path.path()));
        drop((first, second));
        assert!(third.lock(Use::Write).unwrap());
        assert!(written(path.path()));
        for wanted in [Use::Read, Use::Write] {
            assert!(!open().lock(wanted).unwrap());
        }
        // Another descriptor of the same open file does not keep the lock.
        let copy = third.try_clone().unwrap();
        drop(third);
        assert!(open().lock(Use::Write).unwrap());
        drop(copy);
    }
}
