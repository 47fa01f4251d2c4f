//! Past the host's page cache: a second open file of an image, with `O_DIRECT` (open(2)).
//!
//! Everything is read and written through it, or nothing is: who writes one sector of a page past
//! the cache and another one through it may lose either.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

use crate::layer::Cursor;
use crate::{Request, SECTOR};

/// [`SECTOR`], of memory.
const LEAST: usize = 512;
const _: () = assert!(LEAST as u64 == SECTOR);

/// Opens the image at `path`, which is open as `image`, again.
///
/// # Errors
/// The file system or the device has no direct I/O, or none of single sectors.
pub(super) fn open(path: &Path, image: &File, read_only: bool, size: u64) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_DIRECT | libc::O_NONBLOCK)
        .open(path)?;
    let same = |a: &fs::Metadata, b: &fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    if !same(&file.metadata()?, &image.metadata()?) {
        return Err(io::Error::other("another file has taken its name"));
    }
    // As for the first: not to be asked again and again.
    rustix::fs::fcntl_setfl(&file, OFlags::DIRECT)?;
    probe(&file, size)?;
    Ok(file)
}

/// A guest's requests are sectors of 512 bytes, in memory and on the disk. Asked by one that is
/// nothing more: a kernel's own words for it (`STATX_DIOALIGN`) are newer than kernels in use.
fn probe(file: &File, size: u64) -> io::Result<()> {
    let mut memory = Bounce::new(2 * LEAST);
    // The second one: it does not begin at a larger block.
    let offset = if size >= 2 * SECTOR { SECTOR } else { 0 };
    match rustix::io::pread(file, &mut memory.0[1].0, offset) {
        Ok(_) => Ok(()),
        Err(Errno::INVAL) => Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "its direct I/O is not by sectors of 512 bytes",
        )),
        Err(error) => Err(error.into()),
    }
}

#[derive(Clone)]
#[repr(align(512))]
struct Sector([u8; LEAST]);

/// Memory that direct I/O takes, for a request whose own is not so.
pub(super) struct Bounce(Vec<Sector>);

impl Bounce {
    fn new(length: usize) -> Self {
        Self(vec![Sector([0; LEAST]); length.div_ceil(LEAST)])
    }

    /// With what the request writes; nothing if its own memory will do.
    pub(super) fn of(request: &Request) -> Option<Self> {
        let aligned = |start: *mut u8| start.addr().is_multiple_of(LEAST);
        if request
            .buffers
            .iter()
            .all(|buffer| aligned(buffer.start().as_ptr()))
        {
            return None;
        }
        let mut bounce = Self::new(usize::try_from(request.length()).ok()?);
        let mut cursor = Cursor::new(&request.buffers);
        for sector in &mut bounce.0 {
            cursor.take(&mut sector.0);
        }
        Some(bounce)
    }

    /// Gives the request what was read.
    pub(super) fn give(&self, request: &Request) {
        let mut cursor = Cursor::new(&request.buffers);
        for sector in &self.0 {
            cursor.put(&sector.0);
        }
    }

    pub(super) fn iovec(&mut self) -> libc::iovec {
        libc::iovec {
            iov_base: self.0.as_mut_ptr().cast(),
            iov_len: self.0.len() * LEAST,
        }
    }
}
