//! What is fetched, in which order, and what has come and waits for the disk.

use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::vec::Vec;

use bmcast_image::SECTOR;

use crate::Install;

/// Chunks of zeros that wait for the disk.
const MOST_ZEROS: usize = 1024;
/// A chunk that is to be fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Its number.
    pub chunk: u32,
    /// Its first byte in the image.
    pub offset: u64,
    /// Its bytes.
    pub length: u32,
    /// Whether the guest waits for it.
    pub urgent: bool,
}

/// What became of data that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Fetched {
    /// It is right, and will be written.
    Taken,
    /// It is not what the manifest says. It will be asked for again: of another server, if there is one.
    Wrong,
    /// Nobody asked for it.
    Unasked,
}

#[derive(Debug)]
enum Stage {
    /// To be fetched.
    Wanted,
    /// Asked for, so many bytes.
    Fetching(usize),
    /// There; zeros if there is no data.
    Ready(Option<Vec<u8>>),
}

#[derive(Debug)]
struct Entry {
    stage: Stage,
    urgent: bool,
}

/// Chunks on their way from the server to the disk.
#[derive(Debug, Default)]
pub(crate) struct Pipeline {
    entries: BTreeMap<u32, Entry>,
    /// Wanted, the guest waits; the front is first. Those that have gone on since are passed over.
    demanded: VecDeque<u32>,
    /// Wanted again, and nobody waits.
    again: VecDeque<u32>,
    /// Ready, the guest waits.
    urgent: VecDeque<u32>,
    /// Ready.
    ready: BTreeSet<u32>,
    /// Bytes of chunks that are asked for or ready.
    held: usize,
    fetching: usize,
    /// Those among them that the guest waits for.
    fetching_urgent: usize,
    zeros: usize,
    profile_at: usize,
    cursor: u32,
    /// Whether a whole round found nothing more to fetch.
    pub(crate) all_asked: bool,
    /// Bytes that may be fetched now while nobody waits,
    allowance: i64,
    /// and millionths of one.
    millionths: u128,
}

impl Pipeline {
    /// The guest waits for a chunk.
    pub(crate) fn demand(&mut self, chunk: u32, is_zero: bool) {
        let entry = match self.entries.get_mut(&chunk) {
            Some(entry) if entry.urgent => return,
            Some(entry) => {
                entry.urgent = true;
                entry
            }
            None => {
                let stage = match is_zero {
                    true => Stage::Ready(None),
                    false => Stage::Wanted,
                };
                if is_zero {
                    self.ready.insert(chunk);
                    self.zeros += 1;
                }
                self.entries.entry(chunk).or_insert(Entry {
                    stage,
                    urgent: true,
                })
            }
        };
        match entry.stage {
            Stage::Wanted => self.demanded.push_back(chunk),
            Stage::Fetching(_) => self.fetching_urgent += 1,
            Stage::Ready(_) => self.urgent.push_back(chunk),
        }
    }

    /// The next chunk that is ready and that the guest waits for; it stays the next one until it is
    /// removed.
    pub(crate) fn next_urgent(&mut self) -> Option<u32> {
        while let Some(chunk) = self.urgent.front() {
            if self.is_ready(*chunk) {
                return Some(*chunk);
            }
            self.urgent.pop_front();
        }
        None
    }

    /// The next chunk that is ready, from one on and around.
    pub(crate) fn next_ready(&self, from: u32) -> Option<u32> {
        let mut behind = self.ready.range(from..);
        behind.next().or_else(|| self.ready.first()).copied()
    }

    pub(crate) fn is_ready(&self, chunk: u32) -> bool {
        self.ready.contains(&chunk)
    }

    pub(crate) fn ready_between(&self, first: u32, last: u32) -> Vec<u32> {
        self.ready.range(first..=last).copied().collect()
    }

    /// Appends sectors of a chunk that is ready.
    pub(crate) fn copy(&self, chunk: u32, start: u64, count: u64, into: &mut Vec<u8>) {
        let bytes = |sectors: u64| usize::try_from(sectors * SECTOR).unwrap_or(usize::MAX);
        let (start, length) = (bytes(start), bytes(count));
        match self.entries.get(&chunk).map(|entry| &entry.stage) {
            Some(Stage::Ready(Some(data))) if start.saturating_add(length) <= data.len() => {
                into.extend_from_slice(&data[start..start + length]);
            }
            _ => into.resize(into.len() + length, 0),
        }
    }

