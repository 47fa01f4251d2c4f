//! When the record on the disk is written.
//!
//! A commit is a flush, the changed pieces of the record, and a flush. What it says was done before
//! the first flush began.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use bmcast_image::{Commit, Record, SectorSet, Sectors};
use bmcast_mediator::{MAX_WORK, Work};

use crate::Install;

/// Blocks of the record in one commit, each 4 KiB.
const MOST_BLOCKS: usize = 256;

/// What of the record is not on the disk, and the commit that runs.
#[derive(Debug, Default)]
pub(crate) struct Commits {
    /// Blocks that differ, and whether by what the guest wrote.
    dirty: BTreeMap<u32, bool>,
    /// When the first of them did.
    since: u64,
    /// Bytes that were written since the last commit began.
    bytes: u64,
    running: Option<Running>,
    flush_waits: bool,
    wanted: bool,
}

#[derive(Debug)]
struct Running {
    commit: Commit,
    stage: Stage,
    /// Whether something of it is the guest's.
    guest: bool,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    FlushData,
    Write(usize),
    FlushRecord,
}

impl Commits {
    /// Somebody waits for what is dirty now.
    pub(crate) fn want(&mut self) {
        self.wanted = true;
    }

    /// A flush of the guest's waits.
    pub(crate) fn flush_wants(&mut self) {
        self.flush_waits = true;
        self.wanted = true;
    }

    pub(crate) fn flush_waits(&self) -> bool {
        self.flush_waits
    }

    /// Whether the record has all that the guest has written.
    pub(crate) fn guest_is_recorded(&self) -> bool {
        !self.dirty.values().any(|guest| *guest)
            && !self.running.as_ref().is_some_and(|running| running.guest)
    }

    /// Whether somebody waits for the commit that runs or is to come.
    pub(crate) fn is_urgent(&self) -> bool {
        self.wanted && (self.running.is_some() || !self.dirty.is_empty())
    }

    /// Whether it is time for one that nobody waits for.
    pub(crate) fn is_due(&self, now: u64, bytes: u64, micros: u64) -> bool {
        let is_old = now.saturating_sub(self.since) >= micros;
        self.running.is_some() || !self.dirty.is_empty() && (self.bytes >= bytes || is_old)
    }

    /// The next work of the commit that runs, or of a new one.
    pub(crate) fn step(&mut self, record: &Record, local: &SectorSet) -> Work {
        let running = match self.running.take() {
            Some(running) => running,
            None => self.begin(record, local),
        };
        let work = match running.stage {
            Stage::FlushData | Stage::FlushRecord => Work::Flush,
            Stage::Write(n) => match running.commit.pieces().get(n) {
                Some(piece) => Work::Write {
                    to: piece.to,
                    data: piece.data.clone(),
                },
                None => Work::Flush,
            },
        };
        self.running = Some(running);
        work
    }

    fn begin(&mut self, record: &Record, local: &SectorSet) -> Running {
        self.bytes = 0;
        let (commit, guest) = if local.missing() == 0 && record.begun() {
            (record.completion(), true)
        } else {
            let of = |dirty: &BTreeMap<u32, bool>, guest: bool| -> Vec<u32> {
                let those = dirty.iter().filter(|(_, is)| **is == guest);
                those.map(|(block, _)| *block).collect()
            };
            let mut blocks = of(&self.dirty, true);
            let guest = !blocks.is_empty();
            blocks.extend(of(&self.dirty, false));
            blocks.truncate(MOST_BLOCKS);
            for block in &blocks {
                self.dirty.remove(block);
            }
            (record.commit(local, blocks, MAX_WORK), guest)
        };
        Running {
            commit,
            stage: Stage::FlushData,
            guest,
        }
    }

    /// The last step is done. Whether the commit holds.
    pub(crate) fn step_done(&mut self, record: &mut Record) -> bool {
        let Some(running) = &mut self.running else {
            return false;
        };
        running.stage = match running.stage {
            Stage::FlushData => Stage::Write(0),
            Stage::Write(n) => Stage::Write(n + 1),
            Stage::FlushRecord => {
                record.committed(&running.commit);
                self.running = None;
                if record.complete() {
                    self.dirty.clear();
                }
                // Whoever else waits asks again.
                self.flush_waits &= self.dirty.values().any(|guest| *guest);
                self.wanted = self.flush_waits;
                return true;
            }
        };
        if let Stage::Write(n) = running.stage
            && n >= running.commit.pieces().len()
        {
            running.stage = Stage::FlushRecord;
        }
        false
    }

    /// The last step has failed: another commit will say the same. It goes to the places that this one
    /// went to, so the last one that holds stays.
    pub(crate) fn step_failed(&mut self) {
        if let Some(running) = self.running.take() {
            for block in running.commit.blocks() {
                *self.dirty.entry(*block).or_default() |= running.guest;
            }
        }
    }
}

impl Install {
    /// Sectors have become local, or the guest has written them.
    pub(crate) fn mark(&mut self, sectors: Sectors, guest: bool) {
        let layout = self.record.layout();
        let (commits, durable) = (&mut self.commits, self.record.durable());
        if commits.dirty.is_empty() {
            commits.since = self.now;
        }
        commits.bytes += sectors.count * bmcast_image::SECTOR;
        let mut rest = sectors;
        while let Some(run) = durable.next_missing(rest) {
            let block = layout.block_of(run.start);
            *commits.dirty.entry(block).or_default() |= guest;
            rest = crate::behind(rest, layout.sectors_of(block).end());
        }
    }
}
