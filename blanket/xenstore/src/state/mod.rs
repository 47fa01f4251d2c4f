//! A store and its connections as plain data, for a migration that the guest does
//! not notice.
//!
//! The types say what is in a state and nothing of how it is written: that is the
//! choice of who stores or sends it, with any format of `serde`. Fields that are not
//! known are refused, so that nothing of a newer state is lost in silence.
//!
//! A state is somebody else's word until it is restored: [`Store::restore`] and
//! [`Connection::restore`] check all of it and take it as a whole or not at all.
//!
//! [`Store::restore`]: crate::Store::restore
//! [`Connection::restore`]: crate::Connection::restore

mod error;
mod restore;
mod save;
mod transaction;

pub use error::RestoreError;

use serde::{Deserialize, Serialize};

use crate::DomId;

/// Version of [`StoreState`] and [`ConnectionState`]. It goes up with every change
/// of the types here and of what they mean.
pub const VERSION: u32 = 1;

/// A whole store: its tree and its clients.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreState {
    /// [`VERSION`] of who saved it.
    pub version: u32,
    /// How many changes the tree has seen; no node's generation is higher.
    pub generation: u64,
    /// All nodes, in any order. What is in a directory follows from their paths.
    pub nodes: Vec<NodeState>,
    /// Where the search for the next client's number begins.
    pub next_client: u32,
    /// All clients, in any order.
    pub clients: Vec<ClientState>,
}

/// A node of the tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeState {
    /// Its absolute path.
    pub path: String,
    /// Its value.
    pub value: Vec<u8>,
    /// Its permissions as the protocol writes them: `n0`, `r1`; the owner's is first.
    pub perms: Vec<String>,
    /// When it was last changed, on the counter [`StoreState::generation`].
    pub generation: u64,
}

/// A client: a domain's connection as the store sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientState {
    /// Its number, never 0.
    pub number: u32,
    /// Its domain.
    pub domain: DomId,
    /// Its watches, in the order in which they report.
    pub watches: Vec<WatchState>,
    /// Events that it was not told of yet, the oldest first.
    pub events: Vec<EventState>,
    /// How many events it has lost for want of room.
    pub dropped: u64,
    /// Where the search for the next transaction's number begins.
    pub next_transaction: u32,
    /// Its open transactions, in any order.
    pub transactions: Vec<TransactionState>,
}

/// A watch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WatchState {
    /// What it looks at, absolute, relative or special, as the client named it.
    pub path: String,
    /// The client's word for it.
    pub token: Vec<u8>,
    /// Most levels below the node that it looks at; none for all.
    pub depth: Option<u32>,
}

/// An event that waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventState {
    /// The path that it reports.
    pub path: String,
    /// The token of the watch.
    pub token: Vec<u8>,
}

/// An open transaction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransactionState {
    /// Its number, never 0.
    pub number: u32,
    /// Nodes that it has looked at, in any order.
    pub seen: Vec<SeenState>,
    /// Nodes that it has written or removed, in any order; each is in `seen` too.
    pub written: Vec<WrittenState>,
    /// What is reported to watches when it is committed, in this order.
    pub changes: Vec<ChangeState>,
}

/// A node that a transaction has looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SeenState {
    /// Its absolute path.
    pub path: String,
    /// Its generation at the first look; none if it did not exist.
    pub generation: Option<u64>,
}

/// A node that a transaction has written or removed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WrittenState {
    /// Its absolute path.
    pub path: String,
    /// What is there now, for the transaction; none if it was removed.
    pub node: Option<WrittenNode>,
}

/// A node as only its transaction sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WrittenNode {
    /// Its value.
    pub value: Vec<u8>,
    /// Its permissions, as in [`NodeState`].
    pub perms: Vec<String>,
    /// The names of its children. They do not follow from other nodes here, as the
    /// transaction need not have looked at these.
    pub children: Vec<String>,
    /// The generation that it had before the transaction wrote it, or 0: what a
    /// listing in parts tells the client inside of the transaction.
    pub generation: u64,
}

/// A change that a transaction reports when it is committed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeState {
    /// The node that changed.
    pub path: String,
    /// Its permissions before and after; who may read with any is told.
    pub perms: Vec<Vec<String>>,
    /// For a removal, every node that went; none for another change.
    pub removed: Option<Vec<RemovedState>>,
}

/// A node that went with a directory above it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemovedState {
    /// Its absolute path.
    pub path: String,
    /// Its last permissions.
    pub perms: Vec<String>,
}

/// One end of the wire: what came of a request that is not complete, and what the
/// client has not read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConnectionState {
    /// [`VERSION`] of who saved it.
    pub version: u32,
    /// The number of its client in the store.
    pub client: u32,
    /// The beginning of a message.
    pub input: Vec<u8>,
    /// Bytes that the client has not taken; they may begin inside of a message.
    pub output: Vec<u8>,
}
