//! What BMcast reads: manifests, boot configurations, and the record at the end of a disk that
//! others had before, sealed without a key; then a guest on that disk.
#![no_main]

use std::convert::Infallible;
use std::sync::LazyLock;

use arbitrary::Arbitrary;
use bmcast_image::{BootConfig, Chunks, Hash, Key, Layout, Manifest, SECTOR, Sectors};
use bmcast_install::{Boot, Install, Options};
use bmcast_mediator::{Blocks as _, Failed};
use libfuzzer_sys::fuzz_target;

/// Two blocks of a record, and a bit.
const IMAGE: u64 = 7 * 4032 + 300;
const DISK: u64 = IMAGE + 200;
const PIECE: usize = 4096;

#[derive(Arbitrary, Debug)]
struct Piece {
    place: u8,
    is_header: bool,
    /// Of what makes it ours.
    right: bool,
    flags: u32,
    number: u64,
    generation: u64,
    bits: [u8; 32],
}

#[derive(Arbitrary, Debug)]
enum Event {
    Read(u16, u16),
    Write(u16, u16, bool),
    Written(u16, u16),
    Flush,
    Next(bool),
    Done(bool),
    Fetch,
    Come(u8, bool),
    Failed(u8),
    Tick(u32),
}

#[derive(Arbitrary, Debug)]
struct Input {
    bytes: Vec<u8>,
    pieces: Vec<Piece>,
    events: Vec<Event>,
}

static MANIFEST: LazyLock<Manifest> = LazyLock::new(|| {
    let chunks = Chunks::new(IMAGE * SECTOR, 16 << 10).expect("an image");
    let sums: Vec<Hash> = (0..chunks.count())
        .map(|n| Hash::of(&data(chunks, n)))
        .collect();
    Manifest::new(chunks, &sums, vec![3, 1]).expect("a manifest")
});

fn data(chunks: Chunks, chunk: u32) -> Vec<u8> {
    let byte = u8::try_from(chunk % 3).expect("small");
    vec![byte; chunks.length(chunk) as usize]
}

fn write(piece: &Piece, id: Hash, record: &mut [u8]) {
    let mut bytes = [0; PIECE];
    let magic: &[u8; 8] = if piece.is_header {
        b"BMCASTRH"
    } else {
        b"BMCASTRB"
    };
    bytes[32..40].copy_from_slice(magic);
    if piece.is_header {
        bytes[40..44].copy_from_slice(&if piece.right { 1 } else { piece.flags }.to_le_bytes());
        bytes[44..48].copy_from_slice(&piece.flags.to_le_bytes());
        bytes[48..80].copy_from_slice(&id.0);
        bytes[96..104].copy_from_slice(&piece.generation.to_le_bytes());
        let (image, disk) = if piece.right {
            (IMAGE, DISK)
        } else {
            (piece.number, DISK)
        };
        bytes[104..112].copy_from_slice(&image.to_le_bytes());
        bytes[112..120].copy_from_slice(&disk.to_le_bytes());
    } else {
        bytes[56..64].copy_from_slice(
            &if piece.right {
                piece.number % 2
            } else {
                piece.number
            }
            .to_le_bytes(),
        );
        bytes[64..72].copy_from_slice(&piece.generation.to_le_bytes());
        bytes[520..552].copy_from_slice(&piece.bits);
        bytes[PIECE - 32..].copy_from_slice(&piece.bits);
    }
    let sum = *blake3::keyed_hash(&[0; 32], &bytes[32..]).as_bytes();
    bytes[..32].copy_from_slice(&sum);
    let places = record.len() / PIECE;
    let at = usize::from(piece.place) % places * PIECE;
    record[at..at + PIECE].copy_from_slice(&bytes);
}

fuzz_target!(|input: Input| {
    let _ = BootConfig::parse(&input.bytes);
    let _ = Manifest::parse(input.bytes);
    let manifest = MANIFEST.clone();
    let chunks = manifest.chunks();
    let start = Layout::new(DISK, IMAGE).expect("there is room").visible();
    let mut record = vec![0; ((DISK - start) / 8 * 8 * SECTOR) as usize];
    for piece in &input.pieces {
        write(piece, manifest.id(), &mut record);
    }
    let boot = Boot {
        random: [5; 16],
        key: Key::default(),
        may_begin: true,
    };
    let read = |at: Sectors, into: &mut [u8]| {
        let from = ((at.start - start) * SECTOR) as usize;
        into.copy_from_slice(&record[from..from + into.len()]);
        Ok::<(), Infallible>(())
    };
    let Ok(mut install) = Install::open(DISK, manifest, boot, Options::default(), read) else {
        return;
    };
    let sectors = |start: u16, count: u16| Sectors {
        start: u64::from(start),
        count: u64::from(count),
    };
    let mut fetching = Vec::new();
    for event in input.events {
        match event {
            Event::Read(start, count) => drop(install.read(sectors(start, count))),
            Event::Write(start, count, fua) => drop(install.write(sectors(start, count), fua)),
            Event::Written(start, count) => install.written(sectors(start, count)),
            Event::Flush => drop(install.flush()),
            Event::Next(quiet) => drop(install.next(quiet)),
            Event::Done(true) => install.done(Ok(())),
            Event::Done(false) => install.done(Err(Failed { status: 1 })),
            Event::Fetch => fetching.extend(install.next_fetch()),
            Event::Come(which, right) => {
                let chunk = match fetching.pop() {
                    Some(fetch) if right => fetch.chunk,
                    _ => u32::from(which),
                };
                let _ = install.fetched(chunk, data(chunks, chunk));
            }
            Event::Failed(which) => install.fetch_failed(u32::from(which)),
            Event::Tick(micros) => install.tick(u64::from(micros)),
        }
        let progress = install.progress();
        assert!(progress.sectors_left <= progress.sectors);
    }
});
