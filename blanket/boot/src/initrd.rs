//! What is in an initrd: whether it has the driver that a VM needs for its root disk.
//!
//! An initrd is a row of cpio archives, some of them compressed (Linux,
//! `Documentation/driver-api/early-userspace/buffer-format.rst`). Only names are read, in one
//! pass, with a limit on what is unpacked.

use std::io::{self, BufRead, BufReader, Read};

/// Bytes that are unpacked at most, of all archives together.
const MAX_UNPACKED: u64 = 2 << 30;
/// Members of all archives together.
const MAX_MEMBERS: u32 = 200_000;
/// Longest name of a member, bytes.
const MAX_NAME: u64 = 4096;
/// A `modules.builtin` larger than that is none.
const MAX_LIST: u64 = 4 << 20;
/// Memory that an xz stream may ask for, KiB.
const DICTIONARY_LIMIT_KIB: u32 = 128 << 10;
/// Uncompressed size of a block of the legacy LZ4 format.
const LZ4_BLOCK: usize = 8 << 20;

/// Driver of a VM's disks.
pub const BLOCK_DRIVER: &str = "xen-blkfront";

/// What is wrong with an initrd.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InitrdError {
    /// It would not find the root disk.
    #[error(
        "the initrd has no {driver}: the VM would not find its root disk. In the image, where it \
         runs, or in a chroot: echo {driver} >> /etc/initramfs-tools/modules && \
         update-initramfs -u (Debian, Ubuntu); dracut --force --add-drivers {driver} (Fedora, \
         SUSE); MODULES=({underscored}) in /etc/mkinitcpio.conf and mkinitcpio -P (Arch)"
    )]
    NoDriver {
        /// The driver's name.
        driver: String,
        /// The same as a module's name.
        underscored: String,
    },
    /// There is no initrd, so nothing says what the kernel has built in.
    #[error(
        "the boot entry has no initrd: the VM finds its root disk only if {driver} is built into \
         the kernel (CONFIG_XEN_BLKDEV_FRONTEND=y in the image's /boot/config-*)"
    )]
    Missing {
        /// The driver's name.
        driver: String,
    },
    /// It is no initrd, or a damaged one.
    #[error("the initrd cannot be read: {0}")]
    Damaged(String),
}

/// Where a driver was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// As a module in the initrd.
    Module,
    /// In the kernel itself, as the initrd's `modules.builtin` says.
    BuiltIn,
}

/// Looks for `driver` (such as [`BLOCK_DRIVER`]) in `initrd`.
///
/// # Errors
/// It is not there, or the initrd cannot be read to its end; a driver that was found before
/// the damage counts.
pub fn driver(initrd: &[u8], driver: &str) -> Result<Driver, InitrdError> {
    if initrd.is_empty() {
        return Err(InitrdError::Missing {
            driver: driver.to_owned(),
        });
    }
    let mut search = Search {
        wanted: driver.replace('_', "-"),
        found: None,
        members: 0,
        unpacked: 0,
    };
    let result = search.archives(initrd);
    match (search.found, result) {
        (Some(found), _) => Ok(found),
        (None, Ok(())) => Err(InitrdError::NoDriver {
            driver: driver.to_owned(),
            underscored: driver.replace('-', "_"),
        }),
        (None, Err(error)) => Err(InitrdError::Damaged(error.to_string())),
    }
}

