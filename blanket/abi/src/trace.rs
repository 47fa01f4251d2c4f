//! A vCPU's trace: the last entries into the core and exits from it, in a ring that
//! the core writes and the VMM reads while both run.
//!
//! Each record is a sequence lock of its own: its first word is 0 while it is written,
//! and its number, from 1, once it is whole. There is no word that says where the ring
//! begins: the numbers do.

use core::sync::atomic::{AtomicU64, Ordering, fence};

/// Words of a record.
pub const WORDS: usize = 8;
/// Records of a ring.
pub const RECORDS: usize = 256;

/// What the core writes.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Ring([[AtomicU64; WORDS]; RECORDS]);

const _: () = assert!(size_of::<Ring>() as u64 == crate::layout::vcpu::TRACE_SIZE);

/// What a record is about: bits 32 to 39 of its third word.
pub mod kind {
    /// Entry by `syscall` in kernel mode; number: the hypercall's, arguments: its first four.
    pub const HYPERCALL: u8 = 1;
    /// An entry of a multicall; number: the hypercall's, arguments: its first four.
    pub const MULTICALL: u8 = 2;
    /// Entry by an exception or interrupt, or one of the core's own reasons (256 and
    /// up); number: the vector, arguments: error code, CR2, RSP, RAX.
    pub const TRAP: u8 = 3;
    /// The core asked its host for something; number: the reason, arguments: its own.
    pub const EXIT: u8 = 4;
}

/// A record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// From 1, without gaps for as long as the trace is on.
    pub number: u64,
    /// Time-stamp counter.
    pub tsc: u64,
    /// One of [`kind`].
    pub kind: u8,
    /// Which of its kind.
    pub what: u32,
    /// The guest was in kernel mode.
    pub kernel: bool,
    /// The guest's instruction pointer.
    pub rip: u64,
    /// Arguments.
    pub args: [u64; 4],
}

impl Ring {
    /// Without a record.
    #[must_use]
    pub const fn new() -> Self {
        Self([const { [const { AtomicU64::new(0) }; WORDS] }; RECORDS])
    }

    #[allow(clippy::cast_possible_truncation, reason = "below 256")]
    /// Writes a record. One writer at a time.
    pub fn write(&self, record: &Record) {
        // A record's place follows from its number.
        let index = (record.number % RECORDS as u64) as usize;
        let Some([number, words @ ..]) = self.0.get(index) else {
            return;
        };
        number.store(0, Ordering::Relaxed);
        fence(Ordering::Release);
        let what =
            u64::from(record.what) | u64::from(record.kind) << 32 | u64::from(record.kernel) << 40;
        let [a, b, c, d] = record.args;
        for (word, value) in words.iter().zip([record.tsc, what, record.rip, a, b, c, d]) {
            word.store(value, Ordering::Relaxed);
        }
        number.store(record.number, Ordering::Release);
    }

    /// The records that are whole, oldest first.
    pub fn read(&self) -> impl Iterator<Item = Record> {
        let newest = self
            .0
            .iter()
            .map(|[number, ..]| number.load(Ordering::Relaxed))
            .max()
            .unwrap_or(0);
        let oldest = newest.saturating_sub(RECORDS as u64 - 1).max(1);
        (oldest..=newest).filter_map(|number| self.one(number))
    }

    #[allow(
        clippy::cast_possible_truncation,
        reason = "masked; the core is 64-bit"
    )]
    fn one(&self, wanted: u64) -> Option<Record> {
        let [number, words @ ..] = self.0.get((wanted % RECORDS as u64) as usize)?;
        if number.load(Ordering::Acquire) != wanted {
            return None;
        }
        let [tsc, what, rip, args @ ..] = words.each_ref().map(|w| w.load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        (number.load(Ordering::Relaxed) == wanted).then_some(Record {
            number: wanted,
            tsc,
            kind: (what >> 32 & 0xff) as u8,
            what: (what & 0xffff_ffff) as u32,
            kernel: what >> 40 & 1 != 0,
            rip,
            args,
        })
    }
}

impl Default for Ring {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec::Vec;

    use super::*;

    fn record(number: u64) -> Record {
        Record {
            number,
            tsc: number * 10,
            kind: kind::EXIT,
            what: 7,
            kernel: number.is_multiple_of(2),
            rip: !number,
            args: [number; 4],
        }
    }

    #[test]
    fn the_last_records_come_back_in_order() {
        let ring = Ring::new();
        assert_eq!(ring.read().count(), 0);
        for number in 1..=700 {
            ring.write(&record(number));
            let first = number.saturating_sub(RECORDS as u64 - 1).max(1);
            if number % 97 == 0 || number < 3 {
                let all: Vec<Record> = ring.read().collect();
                let want: Vec<Record> = (first..=number).map(record).collect();
                assert_eq!(all, want);
            }
        }
    }

    #[test]
    fn a_record_that_is_being_written_is_left_out() {
        let ring = Ring::new();
        for number in 1..=3 {
            ring.write(&record(number));
        }
        ring.0[2][0].store(0, Ordering::Relaxed);
        let numbers: Vec<u64> = ring.read().map(|r| r.number).collect();
        assert_eq!(numbers, [1, 3]);
    }

    /// A reader beside a writer never sees half of a record.
    #[test]
    fn nothing_is_torn() {
        let ring = Ring::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 1..=200_000 {
                    ring.write(&record(number));
                }
            });
            let mut last = 0;
            while last < 200_000 {
                for got in ring.read() {
                    assert_eq!(got, record(got.number));
                    last = last.max(got.number);
                }
            }
        });
    }
}
