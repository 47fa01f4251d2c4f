//! The side that has the VM.

use std::io::{BufWriter, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use blanket_migration::handover::{Source, SourceDoes};
use blanket_migration::link::{Link, Token};
use blanket_migration::message::{Hello, Message, Purpose, Verdict, acknowledged};
use blanket_migration::precopy::{Control, Next, Round};
use blanket_snapshot::{Kind, Writer};

use super::disks::{Blocks, Moving};
use super::outgoing::{Answer, Moved, Outgoing, Paced, Stage};
use super::{Dirty, SendError};
use crate::entropy;
use crate::instance::{Instance, Running};
use crate::saved::memory;
use crate::saved::{Machine, SaveError, State};
use crate::sync::lock;
use crate::vm::{End, Handle, Then};

/// Bytes that are sent together.
const BUFFER: usize = 1 << 18;

/// A slow guest's time comes in slices of this length, of which it has the first part.
const SLICE: Duration = Duration::from_millis(40);
/// That part is no shorter, or to stop the guest would take longer than it runs; the slice is
/// longer then.
const RUNS: Duration = Duration::from_millis(2);

impl Instance {
    /// The migration that goes out, or went out last.
    #[must_use]
    pub fn outgoing(&self) -> Option<Arc<Outgoing>> {
        lock(&self.outgoing).clone()
    }

    /// Begins one. Only one at a time does.
    ///
    /// # Errors
    /// Another one is not over.
    pub fn begin_migration(&self, out: Arc<Outgoing>) -> Result<(), SendError> {
        let mut present = lock(&self.outgoing);
        if moves(present.as_ref()) {
            return Err(SendError::Twice);
        }
        *present = Some(out);
        Ok(())
    }

    /// Sends the VM to the other end of a link, and ends it when it runs there. Whatever
    /// goes wrong before the destination has it, it goes on here. Once the destination may
    /// have it, it stands still until that is known ([`Stage::Doubt`]).
    ///
    /// # Errors
    /// Why it goes on here.
    pub fn send_to(&self, link: Link, out: &Outgoing) -> Result<Moved, SendError> {
        let sent = match self.sent_to(link, out) {
            Err(_) if out.is_cancelled() => Err(SendError::Cancelled),
            sent => sent,
        };
        out.end(match &sent {
            Ok(moved) => Ok(*moved),
            Err(error) => Err(error.to_string()),
        });
        sent
    }

    /// Asks the other end of a link, whose token this is, whether the VM could go on there.
    /// Nothing of it is sent but what it is made of.
    ///
    /// # Errors
    /// Why it could not.
    pub fn try_at(&self, mut link: Link, token: &Token) -> Result<(), SendError> {
        // Its devices are not to be had before that is over.
        if moves(self.outgoing().as_ref()) {
            return Err(SendError::Twice);
        }
        let running = lock(&self.now).running.clone();
        let running = running.ok_or(SendError::NotRunning)?;
        let hello = Hello {
            id: entropy::bytes()?,
            secret: token.secret(),
            purpose: Purpose::Tries,
        };
        let machine = Machine::of(self, &running, &lock(&self.devices));
        offer(&mut link, &hello, &machine)
    }

    fn sent_to(&self, mut link: Link, out: &Outgoing) -> Result<Moved, SendError> {
        let running = lock(&self.now).running.clone();
        let running = running.ok_or(SendError::NotRunning)?;
        // Until it is over: no device comes or goes.
        let devices = lock(&self.devices);
        let begun = Instant::now();
        let machine = Machine::of(self, &running, &devices);
        offer(&mut link, &out.hello, &machine)?;
        let moving = Moving::begin(&devices);
        let mut sending = Sending::begin(&running, self.spec().vcpus, out, link, &moving)?;
        sending
            .writer
            .text(Kind::Machine, &machine)
            .map_err(SaveError::from)?;
        let rest = sending.rounds()?;

        let mut stood = Instant::now();
        let outcome = running.handle.standing_still_logged(
            || {
                stood = Instant::now();
                tracing::debug!("all vCPUs stand still");
                out.note(|progress| progress.stage = Stage::Standing);
                running.bus.hold();
            },
            || {
                let sent = self.console.standing_still(|console| {
                    running.xenstore.standing_still(|store| {
                        sending.finish(rest, |domain, vcpus| {
                            State::read(domain, vcpus, store, console, self.target())
                        })
                    })
                });
                let moved = sent.and_then(|link| hand_over(link, out));
                let then = if moved.is_ok() {
                    Then::End(End::Moved)
                } else {
                    Then::GoOn
                };
                (moved, then)
            },
        );
        let downtime = stood.elapsed();
        let moved = matches!(outcome, Ok(Ok(())));
        // What is there is all that has happened: a VM that has gone does nothing more.
        if !moved {
            running.bus.go_on();
        }
        outcome??;
        let moved = Moved {
            progress: out.progress(),
            took: begun.elapsed(),
            downtime,
        };
        tracing::info!(?moved, "the VM has moved");
        Ok(moved)
    }
}

/// Whether it is not over.
fn moves(out: Option<&Arc<Outgoing>>) -> bool {
    out.is_some_and(|it| it.progress().stage != Stage::Over)
}

/// Begins a connection: whether the destination can have what is made so.
fn offer(link: &mut Link, hello: &Hello, machine: &Machine) -> Result<(), SendError> {
    hello.write(&mut *link)?;
    let mut writer = Writer::new(BufWriter::new(&mut *link)).map_err(SaveError::from)?;
    let text = writer.text(Kind::Machine, machine);
    text.map_err(SaveError::from)?;
    let (mut to, _) = writer.finish().map_err(SaveError::from)?;
    to.flush()?;
    drop(to);
    match Verdict::read(link)? {
        Verdict::Fits => Ok(()),
        Verdict::Unfit(why) => Err(SendError::Unfit(why)),
    }
}

type Stream<'a> = Writer<BufWriter<Paced<'a>>>;

/// A VM that is being sent. It is logged what is written until this is dropped.
struct Sending<'a> {
    running: &'a Running,
    vcpus: u32,
    out: &'a Outgoing,
    writer: Stream<'a>,
    disks: &'a Moving,
    logged: Logged<'a>,
}

