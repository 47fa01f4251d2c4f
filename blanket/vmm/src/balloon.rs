//! The VMM's side of a guest's balloon: the memory of frames that the guest has given
//! up goes to the host, and who waits for the guest is told. Frames that it has not got
//! yet have no memory until they are used: nothing is done for those.
//!
//! The core has seen to it that nothing of the guest leads to such a frame. Should this
//! program touch one all the same (a guest can name any frame to a backend), it finds a
//! zero page, which is the guest's again to the host, and nobody else's.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use blanket_abi::PAGE_SIZE;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::mm::{Advice, madvise};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _, GuestRegionMmap};

use crate::builder::GuestMemory;
use crate::migration::Arrival;
use crate::sync::lock;

/// A VM's memory as its user sees it, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// The most that it can have.
    pub most: u64,
    /// What its guest is asked to have.
    pub target: u64,
    /// What its guest has.
    pub current: u64,
}

/// A guest's balloon.
pub struct Balloon {
    memory: Arc<GuestMemory>,
    /// The part of the memory that follows the VM.
    arrival: Option<Arc<Arrival>>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// Frames of RAM that the guest has, by its core.
    frames: u64,
    /// The VM has ended: nothing changes any more.
    ended: bool,
}

impl Balloon {
    /// Of a VM that has `frames` of RAM.
    #[must_use]
    pub(crate) fn new(
        memory: Arc<GuestMemory>,
        frames: u64,
        arrival: Option<Arc<Arrival>>,
    ) -> Self {
        Self {
            memory,
            arrival,
            state: Mutex::new(State {
                frames,
                ended: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// The guest has given up the frames of the list (numbers of 32 bits, as the core
    /// writes them) and has `frames` now. Called by the vCPU's thread.
    pub fn changed(&self, given_up: &[u8], frames: u64) {
        let mut gfns: Vec<u64> = given_up
            .as_chunks()
            .0
            .iter()
            .map(|gfn| u32::from_le_bytes(*gfn).into())
            .collect();
        gfns.sort_unstable();
        gfns.dedup();
        if let Some(arrival) = &self.arrival {
            // What comes of them afterwards is not wanted.
            arrival.gives_up(&gfns);
        }
        for run in gfns.chunk_by(|a, b| a + 1 == *b) {
            if let Some(&first) = run.first()
                && let Err(error) = give_back(&self.memory, first, run.len() as u64)
            {
                tracing::warn!(%error, first, frames = run.len(), "the host does not take memory back");
            }
        }
        lock(&self.state).frames = frames;
        self.changed.notify_all();
    }

    /// Bytes that the guest has.
    #[must_use]
    pub fn current(&self) -> u64 {
        lock(&self.state).frames * PAGE_SIZE
    }

    /// Waits until the guest has `bytes`, the VM has ended, or the time is over.
    pub fn wait(&self, bytes: u64, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut state = lock(&self.state);
        while state.frames * PAGE_SIZE != bytes && !state.ended {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return;
            };
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// The VM has ended.
    pub fn end(&self) {
        lock(&self.state).ended = true;
        self.changed.notify_all();
    }
}

/// Gives the memory of frames to the host. What is found there next is zero.
pub(crate) fn give_back(memory: &GuestMemory, first: u64, frames: u64) -> io::Result<()> {
    // The builder makes one region, from frame 0.
    let region = memory.iter().next().ok_or(io::ErrorKind::NotFound)?;
    let (at, bytes) = (first * PAGE_SIZE, frames * PAGE_SIZE);
    if at + bytes > region.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    match region.file_offset() {
        Some(file) => {
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file.file(), how, file.start() + at, bytes)?;
        }
        None => drop_private(region, at, bytes)?,
    }
    Ok(())
}

fn drop_private(region: &GuestRegionMmap, at: u64, bytes: u64) -> io::Result<()> {
    let at = usize::try_from(at).map_err(io::Error::other)?;
    let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
    // SAFETY: the range lies inside of the region, as the caller has checked, which is
    // mapped as long as the reference lives. What becomes of its content is what anybody
    // who shares memory with a guest must expect: another value.
    unsafe { madvise(region.as_ptr().add(at).cast(), bytes, Advice::LinuxDontNeed) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes as _, FileOffset, GuestAddress, MmapRegion};

    use super::*;

    const FRAMES: u64 = 16;

    fn memory(private: bool) -> Arc<GuestMemory> {
        let length = usize::try_from(FRAMES * PAGE_SIZE).expect("small");
        let region = if private {
            MmapRegion::new(length).expect("memory")
        } else {
            let file = tempfile::tempfile().expect("a file");
            file.set_len(FRAMES * PAGE_SIZE).expect("its length");
            MmapRegion::from_file(FileOffset::new(file, 0), length).expect("memory")
        };
        let region = GuestRegionMmap::new(region, GuestAddress(0)).expect("a region");
        let memory = GuestMemory::from_regions(vec![region]).expect("memory");
        for frame in 0..FRAMES {
            let at = GuestAddress(frame * PAGE_SIZE);
            memory.write_obj(frame + 1, at).expect("written");
        }
        Arc::new(memory)
    }

    fn list(frames: &[u32]) -> Vec<u8> {
        frames.iter().flat_map(|f| f.to_le_bytes()).collect()
    }

    #[test]
    fn what_is_named_is_zero_afterwards_and_nothing_else() {
        for private in [false, true] {
            let memory = memory(private);
            let balloon = Balloon::new(Arc::clone(&memory), FRAMES, None);
            // In no order, twice, and what there is not.
            balloon.changed(&list(&[5, 3, 4, 9, 9, 16, u32::MAX]), 12);
            for frame in 0..FRAMES {
                let at = GuestAddress(frame * PAGE_SIZE);
                let word: u64 = memory.read_obj(at).expect("read");
                let gone = [3, 4, 5, 9].contains(&frame);
                assert_eq!(word, if gone { 0 } else { frame + 1 }, "frame {frame}");
            }
            assert_eq!(balloon.current(), 12 * PAGE_SIZE);
        }
    }

    #[test]
    fn who_waits_is_told() {
        let balloon = Arc::new(Balloon::new(memory(true), FRAMES, None));
        let long = Duration::from_secs(60);
        balloon.wait(FRAMES * PAGE_SIZE, long);
        balloon.wait(1, Duration::from_millis(1));
        let waiting = Arc::clone(&balloon);
        let waiter = std::thread::spawn(move || waiting.wait(4 * PAGE_SIZE, long));
        balloon.changed(&[], 8);
        balloon.changed(&[], 4);
        waiter.join().expect("told");
        let waiting = Arc::clone(&balloon);
        let waiter = std::thread::spawn(move || waiting.wait(1, long));
        balloon.end();
        waiter.join().expect("told");
    }
}
