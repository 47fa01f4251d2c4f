//! The descriptor that says that requests are complete.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// An eventfd: readable from [`Event::signal`] to [`Event::clear`].
#[derive(Debug)]
pub(crate) struct Event(OwnedFd);

impl Event {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(
            0,
            EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK,
        )?))
    }

    /// Makes it readable. The only error there is, a full counter, leaves it readable.
    pub(crate) fn signal(&self) {
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Waits until it or `wake` is readable, the time is over, or a signal came, and makes it
    /// unreadable. Whether `wake` may be readable.
    pub(crate) fn wait(&self, wake: Option<BorrowedFd<'_>>, timeout: Option<Duration>) -> bool {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let ours = PollFd::from_borrowed_fd(self.as_fd(), PollFlags::IN);
        let mut fds = [ours.clone(), ours];
        let mut polled = &mut fds[..1];
        if let Some(wake) = wake {
            fds[1] = PollFd::from_borrowed_fd(wake, PollFlags::IN);
            polled = &mut fds;
        }
        if poll(polled, timeout.as_ref()).is_err() {
            return wake.is_some();
        }
        if !fds[0].revents().is_empty() {
            self.clear();
        }
        wake.is_some() && !fds[1].revents().is_empty()
    }

    /// Makes it unreadable. The only error there is says that it already was.
    pub(crate) fn clear(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
