//! Waking a backend's thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

use crate::Listener;

/// Wakes a thread that polls [`Kick`]'s descriptor, and can tell it to end.
#[derive(Debug)]
pub struct Kick {
    event: OwnedFd,
    stop: AtomicBool,
}

impl Kick {
    /// Not kicked.
    ///
    /// # Errors
    /// The host has no descriptor for it.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            stop: AtomicBool::new(false),
        })
    }

    /// Wakes the thread.
    pub fn kick(&self) {
        // It fails only when the counter is full: the thread is woken already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Tells the thread to end, and wakes it.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.kick();
    }

    /// Whether the thread is to end.
    #[must_use]
    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Makes the descriptor unreadable; to be called before the thread looks for work.
    pub fn clear(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.event, &mut count);
    }
}

impl AsFd for Kick {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Listener for Kick {
    fn notified(&self) {
        self.kick();
    }
}
