//! Btrfs by `lambutter`.

use std::io;

use lambutter::{BlockRead, Btrfs, Error, Path};

use super::{FileSystem, Found, Kind, MAX_NAMES, in_pieces, label, uuid};
use crate::source::Window;

/// Where the first superblock is, bytes.
const SUPERBLOCK: u64 = 0x1_0000;
/// Id of the top level, above all other subvolumes.
const TOP_LEVEL: u64 = 5;

impl BlockRead for Window {
    type Error = io::Error;

    fn read_at(&mut self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        Window::read_at(self, offset_bytes, buf)
    }
}

pub fn open(window: &Window) -> io::Result<Found> {
    let fs = Btrfs::open(window.clone(), window.size()).map_err(io_error)?;
    let top: Option<Box<dyn FileSystem>> = if fs.subvolume() == TOP_LEVEL {
        None
    } else {
        let top = Btrfs::open_subvol_id(window.clone(), window.size(), TOP_LEVEL);
        Some(Box::new(top.map_err(io_error)?))
    };
    let mut id = [0; 16];
    window.read_at(SUPERBLOCK + 0x20, &mut id)?;
    let mut name = [0; 256];
    window.read_at(SUPERBLOCK + 0x12b, &mut name)?;
    Ok(Found {
        name: "btrfs",
        uuid: uuid(&id),
        label: label(&name),
        fs: Box::new(fs),
        top,
    })
}

fn io_error(error: Error) -> io::Error {
    match error {
        Error::NotFound => io::ErrorKind::NotFound.into(),
        other => io::Error::other(other.to_string()),
    }
}

fn path(path: &str) -> io::Result<Path<'_>> {
    Path::new(path.as_bytes()).ok_or_else(|| io::Error::other("the path is no path of a file"))
}

impl FileSystem for Btrfs<Window> {
    fn kind(&mut self, at: &str) -> io::Result<Kind> {
        let inode = self.resolve(path(at)?).map_err(io_error)?;
        let data = self.metadata(&inode).map_err(io_error)?;
        Ok(if data.is_file() {
            Kind::File(data.size)
        } else if data.is_dir() {
            Kind::Directory
        } else if data.is_symlink() {
            Kind::Link
        } else {
            Kind::Other
        })
    }

    fn link(&mut self, at: &str) -> io::Result<String> {
        let target = self.read_link(path(at)?).map_err(io_error)?;
        String::from_utf8(target).map_err(io::Error::other)
    }

    fn names(&mut self, at: &str) -> io::Result<Vec<String>> {
        let entries = self.read_dir(path(at)?).map_err(io_error)?;
        Ok(entries
            .into_iter()
            .filter_map(|entry| String::from_utf8(entry.name).ok())
            .take(MAX_NAMES)
            .collect())
    }

    fn read(&mut self, at: &str, size: u64, out: &mut Vec<u8>) -> io::Result<()> {
        let inode = self.resolve(path(at)?).map_err(io_error)?;
        in_pieces(size, out, |offset, piece| {
            self.read_file_at(&inode, offset, piece).map_err(io_error)
        })
    }
}
