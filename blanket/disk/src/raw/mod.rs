//! Raw images: files and block devices that hold the guest's bytes as they are.

mod direct;
mod transfer;
mod uring;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::lock::ImageFile;
use crate::reader::{Source, length};
use crate::request::{check, host};
use crate::workers::{Engine, WorkerQueue};
use crate::{Cache, DataPath, Failure, Operation, Queue, Request, SECTOR};
use transfer::Transfer;

/// Takes bytes out of a file without a change of its size (fallocate(2)).
const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

/// An open raw image.
#[derive(Debug)]
pub(crate) struct Raw {
    file: ImageFile,
    /// The same past the host's page cache, if data goes there.
    direct: Option<File>,
    size: AtomicU64,
    read_only: bool,
    /// 0 once the host has said that it cannot.
    discard_granularity: AtomicU32,
    data_path: DataPath,
    resizing: Mutex<()>,
}

impl Raw {
    /// Of the file that was opened at `path`. With [`Cache::None`] it is opened once more.
    pub(crate) fn new(
        file: ImageFile,
        path: &Path,
        read_only: bool,
        data_path: DataPath,
        cache: Option<Cache>,
    ) -> io::Result<Self> {
        let size = length(&file)?;
        let granularity = if read_only {
            0
        } else {
            hole_granularity(&file, size)?
        };
        let direct = direct_file(&file, path, read_only, size, cache)?;
        Ok(Self {
            file,
            direct,
            size: AtomicU64::new(size),
            read_only,
            discard_granularity: AtomicU32::new(granularity),
            data_path,
            resizing: Mutex::new(()),
        })
    }

    pub(crate) fn cache(&self) -> Cache {
        match self.direct {
            Some(_) => Cache::None,
            None => Cache::Writeback,
        }
    }

    /// What data is read from and written to.
    fn data(&self) -> &File {
        self.direct.as_ref().unwrap_or(&self.file)
    }

    pub(crate) fn read_only(&self) -> bool {
        self.read_only
    }

    pub(crate) fn discard_granularity(&self) -> u32 {
        self.discard_granularity.load(Ordering::Relaxed)
    }

    pub(crate) fn queue(self: &Arc<Self>, depth: u32) -> io::Result<Box<dyn Queue>> {
        if self.data_path != DataPath::Threads {
            match uring::UringQueue::new(Arc::clone(self), depth) {
                Ok(queue) => {
                    tracing::debug!(depth, "a raw image is read and written through io_uring");
                    return Ok(Box::new(queue));
                }
                Err(error) if self.data_path == DataPath::IoUring => return Err(error),
                // Containers and hardened hosts forbid it (io_uring_disabled, seccomp).
                Err(error) => {
                    tracing::info!(%error, "no io_uring on this host: threads read and write");
                }
            }
        }
        let engine = Arc::clone(self) as Arc<dyn Engine>;
        Ok(Box::new(WorkerQueue::new(engine, depth)?))
    }

    /// The caller has compared the sizes.
    pub(crate) fn resize(&self, size: u64) -> io::Result<()> {
        let _one_at_a_time = self.resizing.lock().unwrap_or_else(PoisonError::into_inner);
        let metadata = self.file.metadata()?;
        if metadata.file_type().is_block_device() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "a block device is resized with the tools of what provides it",
            ));
        }
        // Never cut off what somebody else appended.
        if metadata.len() < size {
            self.file.set_len(size)?;
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// The failure of a request that the host refused.
    fn failure(&self, operation: Operation, error: io::Error) -> Failure {
        let cannot = [libc::EOPNOTSUPP, libc::ENOSYS, libc::ENODEV];
        if matches!(operation, Operation::Discard { .. })
            && error
                .raw_os_error()
                .is_some_and(|code| cannot.contains(&code))
        {
            self.discard_granularity.store(0, Ordering::Relaxed);
            return Failure::Unsupported;
        }
        host(error)
    }

    fn transfer(&self, request: &Request) -> io::Result<()> {
        let mut transfer = Transfer::new(request, self.direct.is_some());
        while let Some((iovecs, offset)) = transfer.rest() {
            let moved = match request.operation {
                // SAFETY: the iovecs name memory that the request keeps mapped, and that no
                // reference of Rust's leads to.
                Operation::Read => unsafe {
                    libc::preadv64(
                        self.data().as_raw_fd(),
                        iovecs.as_ptr(),
                        transfer::count(iovecs),
                        transfer::signed(offset)?,
                    )
                },
                // SAFETY: as above.
                _ => unsafe {
                    libc::pwritev64(
                        self.data().as_raw_fd(),
                        iovecs.as_ptr(),
                        transfer::count(iovecs),
                        transfer::signed(offset)?,
                    )
                },
            };
            match usize::try_from(moved) {
                Ok(0) => return Err(transfer::cut_short(request.operation)),
                Ok(moved) => transfer.advance(moved),
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        transfer.end(request);
        Ok(())
    }
}

impl AsFd for Raw {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Source for Raw {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }
}

impl Engine for Raw {
    fn check(&self, request: &Request) -> Result<(), Failure> {
        check(
            request,
            self.size(),
            self.read_only,
            self.discard_granularity(),
        )
    }

    fn run(&self, request: &Request, _scratch: &mut Vec<u8>) -> Result<(), Failure> {
        let result = match request.operation {
            Operation::Read | Operation::Write => self.transfer(request),
            Operation::Flush => self.file.sync_data(),
            Operation::Discard { length: 0 } => Ok(()),
            Operation::Discard { length } => {
                rustix::fs::fallocate(&*self.file, PUNCH, request.offset, length)
                    .map_err(io::Error::from)
            }
        };
        result.map_err(|error| self.failure(request.operation, error))
    }
}

/// The file past the host's page cache, if data is to go there and can: on a block device unless
/// somebody says otherwise, on a file only if somebody says so.
fn direct_file(
    file: &File,
    path: &Path,
    read_only: bool,
    size: u64,
    cache: Option<Cache>,
) -> io::Result<Option<File>> {
    let device = file.metadata()?.file_type().is_block_device();
    let wanted = cache.unwrap_or(if device {
        Cache::None
    } else {
        Cache::Writeback
    });
    if wanted == Cache::Writeback {
        return Ok(None);
    }
    match direct::open(path, file, read_only, size) {
        Ok(file) => Ok(Some(file)),
        Err(error) => {
            let path = path.display();
            tracing::warn!("{path} goes through the host's page cache: no cache=none: {error}");
            Ok(None)
        }
    }
}

/// The file system's block if it can make holes, else 0. Asked by a hole behind the end.
fn hole_granularity(file: &File, size: u64) -> io::Result<u32> {
    let metadata = file.metadata()?;
    if !metadata.file_type().is_file() {
        // What a block device does with a hole depends on every layer below it.
        return Ok(0);
    }
    match rustix::fs::fallocate(file, PUNCH, size, SECTOR) {
        Ok(()) => Ok(u32::try_from(metadata.blksize()).unwrap_or(4096)),
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => Ok(0),
        Err(error) => Err(error.into()),
    }
}
