//! The side that gets the VM.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blanket_migration::handover::{Destination, DestinationDoes, Memory};
use blanket_migration::link::{self, Link, Server, Token};
use blanket_migration::message::{Hello, Id, Message, Purpose, Verdict, acknowledge};

use libc::EFD_CLOEXEC;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::retry_on_intr;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::arrival::{Arrival, Pull};
use super::disks::Images;
use super::lanes::{Comes, lanes_of};
use super::{Bases, NotGiven, ReceiveError, UserFaults};
use crate::instance::{Error, Instance};
use crate::saved::{self, Moving, ResumeError, now_ns};
use crate::sync::lock;
use crate::vm::Vm;

/// How long is waited after a connection that could not be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// Where a VM may come from.
pub struct Incoming {
    listener: TcpListener,
    server: Server,
    given: Mutex<Option<WhenGiven>>,
    /// What its memory could follow by, or why not.
    faults: Mutex<Result<UserFaults, String>>,
}

/// What is done when a VM is given.
type WhenGiven = Box<dyn FnOnce() -> std::io::Result<()> + Send>;

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
pub(super) enum Next {
    /// Somebody who has the token.
    Link(Link, Hello),
    /// Nobody: what else was waited for has come.
    Other,
}

pub(super) fn event() -> std::io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// An event, for whoever waits for it.
pub(super) fn borrowed(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as the event, which is borrowed as long.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

pub(super) fn is_readable(event: &impl AsRawFd, within: &[PollFd<'_>]) -> bool {
    let fd = event.as_raw_fd();
    let mut of_it = within.iter().filter(|it| it.as_fd().as_raw_fd() == fd);
    of_it.any(|it| !it.revents().is_empty())
}

impl Incoming {
    /// Listens with a key and a token of its own. A part of the VM's memory may follow by
    /// `faults`, which this process has opened.
    ///
    /// # Errors
    /// There are no random bytes.
    pub fn new(
        listener: TcpListener,
        faults: Result<UserFaults, String>,
    ) -> Result<Self, link::Error> {
        Ok(Self {
            listener,
            server: Server::new()?,
            given: Mutex::default(),
            faults: Mutex::new(faults),
        })
    }

    /// Why all of the memory must come with the VM; empty if not.
    fn whole(&self) -> String {
        lock(&self.faults)
            .as_ref()
            .err()
            .cloned()
            .unwrap_or_default()
    }

    /// What its memory follows by; once.
    fn take_faults(&self) -> std::io::Result<UserFaults> {
        let taken = Err("it is used".to_owned());
        std::mem::replace(&mut *lock(&self.faults), taken).map_err(std::io::Error::other)
    }

    /// The next connection, whoever it is.
    #[cfg(test)]
    pub(super) fn answer(&self) -> Link {
        let (socket, _) = self.listener.accept().expect("a connection");
        self.server.answer(socket).expect("TLS")
    }

    /// Has something done when the VM is given, before it runs; if that fails it does not.
    pub fn when_given(&self, does: impl FnOnce() -> std::io::Result<()> + Send + 'static) {
        *lock(&self.given) = Some(Box::new(does));
    }

    /// Where the source is to connect.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// What the source needs, beside the address.
    #[must_use]
    pub fn token(&self) -> &Token {
        self.server.token()
    }

    /// The next connection of somebody who has the token; none once `killed` is readable, or
    /// `other`.
    pub(super) fn connection(
        &self,
        killed: &EventFd,
        other: Option<BorrowedFd<'_>>,
    ) -> Result<Next, Error> {
        let failed = |error: std::io::Error| ReceiveError::Hello(error.into());
        loop {
            let mut wanted = vec![
                PollFd::new(&self.listener, PollFlags::IN),
                PollFd::from_borrowed_fd(borrowed(killed), PollFlags::IN),
            ];
            wanted.extend(other.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
            let polled = retry_on_intr(|| poll(&mut wanted, None));
            polled.map_err(|error| failed(error.into()))?;
            if is_readable(killed, &wanted) {
                return Err(NotGiven::Killed.into());
            }
            if other.is_some_and(|it| is_readable(&it, &wanted)) {
                return Ok(Next::Other);
            }
            let (socket, peer) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) => {
                    // It passes, as one that has gone again, or too many open files: the VM may
                    // need the next one.
                    tracing::warn!(%error, "cannot accept a connection");
                    std::thread::sleep(PAUSE);
                    continue;
                }
            };
            let mut link = match self.server.answer(socket) {
                Ok(link) => link,
                Err(error) => {
                    tracing::warn!(%peer, "a connection is refused: {error}");
                    continue;
                }
            };
            match Hello::read(&mut link) {
                Ok(hello) if self.token().is_secret(&hello.secret) => {
                    link.trusted().map_err(failed)?;
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
        let (link, hello) = self.first(&incoming)?;
        let given = Arc::new(Given::new(hello.id).map_err(Error::Identity)?);
        {
            let mut present = lock(&self.incoming);
            if self.dismissed.load(Ordering::SeqCst) {
                return Err(NotGiven::Killed.into());
            }
            *present = Some(Arc::clone(&given));
        }
        let lanes = lanes_of(&incoming, &self.killed, &link, &hello)?;
        let mut comes = Comes { link, lanes };
        // Not held while it is received: devices are looked at then, too.
        let images = Images::of(&lock(&self.devices), |_| true);
        let bases = Bases::of(&lock(&self.devices));
        let mut missing = None;
        let received = images.and_then(|mut images| {
            let moving = Moving {
                images: &mut images,
                bases: Some(&bases),
                answers: &mut |comes: &mut &mut Comes| acknowledge(&mut comes.link, now_ns()),
                may_follow: incoming.whole().is_empty(),
                missing: &mut missing,
            };
            self.receive(&mut comes, Some(moving), None)
        });
        // All that is left is said over the link.
        let Comes { link, lanes } = comes;
        drop(lanes);
        let mut link = Some(link);
        let mut arrival = None;
        let vm = received.map_err(Error::from).and_then(|received| {
            tracing::debug!("all that comes before the VM is here");
            if let Some(missing) = missing {
                let follows = incoming
                    .take_faults()
                    .and_then(|faults| Arrival::begin(faults, received.memory(), missing, self));
                arrival = Some(follows.map_err(ReceiveError::Follow)?);
                *lock(&self.arrival) = arrival.clone();
            }
            let memory = arrival.as_ref().map_or(Memory::Whole, |_| Memory::Apart);
            self.go_on(received, true, arrival.clone(), || {
                given.wait(memory, &incoming, &self.killed, &mut link)?;
                let when = lock(&incoming.given).take();
                when.map_or(Ok(()), |does| does())
                    .map_err(Error::WhenGiven)?;
                let Some(arrival) = &arrival else {
                    return Ok(());
                };
                // What is needed to start it is served, too.
                let (incoming, given) = (Arc::clone(&incoming), Arc::clone(&given));
                let follows = arrival.follow(Arc::clone(self), incoming, given, link.take());
                follows.map_err(|error| ReceiveError::Follow(error).into())
            })
        });
        let word = match &vm {
            Ok(_) => Some(given.started()),
            Err(_) => lock(&given.state).gives_up(),
        };
        match (word, &mut link, &arrival) {
            // Not heard is as good as lost.
            (Some(word), Some(link), _) => drop(word.write(link)),
            (Some(word), None, Some(arrival)) => arrival.word(word),
            _ => {}
        }
        let vm = vm.inspect_err(|_| {
            if let Some(arrival) = &arrival {
                arrival.end();
            }
        })?;
        tracing::debug!("the VM runs");
        for network in self.networks() {
            network.announce();
        }
        match arrival {
            Some(arrival) if arrival.pull().lost => self.loses_memory(),
            Some(arrival) => arrival.settle(&given),
            None => answer_later(Arc::clone(self), incoming, given, link),
        }
        Ok(vm)
    }

    /// The VM that came has ended: what is missing of its memory is not needed.
    pub(crate) fn end_arrival(&self) {
        let arrival = lock(&self.arrival).clone();
        let given = lock(&self.incoming).clone();
        if let Some(arrival) = arrival.filter(|it| it.is_apart()) {
            arrival.release(given.as_deref());
        }
    }

    /// Whether a part of its memory has not come yet.
    pub(crate) fn is_apart(&self) -> bool {
        lock(&self.arrival).as_ref().is_some_and(|it| it.is_apart())
    }

    /// A part of its memory is nowhere any more: it does nothing more, until it is killed.
    pub(crate) fn loses_memory(&self) {
        if let Some(running) = &lock(&self.now).running {
            running.handle.hold();
        }
    }

    /// How the memory of the VM that came follows it, if it does not come with it.
    #[must_use]
    pub fn pull(&self) -> Option<Pull> {
        lock(&self.arrival).as_ref().map(|arrival| arrival.pull())
    }

    /// The VM that has come here waits for a source that cannot be heard: by its user's word,
    /// who knows that it is nowhere else and never will be, it runs. False: it does not wait.
    #[must_use]
    pub fn claim_incoming(&self) -> bool {
        let given = lock(&self.incoming).clone();
        given.is_some_and(|given| given.claim())
    }

    /// Nobody is to come here any more, or what has come is given up, unless it runs, or is
    /// being started: false then. If true, no VM will run here, and the process is to end.
    #[must_use]
    pub fn dismiss(&self) -> bool {
        let present = lock(&self.incoming);
        let can = match &*present {
            Some(given) => given.dismiss(),
            None => self.boots() == 0,
        };
        if can {
            self.dismissed.store(true, Ordering::SeqCst);
        }
        can
    }

    /// Whether nothing runs here, and nothing has come.
    #[must_use]
    pub fn awaits(&self) -> bool {
        self.arrival().is_none() && self.boots() == 0
    }

    /// What the VM that has come here, or is coming, is doing.
    pub(super) fn arrival(&self) -> Option<Destination> {
        let given = lock(&self.incoming).clone();
        given.map(|given| *lock(&given.state))
    }

    /// The link of the first one that brings a VM that can be had here.
    fn first(&self, incoming: &Incoming) -> Result<(Link, Hello), Error> {
        loop {
            let Next::Link(mut link, hello) = incoming.connection(&self.killed, None)? else {
                continue;
            };
            match hello.purpose {
                Purpose::Asks | Purpose::Mourns => {
                    // Nothing was ever received here.
                    let _ = Message::Gone.write(&mut link);
                    continue;
                }
                // Of a VM that could not be had, or whose source has given up.
                Purpose::Joins { .. } => continue,
                Purpose::Moves { .. } | Purpose::Tries => {}
            }
            let offered = saved::offered(&mut link).inspect_err(|error| {
                tracing::warn!("a connection is refused: {error}");
            });
            let Ok(machine) = offered else { continue };
            let fits = match &self.spec().uuid {
                Some(uuid) if *uuid != machine.uuid => Err(ResumeError::Impossible(format!(
                    "it waits for another VM, whose uuid is {uuid}"
                ))),
                _ => machine.moves_to(self),
            };
            let verdict = match &fits {
                Ok(()) => Verdict::Fits {
                    whole: incoming.whole(),
                },
                Err(ResumeError::Impossible(why)) => Verdict::Unfit(why.clone()),
                Err(error) => Verdict::Unfit(error.to_string()),
            };
            let heard = verdict.write(&mut link);
            if matches!(hello.purpose, Purpose::Moves { .. }) {
                fits?;
                if heard.is_ok() {
                    return Ok((link, hello));
                }
            }
        }
    }
}

impl Given {
    /// It is not wanted any more. False: it runs here, or may.
    fn dismiss(&self) -> bool {
        let mut state = lock(&self.state);
        let can = matches!(*state, Destination::Receiving | Destination::Waiting(_));
        if can {
            // Its process ends, and with it the link: that is what the source hears.
            let _ = state.gives_up();
        }
        can || *state == Destination::Gone
    }

    /// One that is being received.
    fn new(id: Id) -> std::io::Result<Self> {
        Ok(Self {
            id,
            state: Mutex::new(Destination::Receiving),
            lost: AtomicBool::new(false),
            claimed: event()?,
        })
    }

    /// One that was given, and is being started.
    #[cfg(test)]
    pub(super) fn starting(id: Id, memory: Memory) -> Self {
        let given = Self::new(id).expect("an event");
        *lock(&given.state) = Destination::Starting(memory);
        given
    }

    /// It runs. What to say.
    pub(super) fn started(&self) -> Message {
        lock(&self.state).started()
    }

    /// What is said first over a new link.
    pub(super) fn greets(&self) -> Option<Message> {
        lock(&self.state).greets()
    }

    /// Nothing is missing any more. What to say.
    pub(super) fn pulled(&self) -> Option<Message> {
        lock(&self.state).pulled()
    }

    /// Its user knows that the VM is nowhere else, and never will be. False: its source can
    /// be heard, or it is not here, or runs already.
    fn claim(&self) -> bool {
        let waits = *lock(&self.state) == Destination::Waiting(Memory::Whole);
        waits && self.lost.load(Ordering::SeqCst) && self.claimed.write(1).is_ok()
    }

    /// Says that all is ready, and waits until the source has given the VM, over as many links
    /// as it takes.
    fn wait(
        &self,
        memory: Memory,
        incoming: &Incoming,
        killed: &EventFd,
        link: &mut Option<Link>,
    ) -> Result<(), Error> {
        let mut does = lock(&self.state).received(memory);
        loop {
            match does {
                DestinationDoes::Starts => {
                    tracing::debug!("the VM is given");
                    return Ok(());
                }
                DestinationDoes::Discards | DestinationDoes::Stops => {
                    return Err(NotGiven::Kept.into());
                }
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
    pub(super) fn again(
        &self,
        incoming: &Incoming,
        killed: &EventFd,
    ) -> Result<Option<Link>, Error> {
        self.lost.store(true, Ordering::SeqCst);
        let waits = *lock(&self.state) == Destination::Waiting(Memory::Whole);
        loop {
            let claimed = waits.then_some(borrowed(&self.claimed));
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
            if hello.purpose == Purpose::Mourns {
                let (does, word) = {
                    let mut state = lock(&self.state);
                    (state.bereft(), state.greets())
                };
                if let Some(word) = word {
                    let _ = word.write(&mut link);
                }
                match does {
                    DestinationDoes::Discards | DestinationDoes::Stops => {
                        return Err(NotGiven::Bereft.into());
                    }
                    _ => continue,
                }
            }
            refuse(&mut link, &hello);
        }
    }
}

/// Answers somebody who has the token and comes while another VM is here, or coming.
pub(super) fn refuse(link: &mut Link, hello: &Hello) {
    tracing::warn!(purpose = ?hello.purpose, "a connection is refused: another VM has come");
    // Not heard is as good as lost.
    let _ = match hello.purpose {
        // Who mourns has been answered, or means a VM that was never here.
        Purpose::Mourns | Purpose::Joins { .. } => Ok(()),
        Purpose::Asks => Message::Gone.write(link),
        Purpose::Moves { .. } | Purpose::Tries => {
            // Heard to its end, or the answer may be lost.
            let _ = saved::offered(&mut *link);
            Verdict::Unfit("another VM has come there already".into()).write(link)
        }
    };
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
    use std::io::{Read as _, Write as _};
    use std::net::TcpStream;

    use blanket_migration::lanes::Gathered;

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
            let given = Given::new([7; 16]).expect("an event");
            *lock(&given.state) = Destination::Waiting(Memory::Whole);
            Self {
                incoming: Incoming::new(listener, Err("no".into())).expect("random bytes"),
                given,
                killed: event().expect("an event"),
            }
        }

        fn wait(&self) -> Result<(), Error> {
            let whole = Memory::Whole;
            self.given
                .wait(whole, &self.incoming, &self.killed, &mut None)
        }

        /// The source connects.
        fn link(&self) -> Link {
            let at = self.incoming.listener.local_addr().expect("an address");
            let socket = TcpStream::connect(at).expect("connected");
            Link::to(socket, self.incoming.token()).expect("the right one")
        }

        fn hello(&self, id: Id, purpose: Purpose) -> Hello {
            Hello {
                id,
                secret: self.incoming.token().secret(),
                purpose,
            }
        }

        fn greets(&self, id: Id, purpose: Purpose) -> Link {
            let mut link = self.link();
            let hello = self.hello(id, purpose);
            hello.write(&mut link).expect("said");
            link
        }

        /// The source asks again.
        fn asks(&self, id: Id) -> Link {
            self.greets(id, Purpose::Asks)
        }

        /// Both ends of the link over which a VM comes.
        fn first(&self) -> (Link, Link) {
            std::thread::scope(|s| {
                let there = s.spawn(|| self.incoming.answer());
                (self.link(), there.join().expect("no panic"))
            })
        }

        fn lanes(&self, link: &Link, lanes: u8) -> Result<Option<Gathered>, Error> {
            let hello = self.hello([7; 16], Purpose::Moves { lanes });
            lanes_of(&self.incoming, &self.killed, link, &hello)
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
    fn lanes_are_those_of_the_vm_that_comes() {
        let played = Played::new();
        let (_source, link) = played.first();
        assert!(played.lanes(&link, 0).expect("none").is_none());
        let came = std::thread::scope(|s| {
            let came = s.spawn(|| played.lanes(&link, 2));
            let mut second = played.greets([7; 16], Purpose::Joins { lane: 1 });
            let mut others = [
                // Another VM's, one too many, and one that is there already.
                played.greets([8; 16], Purpose::Joins { lane: 0 }),
                played.greets([7; 16], Purpose::Joins { lane: 2 }),
                played.greets([7; 16], Purpose::Joins { lane: 1 }),
            ];
            Played::hears(&mut played.asks([8; 16]), Message::Gone);
            for other in &mut others {
                let hung_up = other.read(&mut [0]);
                assert!(!matches!(hung_up, Ok(1..)), "{hung_up:?}");
            }
            let mut first = played.greets([7; 16], Purpose::Joins { lane: 0 });
            first.write_all(b"\x02\0\0\0in").expect("sent");
            second.write_all(b"\x05\0\0\0 turn").expect("sent");
            let mut come = [0; 7];
            let mut lanes = came.join().expect("no panic").expect("two").expect("two");
            lanes.read_exact(&mut come).expect("all");
            come
        });
        assert_eq!(&came, b"in turn");
    }

    #[test]
    fn lanes_are_not_waited_for_when_the_source_is_gone() {
        let played = Played::new();
        let (source, link) = played.first();
        std::thread::scope(|s| {
            let came = s.spawn(|| played.lanes(&link, 2));
            let _one = played.greets([7; 16], Purpose::Joins { lane: 1 });
            drop(source);
            let lost = came.join().expect("no panic");
            assert!(
                matches!(lost, Err(Error::Receive(ReceiveError::Hello(_)))),
                "{lost:?}"
            );
        });
        let (_source, link) = played.first();
        played.killed.write(1).expect("an event");
        let killed = played.lanes(&link, 2);
        assert!(matches!(killed, Err(Error::NotGiven(NotGiven::Killed))));
    }

    #[test]
    fn one_that_is_not_wanted_does_not_run() {
        for (state, can) in [
            (Destination::Receiving, true),
            (Destination::Waiting(Memory::Whole), true),
            (Destination::Waiting(Memory::Apart), true),
            (Destination::Starting(Memory::Whole), false),
            (Destination::Pulling, false),
            (Destination::Running(Memory::Whole), false),
            (Destination::Lost, false),
            (Destination::Gone, true),
        ] {
            let played = Played::new();
            *lock(&played.given.state) = state;
            assert_eq!(played.given.dismiss(), can, "{state:?}");
            let after = if can { Destination::Gone } else { state };
            assert_eq!(*lock(&played.given.state), after);
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
        assert_eq!(
            *lock(&played.given.state),
            Destination::Starting(Memory::Whole)
        );
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
    fn one_that_lacks_memory_is_gone_when_its_source_has_ended() {
        let mourns = |played: &Played, says| {
            let at = played.incoming.address().expect("an address");
            let token = played.incoming.token();
            let socket = TcpStream::connect(at).expect("connected");
            let mut link = Link::to(socket, token).expect("the right one");
            let said = crate::migration::mourn(&mut link, token);
            assert_eq!(said.expect("said"), says);
        };
        let played = Played::new();
        *lock(&played.given.state) = Destination::Waiting(Memory::Apart);
        std::thread::scope(|s| {
            s.spawn(|| mourns(&played, Message::Gone));
            let bereft = played.wait();
            assert!(matches!(bereft, Err(Error::NotGiven(NotGiven::Bereft))));
        });
        assert!(!played.given.claim(), "nobody has it");

        // Of one that is all here its user knows better.
        let played = Played::new();
        std::thread::scope(|s| {
            s.spawn(|| {
                mourns(&played, Message::Ready);
                played.claims();
            });
            played.wait().expect("claimed");
        });
    }

    #[test]
    fn it_runs_by_its_users_word_when_its_source_is_lost() {
        let played = Played::new();
        std::thread::scope(|s| {
            s.spawn(|| played.claims());
            played.wait().expect("claimed");
        });
        assert_eq!(
            *lock(&played.given.state),
            Destination::Starting(Memory::Whole)
        );
        assert!(!played.given.claim(), "once is enough");
    }
}
