//! Pieces of disks: number of the disk, offset, length, their bytes by zstd.

use std::io;

use crate::packing;

/// Most bytes of a piece.
pub const MAX_PIECE: usize = 1 << 20;

/// Bytes of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Number of the disk.
    pub number: u32,
    /// Where they are, bytes.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
}

pub(crate) fn pack(number: u32, offset: u64, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let length = u32::try_from(bytes.len()).ok();
    let length = length.filter(|_| (1..=MAX_PIECE).contains(&bytes.len()));
    let length = length.ok_or(io::ErrorKind::InvalidInput)?;
    let mut packed = number.to_le_bytes().to_vec();
    packed.extend(length.to_le_bytes());
    packed.extend(offset.to_le_bytes());
    packing::pack(&mut packed, bytes)?;
    Ok(packed)
}

pub(crate) fn unpack(packed: &[u8]) -> Option<Piece> {
    let (number, rest) = packed.split_first_chunk::<4>()?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let (offset, rest) = rest.split_first_chunk::<8>()?;
    let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
    if !(1..=MAX_PIECE).contains(&length) {
        return None;
    }
    let bytes = packing::unpack(rest, length)?;
    let offset = u64::from_le_bytes(*offset);
    offset.checked_add(length as u64)?;
    Some(Piece {
        number: u32::from_le_bytes(*number),
        offset,
        bytes,
    })
}
