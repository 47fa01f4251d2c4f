//! The handover: which side has the VM.
//!
//! ```text
//! source     COPYING --> SENT -------> COMMITTED -------> [SERVING] -----> THERE
//!               |         |  READY/GO      |   RUNS                HERE
//!               v         v                | GONE
//!             HERE <---- HERE <------------+
//!
//! destination  RECEIVING --> WAITING --------> STARTING -----> [PULLING] ---> RUNNING
//!                  |  all/READY |      GO          |     /RUNS       all/HERE
//!                  v            v CANCEL           v /GONE     | LOST
//!                GONE         GONE               GONE          v
//!                                                            LOST
//! ```
//!
//! The VM stands still on the source from SENT on. Until it has said GO, the source goes
//! on by itself whatever happens. Afterwards it does so only when the destination says
//! that it does not have the VM (GONE) and never had; it waits for that answer, over as
//! many connections as it takes. The destination runs the VM only when told GO. From
//! WAITING on it outlives lost connections: it waits for the source, which alone knows
//! whether GO was said.
//!
//! So both sides wait only if the link is lost between GO and RUNS, each for the other. If
//! the other host is gone for good, no protocol can tell what it did last: its user must.
//!
//! The states in brackets are those of post-copy: the VM was given with a part of its memory
//! ([`Memory::Apart`]), and has the rest on the source, which cannot run it any more and keeps
//! it until the destination has all ([`Message::Here`]). If the source ends before that, the VM
//! is lost: nobody has all of it.

use crate::message::Message;

/// How much of a VM's memory is given with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Memory {
    /// All.
    Whole,
    /// A part: the rest follows when it runs at the destination (post-copy).
    Apart,
}

/// The side that has the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// The VM runs and is being sent.
    Copying,
    /// It stands still, and all that comes before it is given was sent.
    Sent(Memory),
    /// The destination may have it.
    Committed(Memory),
    /// The destination runs it, and does not have all of its memory yet.
    Serving,
    /// The destination has it: it has ended here.
    There,
    /// It goes on here.
    Here,
}

/// What the source is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SourceDoes {
    /// Wait for what the destination says.
    Waits,
    /// Send this.
    Says(Message),
    /// Let the VM go on.
    GoesOn,
    /// End the VM: it runs elsewhere.
    Ends,
    /// Connect again, and ask.
    Asks,
}

impl Source {
    /// The VM was sent, with so much of its memory.
    pub fn sent(&mut self, memory: Memory) {
        if *self == Self::Copying {
            *self = Self::Sent(memory);
        }
    }

    /// Whether the destination may ask for pages.
    #[must_use]
    pub fn serves(&self) -> bool {
        matches!(self, Self::Committed(Memory::Apart) | Self::Serving)
    }

    /// The destination says something.
    #[must_use]
    pub fn hears(&mut self, message: Message) -> SourceDoes {
        match (*self, message) {
            (Self::Sent(memory) | Self::Committed(memory), Message::Ready) => {
                *self = Self::Committed(memory);
                SourceDoes::Says(Message::Go)
            }
            (Self::Committed(Memory::Apart) | Self::Serving, Message::Runs) => {
                *self = Self::Serving;
                SourceDoes::Waits
            }
            (Self::Committed(Memory::Whole), Message::Runs)
            | (Self::Committed(Memory::Apart) | Self::Serving, Message::Here) => {
                *self = Self::There;
                SourceDoes::Ends
            }
            // It has refused; or, asked again, it never had it.
            (Self::Copying | Self::Sent(_) | Self::Committed(_), Message::Gone) => {
                *self = Self::Here;
                SourceDoes::GoesOn
            }
            // Nothing else has a meaning: as if the link were lost.
            _ => self.loses(),
        }
    }

    /// The connection is lost, or the destination does not answer.
    #[must_use]
    pub fn loses(&mut self) -> SourceDoes {
        match *self {
            Self::Copying | Self::Sent(_) => {
                *self = Self::Here;
                SourceDoes::GoesOn
            }
            Self::Committed(_) | Self::Serving => SourceDoes::Asks,
            Self::Here | Self::There => SourceDoes::Waits,
        }
    }

    /// The user wants it back. False: it is too late for that.
    #[must_use]
    pub fn cancels(&mut self) -> bool {
        let can = matches!(*self, Self::Copying | Self::Sent(_));
        if can {
            *self = Self::Here;
        }
        can
    }

    /// What to say first on a new connection: the source that has the VM back takes its
    /// word back. `None`: wait for the destination.
    #[must_use]
    pub fn greets(&self) -> Option<Message> {
        (*self == Self::Here).then_some(Message::Cancel)
    }
}

