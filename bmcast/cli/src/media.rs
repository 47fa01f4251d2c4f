//! `image`: a medium that a machine boots the VMM from.

use std::fs::File;
use std::io::{Cursor, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use bmcast_image::{BootConfig, Disk, Hash, Key, MAX_MANIFEST, Manifest, Network, Server};
use fatfs::{FatType, FileSystem, FormatVolumeOptions, FsOptions};
use gpt::disk::LogicalBlockSize;
use serde::Serialize;

use crate::args::ImageArgs;
use crate::client;
use crate::exit::{self, Code, Error};
use crate::source::{self, mode};

const SECTOR: usize = 512;
/// Where the partition begins, as everybody aligns them.
const START: usize = 1 << 20;
/// What a file system has room for beside the application.
const ROOM: usize = 2 << 20;
/// The least that FAT32 can be.
const LEAST: usize = 64 << 20;
/// Most bytes of an application.
const MOST: u64 = 256 << 20;

#[derive(Serialize)]
struct Made {
    medium: PathBuf,
    bytes: u64,
    manifest: String,
}

/// Carries out `image`.
pub async fn command(arguments: Box<ImageArgs>, json: bool) -> Result<(), Error> {
    let efi = application(&arguments.efi)?;
    let manifest = match arguments.manifest_id {
        Some(id) => id,
        None => ask(&arguments.server).await?,
    };
    let network = match arguments.address {
        Some((address, prefix)) => Network::Static {
            address,
            prefix,
            gateway: arguments.gateway,
            dns: arguments.dns,
        },
        None => Network::Dhcp,
    };
    let config = BootConfig {
        servers: arguments.server,
        manifest,
        network,
        disk: arguments.disk.map_or(Disk::First, Disk::Serial),
        rate: arguments.rate,
        key: arguments.key.as_deref().map(key).transpose()?,
        machine: arguments.machine,
        serial: arguments.log_serial,
        erase: arguments.erase,
    }
    .to_string();
    // What the VMM would refuse is better refused now.
    BootConfig::parse(config.as_bytes())
        .map_err(|error| Error::new(Code::BadRequest, error.to_string(), ""))?;
    let bytes = write(&arguments.out, &efi, &config)?;
    let made = Made {
        medium: arguments.out,
        bytes,
        manifest: manifest.to_string(),
    };
    exit::show(&made, json, |made| {
        format!("{}: boots image {}\n", made.medium.display(), made.manifest)
    })
}

/// Reads a key, or makes one.
fn key(path: &Path) -> Result<Key, Error> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let mut random = [0; 32];
            File::open("/dev/urandom")
                .and_then(|mut file| file.read_exact(&mut random))
                .map_err(|error| Error::file(Path::new("/dev/urandom"), &error))?;
            let text = format!("{}\n", Key(random));
            source::write(path, text.as_bytes(), 0o600)?;
            text
        }
        Err(error) => return Err(Error::file(path, &error)),
    };
    text.trim().parse().map_err(|error| {
        let text = format!("{}: it is no key: {error}", path.display());
        Error::new(
            Code::BadRequest,
            text,
            "a file that is not there is made, with a new key",
        )
    })
}

fn application(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |error| Error::file(path, &error);
    let size = path.metadata().map_err(failed)?.len();
    let bytes = match size <= MOST {
        true => std::fs::read(path).map_err(failed)?,
        false => Vec::new(),
    };
    // UEFI specification 2.10, section 2.1.1: a PE32+ image, for AMD64.
    let at = bytes.get(0x3c..0x40).map(|at| [at[0], at[1], at[2], at[3]]);
    let at = at.and_then(|at| usize::try_from(u32::from_le_bytes(at)).ok());
    let head = at.and_then(|at| bytes.get(at..at.checked_add(6)?));
    if bytes.starts_with(b"MZ") && head == Some(b"PE\0\0\x64\x86") {
        return Ok(bytes);
    }
    Err(Error::new(
        Code::BadRequest,
        format!("{}: it is no UEFI application for x86-64", path.display()),
        "--efi is the VMM of BMcast, bmcast.efi, which the package bmcast has",
    ))
}

