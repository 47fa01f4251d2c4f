//! The record of what is on a disk, at the disk's end.
//!
//! Each piece of it has two places and its own sum and generation, and is written to them in turn: a
//! write that is cut leaves the piece before it, and pieces may reach the disk in any order. All sectors
//! of a piece have the mark of the boot that wrote it: sectors of a write that was cut, and of a later
//! one that was cut too, never make up the first one. A bit is set when its sector's data is durable,
//! and never taken back within an installation.
//!
//! Whoever had the disk before could have left a record that calls sectors of theirs those of the image.
//! The sums are keyed, so that they cannot where there is a key.

use alloc::boxed::Box;
use alloc::vec::Vec;

use crate::manifest::{u32_at, u64_at};
use crate::set::{PAGE, PAGE_BYTES};
use crate::{Hash, Key, SECTOR, SectorSet, Sectors};

const HEADER_MAGIC: &[u8; 8] = b"BMCASTRH";
const BLOCK_MAGIC: &[u8; 8] = b"BMCASTRB";
const VERSION: u32 = 1;
const COMPLETE: u32 = 1;

/// Bytes of a header and of a block, which disks with sectors of 4 KiB write as one.
const BLOCK: usize = 4096;
const BLOCK_SECTORS: u64 = BLOCK as u64 / SECTOR;
/// Blocks that are read at once.
const AT_ONCE: usize = 64;
/// Sectors of a block that have bits: all but the first.
const PAGES: usize = BLOCK / 512 - 1;
/// Generations of a piece: one that counts further was not counted.
const MOST_GENERATIONS: u64 = 1 << 62;
/// Bytes of a boot's mark, before the bits.
const MARK: usize = 512 - PAGE_BYTES;
/// Sectors whose bits are in a block.
const COVERS: u64 = PAGES as u64 * PAGE;

/// The disk has not the room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the disk has {disk} sectors, and the image ({image}) with the record of what is installed \
     ({record}) needs {}", image.saturating_add(*record)
)]
pub struct TooSmall {
    /// Sectors of the disk.
    pub disk: u64,
    /// Sectors of the image.
    pub image: u64,
    /// Sectors of the record.
    pub record: u64,
}

/// Where what is on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    disk: u64,
    image: u64,
    start: u64,
    blocks: u64,
}

impl Layout {
    /// Of a disk and an image of so many sectors.
    ///
    /// # Errors
    /// The disk is too small.
    pub fn new(disk: u64, image: u64) -> Result<Self, TooSmall> {
        let blocks = image.div_ceil(COVERS);
        let record = (blocks + 1) * 2 * BLOCK_SECTORS;
        let end = disk - disk % BLOCK_SECTORS;
        match end.checked_sub(record) {
            Some(start) if start >= image => Ok(Self {
                disk,
                image,
                start,
                blocks,
            }),
            _ => Err(TooSmall {
                disk,
                image,
                record: record + disk % BLOCK_SECTORS,
            }),
        }
    }

    /// Sectors before the record: those of the guest.
    #[must_use]
    pub fn visible(&self) -> u64 {
        self.start
    }

    /// Sectors of the image.
    #[must_use]
    pub fn image(&self) -> u64 {
        self.image
    }

    /// The block that a sector's bit is in.
    #[must_use]
    pub fn block_of(&self, sector: u64) -> u32 {
        u32::try_from(sector / COVERS).unwrap_or(u32::MAX)
    }

    /// The sectors whose bits are in a block.
    #[must_use]
    pub fn sectors_of(&self, block: u32) -> Sectors {
        let all = Sectors {
            start: u64::from(block) * COVERS,
            count: COVERS,
        };
        all.and(Sectors {
            start: 0,
            count: self.image,
        })
    }

    fn header(&self, slot: u8) -> Sectors {
        Sectors {
            start: self.start + (self.blocks * 2 + u64::from(slot)) * BLOCK_SECTORS,
            count: BLOCK_SECTORS,
        }
    }

    fn block(&self, block: u64, slot: u8) -> Sectors {
        Sectors {
            start: self.start + (self.blocks * u64::from(slot) + block) * BLOCK_SECTORS,
            count: BLOCK_SECTORS,
        }
    }
}