/// What is to be sent again.
struct Rest {
    memory: Dirty,
    disks: Blocks,
}

struct Logged<'a>(&'a Running);

impl Drop for Logged<'_> {
    fn drop(&mut self) {
        self.0.grants.log(false);
        // One that has ended needs no word; of one that will not stand still, the core
        // goes on to note what nobody reads.
        if let Err(error) = self.0.handle.end_log() {
            tracing::debug!(%error, "the dirty log is not ended");
        }
    }
}

impl<'a> Sending<'a> {
    fn begin(
        running: &'a Running,
        vcpus: u32,
        out: &'a Outgoing,
        link: Link,
        disks: &'a Moving,
    ) -> Result<Self, SendError> {
        let to = BufWriter::with_capacity(BUFFER, Paced::new(link, out));
        let writer = Writer::new(to).map_err(SaveError::from)?;
        running.grants.log(true);
        let logged = Logged(running);
        running.handle.log(|| ())?;
        Ok(Self {
            running,
            vcpus,
            out,
            writer,
            disks,
            logged,
        })
    }

    /// Sends memory until the rest is little; what the rest is.
    fn rounds(&mut self) -> Result<Rest, SendError> {
        let mut control = Control::new(self.out.options.wishes);
        let mut rest = None;
        let mut share = 100;
        loop {
            let begun = Instant::now();
            let sent = self.round(rest.as_ref(), share)?;
            let took = begun.elapsed();
            let left = self.take_log()?;
            let dirty = left.memory.count() + left.disks.pages();
            let round = Round { sent, took, dirty };
            let next = control.after(&round);
            tracing::debug!(?round, ?next, "a round is over");
            if let Next::Round { share: now } = next {
                share = now;
            }
            self.out.note(|progress| {
                progress.rounds += 1;
                progress.pages += sent;
                progress.dirty = dirty;
                progress.share = share;
            });
            if next == Next::Stop {
                return Ok(left);
            }
            rest = Some(left);
        }
    }

    /// Sends everything, or what is left, of a guest that has a part of its time. How many
    /// pages it was.
    fn round(&mut self, rest: Option<&Rest>, share: u32) -> Result<u64, SendError> {
        let (domain, disks) = (&self.running.domain, self.disks);
        let writer = &mut self.writer;
        slowed(&self.running.handle, share, || {
            let sent = match rest {
                None => {
                    let all = disks.all();
                    disks.write(writer, &all)?;
                    memory::write(writer, domain)? + all.pages()
                }
                Some(rest) => {
                    disks.write(writer, &rest.disks)?;
                    memory::write_dirty(writer, domain, &rest.memory)? + rest.disks.pages()
                }
            };
            // Else the round's pace would be that at which the network takes bytes in, and
            // what lies there would have to come first when the VM stands still.
            let to = writer.mark().map_err(SaveError::from)?;
            acknowledged(&mut to.get_mut().link)?;
            Ok(sent)
        })
    }

    /// What was written since it was asked last.
    fn take_log(&self) -> Result<Rest, SendError> {
        let domain = &self.running.domain;
        let mut dirty = Dirty::none(domain);
        let read = self
            .running
            .handle
            .log(|| dirty.add_logged(domain, self.vcpus))?;
        read.map_err(SaveError::from)?;
        self.running.grants.take_log(dirty.words());
        Ok(Rest {
            memory: dirty,
            disks: self.disks.take_log(),
        })
    }

