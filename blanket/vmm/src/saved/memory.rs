//! A saved VM's memory: all frames below those of its state that are not zero.

use std::io::{Read, Write};

use blanket_abi::PAGE_SIZE;
use blanket_snapshot::{Error, PAGE, Reader, Writer};
use rustix::fs::SeekFrom;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::ResumeError;
use crate::builder::{Domain, GuestMemory};

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
pub(super) fn write<W: Write>(
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

/// Reads them into memory that is all zero.
pub(super) fn read<R: Read>(reader: &mut Reader<R>, domain: &Domain) -> Result<(), ResumeError> {
    let end = domain.boot.state_base;
    while let Some(run) = reader.pages()? {
        let count = (run.bytes.len() / PAGE) as u64;
        if run.first.saturating_add(count) > end {
            return Err(Error::Pages(run.first).into());
        }
        domain
            .memory
            .write_slice(&run.bytes, GuestAddress(run.first * PAGE_SIZE))
            .map_err(|error| ResumeError::Impossible(error.to_string()))?;
    }
    Ok(())
}
