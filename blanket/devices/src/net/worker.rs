//! The thread of a queue: moves packets both ways, and waits for the guest, for the link,
//! and for the time when the limits let it go on.

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::link::{Port, SharedPort};
use super::rx::Rx;
use super::tx::{Broken, Progress, Tx};
use crate::bus::Fault;
use crate::sync::lock;
use crate::{Guest, Kick};

/// A queue, and what its thread waits for.
pub(super) struct Worker {
    pub guest: Arc<dyn Guest>,
    pub kick: Arc<Kick>,
    pub tx: Tx,
    pub tx_port: u32,
    pub rx: Rx,
    pub rx_port: u32,
    pub link: SharedPort,
    pub fault: Fault,
}

/// What the thread waits for beside the guest.
#[derive(Debug, Default)]
struct Wait {
    readable: bool,
    writable: bool,
    timeout: Option<Duration>,
}

impl Wait {
    fn new(tx: Progress, rx: Progress) -> Self {
        let limit = |progress| match progress {
            Progress::Limited(wait) => Some(wait),
            _ => None,
        };
        Self {
            readable: rx == Progress::Idle,
            writable: tx == Progress::Full,
            timeout: limit(tx).into_iter().chain(limit(rx)).min(),
        }
    }
}

impl Worker {
    /// The life of the thread. What it was to do when it is stopped stays undone: nothing
    /// is promised of a packet. It has none then, and no grant in use.
    pub(super) fn run(mut self) {
        let link = Arc::clone(&self.link);
        // Nobody else uses it while this thread lives.
        let mut port = lock(&link);
        while !self.kick.stopped() {
            self.kick.clear();
            match self.work(&mut *port) {
                Ok(wait) => self.wait(&*port, &wait),
                Err(broken) => {
                    self.fault.raise(broken);
                    break;
                }
            }
        }
    }

    /// Moves all packets that can be moved now.
    fn work(&mut self, port: &mut dyn Port) -> Result<Wait, Broken> {
        loop {
            let now = Instant::now();
            let tx = if port.flush() {
                Progress::Full
            } else {
                let (progress, notify) = self.tx.run(port, now)?;
                if notify {
                    self.guest.raise(self.tx_port);
                }
                progress
            };
            let (rx, notify) = self.rx.run(port, now)?;
            if notify {
                self.guest.raise(self.rx_port);
            }
            // Asked each time round: a guest can see to it that there is always more.
            if self.kick.stopped() {
                return Ok(Wait::default());
            }
            let mut again = tx == Progress::More || rx == Progress::More;
            if tx == Progress::Idle {
                again |= self.tx.sleep()?;
            }
            if rx == Progress::Starved {
                again |= self.rx.sleep()?;
            }
            if !again {
                return Ok(Wait::new(tx, rx));
            }
        }
    }

    fn wait(&self, port: &dyn Port, wait: &Wait) {
        let timeout = wait
            .timeout
            .and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, wait.readable);
        flags.set(PollFlags::OUT, wait.writable);
        let kick = PollFd::from_borrowed_fd(self.kick.as_fd(), PollFlags::IN);
        // A signal is as good as a descriptor: the loop looks at everything.
        let _ = match port.event() {
            // One that is not asked for anything would still report its end, for ever.
            Some(event) if !flags.is_empty() => {
                let mut fds = [kick, PollFd::from_borrowed_fd(event, flags)];
                poll(&mut fds, timeout.as_ref())
            }
            _ => poll(&mut [kick], timeout.as_ref()),
        };
    }
}
