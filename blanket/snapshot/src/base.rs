//! Pages that are blocks of what a disk stands on: number of the disk, number of pages, first
//! page, first block, the hash of their bytes.

use std::io;

use crate::PAGE;

/// Most pages that are named together.
pub const MAX_BLOCKS: usize = 256;

/// Pages that follow each other, and whose bytes are blocks of a page's size that follow each
/// other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// Number of the disk.
    pub number: u32,
    /// How many pages.
    pub count: u32,
    /// Number of the first page.
    pub first: u64,
    /// Number of the first block of what the disk stands on.
    pub block: u64,
    /// BLAKE3 of their bytes.
    hash: [u8; 32],
}

impl Base {
    /// Where the bytes are in what the disk stands on.
    #[must_use]
    pub fn offset(&self) -> u64 {
        // It was looked at when it was unpacked.
        self.block.saturating_mul(PAGE as u64)
    }

    /// How many bytes they are.
    #[must_use]
    pub fn length(&self) -> usize {
        self.count as usize * PAGE
    }

    /// Whether these bytes are those that were meant.
    #[must_use]
    pub fn is(&self, bytes: &[u8]) -> bool {
        bytes.len() == self.length() && blake3::hash(bytes) == blake3::Hash::from(self.hash)
    }
}

pub(crate) fn pack(number: u32, first: u64, block: u64, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let count = bytes.len() / PAGE;
    let count = u32::try_from(count).ok();
    let count = count.filter(|_| bytes.len().is_multiple_of(PAGE));
    let packed = count.map(|count| {
        let mut packed = number.to_le_bytes().to_vec();
        packed.extend(count.to_le_bytes());
        packed.extend(first.to_le_bytes());
        packed.extend(block.to_le_bytes());
        packed.extend(blake3::hash(bytes).as_bytes());
        packed
    });
    let packed = packed.filter(|packed| unpack(packed).is_some());
    packed.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

pub(crate) fn unpack(packed: &[u8]) -> Option<Base> {
    let (number, rest) = packed.split_first_chunk::<4>()?;
    let (count, rest) = rest.split_first_chunk::<4>()?;
    let (first, rest) = rest.split_first_chunk::<8>()?;
    let (block, rest) = rest.split_first_chunk::<8>()?;
    let base = Base {
        number: u32::from_le_bytes(*number),
        count: u32::from_le_bytes(*count),
        first: u64::from_le_bytes(*first),
        block: u64::from_le_bytes(*block),
        hash: rest.try_into().ok()?,
    };
    if !(1..=MAX_BLOCKS).contains(&usize::try_from(base.count).ok()?) {
        return None;
    }
    base.first.checked_add(base.count.into())?;
    let end = base.block.checked_add(base.count.into())?;
    end.checked_mul(PAGE as u64)?;
    Some(base)
}
