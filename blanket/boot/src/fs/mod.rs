//! File systems, read only, each through a crate that is kept by somebody.
//!
//! Errors are [`io::Error`]: kind `NotFound` for what is not there, else the crate's words.

mod btrfs;
mod ext4;
mod fat;
mod xfs;

use std::io;

use crate::source::Window;

/// Names of a directory that are looked at.
const MAX_NAMES: usize = 4096;
/// Links that are followed on the way to one file, as Linux does.
const MAX_LINKS: u32 = 40;
/// Longest path, bytes (`PATH_MAX`).
const MAX_PATH: usize = 4096;
/// Bytes that are asked of a file at a time.
const CHUNK: usize = 8 << 20;

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file, with its length in bytes.
    File(u64),
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A device, a socket or a pipe.
    Other,
}

/// A file system. Paths are absolute, `/` is its root, and no part of them is a link; only
/// the functions [`find`], [`read`] and [`list`] follow links.
pub trait FileSystem {
    /// What is at `path`.
    fn kind(&mut self, path: &str) -> io::Result<Kind>;
    /// Where the link at `path` leads.
    fn link(&mut self, path: &str) -> io::Result<String>;
    /// Names in the directory at `path`, without `.` and `..`; those that are no UTF-8 are
    /// left out.
    fn names(&mut self, path: &str) -> io::Result<Vec<String>>;
    /// Appends the file at `path`, of `size` bytes, to `out`.
    fn read(&mut self, path: &str, size: u64, out: &mut Vec<u8>) -> io::Result<()>;
}

/// A file system with its names.
pub struct Found {
    /// `ext4`, `xfs`, `btrfs` or `FAT`.
    pub name: &'static str,
    /// As `blkid` writes it.
    pub uuid: String,
    /// Its label; empty if it has none.
    pub label: String,
    /// Root as Linux mounts it without options.
    pub fs: Box<dyn FileSystem>,
    /// Root as GRUB sees it, where that is another one (btrfs with a default subvolume).
    pub top: Option<Box<dyn FileSystem>>,
}

/// What the first bytes of a partition say.
pub enum Probe {
    /// A file system that can be read.
    Found(Found),
    /// Something that is known and cannot be read: its name, or a file system with what is
    /// wrong with it.
    Unreadable(String),
    /// Nothing that is known.
    Unknown,
}

/// Looks what is on `window`.
pub fn probe(window: &Window) -> Probe {
    type Open = fn(&Window) -> io::Result<Found>;
    let at = |offset: u64, magic: &[u8]| {
        let mut bytes = vec![0; magic.len()];
        window.read_at(offset, &mut bytes).is_ok() && bytes == magic
    };
    let known: [(&str, bool, Open); 4] = [
        ("xfs", at(0, b"XFSB"), xfs::open),
        ("btrfs", at(0x1_0040, b"_BHRfS_M"), btrfs::open),
        ("ext4", at(1024 + 56, &[0x53, 0xef]), ext4::open),
        (
            "FAT",
            at(510, &[0x55, 0xaa]) && (at(54, b"FAT1") || at(82, b"FAT32")),
            fat::open,
        ),
    ];
    for (name, there, open) in known {
        if there {
            return match open(window) {
                Ok(found) => Probe::Found(found),
                Err(error) => Probe::Unreadable(format!("{name}, but {error}")),
            };
        }
    }
    let other = [
        (at(0, b"LUKS\xba\xbe"), "LUKS, which is encrypted"),
        (at(512 + 24, b"LVM2 001"), "an LVM physical volume"),
        (at(4096, &[0xfc, 0x4e, 0x2b, 0xa9]), "a member of a RAID"),
        (at(0, &[0xfc, 0x4e, 0x2b, 0xa9]), "a member of a RAID"),
        (at(1024, &[0x10, 0x20, 0xf5, 0xf2]), "f2fs"),
        (at(0, b"hsqs"), "squashfs"),
        (at(1024, &[0xe2, 0xe1, 0xf5, 0xe0]), "erofs"),
        (at(0x8001, b"CD001"), "ISO 9660"),
        (at(3, b"NTFS    "), "NTFS"),
        (at(3, b"EXFAT   "), "exFAT"),
        (at(4086, b"SWAPSPACE2"), "swap"),
        (at(0x1018, &[0xc6, 0x85, 0x73, 0xf6]), "bcachefs"),
    ];
    match other.into_iter().find(|(there, _)| *there) {
        Some((_, name)) => Probe::Unreadable(name.into()),
        None => Probe::Unknown,
    }
}

