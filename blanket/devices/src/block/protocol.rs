//! Requests and responses of block devices (`public/io/blkif.h`, 64-bit layout).

use crate::page::SIZE as PAGE;

/// Bytes of a slot of the ring.
pub const SLOT: usize = 112;
/// Segments in a request's own slot (`BLKIF_MAX_SEGMENTS_PER_REQUEST`).
pub const DIRECT_SEGMENTS: usize = 11;
/// Pages of segments that a slot can name (`BLKIF_MAX_INDIRECT_PAGES_PER_REQUEST`).
pub const INDIRECT_PAGES: usize = 8;
/// Segments in such a page.
pub const SEGMENTS_PER_PAGE: usize = PAGE / SEGMENT;
/// Bytes of a segment.
const SEGMENT: usize = 8;
/// Most segments of an indirect request that this backend takes.
pub const MAX_SEGMENTS: usize = 256;
/// Bytes of a sector on the ring, whatever the disk's own is.
pub const SECTOR: usize = 512;
/// Sectors of a page.
const SECTORS_PER_PAGE: u8 = 8;

/// `BLKIF_OP_*`.
pub mod op {
    /// Read.
    pub const READ: u8 = 0;
    /// Write.
    pub const WRITE: u8 = 1;
    /// Write after all before it; not offered.
    pub const WRITE_BARRIER: u8 = 2;
    /// Make what was written durable.
    pub const FLUSH: u8 = 3;
    /// Give space back.
    pub const DISCARD: u8 = 5;
    /// Read or write, with segments in pages of their own.
    pub const INDIRECT: u8 = 6;
}

/// `BLKIF_RSP_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i16)]
pub enum Status {
    /// Done.
    Okay = 0,
    /// Failed.
    Error = -1,
    /// Not known.
    Unsupported = -2,
}

/// A piece of a page of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Grant of the page.
    pub gref: u32,
    /// First sector in the page.
    pub first: u8,
    /// Last sector in the page, included; at least `first`.
    pub last: u8,
}

impl Segment {
    /// Offset in the page, bytes.
    #[must_use]
    pub fn offset(&self) -> usize {
        usize::from(self.first) * SECTOR
    }

    /// Length, bytes.
    #[must_use]
    pub fn length(&self) -> usize {
        (usize::from(self.last - self.first) + 1) * SECTOR
    }

    fn decode(bytes: [u8; SEGMENT]) -> Result<Self, Bad> {
        let [a, b, c, d, first, last, ..] = bytes;
        if first > last || last >= SECTORS_PER_PAGE {
            return Err(Bad::Segment { first, last });
        }
        Ok(Self {
            gref: u32::from_le_bytes([a, b, c, d]),
            first,
            last,
        })
    }
}

/// What a request asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Data from the disk, or to it.
    Transfer {
        /// To the disk.
        write: bool,
        /// First sector on the disk.
        sector: u64,
        /// Where the data is or goes.
        segments: Segments,
    },
    /// Make what was written durable, and then write, if there are segments.
    Flush {
        /// First sector of the data.
        sector: u64,
        /// The data.
        segments: Vec<Segment>,
    },
    /// Give space back.
    Discard {
        /// First sector.
        sector: u64,
        /// How many.
        count: u64,
    },
}

/// Segments of a transfer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Segments {
    /// In the request.
    Direct(Vec<Segment>),
    /// In pages that the request names.
    Indirect {
        /// How many, at most [`MAX_SEGMENTS`].
        count: usize,
        /// Grants of the pages, as many as `count` needs.
        pages: Vec<u32>,
    },
}

/// A request, copied out of the ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The guest's own word for it.
    pub id: u64,
    /// Operation that the response repeats.
    pub op: u8,
    /// What is asked; or what is wrong with it.
    pub ask: Result<Ask, Bad>,
}

