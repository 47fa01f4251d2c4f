//! FAT12, FAT16 and FAT32 by `fatfs`.

use std::io::{self, Read, Seek, SeekFrom, Write};

use fatfs::{Dir, FsOptions};

use super::{FileSystem, Found, Kind, MAX_NAMES, in_pieces, parts};
use crate::source::Window;

/// Entries of one directory that are looked at; a directory may lead in a circle.
const MAX_ENTRIES: usize = 65_536;

/// What `fatfs` wants to have: a disk with a position. Writing fails.
struct Cursor {
    window: Window,
    at: u64,
}

impl Read for Cursor {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.window.size().saturating_sub(self.at);
        let count = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
        self.window.read_at(self.at, &mut buffer[..count])?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Seek for Cursor {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.window.size().checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

impl Write for Cursor {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Fat(fatfs::FileSystem<Cursor>);

pub fn open(window: &Window) -> io::Result<Found> {
    let disk = Cursor {
        window: window.clone(),
        at: 0,
    };
    let fs = fatfs::FileSystem::new(disk, FsOptions::new())?;
    let id = fs.volume_id();
    let label = match fs.volume_label() {
        label if label == "NO NAME" => String::new(),
        label => label,
    };
    Ok(Found {
        name: "FAT",
        uuid: format!("{:04X}-{:04X}", id >> 16, id & 0xffff),
        label,
        fs: Box::new(Fat(fs)),
        top: None,
    })
}

/// What an entry of a directory is.
enum Entry<'a> {
    Directory(Dir<'a, Cursor>),
    File(fatfs::File<'a, Cursor>, u64),
}

impl Fat {
    /// Walks by hand: the crate's own way through a path follows a directory's chain without
    /// end, and allocates for each.
    fn entry(&self, path: &str) -> io::Result<Entry<'_>> {
        let mut at = Entry::Directory(self.0.root_dir());
        for part in parts(path) {
            let Entry::Directory(directory) = at else {
                return Err(io::ErrorKind::NotFound.into());
            };
            let mut found = None;
            for entry in directory.iter().take(MAX_ENTRIES) {
                let entry = entry?;
                let is = |name: &str| name.eq_ignore_ascii_case(part);
                if is(&entry.file_name()) || is(&entry.short_file_name()) {
                    found = Some(if entry.is_dir() {
                        Entry::Directory(entry.to_dir())
                    } else {
                        Entry::File(entry.to_file(), entry.len())
                    });
                    break;
                }
            }
            at = found.ok_or(io::ErrorKind::NotFound)?;
        }
        Ok(at)
    }
}

impl FileSystem for Fat {
    fn kind(&mut self, path: &str) -> io::Result<Kind> {
        Ok(match self.entry(path)? {
            Entry::Directory(_) => Kind::Directory,
            Entry::File(_, size) => Kind::File(size),
        })
    }

    fn link(&mut self, _: &str) -> io::Result<String> {
        Err(io::Error::other("FAT has no links"))
    }

    fn names(&mut self, path: &str) -> io::Result<Vec<String>> {
        let Entry::Directory(directory) = self.entry(path)? else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let mut names = Vec::new();
        for entry in directory.iter().take(MAX_ENTRIES) {
            let name = entry?.file_name();
            if name != "." && name != ".." {
                names.push(name);
            }
            if names.len() == MAX_NAMES {
                break;
            }
        }
        Ok(names)
    }

    fn read(&mut self, path: &str, size: u64, out: &mut Vec<u8>) -> io::Result<()> {
        let Entry::File(mut file, _) = self.entry(path)? else {
            return Err(io::Error::other("it is no regular file"));
        };
        in_pieces(size, out, |_, piece| file.read(piece))
    }
}