/// The parts of `path` that count.
fn parts(path: &str) -> impl Iterator<Item = &str> {
    path.split('/')
        .filter(|part| !part.is_empty() && *part != ".")
}

/// The path without links that `path` leads to, and what is there. Links stay within the
/// file system: its root is their root.
pub fn find(fs: &mut dyn FileSystem, path: &str) -> io::Result<(String, Kind)> {
    let mut todo: Vec<String> = parts(path).map(str::to_owned).collect();
    todo.reverse();
    let mut at = String::new();
    let mut kind = Kind::Directory;
    let mut links = 0;
    while let Some(part) = todo.pop() {
        if part == ".." {
            at.truncate(at.rfind('/').unwrap_or(0));
            kind = Kind::Directory;
            continue;
        }
        let next = format!("{at}/{part}");
        if next.len() > MAX_PATH || part.contains('\0') {
            return Err(io::Error::other("the path is no path of a file"));
        }
        kind = fs.kind(&next)?;
        if kind == Kind::Link {
            links += 1;
            let target = fs.link(&next)?;
            if links > MAX_LINKS || target.len() > MAX_PATH {
                return Err(io::Error::other("its symbolic links lead in a circle"));
            }
            if target.starts_with('/') {
                at.clear();
            }
            let target: Vec<&str> = parts(&target).collect();
            todo.extend(target.into_iter().rev().map(str::to_owned));
            kind = Kind::Directory;
        } else {
            at = next;
            if kind != Kind::Directory && !todo.is_empty() {
                return Err(io::ErrorKind::NotFound.into());
            }
        }
    }
    if at.is_empty() {
        at.push('/');
    }
    Ok((at, kind))
}

/// Reads the file at `path`, of at most `limit` bytes.
pub fn read(fs: &mut dyn FileSystem, path: &str, limit: u64) -> io::Result<Vec<u8>> {
    let (path, kind) = find(fs, path)?;
    let Kind::File(size) = kind else {
        return Err(io::Error::other("it is no regular file"));
    };
    if size > limit {
        return Err(io::Error::other(format!(
            "it has {size} bytes, and at most {limit} are read"
        )));
    }
    let mut out = Vec::new();
    fs.read(&path, size, &mut out)?;
    if out.len() as u64 != size {
        return Err(io::Error::other("it is shorter than its inode says"));
    }
    Ok(out)
}

/// Names in the directory at `path`, sorted.
pub fn list(fs: &mut dyn FileSystem, path: &str) -> io::Result<Vec<String>> {
    let (path, kind) = find(fs, path)?;
    if kind != Kind::Directory {
        return Err(io::ErrorKind::NotFound.into());
    }
    let mut names = fs.names(&path)?;
    names.truncate(MAX_NAMES);
    names.sort_unstable();
    Ok(names)
}

/// Appends `size` bytes that `next` gives piece by piece; it is called with an offset and a
/// buffer, and says how much it filled.
fn in_pieces(
    size: u64,
    out: &mut Vec<u8>,
    mut next: impl FnMut(u64, &mut [u8]) -> io::Result<usize>,
) -> io::Result<()> {
    let mut done = 0;
    while done < size {
        let piece = usize::try_from(size - done).map_or(CHUNK, |left| left.min(CHUNK));
        let start = out.len();
        out.resize(start + piece, 0);
        // Some give no more than a block at a time.
        let mut filled = 0;
        while filled < piece {
            let count = next(done + filled as u64, &mut out[start + filled..])?;
            if count == 0 {
                out.truncate(start + filled);
                return Ok(());
            }
            filled += count.min(piece - filled);
        }
        done += piece as u64;
    }
    Ok(())
}

/// A UUID as 16 bytes, in the order in which they are written.
fn uuid(bytes: &[u8; 16]) -> String {
    let mut text = String::new();
    for (at, byte) in bytes.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// Text up to the first NUL.
fn label(bytes: &[u8]) -> String {
    let end = bytes
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