/// What is wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Bad {
    /// An operation that is not known or not offered.
    #[error("operation {0} is not offered")]
    Operation(u8),
    /// More segments than possible, or none.
    #[error("{0} segments are too many or too few")]
    Segments(usize),
    /// A segment that is not in its page.
    #[error("a segment from sector {first} to {last} is not in a page")]
    Segment {
        /// First sector.
        first: u8,
        /// Last sector.
        last: u8,
    },
    /// Sectors beyond what a disk can have.
    #[error("a sector number is too large")]
    Sector,
}

impl Bad {
    /// How it is answered.
    #[must_use]
    pub fn status(self) -> Status {
        match self {
            Self::Operation(_) => Status::Unsupported,
            _ => Status::Error,
        }
    }
}

impl Request {
    /// Understands a slot. Anything is answered with the id and the operation that stand
    /// there.
    #[must_use]
    pub fn decode(slot: &[u8; SLOT]) -> Self {
        let op = slot[0];
        // `BLKIF_OP_INDIRECT` is answered with the operation inside (Linux checks it).
        let inner = if op == op::INDIRECT { slot[1] } else { op };
        Self {
            id: u64_at(slot, 8),
            op: inner,
            ask: ask(slot, op, inner),
        }
    }

    /// The response's 16 bytes.
    #[must_use]
    pub fn response(id: u64, op: u8, status: Status) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&id.to_le_bytes());
        bytes[8] = op;
        bytes[10..12].copy_from_slice(&(status as i16).to_le_bytes());
        bytes
    }
}

fn ask(slot: &[u8; SLOT], op: u8, inner: u8) -> Result<Ask, Bad> {
    let sector = u64_at(slot, 16);
    match op {
        op::READ | op::WRITE | op::FLUSH => {
            let count = usize::from(slot[1]);
            if count > DIRECT_SEGMENTS || (count == 0 && op != op::FLUSH) {
                return Err(Bad::Segments(count));
            }
            let segments = (0..count)
                .map(|index| Segment::decode(bytes_at(slot, 24 + index * SEGMENT)))
                .collect::<Result<Vec<_>, Bad>>()?;
            if op == op::FLUSH {
                return Ok(Ask::Flush { sector, segments });
            }
            Ok(Ask::Transfer {
                write: op == op::WRITE,
                sector,
                segments: Segments::Direct(segments),
            })
        }
        op::INDIRECT => {
            let write = match inner {
                op::READ => false,
                op::WRITE => true,
                other => return Err(Bad::Operation(other)),
            };
            let count = usize::from(u16::from_le_bytes(bytes_at(slot, 2)));
            if count == 0 || count > MAX_SEGMENTS {
                return Err(Bad::Segments(count));
            }
            let pages = (0..count.div_ceil(SEGMENTS_PER_PAGE))
                .map(|index| u32::from_le_bytes(bytes_at(slot, 28 + index * 4)))
                .collect();
            Ok(Ask::Transfer {
                write,
                sector,
                segments: Segments::Indirect { count, pages },
            })
        }
        op::DISCARD => {
            let count = u64_at(slot, 24);
            sector.checked_add(count).ok_or(Bad::Sector)?;
            Ok(Ask::Discard { sector, count })
        }
        other => Err(Bad::Operation(other)),
    }
}

const _: () = assert!(MAX_SEGMENTS <= INDIRECT_PAGES * SEGMENTS_PER_PAGE);

/// Understands `count` segments of a page that an indirect request named, and adds them to
/// `to`.
///
/// # Errors
/// One that is not in its page.
pub fn indirect(page: &[u8], count: usize, to: &mut Vec<Segment>) -> Result<(), Bad> {
    let (segments, _) = page.as_chunks::<SEGMENT>();
    to.reserve(count);
    for bytes in segments.iter().take(count) {
        to.push(Segment::decode(*bytes)?);
    }
    Ok(())
}

fn bytes_at<const N: usize>(slot: &[u8; SLOT], at: usize) -> [u8; N] {
    // All callers' offsets are within the slot; what were beyond would read as zero.
    let mut bytes = [0; N];
    if let Some(found) = slot.get(at..at + N) {
        bytes.copy_from_slice(found);
    }
    bytes
}

fn u64_at(slot: &[u8; SLOT], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(slot, at))
}
