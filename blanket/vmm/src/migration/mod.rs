//! A running VM moves to another host, or comes from one (`docs/migration.md`).
//!
//! [`send_to`] sends memory in rounds while the VM runs, then stops it, sends the rest, and
//! hands it over. [`receive_from`] is the other side.
//!
//! [`send_to`]: crate::instance::Instance::send_to
//! [`receive_from`]: crate::instance::Instance::receive_from

mod destination;
mod dirty;
mod disks;
mod outgoing;
mod source;

use blanket_migration::message::HelloError;

use crate::saved::{ResumeError, SaveError};
use crate::vm::StillError;

pub use blanket_migration::link::{Link, Token};
pub use blanket_migration::precopy::Wishes;
pub(crate) use destination::Given;
pub use destination::Incoming;
pub use outgoing::{Moved, Options, Outgoing, Progress, Stage};

pub(crate) use dirty::Dirty;
pub(crate) use disks::Images;

/// Why a VM has not moved: it goes on.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// There is nothing to move.
    #[error("the VM does not run")]
    NotRunning,
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
    /// The destination cannot have it.
    #[error("the destination cannot have it: {0}")]
    Unfit(String),
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
}

/// A VM that was received does not run here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotGiven {
    /// Its source has kept it.
    #[error("its source has kept the VM")]
    Kept,
    /// It was killed before it was given.
    #[error("the VM was killed before its source had given it")]
    Killed,
}
