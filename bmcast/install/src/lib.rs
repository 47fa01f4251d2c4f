//! What is on the disk, what is to be fetched, and what is to be written next.
//!
//! [`Install`] is what a mediator asks ([`Blocks`]) and what feeds the network ([`Install::next_fetch`],
//! [`Install::fetched`]). It holds the truth about each sector of the image, in memory and by the
//! [`Record`] on the disk; see `docs/bmcast.md`. What holds at every moment:
//!
//! - A sector is *local* when its data is on the device: a write of the guest's or one of the VMM's
//!   own was done. Only local sectors are read, and nothing of the VMM's is written to them.
//! - A sector is *durable* when the record on the disk says that it is local. The record says so only
//!   after a flush that followed the write, so whatever a power cut takes away, a sector has what the
//!   guest wrote or what the image has.
#![no_std]

extern crate alloc;

mod commits;
mod fetch;
mod progress;
mod write;

use alloc::vec::Vec;

use bmcast_image::{
    Chunks, Found, Hash, Key, Layout, Manifest, Record, RecordError, SectorSet, Sectors, TooSmall,
};
use bmcast_mediator::{Blocks, Failed, Verdict, Work};

pub use fetch::{Fetch, Fetched};
pub use progress::{Progress, State};

use commits::Commits;
use fetch::Pipeline;
use progress::{Counters, Order};
use write::{Device, Own};

/// Writes of the guest's that may be on the device at once while their sectors are not durable.
const MOST_GUEST_WRITES: usize = 1024;

/// How an installation goes.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Bytes of chunks that are being fetched or wait for the disk while nobody waits for them. What
    /// the guest waits for may have as much again.
    pub memory: usize,
    /// Chunks that are being fetched at once while nobody waits for them.
    pub in_flight: usize,
    /// Bytes per second that are fetched while nobody waits for them.
    pub rate: Option<u64>,
    /// The record is written after so many bytes were,
    pub commit_bytes: u64,
    /// or so many microseconds after the first of them.
    pub commit_micros: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            memory: 16 << 20,
            in_flight: 16,
            rate: None,
            commit_bytes: 64 << 20,
            commit_micros: 5_000_000,
        }
    }
}

/// What an installation has to know of a boot.
#[derive(Clone, Copy, Debug)]
pub struct Boot {
    /// Random bytes, which tell this boot from all others that the disk has seen.
    pub random: [u8; 16],
    /// What the record is sealed with: no record by another key counts. Zeros if there is no key.
    pub key: Key,
    /// Whether it may begin on a disk whose record says nothing of this image, over whatever is there.
    /// Not on one that may have been installed and have lost its record: once the VMM is gone, an OS that
    /// grows to the end of its disk writes over it.
    pub may_begin: bool,
}

