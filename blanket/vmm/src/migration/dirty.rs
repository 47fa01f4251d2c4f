//! Which frames are to be sent again.

use blanket_abi::{Gfn, state};
use blanket_migration::pages::Pages;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError};

use crate::builder::{Domain, address};

/// Frames that are sent: RAM, and what lies between it and the state.
#[derive(Clone, Debug)]
pub(crate) struct Dirty(Pages);

impl Dirty {
    /// None of a domain's.
    pub(crate) fn none(domain: &Domain) -> Self {
        Self(Pages::none(domain.boot.state_base))
    }

    /// The words, for whoever adds many.
    pub(crate) fn words(&mut self) -> &mut [u64] {
        self.0.words()
    }

    /// Adds a frame.
    pub(crate) fn add(&mut self, gfn: u64) {
        self.0.add(gfn);
    }

    /// Adds what the core has written down, and what is written at any moment.
    pub(crate) fn add_logged(
        &mut self,
        domain: &Domain,
        vcpus: u32,
    ) -> Result<(), GuestMemoryError> {
        let ram = domain.boot.ram_frames;
        let log = domain.boot.state_base + state::log_at(vcpus, ram);
        let mut at = address(Gfn(log));
        let words = usize::try_from(ram.div_ceil(64)).unwrap_or(0);
        for word in self.words().iter_mut().take(words) {
            let logged: u64 = domain.memory.read_obj(at)?;
            *word |= logged;
            at = GuestAddress(at.0 + 8);
        }
        self.add_standing(domain);
        Ok(())
    }

    /// Adds what is written at any moment: the rings of console and store, shared info, and
    /// the grant table.
    pub(crate) fn add_standing(&mut self, domain: &Domain) {
        self.0.add(domain.store.0);
        self.0.add(domain.console.0);
        for gfn in domain.boot.ram_frames..self.0.frames() {
            self.0.add(gfn);
        }
    }

    /// Whether one of them is in another set.
    pub(crate) fn meets(&self, other: &Pages) -> bool {
        let mut runs = self.0.runs(u64::MAX);
        runs.any(|(first, count)| (first..first + count).any(|page| other.has(page)))
    }

    /// Frames.
    pub(crate) fn count(&self) -> u64 {
        self.0.count()
    }

    /// Frames that follow each other: the first one and how many, `most` at most.
    pub(crate) fn runs(&self, most: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.runs(most)
    }

    /// All but those of another set.
    pub(crate) fn without(mut self, other: &Self) -> Pages {
        self.0.remove_all(&other.0);
        self.0
    }
}
