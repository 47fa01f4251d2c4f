//! Pages that the destination can find: blocks of what the disks stand on, which both sides have.
//! From where a page was read says only where to look. It is compared before it is named, with
//! what no guest can write.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blanket_devices::block::Origins;
use blanket_devices::bus::Device as _;
use blanket_disk::Reader;
use blanket_snapshot::{Base as Named, Error, PAGE, Writer};

use crate::devices::{AnyDevice, Devices, DiskFile};
use crate::saved::ResumeError;

/// What the disks stand on, by their numbers.
#[derive(Default)]
pub(crate) struct Bases {
    bases: BTreeMap<u32, Base>,
    /// Pages that were named.
    found: AtomicU64,
}

/// What a disk stands on.
struct Base {
    below: Reader,
    /// Which of its blocks the guest's pages were, when they were read.
    origins: Option<Arc<Origins>>,
}

/// Where the bytes of a page are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Block {
    number: u32,
    block: u64,
}

impl Bases {
    /// Those of the disks that are copied when a VM moves. That the destination has the same ones by
    /// name it has said before.
    pub(crate) fn of(devices: &Devices) -> Self {
        let bases = devices.iter().filter_map(|device| match device {
            AnyDevice::Disk(disk, DiskFile { reader, base, .. })
                if base.is_some() && !disk.disk().read_only() =>
            {
                let base = Base {
                    below: reader.below()?,
                    origins: disk.origins().cloned(),
                };
                Some((disk.number(), base))
            }
            _ => None,
        });
        Self {
            bases: bases.collect(),
            found: AtomicU64::new(0),
        }
    }

    /// What one disk stands on, whose guest has read nothing.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn on(number: u32, below: Reader) -> Self {
        let base = Base {
            below,
            origins: None,
        };
        Self {
            bases: BTreeMap::from([(number, base)]),
            found: AtomicU64::new(0),
        }
    }

    /// How many pages were named.
    pub(crate) fn found(&self) -> u64 {
        self.found.load(Ordering::Relaxed)
    }

    /// Writes pages: those that are found are named, the others sent. How many were sent.
    pub(crate) fn write<W: Write>(
        &self,
        writer: &mut Writer<W>,
        first: u64,
        pages: &[[u8; PAGE]],
    ) -> Result<u64, Error> {
        let (mut at, mut sent) = (0, 0);
        for run in self.find(first, pages).chunk_by(|a, b| match (a, b) {
            (Some(a), Some(b)) => a.number == b.number && a.block + 1 == b.block,
            (a, b) => a.is_none() && b.is_none(),
        }) {
            let (gfn, count) = (first + at as u64, run.len() as u64);
            let bytes = pages[at..at + run.len()].as_flattened();
            if let Some(Some(Block { number, block })) = run.first() {
                writer.base(*number, gfn, *block, bytes)?;
                self.found.fetch_add(count, Ordering::Relaxed);
            } else {
                writer.pages(gfn, bytes)?;
                sent += count;
            }
            at += run.len();
        }
        Ok(sent)
    }

    /// Where the bytes of each page are, if they are found.
    fn find(&self, first: u64, pages: &[[u8; PAGE]]) -> Vec<Option<Block>> {
        let mut found = vec![None; pages.len()];
        for (number, base) in &self.bases {
            base.find(*number, first, pages, &mut found);
        }
        found
    }

    /// The bytes of pages that the source has named.
    pub(crate) fn read(&self, named: &Named) -> Result<Vec<u8>, ResumeError> {
        let bad = |why: String| ResumeError::Base(named.number, why);
        let base = self.bases.get(&named.number).ok_or_else(|| {
            bad(
                "pages are said to be in what it stands on, and here it is not, or stands on \
                 nothing that is named: give it the base= that it has at its source"
                    .into(),
            )
        })?;
        let mut bytes = vec![0; named.length()];
        let other = || {
            bad(
                "what it stands on is not what the source's stands on: give both the same base"
                    .into(),
            )
        };
        match base.below.read_exact_at(named.offset(), &mut bytes) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Err(other()),
            Err(error) => {
                let why = format!("what it stands on cannot be read: {error}");
                return Err(bad(why));
            }
        }
        if !named.is(&bytes) {
            return Err(other());
        }
        // For the next time that it moves.
        if let Some(origins) = &base.origins {
            origins.note(named.first, named.offset(), named.count.into());
        }
        Ok(bytes)
    }
}

impl Base {
    /// Looks for those pages that are not found yet. Whatever is not there, or cannot be read, is sent
    /// like any other.
    fn find(&self, number: u32, first: u64, pages: &[[u8; PAGE]], found: &mut [Option<Block>]) {
        let Some(origins) = &self.origins else { return };
        let mut hints = origins.of(first, pages.len());
        for ((hint, page), found) in hints.iter_mut().zip(pages).zip(found.iter()) {
            // Zeros are short enough as they are.
            if hint.is_some() && (found.is_some() || page.iter().all(|byte| *byte == 0)) {
                *hint = None;
            }
        }
        let mut at = 0;
        // What lies beside each other is read at once.
        for run in hints.chunk_by(|a, b| match (a, b) {
            (Some(a), Some(b)) => a + 1 == *b,
            (a, b) => a.is_none() && b.is_none(),
        }) {
            let here = at..at + run.len();
            at = here.end;
            let Some(Some(block)) = run.first() else {
                continue;
            };
            let blocks = self.blocks(number, *block, run.len());
            for ((index, block), hint) in here.zip(*block..).zip(0..) {
                if blocks.get(hint) == Some(&pages[index]) {
                    found[index] = Some(Block { number, block });
                } else {
                    origins.forget(first + index as u64, block);
                }
            }
        }
    }

    /// Its blocks from this one on, as far as there are any.
    fn blocks(&self, number: u32, block: u64, count: usize) -> Vec<[u8; PAGE]> {
        let there = (self.below.size() / PAGE as u64).saturating_sub(block);
        let count = count.min(usize::try_from(there).unwrap_or(usize::MAX));
        let mut blocks = vec![[0; PAGE]; count];
        let read = self
            .below
            .read_exact_at(block * PAGE as u64, blocks.as_flattened_mut());
        if let Err(error) = read {
            tracing::debug!(%error, number, "what a disk stands on cannot be read");
            return Vec::new();
        }
        blocks
    }
}

#[cfg(test)]
#[path = "bases/tests.rs"]
mod tests;
