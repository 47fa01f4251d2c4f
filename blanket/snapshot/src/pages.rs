//! Runs of pages: first page, number of pages, their bytes by zstd.

use std::io;

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Most pages of a run.
pub(crate) const MAX_RUN: usize = 4096;

/// How hard to compress: memory changes hands once, and the CPU is the guest's, too.
const LEVEL: i32 = 1;

/// Pages that follow each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Number of the first one.
    pub first: u64,
    /// Their bytes: whole pages.
    pub bytes: Vec<u8>,
}

pub(crate) fn pack(first: u64, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let count = bytes.len() / PAGE;
    if !bytes.len().is_multiple_of(PAGE) || count == 0 || count > MAX_RUN {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut packed = first.to_le_bytes().to_vec();
    packed.extend((count as u64).to_le_bytes());
    packed.extend(zstd::bulk::compress(bytes, LEVEL)?);
    Ok(packed)
}

pub(crate) fn unpack(packed: &[u8]) -> Option<Run> {
    let (first, rest) = packed.split_first_chunk::<8>()?;
    let (count, rest) = rest.split_first_chunk::<8>()?;
    let count = usize::try_from(u64::from_le_bytes(*count)).ok()?;
    if count == 0 || count > MAX_RUN {
        return None;
    }
    let bytes = zstd::bulk::decompress(rest, count * PAGE).ok()?;
    let first = u64::from_le_bytes(*first);
    first.checked_add(count as u64)?;
    (bytes.len() == count * PAGE).then_some(Run { first, bytes })
}
