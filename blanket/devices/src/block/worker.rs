//! The thread of a queue: waits for the guest, for the disk, and for the time when its
//! limits or the host's space let it go on.

use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::queue;
use crate::bus::Fault;
use crate::sync::lock;
use crate::{Guest, Kick, Limiter};

/// How often a request is made again that found no space on the host.
const SPACE_AGAIN: Duration = Duration::from_millis(500);

/// A queue, and what its thread waits for.
pub(super) struct Worker {
    pub guest: Arc<dyn Guest>,
    pub kick: Arc<Kick>,
    pub port: u32,
    pub queue: queue::Queue,
    pub limiter: Arc<Mutex<Limiter>>,
    pub fault: Fault,
    /// When what found no space is tried again.
    pub again: Option<Instant>,
}

impl Worker {
    /// The life of the thread.
    pub(super) fn run(mut self) {
        let mut unclear = true;
        loop {
            if self.kick.stopped() {
                break;
            }
            if unclear {
                self.kick.clear();
            }
            let wait = match self.work() {
                Ok(wait) => wait,
                Err(overrun) => {
                    self.fault.raise(overrun);
                    break;
                }
            };
            unclear = self.queue.wait(Some(self.kick.as_fd()), wait);
        }
        self.drain();
    }

    /// Does all that can be done now. The time after which there may be more to do,
    /// besides what the descriptors tell.
    fn work(&mut self) -> Result<Option<Duration>, crate::ring::Overrun> {
        loop {
            // Asked each time round: a guest can see to it that there is always more.
            if self.kick.stopped() {
                return Ok(None);
            }
            self.complete();
            let now = Instant::now();
            self.try_space_again(now);
            let limited = self.queue.accept(|bytes| {
                let mut limiter = lock(&self.limiter);
                limiter.take(now, bytes)
            })?;
            // Those that were refused as well.
            self.complete();
            let space = self.queue.waits_for_space().then_some(SPACE_AGAIN);
            if limited.is_some() || self.queue.is_full() || !self.queue.sleep()? {
                return Ok(limited.into_iter().chain(space).min());
            }
            // The guest makes requests as fast as they are taken: the disk is not to wait for it.
            self.queue.begin_submitted();
        }
    }

    /// Answers what the disk has done.
    fn complete(&mut self) {
        if self.queue.complete() {
            self.guest.raise(self.port);
        }
    }

    /// Has the disk try again what found no space, from time to time.
    fn try_space_again(&mut self, now: Instant) {
        if !self.queue.waits_for_space() {
            self.again = None;
        } else if self.again.is_none_or(|again| again <= now) {
            if self.again.is_some() {
                self.queue.try_space_again();
            }
            self.again = Some(now + SPACE_AGAIN);
        }
    }

    /// Carries out what was begun, and answers it.
    fn drain(&mut self) {
        self.queue.give_up_space();
        while self.queue.busy() {
            self.complete();
            if self.queue.busy() {
                self.queue.wait(None, None);
            }
        }
        self.complete();
    }
}
