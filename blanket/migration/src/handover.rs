//! The handover: which side has the VM.
//!
//! ```text
//! source     COPYING ----> SENT ----------> COMMITTED ----------> THERE
//!               |           |  READY / GO       |   RUNS
//!               v           v                   | GONE
//!             HERE <------ HERE <---------------+
//!
//! destination  RECEIVING ----> WAITING --------> STARTING ------> RUNNING
//!                  |    all /READY |     GO          |   /RUNS
//!                  v               v CANCEL          v /GONE
//!                GONE            GONE              GONE
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

use crate::message::Message;

/// The side that has the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// The VM runs and is being sent.
    Copying,
    /// It stands still and all of it was sent.
    Sent,
    /// The destination may have it.
    Committed,
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
    /// All of the VM was sent.
    pub fn sent(&mut self) {
        if *self == Self::Copying {
            *self = Self::Sent;
        }
    }

    /// The destination says something.
    #[must_use]
    pub fn hears(&mut self, message: Message) -> SourceDoes {
        match (*self, message) {
            (Self::Sent | Self::Committed, Message::Ready) => {
                *self = Self::Committed;
                SourceDoes::Says(Message::Go)
            }
            (Self::Committed, Message::Runs) => {
                *self = Self::There;
                SourceDoes::Ends
            }
            // It has refused; or, asked again, it never had it.
            (Self::Copying | Self::Sent | Self::Committed, Message::Gone) => {
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
            Self::Copying | Self::Sent => {
                *self = Self::Here;
                SourceDoes::GoesOn
            }
            Self::Committed => SourceDoes::Asks,
            Self::Here | Self::There => SourceDoes::Waits,
        }
    }

    /// The user wants it back. False: it is too late for that.
    #[must_use]
    pub fn cancels(&mut self) -> bool {
        let can = matches!(*self, Self::Copying | Self::Sent);
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
    /// All of it is here, and it does not run.
    Waiting,
    /// It is being started.
    Starting,
    /// It runs here, or did.
    Running,
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
}

impl Destination {
    /// All of the VM was received, and nothing is left to do but to start it.
    #[must_use]
    pub fn received(&mut self) -> DestinationDoes {
        if *self != Self::Receiving {
            return DestinationDoes::Waits;
        }
        *self = Self::Waiting;
        DestinationDoes::Says(Message::Ready)
    }

    /// The source says something.
    #[must_use]
    pub fn hears(&mut self, message: Message) -> DestinationDoes {
        match (*self, message) {
            (Self::Waiting, Message::Go) => {
                *self = Self::Starting;
                DestinationDoes::Starts
            }
            (Self::Receiving | Self::Waiting, Message::Cancel) => {
                *self = Self::Gone;
                DestinationDoes::Discards
            }
            (Self::Running, Message::Go) => DestinationDoes::Says(Message::Runs),
            _ => self.loses(),
        }
    }

    /// The VM runs.
    #[must_use]
    pub fn started(&mut self) -> Message {
        *self = Self::Running;
        Message::Runs
    }

    /// It could not be received or started, or is not wanted any more: not one instruction
    /// of it was done here. What its backends may have begun is the destination's own, as
    /// its images are. What to say, if the source may not know yet.
    #[must_use]
    pub fn gives_up(&mut self) -> Option<Message> {
        match *self {
            Self::Receiving | Self::Waiting | Self::Starting => {
                *self = Self::Gone;
                Some(Message::Gone)
            }
            Self::Running | Self::Gone => None,
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
            Self::Waiting | Self::Starting | Self::Running | Self::Gone => DestinationDoes::Listens,
        }
    }

    /// What to say first when the source asks again.
    #[must_use]
    pub fn greets(&self) -> Option<Message> {
        match self {
            Self::Waiting => Some(Message::Ready),
            Self::Running => Some(Message::Runs),
            Self::Gone => Some(Message::Gone),
            Self::Receiving | Self::Starting => None,
        }
    }

    /// The user, who knows that the source has ended, or will never go on, has it run here.
    /// False: there is nothing to run.
    #[must_use]
    pub fn claimed(&mut self) -> bool {
        let can = *self == Self::Waiting;
        if can {
            *self = Self::Starting;
        }
        can
    }
}
