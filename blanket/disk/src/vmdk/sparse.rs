//! A sparse extent: grains, found by a directory of tables. Numbers are little-endian.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::inflate_flags::{
    TINFL_FLAG_PARSE_ZLIB_HEADER, TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF,
};
use miniz_oxide::inflate::core::{DecompressorOxide, decompress};

use super::descriptor::Descriptor;
use super::{LARGEST, LONGEST_DESCRIPTOR, invalid};
use crate::SECTOR;
use crate::lock::ImageFile;
use crate::reader::length;

/// Flags of the header.
const ZEROED_GRAINS: u32 = 1 << 2;
const COMPRESSED: u32 = 1 << 16;
/// The directory's place is in a second header, at the end (a stream cannot know it before).
const AT_END: u64 = u64::MAX;
/// Largest grain, bytes; usual are 64 KiB.
const LARGEST_GRAIN: u64 = 2 << 20;
/// Entries of a table; there are no others.
const ENTRIES: u64 = 512;
/// An entry for a grain that is all zeroes, with [`ZEROED_GRAINS`].
const ZEROED: u32 = 1;
/// Bytes before the data of a compressed grain: its place on the disk, and its length.
const MARKER: usize = 12;
/// Bytes of a header.
const HEADER: usize = 512;

/// An open sparse extent.
#[derive(Debug)]
pub(super) struct Sparse {
    file: Arc<ImageFile>,
    /// Bytes of the file.
    length: u64,
    size: u64,
    grain: u64,
    /// Where the directory is, bytes.
    directory: u64,
    compressed: bool,
    zeroed: bool,
    /// The grain that was unpacked last, and where it began in the file: guests read on.
    last: Mutex<Option<(u64, Vec<u8>)>>,
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let bytes = bytes
        .get(at..at + N)
        .and_then(|bytes| bytes.try_into().ok());
    bytes.unwrap_or([0; N])
}

fn header(file: &File, at: u64) -> io::Result<[u8; HEADER]> {
    let mut bytes = [0; HEADER];
    file.read_exact_at(&mut bytes, at)?;
    if !bytes.starts_with(b"KDMV") {
        return Err(invalid("a sparse extent has no header"));
    }
    Ok(bytes)
}

impl Sparse {
    pub(super) fn open(file: Arc<ImageFile>) -> io::Result<Self> {
        let length = length(&file)?;
        if length < SECTOR {
            return Err(invalid("a sparse extent is shorter than a header"));
        }
        let mut bytes = header(&file, 0)?;
        if u64::from_le_bytes(number(&bytes, 56)) == AT_END {
            if length < 4 * SECTOR {
                return Err(invalid("a sparse extent has no header at its end"));
            }
            // Before the mark of the end of the stream.
            bytes = header(&file, length - 2 * SECTOR)?;
        }
        let version = u32::from_le_bytes(number(&bytes, 4));
        if !(1..=3).contains(&version) {
            return Err(invalid(format!(
                "sparse extents of version {version} are not supported"
            )));
        }
        let flags = u32::from_le_bytes(number(&bytes, 8));
        let sectors = |at| u64::from_le_bytes(number(&bytes, at)).checked_mul(SECTOR);
        let size = sectors(12).filter(|&size| size <= LARGEST);
        let size = size.ok_or_else(|| invalid("a sparse extent is too large"))?;
        let grain = sectors(20)
            .filter(|grain| grain.is_power_of_two() && (4096..=LARGEST_GRAIN).contains(grain));
        let grain =
            grain.ok_or_else(|| invalid("its grains are of a size that is not supported"))?;
        if u64::from(u32::from_le_bytes(number(&bytes, 44))) != ENTRIES {
            return Err(invalid("its tables are of a size that is not supported"));
        }
        let compression = u16::from_le_bytes(number(&bytes, 77));
        let compressed = flags & COMPRESSED != 0;
        if compressed != (compression == 1) || compression > 1 {
            return Err(invalid(format!(
                "compression {compression} is not supported"
            )));
        }
        let tables = size.div_ceil(grain).div_ceil(ENTRIES);
        let directory =
            sectors(56).filter(|at| at.checked_add(tables * 4).is_some_and(|end| end <= length));
        let directory = directory.ok_or_else(|| invalid("its directory is not in the file"))?;
        check_descriptor(&file, sectors(28), sectors(36))?;
        Ok(Self {
            file,
            length,
            size,
            grain,
            directory,
            compressed,
            zeroed: flags & ZEROED_GRAINS != 0,
            last: Mutex::new(None),
        })
    }