/// Why a record cannot be used, and must not be written over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError<E> {
    /// The disk cannot be read.
    #[error("reading the record of what is installed (sectors {} to {})", .at.start, .at.end())]
    Read {
        /// Where.
        at: Sectors,
        /// Why.
        source: E,
    },
    /// A version that is not known.
    #[error(
        "the disk has a record of version {0}, and this program knows version {VERSION}: boot it by the \
         program that began to install it"
    )]
    Version(u32),
    /// A record of another disk.
    #[error(
        "the record on the disk is of a disk of {disk} sectors with an image of {image}: this disk was \
         copied, or has another size now"
    )]
    Geometry {
        /// Sectors of that disk.
        disk: u64,
        /// Sectors of that image.
        image: u64,
    },
}

/// Head of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The manifest of what is installed.
    pub manifest: Hash,
    /// Whether all of it is there.
    pub complete: bool,
    /// Sectors of the disk.
    pub disk: u64,
    /// Sectors of the image.
    pub image: u64,
    installation: [u8; 16],
    generation: u64,
    slot: u8,
}

/// What is at the end of a disk.
#[derive(Clone, Debug)]
pub enum Found {
    /// No record.
    Nothing,
    /// That of another image.
    Other(Header),
    /// That of this image: the installation may go on.
    This(Box<Record>),
}

/// Where a block is, and how often it was written.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    generation: u64,
    slot: u8,
}

/// What the disk says of itself: sectors whose data is durably on it.
#[derive(Clone, Debug)]
pub struct Record {
    layout: Layout,
    header: Header,
    key: Key,
    /// Of this boot.
    mark: [u8; MARK],
    /// Whether the header is on the disk.
    begun: bool,
    places: Vec<Place>,
    durable: SectorSet,
}

/// A piece of the record that is to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where.
    pub to: Sectors,
    /// What.
    pub data: Vec<u8>,
}

/// A step of the record. It holds once all its pieces were written, after what it says was made
/// durable, and were made durable themselves.
#[derive(Clone, Debug)]
pub struct Commit {
    pieces: Vec<Piece>,
    blocks: Vec<u32>,
    header: Option<Header>,
}

impl Commit {
    /// What is to be written, in any order.
    #[must_use]
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }
}

impl Record {
    /// Looks for a record that was made with the key; `read` fills bytes with sectors of the disk.
    /// `random` bytes tell this boot from all others.
    ///
    /// # Errors
    /// The disk cannot be read, or its record cannot be understood.
    pub fn find<E>(
        layout: Layout,
        manifest: Hash,
        key: Key,
        random: [u8; 16],
        mut read: impl FnMut(Sectors, &mut [u8]) -> Result<(), E>,
    ) -> Result<Found, RecordError<E>> {
        let mut bytes = alloc::vec![0; BLOCK];
        let mut get = |at: Sectors, bytes: &mut [u8]| {
            read(at, bytes).map_err(|source| RecordError::Read { at, source })
        };
        let mut header: Option<Header> = None;
        for slot in [0, 1] {
            get(layout.header(slot), &mut bytes)?;
            if let Some(found) = Header::parse(&bytes, &key, slot)?
                && header.is_none_or(|other| other.generation < found.generation)
            {
                header = Some(found);
            }
        }
        let Some(header) = header else {
            return Ok(Found::Nothing);
        };
        if header.manifest != manifest {
            return Ok(Found::Other(header));
        }
        if (header.disk, header.image) != (layout.disk, layout.image) {
            return Err(RecordError::Geometry {
                disk: header.disk,
                image: header.image,
            });
        }
        let mut record = Self::new(layout, header, key, random);
        record.begun = true;
        if header.complete {
            record.durable.insert(Sectors {
                start: 0,
                count: layout.image,
            });
            return Ok(Found::This(Box::new(record)));
        }
        bytes.resize(BLOCK * AT_ONCE, 0);
        for slot in [0, 1] {
            for first in (0..layout.blocks).step_by(AT_ONCE) {
                let count = (layout.blocks - first).min(AT_ONCE as u64);
                let at = Sectors {
                    count: count * BLOCK_SECTORS,
                    ..layout.block(first, slot)
                };
                let bytes = &mut bytes[..usize::try_from(count).unwrap_or(AT_ONCE) * BLOCK];
                get(at, bytes)?;
                for (block, bytes) in (first..).zip(bytes.chunks_exact(BLOCK)) {
                    record.read_block(block, slot, bytes);
                }
            }
        }
        Ok(Found::This(Box::new(record)))
    }

