//! Guest kernels: from a file to loadable segments and Xen notes.
//!
//! A kernel is a bzImage with any compression that distributions use, or a raw
//! ELF `vmlinux`. Nothing of it is trusted: every size is checked and bounded.

mod bzimage;
mod decompress;
mod error;
mod notes;

use std::fs::File;
use std::io::{self, Read, Seek as _};
use std::ops::Range;
use std::path::Path;

use elf::ElfBytes;
use elf::abi::{EM_X86_64, ET_EXEC, PT_LOAD};
use elf::endian::LittleEndian;

pub use decompress::Compression;
pub use error::{Error, ErrorKind};
pub use notes::XenNotes;

/// Largest kernel, packed or unpacked, in bytes.
pub const MAX_IMAGE: usize = 512 << 20;
/// Highest physical address of a kernel segment: all of the image must be
/// reachable through one page of L2 entries.
const MAX_PADDR: u64 = 1 << 30;
/// Loadable segments that are accepted; Linux has four or five.
const MAX_SEGMENTS: usize = 64;

/// Where [`Kernel::bare`] puts its code.
const BARE_PADDR: u64 = 1 << 20;

/// A part of the image that belongs at one place in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Guest-physical address, bytes.
    pub paddr: u64,
    /// Bytes in memory; what the file does not fill is zero.
    pub mem_size: u64,
    /// Where its bytes are in the ELF file.
    file: Range<usize>,
}

impl Segment {
    /// First address after the segment.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.paddr + self.mem_size
    }
}

/// A kernel, ready to be placed in a domain.
#[derive(Debug)]
pub struct Kernel {
    elf: Vec<u8>,
    segments: Vec<Segment>,
    notes: XenNotes,
    compression: Option<Compression>,
}

impl Kernel {
    /// Reads and unpacks a kernel file.
    ///
    /// # Errors
    /// Everything in [`ErrorKind`], with the path.
    pub fn load(path: &Path) -> Result<Self, Error> {
        Self::load_or(path, None)
    }

    /// As [`Kernel::load`]. If the path is forbidden, `opened` is read.
    ///
    /// # Errors
    /// As [`Kernel::load`].
    pub(crate) fn load_or(path: &Path, opened: Option<&File>) -> Result<Self, Error> {
        read_file(path, opened)
            .and_then(Self::parse)
            .map_err(|kind| Error {
                path: path.to_owned(),
                kind,
            })
    }

    /// Takes a kernel from memory.
    ///
    /// # Errors
    /// Everything in [`ErrorKind`] that is not about the file itself.
    pub fn parse(image: Vec<u8>) -> Result<Self, ErrorKind> {
        let (elf, compression) = if image.starts_with(b"\x7fELF") {
            (image, None)
        } else if bzimage::is_bzimage(&image) {
            let payload = bzimage::payload(&image)?;
            match Compression::detect(payload)? {
                None => (payload.to_vec(), None),
                Some(format) => (
                    decompress::decompress(payload, format, MAX_IMAGE)?,
                    Some(format),
                ),
            }
        } else if image.is_empty() {
            return Err(ErrorKind::NotAKernel("the file is empty"));
        } else {
            return Err(ErrorKind::NotAKernel(
                "neither a bzImage (vmlinuz) nor an ELF vmlinux",
            ));
        };
        let (segments, notes) = parse_elf(&elf)?;
        Ok(Self {
            elf,
            segments,
            notes,
            compression,
        })
    }

    /// A kernel of nothing but `code`, which begins with its entry point.
    pub(crate) fn bare(code: Vec<u8>) -> Self {
        let segment = Segment {
            paddr: BARE_PADDR,
            mem_size: code.len() as u64,
            file: 0..code.len(),
        };
        Self {
            elf: code,
            segments: vec![segment],
            notes: XenNotes::bare(BARE_PADDR),
            compression: None,
        }
    }

    /// The segments in file order.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The bytes of a segment that are not zero by definition.
    #[must_use]
    pub fn bytes(&self, segment: &Segment) -> &[u8] {
        &self.elf[segment.file.clone()]
    }

