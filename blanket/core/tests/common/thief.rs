//! A host that takes frames back, as `blanket/kmod/frames.c` does it.

use super::{Exit, FakeMachine};
use blanket_abi::layout::REVOKED_BLOCK;
use std::sync::atomic::Ordering::SeqCst;

impl FakeMachine {
    /// Takes a frame while no vCPU is in the core world: nobody has translations, and
    /// the leaves are left to the core.
    pub fn lose(&self, gfn: u64) {
        if !self.present(gfn) {
            return;
        }
        self.take(gfn);
        let block = gfn / REVOKED_BLOCK;
        let word = (gfn % REVOKED_BLOCK / 64) as usize;
        self.revoked[block as usize][word].fetch_or(1 << (gfn % 64), SeqCst);
        self.page.revoked[block as usize / 64].fetch_or(1 << (block % 64), SeqCst);
        self.page.revocations.fetch_add(1, SeqCst);
        let vm = self.vm.get().expect("a VM");
        for (id, cpu) in (0..).zip(&self.cpus) {
            cpu.flush();
            if vm.epochs.inside(id) {
                vm.epochs.enter(id);
            }
        }
    }

    /// Loses what `FakeMachine::thief` likes: frames at one exit of five, and among
    /// them often the one that the core reaches for at any moment.
    pub(super) fn steal(&self) {
        if self.thief.get() == 0 {
            return;
        }
        let next = || {
            // xorshift64: never 0.
            let mut x = self.thief.get();
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            self.thief.set(x);
            x
        };
        if next() % 5 == 0 {
            for _ in 0..next() % 4 {
                self.lose(next() % self.page.nr_frames);
            }
            if next() % 3 == 0 {
                self.lose(self.page.boot.shared_info);
            }
        }
    }

    /// What the VMM does with frames that the guest has given up: their memory goes. No
    /// CPU that is inside may have a writable translation of one left.
    pub(super) fn take_given_up(&self, out: Exit) -> i64 {
        let text = self.texts.borrow().last().cloned().unwrap_or_default();
        let vm = self.vm.get().expect("a VM");
        if out.args[0] != 0 {
            assert_eq!(out.args[0] * 4, out.args[3], "{out:?}");
        }
        for gfn in text.as_chunks().0.iter().take(out.args[0] as usize) {
            let gfn = u64::from(u32::from_le_bytes(*gfn));
            for (id, cpu) in (0..).zip(&self.cpus) {
                let cached = cpu.writable.borrow().values().any(|&g| g == gfn);
                assert!(
                    !cached || !vm.epochs.inside(id),
                    "CPU {id} can write to {gfn:#x}, which was given up"
                );
            }
            for word in self.words(gfn) {
                word.store(0, SeqCst);
            }
            self.lose(gfn);
        }
        0
    }

    fn listed(&self, out: Exit) -> Vec<u32> {
        let text = self.texts.borrow().last().cloned().unwrap_or_default();
        assert_eq!(out.args[0] * 4, out.args[3], "{out:?}");
        let pages = text.as_chunks().0.iter();
        pages
            .take(out.args[0] as usize)
            .map(|page| u32::from_le_bytes(*page))
            .collect()
    }

    /// Takes pool pages: zeroed ones, that no CPU walks.
    pub(super) fn take_pool(&self, out: Exit) -> i64 {
        let vm = self.vm.get().expect("a VM");
        for page in self.listed(out) {
            let words = &self.pool[page as usize];
            assert!(words.iter().all(|w| w.load(SeqCst) == 0), "page {page}");
            for (id, cpu) in (0..).zip(&self.cpus) {
                let walked = cpu.cached.borrow().contains_key(&page);
                assert!(
                    !walked || !vm.epochs.inside(id),
                    "CPU {id} may walk page {page}, which goes"
                );
            }
            assert!(self.pool_taken.borrow_mut().insert(page), "{page} twice");
        }
        0
    }

    /// Gives them back, not always as many as are asked for.
    pub(super) fn fill_pool(&self, out: Exit) -> i64 {
        let pages = self.listed(out);
        let some = pages.len() - pages.len() / 3;
        for page in &pages[..some] {
            assert!(self.pool_taken.borrow_mut().remove(page), "{page} is there");
        }
        some.cast_signed() as i64
    }
}