    /// Begins an installation. Nothing of the disk may be written before its first [`Commit`] holds:
    /// until then the record before it, if there is one (`over`), is true.
    ///
    /// `random` bytes tell it from all others on this disk, whose blocks are not wiped.
    #[must_use]
    pub fn begin(
        layout: Layout,
        manifest: Hash,
        key: Key,
        random: [u8; 16],
        over: Option<&Header>,
    ) -> Self {
        let header = Header {
            manifest,
            complete: false,
            disk: layout.disk,
            image: layout.image,
            installation: random,
            generation: over.map_or(0, |over| over.generation),
            slot: over.map_or(1, |over| over.slot),
        };
        Self::new(layout, header, key, random)
    }

    fn new(layout: Layout, header: Header, key: Key, random: [u8; 16]) -> Self {
        let mut mark = [0; MARK];
        mark.copy_from_slice(&random[..MARK]);
        Self {
            layout,
            header,
            key,
            mark,
            begun: false,
            places: alloc::vec![Place::default(); usize::try_from(layout.blocks).unwrap_or(0)],
            durable: SectorSet::new(layout.image),
        }
    }

    fn read_block(&mut self, number: u64, slot: u8, bytes: &[u8]) {
        let index = usize::try_from(number).unwrap_or(usize::MAX);
        let Some(place) = self.places.get_mut(index) else {
            return;
        };
        let is_ours = is_whole(bytes, BLOCK_MAGIC, &self.key)
            && bytes[40..56] == self.header.installation
            && u64_at(bytes, 56) == Some(number);
        let generation = u64_at(bytes, 64).filter(|number| *number < MOST_GENERATIONS);
        let Some(generation) = generation.filter(|_| is_ours) else {
            return;
        };
        // The newer one says all that the older one does, so both count.
        if generation > place.generation {
            *place = Place { generation, slot };
        }
        apply(&mut self.durable, index, bytes);
    }

    /// Where what is.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The manifest of what is installed.
    #[must_use]
    pub fn manifest(&self) -> Hash {
        self.header.manifest
    }

    /// Whether a commit of it holds, so that the disk may be written.
    #[must_use]
    pub fn begun(&self) -> bool {
        self.begun
    }

    /// Whether it says that all of the image is there.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.begun && self.header.complete
    }

    /// Sectors that it says are there.
    #[must_use]
    pub fn durable(&self) -> &SectorSet {
        &self.durable
    }

    /// The next step: what `local` says in these blocks, in pieces of at most `most` bytes. The
    /// header is among them if it is not on the disk yet.
    #[must_use]
    pub fn commit(&self, local: &SectorSet, blocks: Vec<u32>, most: usize) -> Commit {
        let mut pieces = Vec::with_capacity(blocks.len());
        for number in &blocks {
            let index = usize::try_from(*number).unwrap_or(usize::MAX);
            let Some(place) = self.places.get(index) else {
                continue;
            };
            let next = place.next();
            let mut data = alloc::vec![0; BLOCK];
            data[40..56].copy_from_slice(&self.header.installation);
            data[56..64].copy_from_slice(&u64::from(*number).to_le_bytes());
            data[64..72].copy_from_slice(&next.generation.to_le_bytes());
            for (n, sector) in data.chunks_exact_mut(512).skip(1).enumerate() {
                local.page_bits(index * PAGES + n, &mut sector[MARK..]);
            }
            seal(&mut data, BLOCK_MAGIC, &self.key, self.mark);
            pieces.push(Piece {
                to: self.layout.block(u64::from(*number), next.slot),
                data,
            });
        }
        let header = (!self.begun).then(|| self.header.next(false));
        pieces.extend(header.map(|header| self.header_piece(&header)));
        if let Some(header) = header
            && self.header.generation == 0
        {
            // None was found, so there may be one in the other place that another key opens.
            pieces.push(self.header_piece(&Header {
                slot: 1 - header.slot,
                ..header
            }));
        }
        Commit {
            pieces: joined(pieces, most),
            blocks,
            header,
        }
    }

    /// The last step: all of the image is there. The blocks are of no use from then on.
    #[must_use]
    pub fn completion(&self) -> Commit {
        let header = self.header.next(true);
        Commit {
            pieces: alloc::vec![self.header_piece(&header)],
            blocks: Vec::new(),
            header: Some(header),
        }
    }

    /// A step holds.
    pub fn committed(&mut self, commit: &Commit) {
        for piece in &commit.pieces {
            for block in piece.data.chunks_exact(BLOCK) {
                if let Some(index) = u64_at(block, 56).and_then(|n| usize::try_from(n).ok())
                    && block[32..40] == BLOCK_MAGIC[..]
                {
                    apply(&mut self.durable, index, block);
                }
            }
        }
        for number in &commit.blocks {
            let index = usize::try_from(*number).unwrap_or(usize::MAX);
            if let Some(place) = self.places.get_mut(index) {
                *place = place.next();
            }
        }
        if let Some(header) = commit.header {
            self.header = header;
            self.begun = true;
            if header.complete {
                self.durable.insert(Sectors {
                    start: 0,
                    count: self.layout.image,
                });
            }
        }
    }

    fn header_piece(&self, header: &Header) -> Piece {
        Piece {
            to: self.layout.header(header.slot),
            data: header.bytes(&self.key, self.mark),
        }
    }
}