    /// What the kernel says about itself.
    #[must_use]
    pub fn notes(&self) -> &XenNotes {
        &self.notes
    }

    /// How the bzImage was packed; `None` for a plain ELF.
    #[must_use]
    pub fn compression(&self) -> Option<Compression> {
        self.compression
    }

    /// First guest-physical address after the image, rounded up to a page.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.segments
            .iter()
            .map(Segment::end)
            .max()
            .unwrap_or(0)
            .next_multiple_of(4096)
    }
}

/// Opens a file. If that is forbidden, `opened` is the one that was there before.
pub(crate) fn open(path: &Path, opened: Option<&File>) -> io::Result<File> {
    match (File::open(path), opened) {
        (Err(error), Some(opened)) if error.kind() == io::ErrorKind::PermissionDenied => {
            let mut file = opened.try_clone()?;
            file.rewind()?;
            Ok(file)
        }
        (found, _) => found,
    }
}

fn read_file(path: &Path, opened: Option<&File>) -> Result<Vec<u8>, ErrorKind> {
    let file = open(path, opened).map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => ErrorKind::Missing,
        _ => ErrorKind::Read(e),
    })?;
    let mut bytes = Vec::new();
    file.take(MAX_IMAGE as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(ErrorKind::Read)?;
    if bytes.len() > MAX_IMAGE {
        return Err(ErrorKind::TooLarge {
            limit: MAX_IMAGE >> 20,
        });
    }
    Ok(bytes)
}

fn parse_elf(bytes: &[u8]) -> Result<(Vec<Segment>, XenNotes), ErrorKind> {
    // Class and byte order first: the parser would call a 32-bit file corrupt.
    if bytes.get(4..6) != Some(&[2, 1]) {
        return Err(ErrorKind::NotAKernel(
            "the ELF file is not a 64-bit little-endian one",
        ));
    }
    let file = ElfBytes::<LittleEndian>::minimal_parse(bytes)
        .map_err(|e| ErrorKind::corrupt(format!("its ELF header: {e}")))?;
    if file.ehdr.e_machine != EM_X86_64 {
        return Err(ErrorKind::NotAKernel("the ELF file is not for x86-64"));
    }
    if file.ehdr.e_type != ET_EXEC {
        return Err(ErrorKind::NotAKernel(
            "the ELF file is a library or an object, not a kernel",
        ));
    }
    let notes = XenNotes::read(&file)?;
    let mut segments = Vec::new();
    for header in file.segments().into_iter().flatten() {
        if header.p_type != PT_LOAD || header.p_memsz == 0 {
            continue;
        }
        let bad =
            |what: &str| ErrorKind::corrupt(format!("the segment at {:#x} {what}", header.p_paddr));
        if header.p_filesz > header.p_memsz {
            return Err(bad("has more bytes in the file than in memory"));
        }
        let paddr = header
            .p_paddr
            .checked_sub(notes.paddr_offset)
            .ok_or_else(|| bad("lies below PADDR_OFFSET"))?;
        if paddr
            .checked_add(header.p_memsz)
            .is_none_or(|end| end > MAX_PADDR)
        {
            return Err(bad("ends above 1 GiB"));
        }
        let range = usize::try_from(header.p_offset)
            .ok()
            .zip(usize::try_from(header.p_filesz).ok())
            .and_then(|(start, len)| Some(start..start.checked_add(len)?))
            .filter(|range| range.end <= bytes.len())
            .ok_or_else(|| bad("is cut off"))?;
        if segments.len() == MAX_SEGMENTS {
            return Err(ErrorKind::corrupt("it has too many segments"));
        }
        segments.push(Segment {
            paddr,
            mem_size: header.p_memsz,
            file: range,
        });
    }
    if segments.is_empty() {
        return Err(ErrorKind::corrupt("it has no loadable segments"));
    }
    Ok((segments, notes))
}

#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "small numbers of the tests' own making"
)]
mod tests;
