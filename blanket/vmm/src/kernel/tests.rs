use std::path::Path;
use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;
use crate::testing::{Synthetic, bzimage, bzimage_raw, bzip2, gzip, lz4_legacy, with_size, zstd};

fn xz(data: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut options = lzma_rust2::XzOptions::with_preset(3);
    // The kernel's build uses the x86 branch filter.
    options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
    let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).expect("options");
    writer.write_all(data).expect("memory");
    with_size(writer.finish().expect("memory"), data)
}

fn lzma(data: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let options = lzma_rust2::LzmaOptions::with_preset(3);
    let mut writer =
        lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, None).expect("options");
    writer.write_all(data).expect("memory");
    with_size(writer.finish().expect("memory"), data)
}

#[test]
fn every_compression_gives_the_same_kernel() {
    let elf = Synthetic::default().elf();
    let plain = Kernel::parse(elf.clone()).expect("plain ELF");
    assert_eq!(plain.compression(), None);
    for (format, payload) in [
        (Some(Compression::Gzip), gzip(&elf)),
        (Some(Compression::Bzip2), bzip2(&elf)),
        (Some(Compression::Lzma), lzma(&elf)),
        (Some(Compression::Xz), xz(&elf)),
        (Some(Compression::Lz4), lz4_legacy(&elf)),
        (Some(Compression::Zstd), zstd(&elf)),
        (None, elf.clone()),
    ] {
        let kernel =
            Kernel::parse(bzimage_raw(&payload)).unwrap_or_else(|e| panic!("{format:?}: {e}"));
        assert_eq!(kernel.compression(), format);
        assert_eq!(kernel.notes(), plain.notes());
        assert_eq!(
            kernel.bytes(&kernel.segments()[0]),
            plain.bytes(&plain.segments()[0])
        );
    }
}

#[test]
fn notes_are_read() {
    let kernel = Synthetic {
        hypercall_page: true,
        ..Synthetic::default()
    }
    .kernel();
    let notes = kernel.notes();
    assert_eq!(notes.entry, 0xffff_ffff_8010_0123);
    assert_eq!(notes.init_p2m, Some(0x80_0000_0000));
    assert_eq!(notes.hypercall_page, Some(0xffff_ffff_8010_1000));
    assert!(notes.mod_start_pfn);
    assert_eq!(notes.guest_os, "linux");
}

#[test]
fn each_failure_says_what_is_wrong() {
    let elf = Synthetic::default().elf();
    let said = |image: Vec<u8>| Kernel::parse(image).expect_err("refused").to_string();
    assert!(said(vec![]).contains("empty"));
    assert!(said(b"#!/bin/sh\n".to_vec()).contains("neither a bzImage"));
    assert!(said(elf[..100].to_vec()).contains("corrupt"));

    let no_pv = Synthetic {
        xen: false,
        ..Synthetic::default()
    }
    .elf();
    let text = said(bzimage(&no_pv));
    assert!(
        text.contains("CONFIG_XEN_PV") && text.contains("PVH"),
        "{text}"
    );

    let needs = Synthetic {
        features: "!auto_translated_physmap",
        ..Synthetic::default()
    };
    assert!(said(needs.elf()).contains("auto_translated_physmap"));

    let mut cut = bzimage(&elf);
    cut.truncate(cut.len() - 500);
    assert!(said(cut).contains("corrupt"));

    let mut flipped = bzimage_raw(&gzip(&elf));
    let middle = flipped.len() - 200;
    flipped[middle] ^= 0x55;
    assert!(said(flipped).contains("corrupt"));

    assert!(said(bzimage_raw(b"\x89LZO\0")).contains("LZO"));
    assert!(said(bzimage_raw(b"nothing known")).contains("unknown format"));

    let mut wrong_machine = elf.clone();
    wrong_machine[18] = 183;
    assert!(said(wrong_machine).contains("not for x86-64"));
    let mut wrong_class = elf;
    wrong_class[4] = 1;
    assert!(said(wrong_class).contains("64-bit"));
}

#[test]
fn a_bomb_is_stopped_at_the_limit() {
    let zeroes = vec![0u8; (1 << 20) + 1];
    for (format, packed) in [
        (Compression::Gzip, gzip(&zeroes)),
        (Compression::Bzip2, bzip2(&zeroes)),
        (Compression::Lzma, lzma(&zeroes)),
        (Compression::Xz, xz(&zeroes)),
        (Compression::Lz4, lz4_legacy(&zeroes)),
        (Compression::Zstd, zstd(&zeroes)),
    ] {
        let fits = decompress::decompress(&packed, format, zeroes.len());
        assert!(fits.is_ok_and(|bytes| bytes == zeroes), "{format:?}");
        let error = decompress::decompress(&packed, format, 1 << 20).expect_err("too large");
        assert!(
            matches!(error, ErrorKind::TooLarge { limit: 1 }),
            "{format:?}: {error}"
        );
    }

    // The LZ4 header's claim alone must not make us allocate.
    let mut claim = lz4_legacy(b"x");
    let end = claim.len();
    claim[end - 4..].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(
        Kernel::parse(bzimage_raw(&claim)),
        Err(ErrorKind::TooLarge { .. })
    ));
}

#[test]
fn files_are_named_in_errors() {
    let missing = Kernel::load(Path::new("/does/not/exist")).expect_err("missing");
    assert!(matches!(missing.kind, ErrorKind::Missing));
    assert!(missing.to_string().contains("/does/not/exist"));
    let directory = Kernel::load(Path::new("/")).expect_err("a directory");
    assert!(matches!(directory.kind, ErrorKind::Read(_)), "{directory}");
}

/// A kernel in every packing; packing takes longer than what is tested.
static IMAGES: LazyLock<[Vec<u8>; 7]> = LazyLock::new(|| {
    let elf = Synthetic::default().elf();
    let packed = |pack: fn(&[u8]) -> Vec<u8>| bzimage_raw(&pack(&elf));
    [
        elf.clone(),
        packed(gzip),
        packed(bzip2),
        packed(lzma),
        packed(xz),
        packed(lz4_legacy),
        packed(zstd),
    ]
});

proptest! {
    #[test]
    fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        let _ = Kernel::parse(bytes.clone());
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.extend_from_slice(&bytes);
        let _ = Kernel::parse(elf);
        for magic in [
            &b"\x1f\x8b"[..], b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"\x5d\0",
            b"\x02\x21\x4c\x18",
        ] {
            let mut payload = magic.to_vec();
            payload.extend_from_slice(&bytes);
            let _ = Kernel::parse(bzimage_raw(&payload));
        }
    }

    #[test]
    fn no_damage_panics(
        at in proptest::collection::vec(
            (prop_oneof![0usize..0x100, 0x4000usize..0x4400, 0usize..0x4400], any::<u8>()),
            1..8,
        ),
        pack in 0..IMAGES.len(),
        cut in 0usize..0x4400,
    ) {
        let mut image = IMAGES[pack].clone();
        for &(position, value) in &at {
            let index = position % image.len();
            image[index] = value;
        }
        let _ = Kernel::parse(image[..cut.min(image.len())].to_vec());
        if let Ok(kernel) = Kernel::parse(image) {
            let config = crate::builder::Config {
                memory: 64 << 20,
                max_memory: 0,
                cmdline: String::new(),
                verbose: false,
                vcpus: 1,
                mergeable: false,
                inject: false,
            };
            let _ = crate::builder::build(&kernel, None, &config);
        }
    }
}
