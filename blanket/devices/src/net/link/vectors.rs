//! Reading and writing pieces of memory in one go.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use blanket_disk::Buffer;
use vm_memory::VolatileSlice;

/// Most pieces: those of a packet, one that is ours, and a header.
const MOST: usize = 48;
const _: () = assert!(MOST > crate::net::protocol::MAX_PIECES + 2);

/// Pieces as the kernel takes them.
struct Vectors {
    list: [libc::iovec; MOST],
    count: usize,
}

impl Vectors {
    fn new(first: libc::iovec, parts: &[Buffer]) -> io::Result<Self> {
        let mut list = [first; MOST];
        let free = list
            .get_mut(1..=parts.len())
            .ok_or(io::ErrorKind::InvalidInput)?;
        for (vector, part) in free.iter_mut().zip(parts) {
            *vector = libc::iovec {
                iov_base: part.start().as_ptr().cast(),
                iov_len: part.length(),
            };
        }
        Ok(Self {
            list,
            count: parts.len() + 1,
        })
    }
}

fn result(done: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(done).map_err(|_| io::Error::last_os_error())
}

/// Writes `header` and `parts`.
pub(super) fn write(fd: BorrowedFd<'_>, header: &[u8], parts: &[Buffer]) -> io::Result<usize> {
    let first = libc::iovec {
        iov_base: header.as_ptr().cast_mut().cast(),
        iov_len: header.len(),
    };
    let vectors = Vectors::new(first, parts)?;
    // At most MOST.
    let count = libc::c_int::try_from(vectors.count).unwrap_or(0);
    // SAFETY: all vectors are memory that is mapped until this returns: the header is
    // borrowed, the parts are there by the contract of `Port::send`. The kernel only reads
    // them; that others write the parts meanwhile is nothing to it.
    result(unsafe { libc::writev(fd.as_raw_fd(), vectors.list.as_ptr(), count) })
}

/// As [`write()`], to a socket, without a signal when its other end is gone.
pub(super) fn send(fd: BorrowedFd<'_>, header: &[u8], parts: &[Buffer]) -> io::Result<usize> {
    let first = libc::iovec {
        iov_base: header.as_ptr().cast_mut().cast(),
        iov_len: header.len(),
    };
    let mut vectors = Vectors::new(first, parts)?;
    // SAFETY: all zero is a message without an address and without pieces.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.list.as_mut_ptr();
    message.msg_iovlen = vectors.count;
    // SAFETY: as for `write`; the message's vectors live until this returns.
    result(unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) })
}

/// Reads into `header` and `parts`.
pub(super) fn read(fd: BorrowedFd<'_>, header: &mut [u8], parts: &[Buffer]) -> io::Result<usize> {
    let first = libc::iovec {
        iov_base: header.as_mut_ptr().cast(),
        iov_len: header.len(),
    };
    let vectors = Vectors::new(first, parts)?;
    // At most MOST.
    let count = libc::c_int::try_from(vectors.count).unwrap_or(0);
    // SAFETY: as for `write`; the header is borrowed for writing, and no reference of
    // Rust's leads to the parts.
    result(unsafe { libc::readv(fd.as_raw_fd(), vectors.list.as_ptr(), count) })
}

/// A part as memory that others use at the same time.
fn volatile(part: &Buffer) -> VolatileSlice<'_> {
    // SAFETY: the part is mapped while the caller has it, by the contract of `Port`, and
    // no reference leads to it.
    unsafe { VolatileSlice::new(part.start().as_ptr(), part.length()) }
}

/// Appends what the parts have behind their first `skip` bytes.
pub(super) fn copy_out(parts: &[Buffer], mut skip: usize, into: &mut Vec<u8>) {
    for part in parts {
        let gone = skip.min(part.length());
        skip -= gone;
        if let Ok(rest) = volatile(part).offset(gone) {
            let at = into.len();
            into.resize(at + rest.len(), 0);
            rest.copy_to(&mut into[at..]);
        }
    }
}

/// What was sent to a socket of this host's and was not read yet, as the kernel counts it (Linux,
/// `net/unix/af_unix.c`, `unix_outq_len()`): nought if all was.
pub(super) fn unread(fd: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    let mut length: libc::c_int = 0;
    // SAFETY: the kernel writes one number, into one that is borrowed until it returns.
    match unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCOUTQ, &raw mut length) } {
        0 => Ok(length),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Copies bytes into the parts, as far as they go.
pub(super) fn copy_in(mut from: &[u8], parts: &[Buffer]) {
    for part in parts {
        let (now, later) = from.split_at(from.len().min(part.length()));
        volatile(part).copy_from(now);
        from = later;
    }
}
