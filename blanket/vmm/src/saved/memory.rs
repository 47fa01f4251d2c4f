//! A saved VM's memory: all frames below those of its state that are not zero.

use std::io::{Read, Write};

use blanket_abi::PAGE_SIZE;
use blanket_snapshot::{Error, PAGE, Part, Reader, Writer};
use rustix::fs::SeekFrom;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Moving, ResumeError};
use crate::balloon;
use crate::builder::{Domain, GuestMemory};
use crate::migration::Dirty;

/// Pages that are looked at together.
const RUN: u64 = 256;

/// Where the next frame is, from `frame` on, that the host has ever given: what it has
/// not is zero, and to read it would make it take memory for it.
fn next_given(memory: &GuestMemory, frame: u64) -> Option<u64> {
    let region = memory.iter().next()?;
    let Some(file) = region.file_offset() else {
        // Private memory: what was never written is the host's own page of zeros.
        return Some(frame);
    };
    let at = file.start() + frame * PAGE_SIZE;
    match rustix::fs::seek(file.file(), SeekFrom::Data(at)) {
        Ok(found) => Some((found - file.start()) / PAGE_SIZE),
        Err(rustix::io::Errno::NXIO) => None,
        // A file system that does not know.
        Err(_) => Some(frame),
    }
}

/// Writes them; how many.
pub(crate) fn write<W: Write>(
    writer: &mut Writer<W>,
    domain: &Domain,
) -> Result<u64, super::SaveError> {
    let end = domain.boot.state_base;
    let mut bytes = vec![0; usize::try_from(RUN).unwrap_or(1) * PAGE];
    let (mut frame, mut written) = (0, 0);
    while let Some(first) = next_given(&domain.memory, frame).filter(|first| *first < end) {
        let count = RUN.min(end - first);
        let here = usize::try_from(count).unwrap_or(1) * PAGE;
        let bytes = &mut bytes[..here];
        domain
            .memory
            .read_slice(bytes, GuestAddress(first * PAGE_SIZE))?;
        let (pages, _) = bytes.as_chunks::<PAGE>();
        let mut at = 0;
        // Runs without a page of zeros.
        for run in pages.split(|page| page.iter().all(|byte| *byte == 0)) {
            if !run.is_empty() {
                writer.pages(first + at, run.as_flattened())?;
                written += run.len() as u64;
            }
            at += run.len() as u64 + 1;
        }
        frame = first + count;
    }
    Ok(written)
}

/// Writes those that `dirty` has a bit for, zero or not; how many.
pub(crate) fn write_dirty<W: Write>(
    writer: &mut Writer<W>,
    domain: &Domain,
    dirty: &Dirty,
) -> Result<u64, super::SaveError> {
    let mut bytes = vec![0; usize::try_from(RUN).unwrap_or(1) * PAGE];
    let mut written = 0;
    for (first, count) in dirty.runs(RUN) {
        let bytes = &mut bytes[..usize::try_from(count).unwrap_or(1) * PAGE];
        domain
            .memory
            .read_slice(bytes, GuestAddress(first * PAGE_SIZE))?;
        writer.pages(first, bytes)?;
        written += count;
    }
    Ok(written)
}

/// Reads them into memory that is all zero at first. Pages may come again: the last ones
/// count, and those that are zero then cost the host nothing. Disks and marks come with a VM
/// that moves only.
pub(super) fn read<R: Read>(
    reader: &mut Reader<R>,
    domain: &Domain,
    moving: &mut Option<Moving<'_, R>>,
) -> Result<(), ResumeError> {
    let end = domain.boot.state_base;
    while let Some(part) = reader.part()? {
        let run = match (part, &mut *moving) {
            (Part::Pages(run), _) => run,
            (Part::Disk(piece), Some(moving)) => {
                moving.images.write(&piece)?;
                continue;
            }
            (Part::Mark, Some(moving)) => {
                (moving.answers)(reader.from_mut()).map_err(Error::Read)?;
                continue;
            }
            (Part::Mark, None) => {
                let why = "a saved VM waits for no answers".to_owned();
                return Err(ResumeError::Impossible(why));
            }
            (Part::Disk(piece), None) => {
                let why = "a saved VM brings no disks".to_owned();
                return Err(ResumeError::Disk(piece.number, why));
            }
        };
        let count = (run.bytes.len() / PAGE) as u64;
        if run.first.saturating_add(count) > end {
            return Err(Error::Pages(run.first).into());
        }
        let impossible = |error: String| ResumeError::Impossible(error);
        let (pages, _) = run.bytes.as_chunks::<PAGE>();
        let zero = |page: &[u8; PAGE]| page.iter().all(|byte| *byte == 0);
        let mut first = run.first;
        for part in pages.chunk_by(|a, b| zero(a) == zero(b)) {
            let count = part.len() as u64;
            if zero(&part[0]) {
                balloon::give_back(&domain.memory, first, count)
                    .map_err(|error| impossible(error.to_string()))?;
            } else {
                let at = GuestAddress(first * PAGE_SIZE);
                let written = domain.memory.write_slice(part.as_flattened(), at);
                written.map_err(|error| impossible(error.to_string()))?;
            }
            first += count;
        }
    }
    Ok(())
}
