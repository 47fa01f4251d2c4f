//! A migration that goes out, as others see it: how far it is, and what they can say.

use std::io::{self, Write};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use blanket_migration::handover::Source;
use blanket_migration::lanes::{self, Spread};
use blanket_migration::link::{Link, Token};
use blanket_migration::message::{Hello, Purpose};
use blanket_migration::precopy::Wishes;

use crate::entropy;
use crate::sync::lock;

/// Bytes in less than which no part of a VM comes, but a mark: its answer is a clock, and does not
/// wait for the bandwidth.
const TALK: usize = 1 << 10;

/// How it is to be done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// When memory has been sent often enough.
    pub wishes: Wishes,
    /// Bytes for each second, while the VM runs.
    pub bandwidth: Option<u64>,
    /// Connections that it is sent over, beside the first one.
    pub lanes: u8,
}

/// What it is at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// Memory is sent while the VM runs.
    #[default]
    Copying,
    /// The VM stands still.
    Standing,
    /// The destination may have it: only a new link to it can tell.
    Doubt,
    /// It runs at the destination, and the rest of its memory follows.
    Pulling,
    /// It runs at the destination, where the rest of its memory is missing until there is a new
    /// link.
    Cut,
    /// It is over.
    Over,
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// What it is at.
    pub stage: Stage,
    /// Rounds that are over.
    pub rounds: u32,
    /// Pages that were sent.
    pub pages: u64,
    /// Pages that were named instead: the destination has them in what a disk stands on.
    pub found: u64,
    /// Bytes that were sent.
    pub bytes: u64,
    /// Pages that the last round left.
    pub dirty: u64,
    /// The part of its time that the guest has, percent.
    pub share: u32,
    /// Pages that were not given with the VM, and are missing at the destination.
    pub left: u64,
    /// Pages that the destination has asked for because somebody waited for them.
    pub wanted: u64,
}

/// A VM that has moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moved {
    /// How far it had to go.
    pub progress: Progress,
    /// From the first byte to the destination's word that it runs.
    pub took: Duration,
    /// How long it ran nowhere.
    pub downtime: Duration,
    /// How long the rest of its memory took to follow it, where it did.
    pub pull: Option<Duration>,
}

/// A migration that goes out.
#[derive(Debug)]
pub struct Outgoing {
    pub(super) options: Options,
    pub(super) hello: Hello,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    progress: Progress,
    cancelled: bool,
    claimed: bool,
    link: Option<Link>,
    /// What it came to, once it is over.
    outcome: Option<Result<Moved, String>>,
}

/// What ends a doubt.
pub(super) enum Answer {
    /// The destination can be asked.
    Link(Link),
    /// The user knows that it does not have the VM.
    Claimed,
}

impl Outgoing {
    /// One that begins, to the destination that the token is of.
    ///
    /// # Errors
    /// The host gave no random bytes.
    pub fn new(options: Options, token: &Token) -> io::Result<Self> {
        let progress = Progress {
            share: 100,
            ..Progress::default()
        };
        Ok(Self {
            options,
            hello: Hello {
                id: entropy::bytes()?,
                secret: token.secret(),
                purpose: Purpose::Moves {
                    lanes: options.lanes,
                },
            },
            state: Mutex::new(State {
                progress,
                ..State::default()
            }),
            changed: Condvar::new(),
        })
    }

    /// Whether a token is of the destination that the VM was sent to. Any other one has never
    /// had the VM and would say so, as if that told where it is.
    #[must_use]
    pub fn is_to(&self, token: &Token) -> bool {
        token.is_secret(&self.hello.secret)
    }

