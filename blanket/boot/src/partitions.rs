//! Partition tables: GPT, MBR with logical partitions, or none at all.
//!
//! The crates for this want to write, allocate what the table says, or panic on a table that
//! they do not expect, and the table here is a stranger's. What is needed of it is small.

use std::io;

use crate::source::Window;

/// Partitions that are looked at; Linux takes 256 of one disk.
const MAX_PARTITIONS: usize = 256;
/// Logical partitions that are followed.
const MAX_LOGICAL: u32 = 60;
/// Sector sizes that disks have.
const SECTOR_SIZES: [u64; 2] = [512, 4096];

/// Kind of a partition table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// GUID partition table.
    Gpt,
    /// Master boot record.
    Mbr,
    /// The disk is one file system.
    None,
}

/// What a partition says that it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// EFI system partition.
    Esp,
    /// Extended boot loader partition of the Boot Loader Specification.
    Xbootldr,
    /// Anything else.
    Other,
}

/// One partition.
#[derive(Clone, Debug)]
pub struct Partition {
    /// As Linux counts: sda1 is 1. 0 is the whole disk.
    pub number: u32,
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub size: u64,
    /// What it is for.
    pub role: Role,
    /// `PARTUUID`, as Linux and GRUB write it.
    pub uuid: String,
}

/// Reads the partition table of `disk`. A disk without one is one partition, number 0.
///
/// # Errors
/// The medium's.
pub fn read(disk: &Window) -> io::Result<(Table, Vec<Partition>)> {
    let whole = Partition {
        number: 0,
        start: 0,
        size: disk.size(),
        role: Role::Other,
        uuid: String::new(),
    };
    let mut first = [0; 512];
    match disk.read_at(0, &mut first) {
        Ok(()) => {}
        // Too small for a table, and for a file system.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Ok((Table::None, vec![whole]));
        }
        Err(error) => return Err(error),
    }
    let mbr = Mbr::parse(&first);
    // A GPT counts when the MBR says so or is not there; else an old one may lie around.
    if mbr.as_ref().is_none_or(Mbr::is_protective)
        && let Some(partitions) = gpt(disk)?
    {
        return Ok((Table::Gpt, partitions));
    }
    match mbr {
        Some(mbr) if mbr.plausible(disk.size()) => Ok((Table::Mbr, mbr.partitions(disk)?)),
        _ => Ok((Table::None, vec![whole])),
    }
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

/// The first GPT that is whole: each sector size, then the copy at the disk's end.
fn gpt(disk: &Window) -> io::Result<Option<Vec<Partition>>> {
    for sector in SECTOR_SIZES {
        let last = (disk.size() / sector).saturating_sub(1);
        for lba in [1, last] {
            if let Some(partitions) = gpt_at(disk, sector, lba)? {
                return Ok(Some(partitions));
            }
        }
    }
    Ok(None)
}

/// UEFI specification 2.10, 5.3.2 and 5.3.3.
fn gpt_at(disk: &Window, sector: u64, lba: u64) -> io::Result<Option<Vec<Partition>>> {
    let Some(offset) = lba.checked_mul(sector) else {
        return Ok(None);
    };
    let mut header = [0; 512];
    if !read_if_there(disk, offset, &mut header)? || !header.starts_with(b"EFI PART") {
        return Ok(None);
    }
    let length = le32(&header, 12) as usize;
    let (count, size) = (le32(&header, 80) as usize, le32(&header, 84) as usize);
    if !(92..=512).contains(&length)
        || le64(&header, 24) != lba
        || !(128..=4096).contains(&size)
        || !size.is_power_of_two()
        || count > 1024
    {
        return Ok(None);
    }
    let sum = le32(&header, 16);
    header[16..20].fill(0);
    if crc32fast::hash(&header[..length]) != sum {
        return Ok(None);
    }
    let Some(table) = le64(&header, 72).checked_mul(sector) else {
        return Ok(None);
    };
    let mut entries = vec![0; count * size];
    if !read_if_there(disk, table, &mut entries)? || crc32fast::hash(&entries) != le32(&header, 88)
    {
        return Ok(None);
    }
    let mut partitions = Vec::new();
    for (number, entry) in (1..).zip(entries.chunks_exact(size)) {
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        if entry[..16] == [0; 16] || first == 0 || last < first {
            continue;
        }
        let range = first
            .checked_mul(sector)
            .zip((last - first + 1).checked_mul(sector));
        let Some((start, size)) = range.filter(|(start, _)| *start < disk.size()) else {
            continue;
        };
        partitions.push(Partition {
            number,
            start,
            size: size.min(disk.size() - start),
            role: match guid(&entry[..16]).as_str() {
                "c12a7328-f81f-11d2-ba4b-00a0c93ec93b" => Role::Esp,
                "bc13c2ff-59e6-4262-a352-b275fd6f7172" => Role::Xbootldr,
                _ => Role::Other,
            },
            uuid: guid(&entry[16..32]),
        });
        if partitions.len() == MAX_PARTITIONS {
            break;
        }
    }
    Ok(Some(partitions))
}