    /// Bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn read_at(&self, mut offset: u64, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            let within = offset % self.grain;
            let left = usize::try_from(self.grain - within).unwrap_or(usize::MAX);
            let (piece, rest) = into.split_at_mut(left.min(into.len()));
            match self.find(offset / self.grain)? {
                None => piece.fill(0),
                Some(at) if self.compressed => self.unpack(at, within, piece)?,
                Some(at) => self.plain(at + within, piece)?,
            }
            offset += piece.len() as u64;
            into = rest;
        }
        Ok(())
    }

    /// Where a grain is in the file, if it is.
    fn find(&self, grain: u64) -> io::Result<Option<u64>> {
        let table = self.entry(self.directory + grain / ENTRIES * 4)?;
        if table == 0 {
            return Ok(None);
        }
        let entry = self.entry(u64::from(table) * SECTOR + grain % ENTRIES * 4)?;
        let none = entry == 0 || (self.zeroed && entry == ZEROED);
        Ok((!none).then_some(u64::from(entry) * SECTOR))
    }

    fn entry(&self, at: u64) -> io::Result<u32> {
        let mut entry = [0; 4];
        self.file.read_exact_at(&mut entry, at)?;
        Ok(u32::from_le_bytes(entry))
    }

    /// The last grain may end with the file.
    fn plain(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let there = usize::try_from(self.length.saturating_sub(at)).unwrap_or(usize::MAX);
        if there == 0 {
            return Err(invalid("a grain is not in the file"));
        }
        let (data, beyond) = into.split_at_mut(there.min(into.len()));
        beyond.fill(0);
        self.file.read_exact_at(data, at)
    }

    fn unpack(&self, at: u64, within: u64, into: &mut [u8]) -> io::Result<()> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let grain = match last.take() {
            Some((known, grain)) if known == at => grain,
            _ => self.inflate(at)?,
        };
        let start = usize::try_from(within).unwrap_or(usize::MAX);
        let end = start.saturating_add(into.len());
        let piece = grain
            .get(start..end)
            .ok_or_else(|| invalid("a grain is too short"))?;
        into.copy_from_slice(piece);
        *last = Some((at, grain));
        Ok(())
    }

    fn inflate(&self, at: u64) -> io::Result<Vec<u8>> {
        let mut marker = [0; MARKER];
        self.file.read_exact_at(&mut marker, at)?;
        let start = at + MARKER as u64;
        let packed = u64::from(u32::from_le_bytes(number(&marker, 8)));
        // Deflate makes data that cannot be packed only a little longer.
        if packed > 2 * self.grain || start + packed > self.length {
            return Err(invalid("a compressed grain is not in the file"));
        }
        let mut data = vec![0; usize::try_from(packed).unwrap_or_default()];
        self.file.read_exact_at(&mut data, start)?;
        let mut grain = vec![0; usize::try_from(self.grain).unwrap_or_default()];
        let flags = TINFL_FLAG_PARSE_ZLIB_HEADER | TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        let mut state = Box::new(DecompressorOxide::new());
        let (status, _, _) = decompress(&mut state, &data, &mut grain, 0, flags);
        // The last grain of a disk may be packed without the part beyond its end, which stays
        // zero.
        if status == TINFLStatus::Done {
            Ok(grain)
        } else {
            Err(invalid("a compressed grain is damaged"))
        }
    }
}

/// A descriptor within the extent may say that it is not the whole disk.
fn check_descriptor(file: &File, at: Option<u64>, bytes: Option<u64>) -> io::Result<()> {
    let (Some(at), Some(bytes)) = (at, bytes) else {
        return Err(invalid("its descriptor is not in the file"));
    };
    if at == 0 || bytes == 0 {
        return Ok(());
    }
    if bytes > LONGEST_DESCRIPTOR {
        return Err(invalid("its descriptor is too long"));
    }
    let mut text = vec![0; usize::try_from(bytes).unwrap_or_default()];
    file.read_exact_at(&mut text, at)?;
    Descriptor::parse(&text).map(|_| ())
}
