//! Runs of pages: first page, number of pages, their bytes by zstd.

use std::io;

use crate::packing;

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Most pages of a run.
pub(crate) const MAX_RUN: usize = 4096;

/// Pages that follow each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Number of the first one.
    pub first: u64,
    /// Their bytes: whole pages.
    pub bytes: Vec<u8>,
}

impl Run {
    /// Pages as bytes, compressed.
    ///
    /// # Errors
    /// They are no whole pages, or too many.
    pub fn pack(first: u64, bytes: &[u8]) -> io::Result<Vec<u8>> {
        pack(first, bytes)
    }

    /// Of bytes that somebody else has packed; `None` if they are no run.
    #[must_use]
    pub fn unpack(packed: &[u8]) -> Option<Self> {
        unpack(packed)
    }
}

pub(crate) fn pack(first: u64, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let count = bytes.len() / PAGE;
    if !bytes.len().is_multiple_of(PAGE) || count == 0 || count > MAX_RUN {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut packed = first.to_le_bytes().to_vec();
    packed.extend((count as u64).to_le_bytes());
    packing::pack(&mut packed, bytes)?;
    Ok(packed)
}

/// Which pages are in a run: the first one, and how many.
pub(crate) fn which(packed: &[u8]) -> Option<(u64, u64)> {
    let (first, rest) = packed.split_first_chunk::<8>()?;
    let (count, _) = rest.split_first_chunk::<8>()?;
    let (first, count) = (u64::from_le_bytes(*first), u64::from_le_bytes(*count));
    first.checked_add(count)?;
    (count > 0 && count <= MAX_RUN as u64).then_some((first, count))
}

pub(crate) fn unpack(packed: &[u8]) -> Option<Run> {
    let (first, count) = which(packed)?;
    let length = usize::try_from(count).ok()? * PAGE;
    let bytes = packing::unpack(packed.get(16..)?, length)?;
    Some(Run { first, bytes })
}
