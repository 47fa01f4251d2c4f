//! What the device is to do next.

use alloc::vec::Vec;

use bmcast_image::{SECTOR, Sectors};
use bmcast_mediator::{Failed, MAX_WORK, Work};

use crate::Install;

/// Failures of the device, one after the other, until it counts as failed.
const RETRIES: u32 = 5;
/// Microseconds between tries from then on.
const PAUSE: u64 = 1_000_000;
const MAX_SECTORS: u64 = MAX_WORK as u64 / SECTOR;

/// A command of the VMM's own.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Own {
    /// Of the image.
    Data(Sectors),
    /// Of a commit.
    Commit,
}

/// What is on the device, and how it fares.
#[derive(Debug, Default)]
pub(crate) struct Device {
    pub(crate) own: Option<Own>,
    /// Whether the last urgent work was of a commit: they take turns with data.
    was_commit: bool,
    failures: u32,
    pub(crate) failed: Option<Failed>,
    retry_at: u64,
    /// Where the last data ended: what nobody waits for goes on from there.
    at: u32,
}

impl Install {
    pub(crate) fn next_work(&mut self, quiet: bool) -> Option<Work> {
        let device = &self.device;
        if device.own.is_some() || device.failed.is_some() && self.now < device.retry_at {
            return None;
        }
        if !self.record.begun() {
            return Some(self.commit());
        }
        let commit_first = self.commits.is_urgent() && !self.device.was_commit;
        if commit_first {
            return Some(self.commit());
        }
        while let Some(chunk) = self.pipeline.next_urgent() {
            if let Some(work) = self.data(chunk) {
                return Some(work);
            }
        }
        if self.commits.is_urgent() {
            return Some(self.commit());
        }
        if !quiet || self.record.complete() {
            return None;
        }
        let options = &self.options;
        let is_due = self
            .commits
            .is_due(self.now, options.commit_bytes, options.commit_micros);
        if is_due || self.local.missing() == 0 {
            return Some(self.commit());
        }
        self.look_ahead();
        while let Some(chunk) = self.pipeline.next_ready(self.device.at) {
            if let Some(work) = self.data(chunk) {
                return Some(work);
            }
        }
        None
    }

    fn commit(&mut self) -> Work {
        self.device.own = Some(Own::Commit);
        self.device.was_commit = true;
        self.commits.step(&self.record, &self.local)
    }

    /// Writes what is missing of a chunk that is ready, and of those behind it; none if nothing is.
    fn data(&mut self, chunk: u32) -> Option<Work> {
        let Some(mut run) = self.next_absent(self.chunks.sectors(chunk)) else {
            self.pipeline.remove(chunk);
            return None;
        };
        let mut data = Vec::new();
        let mut last = chunk;
        loop {
            let of_chunk = self.chunks.sectors(last);
            let part = run.and(of_chunk);
            let room = MAX_SECTORS - data.len() as u64 / SECTOR;
            let part = Sectors {
                count: part.count.min(room),
                ..part
            };
            self.pipeline
                .copy(last, part.start - of_chunk.start, part.count, &mut data);
            run.count = part.end() - run.start;
            let next = self.chunks.sectors(last + 1);
            if part.end() < of_chunk.end() || part.count == room || next.is_empty() {
                break;
            }
            match self.next_absent(next) {
                Some(more) if more.start == run.end() && self.pipeline.is_ready(last + 1) => {
                    run.count += more.count;
                    last += 1;
                }
                _ => break,
            }
        }
        self.device.own = Some(Own::Data(run));
        self.device.was_commit = false;
        self.device.at = last;
        Some(Work::Write { to: run, data })
    }

    pub(crate) fn work_done(&mut self, result: Result<(), Failed>) {
        let Some(own) = self.device.own.take() else {
            return;
        };
        match result {
            Ok(()) => {
                self.device.failures = 0;
                self.device.failed = None;
                match own {
                    Own::Data(sectors) => {
                        self.local.insert(sectors);
                        self.counters.written += sectors.count * SECTOR;
                        self.mark(sectors, false);
                        self.drop_local_chunks(sectors);
                    }
                    Own::Commit => {
                        self.commits.step_done(&mut self.record);
                    }
                }
            }
            Err(failed) => {
                self.device.failures = self.device.failures.saturating_add(1);
                if self.device.failures >= RETRIES {
                    self.device.failed = Some(failed);
                    self.device.retry_at = self.now.saturating_add(PAUSE);
                }
                match own {
                    // Others get their turn before it is tried again.
                    Own::Data(sectors) => {
                        let chunk = self.chunks.of_sector(sectors.start);
                        self.pipeline.postpone(chunk);
                        self.device.at = chunk + 1;
                    }
                    Own::Commit => self.commits.step_failed(),
                }
            }
        }
    }

    /// Forgets chunks of which nothing is to be written any more.
    pub(crate) fn drop_local_chunks(&mut self, sectors: Sectors) {
        if sectors.is_empty() {
            return;
        }
        let first = self.chunks.of_sector(sectors.start);
        let last = self.chunks.of_sector(sectors.end() - 1);
        for chunk in self.pipeline.ready_between(first, last) {
            if self.next_absent(self.chunks.sectors(chunk)).is_none() {
                self.pipeline.remove(chunk);
            }
        }
    }
}
