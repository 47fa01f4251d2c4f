//! What is in disks that no VM uses, in a file: a saved VM without the VM (`docs/formats.md`,
//! "Saved disks").

use std::io::{Read, Write};

use blanket_disk::{Disk as _, Image};
use blanket_snapshot::{Kind, Reader, Writer};
use serde::{Deserialize, Serialize};

use super::{ResumeError, SaveError};
use crate::migration::Images;
use crate::migration::disks::{blocks, write as write_blocks};

/// Most disks in a file: what a VM has at most.
pub const MOST: usize = 256;

/// Why disks are not in a file, or not out of it. Disks are named by their place, from 0.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error("the file {0}")]
    File(#[from] blanket_snapshot::Error),
    /// A disk cannot be read, or what is in it not be written.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// A disk cannot be written.
    #[error(transparent)]
    Fill(#[from] ResumeError),
    /// There are others.
    #[error("the file has {there} disks, and {here} are given (at most {MOST})")]
    Count {
        /// In the file.
        there: usize,
        /// Given.
        here: usize,
    },
    /// It has not the room.
    #[error("disk {disk} has {there} bytes in the file, and the one here {here}")]
    Size {
        /// Its place.
        disk: usize,
        /// Bytes in the file.
        there: u64,
        /// Bytes here.
        here: u64,
    },
    /// What is in the file counts on another base.
    #[error(
        "disk {disk} stands on {there} in the file, and the one here on {here}: give the same base="
    )]
    Base {
        /// Its place.
        disk: usize,
        /// In the file.
        there: String,
        /// Here.
        here: String,
    },
}

/// A disk that no VM uses. It is locked as long as its image is open.
#[derive(Debug)]
pub struct AtRest {
    /// It, to be read or to be filled.
    pub image: Image,
    /// The name of the content that it stands on, if whoever gets it has that, too.
    pub base: Option<String>,
}

/// The first chunk.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    disks: Vec<Described>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Described {
    /// Bytes.
    size: u64,
    /// What it stands on.
    base: Option<String>,
}

fn named(base: Option<&String>) -> String {
    base.map_or_else(|| "nothing that is named".into(), Clone::clone)
}

/// Writes down what is in disks: all of it, or what is their own of those that stand on a base.
/// Bytes of the file.
///
/// # Errors
/// A disk cannot be read, the file not be written, or there are more than [`MOST`].
pub fn write(to: impl Write, disks: &[AtRest]) -> Result<u64, Error> {
    if disks.len() > MOST {
        let (there, here) = (0, disks.len());
        return Err(Error::Count { there, here });
    }
    let described = disks.iter().map(|disk| Described {
        size: disk.image.size(),
        base: disk.base.clone(),
    });
    let head = Head {
        disks: described.collect(),
    };
    let mut writer = Writer::new(to)?;
    writer.text(Kind::Disks, &head)?;
    for (number, disk) in (0..).zip(disks) {
        let (reader, size) = (disk.image.reader(), disk.image.size());
        let own = blocks(&reader, size, disk.base.is_some());
        let own = own.map_err(|error| SaveError::Disk(number, error))?;
        write_blocks(&mut writer, number, &reader, size, &own)?;
    }
    Ok(writer.finish()?.1)
}

