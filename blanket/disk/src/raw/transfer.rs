//! How far a read or write of several buffers has come.

use std::io;

use super::direct::Bounce;
use crate::{Operation, Request};

/// Buffers that the kernel takes at once (UIO_MAXIOV, linux/uio.h).
const AT_ONCE: usize = 1024;

/// What is left of a request.
#[derive(Default)]
pub(super) struct Transfer {
    iovecs: Vec<libc::iovec>,
    first: usize,
    offset: u64,
    /// Memory in place of the request's own.
    bounce: Option<Bounce>,
}

// SAFETY: the addresses are those of a request's buffers, which any thread may use, or of memory
// that this owns.
unsafe impl Send for Transfer {}

impl Transfer {
    /// Past the host's page cache if it is `direct`.
    pub(super) fn new(request: &Request, direct: bool) -> Self {
        let mut this = Self::default();
        this.begin(request, direct);
        this
    }

    /// As [`Transfer::new`], with the memory of one that is done.
    pub(super) fn begin(&mut self, request: &Request, direct: bool) {
        self.first = 0;
        self.offset = request.offset;
        self.bounce = direct.then(|| Bounce::of(request)).flatten();
        self.iovecs.clear();
        if let Some(bounce) = &mut self.bounce {
            self.iovecs.push(bounce.iovec());
            return;
        }
        self.iovecs.reserve(request.buffers.len());
        for buffer in &request.buffers {
            if buffer.length() > 0 {
                self.iovecs.push(libc::iovec {
                    iov_base: buffer.start().as_ptr().cast(),
                    iov_len: buffer.length(),
                });
            }
        }
    }

    /// All of `request` is done, for which this is.
    pub(super) fn end(&mut self, request: &Request) {
        if let (Operation::Read, Some(bounce)) = (request.operation, self.bounce.take()) {
            bounce.give(request);
        }
    }

    /// The next buffers and their place on the disk; nothing when all is done.
    pub(super) fn rest(&self) -> Option<(&[libc::iovec], u64)> {
        let rest = self.iovecs.get(self.first..)?;
        let rest = &rest[..rest.len().min(AT_ONCE)];
        (!rest.is_empty()).then_some((rest, self.offset))
    }

    /// `moved` bytes more are done.
    pub(super) fn advance(&mut self, moved: usize) {
        self.offset += moved as u64;
        let mut left = moved;
        while let Some(iovec) = self.iovecs.get_mut(self.first) {
            if left < iovec.iov_len {
                iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(left).cast();
                iovec.iov_len -= left;
                return;
            }
            left -= iovec.iov_len;
            self.first += 1;
        }
    }
}

/// Of at most [`AT_ONCE`] buffers.
#[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap)]
pub(super) fn count(iovecs: &[libc::iovec]) -> i32 {
    iovecs.len() as i32
}

/// An offset as the kernel wants it.
pub(super) fn signed(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))
}

/// The host moved nothing, though the range lies within the disk.
pub(super) fn cut_short(operation: Operation) -> io::Error {
    if operation == Operation::Read {
        io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the image was cut off while it was open",
        )
    } else {
        io::ErrorKind::WriteZero.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Buffer;
    use std::ptr::NonNull;
    use std::sync::Arc;

    #[test]
    fn goes_on_where_the_kernel_stopped() {
        let base = NonNull::<u8>::dangling();
        let buffer = |length| {
            // SAFETY: never read or written in this test.
            unsafe { Buffer::new(base, length) }
        };
        let mut transfer = Transfer::new(
            &Request {
                token: 0,
                operation: Operation::Read,
                offset: 100,
                buffers: vec![buffer(10), buffer(0), buffer(20)],
                memory: Arc::new(()),
            },
            false,
        );
        let lengths = |transfer: &Transfer| {
            let (rest, offset) = transfer.rest()?;
            Some((
                rest.iter().map(|one| one.iov_len).collect::<Vec<_>>(),
                offset,
            ))
        };
        assert_eq!(lengths(&transfer), Some((vec![10, 20], 100)));
        transfer.advance(4);
        assert_eq!(lengths(&transfer), Some((vec![6, 20], 104)));
        transfer.advance(7);
        assert_eq!(lengths(&transfer), Some((vec![19], 111)));
        transfer.advance(19);
        assert_eq!(lengths(&transfer), None);
    }
}
