//! Sets of sectors.

use alloc::boxed::Box;
use alloc::vec::Vec;

use crate::Sectors;

const WORDS: usize = 63;
/// Sectors of one page of a set: so many that the record can write a page and 8 bytes as a sector.
pub(crate) const PAGE: u64 = WORDS as u64 * 64;
/// Bytes of its bits.
pub(crate) const PAGE_BYTES: usize = WORDS * 8;

/// A page: none of its sectors, all of them, or some.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Page {
    None,
    All,
    Some(Box<[u64; WORDS]>),
}

/// Which of the first so many sectors of a disk are in it, exactly.
///
/// It takes memory where sectors that are in it and sectors that are not lie close together: 504
/// bytes for each 2 MiB of such a disk, and 16 bytes for all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SectorSet {
    pages: Vec<Page>,
    sectors: u64,
    missing: u64,
}

impl SectorSet {
    /// An empty set over a disk of so many sectors.
    #[must_use]
    pub fn new(sectors: u64) -> Self {
        let pages = usize::try_from(sectors.div_ceil(PAGE)).unwrap_or(usize::MAX);
        Self {
            pages: alloc::vec![Page::None; pages],
            sectors,
            missing: sectors,
        }
    }

    /// Sectors of the disk.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// How many of them are not in the set.
    #[must_use]
    pub fn missing(&self) -> u64 {
        self.missing
    }

    /// Adds sectors; those beyond the end are left out. Says how many were not in it before.
    pub fn insert(&mut self, sectors: Sectors) -> u64 {
        let before = self.missing;
        let sectors = sectors.and(self.whole());
        for (page, part) in parts(sectors) {
            let all = self.length(page);
            let Some(slot) = self.pages.get_mut(page) else {
                break;
            };
            if *slot == Page::All {
                continue;
            }
            if part.count == all {
                self.missing -= all - ones(slot);
                *slot = Page::All;
                continue;
            }
            if *slot == Page::None {
                *slot = Page::Some(Box::new([0; WORDS]));
            }
            let Page::Some(words) = slot else { continue };
            for (word, mask) in masks(part) {
                self.missing -= u64::from((mask & !words[word]).count_ones());
                words[word] |= mask;
            }
            if ones(slot) == all {
                *slot = Page::All;
            }
        }
        before - self.missing
    }

    /// Whether all of these are in it. Those beyond the end count as if they were.
    #[must_use]
    pub fn contains(&self, sectors: Sectors) -> bool {
        self.next_missing(sectors).is_none()
    }

    /// The first run of sectors that are not in it, of these; none beyond the end.
    #[must_use]
    pub fn next_missing(&self, sectors: Sectors) -> Option<Sectors> {
        let sectors = sectors.and(self.whole());
        let start = self.find(sectors, false)?;
        let behind = Sectors {
            start,
            count: sectors.end() - start,
        };
        let end = self.find(behind, true).unwrap_or(sectors.end());
        Some(Sectors {
            start,
            count: end - start,
        })
    }

    /// The first sector that is in it, or that is not.
    fn find(&self, sectors: Sectors, is_in: bool) -> Option<u64> {
        for (page, part) in parts(sectors) {
            let start = page as u64 * PAGE + part.start;
            match (self.pages.get(page)?, is_in) {
                (Page::None, false) | (Page::All, true) => return Some(start),
                (Page::None, true) | (Page::All, false) => {}
                (Page::Some(words), _) => {
                    for (word, mask) in masks(part) {
                        let bits = if is_in { words[word] } else { !words[word] } & mask;
                        if bits != 0 {
                            let bit = word as u64 * 64 + u64::from(bits.trailing_zeros());
                            return Some(page as u64 * PAGE + bit);
                        }
                    }
                }
            }
        }
        None
    }

    /// The bits of a page, for the record.
    pub(crate) fn page_bits(&self, page: usize, into: &mut [u8]) {
        match self.pages.get(page) {
            None | Some(Page::None) => into.fill(0),
            Some(Page::All) => {
                into.fill(0);
                for (word, mask) in masks(Sectors {
                    start: 0,
                    count: self.length(page),
                }) {
                    if let Some(bytes) = into.get_mut(word * 8..word * 8 + 8) {
                        bytes.copy_from_slice(&mask.to_le_bytes());
                    }
                }
            }
            Some(Page::Some(words)) => {
                for (bytes, word) in into.chunks_exact_mut(8).zip(words.iter()) {
                    bytes.copy_from_slice(&word.to_le_bytes());
                }
            }
        }
    }

