//! What a VM is, written down: see `docs/formats.md`, "A saved VM".
//!
//! A [`Writer`] puts chunks one behind the other, a [`Reader`] takes them in the same
//! order. Both work on any stream.

mod base;
mod chunk;
mod packing;
mod pages;
mod pieces;

pub use base::{Base, MAX_BLOCKS};
pub use chunk::{Found, Kind, MAX_CHUNK, Part, Place, Reader, VERSION, Writer};
pub use pages::{PAGE, Run};
pub use pieces::{MAX_PIECE, Piece};

use std::io;

/// Why a saved VM cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The stream.
    #[error("cannot be read: {0}")]
    Read(#[source] io::Error),
    /// The stream.
    #[error("cannot be written: {0}")]
    Write(#[source] io::Error),
    /// Something else.
    #[error("is no saved VM")]
    Foreign,
    /// Another version's.
    #[error(
        "has version {0}, and this program reads version {VERSION}: use the program that wrote it"
    )]
    Version(u32),
    /// It ends too early.
    #[error("ends in the middle of chunk {0}: it was not written to its end")]
    Truncated(u64),
    /// What is there is not what was written.
    #[error("is damaged: chunk {0} is not what was written")]
    Damaged(u64),
    /// A kind of chunk that this program does not know, or not at this place.
    #[error("has a chunk of kind {kind:?} at place {place}, where there must be {wanted}")]
    Unexpected {
        /// The chunk's place.
        place: u64,
        /// Its kind.
        kind: String,
        /// What must be there.
        wanted: &'static str,
    },
    /// A chunk's text.
    #[error("chunk {place} ({kind}) cannot be understood: {source}")]
    Text {
        /// The chunk's place.
        place: u64,
        /// Its kind.
        kind: &'static str,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// A run of pages that cannot be.
    #[error("chunk {0} has pages, or a piece of a disk, that cannot be")]
    Pages(u64),
}

#[cfg(test)]
mod tests;
