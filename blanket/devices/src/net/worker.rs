//! The thread of a queue: moves packets both ways, and waits for the guest, for the link,
//! and for the time when the limits let it go on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;

use super::link::{Port, SharedPort};
use super::rx::Rx;
use super::tx::{Broken, Progress, Tx};
use super::wait::Waiter;
use crate::bus::Fault;
use crate::sync::lock;
use crate::{Guest, Kick};

/// A queue, and what its thread waits for.
pub(super) struct Worker {
    pub guest: Arc<dyn Guest>,
    pub kick: Arc<Kick>,
    pub waiter: Waiter,
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
        let mut packets = true;
        while !self.kick.stopped() {
            match self.work(&mut *port, packets) {
                Ok(wait) => packets = self.wait(&*port, &wait),
                Err(broken) => {
                    self.fault.raise(broken);
                    break;
                }
            }
        }
    }

    /// Moves all packets that can be moved now; those of the link only if there may be some.
    fn work(&mut self, port: &mut dyn Port, packets: bool) -> Result<Wait, Broken> {
        loop {
            let now = Instant::now();
            let tx = if port.flush() {
                Progress::Full
            } else {
                let (progress, notify) = self.tx.run(port, now)?;
                if notify {
                    self.guest.raise(self.tx_port);
                }
                // The last packet may have been taken in part, and its receiver waits for the rest.
                match progress {
                    Progress::Idle if port.flush() => Progress::Full,
                    progress => progress,
                }
            };
            let (rx, notify) = self.rx.run(port, now, packets)?;
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

    fn wait(&mut self, port: &dyn Port, wait: &Wait) -> bool {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, wait.readable);
        flags.set(EventFlags::OUT, wait.writable);
        self.waiter.wait(port.event(), flags, wait.timeout)
    }
}
