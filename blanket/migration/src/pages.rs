//! Sets of pages of a VM's memory.

use std::io;

/// How hard to compress a set: it is short, and the VM stands still.
const LEVEL: i32 = 1;

/// A bit for each page below a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pages {
    words: Vec<u64>,
    frames: u64,
}

impl Pages {
    /// None of so many.
    #[must_use]
    pub fn none(frames: u64) -> Self {
        let words = usize::try_from(frames.div_ceil(64)).unwrap_or(0);
        Self {
            words: vec![0; words],
            frames,
        }
    }

    /// How many there could be.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// The bits, for whoever adds many.
    pub fn words(&mut self) -> &mut [u64] {
        &mut self.words
    }

    fn word(&mut self, page: u64) -> Option<&mut u64> {
        if page >= self.frames {
            return None;
        }
        self.words.get_mut(usize::try_from(page / 64).ok()?)
    }

    /// Adds a page, if there can be such a one.
    pub fn add(&mut self, page: u64) {
        if let Some(word) = self.word(page) {
            *word |= 1 << (page % 64);
        }
    }

    /// Removes a page.
    pub fn remove(&mut self, page: u64) {
        if let Some(word) = self.word(page) {
            *word &= !(1 << (page % 64));
        }
    }

    /// Removes all that are in another set.
    pub fn remove_all(&mut self, other: &Self) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= !other;
        }
    }

    /// Whether a page is in it.
    #[must_use]
    pub fn has(&self, page: u64) -> bool {
        let word = usize::try_from(page / 64).ok();
        page < self.frames
            && word
                .and_then(|word| self.words.get(word))
                .is_some_and(|word| word >> (page % 64) & 1 != 0)
    }

    /// Whether all of it is in another set.
    #[must_use]
    pub fn is_in(&self, other: &Self) -> bool {
        let mut pairs = self.words.iter().zip(&other.words);
        self.frames == other.frames && pairs.all(|(word, other)| word & !other == 0)
    }

    /// How many are in it.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// The first one at or after `page`.
    #[must_use]
    pub fn next(&self, page: u64) -> Option<u64> {
        let first = usize::try_from(page / 64).ok()?;
        let head = self.words.get(first)? & u64::MAX << (page % 64);
        let rest = self.words.iter().skip(first + 1).copied();
        let mut words = (page / 64..).zip(std::iter::once(head).chain(rest));
        let (at, word) = words.find(|(_, word)| *word != 0)?;
        Some(at * 64 + u64::from(word.trailing_zeros()))
    }

    /// The run that begins with `first`: how long it is, `most` at most.
    #[must_use]
    pub fn run(&self, first: u64, most: u64) -> u64 {
        let end = first.saturating_add(most);
        (first..end).take_while(|page| self.has(*page)).count() as u64
    }

    /// Pages that follow each other: the first one and how many, `most` at most.
    pub fn runs(&self, most: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let first = self.next(from)?;
            let count = self.run(first, most.max(1));
            from = first + count;
            Some((first, count))
        })
    }

    /// As bytes, compressed.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn pack(&self) -> io::Result<Vec<u8>> {
        let bytes: Vec<u8> = self.words.iter().flat_map(|w| w.to_le_bytes()).collect();
        zstd::bulk::compress(&bytes, LEVEL)
    }

    /// Of bytes that somebody else has packed: a set of just so many pages, or none.
    #[must_use]
    pub fn unpack(packed: &[u8], frames: u64) -> Option<Self> {
        let mut pages = Self::none(frames);
        let length = pages.words.len() * 8;
        let bytes = zstd::bulk::decompress(packed, length).ok()?;
        let (words, rest) = bytes.as_chunks::<8>();
        if words.len() != pages.words.len() || !rest.is_empty() {
            return None;
        }
        for (to, word) in pages.words.iter_mut().zip(words) {
            *to = u64::from_le_bytes(*word);
        }
        let beyond = match frames % 64 {
            0 => 0,
            used => pages.words.last()? >> used,
        };
        (beyond == 0).then_some(pages)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn runs_are_cut_where_they_end_or_are_too_long() {
        let mut pages = Pages::none(200);
        for page in [0, 3, 4, 5, 6, 7, 63, 64, 199, 200, u64::MAX] {
            pages.add(page);
        }
        let runs: Vec<_> = pages.runs(3).collect();
        assert_eq!(runs, [(0, 1), (3, 3), (6, 2), (63, 2), (199, 1)]);
        assert_eq!(pages.count(), 9);
        assert_eq!(Pages::none(0).runs(4).count(), 0);
    }

    proptest! {
        #[test]
        fn it_is_a_set(frames in 1u64..300, adds in prop::collection::vec(0u64..320, 0..80),
                       removes in prop::collection::vec(0u64..320, 0..40)) {
            let mut pages = Pages::none(frames);
            let mut model = BTreeSet::new();
            for page in adds {
                pages.add(page);
                if page < frames {
                    model.insert(page);
                }
            }
            for page in removes {
                pages.remove(page);
                model.remove(&page);
            }
            prop_assert_eq!(pages.count(), model.len() as u64);
            for page in 0..330 {
                prop_assert_eq!(pages.has(page), model.contains(&page));
                prop_assert_eq!(pages.next(page), model.range(page..).next().copied());
            }
            let listed: BTreeSet<u64> = pages
                .runs(7)
                .flat_map(|(first, count)| first..first + count)
                .collect();
            prop_assert_eq!(listed, model);
            let packed = pages.pack().expect("memory");
            prop_assert_eq!(Pages::unpack(&packed, frames), Some(pages));
            prop_assert_eq!(Pages::unpack(&packed, frames + 64), None);
        }

        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..100), frames in 0u64..200) {
            if let Some(pages) = Pages::unpack(&bytes, frames) {
                prop_assert!(pages.runs(64).all(|(first, count)| first + count <= frames));
            }
        }
    }
}
