//! Disk images of VMs: what a block backend reads and writes, whatever its format.
//!
//! A [`Disk`] is an open image. A backend makes one [`Queue`] for each of its threads,
//! submits [`Request`]s to it, and collects [`Completion`]s when the queue's descriptor
//! becomes readable. Nothing here waits for a medium.

mod chain;
mod error;
mod event;
mod format;
mod layer;

mod lock;
mod manage;
mod open;
mod qcow2;
mod raw;
mod reader;
mod request;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod vhd;
mod vmdk;
mod workers;
mod writer;

pub use error::Error;
pub use format::{Format, UnknownFormat};
pub use manage::{Backing, Info, create, info, resize, snapshot};
pub use open::{Cache, DataPath, Image, Options, open};
pub use reader::Reader;
pub use writer::Writer;

pub use request::{Buffer, Completion, Failure, Operation, Request};

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// Unit of all sizes that a guest sees, bytes (`public/io/blkif.h`).
pub const SECTOR: u64 = 512;

/// An open disk image. It is closed, and its lock given back, when it is dropped.
pub trait Disk: Send + Sync + Debug {
    /// Bytes that a guest sees, a multiple of [`SECTOR`]. Changes with [`Disk::resize`].
    fn size(&self) -> u64;

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// Whether data goes through the host's page cache.
    fn cache(&self) -> Cache {
        Cache::Writeback
    }

    /// Bytes of the smallest piece that [`Operation::Discard`] gives back to the host; 0 if
    /// it gives back nothing.
    fn discard_granularity(&self) -> u32;

    /// A way to use the disk from one thread, for at most `depth` requests at a time.
    ///
    /// # Errors
    /// The host has no descriptors, threads or memory for it.
    fn queue(&self, depth: u32) -> io::Result<Box<dyn Queue>>;

    /// Gives the disk another size, in the image and for guests. No data is cut off: a
    /// smaller size is refused.
    ///
    /// # Errors
    /// The format or the host cannot; the size is then as it was.
    fn resize(&self, size: u64) -> io::Result<()>;
}

/// Requests of one thread to a disk. What was submitted is begun at the latest when one waits.
pub trait Queue: Send {
    /// Starts a request; never waits for the medium. Requests that overlap, and are in
    /// flight together, are carried out in any order. A request that cannot be started
    /// completes with its failure.
    fn submit(&mut self, request: Request);

    /// Hands over what [`Queue::submit`] has gathered, where that is cheaper by the batch, before
    /// one waits.
    fn flush_submissions(&mut self);

    /// Waits until there may be something to collect, `wake` is readable, the time is over, or a
    /// signal came. Says whether `wake` has to be made unreadable, or the next call would not wait
    /// for the next time that it is written to. It is the same descriptor in each call in which
    /// there is one, an eventfd.
    fn wait(&mut self, wake: Option<BorrowedFd<'_>>, timeout: Option<Duration>) -> bool;

    /// Collects what is done.
    fn collect(&mut self, into: &mut Vec<Completion>);

    /// Requests that were submitted and not yet collected.
    fn in_flight(&self) -> usize;
}
