//! What is on the disk, in the simplest way that keeps what [`Blocks`] promises.

use std::collections::BTreeSet;

use bmcast_image::Sectors;
use bmcast_mediator::{Blocks, Failed, Verdict, Work};

pub const VISIBLE: u64 = 300;
pub const IMAGE: u64 = 256;
/// Sectors of a chunk.
pub const CHUNK: u64 = 8;

/// A sector of the image.
pub fn image(sector: u64) -> [u8; 512] {
    let mut data = [0x11; 512];
    data[..8].copy_from_slice(&sector.to_le_bytes());
    data
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Own {
    Data(Sectors),
    Flush,
}

pub struct Oracle {
    pub local: Vec<bool>,
    /// Writes of the guest's on the device.
    pub guest: Vec<Sectors>,
    wanted: BTreeSet<u64>,
    ready: BTreeSet<u64>,
    own: Option<Own>,
    is_dirty: bool,
    flush_wanted: bool,
    pub most: usize,
    pub failures: u32,
    /// Nothing is done in advance.
    pub is_lazy: bool,
}

impl Oracle {
    pub fn new() -> Self {
        Self {
            local: vec![false; usize::try_from(IMAGE).unwrap()],
            guest: Vec::new(),
            wanted: BTreeSet::new(),
            ready: BTreeSet::new(),
            own: None,
            is_dirty: false,
            flush_wanted: false,
            most: 8,
            failures: 0,
            is_lazy: false,
        }
    }

    fn is_local(&self, sectors: Sectors) -> bool {
        (sectors.start..sectors.end().min(IMAGE)).all(|n| self.local[usize::try_from(n).unwrap()])
    }

    pub fn insert(&mut self, sectors: Sectors) {
        for n in sectors.start..sectors.end().min(IMAGE) {
            self.local[usize::try_from(n).unwrap()] = true;
        }
    }

    pub fn complete(&self) -> bool {
        self.local.iter().all(|local| *local) && self.own.is_none()
    }

    /// A chunk that is waited for has come.
    pub fn fetched(&mut self) {
        if let Some(chunk) = self.wanted.pop_first() {
            self.ready.insert(chunk);
        }
    }

    /// The first sectors of a chunk that are to be written.
    fn absent(&self, chunk: u64) -> Option<Sectors> {
        let is_absent = |n: &u64| {
            let at = Sectors {
                start: *n,
                count: 1,
            };
            !self.is_local(at) && !self.guest.iter().any(|write| write.meets(at))
        };
        let end = (chunk + 1) * CHUNK;
        let start = (chunk * CHUNK..end).find(is_absent)?;
        let count = (start..end).take_while(is_absent).count();
        Some(Sectors {
            start,
            count: u64::try_from(count).unwrap(),
        })
    }
}

impl Blocks for Oracle {
    fn visible(&self) -> u64 {
        VISIBLE
    }

    fn read(&mut self, sectors: Sectors) -> Verdict {
        assert!(sectors.end() <= VISIBLE);
        if self.is_local(sectors) {
            return Verdict::Pass;
        }
        for sector in sectors.start..sectors.end().min(IMAGE) {
            let chunk = sector / CHUNK;
            if self.absent(chunk).is_some() && !self.ready.contains(&chunk) {
                self.wanted.insert(chunk);
            }
        }
        Verdict::Hold
    }

    fn write(&mut self, sectors: Sectors, fua: bool) -> Verdict {
        assert!(sectors.end() <= VISIBLE);
        if let Some(Own::Data(own)) = self.own
            && own.meets(sectors)
        {
            return Verdict::Hold;
        }
        if self.guest.len() >= self.most {
            return Verdict::Hold;
        }
        if fua && self.is_dirty {
            self.flush_wanted = true;
            return Verdict::Hold;
        }
        self.guest.push(sectors);
        Verdict::Pass
    }

    fn written(&mut self, sectors: Sectors) {
        let at = self.guest.iter().position(|write| *write == sectors);
        self.guest.swap_remove(at.expect("a write that had passed"));
        self.insert(sectors);
        self.is_dirty = true;
    }

    fn flush(&mut self) -> Verdict {
        if !self.is_dirty {
            return Verdict::Pass;
        }
        self.flush_wanted = true;
        Verdict::Hold
    }

    fn next(&mut self, quiet: bool) -> Option<Work> {
        assert!(
            self.own.is_none() || self.failures == u32::MAX,
            "one at a time"
        );
        if self.flush_wanted {
            self.own = Some(Own::Flush);
            return Some(Work::Flush);
        }
        if quiet && !self.is_lazy {
            let chunk = (0..IMAGE / CHUNK).find(|chunk| self.absent(*chunk).is_some());
            self.ready.extend(chunk);
        }
        while let Some(chunk) = self.ready.first().copied() {
            if let Some(to) = self.absent(chunk) {
                self.own = Some(Own::Data(to));
                let data = (to.start..to.end()).flat_map(image).collect();
                return Some(Work::Write { to, data });
            }
            self.ready.pop_first();
        }
        None
    }

    fn done(&mut self, result: Result<(), Failed>) {
        let own = self.own.take().expect("something to be done");
        if result.is_err() {
            self.failures += 1;
            return;
        }
        match own {
            Own::Data(sectors) => self.insert(sectors),
            Own::Flush => {
                self.is_dirty = false;
                self.flush_wanted = false;
            }
        }
    }
}