/// Text of a GUID: its first three fields are little-endian.
fn guid(bytes: &[u8]) -> String {
    let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut text = String::new();
    for (at, index) in order.into_iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{:02x}", bytes.get(index).unwrap_or(&0)));
    }
    text
}

fn read_if_there(disk: &Window, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
    match disk.read_at(offset, buffer) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// A row of a boot record, sectors of 512 bytes.
#[derive(Clone, Copy, Debug, Default)]
struct Row {
    status: u8,
    kind: u8,
    first: u64,
    count: u64,
}

impl Row {
    fn is_extended(self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85) && self.count > 0
    }
}

struct Mbr {
    id: u32,
    rows: [Row; 4],
}

impl Mbr {
    fn parse(sector: &[u8; 512]) -> Option<Self> {
        if sector[510..] != [0x55, 0xaa] {
            return None;
        }
        let mut rows = [Row::default(); 4];
        for (row, bytes) in rows.iter_mut().zip(sector[446..510].chunks_exact(16)) {
            *row = Row {
                status: bytes[0],
                kind: bytes[4],
                first: le32(bytes, 8).into(),
                count: le32(bytes, 12).into(),
            };
        }
        Some(Self {
            id: le32(sector, 440),
            rows,
        })
    }

    fn is_protective(&self) -> bool {
        self.rows.iter().any(|row| row.kind == 0xee)
    }

    /// A FAT's boot sector has the same last bytes, with code where the rows would be.
    fn plausible(&self, disk: u64) -> bool {
        let used = |row: &&Row| row.kind != 0 && row.count > 0;
        self.rows.iter().all(|row| row.status & 0x7f == 0)
            && self.rows.iter().filter(used).count() > 0
            && self
                .rows
                .iter()
                .filter(used)
                .all(|row| row.first > 0 && row.first * 512 < disk)
    }

