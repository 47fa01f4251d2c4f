//! XFS by `lamxfs`, which also replays the log in memory.

use std::io;

use lamxfs::{BlockRead, Error, Path, Xfs};

use super::{FileSystem, Found, Kind, MAX_NAMES, in_pieces, uuid};
use crate::source::Window;

impl BlockRead for Window {
    type Error = io::Error;

    fn read_at(&mut self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        Window::read_at(self, offset_bytes, buf)
    }
}

pub fn open(window: &Window) -> io::Result<Found> {
    let fs = Xfs::open(window.clone(), window.size()).map_err(io_error)?;
    Ok(Found {
        name: "xfs",
        uuid: uuid(&fs.uuid()),
        label: fs.label().unwrap_or_default().to_owned(),
        fs: Box::new(fs),
        top: None,
    })
}

fn io_error(error: Error) -> io::Error {
    match error {
        Error::NotFound { .. } => io::ErrorKind::NotFound.into(),
        other => match other.token() {
            "sb_dirty_log" => io::Error::other(
                "its log cannot be replayed here: boot it once elsewhere and shut it down",
            ),
            "not_a_directory" => io::ErrorKind::NotFound.into(),
            _ => io::Error::other(other.to_string()),
        },
    }
}

impl FileSystem for Xfs<Window> {
    fn kind(&mut self, path: &str) -> io::Result<Kind> {
        let inode = self.resolve(Path::new(path.as_bytes())).map_err(io_error)?;
        let data = self.metadata(&inode).map_err(io_error)?;
        Ok(if data.is_file() {
            Kind::File(data.size())
        } else if data.is_dir() {
            Kind::Directory
        } else if data.is_symlink() {
            Kind::Link
        } else {
            Kind::Other
        })
    }

    fn link(&mut self, path: &str) -> io::Result<String> {
        let target = self
            .read_link(Path::new(path.as_bytes()))
            .map_err(io_error)?;
        String::from_utf8(target).map_err(io::Error::other)
    }

    fn names(&mut self, path: &str) -> io::Result<Vec<String>> {
        let entries = self
            .read_dir(Path::new(path.as_bytes()))
            .map_err(io_error)?;
        Ok(entries
            .into_iter()
            .filter(|entry| entry.name != b"." && entry.name != b"..")
            .filter_map(|entry| String::from_utf8(entry.name).ok())
            .take(MAX_NAMES)
            .collect())
    }

    fn read(&mut self, path: &str, size: u64, out: &mut Vec<u8>) -> io::Result<()> {
        let inode = self.resolve(Path::new(path.as_bytes())).map_err(io_error)?;
        in_pieces(size, out, |offset, piece| {
            self.read_file_at(&inode, offset, piece).map_err(io_error)
        })
    }
}