/// The side that gets the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Destination {
    /// The VM is being received.
    Receiving,
    /// All that comes before it is given is here, and it does not run.
    Waiting(Memory),
    /// It is being started.
    Starting(Memory),
    /// It runs here, and a part of its memory is still on the source.
    Pulling,
    /// It runs here, or did, and needs nothing more. How it was given.
    Running(Memory),
    /// It ran here, and a part of its memory is nowhere.
    Lost,
    /// It never ran here, and will not.
    Gone,
}

/// What the destination is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestinationDoes {
    /// Wait for what the source says.
    Waits,
    /// Send this.
    Says(Message),
    /// Start the VM, then call [`Destination::started`].
    Starts,
    /// Give up what was received.
    Discards,
    /// Wait for another connection.
    Listens,
    /// Let the VM run no more: a part of its memory is lost.
    Stops,
}

impl Destination {
    /// The VM was received with so much of its memory, and nothing is left to do but to start
    /// it.
    #[must_use]
    pub fn received(&mut self, memory: Memory) -> DestinationDoes {
        if *self != Self::Receiving {
            return DestinationDoes::Waits;
        }
        *self = Self::Waiting(memory);
        DestinationDoes::Says(Message::Ready)
    }

    /// The source says something.
    #[must_use]
    pub fn hears(&mut self, message: Message) -> DestinationDoes {
        match (*self, message) {
            (Self::Waiting(memory), Message::Go) => {
                *self = Self::Starting(memory);
                DestinationDoes::Starts
            }
            (Self::Receiving | Self::Waiting(_), Message::Cancel) => {
                *self = Self::Gone;
                DestinationDoes::Discards
            }
            (Self::Pulling | Self::Running(_), Message::Go) => match self.greets() {
                Some(message) => DestinationDoes::Says(message),
                None => DestinationDoes::Waits,
            },
            _ => self.loses(),
        }
    }

    /// Whoever has seen the source's process end says so.
    #[must_use]
    pub fn bereft(&mut self) -> DestinationDoes {
        match *self {
            // Nobody gives it any more, and a part of it is nowhere.
            Self::Waiting(Memory::Apart) => {
                *self = Self::Gone;
                DestinationDoes::Discards
            }
            Self::Starting(Memory::Apart) | Self::Pulling => {
                *self = Self::Lost;
                DestinationDoes::Stops
            }
            // It needs nothing of it; or only its user knows whether it may run.
            Self::Receiving
            | Self::Waiting(Memory::Whole)
            | Self::Starting(Memory::Whole)
            | Self::Running(_)
            | Self::Lost
            | Self::Gone => DestinationDoes::Listens,
        }
    }

    /// The VM runs.
    #[must_use]
    pub fn started(&mut self) -> Message {
        *self = match *self {
            Self::Starting(Memory::Apart) => Self::Pulling,
            // Its source has ended meanwhile.
            Self::Lost => Self::Lost,
            _ => Self::Running(Memory::Whole),
        };
        Message::Runs
    }

    /// All of its memory is here, or is needed no more: the VM has ended. What to say.
    #[must_use]
    pub fn pulled(&mut self) -> Option<Message> {
        let pulled = *self == Self::Pulling;
        if pulled {
            *self = Self::Running(Memory::Apart);
        }
        pulled.then_some(Message::Here)
    }

    /// It could not be received or started, or is not wanted any more: not one instruction
    /// of it was done here. What its backends may have begun is the destination's own, as
    /// its images are. What to say, if the source may not know yet.
    #[must_use]
    pub fn gives_up(&mut self) -> Option<Message> {
        match *self {
            Self::Receiving | Self::Waiting(_) | Self::Starting(_) => {
                *self = Self::Gone;
                Some(Message::Gone)
            }
            Self::Pulling | Self::Running(_) | Self::Lost | Self::Gone => None,
        }
    }

    /// The connection is lost.
    #[must_use]
    pub fn loses(&mut self) -> DestinationDoes {
        match *self {
            Self::Receiving => {
                *self = Self::Gone;
                DestinationDoes::Discards
            }
            _ => DestinationDoes::Listens,
        }
    }

    /// What to say first when the source asks again.
    #[must_use]
    pub fn greets(&self) -> Option<Message> {
        match self {
            Self::Waiting(_) => Some(Message::Ready),
            Self::Pulling | Self::Running(Memory::Whole) => Some(Message::Runs),
            Self::Lost => Some(Message::Lost),
            Self::Running(Memory::Apart) => Some(Message::Here),
            Self::Gone => Some(Message::Gone),
            Self::Receiving | Self::Starting(_) => None,
        }
    }

    /// The user, who knows that the source has ended, or will never go on, has it run here.
    /// False: there is nothing to run.
    #[must_use]
    pub fn claimed(&mut self) -> bool {
        let can = *self == Self::Waiting(Memory::Whole);
        if can {
            *self = Self::Starting(Memory::Whole);
        }
        can
    }
}
