//! The side that gets the VM.

use std::net::TcpListener;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use blanket_migration::handover::{Destination, DestinationDoes};
use blanket_migration::link::{self, Link, Server, Token};
use blanket_migration::message::{Hello, Id, Message, Purpose, Verdict, acknowledge};

use libc::EFD_CLOEXEC;
use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::disks::Images;
use super::{NotGiven, ReceiveError};
use crate::instance::{Error, Instance};
use crate::saved::{self, Moving, ResumeError};
use crate::sync::lock;
use crate::vm::Vm;

/// Where a VM may come from.
#[derive(Debug)]
pub struct Incoming {
    listener: TcpListener,
    server: Server,
}

/// What is known of the VM that came.
#[derive(Debug)]
pub(crate) struct Given {
    id: Id,
    state: Mutex<Destination>,
    /// Its source cannot be heard: only then its user may say what became of it.
    lost: AtomicBool,
    /// Readable once he has.
    claimed: EventFd,
}

/// Who comes next.
enum Next {
    /// Somebody who has the token.
    Link(Link, Hello),
    /// Nobody: the user knows that the VM is nowhere else.
    Claimed,
}

fn event() -> std::io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

fn is_readable(event: &EventFd, within: &[PollFd<'_>]) -> bool {
    let fd = event.as_raw_fd();
    let mut of_it = within.iter().filter(|it| it.as_fd().as_raw_fd() == fd);
    of_it.any(|it| !it.revents().is_empty())
}

impl Incoming {
    /// Listens with a key and a token of its own.
    ///
    /// # Errors
    /// There are no random bytes.
    pub fn new(listener: TcpListener) -> Result<Self, link::Error> {
        Ok(Self {
            listener,
            server: Server::new()?,
        })
    }

    /// What the source needs, beside the address.
    #[must_use]
    pub fn token(&self) -> &Token {
        self.server.token()
    }

    /// The next connection of somebody who has the token; none once `killed` is readable, or
    /// `claimed`.
    fn connection(&self, killed: &EventFd, claimed: Option<&EventFd>) -> Result<Next, Error> {
        let failed = |error: std::io::Error| ReceiveError::Hello(error.into());
        loop {
            let mut wanted = vec![PollFd::new(&self.listener, PollFlags::IN)];
            for event in [Some(killed), claimed].into_iter().flatten() {
                // SAFETY: the descriptor is open as long as what it is borrowed from, which
                // outlives this call.
                let event = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
                wanted.push(PollFd::from_borrowed_fd(event, PollFlags::IN));
            }
            poll(&mut wanted, None).map_err(|error| failed(error.into()))?;
            if is_readable(killed, &wanted) {
                return Err(NotGiven::Killed.into());
            }
            if claimed.is_some_and(|it| is_readable(it, &wanted)) {
                return Ok(Next::Claimed);
            }
            let (socket, peer) = self.listener.accept().map_err(failed)?;
            let mut link = match self.server.answer(socket) {
                Ok(link) => link,
                Err(error) => {
                    tracing::warn!(%peer, "a connection is refused: {error}");
                    continue;
                }
            };
            match Hello::read(&mut link) {
                Ok(hello) if self.token().is_secret(&hello.secret) => {
                    return Ok(Next::Link(link, hello));
                }
                Ok(_) => tracing::warn!(%peer, "a connection is refused: it has another token"),
                Err(error) => tracing::warn!(%peer, "a connection is refused: {error}"),
            }
        }
    }
}

impl Instance {
    /// Waits for a VM, and starts it when its source has given it.
    ///
    /// # Errors
    /// It did not come, cannot be had here, or was kept; nothing is left running.
    pub fn receive_from(self: &Arc<Self>, incoming: Incoming) -> Result<Vm, Error> {
        let incoming = Arc::new(incoming);
        let (mut link, hello) = self.first(&incoming)?;
        let given = Arc::new(Given {
            id: hello.id,
            state: Mutex::new(Destination::Receiving),
            lost: AtomicBool::new(false),
            claimed: event().map_err(Error::Identity)?,
        });
        *lock(&self.incoming) = Some(Arc::clone(&given));
        // Not held while it is received: devices are looked at then, too.
        let images = Images::of(&lock(&self.devices));
        let received = images.and_then(|mut images| {
            let moving = Moving {
                images: &mut images,
                answers: &mut |link: &mut &mut Link| acknowledge(link),
            };
            self.receive(&mut link, Some(moving))
        });
        let mut link = Some(link);
        let vm = received.map_err(Error::from).and_then(|received| {
            tracing::debug!("all of the VM is here");
            self.go_on(received, true, || {
                given.wait(&incoming, &self.killed, &mut link)
            })
        });
        let word = {
            let mut state = lock(&given.state);
            match &vm {
                Ok(_) => Some(state.started()),
                Err(_) => state.gives_up(),
            }
        };
        if let (Some(word), Some(link)) = (word, &mut link) {
            // Not heard is as good as lost.
            let _ = word.write(link);
        }
        let vm = vm?;
        tracing::debug!("the VM runs");
        for network in self.networks() {
            network.announce();
        }
        answer_later(Arc::clone(self), incoming, given, link);
        Ok(vm)
    }

    /// The VM that has come here waits for a source that cannot be heard: by its user's word,
    /// who knows that it is nowhere else and never will be, it runs. False: it does not wait.
    #[must_use]
    pub fn claim_incoming(&self) -> bool {
        let given = lock(&self.incoming).clone();
        given.is_some_and(|given| given.claim())
    }

    /// The link of the first one that brings a VM that can be had here.
    fn first(&self, incoming: &Incoming) -> Result<(Link, Hello), Error> {
        loop {
            let Next::Link(mut link, hello) = incoming.connection(&self.killed, None)? else {
                continue;
            };
            if hello.purpose == Purpose::Asks {
                // Nothing was ever received here.
                let _ = Message::Gone.write(&mut link);
                continue;
            }
            let offered = saved::offered(&mut link).inspect_err(|error| {
                tracing::warn!("a connection is refused: {error}");
            });
            let Ok(machine) = offered else { continue };
            let fits = machine.moves_to(self);
            let verdict = match &fits {
                Ok(()) => Verdict::Fits,
                Err(ResumeError::Impossible(why)) => Verdict::Unfit(why.clone()),
                Err(error) => Verdict::Unfit(error.to_string()),
            };
            let heard = verdict.write(&mut link);
            if hello.purpose == Purpose::Moves {
                fits?;
                if heard.is_ok() {
                    return Ok((link, hello));
                }
            }
        }
    }
}

impl Given {
    /// Its user knows that the VM is nowhere else, and never will be. False: its source can
    /// be heard, or it is not here, or runs already.
    fn claim(&self) -> bool {
        let waits = *lock(&self.state) == Destination::Waiting;
        waits && self.lost.load(Ordering::SeqCst) && self.claimed.write(1).is_ok()
    }

    /// Says that all is ready, and waits until the source has given the VM, over as many links
    /// as it takes.
    fn wait(
        &self,
        incoming: &Incoming,
        killed: &EventFd,
        link: &mut Option<Link>,
    ) -> Result<(), Error> {
        let mut does = lock(&self.state).received();
        loop {
            match does {
                DestinationDoes::Starts => {
                    tracing::debug!("the VM is given");
                    return Ok(());
                }
                DestinationDoes::Discards => return Err(NotGiven::Kept.into()),
                DestinationDoes::Says(message) => {
                    if let Some(link) = link {
                        let _ = message.write(link);
                    }
                }
                DestinationDoes::Listens | DestinationDoes::Waits => {
                    *link = self.again(incoming, killed)?;
                    if link.is_none() && lock(&self.state).claimed() {
                        tracing::warn!("the VM runs here by its user's word");
                        return Ok(());
                    }
                }
            }
            does = match link.as_mut().map(Message::read) {
                Some(Ok(message)) => lock(&self.state).hears(message),
                Some(Err(error)) => {
                    tracing::warn!(%error, "the link is lost; the VM waits for its source");
                    lock(&self.state).loses()
                }
                None => DestinationDoes::Listens,
            };
        }
    }

    /// The next link of the same source, greeted; none if the user claims the VM.
    fn again(&self, incoming: &Incoming, killed: &EventFd) -> Result<Option<Link>, Error> {
        self.lost.store(true, Ordering::SeqCst);
        let waits = *lock(&self.state) == Destination::Waiting;
        loop {
            let claimed = waits.then_some(&self.claimed);
            let Next::Link(mut link, hello) = incoming.connection(killed, claimed)? else {
                return Ok(None);
            };
            if hello.purpose == Purpose::Asks && hello.id == self.id {
                if let Some(message) = lock(&self.state).greets() {
                    let _ = message.write(&mut link);
                }
                self.lost.store(false, Ordering::SeqCst);
                // It lives: what was said of it does not count. Nothing may have been.
                let _ = self.claimed.read();
                return Ok(Some(link));
            }
            tracing::warn!("another VM is refused: one is here already");
            let _ = match hello.purpose {
                Purpose::Asks => Message::Gone.write(&mut link),
                Purpose::Moves | Purpose::Tries => {
                    // Heard to its end, or the answer may be lost.
                    let _ = saved::offered(&mut link);
                    Verdict::Unfit("another VM has come there already".into()).write(&mut link)
                }
            };
        }
    }
}

/// Tells a source that asks again, having lost the answer, that the VM runs, until it has
/// said that it knows.
fn answer_later(
    instance: Arc<Instance>,
    incoming: Arc<Incoming>,
    given: Arc<Given>,
    mut link: Option<Link>,
) {
    let answers = move || {
        while !matches!(link.as_mut().map(Message::read), Some(Ok(Message::Known))) {
            match given.again(&incoming, &instance.killed) {
                Ok(new) => link = new,
                Err(_) => return,
            }
        }
    };
    if let Err(error) = crate::thread::named("moved").spawn(answers) {
        tracing::warn!(%error, "a source that asks again gets no answer");
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpStream;

    use super::*;

    /// A destination that has all of a VM, and a source that is played by hand.
    struct Played {
        incoming: Incoming,
        given: Given,
        killed: EventFd,
    }

    impl Played {
        fn new() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            Self {
                incoming: Incoming::new(listener).expect("random bytes"),
                given: Given {
                    id: [7; 16],
                    state: Mutex::new(Destination::Waiting),
                    lost: AtomicBool::new(false),
                    claimed: event().expect("an event"),
                },
                killed: event().expect("an event"),
            }
        }

        fn wait(&self) -> Result<(), Error> {
            self.given.wait(&self.incoming, &self.killed, &mut None)
        }

        /// The source asks again.
        fn asks(&self, id: Id) -> Link {
            let at = self.incoming.listener.local_addr().expect("an address");
            let token = self.incoming.token();
            let socket = TcpStream::connect(at).expect("connected");
            let mut link = Link::to(socket, token).expect("the right one");
            let hello = Hello {
                id,
                secret: token.secret(),
                purpose: Purpose::Asks,
            };
            hello.write(&mut link).expect("said");
            link
        }

        fn hears(link: &mut Link, wanted: Message) {
            assert_eq!(Message::read(link).expect("a word"), wanted);
        }

        fn claims(&self) {
            while !self.given.claim() {
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn it_runs_when_it_is_given() {
        let played = Played::new();
        std::thread::scope(|s| {
            s.spawn(|| {
                // Another one's VM was never here; its own is.
                Played::hears(&mut played.asks([8; 16]), Message::Gone);
                let mut link = played.asks([7; 16]);
                Played::hears(&mut link, Message::Ready);
                Message::Go.write(&mut link).expect("said");
            });
            played.wait().expect("given");
        });
        assert_eq!(*lock(&played.given.state), Destination::Starting);
    }

    #[test]
    fn it_is_gone_when_its_source_keeps_it_or_it_is_killed() {
        let played = Played::new();
        std::thread::scope(|s| {
            s.spawn(|| {
                let mut link = played.asks([7; 16]);
                Message::Cancel.write(&mut link).expect("said");
                Played::hears(&mut link, Message::Ready);
            });
            let kept = played.wait();
            assert!(matches!(kept, Err(Error::NotGiven(NotGiven::Kept))));
        });
        let played = Played::new();
        played.killed.write(1).expect("written");
        let killed = played.wait();
        assert!(matches!(killed, Err(Error::NotGiven(NotGiven::Killed))));
        assert!(!Played::new().given.claim(), "its source can be heard");
    }

    #[test]
    fn it_runs_by_its_users_word_when_its_source_is_lost() {
        let played = Played::new();
        std::thread::scope(|s| {
            s.spawn(|| played.claims());
            played.wait().expect("claimed");
        });
        assert_eq!(*lock(&played.given.state), Destination::Starting);
        assert!(!played.given.claim(), "once is enough");
    }
}