/// The id of the image that the first server that answers has.
async fn ask(servers: &[Server]) -> Result<Hash, Error> {
    let mut last = Error::new(Code::BadRequest, "there is no server", "");
    for server in servers {
        let found = client::get(server, "/manifest", MAX_MANIFEST).await;
        last = match found {
            Ok(Some(bytes)) => match Manifest::parse(bytes.to_vec()) {
                Ok(manifest) => return Ok(manifest.id()),
                Err(error) => Error::failed(format!("{server}/manifest: {error}")),
            },
            Ok(None) => Error::new(
                Code::NotFound,
                format!("{server}/manifest: it is not there"),
                "`bmcast serve IMAGE` has one; for another server, `bmcast manifest IMAGE` makes it",
            ),
            Err(error) => error,
        };
    }
    if last.hint.is_empty() || last.code == Code::Unreachable {
        last.hint = "give --manifest-id, and no server is asked".into();
    }
    Err(last)
}

/// Writes the medium, all at once; its bytes.
fn write(out: &Path, efi: &[u8], config: &str) -> Result<u64, Error> {
    let failed =
        |error: &dyn std::fmt::Display| Error::failed(format!("{}: {error}", out.display()));
    let directory = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if out.exists() && !out.is_file() {
        let hint = "write it to a file, and that by `dd` to the device";
        let text = format!("{}: it is there, and no file", out.display());
        return Err(Error::new(Code::BadRequest, text, hint));
    }
    let volume = volume(efi, config).map_err(|error| failed(&error))?;
    // The table at the start, its copy at the end.
    let size = START + volume.len() + START;
    let file = tempfile::Builder::new()
        .permissions(mode(0o644))
        .tempfile_in(directory)
        .map_err(|error| Error::file(directory, &error))?;
    file.as_file()
        .set_len(size as u64)
        .map_err(|error| failed(&error))?;
    let start = partition(file.as_file(), volume.len() as u64).map_err(|error| failed(&error))?;
    let mut to = file.as_file();
    for (n, piece) in volume.chunks(4096).enumerate() {
        if piece.iter().any(|byte| *byte != 0) {
            to.seek(SeekFrom::Start(start + n as u64 * 4096))
                .and_then(|_| to.write_all(piece))
                .map_err(|error| failed(&error))?;
        }
    }
    to.sync_all().map_err(|error| failed(&error))?;
    file.persist(out).map_err(|error| failed(&error.error))?;
    Ok(size as u64)
}

/// Makes the table with one partition; its first byte.
fn partition(file: &File, bytes: u64) -> Result<u64, gpt::GptError> {
    let sectors = (file.metadata()?.len() / SECTOR as u64).saturating_sub(1);
    let mbr = gpt::mbr::ProtectiveMBR::with_lb_size(u32::try_from(sectors).unwrap_or(u32::MAX));
    let mut device = file;
    mbr.overwrite_lba0(&mut device)
        .map_err(std::io::Error::other)?;
    let mut disk = gpt::GptConfig::new()
        .writable(true)
        .logical_block_size(LogicalBlockSize::Lb512)
        .create_from_device(device, None)?;
    let id = disk.add_partition(
        "BMcast",
        bytes,
        gpt::partition_types::EFI,
        0,
        Some(START as u64 / SECTOR as u64),
    )?;
    let start = disk
        .partitions()
        .get(&id)
        .map(|partition| partition.first_lba);
    disk.write()?;
    Ok(start.unwrap_or(START as u64 / SECTOR as u64) * SECTOR as u64)
}

/// A FAT32 file system with the application where firmware looks for it on removable media (UEFI
/// specification 2.10, section 3.5.1.1), and the configuration beside it.
fn volume(efi: &[u8], config: &str) -> std::io::Result<Vec<u8>> {
    let size = (efi.len() + efi.len() / 64 + ROOM).max(LEAST);
    let mut volume = vec![0; size.next_multiple_of(START)];
    let id = u32::from_le_bytes(first(Hash::of(config.as_bytes())));
    let options = FormatVolumeOptions::new()
        .volume_label(*b"BMCAST     ")
        .fat_type(FatType::Fat32)
        .volume_id(id);
    fatfs::format_volume(Cursor::new(&mut volume), options)?;
    {
        let options = FsOptions::new().time_provider(&Epoch);
        let system = FileSystem::new(Cursor::new(&mut volume), options)?;
        let directory = system.root_dir().create_dir("EFI")?.create_dir("BOOT")?;
        for (name, bytes) in [("BOOTX64.EFI", efi), ("bmcast.conf", config.as_bytes())] {
            let mut file = directory.create_file(name)?;
            file.write_all(bytes)?;
            file.flush()?;
        }
        drop(directory);
        system.unmount()?;
    }
    mend_dots(&mut volume);
    Ok(volume)
}

