//! Frames that the host has taken back: their leaves go.

use super::{Epochs, Mmu, bits, gfn32};
use crate::machine::{Host, Memory};
use blanket_abi::Gfn;
use blanket_abi::layout::REVOKED_BLOCK;
use core::sync::atomic::Ordering::{Relaxed, SeqCst};

/// Frames and leaves that are removed under one hold of the lock.
const BATCH: u32 = 2048;

impl Mmu {
    /// Takes every leaf of `gfn` away, so that the host may have the frame back
    /// once all vCPUs have flushed. Leaves come back by faults.
    pub fn revoke<M: Memory>(&mut self, m: &M, ep: &Epochs, gfn: Gfn) {
        if gfn.0 < self.nr_frames() {
            let mut no_limit = u32::MAX;
            while !self.leaves_remove(m, ep, gfn32(gfn.0), &mut no_limit) {
                no_limit = u32::MAX;
            }
        }
    }

    /// Removes the leaves of all frames that the host has noted in
    /// [`VmPage::revoked`]. False: a batch is done, and more is left.
    ///
    /// No vCPU has a root loaded meanwhile: the host noted them while all were
    /// outside, and nobody loads a root before this has answered true. So it begins
    /// an epoch at its end, which every vCPU has then seen.
    ///
    /// [`VmPage::revoked`]: blanket_abi::device::VmPage::revoked
    pub fn revoke_noted<M: Memory + Host>(&mut self, m: &M, ep: &Epochs) -> bool {
        let blocks = self.nr_frames().div_ceil(REVOKED_BLOCK);
        let (mut left, mut any) = (BATCH, false);
        for (first, summary) in (0..blocks).step_by(64).zip(&m.vm_page().revoked) {
            for bit in bits(summary.load(Relaxed)) {
                any = true;
                let block = first + bit as u64;
                if block < blocks && !self.revoke_block(m, ep, block, &mut left) {
                    return false;
                }
                summary.fetch_and(!(1 << bit), Relaxed);
            }
        }
        if any {
            ep.begin();
        }
        true
    }

    fn revoke_block<M: Memory>(&mut self, m: &M, ep: &Epochs, block: u64, left: &mut u32) -> bool {
        let words = m.revoked(super::idx(block));
        for (first, word) in (block * REVOKED_BLOCK..).step_by(64).zip(words) {
            for bit in bits(word.load(Relaxed)) {
                let gfn = first + bit as u64;
                if gfn < self.nr_frames() && !self.leaves_remove(m, ep, gfn32(gfn), left) {
                    return false;
                }
                word.fetch_and(!(1 << bit), SeqCst);
            }
        }
        true
    }

    /// Removes up to `left` leaves of a frame; false if some may be left.
    pub(super) fn leaves_remove<M: Memory>(
        &mut self,
        m: &M,
        ep: &Epochs,
        gfn: u32,
        left: &mut u32,
    ) -> bool {
        loop {
            let Some(rest) = left.checked_sub(1) else {
                return false;
            };
            *left = rest;
            let loc = self.rmap_any(m, gfn);
            if loc == 0 {
                return true;
            }
            self.leaf_clear(m, ep, loc >> 9, (loc & 511) as usize);
        }
    }
}