    /// How the connections begin that are its lanes.
    pub(super) fn joins(&self) -> impl Iterator<Item = Hello> + '_ {
        (0..self.options.lanes).map(|lane| Hello {
            purpose: Purpose::Joins { lane },
            ..self.hello
        })
    }

    /// How a connection begins over which the destination is asked once more.
    pub(super) fn again(&self) -> Hello {
        Hello {
            purpose: Purpose::Asks,
            ..self.hello
        }
    }

    /// Tells the destination, over another link, that the VM has gone on here.
    ///
    /// # Errors
    /// The link's.
    pub fn tell_kept(&self, mut link: Link) -> io::Result<()> {
        self.again().write(&mut link)?;
        match Source::Here.greets() {
            Some(word) => word.write(&mut link),
            None => Ok(()),
        }
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        lock(&self.state).progress
    }

    /// It is over: the VM has moved, or why not.
    pub(super) fn end(&self, outcome: Result<Moved, String>) {
        let mut state = lock(&self.state);
        state.progress.stage = Stage::Over;
        state.outcome = Some(outcome);
        self.changed.notify_all();
    }

    /// It does not begin.
    pub fn give_up(&self) {
        self.end(Err("it did not begin".into()));
    }

    /// The VM that has moved.
    #[must_use]
    pub fn moved(&self) -> Option<Moved> {
        lock(&self.state).outcome.as_ref()?.as_ref().ok().copied()
    }

    /// What it came to so far.
    ///
    /// # Errors
    /// Why the VM has not moved.
    pub fn outcome(&self) -> Result<(), String> {
        match &lock(&self.state).outcome {
            Some(Err(why)) => Err(why.clone()),
            Some(Ok(_)) | None => Ok(()),
        }
    }

    pub(super) fn note(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut lock(&self.state).progress);
        self.changed.notify_all();
    }

    /// The VM is to stay, if it is not too late for that.
    pub fn cancel(&self) {
        lock(&self.state).cancelled = true;
    }

    pub(super) fn is_cancelled(&self) -> bool {
        lock(&self.state).cancelled
    }

    /// The user knows that the destination does not have the VM: it goes on here. False:
    /// there is no doubt.
    #[must_use]
    pub fn claim(&self) -> bool {
        let mut state = lock(&self.state);
        let doubt = state.progress.stage == Stage::Doubt;
        if doubt {
            state.claimed = true;
            // Who waits for what comes of it does not take the doubt for that.
            state.progress.stage = Stage::Standing;
        }
        self.changed.notify_all();
        doubt
    }

    /// Asks the destination over another link, if there is a doubt, and waits for what
    /// comes of it.
    pub fn ask(&self, link: Link) {
        let mut state = lock(&self.state);
        match state.progress.stage {
            Stage::Doubt => state.progress.stage = Stage::Standing,
            Stage::Cut => state.progress.stage = Stage::Pulling,
            _ => {
                drop(state);
                return self.wait();
            }
        }
        state.link = Some(link);
        drop(state);
        self.changed.notify_all();
        self.wait();
    }

    /// Waits for whatever ends a doubt, or brings the destination back.
    pub(super) fn doubt(&self, stage: Stage) -> Answer {
        let mut state = lock(&self.state);
        state.progress.stage = stage;
        self.changed.notify_all();
        loop {
            if state.claimed {
                return Answer::Claimed;
            }
            if let Some(link) = state.link.take() {
                return Answer::Link(link);
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until it is over, in doubt or cut.
    pub fn wait(&self) {
        let mut state = lock(&self.state);
        while matches!(
            state.progress.stage,
            Stage::Copying | Stage::Standing | Stage::Pulling
        ) {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Writes no faster than it may, and not at all once it was cancelled or an error came: who
/// gathers what is written would wait for a link that is lost once more for the rest.
pub(super) struct Paced<'a> {
    /// Where the other side's answers come from, and what is written goes to if there are no lanes.
    pub(super) link: Link,
    lanes: Option<Spread>,
    out: &'a Outgoing,
    begun: Instant,
    sent: u64,
    broken: bool,
}

impl<'a> Paced<'a> {
    pub(super) fn new(link: Link, lanes: Option<Spread>, out: &'a Outgoing) -> Self {
        Self {
            link,
            lanes,
            out,
            begun: Instant::now(),
            sent: 0,
            broken: false,
        }
    }

    /// All is written: what the rest is said over, and what is to be kept until the other side has it.
    pub(super) fn finish(self) -> io::Result<(Link, Option<lanes::Sent>)> {
        let sent = self.lanes.map(Spread::finish).transpose()?;
        Ok((self.link, sent))
    }

    fn unbroken<T>(&mut self, done: io::Result<T>) -> io::Result<T> {
        self.broken |= matches!(&done, Err(error) if error.kind() != io::ErrorKind::Interrupted);
        done
    }
}

impl Write for Paced<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        if self.broken || self.out.is_cancelled() {
            return Err(io::Error::other("it is not sent any more"));
        }
        let written = match &mut self.lanes {
            Some(lanes) => lanes.write(from),
            None => self.link.write(from),
        };
        let count = self.unbroken(written)?;
        self.sent += count as u64;
        let sent = self.sent;
        self.out.note(|progress| progress.bytes = sent);
        if let Some(most) = self.out.options.bandwidth
            && self.out.progress().stage == Stage::Copying
            && count >= TALK
        {
            // For the clock to catch up: there is nothing to wait for.
            let nanos = u128::from(sent) * 1_000_000_000 / u128::from(most.max(1));
            let due = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
            if let Some(early) = due.checked_sub(self.begun.elapsed()) {
                std::thread::sleep(early.min(Duration::from_secs(1)));
            }
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let flushed = match &mut self.lanes {
            Some(lanes) => lanes.flush(),
            None => self.link.flush(),
        };
        self.unbroken(flushed)
    }
}
