//! A snapshot in one file: a tar archive, compressed by zstd. First of all `supercloud.json`, which
//! is the [`Snapshot`] and the version of the file; then each file that it consists of, as
//! `images/HASH` (BLAKE3). Nothing else is in it.

use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use serde::{Deserialize, Serialize};
use supercloud_api::{Code, Error, Image, Snapshot};

use crate::images::{Part, is_hash};

/// The version of the file. Version 1 had no snapshots of VMs that did not run, and is read as well.
const VERSION: u32 = 2;
/// Its first entry.
const HEAD: &str = "supercloud.json";
/// Most bytes of that.
const MOST: u64 = 1 << 20;
/// Most files of a snapshot.
const FILES: usize = 64;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    version: u32,
    snapshot: Snapshot,
}

fn io(path: &Path) -> impl Fn(std::io::Error) -> Error + '_ {
    move |error| Error::failed(format!("{}: {error}", path.display()))
}

/// Writes a snapshot whose files are in `images`.
///
/// # Errors
/// There is a file already, or the disk.
pub(crate) fn write(path: &Path, snapshot: &Snapshot, images: &Path) -> Result<(), Error> {
    if fs::symlink_metadata(path).is_ok() {
        return Err(Error::new(
            Code::Conflict,
            format!("{} is there already", path.display()),
            "give the name of a new file",
        ));
    }
    let mut name = path.as_os_str().to_owned();
    name.push(".part");
    let part = Path::new(&name);
    // All of the guest's secrets are in it.
    let file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(part)
        .map_err(io(part))?;
    let written = fill(file, snapshot, images)
        .and_then(|()| fs::rename(part, path))
        .map_err(io(path));
    if written.is_err() {
        let _ = fs::remove_file(part);
    }
    written
}

fn fill(file: File, snapshot: &Snapshot, images: &Path) -> std::io::Result<()> {
    let mut packed = zstd::stream::write::Encoder::new(BufWriter::new(file), 0)?;
    packed.include_checksum(true)?;
    let mut archive = tar::Builder::new(packed);
    let mut add = |name: &str, length: u64, from: &mut dyn Read| {
        let mut header = tar::Header::new_gnu();
        header.set_size(length);
        header.set_mode(0o600);
        archive.append_data(&mut header, name, from)
    };
    let head = serde_json::to_vec_pretty(&Head {
        version: VERSION,
        snapshot: snapshot.clone(),
    })?;
    add(HEAD, head.len() as u64, &mut &head[..])?;
    for image in snapshot.files() {
        let file = File::open(images.join(&image.hash))?;
        let length = file.metadata()?.len();
        add(
            &format!("images/{}", image.hash),
            length,
            &mut BufReader::new(file),
        )?;
    }
    let packed = archive.into_inner()?;
    let mut file = packed.finish()?;
    file.flush()?;
    file.get_ref().sync_all()
}

