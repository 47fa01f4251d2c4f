//! Images and their manifests.

use bmcast_image::{Chunks, Hash, Key, Manifest, SECTOR, Sectors};
use bmcast_install::Boot;

pub const CHUNK: u32 = 16 << 10;

pub fn sectors(start: u64, count: u64) -> Sectors {
    Sectors { start, count }
}

pub fn bytes(sectors: Sectors) -> std::ops::Range<usize> {
    let at = |sector: u64| usize::try_from(sector * SECTOR).unwrap();
    at(sectors.start)..at(sectors.end())
}

/// An image of so many sectors, every third chunk zeros.
pub fn image(sectors: u64) -> Vec<u8> {
    let mut image = vec![0; usize::try_from(sectors * SECTOR).unwrap()];
    for (n, sector) in image.chunks_exact_mut(512).enumerate() {
        if n / 32 % 3 != 2 {
            sector.fill(u8::try_from(n % 200 + 1).unwrap());
            sector[..8].copy_from_slice(&(n as u64 + 1).to_le_bytes());
        }
    }
    image
}

pub fn manifest(image: &[u8], profile: Vec<u32>) -> Manifest {
    let chunks = Chunks::new(image.len() as u64, CHUNK).unwrap();
    let sums: Vec<Hash> = image.chunks(CHUNK as usize).map(Hash::of).collect();
    Manifest::new(chunks, &sums, profile).unwrap()
}

pub fn boot(number: u8, may_begin: bool) -> Boot {
    Boot {
        random: [number; 16],
        key: Key([7; 32]),
        may_begin,
    }
}