    /// Sends the rest of a VM that stands still, with its state.
    fn finish<E: Into<SaveError>>(
        mut self,
        mut rest: Rest,
        state: impl FnOnce(&crate::builder::Domain, u32) -> Result<State, E>,
    ) -> Result<Link, SendError> {
        tracing::debug!("its core has written itself down");
        let domain = &self.running.domain;
        // The core notes nothing any more, and could not be told so while it stands still.
        std::mem::forget(self.logged);
        let read = rest.memory.add_logged(domain, self.vcpus);
        self.running.grants.take_log(rest.memory.words());
        self.running.grants.log(false);
        read.map_err(SaveError::from)?;
        let blocks = [&rest.disks, &self.disks.take_log()];
        for blocks in blocks {
            self.disks.write(&mut self.writer, blocks)?;
        }
        let pages = memory::write_dirty(&mut self.writer, domain, &rest.memory)?;
        let disks: u64 = blocks.iter().map(|blocks| blocks.pages()).sum();
        self.out.note(|progress| progress.pages += pages + disks);
        let state = state(domain, self.vcpus).map_err(Into::into)?;
        let text = self.writer.text(Kind::State, &state);
        text.map_err(SaveError::from)?;
        let (to, _) = self.writer.finish().map_err(SaveError::from)?;
        tracing::debug!("all of the VM is sent");
        let to = to.into_inner();
        let to = to.map_err(std::io::IntoInnerError::into_error)?;
        Ok(to.link)
    }
}

/// Does `work`, while the guest has `share` percent of its time.
fn slowed<T>(handle: &Handle, share: u32, work: impl FnOnce() -> T) -> T {
    if share >= 100 {
        return work();
    }
    let done = AtomicBool::new(false);
    std::thread::scope(|s| {
        let slower = crate::thread::named("slower").spawn_scoped(s, || {
            let runs = (SLICE * share / 100).max(RUNS);
            let stands = runs * (100 - share) / share.max(1);
            while !done.load(Ordering::Acquire) {
                // Time is what is to pass.
                if handle.paused(|| std::thread::sleep(stands)).is_none() {
                    return;
                }
                std::thread::sleep(runs);
            }
        });
        if let Err(error) = slower {
            tracing::warn!(%error, "the guest is not slowed down");
        }
        let out = work();
        done.store(true, Ordering::Release);
        out
    })
}