/// Reads a snapshot, and puts its files into `images`, those that are not there already.
///
/// # Errors
/// It is none, or damaged; the disk.
pub(crate) fn read(path: &Path, images: &Path) -> Result<Snapshot, Error> {
    let bad = |what: &str| {
        Error::new(
            Code::BadRequest,
            format!("{}: {what}", path.display()),
            "give a file that `supercloud vm export` wrote",
        )
    };
    let broken = |error: std::io::Error| bad(&error.to_string());
    let file = File::open(path).map_err(broken)?;
    let packed = zstd::stream::read::Decoder::new(file).map_err(broken)?;
    let mut archive = tar::Archive::new(packed);
    let mut entries = archive.entries().map_err(broken)?;
    let snapshot = {
        let first = entries.next().ok_or_else(|| bad("is empty"))?;
        let first = first.map_err(|_| bad("is no snapshot"))?;
        if first.path().map_err(broken)? != Path::new(HEAD) || first.size() > MOST {
            return Err(bad("is no snapshot"));
        }
        let head: Head = serde_json::from_reader(first.take(MOST))
            .map_err(|error| bad(&format!("{HEAD}: {error}")))?;
        if !(1..=VERSION).contains(&head.version) {
            return Err(bad(&format!(
                "has version {}, and this program reads 1 to {VERSION}",
                head.version
            )));
        }
        head.snapshot
    };
    let mut missing: Vec<&Image> = snapshot.files().collect();
    if missing.len() > FILES || !missing.iter().all(|image| is_hash(&image.hash)) {
        return Err(bad("names files that cannot be"));
    }
    let mut parts = Vec::new();
    for entry in entries {
        let mut entry = entry.map_err(broken)?;
        let name = entry.path().map_err(broken)?.display().to_string();
        let hash = name.strip_prefix("images/").unwrap_or_default();
        let at = missing.iter().position(|image| image.hash == hash);
        let image = at.map(|at| missing.swap_remove(at));
        let image = image.ok_or_else(|| bad(&format!("has {name}, which is not its own")))?;
        if entry.size() != image.bytes {
            return Err(bad(&format!("{name} has another length")));
        }
        let mut part = Part::new(images)?;
        part.fill(&mut entry)?;
        if part.hash() != hash {
            return Err(bad(&format!("{name} is damaged")));
        }
        parts.push(part);
    }
    if let Some(image) = missing.first() {
        return Err(bad(&format!("lacks images/{}", image.hash)));
    }
    // The sum over everything is at its end.
    let rest = std::io::copy(&mut archive.into_inner().take(MOST), &mut std::io::sink());
    if rest.map_err(broken)? == MOST {
        return Err(bad("has more behind its end"));
    }
    for part in parts {
        if !images.join(part.hash()).exists() {
            part.name(images)?;
        }
    }
    Ok(snapshot)
}

#[cfg(test)]
mod tests {
    use supercloud_api::{ImageFormat, SnapshotKind, VmSpec};

    use super::*;

    fn image(directory: &Path, bytes: &[u8]) -> Image {
        let hash = blake3::hash(bytes).to_hex().to_string();
        fs::write(directory.join(&hash), bytes).expect("written");
        Image {
            hash,
            names: vec!["a name".into()],
            format: ImageFormat::File,
            bytes: bytes.len() as u64,
            size: bytes.len() as u64,
        }
    }

    fn snapshot(directory: &Path) -> Snapshot {
        Snapshot {
            name: "one".into(),
            node: "a".into(),
            kind: SnapshotKind::Stopped,
            vm: "web".into(),
            uuid: "u".into(),
            spec: VmSpec::default(),
            kernel: None,
            initrd: None,
            seed: None,
            disks: Vec::new(),
            ports: Vec::new(),
            saved: image(directory, &[7; 100_000]),
            images: vec![image(directory, b"a base")],
            taken_ms: 1,
            stood_ms: 2,
        }
    }

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let here = tempfile::tempdir().expect("a directory");
        let there = tempfile::tempdir().expect("a directory");
        let wanted = snapshot(here.path());
        let file = here.path().join("one.vm");
        write(&file, &wanted, here.path()).expect("written");
        assert_eq!(read(&file, there.path()).expect("read"), wanted);
        for image in wanted.files() {
            let bytes = fs::read(there.path().join(&image.hash)).expect("there");
            assert_eq!(blake3::hash(&bytes).to_hex().as_str(), image.hash);
        }
        let again = write(&file, &wanted, here.path()).expect_err("there is one");
        assert_eq!(again.code, Code::Conflict);

