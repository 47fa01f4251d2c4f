//! VHD images (Microsoft's "Virtual Hard Disk Image Format Specification", 1.0), fixed and
//! dynamic, read only. Numbers are big-endian.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::SECTOR;
use crate::layer::Layer;
use crate::lock::ImageFile;
use crate::reader::Source;

/// Bytes of a footer, and of a dynamic disk's header.
const FOOTER: usize = 512;
const DYNAMIC: usize = 1024;
/// Bytes of an entry of the block allocation table; all ones is no block.
const ENTRY: usize = 4;
const NO_BLOCK: u32 = u32::MAX;

/// An open VHD image.
#[derive(Debug)]
pub(crate) struct Image {
    file: ImageFile,
    size: u64,
    blocks: Option<Blocks>,
}

/// Where a dynamic disk's blocks are.
#[derive(Debug)]
struct Blocks {
    table: u64,
    size: u64,
    /// Bytes of the bitmap before each. It says which sectors were ever written; the others
    /// are zeroes in the block as well.
    bitmap: u64,
}

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let bytes = bytes
        .get(at..at + N)
        .and_then(|bytes| bytes.try_into().ok());
    bytes.unwrap_or([0; N])
}

impl Image {
    /// Opens an image of `length` bytes.
    pub(crate) fn open(file: ImageFile, length: u64) -> io::Result<Self> {
        let Some(data) = length.checked_sub(FOOTER as u64) else {
            return Err(invalid("the file is shorter than a footer"));
        };
        let mut footer = [0; FOOTER];
        // The footer is at the end; dynamic disks have a copy of it at the beginning.
        file.read_exact_at(&mut footer, data)?;
        if !footer.starts_with(b"conectix") {
            file.read_exact_at(&mut footer, 0)?;
        }
        if !footer.starts_with(b"conectix") {
            return Err(invalid("it has no VHD footer at its end or beginning"));
        }
        let size = u64::from_be_bytes(number(&footer, 48));
        if !size.is_multiple_of(SECTOR) {
            return Err(invalid(format!(
                "its size, {size} bytes, is not whole sectors"
            )));
        }
        match u32::from_be_bytes(number(&footer, 60)) {
            2 if size <= data => Ok(Self {
                file,
                size,
                blocks: None,
            }),
            2 => Err(invalid(format!(
                "the file was cut off: {size} bytes are said to be in it"
            ))),
            3 => {
                let header = u64::from_be_bytes(number(&footer, 16));
                let blocks = Blocks::read(&file, length, header, size)?;
                Ok(Self {
                    file,
                    size,
                    blocks: Some(blocks),
                })
            }
            4 => Err(invalid(
                "it is the difference to another image, which is not supported",
            )),
            other => Err(invalid(format!("disks of type {other} are not supported"))),
        }
    }
}

impl Blocks {
    fn read(file: &File, length: u64, at: u64, size: u64) -> io::Result<Self> {
        let mut header = [0; DYNAMIC];
        if at
            .checked_add(header.len() as u64)
            .is_none_or(|end| end > length)
        {
            return Err(invalid("the header of the dynamic disk is not in the file"));
        }
        file.read_exact_at(&mut header, at)?;
        if !header.starts_with(b"cxsparse") {
            return Err(invalid("it has no header of a dynamic disk"));
        }
        let table = u64::from_be_bytes(number(&header, 16));
        let entries = u64::from(u32::from_be_bytes(number(&header, 28)));
        let block = u64::from(u32::from_be_bytes(number(&header, 32)));
        if !block.is_power_of_two() || block < SECTOR {
            return Err(invalid(format!(
                "blocks of {block} bytes are not supported"
            )));
        }
        if size.div_ceil(block) > entries {
            return Err(invalid(format!(
                "{entries} blocks do not make {size} bytes"
            )));
        }
        if table
            .checked_add(entries * ENTRY as u64)
            .is_none_or(|end| end > length)
        {
            return Err(invalid("the table of blocks is not in the file"));
        }
        Ok(Self {
            table,
            size: block,
            bitmap: (block / SECTOR).div_ceil(8).next_multiple_of(SECTOR),
        })
    }

    /// Where the block is that holds `offset`, if it was ever written.
    fn find(&self, file: &File, offset: u64) -> io::Result<Option<u64>> {
        let mut entry = [0; ENTRY];
        let at = self.table + offset / self.size * ENTRY as u64;
        file.read_exact_at(&mut entry, at)?;
        let sector = u32::from_be_bytes(entry);
        let start = u64::from(sector) * SECTOR + self.bitmap + offset % self.size;
        Ok((sector != NO_BLOCK).then_some(start))
    }
}

impl Source for Image {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, mut offset: u64, mut into: &mut [u8]) -> io::Result<()> {
        let Some(blocks) = &self.blocks else {
            return self.file.read_exact_at(into, offset);
        };
        while !into.is_empty() {
            let left = usize::try_from(blocks.size - offset % blocks.size).unwrap_or(usize::MAX);
            let (piece, rest) = into.split_at_mut(left.min(into.len()));
            match blocks.find(&self.file, offset)? {
                Some(start) => self.file.read_exact_at(piece, start)?,
                None => piece.fill(0),
            }
            offset += piece.len() as u64;
            into = rest;
        }
        Ok(())
    }
}

impl Layer for Image {}
