//! What a queue's thread waits for.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use rustix::event::{Timespec, epoll};

use crate::Kick;

/// How long is waited if the kernel does not watch the link.
const UNWATCHED: Duration = Duration::from_millis(10);

/// The kernel's watch over the guest's notifications and a link, which is set up once: what is
/// asked for is nearly always the same.
pub(super) struct Waiter {
    epoll: OwnedFd,
    /// The link's descriptor, and for what it is watched.
    watched: Option<(RawFd, epoll::EventFlags)>,
}

const KICK: epoll::EventData = epoll::EventData::new_u64(0);
const LINK: epoll::EventData = epoll::EventData::new_u64(1);

impl Waiter {
    /// That each kick ends a wait of, from now on, and one that was before. It is never made
    /// unreadable: what counts is that it is written to.
    ///
    /// # Errors
    /// The host has no descriptor for it.
    pub(super) fn new(kick: &Kick) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, kick.as_fd(), KICK, flags)?;
        Ok(Self {
            epoll,
            watched: None,
        })
    }

    /// Waits for a kick, for `link`, or for some time. The link is watched if there are `flags`. It
    /// is the same descriptor each time that there is one. Says whether it may have packets.
    pub(super) fn wait(
        &mut self,
        link: Option<BorrowedFd<'_>>,
        flags: epoll::EventFlags,
        timeout: Option<Duration>,
    ) -> bool {
        // One that is not asked for anything would still report its end, for ever.
        let link = link.filter(|_| !flags.is_empty());
        let timeout = match self.watch(link, flags) {
            Ok(()) => timeout,
            Err(error) => {
                tracing::debug!(%error, "a network link is not watched");
                Some(timeout.unwrap_or(UNWATCHED).min(UNWATCHED))
            }
        };
        let timeout = timeout.map(whole_millis);
        let mut events = [MaybeUninit::uninit(); 2];
        let told = epoll::wait(&self.epoll, &mut events, timeout.as_ref());
        let quiet = |events: &[epoll::Event]| !events.iter().any(|event| { event.data } == LINK);
        let asked = self
            .watched
            .is_some_and(|(_, flags)| flags.contains(epoll::EventFlags::IN));
        // A signal is as good as a descriptor, and whoever did not ask does not know.
        !(asked && told.is_ok_and(|(events, _)| quiet(events)))
    }

    fn watch(
        &mut self,
        link: Option<BorrowedFd<'_>>,
        flags: epoll::EventFlags,
    ) -> rustix::io::Result<()> {
        let wanted = link.map(|link| (link.as_raw_fd(), flags));
        if wanted == self.watched {
            return Ok(());
        }
        match (self.watched.take(), link) {
            (Some((old, _)), Some(link)) if old == link.as_raw_fd() => {
                epoll::modify(&self.epoll, link, LINK, flags)?;
            }
            (old, link) => {
                if let Some((old, _)) = old {
                    // SAFETY: a number that is no descriptor any more is refused, and one that
                    // is another's is not in this set.
                    let old = unsafe { BorrowedFd::borrow_raw(old) };
                    let _ = epoll::delete(&self.epoll, old);
                }
                if let Some(link) = link {
                    epoll::add(&self.epoll, link, LINK, flags)?;
                }
            }
        }
        self.watched = wanted;
        Ok(())
    }
}

/// Rounded up: the older call of the kernel takes milliseconds.
fn whole_millis(time: Duration) -> Timespec {
    let millis = time.as_nanos().div_ceil(1_000_000).min(3_600_000);
    let time = Duration::from_millis(u64::try_from(millis).unwrap_or(3_600_000));
    Timespec::try_from(time).unwrap_or(Timespec {
        tv_sec: 3600,
        tv_nsec: 0,
    })
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    const LONG: Option<Duration> = Some(Duration::from_secs(60));
    const SHORT: Option<Duration> = Some(Duration::from_millis(20));

    #[test]
    fn kicks_and_the_link_end_a_wait() {
        let begin = Instant::now();
        let kick = Kick::new().expect("a descriptor");
        kick.kick();
        let mut waiter = Waiter::new(&kick).expect("a descriptor");
        let link = eventfd(0, EventfdFlags::NONBLOCK).expect("a descriptor");
        let (some, none) = (epoll::EventFlags::IN, epoll::EventFlags::empty());
        let (quiet, packets) = (false, true);
        // What was before it began, and each later one.
        assert_eq!(waiter.wait(Some(link.as_fd()), some, LONG), quiet);
        for _ in 0..3 {
            kick.kick();
            assert_eq!(waiter.wait(Some(link.as_fd()), some, LONG), quiet);
        }
        // Once only.
        let since = Instant::now();
        while since.elapsed() < SHORT.unwrap_or_default() {
            assert_eq!(waiter.wait(Some(link.as_fd()), some, SHORT), quiet);
        }
        rustix::io::write(&link, &1u64.to_ne_bytes()).expect("room");
        // As long as there is something.
        for _ in 0..3 {
            assert_eq!(waiter.wait(Some(link.as_fd()), some, LONG), packets);
        }
        // One that is not watched does not end a wait, and may have something.
        let since = Instant::now();
        assert_eq!(waiter.wait(Some(link.as_fd()), none, SHORT), packets);
        assert!(since.elapsed() >= Duration::from_millis(10));
        assert_eq!(waiter.wait(Some(link.as_fd()), some, LONG), packets);
        kick.kick();
        assert_eq!(waiter.wait(None, some, LONG), packets);
        assert_eq!(waiter.wait(Some(link.as_fd()), some, LONG), packets);
        assert!(begin.elapsed() < Duration::from_secs(50));
    }
}