/// All was sent: the destination gets the VM, or it stays.
fn hand_over(link: Link, out: &Outgoing) -> Result<(), SendError> {
    let mut source = Source::Copying;
    source.sent();
    let mut link = Some(link);
    if out.is_cancelled() && source.cancels() {
        if let Some(link) = &mut link {
            // If it is not heard, it is as if the link were lost.
            let _ = Message::Cancel.write(link);
        }
        return Err(SendError::Cancelled);
    }
    loop {
        let mut lost = None;
        let does = match link.as_mut().map(Message::read) {
            Some(Ok(message)) => source.hears(message),
            Some(Err(error)) => {
                tracing::warn!(%error, "the link to the destination is lost");
                lost = Some(error);
                source.loses()
            }
            None => source.loses(),
        };
        match does {
            SourceDoes::Says(message) => {
                let said = link.as_mut().map(|link| message.write(link));
                if !matches!(said, Some(Ok(()))) {
                    link = None;
                }
            }
            SourceDoes::Ends => {
                if let Some(link) = &mut link {
                    // Not heard, it is asked no more all the same.
                    let _ = Message::Known.write(link);
                }
                return Ok(());
            }
            SourceDoes::GoesOn | SourceDoes::Waits => {
                return Err(lost.map_or(SendError::Refused, SendError::Link));
            }
            SourceDoes::Asks => match out.doubt() {
                Answer::Claimed => return Err(SendError::Refused),
                Answer::Link(mut new) => {
                    link = out.again().write(&mut new).is_ok().then_some(new);
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use blanket_migration::link::Server;
    use blanket_migration::message::Hello;

    use super::super::outgoing::Options;
    use super::*;

    /// A destination that is played by hand.
    struct Played {
        listener: TcpListener,
        server: Server,
        out: Outgoing,
    }

    impl Played {
        fn new() -> Self {
            let server = Server::new().expect("made");
            let out = Outgoing::new(Options::default(), server.token()).expect("random bytes");
            out.note(|progress| progress.stage = Stage::Standing);
            Self {
                listener: TcpListener::bind("127.0.0.1:0").expect("a port"),
                server,
                out,
            }
        }

        /// A link: the source's end, once the destination has its own.
        fn link(&self) -> Link {
            let at = self.listener.local_addr().expect("an address");
            let socket = TcpStream::connect(at).expect("connected");
            Link::to(socket, self.server.token()).expect("the right one")
        }

        fn answer(&self) -> Link {
            let (socket, _) = self.listener.accept().expect("a connection");
            self.server.answer(socket).expect("TLS")
        }

        /// What the source makes of what the destination does on one link and the next.
        fn play(
            &self,
            first: impl FnOnce(Link) + Send,
            second: impl FnOnce(&Self) + Send,
        ) -> Result<(), SendError> {
            std::thread::scope(|s| {
                s.spawn(|| {
                    first(self.answer());
                    second(self);
                });
                let moved = hand_over(self.link(), &self.out);
                self.out.note(|progress| progress.stage = Stage::Over);
                moved
            })
        }

        /// The source is in doubt, and gets another link, on which the destination says this.
        fn asked(&self, says: Message) -> Option<Message> {
            self.out.wait();
            assert_eq!(self.out.progress().stage, Stage::Doubt);
            std::thread::scope(|s| {
                let other = s.spawn(|| {
                    let mut link = self.answer();
                    let hello = Hello::read(&mut link).expect("it greets");
                    assert_eq!(
                        (hello.purpose, hello.id),
                        (Purpose::Asks, self.out.hello.id)
                    );
                    says.write(&mut link).expect("said");
                    Message::read(&mut link).ok()
                });
                self.out.ask(self.link());
                other.join().expect("no panic")
            })
        }
    }

    fn hears(link: &mut Link, wanted: Message) {
        assert_eq!(Message::read(link).expect("a word"), wanted);
    }

    fn says_ready_hears_go(mut link: Link) -> Link {
        Message::Ready.write(&mut link).expect("said");
        hears(&mut link, Message::Go);
        link
    }

    #[test]
    fn it_moves() {
        let moved = Played::new().play(
            |link| {
                let mut link = says_ready_hears_go(link);
                Message::Runs.write(&mut link).expect("said");
                hears(&mut link, Message::Known);
            },
            |_| (),
        );
        assert!(moved.is_ok(), "{moved:?}");
    }

    #[test]
    fn it_stays_where_the_link_breaks_before_go() {
        let moved = Played::new().play(drop, |_| ());
        assert!(matches!(moved, Err(SendError::Link(_))), "{moved:?}");
        let refuses = |mut link| Message::Gone.write(&mut link).expect("said");
        let moved = Played::new().play(refuses, |_| ());
        assert!(matches!(moved, Err(SendError::Refused)), "{moved:?}");
    }

    #[test]
    fn it_asks_where_the_link_breaks_after_go() {
        let played = Played::new();
        let moved = played.play(
            |link| drop(says_ready_hears_go(link)),
            |played| assert_eq!(played.asked(Message::Runs), Some(Message::Known)),
        );
        assert!(moved.is_ok(), "{moved:?}");

        let moved = Played::new().play(
            |link| drop(says_ready_hears_go(link)),
            |played| assert_eq!(played.asked(Message::Gone), None),
        );
        assert!(matches!(moved, Err(SendError::Refused)), "{moved:?}");
    }

    #[test]
    fn its_word_is_said_again_where_it_was_lost() {
        let moved = Played::new().play(
            |link| drop(says_ready_hears_go(link)),
            |played| {
                assert_eq!(played.asked(Message::Ready), Some(Message::Go));
                // That link breaks, too.
                assert_eq!(played.asked(Message::Runs), Some(Message::Known));
            },
        );
        assert!(moved.is_ok(), "{moved:?}");
    }

    #[test]
    fn another_destination_is_not_asked() {
        let (played, other) = (Played::new(), Server::new().expect("made"));
        assert!(played.out.is_to(played.server.token()));
        assert!(!played.out.is_to(other.token()));
    }

    #[test]
    fn its_user_knows_better() {
        let moved = Played::new().play(
            |link| drop(says_ready_hears_go(link)),
            |played| {
                played.out.wait();
                assert!(played.out.claim());
                assert_ne!(played.out.progress().stage, Stage::Doubt, "it is ended");
            },
        );
        assert!(matches!(moved, Err(SendError::Refused)), "{moved:?}");
        assert!(!Played::new().out.claim(), "there is no doubt");
    }

    #[test]
    fn it_is_cancelled_before_go_only() {
        let played = Played::new();
        played.out.cancel();
        let moved = played.play(|mut link| hears(&mut link, Message::Cancel), |_| ());
        assert!(matches!(moved, Err(SendError::Cancelled)), "{moved:?}");

        let played = Played::new();
        let moved = played.play(
            |link| {
                let mut link = says_ready_hears_go(link);
                played.out.cancel();
                Message::Runs.write(&mut link).expect("said");
            },
            |_| (),
        );
        assert!(moved.is_ok(), "{moved:?}");
    }
}