    /// A chunk is done with.
    pub(crate) fn remove(&mut self, chunk: u32) {
        self.ready.remove(&chunk);
        let Some(entry) = self.entries.remove(&chunk) else {
            return;
        };
        match entry.stage {
            Stage::Fetching(length) => {
                self.held -= length;
                self.no_more_fetching(entry.urgent);
            }
            Stage::Ready(Some(data)) => self.held -= data.len(),
            Stage::Ready(None) => self.zeros -= 1,
            Stage::Wanted => {}
        }
    }

    fn no_more_fetching(&mut self, urgent: bool) {
        self.fetching -= 1;
        self.fetching_urgent -= usize::from(urgent);
    }

    /// Others are to have their turn before this chunk, which is ready.
    pub(crate) fn postpone(&mut self, chunk: u32) {
        if self.urgent.front() == Some(&chunk) {
            self.urgent.rotate_left(1);
        }
    }

    /// Time has passed.
    pub(crate) fn refill(&mut self, rate: Option<u64>, micros: u64) {
        let Some(rate) = rate else { return };
        let more = u128::from(rate) * u128::from(micros) + self.millionths;
        self.millionths = more % 1_000_000;
        let more = more / 1_000_000;
        let most = i64::try_from(rate / 8).unwrap_or(i64::MAX).max(1);
        let more = i64::try_from(more).unwrap_or(i64::MAX);
        self.allowance = self.allowance.saturating_add(more).min(most);
    }

    /// The data of a chunk was not what it should be, or did not come.
    fn ask_again(&mut self, chunk: u32) {
        let Some(entry) = self.entries.get_mut(&chunk) else {
            return;
        };
        if let Stage::Fetching(length) = entry.stage {
            entry.stage = Stage::Wanted;
            self.held -= length;
            let urgent = entry.urgent;
            self.no_more_fetching(urgent);
            match urgent {
                true => self.demanded.push_front(chunk),
                false => self.again.push_back(chunk),
            }
        }
    }

    fn is_wanted(&self, chunk: u32, urgent: bool) -> bool {
        let entry = self.entries.get(&chunk);
        entry.is_some_and(|entry| matches!(entry.stage, Stage::Wanted) && entry.urgent == urgent)
    }

    /// Whether everything that has to come has come.
    pub(crate) fn all_fetched(&self) -> bool {
        self.all_asked && self.entries.len() == self.ready.len()
    }
}

impl Install {
    /// What is to be fetched next, if more may be: it is asked for now. What the guest waits for comes
    /// first, then the profile, then the rest. The answer is [`Install::fetched`] or
    /// [`Install::fetch_failed`].
    pub fn next_fetch(&mut self) -> Option<Fetch> {
        let most = self.options.memory;
        while let Some(chunk) = self.pipeline.demanded.front().copied() {
            if self.pipeline.held >= most.saturating_mul(2) {
                return None;
            }
            self.pipeline.demanded.pop_front();
            if !self.pipeline.is_wanted(chunk, true) {
                continue;
            }
            if self.next_absent(self.chunks.sectors(chunk)).is_some() {
                return Some(self.ask(chunk, true));
            }
            self.pipeline.remove(chunk);
        }
        let pipeline = &self.pipeline;
        let is_too_much = pipeline.held >= most || pipeline.fetching >= self.options.in_flight;
        let is_too_fast = self.options.rate.is_some() && pipeline.allowance <= 0;
        if is_too_much || is_too_fast || self.device.failed.is_some() {
            return None;
        }
        let next = self.next_of_profile();
        // What the guest will want is on its way beside what it wants; the rest would only be in between.
        let chunk = match next {
            None if self.pipeline.fetching_urgent > 0 => return None,
            None => self.next_again().or_else(|| self.next_unasked())?,
            Some(chunk) => chunk,
        };
        let stage = Stage::Wanted;
        let urgent = false;
        self.pipeline.entries.insert(chunk, Entry { stage, urgent });
        Some(self.ask(chunk, false))
    }

    fn ask(&mut self, chunk: u32, urgent: bool) -> Fetch {
        let length = self.chunks.length(chunk);
        let bytes = usize::try_from(length).unwrap_or(0);
        if let Some(entry) = self.pipeline.entries.get_mut(&chunk) {
            entry.stage = Stage::Fetching(bytes);
        }
        self.pipeline.held += bytes;
        self.pipeline.fetching += 1;
        self.pipeline.fetching_urgent += usize::from(urgent);
        if !urgent {
            self.pipeline.allowance -= i64::from(length);
        }
        Fetch {
            chunk,
            offset: self.chunks.offset(chunk),
            length,
            urgent,
        }
    }

