//! A running VM moves to another host, or comes from one (`docs/migration.md`).
//!
//! [`send_to`] sends memory in rounds while the VM runs, then stops it, sends the rest, and
//! hands it over. [`receive_from`] is the other side.
//!
//! [`send_to`]: crate::instance::Instance::send_to
//! [`receive_from`]: crate::instance::Instance::receive_from

mod arrival;
mod bases;
mod destination;
mod dirty;
pub(crate) mod disks;
mod faults;
mod kept;
mod lanes;
mod outgoing;
mod sending;
mod source;
#[cfg(test)]
mod tests;

use blanket_migration::handover::{Destination, Memory};
use blanket_migration::message::HelloError;

use crate::instance::Instance;
use crate::saved::{ResumeError, SaveError};
use crate::vm::StillError;

pub(crate) use arrival::Arrival;
pub use arrival::Pull;
pub use blanket_migration::lanes::MOST as MOST_LANES;
pub use blanket_migration::link::{self, Link, Token};
pub use blanket_migration::message::Message;
pub use blanket_migration::precopy::{PostCopy, Wishes};
pub(crate) use destination::Given;
pub use destination::Incoming;
pub use faults::UserFaults;
pub use outgoing::{Moved, Options, Outgoing, Progress, Stage};
pub use source::mourn;

pub(crate) use bases::Bases;
pub(crate) use dirty::Dirty;
pub(crate) use disks::{Images, Moving};
pub(crate) use sending::Sending;

/// What cannot be done yet with a VM whose memory still follows it.
pub(crate) const APART: &str = "a part of its memory is still where it came from: wait until all has \
     come, as `blanket migrate NAME --status` tells";

/// Why a VM has not moved: it goes on.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// There is nothing to move.
    #[error("the VM does not run")]
    NotRunning,
    /// It has not come as a whole yet.
    #[error("{APART}")]
    Apart,
    /// One is enough.
    #[error("the VM is being moved already")]
    Twice,
    /// The user's wish.
    #[error("the migration was cancelled")]
    Cancelled,
    /// The link, or what is sent.
    #[error(transparent)]
    Send(#[from] SaveError),
    /// It does not stand still.
    #[error(transparent)]
    Still(#[from] StillError),
    /// The link.
    #[error("the link broke: {0}")]
    Link(#[from] std::io::Error),
    /// One of the connections that it was to be sent over.
    #[error("no connection more to the destination: {0}")]
    Lane(link::Error),
    /// The caller's.
    #[error("there are {0} connections more to the destination where there must be {1}")]
    Lanes(usize, u8),
    /// The destination cannot have it.
    #[error("the destination cannot have it: {0}")]
    Unfit(String),
    /// Its memory cannot follow it to the destination.
    #[error("the destination cannot have it before all of its memory (--post-copy): {0}")]
    Whole(String),
    /// The destination does not take it.
    #[error("the destination did not take it; it says why")]
    Refused,
    /// A thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

/// Why a VM did not come.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// What connects is none of ours.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// It cannot be had here.
    #[error(transparent)]
    Resume(#[from] ResumeError),
    /// The host.
    #[error("its memory cannot follow it here: {0}")]
    Follow(std::io::Error),
}

/// What a VM's process does with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It is being started.
    Starting,
    /// It is coming from another host.
    Receiving,
    /// All of it has come, and its source has not given it yet.
    Received,
    /// It runs.
    Running,
    /// It runs, and is being sent to another host.
    Sending,
    /// It stands still, on the way to another host.
    Standing,
    /// It stands still, and may run on another host.
    Doubt,
    /// It runs on another host, and a part of its memory is still here.
    Serving,
    /// The same, without a link to that host.
    Cut,
    /// It runs, and a part of its memory is still where it has come from: on another host, or in a file.
    Pulling,
    /// A part of its memory is lost there: it does nothing more.
    Lost,
    /// It has ended here.
    Ended,
}

impl Phase {
    /// A word for it.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Receiving => "receiving",
            Self::Received => "received",
            Self::Running => "running",
            Self::Sending => "sending",
            Self::Standing => "standing",
            Self::Doubt => "doubt",
            Self::Serving => "serving",
            Self::Cut => "cut",
            Self::Pulling => "pulling",
            Self::Lost => "lost",
            Self::Ended => "ended",
        }
    }
}

impl Instance {
    /// What this process does with its VM.
    #[must_use]
    pub fn phase(&self) -> Phase {
        if let Some(out) = self.outgoing() {
            match out.progress().stage {
                Stage::Copying => return Phase::Sending,
                Stage::Standing => return Phase::Standing,
                Stage::Doubt => return Phase::Doubt,
                Stage::Pulling => return Phase::Serving,
                Stage::Cut => return Phase::Cut,
                Stage::Over if out.moved().is_some() => return Phase::Ended,
                Stage::Over => {}
            }
        }
        match self.arrival() {
            Some(Destination::Receiving) => Phase::Receiving,
            Some(Destination::Waiting(Memory::Whole)) => Phase::Received,
            // It cannot run without its source.
            Some(Destination::Waiting(Memory::Apart)) => Phase::Receiving,
            Some(Destination::Starting(_)) => Phase::Starting,
            Some(Destination::Gone) => Phase::Ended,
            Some(Destination::Pulling) => Phase::Pulling,
            Some(Destination::Lost) => Phase::Lost,
            Some(Destination::Running(_)) => Phase::Running,
            // Its memory may be in a file still.
            None => match self.pull() {
                Some(Pull { lost: true, .. }) => Phase::Lost,
                _ if self.boots() == 0 => Phase::Starting,
                Some(Pull { left: 1.., .. }) => Phase::Pulling,
                _ => Phase::Running,
            },
        }
    }
}

/// A VM that was received does not run here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotGiven {
    /// Its source has kept it.
    #[error("its source has kept the VM")]
    Kept,
    /// Its source has ended, and had a part of its memory.
    #[error("its source has ended before it had given the VM, with a part of its memory")]
    Bereft,
    /// It was killed before it was given.
    #[error("the VM was killed before its source had given it")]
    Killed,
}
