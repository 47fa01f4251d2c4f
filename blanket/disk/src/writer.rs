//! Writing a disk from the host's side, one piece at a time: what [`crate::Reader`] is for
//! reading.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::{Buffer, Disk, Failure, Operation, Queue, Request};

/// Where buffers lie: what direct I/O wants of any device.
const ALIGN: usize = 4096;

/// Writes a disk, which no guest uses meanwhile.
pub struct Writer {
    queue: Box<dyn Queue>,
    room: Arc<Room>,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Writer")
    }
}

impl Writer {
    /// For pieces of at most `most` bytes, a multiple of [`crate::SECTOR`].
    ///
    /// # Errors
    /// The host has no descriptors or threads for it.
    pub fn new(disk: &dyn Disk, most: usize) -> io::Result<Self> {
        Ok(Self {
            queue: disk.queue(1)?,
            room: Arc::new(Room::new(most)),
        })
    }

    /// Writes `from` to the disk, from `offset` on. Both are of whole sectors.
    ///
    /// # Errors
    /// As for requests; `from` is longer than what [`Self::new`] was told.
    pub fn write(&mut self, offset: u64, from: &[u8]) -> Result<(), Failure> {
        if from.len() > self.room.layout.size() {
            return Err(Failure::Unsupported);
        }
        // SAFETY: the room is as long, as was just checked; no request is under way, so
        // nobody else uses it; `from` is another piece of memory.
        unsafe {
            let to = self.room.start.as_ptr();
            std::ptr::copy_nonoverlapping(from.as_ptr(), to, from.len());
        }
        self.ask(Operation::Write, offset, from.len())
    }

    /// What was written is on stable storage afterwards.
    ///
    /// # Errors
    /// The host's.
    pub fn flush(&mut self) -> Result<(), Failure> {
        self.ask(Operation::Flush, 0, 0)
    }

    fn ask(&mut self, operation: Operation, offset: u64, length: usize) -> Result<(), Failure> {
        if length > self.room.layout.size() {
            return Err(Failure::Unsupported);
        }
        let buffers = match operation {
            // SAFETY: the room lives as long as the request's memory does, and no reference
            // leads to its bytes.
            Operation::Write => vec![unsafe { Buffer::new(self.room.start, length) }],
            _ => Vec::new(),
        };
        self.queue.submit(Request {
            token: 0,
            operation,
            offset,
            buffers,
            memory: Arc::clone(&self.room) as _,
        });
        let mut done = Vec::new();
        loop {
            self.queue.collect(&mut done);
            if let Some(completion) = done.pop() {
                return completion.result;
            }
            self.queue.wait(None, None);
        }
    }
}

/// Memory for one piece.
struct Room {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: an address of memory that lives as long as this, which only `Writer`, by a mutable
// reference, and the one request that it waits for use.
unsafe impl Send for Room {}
// SAFETY: as above.
unsafe impl Sync for Room {}

impl Room {
    fn new(length: usize) -> Self {
        let size = length.max(ALIGN).next_multiple_of(ALIGN);
        let layout = Layout::from_size_align(size, ALIGN).unwrap_or(Layout::new::<u64>());
        // SAFETY: the layout is not of no bytes.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) });
        let start = start.unwrap_or_else(|| handle_alloc_error(layout));
        Self { start, layout }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // SAFETY: what `new` has allocated, with the same layout; nothing uses it any more.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Options, open};

    #[test]
    fn what_is_written_is_there() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk.raw");
        std::fs::write(&path, vec![7; 1 << 20]).expect("an image");
        let image = open(&path, &Options::default()).expect("opened");
        let mut writer = Writer::new(&image, 65536).expect("made");
        writer.write(8192, &[9; 4096]).expect("written");
        writer.write((1 << 20) - 512, &[8; 512]).expect("written");
        writer.flush().expect("flushed");
        let beyond = writer.write((1 << 20) - 512, &[1; 1024]);
        assert!(matches!(beyond, Err(Failure::OutOfRange { .. })));
        assert!(writer.write(0, &vec![0; 65536 + 512]).is_err());
        drop(writer);
        let mut wanted = vec![7; 1 << 20];
        wanted[8192..8192 + 4096].fill(9);
        wanted[(1 << 20) - 512..].fill(8);
        assert!(std::fs::read(&path).expect("read") == wanted);
    }
}
