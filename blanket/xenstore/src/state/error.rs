//! What can be wrong with a state.

use crate::{DomId, wire};

use super::VERSION;

/// Why a state was not restored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// Saved by another version of the format.
    #[error("the xenstore's state has version {0}, and only version {VERSION} can be restored")]
    Version(u32),
    /// A path that no request could name.
    #[error("{place}: {path:?} is not a valid path")]
    Path {
        /// What it belongs to.
        place: String,
        /// The text.
        path: String,
    },
    /// A child's name that cannot be part of a path.
    #[error("{place}: {name:?} is not a valid name of a child")]
    Name {
        /// The node.
        place: String,
        /// The text.
        name: String,
    },
    /// A permission entry that the protocol does not know.
    #[error("{place}: {entry:?} is not a permission entry")]
    Perm {
        /// What it belongs to.
        place: String,
        /// The text.
        entry: String,
    },
    /// A node without an owner.
    #[error("{0}: there are no permissions, so nobody owns it")]
    NoPerms(String),
    /// Something that can be there once.
    #[error("{0} is there twice")]
    Twice(String),
    /// The number 0, which the protocol uses for "none".
    #[error("{0} has the number 0")]
    Zero(String),
    /// No root node.
    #[error("the tree has no root")]
    NoRoot,
    /// A node without the node above it.
    #[error("node {0}: the directory that should hold it is missing")]
    Orphan(String),
    /// A generation that the tree has not reached.
    #[error("{place}: generation {found} is not between 1 and the tree's {newest}")]
    Generation {
        /// What it belongs to.
        place: String,
        /// The generation.
        found: u64,
        /// The tree's.
        newest: u64,
    },
    /// A counter that would soon overflow, which no store has ever reached.
    #[error("{0} is too high to be a count of anything that happened")]
    Counter(&'static str),
    /// More than a quota allows.
    #[error("{place}: {found} {what}, the quota is {limit}")]
    Quota {
        /// Whose they are.
        place: String,
        /// What is counted.
        what: &'static str,
        /// How many there are.
        found: usize,
        /// How many are allowed.
        limit: usize,
    },
    /// A watch or an event that no message could carry.
    #[error("{place}: path and token do not fit a message, or the token holds a NUL")]
    Token {
        /// The watch or event.
        place: String,
    },
    /// A transaction that cannot have come about, or would break the tree.
    #[error("{place}: {path}: {why}")]
    Transaction {
        /// The transaction.
        place: String,
        /// The node.
        path: String,
        /// What is wrong there.
        why: &'static str,
    },
    /// A connection of a client that the store does not have.
    #[error("the connection belongs to client {0}, which the store does not have")]
    Client(u32),
    /// More input than the message that it begins has.
    #[error(
        "client {client}: {length} bytes of an unfinished request, which is longer than it says"
    )]
    Input {
        /// The client.
        client: u32,
        /// Bytes there are.
        length: usize,
    },
    /// More output than a store lets wait.
    #[error("client {client}: {length} bytes wait to be read, at most {limit} can")]
    Output {
        /// The client.
        client: u32,
        /// Bytes there are.
        length: usize,
        /// Bytes there can be.
        limit: usize,
    },
}

/// Names of things for messages.
pub(super) mod place {
    use super::DomId;

    pub fn node(path: &str) -> String {
        format!("node {path}")
    }

    pub fn client(number: u32, domain: DomId) -> String {
        format!("client {number} of domain {domain}")
    }

    pub fn transaction(client: u32, number: u32) -> String {
        format!("transaction {number} of client {client}")
    }
}

/// Most output that can wait: the limit lets one more message be begun.
pub(super) const OUTPUT_MOST: usize =
    crate::connection::OUTPUT_LIMIT + wire::HEADER + wire::PAYLOAD_MAX;