/// The time of files: the same medium has the same bytes, whenever it is made.
#[derive(Debug)]
struct Epoch;

impl fatfs::TimeProvider for Epoch {
    fn get_current_date(&self) -> fatfs::Date {
        fatfs::Date {
            year: 1980,
            month: 1,
            day: 1,
        }
    }

    fn get_current_date_time(&self) -> fatfs::DateTime {
        fatfs::DateTime {
            date: self.get_current_date(),
            time: fatfs::Time {
                hour: 0,
                min: 0,
                sec: 0,
                millis: 0,
            },
        }
    }
}

/// `fatfs` 0.3 gives `.` and `..` long names, and the root's cluster to the `..` of directories in it. In
/// Microsoft's specification (version 1.03, "FAT Directory Structure") these two are the first entries, without
/// long names, and the root is 0 there.
fn mend_dots(volume: &mut [u8]) {
    const ENTRY: usize = 32;
    let word = |at: usize| {
        u32::from_le_bytes([volume[at], volume[at + 1], volume[at + 2], volume[at + 3]])
    };
    let root = word(44);
    let cluster = usize::from(volume[13]) * SECTOR;
    let reserved = usize::from(volume[14]) | usize::from(volume[15]) << 8;
    let tables = usize::from(volume[16]) * usize::try_from(word(36)).unwrap_or(0);
    let data = (reserved + tables) * SECTOR;
    // The directories were made first, and so are in the first clusters.
    for directory in volume[data..].chunks_exact_mut(cluster).take(8) {
        let is = |n: usize, name: &[u8; 11]| directory[n * ENTRY..][..11] == name[..];
        if !is(1, b".          ") || !is(3, b"..         ") {
            continue;
        }
        directory.copy_within(ENTRY..2 * ENTRY, 0);
        directory.copy_within(3 * ENTRY..4 * ENTRY, ENTRY);
        // Free.
        directory[2 * ENTRY] = 0xe5;
        directory[3 * ENTRY] = 0xe5;
        let parent = &mut directory[ENTRY..2 * ENTRY];
        if [parent[26], parent[27], parent[20], parent[21]] == root.to_le_bytes() {
            for at in [20, 21, 26, 27] {
                parent[at] = 0;
            }
        }
    }
}

fn first(hash: Hash) -> [u8; 4] {
    let [a, b, c, d, ..] = hash.0;
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("bmcast.img");
        let efi = vec![0x5a; 3 << 20];
        let size = write(&out, &efi, "server = x\n").unwrap();
        assert_eq!(out.metadata().unwrap().len(), size);
        let disk = gpt::GptConfig::new()
            .only_valid_headers(true)
            .open(&out)
            .unwrap();
        let partitions: Vec<_> = disk.partitions().values().collect();
        let [partition] = partitions[..] else {
            panic!("{partitions:?}");
        };
        assert_eq!(partition.part_type_guid, gpt::partition_types::EFI);
        let start = usize::try_from(partition.first_lba).unwrap() * SECTOR;
        let end = (usize::try_from(partition.last_lba).unwrap() + 1) * SECTOR;
        let bytes = std::fs::read(&out).unwrap();
        let system =
            FileSystem::new(Cursor::new(bytes[start..end].to_vec()), FsOptions::new()).unwrap();
        assert_eq!(system.fat_type(), FatType::Fat32);
        let root = system.root_dir();
        let mut read = Vec::new();
        let mut file = root.open_file("EFI/BOOT/BOOTX64.EFI").unwrap();
        file.read_to_end(&mut read).unwrap();
        assert_eq!(read, efi);
        let mut text = String::new();
        let mut file = root.open_file("EFI/BOOT/bmcast.conf").unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "server = x\n");
        let directory = root.open_dir("EFI/BOOT").unwrap();
        let first: Vec<String> = directory
            .iter()
            .take(2)
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(first, [".", ".."]);
        assert!(root.open_dir("EFI/BOOT/../../EFI/./BOOT").is_ok());
    }

    #[test]
    fn a_directory_is_not_written_over() {
        let directory = tempfile::tempdir().unwrap();
        let error = write(directory.path(), &[], "").unwrap_err();
        assert_eq!(error.code, Code::BadRequest);
    }
}