struct Search {
    wanted: String,
    found: Option<Driver>,
    members: u32,
    unpacked: u64,
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Search {
    /// Plain archives in front are passed over in place; the first compressed one is the last.
    fn archives(&mut self, mut rest: &[u8]) -> io::Result<()> {
        loop {
            let padding = rest.iter().take_while(|byte| **byte == 0).count();
            rest = &rest[padding..];
            match rest {
                [] => return Ok(()),
                [b'0', b'7', b'0', b'7', b'0', b'1' | b'2', ..] => {
                    self.archive(&mut rest)?;
                }
                [0x1f, 0x8b, ..] => {
                    return self.stream(flate2::bufread::MultiGzDecoder::new(rest));
                }
                [0xfd, b'7', b'z', b'X', b'Z', ..] => {
                    return self.stream(lzma_rust2::XzReader::new_mem_limit(
                        rest,
                        true,
                        DICTIONARY_LIMIT_KIB,
                    ));
                }
                [0x28, 0xb5, 0x2f, 0xfd, ..] => {
                    let decoder = ruzstd::decoding::StreamingDecoder::new(rest)
                        .map_err(|error| damaged(&error.to_string()))?;
                    return self.stream(decoder);
                }
                [0x02, 0x21, 0x4c, 0x18, ..] => {
                    return self.stream(Lz4Legacy {
                        rest: &rest[4..],
                        block: Vec::new(),
                        at: 0,
                    });
                }
                [0x5d, 0x00, ..] => {
                    let reader =
                        lzma_rust2::LzmaReader::new_mem_limit(rest, DICTIONARY_LIMIT_KIB, None)?;
                    return self.stream(reader);
                }
                [b'B', b'Z', b'h', ..] => {
                    return Err(damaged(
                        "it is compressed with bzip2, which is not read here",
                    ));
                }
                [0x89, b'L', b'Z', b'O', ..] => {
                    return Err(damaged("it is compressed with LZO, which is not read here"));
                }
                _ => return Err(damaged("what is in it is no cpio archive")),
            }
            if self.found.is_some() {
                return Ok(());
            }
        }
    }

    /// All archives in one compressed stream.
    fn stream(&mut self, reader: impl Read) -> io::Result<()> {
        let mut reader = BufReader::with_capacity(64 << 10, reader);
        while self.found.is_none() {
            let buffer = reader.fill_buf()?;
            if buffer.is_empty() {
                break;
            }
            let padding = buffer.iter().take_while(|byte| **byte == 0).count();
            if padding > 0 {
                self.charge(padding as u64)?;
                reader.consume(padding);
                continue;
            }
            self.archive(&mut reader)?;
        }
        Ok(())
    }

    fn charge(&mut self, bytes: u64) -> io::Result<()> {
        self.unpacked = self.unpacked.saturating_add(bytes);
        if self.unpacked > MAX_UNPACKED {
            return Err(damaged("it unpacks to more than 2 GiB"));
        }
        Ok(())
    }

    /// One archive in the "new ASCII" format, up to its trailer.
    fn archive(&mut self, reader: &mut impl Read) -> io::Result<()> {
        loop {
            let mut header = [0; 110];
            reader.read_exact(&mut header)?;
            if !header.starts_with(b"070701") && !header.starts_with(b"070702") {
                return Err(damaged("a member of its cpio archive has no header"));
            }
            let field = |index: usize| -> io::Result<u64> {
                let digits = &header[6 + index * 8..14 + index * 8];
                let text = std::str::from_utf8(digits).map_err(io::Error::other)?;
                u64::from_str_radix(text, 16).map_err(|_| damaged("a cpio header has no number"))
            };
            let (size, name_size) = (field(6)?, field(11)?);
            self.members += 1;
            if name_size == 0 || name_size > MAX_NAME || self.members > MAX_MEMBERS {
                return Err(damaged("its cpio archive has impossible names"));
            }
            // Header with name, and content, are padded to 4 bytes.
            let name_padded = (110 + name_size).next_multiple_of(4) - 110;
            let padded = size.next_multiple_of(4);
            self.charge(110 + name_padded + padded)?;
            let mut name = Vec::new();
            take(reader, name_padded, &mut name)?;
            name.truncate(usize::try_from(name_size - 1).unwrap_or(0));
            if name == b"TRAILER!!!" {
                return Ok(());
            }
            let name = String::from_utf8_lossy(&name);
            let file = name.rsplit('/').next().unwrap_or_default();
            if self.is_module(file) {
                self.found = Some(Driver::Module);
                return Ok(());
            }
            if file == "modules.builtin" && size <= MAX_LIST {
                let mut list = Vec::new();
                take(reader, padded, &mut list)?;
                let text = String::from_utf8_lossy(&list);
                let mut names = text.lines().filter_map(|line| line.rsplit('/').next());
                if names.any(|name| self.is_module(name)) {
                    self.found = Some(Driver::BuiltIn);
                    return Ok(());
                }
            } else {
                let skipped = io::copy(&mut reader.take(padded), &mut io::sink())?;
                // The last member's padding may be missing.
                if skipped < size {
                    return Err(damaged("it ends within a file"));
                }
            }
        }
    }

    /// `xen-blkfront.ko`, `xen_blkfront.ko.zst`, ...
    fn is_module(&self, file: &str) -> bool {
        file.split_once(".ko").is_some_and(|(name, rest)| {
            name.replace('_', "-") == self.wanted && (rest.is_empty() || rest.starts_with('.'))
        })
    }
}

fn take(reader: &mut impl Read, count: u64, out: &mut Vec<u8>) -> io::Result<()> {
    reader.take(count).read_to_end(out)?;
    if out.len() as u64 != count {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

/// The format that kernels take: the magic, then blocks of {compressed size u32, bytes}.
struct Lz4Legacy<'a> {
    rest: &'a [u8],
    block: Vec<u8>,
    at: usize,
}

impl Read for Lz4Legacy<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.block.len() {
            let Some((size, tail)) = self.rest.split_first_chunk::<4>() else {
                return Ok(0);
            };
            // Streams may follow each other, each with its magic.
            if *size == [0x02, 0x21, 0x4c, 0x18] {
                self.rest = tail;
                continue;
            }
            let size = u32::from_le_bytes(*size) as usize;
            if size == 0 {
                return Ok(0);
            }
            let data = tail
                .get(..size)
                .ok_or_else(|| damaged("an LZ4 block ends too early"))?;
            self.rest = &tail[size..];
            self.block.resize(LZ4_BLOCK, 0);
            let count = lz4_flex::block::decompress_into(data, &mut self.block)
                .map_err(|error| damaged(&error.to_string()))?;
            self.block.truncate(count);
            self.at = 0;
        }
        let count = buffer.len().min(self.block.len() - self.at);
        buffer[..count].copy_from_slice(&self.block[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use proptest::prelude::*;

    fn member(name: &str, content: &[u8]) -> Vec<u8> {
        let mut out = format!(
            "070701{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}{:08x}",
            1,
            0o100_644,
            0,
            0,
            1,
            0,
            content.len(),
            0,
            0,
            0,
            0,
            name.len() + 1,
            0
        )
        .into_bytes();
        out.extend(name.as_bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend(content);
        out.resize(out.len().next_multiple_of(4), 0);
        out
    }

    fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut out: Vec<u8> = members
            .iter()
            .flat_map(|(name, content)| member(name, content))
            .collect();
        out.extend(member("TRAILER!!!", b""));
        out.resize(out.len().next_multiple_of(512), 0);
        out
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn xz(bytes: &[u8]) -> Vec<u8> {
        let options = lzma_rust2::XzOptions::with_preset(1);
        let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
        writer.write_all(bytes).unwrap();
        writer.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    fn lz4(bytes: &[u8]) -> Vec<u8> {
        let mut out = vec![0x02, 0x21, 0x4c, 0x18];
        for block in bytes.chunks(LZ4_BLOCK) {
            let packed = lz4_flex::block::compress(block);
            out.extend(u32::try_from(packed.len()).unwrap().to_le_bytes());
            out.extend(packed);
        }
        out
    }

    fn system() -> Vec<u8> {
        archive(&[
            ("init", b"#!/bin/sh"),
            ("usr/lib/modules/6.1/kernel/net.ko", &[7; 5001]),
            (
                "usr/lib/modules/6.1/kernel/drivers/block/xen-blkfront.ko.zst",
                b"module",
            ),
        ])
    }

    fn other() -> Vec<u8> {
        archive(&[("kernel/x86/microcode/AuthenticAMD.bin", &[1; 3001])])
    }

    #[test]
    fn every_compression() {
        for packed in [
            system(),
            gzip(&system()),
            xz(&system()),
            zstd(&system()),
            lz4(&system()),
        ] {
            assert_eq!(driver(&packed, BLOCK_DRIVER), Ok(Driver::Module));
            // After the microcode, as distributions put it.
            let whole = [other(), packed].concat();
            assert_eq!(driver(&whole, BLOCK_DRIVER), Ok(Driver::Module));
            assert_eq!(driver(&whole, "xen_blkfront"), Ok(Driver::Module));
        }
        // Several archives in one stream.
        let inner = [other(), system()].concat();
        assert_eq!(driver(&gzip(&inner), BLOCK_DRIVER), Ok(Driver::Module));
    }

    #[test]
    fn built_in() {
        let list = b"kernel/fs/ext4/ext4.ko\nkernel/drivers/block/xen-blkfront.ko\n";
        let whole = archive(&[("lib/modules/6.8/modules.builtin", list)]);
        assert_eq!(driver(&gzip(&whole), BLOCK_DRIVER), Ok(Driver::BuiltIn));
        let whole = archive(&[(
            "lib/modules/6.8/modules.builtin",
            b"kernel/fs/ext4/ext4.ko\n",
        )]);
        assert!(driver(&gzip(&whole), BLOCK_DRIVER).is_err());
    }

    #[test]
    fn what_is_missing_is_said() {
        let error = driver(&gzip(&other()), BLOCK_DRIVER)
            .unwrap_err()
            .to_string();
        assert!(error.contains("no xen-blkfront") && error.contains("update-initramfs -u"));
        let names = archive(&[
            ("drivers/xen-blkback/xen-blkback.ko", b""),
            ("xen-blkfront", b""),
        ]);
        assert!(matches!(
            driver(&names, BLOCK_DRIVER),
            Err(InitrdError::NoDriver { .. })
        ));
        assert!(matches!(
            driver(b"", BLOCK_DRIVER),
            Err(InitrdError::Missing { .. })
        ));
    }

    #[test]
    fn damage_is_said() {
        for bytes in [
            &b"hello"[..],
            &system()[..200],
            &gzip(&system())[..40],
            b"BZh9",
        ] {
            assert!(matches!(
                driver(bytes, BLOCK_DRIVER),
                Err(InitrdError::Damaged(_))
            ));
        }
    }

    #[test]
    fn a_bomb_ends() {
        let mut bomb = member("zeros", &[]);
        // Its content is as long as a header can say, and it is not there.
        bomb[54..62].copy_from_slice(b"ffffffff");
        let zeros = vec![0; 64 << 20];
        let packed = gzip(&[bomb, zeros].concat());
        assert!(matches!(
            driver(&packed, BLOCK_DRIVER),
            Err(InitrdError::Damaged(_))
        ));
    }

    proptest! {
        #[test]
        fn any_bytes_end(start in 0usize..7, bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let magic: [&[u8]; 7] = [
                b"", b"070701", &[0x1f, 0x8b], b"\xfd7zXZ\0", &[0x28, 0xb5, 0x2f, 0xfd],
                &[0x02, 0x21, 0x4c, 0x18], &[0x5d, 0, 0],
            ];
            let _ = driver(&[magic[start], &bytes].concat(), BLOCK_DRIVER);
        }

        #[test]
        fn a_changed_byte_ends(at in 0usize..700, byte in any::<u8>()) {
            let mut whole = system();
            let at = at % whole.len();
            whole[at] = byte;
            let _ = driver(&whole, BLOCK_DRIVER);
        }
    }
}