/// Why an installation cannot begin or go on. Nothing was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError<E> {
    /// The disk has not the room.
    #[error(transparent)]
    TooSmall(#[from] TooSmall),
    /// Its record cannot be used.
    #[error(transparent)]
    Record(#[from] RecordError<E>),
    /// It has none, and none may be begun.
    #[error("the disk has no record of what is installed, and is not to be written over")]
    NoRecord,
    /// It has that of another image, and none may be begun.
    #[error("image {0} is installed on the disk, which is not to be written over")]
    OtherImage(Hash),
}

/// The image, the disk, and what of the one is on the other.
#[derive(Debug)]
pub struct Install {
    manifest: Manifest,
    chunks: Chunks,
    image: Sectors,
    options: Options,
    record: Record,
    local: SectorSet,
    /// Writes of the guest's on the device, to sectors that are not all durable.
    guest: Vec<Sectors>,
    device: Device,
    commits: Commits,
    pipeline: Pipeline,
    counters: Counters,
    order: Order,
    /// Microseconds, as [`Install::tick`] was told.
    now: u64,
}

impl Install {
    /// Goes on with the installation of an image that is on a disk of `disk` sectors, or begins one over
    /// whatever is there. `read` fills bytes with sectors of the disk.
    ///
    /// # Errors
    /// The disk is too small, cannot be read, or has a record that must not be written over.
    pub fn open<E>(
        disk: u64,
        manifest: Manifest,
        boot: Boot,
        options: Options,
        read: impl FnMut(Sectors, &mut [u8]) -> Result<(), E>,
    ) -> Result<Self, OpenError<E>> {
        let layout = Layout::new(disk, manifest.chunks().image_sectors())?;
        let id = manifest.id();
        let Boot {
            random,
            key,
            may_begin,
        } = boot;
        let record = match Record::find(layout, id, key, random, read)? {
            Found::This(record) => *record,
            Found::Other(other) if !may_begin => return Err(OpenError::OtherImage(other.manifest)),
            Found::Nothing if !may_begin => return Err(OpenError::NoRecord),
            Found::Other(other) => Record::begin(layout, id, key, random, Some(&other)),
            Found::Nothing => Record::begin(layout, id, key, random, None),
        };
        Ok(Self::new(manifest, record, options))
    }

    /// `record` is that of `manifest`.
    fn new(manifest: Manifest, record: Record, options: Options) -> Self {
        let chunks = manifest.chunks();
        Self {
            chunks,
            image: Sectors {
                start: 0,
                count: chunks.image_sectors(),
            },
            options,
            local: record.durable().clone(),
            record,
            guest: Vec::new(),
            device: Device::default(),
            commits: Commits::default(),
            pipeline: Pipeline::default(),
            counters: Counters::default(),
            order: Order::default(),
            manifest,
            now: 0,
        }
    }

    /// What is installed.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Says what time it is, in microseconds from any moment on. To be called often: rates and what is
    /// done every few seconds go by it.
    pub fn tick(&mut self, now: u64) {
        let passed = now.saturating_sub(self.now);
        self.now = self.now.max(now);
        self.pipeline.refill(self.options.rate, passed);
        self.counters.tick(self.now);
    }

    /// Whether all of the image is durably on the disk, so that the VMM may go.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.record.complete()
    }

    /// The first run of these sectors that is not local, nor will be by a write of the guest's that is on
    /// the device.
    fn next_absent(&self, within: Sectors) -> Option<Sectors> {
        let mut rest = within.and(self.image);
        // Each turn but the last passes the end of one write of the guest's.
        for _ in 0..=self.guest.len() {
            let mut run = self.local.next_missing(rest)?;
            let at = Sectors { count: 1, ..run };
            let Some(write) = self.guest.iter().find(|write| write.meets(at)) else {
                for write in &self.guest {
                    if write.meets(run) {
                        run.count = write.start - run.start;
                    }
                }
                return Some(run);
            };
            rest = behind(rest, write.end());
        }
        None
    }

    /// Has all that is missing of these sectors fetched and written before anything else.
    fn demand(&mut self, sectors: Sectors) {
        let mut rest = sectors.and(self.image);
        while let Some(run) = self.next_absent(rest) {
            let chunk = self.chunks.of_sector(run.start);
            let is_zero = self.manifest.is_zero(chunk);
            self.pipeline.demand(chunk, is_zero);
            rest = behind(rest, self.chunks.sectors(chunk).end());
        }
    }
}

/// What of a range lies at or behind a sector.
fn behind(range: Sectors, sector: u64) -> Sectors {
    let start = sector.max(range.start);
    Sectors {
        start,
        count: range.end().saturating_sub(start),
    }
}

impl Blocks for Install {
    fn visible(&self) -> u64 {
        self.record.layout().visible()
    }

    fn read(&mut self, sectors: Sectors) -> Verdict {
        let inside = sectors.and(self.image);
        if !inside.is_empty() {
            let first = self.chunks.of_sector(inside.start);
            let last = self.chunks.of_sector(inside.end() - 1);
            // A command has at most 65,536 sectors.
            (first..=last).for_each(|chunk| self.order.note(chunk));
        }
        if self.local.contains(sectors) {
            return Verdict::Pass;
        }
        self.demand(sectors);
        Verdict::Hold
    }

    fn write(&mut self, sectors: Sectors, fua: bool) -> Verdict {
        if !self.record.begun() {
            // What the record before this one says is still true, of all sectors.
            return Verdict::Hold;
        }
        if let Some(Own::Data(own)) = &self.device.own
            && own.meets(sectors)
        {
            return Verdict::Hold;
        }
        let inside = sectors.and(self.image);
        if self.record.durable().contains(inside) {
            return Verdict::Pass;
        }
        if fua {
            // If the power goes while it is written, or behind it, the record must say already that
            // these sectors are to be read from the disk, and they must have something to be read.
            if self.local.contains(inside) {
                self.commits.want();
            } else {
                self.demand(inside);
            }
            return Verdict::Hold;
        }
        // A flush that waits for the record would wait for ever if there was always more to record.
        if self.commits.flush_waits() || self.guest.len() >= MOST_GUEST_WRITES {
            return Verdict::Hold;
        }
        self.guest.push(inside);
        Verdict::Pass
    }

    fn written(&mut self, sectors: Sectors) {
        let inside = sectors.and(self.image);
        let Some(at) = self.guest.iter().position(|write| *write == inside) else {
            return;
        };
        self.guest.swap_remove(at);
        self.local.insert(inside);
        self.mark(inside, true);
        self.drop_local_chunks(inside);
    }

    fn flush(&mut self) -> Verdict {
        if self.commits.guest_is_recorded() {
            return Verdict::Pass;
        }
        self.commits.flush_wants();
        Verdict::Hold
    }

    fn next(&mut self, quiet: bool) -> Option<Work> {
        self.next_work(quiet)
    }

    fn done(&mut self, result: Result<(), Failed>) {
        self.work_done(result);
    }
}
