//! What nodes and their users say to each other over HTTP.
//!
//! All bodies are JSON of the types here. An error is a body of [`Error`], with the status of
//! its [`Code`]. [`ROUTES`] is the list of what can be asked, and [`openapi::document`] says
//! the same as an OpenAPI document.

mod error;
mod event;
mod image;
mod net;
mod node;
pub mod openapi;
mod operation;
mod route;
mod snapshot;
mod token;
mod vm;

pub use error::{Code, Error};
pub use event::Event;
pub use image::{AddImage, Image, ImageFormat};
pub use net::{Net, NetAddress, NetMoved, NetNode, Nets, NewNet, NewNetAddress};
pub use node::{
    Finding, JoinAnswer, JoinCluster, JoinRequest, Level, Member, Members, NewToken, Node, NodeCpu,
    NodeStatus, Remove, TokenText,
};
pub use operation::{
    Drain, Kind, MOST_STREAMS, Migrate, Operation, OperationState, Part, PostCopy, Progress, Step,
    new_id,
};
pub use route::{Door, Method, ROUTES, Route};
pub use snapshot::{CloneVm, ExportTo, ImportFrom, Restore, Snapshot, SnapshotKind, TakeSnapshot};
pub use token::JoinToken;
pub use vm::{
    Arrival, ArrivalState, Bootfile, Disk, Keep, Life, NetPort, Place, Prepare, Prepared, Seen,
    Stop, Vm, VmSpec,
};

/// The header by which a node is asked to have another one answer.
pub const NODE_HEADER: &str = "supercloud-node";

/// The version of what nodes say to each other. Nodes of another one are refused.
pub const VERSION: u32 = 2;

/// Whether a text can be the name of a node, a VM or an image: it becomes a file name.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    text.len() <= 64
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(allowed)
}

/// As [`is_name`], and says what a name is.
///
/// # Errors
/// It is none.
pub fn name(what: &str, text: &str) -> Result<(), Error> {
    if is_name(text) {
        return Ok(());
    }
    Err(Error::new(
        Code::BadRequest,
        format!("{text:?} is no name of {what}"),
        "a name has 1 to 64 letters, digits, dots, dashes and underscores, and starts with a letter or digit",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert!(is_name("web-1.a_b") && is_name("0"));
        for wrong in ["", "-a", ".hidden", "a/b", "a b", "é", &"x".repeat(65)] {
            assert!(!is_name(wrong), "{wrong}");
        }
    }
}
