//! A machine: an image, a disk, an installation.

use std::convert::Infallible;

use bmcast_image::{Chunks, Hash, Manifest, SECTOR, Sectors};
use bmcast_install::{Fetched, Install, Options};
use bmcast_mediator::{Blocks as _, Work};

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

pub fn open(disk: &[u8], manifest: Manifest, number: u8, options: Options) -> Install {
    let read = |at: Sectors, into: &mut [u8]| {
        into.copy_from_slice(&disk[bytes(at)]);
        Ok::<(), Infallible>(())
    };
    let size = disk.len() as u64 / SECTOR;
    Install::open(size, manifest, [number; 16], options, read).unwrap()
}

/// One whose disk does at once, and durably, what it is told.
pub struct Machine {
    pub image: Vec<u8>,
    pub disk: Vec<u8>,
    pub install: Install,
    options: Options,
}

impl Machine {
    pub fn new(image: Vec<u8>, options: Options) -> Self {
        let disk = vec![0x5a; image.len() + 200 * 512];
        let install = open(&disk, manifest(&image, Vec::new()), 1, options);
        Self {
            image,
            disk,
            install,
            options,
        }
    }

    pub fn chunk(&self, chunk: u32) -> Vec<u8> {
        let chunks = self.install.manifest().chunks();
        self.image[bytes(chunks.sectors(chunk))].to_vec()
    }

    /// Does one work; false if there is none.
    pub fn work(&mut self, quiet: bool) -> bool {
        match self.install.next(quiet) {
            None => return false,
            Some(Work::Flush) => {}
            Some(Work::Write { to, data }) => self.disk[bytes(to)].copy_from_slice(&data),
        }
        self.install.done(Ok(()));
        true
    }

    /// Fetches one chunk; false if there is none to be fetched.
    pub fn fetch(&mut self) -> bool {
        let Some(fetch) = self.install.next_fetch() else {
            return false;
        };
        let data = self.chunk(fetch.chunk);
        assert_eq!(data.len(), fetch.length as usize);
        assert_eq!(self.install.fetched(fetch.chunk, data), Fetched::Taken);
        true
    }

    /// The record's first write.
    pub fn begin(&mut self) {
        while self.work(false) {}
    }

    /// Until nothing is left to do.
    pub fn run_quiet(&mut self) {
        while self.fetch() || self.work(true) {}
    }

    pub fn restart(&self) -> Install {
        let manifest = self.install.manifest().clone();
        open(&self.disk, manifest, 2, self.options)
    }
}
