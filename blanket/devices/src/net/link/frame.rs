//! An end of a link whose descriptor takes and gives whole packets behind the host's
//! header: a tap, or a socket that keeps messages apart.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use blanket_disk::Buffer;

use super::{Health, NotSent, Port, Received, vectors};
use crate::net::offload::{HEADER, Undone};

/// Such an end.
#[derive(Debug)]
pub(super) struct Frames {
    fd: OwnedFd,
    name: String,
    health: Health,
}

impl Frames {
    pub(super) fn new(fd: OwnedFd, name: String, health: Health) -> Self {
        Self { fd, name, health }
    }

    fn gone(&self, why: &dyn std::fmt::Display) {
        if self.health.down(why) {
            tracing::error!("{}: {why}", self.name);
        }
    }
}

impl AsFd for Frames {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Port for Frames {
    fn send(&mut self, undone: &Undone, parts: &[Buffer]) -> Result<(), NotSent> {
        if !self.health.is_up() {
            return Err(NotSent::Down);
        }
        loop {
            return match vectors::write(self.fd.as_fd(), &undone.encode(), parts) {
                Ok(_) => Ok(()),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => continue,
                    Some(libc::EAGAIN) => Err(NotSent::Full),
                    Some(libc::EBADFD | libc::EPIPE | libc::ECONNRESET | libc::ENOTCONN) => {
                        self.gone(&"it was removed");
                        Err(NotSent::Down)
                    }
                    // A tap that is not up says EIO, and may come up again.
                    _ => Err(NotSent::Refused(error)),
                },
            };
        }
    }

    fn flush(&mut self) -> bool {
        false
    }

    fn receive(&mut self, parts: &[Buffer]) -> Option<Received> {
        if !self.health.is_up() {
            return None;
        }
        let mut header = [0; HEADER];
        loop {
            return match vectors::read(self.fd.as_fd(), &mut header, parts) {
                Ok(0) => {
                    self.gone(&"its other end is closed");
                    None
                }
                Ok(length) => Some(Received {
                    length: length.saturating_sub(HEADER),
                    undone: Undone::decode(&header),
                }),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
                Err(error) if error.raw_os_error() == Some(libc::EBADFD) => {
                    self.gone(&"it was removed");
                    None
                }
                Err(error) => match error.raw_os_error() {
                    // The packet is lost, and no more than that.
                    Some(libc::EFAULT | libc::ENOMEM | libc::ENOBUFS) => Some(Received {
                        length: 0,
                        undone: None,
                    }),
                    _ => {
                        self.gone(&format!("it cannot be read: {error}"));
                        None
                    }
                },
            };
        }
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        self.health.is_up().then(|| self.fd.as_fd())
    }
}
