//! Requests to a disk, and how they end.

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

/// What is asked of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fills the buffers from the disk.
    Read,
    /// Writes the buffers to the disk.
    Write,
    /// What was completed before is on the host's stable storage when this is.
    Flush,
    /// The guest needs these bytes no longer; they read as zeroes, or as before.
    Discard {
        /// Bytes.
        length: u64,
    },
}

/// Memory that a request reads or writes. Others, the guest among them, may read and
/// write it at the same time, so no reference to its bytes is ever made.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    start: NonNull<u8>,
    length: usize,
}

impl Buffer {
    /// The `length` bytes from `start` on.
    ///
    /// # Safety
    /// They are mapped, readable and writable, until what keeps them alive
    /// ([`Request::memory`]) is dropped, and no reference of Rust's leads to them.
    #[must_use]
    pub const unsafe fn new(start: NonNull<u8>, length: usize) -> Self {
        Self { start, length }
    }

    /// Its first byte.
    #[must_use]
    pub const fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Bytes.
    #[must_use]
    pub const fn length(&self) -> usize {
        self.length
    }

    /// This one and the next as one, if they lie beside each other.
    #[must_use]
    pub fn join(&self, next: &Self) -> Option<Self> {
        let end = self.start.as_ptr().wrapping_add(self.length);
        (end == next.start.as_ptr()).then_some(Self {
            start: self.start,
            length: self.length + next.length,
        })
    }
}

// SAFETY: a buffer is an address of memory that lives as long as its request says, and
// that any thread may use.
unsafe impl Send for Buffer {}

/// One request.
pub struct Request {
    /// The submitter's own name for it.
    pub token: u64,
    /// What is asked.
    pub operation: Operation,
    /// Where on the disk, bytes, a multiple of [`crate::SECTOR`]; 0 for a flush.
    pub offset: u64,
    /// The memory, in order; empty for a flush and a discard. Lengths are multiples of
    /// [`crate::SECTOR`].
    pub buffers: Vec<Buffer>,
    /// Keeps the buffers' memory mapped until the request is complete.
    pub memory: Arc<dyn Any + Send + Sync>,
}

impl Request {
    /// Bytes that it moves.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.buffers
            .iter()
            .fold(0, |sum, buffer| sum.saturating_add(buffer.length as u64))
    }

    /// Its end: it no longer keeps the memory.
    #[must_use]
    pub fn end(self, result: Result<(), Failure>) -> Completion {
        Completion {
            token: self.token,
            result,
            buffers: self.buffers,
        }
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("token", &self.token)
            .field("operation", &self.operation)
            .field("offset", &self.offset)
            .field("length", &self.length())
            .finish_non_exhaustive()
    }
}

/// The end of a request.
#[derive(Debug)]
pub struct Completion {
    /// Of the [`Request`].
    pub token: u64,
    /// How it ended.
    pub result: Result<(), Failure>,
    /// The request's own, as they were, to be used again.
    pub buffers: Vec<Buffer>,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The host has no space left for the image: the request may be made again later.
    #[error("no space is left on the host for the image")]
    NoSpace,
    /// It is beyond the end of the disk.
    #[error("{length} bytes at {offset} are beyond the end of the disk ({size} bytes)")]
    OutOfRange {
        /// Where, bytes.
        offset: u64,
        /// How much, bytes.
        length: u64,
        /// Of the disk, bytes.
        size: u64,
    },
    /// The disk is read-only.
    #[error("the disk is read-only")]
    ReadOnly,
    /// The disk cannot do this.
    #[error("the disk cannot do this")]
    Unsupported,
    /// The host's answer.
    #[error("the host cannot read or write the image: {0}")]
    Host(std::io::Error),
}

/// Says of a request, before anything is done for it, that it cannot be.
pub(crate) fn check(
    request: &Request,
    size: u64,
    read_only: bool,
    discard_granularity: u32,
) -> Result<(), Failure> {
    let length = match request.operation {
        Operation::Flush => return Ok(()),
        Operation::Write | Operation::Discard { .. } if read_only => return Err(Failure::ReadOnly),
        Operation::Discard { .. } if discard_granularity == 0 => return Err(Failure::Unsupported),
        Operation::Discard { length } => length,
        Operation::Read | Operation::Write => request.length(),
    };
    let offset = request.offset;
    let buffers = request.buffers.iter();
    let all = buffers.fold(offset | length, |all, one| all | one.length as u64);
    if !all.is_multiple_of(crate::SECTOR) {
        return Err(Failure::Host(std::io::Error::new(
            std::io::ErrorKind::InvalidInput,
            format!("{length} bytes at {offset} are not whole sectors"),
        )));
    }
    if offset.checked_add(length).is_none_or(|end| end > size) {
        return Err(Failure::OutOfRange {
            offset,
            length,
            size,
        });
    }
    Ok(())
}

/// The failure that an error of the host is.
pub(crate) fn host(error: std::io::Error) -> Failure {
    use std::io::ErrorKind::{QuotaExceeded, StorageFull};
    if matches!(error.kind(), StorageFull | QuotaExceeded) {
        Failure::NoSpace
    } else {
        Failure::Host(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_host_is_told_from_a_broken_one() {
        for code in [libc::ENOSPC, libc::EDQUOT] {
            let failure = host(std::io::Error::from_raw_os_error(code));
            assert!(matches!(failure, Failure::NoSpace), "{failure}");
        }
        let failure = host(std::io::Error::from_raw_os_error(libc::EIO));
        assert!(matches!(failure, Failure::Host(_)), "{failure}");
    }
}
