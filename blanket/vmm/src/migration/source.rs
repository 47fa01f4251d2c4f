//! The side that has the VM.

use std::io::{BufWriter, Write as _};
use std::sync::Arc;
use std::time::Instant;

use blanket_migration::clock::Ahead;
use blanket_migration::handover::{Memory, Source, SourceDoes};
use blanket_migration::lanes::Spread;
use blanket_migration::link::{self, Link, Token};
use blanket_migration::message::{Hello, Message, Purpose, Verdict, acknowledged};
use blanket_migration::precopy::PostCopy;
use blanket_snapshot::{Kind, Writer};

use super::SendError;
use super::disks::Moving;
use super::kept::Kept;
use super::outgoing::{Answer, Moved, Outgoing, Paced, Stage};
use super::sending::{Done, Sending};
use crate::entropy;
use crate::instance::Instance;
use crate::saved::{Machine, SaveError, State, now_ns};
use crate::sync::lock;
use crate::vm::{End, Then};

/// Bytes that are sent together.
const BUFFER: usize = 1 << 18;

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
        if self.is_apart() {
            return Err(SendError::Apart);
        }
        let mut present = lock(&self.outgoing);
        if moves(present.as_ref()) {
            return Err(SendError::Twice);
        }
        *present = Some(out);
        Ok(())
    }

    /// Sends the VM to the other end of a link, and ends it when it runs there. Whatever
    /// goes wrong before the destination has it, it goes on here. Once the destination may
    /// have it, it stands still until that is known ([`Stage::Doubt`]). `more` makes the links
    /// that are its lanes, as many as [`Options::lanes`] says, once the destination wants it.
    ///
    /// [`Options::lanes`]: super::Options::lanes
    ///
    /// # Errors
    /// Why it goes on here.
    pub fn send_to(
        &self,
        link: Link,
        more: impl Iterator<Item = Result<Link, link::Error>>,
        out: &Outgoing,
    ) -> Result<Moved, SendError> {
        let sent = match self.sent_to(link, more, out) {
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
    pub fn try_at(
        &self,
        mut link: Link,
        token: &Token,
        post_copy: PostCopy,
    ) -> Result<(), SendError> {
        if self.is_apart() {
            return Err(SendError::Apart);
        }
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
        let devices = lock(&self.devices);
        let machine = Machine::of(self, &running, &devices).with(&Moving::writable(&devices));
        drop(devices);
        offer(&mut link, &hello, &machine, post_copy)
    }

    fn sent_to(
        &self,
        mut link: Link,
        more: impl Iterator<Item = Result<Link, link::Error>>,
        out: &Outgoing,
    ) -> Result<Moved, SendError> {
        let running = lock(&self.now).running.clone();
        let running = running.ok_or(SendError::NotRunning)?;
        // Until it is over: no device comes or goes.
        let devices = lock(&self.devices);
        let begun = Instant::now();
        let machine = Machine::of(self, &running, &devices).with(&Moving::writable(&devices));
        let wishes = out.options.wishes;
        offer(&mut link, &out.hello, &machine, wishes.post_copy)?;
        let lanes = joined(more, out)?;
        let moving = Moving::begin(&devices).finding(&devices);
        let to = BufWriter::with_capacity(BUFFER, Paced::new(link, lanes, out));
        let mut sending = Sending::begin(&running, self.spec().vcpus, to, &machine, &moving)?;
        let mut ahead = Ahead::default();
        let (rest, apart) = sending.rounds(
            wishes,
            |writer| {
                // Else the round's pace would be that at which the network takes bytes in, and
                // what lies there would have to come first when the VM stands still.
                let mut settle = || -> Result<u64, SendError> {
                    let to = writer.mark().map_err(SaveError::from)?;
                    Ok(acknowledged(&mut to.get_mut().link)?)
                };
                settle()?;
                // Once more, when nothing is under way that this would wait for.
                let asked = now_ns();
                let said = settle()?;
                ahead.heard(asked, said, now_ns());
                Ok::<_, SendError>(())
            },
            |round, share| {
                out.note(|progress| {
                    progress.rounds += 1;
                    progress.pages += round.sent;
                    progress.found = moving.bases().found();
                    progress.dirty = round.dirty;
                    progress.share = share;
                });
            },
        )?;

        if let Some((ns, wrong)) = ahead.known() {
            tracing::debug!(ns, wrong, "the destination's clock is ahead");
        }

        let mut stood = Instant::now();
        let outcome = running.handle.standing_still_logged(
            || {
                stood = Instant::now();
                tracing::debug!("all vCPUs stand still");
                out.note(|progress| progress.stage = Stage::Standing);
                running.bus.hold();
            },
            || {
                // Just now its core wrote down what its clock said.
                let stopped_at = ahead.there(now_ns());
                let sent = self.console.standing_still(|console| {
                    running.xenstore.standing_still(|store| {
                        sending.finish(rest, apart, |domain, vcpus| {
                            let target = self.target();
                            State::read(domain, vcpus, store, console, target, stopped_at)
                        })
                    })
                });
                let moved = sent.map_err(SendError::from).and_then(|done| {
                    let Done {
                        to, pages, kept, ..
                    } = done;
                    out.note(|progress| {
                        progress.pages += pages;
                        progress.found = moving.bases().found();
                    });
                    let to = to.into_inner();
                    let to = to.map_err(std::io::IntoInnerError::into_error)?;
                    let (link, _lanes) = to.finish()?;
                    let kept = kept.map(|kept| Kept::new(&running.domain, out, kept));
                    hand_over(link, out, kept.as_ref())
                });
                let then = if moved.is_ok() {
                    Then::End(End::Moved)
                } else {
                    Then::GoOn
                };
                (moved, then)
            },
        );
        let ended = Instant::now();
        let moved = matches!(outcome, Ok(Ok(_)));
        // What is there is all that has happened: a VM that has gone does nothing more.
        if !moved {
            running.bus.go_on();
        }
        let ran = outcome??;
        let moved = Moved {
            progress: out.progress(),
            took: begun.elapsed(),
            downtime: ran.unwrap_or(ended) - stood,
            pull: ran.map(|ran| ended - ran),
        };
        tracing::info!(?moved, "the VM has moved");
        Ok(moved)
    }
}

/// Tells a destination, over a new link, that the process has ended that had the VM: whoever says
/// so has seen it. What it says of the VM.
///
/// # Errors
/// The link's.
pub fn mourn(link: &mut Link, token: &Token) -> std::io::Result<Message> {
    let hello = Hello {
        id: [0; 16],
        secret: token.secret(),
        purpose: Purpose::Mourns,
    };
    hello.write(&mut *link)?;
    Message::read(link)
}

/// Whether it is not over.
fn moves(out: Option<&Arc<Outgoing>>) -> bool {
    out.is_some_and(|it| it.progress().stage != Stage::Over)
}

/// The lanes of a migration; none if it has none.
fn joined(
    more: impl Iterator<Item = Result<Link, link::Error>>,
    out: &Outgoing,
) -> Result<Option<Spread>, SendError> {
    let mut links = Vec::new();
    for (hello, link) in out.joins().zip(more) {
        let mut link = link.map_err(SendError::Lane)?;
        hello.write(&mut link)?;
        links.push(link);
    }
    if links.len() != usize::from(out.options.lanes) {
        return Err(SendError::Lanes(links.len(), out.options.lanes));
    }
    if links.is_empty() {
        return Ok(None);
    }
    Ok(Some(Spread::over(links)?))
}

/// Begins a connection: whether the destination can have what is made so.
fn offer(
    link: &mut Link,
    hello: &Hello,
    machine: &Machine,
    post_copy: PostCopy,
) -> Result<(), SendError> {
    hello.write(&mut *link)?;
    let mut writer = Writer::new(BufWriter::new(&mut *link)).map_err(SaveError::from)?;
    let text = writer.text(Kind::Machine, machine);
    text.map_err(SaveError::from)?;
    let (mut to, _) = writer.finish().map_err(SaveError::from)?;
    to.flush()?;
    drop(to);
    match Verdict::read(link)? {
        Verdict::Fits { whole } if post_copy != PostCopy::Never && !whole.is_empty() => {
            Err(SendError::Whole(whole))
        }
        Verdict::Fits { .. } => Ok(()),
        Verdict::Unfit(why) => Err(SendError::Unfit(why)),
    }
}

/// All was sent that comes before it: the destination gets the VM, or it stays. When it began to
/// run there, if what is `kept` of its memory has followed it.
fn hand_over(
    link: Link,
    out: &Outgoing,
    kept: Option<&Kept<'_>>,
) -> Result<Option<Instant>, SendError> {
    let mut source = Source::Copying;
    source.sent(kept.map_or(Memory::Whole, |_| Memory::Apart));
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
                if let Some(kept) = kept
                    && source.serves()
                {
                    return kept.follow(source, link).map(Some);
                }
            }
            SourceDoes::Ends => {
                if let Some(link) = &mut link {
                    // Not heard, it is asked no more all the same.
                    let _ = Message::Known.write(link);
                }
                return Ok(None);
            }
            SourceDoes::GoesOn | SourceDoes::Waits => {
                return Err(lost.map_or(SendError::Refused, SendError::Link));
            }
            SourceDoes::Asks => match out.doubt(Stage::Doubt) {
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
                let moved = hand_over(self.link(), &self.out, None).map(drop);
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
