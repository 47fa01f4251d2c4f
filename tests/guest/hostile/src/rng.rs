//! Random numbers from a seed, and values that are likely to hurt.

use crate::kernel::{FRAMES, Kernel, SCRATCH, TABLES, VIRT_BASE};
use crate::tables::ROOTS;

/// xorshift64* (Vigna, "An experimental exploration of Marsaglia's xorshift
/// generators, scrambled").
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        // Zero is the one state that it does not leave.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    /// True once in `n` times.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// An address: of a scratch page, near its end, unmapped, the hypervisor's,
    /// not canonical, the last ones.
    pub fn address(&mut self, k: &Kernel) -> u64 {
        let inside = self.below(4096) & !7;
        // Not a root: see `Kernel::vital`.
        let page = if k.deadly {
            self.below(SCRATCH)
        } else {
            ROOTS + self.below(SCRATCH - ROOTS)
        };
        match self.below(12) {
            0..5 => k.scratch(page) + inside,
            5 => k.scratch(page) + 4096 - self.below(40),
            6 => {
                let at = VIRT_BASE + self.below(FRAMES << 12);
                if k.names_vital(at) {
                    k.scratch(TABLES)
                } else {
                    at
                }
            }
            7 => 0xffff_8000_0000_0000 + (self.next() >> 20),
            8 => {
                self.pick(&[
                    0xffff_8080_0000_0000,
                    0xffff_8080_1002_0000,
                    0xffff_8080_3000_0000,
                    0xffff_8100_0000_0000,
                    0xffff_8180_0000_0000,
                    0xffff_87ff_ffff_fff8,
                ]) + inside
            }
            9 => self.next(),
            10 => u64::MAX - self.below(64),
            _ => self.next() >> 17,
        }
    }

    /// A frame number: one of ours, of the hypervisor's, or none.
    pub fn gfn(&mut self, k: &Kernel) -> u64 {
        let gfn = match self.below(10) {
            0..6 => k.scratch_gfn(self.below(SCRATCH)),
            6 => self.below(k.nr_pages),
            7 => k.nr_pages + self.below(40),
            8 => self.next() >> self.below(64),
            _ => u64::MAX - self.below(4),
        };
        if k.vital(gfn) {
            k.scratch_gfn(TABLES + gfn % (SCRATCH - TABLES))
        } else {
            gfn
        }
    }

    /// A page-table entry.
    pub fn entry(&mut self, k: &Kernel) -> u64 {
        let flags = match self.below(4) {
            0 => 0x67,
            1 => 0x25,
            2 => self.next() & 0x8000_0000_0000_0fff,
            _ => (self.next() & 0x8000_0000_0000_0fff) | 1,
        };
        if self.once_in(16) {
            self.next()
        } else {
            self.gfn(k) << 12 | flags
        }
    }

    /// Any word.
    pub fn word(&mut self, k: &Kernel) -> u64 {
        let word = match self.below(8) {
            0 => self.below(16),
            1 => self.below(1 << 16),
            2 => 1 << self.below(64),
            3 => self.gfn(k),
            4 => self.entry(k),
            5 | 6 => self.address(k),
            _ => self.next(),
        };
        if k.names_vital(word) {
            k.scratch(TABLES + word % (SCRATCH - TABLES))
        } else {
            word
        }
    }
}
