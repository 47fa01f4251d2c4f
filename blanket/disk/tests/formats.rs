//! Images that QEMU made, and images that QEMU checks.

mod common;

use std::fs;
use std::path::Path;

use blanket_disk::{
    Backing, Disk, Error, Failure, Format, Operation, Options, create, info, open, resize, snapshot,
};
use common::{SECTOR, contents, pattern, qemu_img, read, simple, write};
use tempfile::TempDir;

const SIZE: usize = 2 * 1024 * 1024 + 17 * SECTOR;

/// A directory with `from.raw`, and its bytes.
fn source() -> (TempDir, Vec<u8>) {
    let directory = tempfile::tempdir().unwrap();
    let bytes = pattern(SIZE, 11);
    fs::write(directory.path().join("from.raw"), &bytes).unwrap();
    (directory, bytes)
}

fn read_only(path: &Path) -> Vec<u8> {
    let image = open(path, &Options::read_only()).unwrap();
    let bytes = contents(&image);
    // The reader of the host's side sees the same.
    let mut again = vec![0; bytes.len()];
    image.reader().read_exact_at(0, &mut again).unwrap();
    assert!(bytes == again);
    bytes
}

/// Converts, reads, and tries to write.
fn converted(format: &str, options: &str, name: &str) {
    let (directory, bytes) = source();
    let mut arguments = vec!["convert", "-f", "raw", "-O", format];
    if !options.is_empty() {
        arguments.extend(["-o", options]);
    }
    arguments.extend(["from.raw", name]);
    qemu_img(directory.path(), &arguments);
    let path = directory.path().join(name);
    let seen = read_only(&path);
    // VHDs have a size that cylinders, heads and sectors make.
    assert!(seen[..SIZE] == bytes, "{format} {options}");
    assert!(seen[SIZE..].iter().all(|&byte| byte == 0));

    let error = open(&path, &Options::default()).unwrap_err();
    assert!(matches!(error, Error::FormatReadOnly { .. }), "{error}");
    assert!(error.to_string().contains("convert"), "{error}");
    let image = open(&path, &Options::read_only()).unwrap();
    let mut queue = image.queue(1).unwrap();
    let result = write(queue.as_mut(), 0, &[1; SECTOR]);
    assert!(matches!(result, Err(Failure::ReadOnly)), "{result:?}");
    simple(queue.as_mut(), Operation::Flush, 0).unwrap();
    drop(queue);
    drop(image);

    // An overlay on it takes writes.
    let overlay = directory.path().join("overlay.qcow2");
    snapshot(&path, None, &overlay).unwrap();
    let image = open(&overlay, &Options::default()).unwrap();
    let mut queue = image.queue(1).unwrap();
    write(queue.as_mut(), 70_144, &[0x5a; 2 * SECTOR]).unwrap();
    let mut expected = seen;
    expected[70_144..][..2 * SECTOR].fill(0x5a);
    assert!(contents(&image) == expected);
    drop(queue);
    drop(image);
    qemu_img(directory.path(), &["check", "overlay.qcow2"]);
    qemu_img(
        directory.path(),
        &["convert", "-O", "raw", "overlay.qcow2", "after.raw"],
    );
    assert!(fs::read(directory.path().join("after.raw")).unwrap() == expected);
}

#[test]
fn vmdk_of_one_sparse_file() {
    converted("vmdk", "subformat=monolithicSparse", "disk.vmdk");
}

#[test]
fn vmdk_compressed_as_in_an_ova() {
    converted("vmdk", "subformat=streamOptimized", "disk.vmdk");
}

#[test]
fn vmdk_of_several_files() {
    converted("vmdk", "subformat=monolithicFlat", "disk.vmdk");
    converted("vmdk", "subformat=twoGbMaxExtentSparse", "disk.vmdk");
    converted("vmdk", "subformat=twoGbMaxExtentFlat", "disk.vmdk");
}

#[test]
fn vhd_dynamic_and_fixed() {
    converted("vpc", "subformat=dynamic", "disk.vhd");
    converted("vpc", "subformat=fixed", "disk.vhd");
    converted("vpc", "subformat=fixed,force_size=on", "disk.vhd");
}

