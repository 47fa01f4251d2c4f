//! A disk in memory, whose failures are chosen.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use blanket_disk::{Completion, Disk, Failure, Operation, Queue, Request};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::Kick;

/// A disk in memory. Requests complete when [`Queue::collect`] is called.
#[derive(Debug, Default)]
pub struct MemoryDisk {
    bytes: Mutex<Vec<u8>>,
    /// It refuses writes.
    pub read_only: AtomicBool,
    /// Writes find no space.
    pub full: AtomicBool,
    /// Everything fails.
    pub broken: AtomicBool,
    /// Flushes that it has done.
    pub flushes: AtomicU64,
}

impl MemoryDisk {
    /// A disk of zeroes.
    #[must_use]
    pub fn new(size: usize) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(vec![0; size]),
            ..Self::default()
        })
    }

    /// What it holds.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry_out(&self, request: &Request) -> Result<(), Failure> {
        let mut bytes = self.lock();
        let size = bytes.len() as u64;
        let length = match request.operation {
            Operation::Discard { length } => length,
            _ => request.length(),
        };
        if self.broken.load(Ordering::Acquire) {
            return Err(Failure::Host(io::Error::other("broken")));
        }
        if request
            .offset
            .checked_add(length)
            .is_none_or(|end| end > size)
        {
            return Err(Failure::OutOfRange {
                offset: request.offset,
                length,
                size,
            });
        }
        let start = usize::try_from(request.offset).unwrap_or(usize::MAX);
        let writes = !matches!(request.operation, Operation::Read | Operation::Flush);
        if writes && self.read_only.load(Ordering::Acquire) {
            return Err(Failure::ReadOnly);
        }
        if writes && self.full.load(Ordering::Acquire) {
            return Err(Failure::NoSpace);
        }
        let mut at = start;
        for buffer in &request.buffers {
            let part = &mut bytes[at..at + buffer.length()];
            let guest = buffer.start().as_ptr();
            // SAFETY: the buffer is mapped while the request's memory is kept, and the
            // part is as long; the test's guest does not touch it meanwhile.
            unsafe {
                match request.operation {
                    Operation::Read => guest.copy_from(part.as_ptr(), part.len()),
                    _ => guest.copy_to(part.as_mut_ptr(), part.len()),
                }
            }
            at += buffer.length();
        }
        match request.operation {
            Operation::Discard { length } => {
                let length = usize::try_from(length).unwrap_or(0);
                bytes[start..start + length].fill(0);
            }
            Operation::Flush => {
                self.flushes.fetch_add(1, Ordering::AcqRel);
            }
            _ => {}
        }
        Ok(())
    }
}

/// A [`MemoryDisk`] as a backend has it.
#[derive(Clone, Debug)]
pub struct Shared(pub Arc<MemoryDisk>);

impl Disk for Shared {
    fn size(&self) -> u64 {
        self.0.lock().len() as u64
    }

    fn read_only(&self) -> bool {
        self.0.read_only.load(Ordering::Acquire)
    }

    fn discard_granularity(&self) -> u32 {
        4096
    }

    fn queue(&self, _: u32) -> io::Result<Box<dyn Queue>> {
        Ok(Box::new(MemoryQueue {
            disk: Arc::clone(&self.0),
            waiting: Vec::new(),
            event: Kick::new()?,
        }))
    }

    fn resize(&self, size: u64) -> io::Result<()> {
        let size = usize::try_from(size).map_err(|_| io::ErrorKind::OutOfMemory)?;
        self.0.lock().resize(size, 0);
        Ok(())
    }
}

struct MemoryQueue {
    disk: Arc<MemoryDisk>,
    waiting: Vec<Request>,
    event: Kick,
}

impl Queue for MemoryQueue {
    fn submit(&mut self, request: Request) {
        self.waiting.push(request);
        self.event.kick();
    }

    fn flush_submissions(&mut self) {}

    fn wait(&mut self, wake: Option<BorrowedFd<'_>>, timeout: Option<Duration>) -> bool {
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let fds = [Some(self.event.as_fd()), wake];
        let mut fds: Vec<PollFd<'_>> = fds
            .iter()
            .flatten()
            .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
            .collect();
        let _ = poll(&mut fds, timeout.as_ref());
        self.event.clear();
        true
    }

    fn collect(&mut self, into: &mut Vec<Completion>) {
        // The last one first: a frontend must bear any order.
        for request in self.waiting.drain(..).rev() {
            let result = self.disk.carry_out(&request);
            into.push(request.end(result));
        }
    }

    fn in_flight(&self) -> usize {
        self.waiting.len()
    }
}
