//! Images whose format has a driver in user space: what the driver does, and the engine that
//! copies between it and the guest's memory.

use std::io;
use std::ptr;
use std::sync::Arc;

use crate::reader::Source;
use crate::request::{Buffer, check, host};
use crate::workers::Engine;
use crate::{Failure, Operation, Request};

/// Most bytes that are copied at once; bounds the memory of a thread.
const PIECE: usize = 1 << 20;

/// An image that one reads and, maybe, writes through its format's driver, by several threads
/// at once. Ranges lie within its size.
pub(crate) trait Layer: Source {
    /// See [`crate::Disk::read_only`].
    fn read_only(&self) -> bool {
        true
    }

    /// See [`crate::Disk::discard_granularity`].
    fn discard_granularity(&self) -> u32 {
        0
    }

    /// Writes `from` at `offset`.
    fn write_at(&self, _offset: u64, _from: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    /// Brings what was written to stable storage.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    /// Gives a range back to the host.
    fn discard(&self, _offset: u64, _length: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Gives the image a larger size.
    fn grow(&self, _size: u64) -> io::Result<()> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "the format is read only, or cannot be resized",
        ))
    }
}

/// Carries out a guest's requests on a layer.
pub(crate) struct LayerEngine(pub(crate) Arc<dyn Layer>);

impl Engine for LayerEngine {
    fn check(&self, request: &Request) -> Result<(), Failure> {
        let layer = &self.0;
        check(
            request,
            layer.size(),
            layer.read_only(),
            layer.discard_granularity(),
        )
    }

    fn run(&self, request: &Request, scratch: &mut Vec<u8>) -> Result<(), Failure> {
        let layer = &self.0;
        match request.operation {
            Operation::Flush => layer.flush().map_err(host),
            Operation::Discard { length } => match layer.discard(request.offset, length) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    Err(Failure::Unsupported)
                }
                result => result.map_err(host),
            },
            Operation::Read | Operation::Write => {
                let mut offset = request.offset;
                let mut cursor = Cursor::new(&request.buffers);
                loop {
                    scratch.resize(PIECE.min(cursor.left()), 0);
                    if scratch.is_empty() {
                        return Ok(());
                    }
                    if request.operation == Operation::Read {
                        layer.read_at(offset, scratch).map_err(host)?;
                        cursor.put(scratch);
                    } else {
                        cursor.take(scratch);
                        layer.write_at(offset, scratch).map_err(host)?;
                    }
                    offset += scratch.len() as u64;
                }
            }
        }
    }
}

/// A place in the memory of a request.
pub(crate) struct Cursor<'a> {
    buffers: &'a [Buffer],
    /// Bytes of the first of them that are done.
    done: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(buffers: &'a [Buffer]) -> Self {
        Self { buffers, done: 0 }
    }

    fn left(&self) -> usize {
        let all = self.buffers.iter().map(Buffer::length);
        all.fold(0, usize::saturating_add) - self.done
    }

    /// Goes through the next `length` bytes: their address, and their place among them.
    fn walk(&mut self, length: usize, mut each: impl FnMut(*mut u8, usize, usize)) {
        let mut at = 0;
        while at < length
            && let Some(buffer) = self.buffers.first()
        {
            let piece = (buffer.length() - self.done).min(length - at);
            each(buffer.start().as_ptr().wrapping_add(self.done), at, piece);
            at += piece;
            self.done += piece;
            if self.done == buffer.length() {
                self.buffers = &self.buffers[1..];
                self.done = 0;
            }
        }
    }

    /// Copies `from` into the memory.
    pub(crate) fn put(&mut self, from: &[u8]) {
        self.walk(from.len(), |memory, at, piece| {
            // SAFETY: `walk` stays within one buffer, which the request keeps mapped, and
            // within `from`. The two do not overlap: `from` is ours alone. A guest that looks
            // at the memory meanwhile sees any mix, which is its own affair.
            unsafe { ptr::copy_nonoverlapping(from[at..].as_ptr(), memory, piece) };
        });
    }

    /// Copies the memory into `into`.
    pub(crate) fn take(&mut self, into: &mut [u8]) {
        self.walk(into.len(), |memory, at, piece| {
            // SAFETY: as in `put`. A guest that writes meanwhile gets any mix on its disk;
            // no decision is taken from these bytes.
            unsafe { ptr::copy_nonoverlapping(memory, into[at..].as_mut_ptr(), piece) };
        });
    }
}