    fn partitions(&self, disk: &Window) -> io::Result<Vec<Partition>> {
        let make = |number: u32, first: u64, row: Row| {
            let start = first * 512;
            (start < disk.size() && row.count > 0).then(|| Partition {
                number,
                start,
                size: (row.count * 512).min(disk.size() - start),
                role: match row.kind {
                    0xef => Role::Esp,
                    0xea => Role::Xbootldr,
                    _ => Role::Other,
                },
                uuid: format!("{:08x}-{number:02x}", self.id),
            })
        };
        let mut partitions = Vec::new();
        for (number, row) in (1..).zip(self.rows) {
            if row.kind != 0 && !row.is_extended() {
                partitions.extend(make(number, row.first, row));
            }
        }
        let Some(extended) = self.rows.iter().find(|row| row.is_extended()) else {
            return Ok(partitions);
        };
        // A chain of records, each with one partition and the place of the next record. It must
        // go forward, so it ends.
        let mut at = extended.first;
        let mut number = 5;
        while number < 5 + MAX_LOGICAL {
            let mut sector = [0; 512];
            if !read_if_there(disk, at * 512, &mut sector)? {
                break;
            }
            let Some(record) = Self::parse(&sector) else {
                break;
            };
            let data = |row: &&Row| row.kind != 0 && !row.is_extended() && row.count > 0;
            if let Some(row) = record.rows.iter().find(data) {
                partitions.extend(make(number, at + row.first, *row));
                number += 1;
            }
            match record.rows.iter().find(|row| row.is_extended()) {
                Some(next) if extended.first + next.first > at => at = extended.first + next.first,
                _ => break,
            }
        }
        Ok(partitions)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use proptest::prelude::*;

    fn disk(bytes: Vec<u8>) -> Window {
        Window::new(Arc::new(bytes), 1 << 30)
    }

    /// A GPT with one partition, with both copies.
    fn with_gpt(sector: usize) -> Vec<u8> {
        let sectors = 400;
        let mut bytes = vec![0; sectors * sector];
        bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
        bytes[446 + 4] = 0xee;
        bytes[446 + 8] = 1;
        let mut entries = vec![0; 128 * 128];
        entries[128..144].copy_from_slice(&[
            0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e,
            0xc9, 0x3b,
        ]);
        entries[144] = 9;
        entries[160..168].copy_from_slice(&100u64.to_le_bytes());
        entries[168..176].copy_from_slice(&149u64.to_le_bytes());
        for (lba, table) in [(1, 2), (sectors - 1, sectors - 40)] {
            let mut header = vec![0; 92];
            header[..8].copy_from_slice(b"EFI PART");
            header[12..16].copy_from_slice(&92u32.to_le_bytes());
            header[24..32].copy_from_slice(&(lba as u64).to_le_bytes());
            header[72..80].copy_from_slice(&(table as u64).to_le_bytes());
            header[80..84].copy_from_slice(&128u32.to_le_bytes());
            header[84..88].copy_from_slice(&128u32.to_le_bytes());
            header[88..92].copy_from_slice(&crc32fast::hash(&entries).to_le_bytes());
            let sum = crc32fast::hash(&header);
            header[16..20].copy_from_slice(&sum.to_le_bytes());
            bytes[lba * sector..lba * sector + 92].copy_from_slice(&header);
            bytes[table * sector..table * sector + entries.len()].copy_from_slice(&entries);
        }
        bytes
    }

    #[test]
    fn gpt_with_both_sector_sizes() {
        for sector in [512, 4096] {
            let (table, partitions) = read(&disk(with_gpt(sector))).unwrap();
            assert_eq!((table, partitions.len()), (Table::Gpt, 1));
            let only = &partitions[0];
            assert_eq!((only.number, only.role), (2, Role::Esp));
            assert_eq!(
                (only.start, only.size),
                (100 * sector as u64, 50 * sector as u64)
            );
            assert_eq!(only.uuid, "00000009-0000-0000-0000-000000000000");
        }
    }

    #[test]
    fn the_second_copy_counts_when_the_first_is_damaged() {
        let mut bytes = with_gpt(512);
        bytes[512 + 50] ^= 1;
        assert_eq!(read(&disk(bytes.clone())).unwrap().0, Table::Gpt);
        let last = bytes.len() - 512;
        bytes[last + 50] ^= 1;
        assert_ne!(read(&disk(bytes)).unwrap().0, Table::Gpt);
    }

    #[test]
    fn logical_partitions_in_a_circle_end() {
        let mut bytes = vec![0; 1 << 20];
        let mut record = |at: usize, rows: &[(u8, u32, u32)]| {
            for (index, (kind, first, count)) in rows.iter().enumerate() {
                let row = at * 512 + 446 + index * 16;
                bytes[row + 4] = *kind;
                bytes[row + 8..row + 12].copy_from_slice(&first.to_le_bytes());
                bytes[row + 12..row + 16].copy_from_slice(&count.to_le_bytes());
            }
            bytes[at * 512 + 510..at * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
        };
        record(0, &[(0x83, 10, 20), (0x05, 100, 1000)]);
        record(100, &[(0x83, 1, 50), (0x05, 60, 100)]);
        record(160, &[(0x83, 1, 40), (0x05, 0, 100)]);
        let (table, partitions) = read(&disk(bytes)).unwrap();
        assert_eq!(table, Table::Mbr);
        let found: Vec<(u32, u64)> = partitions
            .iter()
            .map(|p| (p.number, p.start / 512))
            .collect();
        assert_eq!(found, [(1, 10), (5, 101), (6, 161)]);
    }

    #[test]
    fn no_table_is_one_partition() {
        for size in [0, 100, 4096] {
            let (table, partitions) = read(&disk(vec![0; size])).unwrap();
            assert_eq!((table, partitions.len()), (Table::None, 1));
            assert_eq!((partitions[0].number, partitions[0].size), (0, size as u64));
        }
    }

    proptest! {
        #[test]
        fn changed_tables_stay_within_the_disk(
            changes in prop::collection::vec((0usize..512 * 60, any::<u8>()), 0..40),
            protective in any::<bool>(),
        ) {
            let mut bytes = with_gpt(512);
            if !protective {
                bytes[446 + 4] = 0x05;
            }
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            let size = bytes.len() as u64;
            let (_, partitions) = read(&disk(bytes)).unwrap();
            prop_assert!(partitions.len() <= MAX_PARTITIONS + 64);
            for partition in partitions {
                prop_assert!(partition.start + partition.size <= size);
            }
        }
    }
}