#[test]
fn qcow2_of_every_kind() {
    for (options, compressed) in [
        ("compat=0.10", false),
        ("compat=1.1", true),
        ("cluster_size=512", true),
        ("cluster_size=2M", false),
        ("refcount_bits=1", true),
        ("preallocation=metadata", false),
    ] {
        let (directory, bytes) = source();
        let mut arguments = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
        if compressed {
            arguments.push("-c");
        }
        arguments.extend(["from.raw", "disk.qcow2"]);
        qemu_img(directory.path(), &arguments);
        let path = directory.path().join("disk.qcow2");
        assert!(read_only(&path) == bytes, "{options} {compressed}");
        let image = open(&path, &Options::default()).unwrap();
        let mut queue = image.queue(1).unwrap();
        write(queue.as_mut(), 512 * 1001, &bytes[..100 * SECTOR]).unwrap();
        let discard = Operation::Discard { length: 1 << 20 };
        let result = simple(queue.as_mut(), discard, 1 << 20);
        if options == "compat=0.10" {
            assert_eq!(image.discard_granularity(), 0);
            assert!(matches!(result, Err(Failure::Unsupported)));
        } else {
            result.unwrap();
        }
        drop(queue);
        drop(image);
        qemu_img(directory.path(), &["check", "disk.qcow2"]);
    }
}

#[test]
fn qcow2_that_cannot_be_used_says_why() {
    for (options, why) in [
        ("data_file=data.raw", "another file"),
        ("extended_l2=on", "features"),
        ("compression_type=zstd", "features"),
        (
            "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10",
            "encrypted",
        ),
    ] {
        let (directory, _) = source();
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        if options.starts_with("encrypt") {
            arguments.extend(["--object", "secret,id=key,data=secret"]);
        }
        arguments.extend(["-o", options, "disk.qcow2", "1M"]);
        qemu_img(directory.path(), &arguments);
        let error = open(directory.path().join("disk.qcow2"), &Options::read_only()).unwrap_err();
        assert!(error.to_string().contains(why), "{options}: {error}");
    }
}

#[test]
fn a_chain_of_overlays() {
    let (directory, mut bytes) = source();
    let at = |name: &str| directory.path().join(name);
    let mut below = at("from.raw");
    for layer in 1u8..=4 {
        let overlay = at(&format!("{layer}.qcow2"));
        snapshot(&below, None, &overlay).unwrap();
        let error = snapshot(&below, None, &overlay).unwrap_err();
        assert!(matches!(error, Error::Exists { .. }), "{error}");
        let image = open(&overlay, &Options::default()).unwrap();
        let mut queue = image.queue(1).unwrap();
        let place = usize::from(layer) * 300 * SECTOR;
        bytes[place..][..700 * SECTOR].fill(layer);
        write(
            queue.as_mut(),
            place as u64,
            &bytes[place..][..700 * SECTOR],
        )
        .unwrap();
        below = overlay;
    }
    let image = open(&below, &Options::default()).unwrap();
    assert!(contents(&image) == bytes);
    let chain = info(&below, &Options::default()).unwrap();
    let names: Vec<_> = chain
        .iter()
        .map(|one| one.path.file_name().unwrap())
        .collect();
    assert_eq!(
        names,
        ["4.qcow2", "3.qcow2", "2.qcow2", "1.qcow2", "from.raw"]
    );
    assert!(chain[0].in_use && !chain[1].in_use);
    assert_eq!(chain[0].backing.as_deref(), Some("3.qcow2"));
    assert!(
        chain
            .iter()
            .all(|one| one.size == SIZE as u64 && one.allocated > 0)
    );
    drop(image);
    qemu_img(
        directory.path(),
        &["convert", "-O", "raw", "4.qcow2", "after.raw"],
    );
    assert!(fs::read(at("after.raw")).unwrap() == bytes);
}

