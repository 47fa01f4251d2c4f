//! Hostile images, for fuzzing and for tests: arbitrary bytes, and sound images of which some
//! bytes were changed.

use std::fs;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use tempfile::TempDir;

use crate::{DataPath, Disk as _, Format, Options, info, open};

/// Most bytes that are read at one place.
const READ: u64 = 64 << 10;

/// Opens an image of which an attacker chose the bytes, and reads some of it.
///
/// The first byte chooses the format, and whether the others are the image, or changes of a
/// sound one: two bytes of place and one of value each.
pub fn image(data: &[u8]) {
    let Some((&choice, rest)) = data.split_first() else {
        return;
    };
    let format = Format::ALL[usize::from(choice) % Format::ALL.len()];
    let bytes = if choice & 0x80 == 0 {
        rest.to_vec()
    } else {
        let samples = samples(format);
        let mut bytes = samples[usize::from(choice >> 4 & 7) % samples.len()].clone();
        for change in rest.chunks_exact(3) {
            let place = usize::from(u16::from_le_bytes([change[0], change[1]]));
            let length = bytes.len().max(1);
            if let Some(byte) = bytes.get_mut(place % length) {
                *byte = change[2];
            }
        }
        bytes
    };
    look(format, &bytes);
}

/// Reads the image as a guest and its host would; what is said of it does not matter.
fn look(format: Format, bytes: &[u8]) -> Option<Vec<u8>> {
    static DIRECTORY: OnceLock<Mutex<TempDir>> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a directory for the images");
        fs::write(directory.path().join("base.raw"), [b'b'; 8192]).expect("the base image");
        Mutex::new(directory)
    });
    let directory = directory.lock().unwrap_or_else(PoisonError::into_inner);
    let path = directory.path().join("disk");
    fs::write(&path, bytes).expect("the image");
    read(&path, format)
}

fn read(path: &Path, format: Format) -> Option<Vec<u8>> {
    let options = Options {
        format: Some(format),
        data_path: DataPath::Threads,
        ..Options::read_only()
    };
    // Nothing is expected of it but an end.
    let _ = info(path, &options);
    let image = open(path, &options).ok()?;
    let (size, reader) = (image.size(), image.reader());
    let length = usize::try_from(size.min(READ)).ok()?;
    let mut first = vec![0; length];
    let result = reader.read_exact_at(0, &mut first);
    for offset in [size / 3 / 512 * 512, size - length as u64] {
        let mut bytes = vec![0; length.min(usize::try_from(size - offset).ok()?)];
        let _ = reader.read_exact_at(offset, &mut bytes);
    }
    result.is_ok().then_some(first)
}

/// Bytes that are written at places; what lies between is zero.
fn image_of(parts: &[(usize, &[u8])], length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    for (place, part) in parts {
        bytes[*place..][..part.len()].copy_from_slice(part);
    }
    bytes
}

/// Sound and small images.
fn samples(format: Format) -> Vec<Vec<u8>> {
    match format {
        Format::Raw => vec![vec![b'r'; 4096]],
        Format::Qcow2 => vec![qcow2()],
        Format::Vmdk => vec![vmdk(false), vmdk(true), DESCRIPTOR.into()],
        Format::Vhd => vec![vhd(2), vhd(3)],
    }
}

const DESCRIPTOR: &[u8] = b"# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\n\
    RW 4 ZERO\nRW 8 FLAT \"base.raw\" 8\nRW 1 FLAT \"base.raw\" 0\n";

/// Clusters of 512 bytes: data, packed data, zeroes, and the base.
fn qcow2() -> Vec<u8> {
    let packed = miniz_oxide::deflate::compress_to_vec(&[b'p'; 512], 6);
    let flag = |bit: u32, offset: u64| (1u64 << bit | offset).to_be_bytes();
    image_of(
        &[
            (0, b"QFI\xfb\0\0\0\x03"),
            (8, &0x180u64.to_be_bytes()),
            (16, &8u32.to_be_bytes()),
            (20, &9u32.to_be_bytes()),
            (24, &32768u64.to_be_bytes()),
            (36, &1u32.to_be_bytes()),
            (40, &(3 * 512u64).to_be_bytes()),
            (48, &512u64.to_be_bytes()),
            (56, &1u32.to_be_bytes()),
            (96, &4u32.to_be_bytes()),
            (100, &104u32.to_be_bytes()),
            (104, &0xe279_2acau32.to_be_bytes()),
            (108, &3u32.to_be_bytes()),
            (112, b"raw"),
            (0x180, b"base.raw"),
            (512, &1024u64.to_be_bytes()),
            (1024, &[0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1]),
            (3 * 512, &flag(63, 4 * 512)),
            (4 * 512, &flag(63, 5 * 512)),
            (4 * 512 + 8, &flag(62, 6 * 512)),
            (4 * 512 + 16, &1u64.to_be_bytes()),
            (5 * 512, &[b'd'; 512]),
            (6 * 512, &packed),
        ],
        7 * 512,
    )
}