impl Commit {
    /// The blocks of the record that it writes.
    #[must_use]
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }
}

impl Place {
    fn next(self) -> Self {
        Self {
            generation: self.generation + 1,
            slot: 1 - self.slot.min(1),
        }
    }
}

impl Header {
    fn next(&self, complete: bool) -> Self {
        Self {
            complete,
            generation: self.generation + 1,
            slot: 1 - self.slot.min(1),
            ..*self
        }
    }

    fn parse<E>(bytes: &[u8], key: &Key, slot: u8) -> Result<Option<Self>, RecordError<E>> {
        let is_counted = u64_at(bytes, 96).is_some_and(|number| number < MOST_GENERATIONS);
        if !is_whole(bytes, HEADER_MAGIC, key) || !is_counted {
            return Ok(None);
        }
        let word = |at| u64_at(bytes, at).unwrap_or(0);
        let version = u32_at(bytes, 40).unwrap_or(0);
        if version != VERSION {
            return Err(RecordError::Version(version));
        }
        let mut manifest = [0; 32];
        manifest.copy_from_slice(&bytes[48..80]);
        let mut installation = [0; 16];
        installation.copy_from_slice(&bytes[80..96]);
        Ok(Some(Self {
            manifest: Hash(manifest),
            complete: u32_at(bytes, 44).unwrap_or(0) & COMPLETE != 0,
            installation,
            generation: word(96),
            image: word(104),
            disk: word(112),
            slot,
        }))
    }

    fn bytes(&self, key: &Key, mark: [u8; MARK]) -> Vec<u8> {
        let mut bytes = alloc::vec![0; BLOCK];
        let flags = if self.complete { COMPLETE } else { 0 };
        bytes[40..44].copy_from_slice(&VERSION.to_le_bytes());
        bytes[44..48].copy_from_slice(&flags.to_le_bytes());
        bytes[48..80].copy_from_slice(&self.manifest.0);
        bytes[80..96].copy_from_slice(&self.installation);
        bytes[96..104].copy_from_slice(&self.generation.to_le_bytes());
        bytes[104..112].copy_from_slice(&self.image.to_le_bytes());
        bytes[112..120].copy_from_slice(&self.disk.to_le_bytes());
        seal(&mut bytes, HEADER_MAGIC, key, mark);
        bytes
    }
}

/// Adds the marks, the magic, and the sum of all that follows it.
fn seal(bytes: &mut [u8], magic: &[u8; 8], key: &Key, mark: [u8; MARK]) {
    for sector in bytes.chunks_exact_mut(512).skip(1) {
        sector[..MARK].copy_from_slice(&mark);
    }
    bytes[32..40].copy_from_slice(magic);
    let sum = key.sum(&bytes[32..]);
    bytes[..32].copy_from_slice(&sum);
}

fn is_whole(bytes: &[u8], magic: &[u8; 8], key: &Key) -> bool {
    bytes.len() == BLOCK && bytes[32..40] == magic[..] && key.sum(&bytes[32..]) == bytes[..32]
}

/// Adds the bits of a block to a set.
fn apply(set: &mut SectorSet, block: usize, bytes: &[u8]) {
    for (n, sector) in bytes.chunks_exact(512).skip(1).enumerate() {
        set.insert_bits(block * PAGES + n, &sector[MARK..]);
    }
}

/// The same pieces, neighbours in one.
fn joined(mut pieces: Vec<Piece>, most: usize) -> Vec<Piece> {
    pieces.sort_unstable_by_key(|piece| piece.to.start);
    let mut joined: Vec<Piece> = Vec::with_capacity(pieces.len());
    for piece in pieces {
        match joined.last_mut() {
            Some(last)
                if last.to.end() == piece.to.start
                    && last.data.len() + piece.data.len() <= most =>
            {
                last.to.count += piece.to.count;
                last.data.extend_from_slice(&piece.data);
            }
            _ => joined.push(piece),
        }
    }
    joined
}

#[cfg(test)]
mod tests;
