//! The host is short of memory: shadow pages that nothing uses go back to it.
//!
//! Whoever sees that the host is short (the VMM) sets [`VmPage::reclaim`] and kicks a
//! vCPU. That one flushes all, so that every freed page may be used again
//! (`docs/decisions/0004-retired-page-epochs.md`), takes the free pages off their
//! queue, and leaves with their numbers. When the pool is empty, these pages are filled
//! again before it grows.
//!
//! [`VmPage::reclaim`]: blanket_abi::device::VmPage::reclaim

use crate::context::Context;
use crate::machine::Machine;
use blanket_abi::device::{RUN_DATA, exit};
use core::sync::atomic::Ordering::{Relaxed, SeqCst};

/// Pages that are given at once.
const TRIM: usize = RUN_DATA / 4;
/// Pages that are filled at once.
const FILL: usize = 64;

impl<M: Machine> Context<'_, M> {
    /// Gives pages back if the host wants some.
    pub(crate) fn follow_reclaim(&mut self) {
        let wanted = &self.m.vm_page().reclaim;
        if wanted.load(Relaxed) != 0 && wanted.swap(0, SeqCst) != 0 {
            self.trim();
        }
    }

    #[cold]
    fn trim(&mut self) {
        self.flush_vcpus(u64::MAX);
        let mut all = [[0u8; 4]; TRIM];
        loop {
            let n = self.lock_mmu().trim(&self.vm.epochs, &mut all);
            let Some(list) = all.get(..n).filter(|list| !list.is_empty()) else {
                return;
            };
            let len = self.m.set_data(list.as_flattened());
            self.exit(exit::TRIM, [n as u64, 0, 0, len as u64]);
            let mut mmu = self.lock_mmu();
            mmu.trimmed(list);
            self.m.vm_page().pool_gone.store(mmu.gone().into(), Relaxed);
        }
    }

    /// Has the host fill pages that it got back; false if there are none, or it has no
    /// memory for them.
    pub(crate) fn refill(&mut self) -> bool {
        let mut all = [[0u8; 4]; FILL];
        let n = self.lock_mmu().refill(&mut all);
        let Some(list) = all.get(..n).filter(|list| !list.is_empty()) else {
            return false;
        };
        let len = self.m.set_data(list.as_flattened());
        let filled = self.exit(exit::FILL, [n as u64, 0, 0, len as u64]);
        let filled = usize::try_from(filled).unwrap_or(0);
        let mut mmu = self.lock_mmu();
        mmu.refilled(list, filled);
        self.m.vm_page().pool_gone.store(mmu.gone().into(), Relaxed);
        filled != 0
    }
}