/// Fills new disks, in the same order and on the same bases, with what was written down; on
/// stable storage. If that fails, there is a part of it in them.
///
/// # Errors
/// It is no such file, or damaged; the disks are others, or cannot be written.
pub fn read(from: impl Read, disks: &[AtRest]) -> Result<(), Error> {
    let mut reader = Reader::new(from)?;
    let head: Head = reader.text(Kind::Disks)?;
    let (there, here) = (head.disks.len(), disks.len());
    if there != here || here > MOST {
        return Err(Error::Count { there, here });
    }
    for (disk, (there, here)) in head.disks.iter().zip(disks).enumerate() {
        if there.base != here.base {
            return Err(Error::Base {
                disk,
                there: named(there.base.as_ref()),
                here: named(here.base.as_ref()),
            });
        }
        let (there, here) = (there.size, here.image.size());
        if there > here {
            return Err(Error::Size { disk, there, here });
        }
    }
    let to_fill = disks.iter().map(|disk| (&disk.image, disk.base.is_some()));
    let mut images = Images::at_rest(to_fill)?;
    while let Some(piece) = reader.piece()? {
        images.write(&piece)?;
    }
    reader.finish()?;
    Ok(images.flush()?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};

    use blanket_disk::{Backing, Format, Options, Writer as DiskWriter, create, open};

    use super::*;

    const BYTES: usize = 1 << 20;
    const SIZE: u64 = BYTES as u64;
    const BASE: &str = "blake3:00ff";

    fn at_rest(path: &Path, base: Option<&str>) -> AtRest {
        AtRest {
            image: open(path, &Options::default()).expect("opened"),
            base: base.map(Into::into),
        }
    }

    fn overlay(directory: &Path, name: &str) -> PathBuf {
        let path = directory.join(name);
        let backing = Backing {
            path: &directory.join("base.raw"),
            format: None,
        };
        create(&path, Format::Qcow2, None, Some(backing)).expect("made");
        path
    }

    fn raw(directory: &Path, name: &str) -> PathBuf {
        let path = directory.join(name);
        create(&path, Format::Raw, Some(SIZE), None).expect("made");
        path
    }

    /// An overlay, of which two blocks are its own, one of them zero; a raw disk; the file with both.
    fn saved(directory: &Path) -> ([AtRest; 2], Vec<u8>) {
        fs::write(directory.join("base.raw"), vec![7; BYTES]).expect("written");
        let disks = [
            at_rest(&overlay(directory, "a.qcow2"), Some(BASE)),
            at_rest(&raw(directory, "b.raw"), None),
        ];
        for (disk, offset, bytes) in [
            (&disks[0], 5 << 16, [9; 4096]),
            (&disks[0], 9 << 16, [0; 4096]),
            (&disks[1], SIZE - 4096, [3; 4096]),
        ] {
            let mut writer = DiskWriter::new(&disk.image, 4096).expect("made");
            writer.write(offset, &bytes).expect("written");
            writer.flush().expect("flushed");
        }
        let mut file = Vec::new();
        let length = write(&mut file, &disks).expect("written");
        assert_eq!(length, file.len() as u64);
        (disks, file)
    }

    fn content(disk: &AtRest) -> Vec<u8> {
        let mut bytes = vec![0; BYTES];
        let read = disk.image.reader().read_exact_at(0, &mut bytes);
        read.expect("read");
        bytes
    }

    #[test]
    fn new_disks_have_what_was_in_the_others() {
        let directory = tempfile::tempdir().expect("a directory");
        let (disks, file) = saved(directory.path());
        let new = [
            at_rest(&overlay(directory.path(), "c.qcow2"), Some(BASE)),
            at_rest(&raw(directory.path(), "d.raw"), None),
        ];
        read(&file[..], &new).expect("read");
        for (old, new) in disks.iter().zip(&new) {
            assert!(content(old) == content(new));
        }
        // What the base has is not in the file, and stays the base's.
        let reader = new[0].image.reader();
        assert!(reader.is_own(5 << 16, 65536).expect("asked"));
        assert!(!reader.is_own(0, 5 << 16).expect("asked"));
        // They are new no more.
        let error = read(&file[..], &new).expect_err("filled already");
        assert!(
            error.to_string().contains("blocks of its own already"),
            "{error}"
        );

        let mut none = Vec::new();
        write(&mut none, &[]).expect("written");
        read(&none[..], &[]).expect("nothing is a VM's disks, too");
    }

    #[test]
    fn other_disks_and_other_files_are_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let here = directory.path();
        let (_, file) = saved(here);
        let on_base = at_rest(&overlay(here, "c.qcow2"), Some(BASE));
        let refused = |disks: &[AtRest], word: &str| {
            let error = read(&file[..], disks).expect_err(word).to_string();
            assert!(error.contains(word), "{word}: {error}");
        };
        let d = at_rest(&raw(here, "d.raw"), None);
        let disks = [on_base, d];
        refused(&disks[..1], "has 2 disks, and 1 are given");
        let small = here.join("e.raw");
        create(&small, Format::Raw, Some(SIZE / 2), None).expect("made");
        let [on_base, d] = disks;
        let disks = [on_base, at_rest(&small, None)];
        refused(&disks, "disk 1 has 1048576 bytes in the file");
        let [on_base, _] = disks;
        let other = AtRest {
            base: Some("blake3:11".into()),
            ..on_base
        };
        let disks = [other, d];
        refused(&disks, "on blake3:00ff in the file");

        // A saved VM is another thing, and so is a file of another version or with a chunk of another kind.
        let mut writer = Writer::new(Vec::new()).expect("memory");
        writer.text(Kind::Machine, &()).expect("memory");
        let vm = writer.finish().expect("memory").0;
        let error = read(&vm[..], &disks).expect_err("a VM").to_string();
        assert!(error.contains("where there must be disks"), "{error}");
        let mut newer = file.clone();
        newer[8] += 1;
        let error = read(&newer[..], &disks).expect_err("a version");
        assert!(error.to_string().contains("has version"), "{error}");
        let mut writer = Writer::new(Vec::new()).expect("memory");
        let head = Head { disks: Vec::new() };
        writer.text(Kind::Disks, &head).expect("memory");
        writer.pages(0, &[7; 4096]).expect("memory");
        let pages = writer.finish().expect("memory").0;
        let error = read(&pages[..], &[]).expect_err("pages").to_string();
        assert!(error.contains("where there must be disk"), "{error}");
        // A piece that is nobody's, and one beyond the end.
        for (number, offset) in [(1, 0), (0, SIZE - 512)] {
            let mut writer = Writer::new(Vec::new()).expect("memory");
            let head = Head {
                disks: vec![Described {
                    size: SIZE,
                    base: None,
                }],
            };
            writer.text(Kind::Disks, &head).expect("memory");
            writer.disk(number, offset, &[7; 4096]).expect("memory");
            let strange = writer.finish().expect("memory").0;
            let new = at_rest(&raw(here, &format!("{number}-{offset}.raw")), None);
            assert!(read(&strange[..], &[new]).is_err(), "{number} {offset}");
        }
    }

    #[test]
    fn flipped_bits_and_early_ends_are_found() {
        let directory = tempfile::tempdir().expect("a directory");
        let (_, file) = saved(directory.path());
        let new = || {
            let _ = fs::remove_file(directory.path().join("c.qcow2"));
            let _ = fs::remove_file(directory.path().join("d.raw"));
            [
                at_rest(&overlay(directory.path(), "c.qcow2"), Some(BASE)),
                at_rest(&raw(directory.path(), "d.raw"), None),
            ]
        };
        // Each bit of a container is flipped in the tests of its crate.
        for at in (0..file.len()).step_by(7) {
            let mut bad = file.clone();
            bad[at] ^= 1 << (at % 8);
            assert!(read(&bad[..], &new()).is_err(), "byte {at}");
            assert!(read(&file[..at], &new()).is_err(), "{at} bytes");
        }
    }
}