/// One grain of 4 KiB, and one that is not there.
fn vmdk(compressed: bool) -> Vec<u8> {
    let packed = miniz_oxide::deflate::compress_to_vec_zlib(&[b'd'; 4096], 6);
    let mut grain = 0u64.to_le_bytes().to_vec();
    grain.extend(
        u32::try_from(packed.len())
            .unwrap_or_default()
            .to_le_bytes(),
    );
    grain.extend(packed);
    if !compressed {
        grain = vec![b'd'; 4096];
    }
    let flags: u32 = if compressed { 3 | 3 << 16 } else { 3 };
    image_of(
        &[
            (0, b"KDMV\x01\0\0\0"),
            (8, &flags.to_le_bytes()),
            (12, &16u64.to_le_bytes()),
            (20, &8u64.to_le_bytes()),
            (44, &512u32.to_le_bytes()),
            (56, &1u64.to_le_bytes()),
            (77, &[u8::from(compressed), 0]),
            (512, &2u32.to_le_bytes()),
            (1024, &6u32.to_le_bytes()),
            (3072, &grain),
        ],
        3072 + 4096,
    )
}

/// A fixed (2) or dynamic (3) disk of 8 KiB.
fn vhd(kind: u32) -> Vec<u8> {
    let footer = image_of(
        &[
            (0, b"conectix"),
            (16, &512u64.to_be_bytes()),
            (48, &8192u64.to_be_bytes()),
            (60, &kind.to_be_bytes()),
        ],
        512,
    );
    if kind == 2 {
        return image_of(&[(0, &[b'd'; 4096]), (8192, &footer)], 8192 + 512);
    }
    image_of(
        &[
            (0, &footer),
            (512, b"cxsparse"),
            (528, &1536u64.to_be_bytes()),
            (540, &2u32.to_be_bytes()),
            (544, &4096u32.to_be_bytes()),
            (1536, &4u32.to_be_bytes()),
            (1540, &u32::MAX.to_be_bytes()),
            (2048 + 512, &[b'd'; 4096]),
            (2048 + 512 + 4096, &footer),
        ],
        2048 + 512 + 4096 + 512,
    )
}

#[cfg(test)]
mod tests {
    use std::ptr::NonNull;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    use proptest::prelude::*;

    use super::*;
    use crate::{Buffer, Operation, Request};

    #[test]
    fn the_samples_are_sound() {
        let of = |format| {
            let all = samples(format).into_iter();
            all.map(move |sample| look(format, &sample).unwrap())
        };
        for seen in of(Format::Qcow2) {
            assert_eq!(seen[..512], [b'd'; 512]);
            assert_eq!(seen[512..1024], [b'p'; 512]);
            assert_eq!(seen[1024..1536], [0; 512]);
            assert_eq!(seen[1536..8192], [b'b'; 8192 - 1536]);
            assert_eq!(seen[8192..], [0; 32768 - 8192]);
        }
        for seen in of(Format::Vmdk).take(2).chain(of(Format::Vhd)) {
            assert_eq!(seen[..4096], [b'd'; 4096]);
            assert_eq!(seen[4096..], [0; 4096]);
        }
        let seen = of(Format::Vmdk).nth(2).unwrap();
        assert_eq!(seen[..2048], [0; 2048]);
        assert_eq!(seen[2048..], [b'b'; 4608]);
    }

    /// Writes, discards and grows an image whose tables may lie, as a guest would.
    fn use_up(bytes: &[u8]) {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("base.raw"), [b'b'; 8192]).unwrap();
        let path = directory.path().join("disk");
        fs::write(&path, bytes).unwrap();
        let options = Options {
            format: Some(Format::Qcow2),
            ..Options::default()
        };
        let Ok(image) = open(&path, &options) else {
            return;
        };
        let mut queue = image.queue(1).unwrap();
        let mut done = Vec::new();
        let operations = [
            Operation::Write,
            Operation::Flush,
            Operation::Discard { length: 2048 },
            Operation::Write,
            Operation::Read,
            Operation::Flush,
        ];
        for (token, operation) in operations.into_iter().enumerate() {
            let moves = matches!(operation, Operation::Read | Operation::Write);
            let memory = Arc::new(
                (0..if moves { 512 } else { 0 })
                    .map(|_| AtomicU64::new(7))
                    .collect::<Vec<_>>(),
            );
            let start = NonNull::from(memory.as_slice()).cast();
            // SAFETY: the atomics are as long, and are kept by the request; only raw pointers
            // lead to them.
            let buffer = unsafe { Buffer::new(start, memory.len() * 8) };
            queue.submit(Request {
                token: token as u64,
                operation,
                offset: if operation == Operation::Flush {
                    0
                } else {
                    512
                },
                buffers: vec![buffer],
                memory,
            });
            while queue.in_flight() > 0 {
                queue.wait(None, None);
                queue.collect(&mut done);
            }
        }
        assert_eq!(done.len(), 6);
        // Whether it can is the image's affair.
        let _ = image.resize(1 << 20);
    }

    proptest! {
        // Each of these waits for the medium.
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn no_changed_image_that_is_written_ends_its_host(
            changes in prop::collection::vec((0usize..2600, any::<u8>()), 0..5),
        ) {
            let mut bytes = qcow2();
            for (place, value) in changes {
                bytes[place] = value;
            }
            use_up(&bytes);
        }
    }

    proptest! {
        #[test]
        fn no_image_breaks_its_host(data in prop::collection::vec(any::<u8>(), 0..200)) {
            image(&data);
        }

        #[test]
        fn no_changed_image_breaks_its_host(
            choice in 0x80u8..,
            changes in prop::collection::vec((0u16..2100, any::<u8>()), 1..6),
        ) {
            let mut data = vec![choice];
            for (place, value) in changes {
                data.extend(place.to_le_bytes());
                data.push(value);
            }
            image(&data);
        }
    }
}
