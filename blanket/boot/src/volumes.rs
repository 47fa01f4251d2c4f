//! The disk: its partitions, and the file systems on them under GRUB's names.

use std::io;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::fs::{self, FileSystem, Found, Kind, Probe};
use crate::grub::{Place, Search, World};
use crate::partitions::{self, Partition, Role, Table};
use crate::source::{Source, Window};

/// Bytes that may be read to find what to boot, counting what is read again.
const BUDGET: u64 = 4 << 30;

/// A partition with a file system that can be read.
pub struct Volume {
    /// The partition; number 0 is the whole disk.
    pub partition: Partition,
    /// GRUB's name of it.
    pub device: String,
    found: Found,
}

impl Volume {
    /// For messages: `partition 1 (ext4)`.
    pub fn describe(&self) -> String {
        match self.partition.number {
            0 => format!("the disk ({})", self.found.name),
            number => format!("partition {number} ({})", self.found.name),
        }
    }

    /// The root that GRUB sees, or the one that Linux mounts.
    fn root(&mut self, relative: bool) -> &mut dyn FileSystem {
        match &mut self.found.top {
            Some(top) if !relative => top.as_mut(),
            _ => self.found.fs.as_mut(),
        }
    }

    /// Whether the two roots are different.
    pub fn has_default_subvolume(&self) -> bool {
        self.found.top.is_some()
    }
}

/// All of a disk that can be read.
pub struct Volumes {
    table: Table,
    /// In the order of the table.
    pub all: Vec<Volume>,
    /// What is in the other partitions, one clause for each.
    pub unreadable: Vec<String>,
}

impl Volumes {
    /// Reads the partition table and looks for file systems.
    ///
    /// # Errors
    /// The disk cannot be read, or nothing on it can be.
    pub fn open(source: Arc<dyn Source>) -> Result<Self> {
        let disk = Window::new(source, BUDGET);
        let (table, partitions) = partitions::read(&disk).map_err(Error::Read)?;
        let mut all = Vec::new();
        let mut unreadable = Vec::new();
        for partition in partitions {
            let number = partition.number;
            match fs::probe(&disk.part(partition.start, partition.size)) {
                Probe::Found(found) => {
                    let device = match (table, number) {
                        (_, 0) => "hd0".into(),
                        (Table::Mbr, number) => format!("hd0,msdos{number}"),
                        (_, number) => format!("hd0,gpt{number}"),
                    };
                    all.push(Volume {
                        partition,
                        device,
                        found,
                    });
                }
                Probe::Unreadable(what) if number == 0 => unreadable.push(what),
                Probe::Unreadable(what) => unreadable.push(format!("partition {number} is {what}")),
                Probe::Unknown => {}
            }
        }
        if all.is_empty() {
            let found = if unreadable.is_empty() {
                "nothing that is known".into()
            } else {
                unreadable.join("; ")
            };
            return Err(Error::NoFileSystem { found });
        }
        Ok(Self {
            table,
            all,
            unreadable,
        })
    }

    /// The volume that GRUB calls `device`: `hd0,gpt2`, `hd0,2`, `(hd0)`, `hd0,gpt2,...`.
    pub fn device(&mut self, device: &str) -> Option<&mut Volume> {
        let device = device.trim_start_matches('(').trim_end_matches(')');
        let mut parts = device.split(',');
        if parts.next() != Some("hd0") {
            return None;
        }
        let number: u32 = match parts.next() {
            None => 0,
            Some(part) => {
                let digits = part.trim_start_matches(|next: char| next.is_ascii_alphabetic());
                let kind = &part[..part.len() - digits.len()];
                let known = match self.table {
                    Table::Gpt => kind == "gpt",
                    Table::Mbr => kind == "msdos",
                    Table::None => false,
                };
                if !kind.is_empty() && !known {
                    return None;
                }
                digits.parse().ok()?
            }
        };
        self.all
            .iter_mut()
            .find(|volume| volume.partition.number == number)
    }

    /// The first volume for which the boot loader's own partitions are used.
    pub fn with_role(&self, role: Role) -> Option<&Volume> {
        self.all.iter().find(|volume| volume.partition.role == role)
    }

    fn root(&mut self, place: &Place) -> io::Result<&mut dyn FileSystem> {
        let others = match self.unreadable.as_slice() {
            [] => String::new(),
            some => format!(" ({})", some.join("; ")),
        };
        match self.device(&place.device) {
            Some(volume) => Ok(volume.root(place.relative)),
            None => Err(io::Error::other(format!(
                "the disk has no device ({}) that can be read{others}",
                place.device
            ))),
        }
    }

    /// For messages.
    pub fn describe_device(&mut self, device: &str) -> String {
        match self.device(device) {
            Some(volume) => volume.describe(),
            None => format!("({device})"),
        }
    }
}

impl World for Volumes {
    fn kind(&mut self, place: &Place) -> io::Result<Kind> {
        Ok(fs::find(self.root(place)?, &place.path)?.1)
    }

    fn read(&mut self, place: &Place, limit: u64) -> io::Result<Vec<u8>> {
        fs::read(self.root(place)?, &place.path, limit)
    }

    fn list(&mut self, place: &Place) -> io::Result<Vec<String>> {
        fs::list(self.root(place)?, &place.path)
    }

    fn search(&mut self, what: Search<'_>, relative: bool) -> Option<String> {
        let matches = |volume: &mut Volume| match what {
            Search::Uuid(uuid) => volume.found.uuid.eq_ignore_ascii_case(uuid),
            Search::Label(label) => volume.found.label == label,
            Search::Partition(uuid) => volume.partition.uuid.eq_ignore_ascii_case(uuid),
            Search::File(path) => fs::find(volume.root(relative), path).is_ok(),
        };
        self.all
            .iter_mut()
            .find_map(|volume| matches(volume).then(|| volume.device.clone()))
    }

    fn describe(&mut self, device: &str) -> Option<(String, String, &'static str)> {
        let found = &self.device(device)?.found;
        // GRUB's name for all of these.
        let name = match found.name {
            "ext4" => "ext2",
            "FAT" => "fat",
            name => name,
        };
        Some((found.uuid.clone(), found.label.clone(), name))
    }
}