    /// Adds all sectors of a page whose bit is set. Bits beyond the end are left out.
    pub(crate) fn insert_bits(&mut self, page: usize, bits: &[u8]) {
        let all = self.length(page);
        let Some(slot) = self.pages.get_mut(page) else {
            return;
        };
        let before = ones_of(slot, all);
        let mut words = match slot {
            Page::All => return,
            Page::None => Box::new([0; WORDS]),
            Page::Some(words) => core::mem::replace(words, Box::new([0; WORDS])),
        };
        let masks = masks(Sectors {
            start: 0,
            count: all,
        });
        for ((word, mask), bytes) in masks.zip(bits.chunks_exact(8)) {
            let mut eight = [0; 8];
            eight.copy_from_slice(bytes);
            words[word] |= u64::from_le_bytes(eight) & mask;
        }
        let now: u64 = words.iter().map(|word| u64::from(word.count_ones())).sum();
        self.missing -= now - before;
        *slot = match now {
            0 => Page::None,
            now if now == all => Page::All,
            _ => Page::Some(words),
        };
    }

    fn whole(&self) -> Sectors {
        Sectors {
            start: 0,
            count: self.sectors,
        }
    }

    /// Sectors of a page; the last one may have fewer.
    fn length(&self, page: usize) -> u64 {
        self.sectors.saturating_sub(page as u64 * PAGE).min(PAGE)
    }
}

fn ones(page: &Page) -> u64 {
    ones_of(page, PAGE)
}

fn ones_of(page: &Page, all: u64) -> u64 {
    match page {
        Page::None => 0,
        Page::All => all,
        Page::Some(words) => words.iter().map(|word| u64::from(word.count_ones())).sum(),
    }
}

/// The pages that a range meets, and what of each, counted from its start.
fn parts(sectors: Sectors) -> impl Iterator<Item = (usize, Sectors)> {
    let mut at = sectors.start;
    core::iter::from_fn(move || {
        if at >= sectors.end() {
            return None;
        }
        let page = at / PAGE;
        let start = at % PAGE;
        let count = (PAGE - start).min(sectors.end() - at);
        at += count;
        Some((usize::try_from(page).ok()?, Sectors { start, count }))
    })
}

/// The words of a page that a range within it meets, and which bits of each.
fn masks(part: Sectors) -> impl Iterator<Item = (usize, u64)> {
    let mut at = part.start;
    core::iter::from_fn(move || {
        if at >= part.end() {
            return None;
        }
        let (word, bit) = (at / 64, at % 64);
        let count = (64 - bit).min(part.end() - at);
        at += count;
        let mask = (u64::MAX >> (64 - count)) << bit;
        Some((usize::try_from(word).ok()?, mask))
    })
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use proptest::prelude::*;

    use super::*;

    /// A range of a disk of three pages and a bit, or beyond it.
    fn range() -> impl Strategy<Value = Sectors> {
        let near = [0u64, 4032, 8064, 12096, 12300].map(Just);
        let start = prop_oneof![0..13000u64, proptest::strategy::Union::new(near)];
        let count = prop_oneof![0..70u64, 0..9000u64, Just(4032), Just(64)];
        (start, count).prop_map(|(start, count)| Sectors { start, count })
    }

    proptest! {
        #[test]
        fn as_a_list_of_flags(sectors in 1..12301u64, ranges in prop::collection::vec((range(), range()), 1..20)) {
            let mut set = SectorSet::new(sectors);
            let mut flags = vec![false; usize::try_from(sectors).unwrap()];
            let of = |flags: &[bool], range: Sectors| -> Vec<u64> {
                let end = range.end().min(sectors);
                (range.start..end).filter(|n| !flags[usize::try_from(*n).unwrap()]).collect()
            };
            for (insert, ask) in ranges {
                let missing = of(&flags, insert);
                prop_assert_eq!(set.insert(insert), missing.len() as u64);
                for sector in missing {
                    flags[usize::try_from(sector).unwrap()] = true;
                }
                let missing = of(&flags, ask);
                prop_assert_eq!(set.contains(ask), missing.is_empty());
                let run = set.next_missing(ask);
                prop_assert_eq!(run.map(|run| run.start), missing.first().copied());
                if let Some(run) = run {
                    let length = missing.iter().enumerate().take_while(|(n, sector)| **sector == run.start + *n as u64).count();
                    prop_assert_eq!(run.count, length as u64);
                }
                prop_assert_eq!(set.missing(), flags.iter().filter(|flag| !**flag).count() as u64);
            }
            let mut copy = SectorSet::new(sectors);
            for page in 0..set.pages.len() + 1 {
                let mut bits = [0xff; PAGE_BYTES];
                set.page_bits(page, &mut bits);
                copy.insert_bits(page, &bits);
                copy.insert_bits(page, &bits);
            }
            prop_assert_eq!(copy, set);
        }
    }

    #[test]
    fn bits_beyond_the_end_are_left_out() {
        let mut set = SectorSet::new(PAGE + 1);
        set.insert_bits(1, &[0xff; PAGE_BYTES]);
        set.insert_bits(2, &[0xff; PAGE_BYTES]);
        assert_eq!(set.missing(), PAGE);
        set.insert_bits(0, &[0xff; PAGE_BYTES]);
        assert_eq!(set.missing(), 0);
    }

    #[test]
    fn a_set_without_sectors() {
        let mut set = SectorSet::new(0);
        let all = Sectors {
            start: 0,
            count: u64::MAX,
        };
        assert_eq!(set.insert(all), 0);
        assert!(set.contains(all));
    }
}
