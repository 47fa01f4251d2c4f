//! What an image may not do to its host, and two users not to an image.

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use blanket_disk::{Backing, Disk, Error, Format, Options, create, info, open, snapshot};
use common::{SECTOR, contents, qemu_img, write};

fn given(format: Format) -> Options {
    Options {
        format: Some(format),
        ..Options::default()
    }
}

#[test]
fn a_guest_that_writes_a_header_into_its_raw_disk_gains_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    create(at("secret.raw"), Format::Raw, Some(1 << 20), None).unwrap();
    let backing = Backing {
        path: &at("secret.raw"),
        format: Some(Format::Raw),
    };
    create(at("evil.qcow2"), Format::Qcow2, None, Some(backing)).unwrap();
    let evil = fs::read(at("evil.qcow2")).unwrap();
    for name in ["disk.raw", "disk.img", "disk"] {
        create(at(name), Format::Raw, Some(1 << 20), None).unwrap();
        let image = open(at(name), &given(Format::Raw)).unwrap();
        let mut queue = image.queue(1).unwrap();
        let end = evil.len().next_multiple_of(SECTOR);
        let mut bytes = evil.clone();
        bytes.resize(end, 0);
        write(queue.as_mut(), 0, &bytes).unwrap();
        drop(queue);
        drop(image);
        let error = open(at(name), &Options::default()).unwrap_err();
        assert!(
            matches!(
                error,
                Error::FormatDiffers { .. } | Error::FormatUnknown { .. }
            ),
            "{error}"
        );
        let text = error.to_string();
        assert!(text.contains("format=") && text.contains("qcow2"), "{text}");
        assert!(info(at(name), &Options::default()).is_err());
        // As what it is, it opens.
        let image = open(at(name), &given(Format::Raw)).unwrap();
        assert_eq!(contents(&image)[..4], *b"QFI\xfb");
    }
}

#[test]
fn an_image_stands_only_on_its_neighbours() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::create_dir(at("images")).unwrap();
    fs::create_dir(at("images/base")).unwrap();
    for base in ["secret.raw", "images/near.raw", "images/base/below.raw"] {
        fs::write(at(base), [b's'; 1 << 16]).unwrap();
    }
    symlink("../secret.raw", at("images/link.raw")).unwrap();
    let overlay = at("images/disk.qcow2");
    let image_on = |name: &str| {
        let _ = fs::remove_file(&overlay);
        let images = at("images");
        qemu_img(
            &images,
            &[
                "create",
                "-q",
                "-u",
                "-f",
                "qcow2",
                "-F",
                "raw",
                "-b",
                name,
                "disk.qcow2",
                "64K",
            ],
        );
    };
    for name in [
        "near.raw",
        "base/below.raw",
        "base/../near.raw",
        at("images/near.raw").to_str().unwrap(),
    ] {
        image_on(name);
        let image = open(&overlay, &Options::default()).unwrap();
        assert!(contents(&image).iter().all(|&byte| byte == b's'));
    }
    let secret = at("secret.raw");
    for name in [
        "../secret.raw",
        "link.raw",
        "base/../../secret.raw",
        secret.to_str().unwrap(),
        "/etc/shadow",
    ] {
        image_on(name);
        let error = open(&overlay, &Options::default()).unwrap_err();
        assert!(matches!(error, Error::BackingOutside { .. }), "{error}");
        assert!(error.to_string().contains("backing="), "{error}");
        assert!(info(&overlay, &Options::default()).is_err());
        if name != "/etc/shadow" {
            for allowed in [&secret, &directory.path().to_path_buf()] {
                let options = Options {
                    backing: vec![allowed.clone()],
                    ..Options::default()
                };
                open(&overlay, &options).unwrap();
            }
        }
    }
    for name in ["json:{}", "nbd://localhost/", "nothing.raw"] {
        image_on(name);
        let error = open(&overlay, &Options::default()).unwrap_err();
        assert!(matches!(error, Error::BackingMissing { .. }), "{error}");
    }
    // Extents of VMDKs are names as well.
    fs::write(
        at("images/disk.vmdk"),
        "# Disk DescriptorFile\nversion=1\nRW 128 FLAT \"../secret.raw\" 0\n",
    )
    .unwrap();
    let error = open(at("images/disk.vmdk"), &Options::read_only()).unwrap_err();
    assert!(matches!(error, Error::BackingOutside { .. }), "{error}");
}

#[test]
fn a_circle_of_images_ends() {
    let directory = tempfile::tempdir().unwrap();
    for (name, backing) in [("a.qcow2", "b.qcow2"), ("b.qcow2", "a.qcow2")] {
        qemu_img(
            directory.path(),
            &[
                "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing, name, "1M",
            ],
        );
    }
    for name in ["a.qcow2", "b.qcow2"] {
        for options in [
            Options::default(),
            Options {
                lock: false,
                ..Options::default()
            },
        ] {
            let error = open(directory.path().join(name), &options).unwrap_err();
            assert!(matches!(error, Error::TooDeep { .. }), "{error}");
        }
        let error = info(directory.path().join(name), &Options::default()).unwrap_err();
        assert!(matches!(error, Error::TooDeep { .. }), "{error}");
    }
}

#[test]
fn what_is_no_image_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe.raw");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &pipe,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    for path in [pipe.as_path(), Path::new("/dev/null")] {
        let options = Options {
            format: Some(Format::Raw),
            ..Options::read_only()
        };
        let error = open(path, &options).unwrap_err();
        assert!(matches!(error, Error::Kind { .. }), "{error}");
    }
    let missing = open(directory.path().join("no.raw"), &Options::default()).unwrap_err();
    assert!(missing.to_string().contains("no.raw"), "{missing}");
    for length in [0usize, 100, 513] {
        let path = directory.path().join("odd.raw");
        fs::write(&path, vec![0; length]).unwrap();
        let error = open(&path, &Options::default()).unwrap_err();
        assert!(matches!(error, Error::Content { .. }), "{error}");
    }
}

#[test]
fn a_writer_is_alone() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    create(at("base.qcow2"), Format::Qcow2, Some(1 << 20), None).unwrap();
    let backing = || {
        Backing {
            path: &at("base.qcow2"),
            format: None,
        }
        .path
        .to_path_buf()
    };
    snapshot(backing(), None, at("one.qcow2")).unwrap();
    snapshot(backing(), None, at("two.qcow2")).unwrap();
    // Two overlays share what they stand on.
    let one = open(at("one.qcow2"), &Options::default()).unwrap();
    let two = open(at("two.qcow2"), &Options::default()).unwrap();
    let error = open(at("one.qcow2"), &Options::read_only()).unwrap_err();
    assert!(matches!(error, Error::Locked { .. }), "{error}");
    assert!(error.to_string().contains("one.qcow2"), "{error}");
    let error = open(at("base.qcow2"), &Options::default()).unwrap_err();
    assert!(matches!(error, Error::Locked { .. }), "{error}");
    assert!(snapshot(at("one.qcow2"), None, at("three.qcow2")).is_err());
    assert!(!at("three.qcow2").exists());
    // QEMU respects it, and says so.
    let output = std::process::Command::new("qemu-img")
        .args(["resize", "one.qcow2", "+1M"])
        .current_dir(directory.path())
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("lock"));
    // A queue keeps the image, and so its lock.
    let queue = one.queue(1).unwrap();
    drop(one);
    assert!(open(at("one.qcow2"), &Options::default()).is_err());
    drop(queue);
    drop(two);
    open(at("one.qcow2"), &Options::default()).unwrap();
    open(at("base.qcow2"), &Options::default()).unwrap();
}
