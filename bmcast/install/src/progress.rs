//! How far it is.

use alloc::string::ToString as _;
use alloc::vec::Vec;

use bmcast_image::{MachineState, MachineStatus};
use bmcast_mediator::Failed;

use crate::Install;

/// Microseconds over which a rate is taken.
const WINDOW: u64 = 1_000_000;

/// Chunks in the order in which the guest wanted them that are remembered: as many as a server takes.
const MOST_ORDER: usize = 1 << 16;

/// The order in which the guest read the image, whether a chunk was there already or not.
#[derive(Debug, Default)]
pub(crate) struct Order {
    /// Chunks that are in it, a bit each.
    seen: Vec<u64>,
    list: Vec<u32>,
}

impl Order {
    /// The guest reads this chunk.
    pub(crate) fn note(&mut self, chunk: u32) {
        let (word, bit) = (
            usize::try_from(chunk / 64).unwrap_or(usize::MAX),
            chunk % 64,
        );
        if self.list.len() >= MOST_ORDER {
            return;
        }
        if self.seen.len() <= word {
            self.seen.resize(word.saturating_add(1), 0);
        }
        if let Some(seen) = self.seen.get_mut(word)
            && *seen & 1 << bit == 0
        {
            *seen |= 1 << bit;
            self.list.push(chunk);
        }
    }
}

/// What an installation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Chunks are still to come from the server.
    Streaming,
    /// All have come, and some are still to be written.
    Installing,
    /// All is durably on the disk.
    Complete,
}

/// How far an installation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What it does.
    pub state: State,
    /// Sectors of the image.
    pub sectors: u64,
    /// Those that are not on the disk yet.
    pub sectors_left: u64,
    /// Bytes that were fetched, and were right.
    pub fetched_bytes: u64,
    /// Chunks among them that the guest waited for.
    pub demand_chunks: u64,
    /// Chunks among them that nobody waited for.
    pub background_chunks: u64,
    /// Bytes of the image that were written to the disk.
    pub written_bytes: u64,
    /// Chunks that were not what the manifest says.
    pub wrong_chunks: u64,
    /// Bytes per second that are fetched.
    pub rate: u64,
    /// Why the disk does not take what is written to it, if it does not.
    pub failed: Option<Failed>,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    fetched: u64,
    demand: u64,
    background: u64,
    pub(crate) written: u64,
    pub(crate) wrong: u64,
    rate: u64,
    window: u64,
    at_window: u64,
}

impl Counters {
    /// A chunk has come.
    pub(crate) fn count(&mut self, bytes: u64, urgent: bool) {
        self.fetched += bytes;
        match urgent {
            true => self.demand += 1,
            false => self.background += 1,
        }
    }

    pub(crate) fn tick(&mut self, now: u64) {
        let passed = now.saturating_sub(self.window);
        if passed >= WINDOW {
            let bytes = u128::from(self.fetched - self.at_window);
            let rate = bytes * 1_000_000 / u128::from(passed);
            self.rate = u64::try_from(rate).unwrap_or(u64::MAX);
            self.window = now;
            self.at_window = self.fetched;
        }
    }
}

impl Install {
    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let counters = &self.counters;
        let state = match self.record.complete() {
            true => State::Complete,
            false if self.local.missing() == 0 || self.pipeline.all_fetched() => State::Installing,
            false => State::Streaming,
        };
        Progress {
            state,
            sectors: self.local.sectors(),
            sectors_left: self.local.missing(),
            fetched_bytes: counters.fetched,
            demand_chunks: counters.demand,
            background_chunks: counters.background,
            written_bytes: counters.written,
            wrong_chunks: counters.wrong,
            rate: counters.rate,
            failed: self.device.failed,
        }
    }

    /// What the server is told of it. `gone`: the VMM is, or is about to be.
    #[must_use]
    pub fn status(&self, machine: &str, gone: bool) -> MachineStatus {
        let progress = self.progress();
        MachineStatus {
            machine: machine.into(),
            manifest: self.manifest.id(),
            state: match progress.state {
                State::Streaming => MachineState::Streaming,
                State::Complete if gone => MachineState::DeVirtualized,
                State::Installing | State::Complete => MachineState::Installing,
            },
            sectors: progress.sectors,
            sectors_left: progress.sectors_left,
            fetched_bytes: progress.fetched_bytes,
            written_bytes: progress.written_bytes,
            demand_chunks: progress.demand_chunks,
            background_chunks: progress.background_chunks,
            wrong_chunks: progress.wrong_chunks,
            rate: progress.rate,
            error: progress.failed.map(|failed| failed.to_string()),
        }
    }

    /// Chunks in the order in which the guest wanted them, each once: a profile for later boots.
    #[must_use]
    pub fn order(&self) -> &[u32] {
        &self.order.list
    }

    /// The same as the server takes it at `PUT /machines/NAME/profile`.
    #[must_use]
    pub fn order_bytes(&self) -> Vec<u8> {
        let bytes = self.order().iter().flat_map(|chunk| chunk.to_le_bytes());
        bytes.collect()
    }
}