        // Each flipped byte, and each end that comes too early, leaves nothing.
        let whole = fs::read(&file).expect("there");
        let empty = tempfile::tempdir().expect("a directory");
        let wrong = here.path().join("wrong");
        for at in (0..whole.len()).step_by(7) {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            fs::write(&wrong, &bytes).expect("written");
            // Some bits say nothing of what is in it.
            if let Ok(same) = read(&wrong, empty.path()) {
                assert_eq!(same, wanted, "byte {at}");
                for image in wanted.files() {
                    fs::remove_file(empty.path().join(&image.hash)).expect("there");
                }
            }
            fs::write(&wrong, &whole[..at]).expect("written");
            assert!(read(&wrong, empty.path()).is_err(), "{at} bytes");
            assert_eq!(
                fs::read_dir(empty.path()).expect("there").count(),
                0,
                "{at}"
            );
        }
    }

    #[test]
    fn versions_that_are_known() {
        let here = tempfile::tempdir().expect("a directory");
        let there = tempfile::tempdir().expect("a directory");
        let wanted = snapshot(here.path());
        let written = |version: u32, kind: bool| {
            let mut head = serde_json::json!({ "version": version, "snapshot": wanted });
            if !kind {
                let snapshot = head["snapshot"].as_object_mut().expect("an object");
                snapshot.remove("kind").expect("there");
            }
            let packed = zstd::stream::write::Encoder::new(Vec::new(), 0).expect("memory");
            let mut archive = tar::Builder::new(packed);
            let mut add = |name: &str, bytes: &[u8]| {
                let mut header = tar::Header::new_gnu();
                header.set_size(bytes.len() as u64);
                let added = archive.append_data(&mut header, name, bytes);
                added.expect("memory");
            };
            add(HEAD, &serde_json::to_vec(&head).expect("JSON"));
            for image in wanted.files() {
                let bytes = fs::read(here.path().join(&image.hash)).expect("there");
                add(&format!("images/{}", image.hash), &bytes);
            }
            let bytes = archive.into_inner().expect("memory").finish();
            let file = here.path().join("versions");
            fs::write(&file, bytes.expect("memory")).expect("written");
            read(&file, there.path())
        };
        // All were of VMs that ran.
        let first = written(1, false).expect("read");
        assert_eq!(first.kind, SnapshotKind::Running);
        assert_eq!(written(2, true).expect("read"), wanted);
        for version in [0, 3] {
            let error = written(version, true).expect_err("another one");
            assert!(error.message.contains("and this program reads"), "{error}");
        }
    }

    #[test]
    fn strange_entries_are_refused() {
        let here = tempfile::tempdir().expect("a directory");
        let wanted = snapshot(here.path());
        let archive = |entries: &[(&str, &[u8])]| {
            let packed = zstd::stream::write::Encoder::new(Vec::new(), 0).expect("memory");
            let mut archive = tar::Builder::new(packed);
            let head = serde_json::to_vec(&Head {
                version: VERSION,
                snapshot: wanted.clone(),
            });
            let head = head.expect("JSON");
            for (name, bytes) in std::iter::once((HEAD, &head[..])).chain(entries.iter().copied()) {
                let mut header = tar::Header::new_gnu();
                header.set_size(bytes.len() as u64);
                // As a program that is not careful would.
                header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
                header.set_cksum();
                archive.append(&header, bytes).expect("memory");
            }
            let bytes = archive.into_inner().expect("memory").finish();
            let file = here.path().join("strange");
            fs::write(&file, bytes.expect("memory")).expect("written");
            file
        };
        let to = tempfile::tempdir().expect("a directory");
        let saved = format!("images/{}", wanted.saved.hash);
        let base = format!("images/{}", wanted.images[0].hash);
        for entries in [
            &[("../../etc/passwd", &b"x"[..])][..],
            &[("images/../x", b"x")],
            &[(&saved, &[7; 100_000]), (&base, b"another")],
            &[(&saved, &[7; 100_000])],
            &[(&base, b"a base"), (&base, b"a base")],
            &[],
        ] {
            let file = archive(entries);
            assert!(read(&file, to.path()).is_err(), "{entries:?}");
            assert_eq!(fs::read_dir(to.path()).expect("there").count(), 0);
        }
        let file = archive(&[(&base, b"a base"), (&saved, &[7; 100_000])]);
        assert!(read(&file, to.path()).is_ok(), "in any order");
    }
}
