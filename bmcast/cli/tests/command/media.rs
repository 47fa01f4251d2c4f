//! `bmcast manifest` and `bmcast image`.

use std::io::{Cursor, Read as _};

use crate::command::{Serve, bmcast, content, text};
use bmcast_image::{BootConfig, Disk, Manifest, Network};

/// The head of a PE32+ application for AMD64, and something behind it.
fn application() -> Vec<u8> {
    let mut bytes = vec![0x11; 5000];
    bytes[..2].copy_from_slice(b"MZ");
    bytes[0x3c..0x40].copy_from_slice(&0x80u32.to_le_bytes());
    bytes[0x80..0x86].copy_from_slice(b"PE\0\0\x64\x86");
    bytes
}

fn config(medium: &std::path::Path) -> BootConfig {
    let disk = gpt::GptConfig::new().open(medium).expect("a table");
    let partition = disk.partitions().values().next().expect("a partition");
    let sector = |lba: u64| usize::try_from(lba * 512).expect("small");
    let bytes = std::fs::read(medium).expect("read");
    let volume = bytes[sector(partition.first_lba)..sector(partition.last_lba + 1)].to_vec();
    let system = fatfs::FileSystem::new(Cursor::new(volume), fatfs::FsOptions::new()).expect("FAT");
    let mut text = Vec::new();
    let mut file = system
        .root_dir()
        .open_file("efi/boot/BMCAST.CONF")
        .expect("it is there");
    file.read_to_end(&mut text).expect("read");
    BootConfig::parse(&text).expect("a configuration")
}

#[test]
fn a_medium_pins_what_the_server_has() {
    let directory = tempfile::tempdir().expect("a directory");
    let at = |name: &str| directory.path().join(name).display().to_string();
    std::fs::write(at("a.raw"), content(300 * 512)).expect("written");
    std::fs::write(at("bmcast.efi"), application()).expect("written");
    let server = Serve::start(&directory.path().join("a.raw"), &[]);
    let url = server.url();
    let base = [
        "image",
        "--server",
        &url,
        "--efi",
        &at("bmcast.efi"),
        "--out",
        &at("a.img"),
    ];
    let made = bmcast(&base);
    assert!(made.status.success(), "{}", text(&made.stderr));
    assert!(text(&made.stdout).contains(&server.id));
    let found = config(&directory.path().join("a.img"));
    assert_eq!(found.manifest.to_string(), server.id);
    assert_eq!(found.network, Network::Dhcp);

    let id = "11".repeat(32);
    let both = format!("{url},http://10.0.0.1/images");
    let more = [
        "image",
        "--server",
        &both,
        "--manifest-id",
        &id,
        "--efi",
        &at("bmcast.efi"),
        "--out",
        &at("a.img"),
        "--address",
        "10.0.2.15/24",
        "--gateway",
        "10.0.2.2",
        "--disk",
        "WD 1",
        "--rate",
        "50M",
        "--machine",
        "m1",
        "--key",
        &at("key"),
        "--json",
    ];
    let made = bmcast(&more);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let json: serde_json::Value = serde_json::from_slice(&made.stdout).expect("JSON");
    assert_eq!(json["manifest"], *id);
    let found = config(&directory.path().join("a.img"));
    assert_eq!(found.servers[1].path, "/images");
    assert_eq!(
        (found.disk, found.rate),
        (Disk::Serial("WD 1".into()), Some(50 << 20))
    );

    let key = std::fs::read_to_string(at("key")).expect("it was made");
    assert_eq!(found.key.map(|key| format!("{key}\n")).as_ref(), Some(&key));
    assert!(bmcast(&more).status.success());
    assert_eq!(
        std::fs::read_to_string(at("key")).expect("it is there"),
        key
    );
    std::fs::write(at("key"), "short").expect("written");
    assert_eq!(bmcast(&more).status.code(), Some(2));

    std::fs::write(at("text"), "no application").expect("written");
    let wrong = bmcast(&[
        "image",
        "--server",
        &url,
        "--efi",
        &at("text"),
        "--out",
        &at("b.img"),
    ]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(text(&wrong.stderr).contains("no UEFI application"));
    assert!(!directory.path().join("b.img").exists());
    drop(server);
    let gone = bmcast(&base);
    assert_eq!(gone.status.code(), Some(5));
    assert!(text(&gone.stderr).contains("--manifest-id"));
}

#[test]
fn a_manifest_for_another_server() {
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("a.raw");
    std::fs::write(&image, content(300 * 512)).expect("written");
    let image = image.display().to_string();
    let made = bmcast(&["manifest", &image, "--chunk", "32K"]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    let manifest = std::fs::read(format!("{image}.manifest")).expect("it is there");
    let manifest = Manifest::parse(manifest).expect("a manifest");
    assert_eq!(text(&made.stdout).trim_end(), manifest.id().to_string());
    let out = format!("{image}.other");
    let json = bmcast(&["manifest", &image, "--out", &out, "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!(
        (&json["chunks"], &json["chunks_of_zeros"]),
        (&3.into(), &1.into())
    );
}
