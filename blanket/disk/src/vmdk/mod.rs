//! VMDK images (VMware's "Virtual Disk Format 5.0"), read only: one file or several, whose
//! extents are flat, zero, or sparse, compressed ones included.

mod descriptor;
mod sparse;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::SECTOR;
use crate::layer::Layer;
use crate::lock::ImageFile;
use crate::reader::{Source, length};
use descriptor::{Descriptor, Kind};
use sparse::Sparse;

/// Longest descriptor, bytes.
const LONGEST_DESCRIPTOR: u64 = 1 << 20;
/// Largest disk, bytes; sums stay far from overflow.
const LARGEST: u64 = 1 << 56;

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// What a file says of the image that it begins.
pub(crate) enum Plan {
    /// All is in this file.
    One,
    /// The file is text that names others.
    Many(Descriptor),
}

impl Plan {
    /// Reads the beginning of a file of `length` bytes.
    pub(crate) fn read(file: &File, length: u64) -> io::Result<Self> {
        let mut magic = [0; 4];
        if length < 4 {
            return Err(invalid("the file is shorter than a header"));
        }
        file.read_exact_at(&mut magic, 0)?;
        match &magic {
            b"KDMV" => Ok(Self::One),
            b"COWD" => Err(invalid(
                "it is of an old ESX server, which is not supported",
            )),
            _ if length > LONGEST_DESCRIPTOR => {
                Err(invalid("it is neither a sparse extent nor a descriptor"))
            }
            _ => {
                let mut text = vec![0; usize::try_from(length).unwrap_or_default()];
                file.read_exact_at(&mut text, 0)?;
                let descriptor = Descriptor::parse(&text)?;
                if descriptor.extents.is_empty() {
                    return Err(invalid("its descriptor names no extents"));
                }
                Ok(Self::Many(descriptor))
            }
        }
    }

    /// The names of the files that it stands on, each once.
    pub(crate) fn files(&self) -> &[String] {
        match self {
            Self::One => &[],
            Self::Many(descriptor) => &descriptor.files,
        }
    }
}

/// One run of the disk.
#[derive(Debug)]
struct Extent {
    /// Where it begins and ends on the disk, bytes.
    start: u64,
    end: u64,
    data: Data,
}

#[derive(Debug)]
enum Data {
    Zero,
    /// At this offset of the file.
    Flat(Arc<ImageFile>, u64),
    Sparse(Sparse),
}

/// An open VMDK image.
#[derive(Debug)]
pub(crate) struct Image {
    /// In order, without gaps.
    extents: Vec<Extent>,
    size: u64,
}

impl Image {
    /// `others` are the files of [`Plan::files`].
    pub(crate) fn open(
        file: ImageFile,
        plan: Plan,
        others: Vec<Arc<ImageFile>>,
    ) -> io::Result<Self> {
        let descriptor = match plan {
            Plan::One => {
                let sparse = Sparse::open(Arc::new(file))?;
                return Self::new(vec![(sparse.size(), Data::Sparse(sparse))]);
            }
            Plan::Many(descriptor) => descriptor,
        };
        let mut parts = Vec::new();
        for extent in descriptor.extents {
            let size = extent.sectors * SECTOR;
            let file = |index: usize| {
                let file = others
                    .get(index)
                    .ok_or_else(|| invalid("an extent has no file"))?;
                Ok::<_, io::Error>(Arc::clone(file))
            };
            let data = match extent.kind {
                Kind::Zero => Data::Zero,
                Kind::Flat(index, offset) => {
                    let file = file(index)?;
                    let end = offset.checked_add(size);
                    if end.is_none_or(|end| length(&file).is_ok_and(|there| end > there)) {
                        return Err(invalid(format!("an extent of {size} bytes was cut off")));
                    }
                    Data::Flat(file, offset)
                }
                Kind::Sparse(index) => {
                    let sparse = Sparse::open(file(index)?)?;
                    if sparse.size() < size {
                        return Err(invalid(format!("an extent has less than {size} bytes")));
                    }
                    Data::Sparse(sparse)
                }
            };
            parts.push((size, data));
        }
        Self::new(parts)
    }

    fn new(parts: Vec<(u64, Data)>) -> io::Result<Self> {
        let mut start = 0u64;
        let mut extents = Vec::new();
        for (size, data) in parts {
            let end = start.checked_add(size).filter(|&end| end <= LARGEST);
            let end = end.ok_or_else(|| invalid("its size is too large"))?;
            extents.push(Extent { start, end, data });
            start = end;
        }
        Ok(Self {
            extents,
            size: start,
        })
    }
}

impl Source for Image {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, mut offset: u64, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            let index = self.extents.partition_point(|extent| extent.end <= offset);
            let extent = self
                .extents
                .get(index)
                .ok_or(io::ErrorKind::UnexpectedEof)?;
            let left = usize::try_from(extent.end - offset).unwrap_or(usize::MAX);
            let (piece, rest) = into.split_at_mut(left.min(into.len()));
            let within = offset - extent.start;
            match &extent.data {
                Data::Zero => piece.fill(0),
                Data::Flat(file, start) => file.read_exact_at(piece, start + within)?,
                Data::Sparse(sparse) => sparse.read_at(within, piece)?,
            }
            offset += piece.len() as u64;
            into = rest;
        }
        Ok(())
    }
}

impl Layer for Image {}
