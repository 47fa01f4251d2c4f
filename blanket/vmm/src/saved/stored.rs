//! Pages of a saved VM that stay in its file until they are needed.

use std::collections::BTreeSet;
use std::fs::File;

use blanket_abi::PAGE_SIZE;
use blanket_migration::pages::Pages;
use blanket_snapshot::{Error, PAGE, Place, Run};
use vm_memory::{Bytes as _, GuestAddress};

use super::ResumeError;
use crate::builder::Domain;
use crate::migration::Dirty;

/// Where the last content of each page is. The file is open, so that it may lose its name.
#[derive(Debug)]
pub(crate) struct Stored {
    file: File,
    places: Vec<Place>,
    /// By page: the number of its place, from 1; 0 of those that the file does not have.
    of: Vec<u32>,
}

impl Stored {
    /// Nothing yet, of a file.
    pub(crate) fn new(file: File) -> Self {
        Self {
            file,
            places: Vec::new(),
            of: Vec::new(),
        }
    }

    /// A run of pages has been found, of a VM of `frames`. What came before of them does not count.
    pub(crate) fn add(&mut self, place: Place, frames: u64) -> Result<(), Error> {
        let bad = || Error::Pages(place.first);
        let end = place.first.checked_add(place.count);
        let end = end.filter(|end| *end <= frames).ok_or_else(bad)?;
        self.places.push(place);
        let number = u32::try_from(self.places.len()).map_err(|_| bad())?;
        let [first, end] = [place.first, end].map(|page| usize::try_from(page).unwrap_or(0));
        if self.of.len() < end {
            self.of.resize(end, 0);
        }
        self.of[first..end].fill(number);
        Ok(())
    }

    /// The number of the place of a page, if the file has it.
    fn place_of(&self, page: u64) -> Option<u32> {
        let of = usize::try_from(page).ok().and_then(|at| self.of.get(at));
        of.copied().filter(|number| *number != 0)
    }

    /// Puts what a VM's start needs where it belongs. What is left.
    pub(super) fn lay_standing(&self, domain: &Domain) -> Result<Pages, ResumeError> {
        let mut standing = Dirty::none(domain);
        standing.add_standing(domain);
        let mut left = Dirty::none(domain);
        for (page, number) in (0..).zip(&self.of) {
            if *number != 0 {
                left.add(page);
            }
        }
        let left = left.without(&standing);
        // Most of them are in one chunk.
        let places: BTreeSet<u32> = standing
            .runs(1)
            .filter_map(|(page, _)| self.place_of(page))
            .collect();
        for number in places {
            let run = self.run(number)?;
            for (page, content) in run.pages().filter(|(page, _)| !left.has(*page)) {
                let at = GuestAddress(page * PAGE_SIZE);
                let written = domain.memory.write_slice(content, at);
                written.map_err(|error| ResumeError::Impossible(error.to_string()))?;
            }
        }
        Ok(left)
    }

    /// The pages that are in the file together with one, as far as they count.
    ///
    /// # Errors
    /// The file does not have it, or is not what it was.
    pub(crate) fn run_with(&self, page: u64) -> Result<Together, Error> {
        self.run(self.place_of(page).ok_or(Error::Pages(page))?)
    }

    fn run(&self, number: u32) -> Result<Together, Error> {
        let place = self.places.get(number as usize - 1);
        let place = place.ok_or(Error::Pages(number.into()))?;
        let run = place.read(&self.file)?;
        let counts = (place.first..place.first + place.count)
            .map(|page| self.place_of(page) == Some(number))
            .collect();
        Ok(Together { run, counts })
    }
}

/// Pages that follow each other, of which some do not count: the file has them again.
pub(crate) struct Together {
    run: Run,
    counts: Vec<bool>,
}

impl Together {
    /// Those that count, by number.
    pub(crate) fn pages(&self) -> impl Iterator<Item = (u64, &[u8; PAGE])> {
        let (pages, _) = self.run.bytes.as_chunks::<PAGE>();
        let all = (self.run.first..).zip(pages).zip(&self.counts);
        all.filter_map(|(page, counts)| counts.then_some(page))
    }
}
