//! ext2, ext3 and ext4 by `ext4-view`, which also replays the journal in memory.

use std::error::Error;
use std::io;

use ext4_view::{Ext4, Ext4Error, Ext4Read, FileType};

use super::{FileSystem, Found, Kind, MAX_NAMES, in_pieces, label, uuid};
use crate::source::Window;

impl Ext4Read for Window {
    fn read(
        &mut self,
        start_byte: u64,
        dst: &mut [u8],
    ) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        Ok(self.read_at(start_byte, dst)?)
    }
}

pub fn open(window: &Window) -> io::Result<Found> {
    let fs = Ext4::load(Box::new(window.clone())).map_err(io_error)?;
    let mut id = [0; 16];
    window.read_at(1024 + 0x68, &mut id)?;
    let mut name = [0; 16];
    window.read_at(1024 + 0x78, &mut name)?;
    Ok(Found {
        name: "ext4",
        uuid: uuid(&id),
        label: label(&name),
        fs: Box::new(fs),
        top: None,
    })
}

fn io_error(error: Ext4Error) -> io::Error {
    match error {
        Ext4Error::NotFound | Ext4Error::NotADirectory => io::ErrorKind::NotFound.into(),
        other => io::Error::other(other.to_string()),
    }
}

impl FileSystem for Ext4 {
    fn kind(&mut self, path: &str) -> io::Result<Kind> {
        let data = self.symlink_metadata(path).map_err(io_error)?;
        Ok(match data.file_type() {
            FileType::Regular => Kind::File(data.len()),
            FileType::Directory => Kind::Directory,
            FileType::Symlink => Kind::Link,
            _ => Kind::Other,
        })
    }

    fn link(&mut self, path: &str) -> io::Result<String> {
        let target = self.read_link(path).map_err(io_error)?;
        let text = target.to_str().map_err(io::Error::other)?;
        Ok(text.to_owned())
    }

    fn names(&mut self, path: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in self.read_dir(path).map_err(io_error)? {
            let entry = entry.map_err(io_error)?;
            match entry.file_name().as_str() {
                Ok("." | "..") | Err(_) => {}
                Ok(name) => names.push(name.to_owned()),
            }
            if names.len() == MAX_NAMES {
                break;
            }
        }
        Ok(names)
    }

    fn read(&mut self, path: &str, size: u64, out: &mut Vec<u8>) -> io::Result<()> {
        let mut file = self.open(path).map_err(io_error)?;
        in_pieces(size, out, |_, piece| {
            file.read_bytes(piece).map_err(io_error)
        })
    }
}