    /// The data of a chunk has come.
    pub fn fetched(&mut self, chunk: u32, data: Vec<u8>) -> Fetched {
        let asked = self.pipeline.entries.get(&chunk);
        let is_asked = asked.is_some_and(|entry| matches!(entry.stage, Stage::Fetching(_)));
        if !is_asked {
            return Fetched::Unasked;
        }
        if !self.manifest.verify(chunk, &data) {
            self.counters.wrong += 1;
            self.pipeline.ask_again(chunk);
            return Fetched::Wrong;
        }
        let bytes = data.len();
        if let Some(entry) = self.pipeline.entries.get_mut(&chunk) {
            // `held` stays: the length is the same.
            entry.stage = Stage::Ready(Some(data));
            let urgent = entry.urgent;
            self.pipeline.no_more_fetching(urgent);
            self.pipeline.ready.insert(chunk);
            if urgent {
                self.pipeline.urgent.push_back(chunk);
            }
            self.counters.count(bytes as u64, urgent);
        }
        // The guest may have written all of it meanwhile.
        self.drop_local_chunks(self.chunks.sectors(chunk));
        Fetched::Taken
    }

    /// The data of a chunk did not come: it will be asked for again.
    pub fn fetch_failed(&mut self, chunk: u32) {
        self.pipeline.ask_again(chunk);
    }

    /// Finds zeros for the disk to write, when there is nothing else.
    pub(crate) fn look_ahead(&mut self) {
        if self.pipeline.ready.is_empty()
            && self.pipeline.again.is_empty()
            && let Some(chunk) = self.next_of_profile().or_else(|| self.next_unasked())
        {
            self.pipeline.again.push_back(chunk);
            let stage = Stage::Wanted;
            let urgent = false;
            self.pipeline.entries.insert(chunk, Entry { stage, urgent });
        }
    }

    /// The next chunk whose data did not come and that nobody waits for.
    fn next_again(&mut self) -> Option<u32> {
        while let Some(chunk) = self.pipeline.again.pop_front() {
            if !self.pipeline.is_wanted(chunk, false) {
                continue;
            }
            if self.next_absent(self.chunks.sectors(chunk)).is_some() {
                return Some(chunk);
            }
            self.pipeline.remove(chunk);
        }
        None
    }

    /// The next chunk of the profile that has to be fetched. Those of zeros that it passes are ready.
    fn next_of_profile(&mut self) -> Option<u32> {
        while let Some(chunk) = self
            .manifest
            .profile()
            .get(self.pipeline.profile_at)
            .copied()
        {
            if self.pipeline.zeros >= MOST_ZEROS {
                return None;
            }
            self.pipeline.profile_at += 1;
            if self.consider(chunk) {
                return Some(chunk);
            }
        }
        None
    }

    /// The next chunk that has to be fetched and that nobody waits for. Those of zeros that it passes are
    /// ready.
    fn next_unasked(&mut self) -> Option<u32> {
        // A chunk that a write of the guest's was to make local is met again in the next round.
        for _ in 0..2 {
            loop {
                let rest =
                    crate::behind(self.image, self.chunks.sectors(self.pipeline.cursor).start);
                let is_end = self.pipeline.cursor >= self.chunks.count();
                let Some(run) = self.next_absent(rest).filter(|_| !is_end) else {
                    break;
                };
                if self.pipeline.zeros >= MOST_ZEROS {
                    return None;
                }
                let chunk = self.chunks.of_sector(run.start);
                self.pipeline.cursor = chunk + 1;
                if self.consider(chunk) {
                    self.pipeline.all_asked = false;
                    return Some(chunk);
                }
            }
            self.pipeline.all_asked = true;
            if self.local.missing() == 0 || !self.pipeline.entries.is_empty() {
                return None;
            }
            self.pipeline.cursor = 0;
        }
        None
    }

    /// Whether a chunk has to be fetched and is not on its way. One of zeros becomes ready.
    fn consider(&mut self, chunk: u32) -> bool {
        let is_under_way = self.pipeline.entries.contains_key(&chunk);
        if is_under_way || self.next_absent(self.chunks.sectors(chunk)).is_none() {
            return false;
        }
        if !self.manifest.is_zero(chunk) {
            return true;
        }
        let entry = Entry {
            stage: Stage::Ready(None),
            urgent: false,
        };
        self.pipeline.entries.insert(chunk, entry);
        self.pipeline.ready.insert(chunk);
        self.pipeline.zeros += 1;
        false
    }
}