#[test]
fn an_overlay_owns_what_was_written_to_it() {
    let (directory, bytes) = source();
    let at = |name: &str| directory.path().join(name);
    let cluster = 1 << 16;
    snapshot(at("from.raw"), None, at("new.qcow2")).unwrap();
    let image = open(at("new.qcow2"), &Options::default()).unwrap();
    let reader = image.reader();
    assert!(reader.has_backing() && !reader.is_own(0, reader.size()).unwrap());
    let mut queue = image.queue(1).unwrap();
    // What is written as it was, and what is discarded, is the overlay's own too.
    write(queue.as_mut(), 5 * cluster, &bytes[..SECTOR]).unwrap();
    let length = cluster;
    simple(queue.as_mut(), Operation::Discard { length }, 9 * cluster).unwrap();
    let own: Vec<u64> = (0..reader.size().div_ceil(cluster))
        .filter(|block| reader.is_own(block * cluster, cluster).unwrap())
        .collect();
    assert_eq!(own, [5, 9]);
    assert!(reader.is_own(0, reader.size()).unwrap());
    assert!(!reader.is_own(reader.size(), 1).unwrap(), "beyond the end");
    // What it stands on is as it was, and read alone.
    let place = 9 * cluster;
    write(queue.as_mut(), place, &[0x5a; 4096]).unwrap();
    let below = reader.below().unwrap();
    assert_eq!((below.size(), below.has_backing()), (SIZE as u64, false));
    let (mut over, mut under) = ([0; 4096], [0; 4096]);
    reader.read_exact_at(place, &mut over).unwrap();
    below.read_exact_at(place, &mut under).unwrap();
    assert!(over == [0x5a; 4096] && under == bytes[9 << 16..][..4096]);
    // An image that stands on nothing owns all.
    let alone = open(at("from.raw"), &Options::read_only())
        .unwrap()
        .reader();
    assert!(!alone.has_backing() && alone.is_own(0, 1).unwrap());
    assert!(alone.below().is_none());
}

#[test]
fn internal_snapshots_are_kept() {
    let (directory, bytes) = source();
    let at = |name: &str| directory.path().join(name);
    qemu_img(
        directory.path(),
        &["convert", "-O", "qcow2", "from.raw", "disk.qcow2"],
    );
    qemu_img(
        directory.path(),
        &["snapshot", "-c", "before", "disk.qcow2"],
    );
    let image = open(at("disk.qcow2"), &Options::default()).unwrap();
    let mut queue = image.queue(1).unwrap();
    write(queue.as_mut(), 0, &[0x77; 2000 * SECTOR]).unwrap();
    assert_eq!(
        info(at("disk.qcow2"), &Options::default()).unwrap()[0].internal_snapshots,
        1
    );
    drop(queue);
    drop(image);
    qemu_img(directory.path(), &["check", "disk.qcow2"]);
    qemu_img(
        directory.path(),
        &["snapshot", "-a", "before", "disk.qcow2"],
    );
    assert!(read_only(&at("disk.qcow2")) == bytes);
}

#[test]
fn made_and_grown() {
    let directory = tempfile::tempdir().unwrap();
    for (format, name) in [(Format::Raw, "disk.raw"), (Format::Qcow2, "disk.qcow2")] {
        let path = directory.path().join(name);
        create(&path, format, Some(64 << 30), None).unwrap();
        let error = create(&path, format, Some(SECTOR as u64), None).unwrap_err();
        assert!(matches!(error, Error::Exists { .. }), "{error}");
        let [one] = &info(&path, &Options::default()).unwrap()[..] else {
            panic!("one image");
        };
        assert_eq!((one.format, one.size), (format, 64 << 30));
        assert!(one.allocated < 1 << 20, "{one:?}");
        resize(&path, &Options::default(), 65 << 30).unwrap();
        assert!(resize(&path, &Options::default(), 1 << 30).is_err());
        let image = open(&path, &Options::default()).unwrap();
        assert_eq!(image.size(), 65 << 30);
        let mut queue = image.queue(1).unwrap();
        write(queue.as_mut(), (65 << 30) - 512, &[9; SECTOR]).unwrap();
        assert_eq!(
            read(queue.as_mut(), (65 << 30) - 512, SECTOR).unwrap(),
            [9; SECTOR]
        );
    }
    qemu_img(directory.path(), &["check", "disk.qcow2"]);
    for (format, size) in [
        (Format::Raw, Some(100)),
        (Format::Qcow2, None),
        (Format::Raw, Some(0)),
    ] {
        let path = directory.path().join("odd");
        let error = create(&path, format, size, None).unwrap_err();
        assert!(matches!(error, Error::Size { .. }), "{error}");
        assert!(!path.exists());
    }
    let path = directory.path().join("new.raw");
    let backing = Backing {
        path: Path::new("disk.raw"),
        format: None,
    };
    assert!(create(&path, Format::Raw, None, Some(backing)).is_err());
    assert!(create(&path, Format::Vhd, Some(512), None).is_err());
    assert!(!path.exists());
}
