//! Which frames are to be sent again.

use blanket_abi::{Gfn, state};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError};

use crate::builder::{Domain, address};

/// A bit for each frame that is sent: RAM, and what lies between it and the state.
#[derive(Clone, Debug)]
pub(crate) struct Dirty {
    words: Vec<u64>,
    frames: u64,
}

impl Dirty {
    /// None of a domain's.
    pub(crate) fn none(domain: &Domain) -> Self {
        Self::of(domain.boot.state_base)
    }

    fn of(frames: u64) -> Self {
        let words = usize::try_from(frames.div_ceil(64)).unwrap_or(0);
        Self {
            words: vec![0; words],
            frames,
        }
    }

    /// Adds a frame.
    pub(crate) fn add(&mut self, gfn: Gfn) {
        let word = usize::try_from(gfn.0 / 64).ok();
        if gfn.0 < self.frames
            && let Some(word) = word.and_then(|word| self.words.get_mut(word))
        {
            *word |= 1 << (gfn.0 % 64);
        }
    }

    /// The words, for whoever adds many.
    pub(crate) fn words(&mut self) -> &mut [u64] {
        &mut self.words
    }

    /// Adds what the core has written down, and what is written at any moment: the rings
    /// of console and store, shared info, and the grant table.
    pub(crate) fn add_logged(
        &mut self,
        domain: &Domain,
        vcpus: u32,
    ) -> Result<(), GuestMemoryError> {
        let ram = domain.boot.ram_frames;
        let log = domain.boot.state_base + state::log_at(vcpus, ram);
        let mut at = address(Gfn(log));
        let words = usize::try_from(ram.div_ceil(64)).unwrap_or(0);
        for word in self.words.iter_mut().take(words) {
            let logged: u64 = domain.memory.read_obj(at)?;
            *word |= logged;
            at = GuestAddress(at.0 + 8);
        }
        self.add(domain.store);
        self.add(domain.console);
        for gfn in ram..self.frames {
            self.add(Gfn(gfn));
        }
        Ok(())
    }

    /// Frames.
    pub(crate) fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Frames that follow each other: the first one and how many, `most` at most.
    pub(crate) fn runs(&self, most: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let first = (next..self.frames).find(|gfn| self.has(*gfn))?;
            let end = self.frames.min(first + most);
            let end = (first..end).find(|gfn| !self.has(*gfn)).unwrap_or(end);
            next = end;
            Some((first, end - first))
        })
    }

    fn has(&self, gfn: u64) -> bool {
        let word = usize::try_from(gfn / 64).ok();
        word.and_then(|word| self.words.get(word))
            .is_some_and(|word| word >> (gfn % 64) & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_where_they_end_or_are_too_long() {
        let mut dirty = Dirty::of(200);
        for gfn in [0, 3, 4, 5, 6, 7, 63, 64, 199, 200, u64::MAX] {
            dirty.add(Gfn(gfn));
        }
        let runs: Vec<_> = dirty.runs(3).collect();
        assert_eq!(runs, [(0, 1), (3, 3), (6, 2), (63, 2), (199, 1)]);
        assert_eq!(dirty.count(), 9);
        assert_eq!(Dirty::of(0).runs(4).count(), 0);
    }
}
