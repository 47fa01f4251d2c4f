//! The header of a qcow2 image (QEMU's `docs/interop/qcow2.txt`), read before a driver is given
//! the image: what it refers to, and whether its tables are of a sane size.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes of a version 2 header, and of a version 3 header without extensions.
const V2: u64 = 72;
const V3: u64 = HEADER.len() as u64;
const HEADER: [u8; 104] = [0; 104];
/// Longest name of a backing file.
const LONGEST_NAME: u32 = 1023;
/// QEMU's limits, bytes: a larger table is not read.
const LARGEST_L1: u64 = 32 << 20;
const LARGEST_REFERENCES: u64 = 8 << 20;
/// Incompatible features.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE;
/// Header extensions.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// What a header says.
#[derive(Debug)]
pub(crate) struct Header {
    /// Bytes that the guest sees.
    pub(crate) size: u64,
    /// Bytes of a cluster.
    pub(crate) cluster: u64,
    /// 2 or 3.
    pub(crate) version: u32,
    /// As it is written there: a path, if it is one at all.
    pub(crate) backing: Option<String>,
    /// The format of the backing file.
    pub(crate) backing_format: Option<String>,
    /// Snapshots inside the image.
    pub(crate) snapshots: u32,
}

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

/// `format!` for [`invalid`], in place of a macro at each use.
macro_rules! refuse {
    ($($text:tt)*) => { return Err(invalid(format!($($text)*))) };
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&self, at: usize) -> u32 {
        let bytes = self
            .0
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok());
        u32::from_be_bytes(bytes.unwrap_or_default())
    }

    fn u64(&self, at: usize) -> u64 {
        let bytes = self
            .0
            .get(at..at + 8)
            .and_then(|bytes| bytes.try_into().ok());
        u64::from_be_bytes(bytes.unwrap_or_default())
    }
}

impl Header {
    /// Reads and checks the header of a file of `length` bytes.
    pub(crate) fn read(file: &File, length: u64) -> io::Result<Self> {
        let mut bytes = HEADER;
        if length < V2 {
            refuse!("the file is shorter than a qcow2 header");
        }
        let there = usize::try_from(length.min(V3)).unwrap_or_default();
        file.read_exact_at(&mut bytes[..there], 0)?;
        let fields = Fields(&bytes);
        let version = fields.u32(4);
        if !bytes.starts_with(b"QFI\xfb") || !matches!(version, 2 | 3) {
            refuse!("it is not a qcow2 image of version 2 or 3");
        }
        let bits = fields.u32(20);
        if !(9..=21).contains(&bits) {
            refuse!("clusters of 2^{bits} bytes are not supported");
        }
        let cluster = 1u64 << bits;
        if fields.u32(32) != 0 {
            refuse!("it is encrypted: decrypt it with `qemu-img convert`");
        }
        if version == 3 {
            check_features(fields.u64(72))?;
            if fields.u32(96) > 6 {
                refuse!(
                    "reference counts of 2^{} bits are not supported",
                    fields.u32(96)
                );
            }
        }
        let size = fields.u64(24);
        if size > 1 << 56 {
            refuse!("a disk of {size} bytes is not supported");
        }
        let header = if version == 3 {
            u64::from(fields.u32(100))
        } else {
            V2
        };
        if header > cluster || (version == 3 && header < V3) {
            refuse!("a header of {header} bytes is not supported");
        }
        let l1 = u64::from(fields.u32(36)) * 8;
        let l1_needed = size.div_ceil(cluster).div_ceil(cluster / 8) * 8;
        if l1 > LARGEST_L1 || l1 < l1_needed {
            refuse!("its table of {l1} bytes does not fit a disk of {size} bytes");
        }
        let references = u64::from(fields.u32(56)) * cluster;
        if references > LARGEST_REFERENCES.max(cluster) {
            refuse!("its table of reference counts has {references} bytes");
        }
        for (what, offset, bytes) in [
            ("table", fields.u64(40), l1),
            ("table of reference counts", fields.u64(48), references),
        ] {
            let end = offset.checked_add(bytes);
            // A table is allocated as whole clusters, the file may end within the last.
            let file_end = length.next_multiple_of(cluster);
            if bytes > 0 && (offset == 0 || !offset.is_multiple_of(cluster))
                || end.is_none_or(|end| end > file_end)
            {
                refuse!("its {what} is not within the file");
            }
        }
        let backing = backing_name(file, &fields, cluster)?;
        let backing_format = if version == 3 {
            backing_format(file, header, cluster)?
        } else {
            None
        };
        Ok(Self {
            size,
            cluster,
            version,
            backing,
            backing_format,
            snapshots: fields.u32(60),
        })
    }
}

fn check_features(features: u64) -> io::Result<()> {
    if features & DATA_FILE != 0 {
        refuse!("its data is in another file, which is not supported: use `qemu-img convert`");
    }
    if features & CORRUPT != 0 {
        refuse!("it is marked as corrupt: repair it with `qemu-img check -r all`");
    }
    if features & DIRTY != 0 {
        refuse!("it was not closed (lazy reference counts): use `qemu-img check -r all`");
    }
    if features & !KNOWN != 0 {
        refuse!(
            "it uses features ({features:#x}) that are not supported, such as zstd or extended \
             tables: use `qemu-img convert`"
        );
    }
    Ok(())
}

fn backing_name(file: &File, fields: &Fields<'_>, cluster: u64) -> io::Result<Option<String>> {
    let (offset, length) = (fields.u64(8), fields.u32(16));
    if offset == 0 || length == 0 {
        return Ok(None);
    }
    if length > LONGEST_NAME {
        refuse!("the name of its backing file has {length} bytes");
    }
    let end = offset.checked_add(length.into());
    if end.is_none_or(|end| end > cluster) {
        refuse!("the name of its backing file is not in its first cluster");
    }
    let mut name = vec![0; length as usize];
    file.read_exact_at(&mut name, offset)?;
    match String::from_utf8(name) {
        Ok(name) if !name.contains('\0') => Ok(Some(name)),
        _ => Err(invalid("the name of its backing file is not text")),
    }
}

/// Looks through the extensions, which all lie in the first cluster.
fn backing_format(file: &File, header: u64, cluster: u64) -> io::Result<Option<String>> {
    let mut at = header;
    while at + 8 <= cluster {
        let mut head = [0; 8];
        // The file may end before its first cluster does.
        match file.read_exact_at(&mut head, at) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            result => result?,
        }
        let fields = Fields(&head);
        let (kind, length) = (fields.u32(0), u64::from(fields.u32(4)));
        at += 8;
        if kind == 0 {
            return Ok(None);
        }
        if length > cluster - at {
            refuse!("its header's extensions are not in its first cluster");
        }
        if kind == BACKING_FORMAT {
            let mut name = vec![0; usize::try_from(length.min(64)).unwrap_or_default()];
            file.read_exact_at(&mut name, at)?;
            return String::from_utf8(name)
                .map(Some)
                .map_err(|_| invalid("the format of its backing file is not text"));
        }
        at += length.next_multiple_of(8);
    }
    Ok(None)
}
