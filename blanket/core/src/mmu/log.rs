//! The dirty log: which frames were written since it was taken last.
//!
//! While it is on, a leaf allows writes only if its frame is noted as written. The first
//! write to any other frame faults, is noted, and makes that leaf writable. What the core
//! writes itself on the guest's behalf it notes where it writes. Taking the log forgets
//! the notes and takes the right to write from all leaves again, so that it is complete: no
//! write comes between, since all vCPUs stand still for it, and they flush their TLBs
//! before they go on. It goes through the leaves by pages and not by the reverse map: how
//! many leaves a frame has is the guest's choice, and a page has 512.
//!
//! Not noted are the frames that the core writes at any moment (`arrive.rs`, standing
//! frames), those above the RAM, and what backends write: whoever takes the log adds them.

use super::{Epochs, GROUP, Mmu, SHADOW, WRITTEN, bits, idx};
use crate::machine::Memory;
use crate::pte;
use blanket_abi::Gfn;
use core::sync::atomic::Ordering::Relaxed;

/// Frames of which the log is taken together.
pub const LOG_STEP: u64 = 64;

impl Mmu {
    /// Whether a leaf of the frame may allow writes. `gfn` is one of the VM's.
    #[inline]
    pub(super) fn may_write(&self, gfn: u64) -> bool {
        !self.logging || self.gfns[idx(gfn)].flags & WRITTEN != 0
    }

    /// Notes that a frame is written.
    #[inline]
    pub fn written(&mut self, gfn: Gfn) {
        if self.logging
            && let Some(info) = self.gfns.get_mut(idx(gfn.0))
        {
            info.flags |= WRITTEN;
        }
    }

    /// Begins to note what is written: from here on no leaf that is made allows writes, but
    /// of frames that were noted. Those that are there do until [`Self::log_protect`] has been through all pages.
    /// Notes of an earlier log count as such of this one.
    pub fn log_begin(&mut self) {
        self.logging = true;
    }

    /// Ceases to note what is written. Leaves become writable by faults.
    pub fn log_end(&mut self) {
        self.logging = false;
    }

    /// Takes the right to write from all leaves of pool page `page`; false if there is
    /// none of this number, nor of a higher one.
    pub fn log_protect<M: Memory>(&mut self, m: &M, ep: &Epochs, page: u32) -> bool {
        if page >= self.fresh {
            return false;
        }
        let info = self.pool[page as usize];
        if info.state == SHADOW && info.level == 1 {
            for group in bits(info.groups) {
                for i in group * GROUP..(group + 1) * GROUP {
                    let cell = &m.pool(page)[i];
                    let leaf = cell.load(Relaxed);
                    if leaf & pte::RW != 0 {
                        cell.store(leaf & !(pte::RW | pte::D), Relaxed);
                        self.note_write_protected(ep, m.gfns(page)[i].load(Relaxed));
                    }
                }
            }
        }
        true
    }

    /// Takes the notes of [`LOG_STEP`] frames from `first` on: bit *n* is set if frame
    /// `first` + *n* was written. Their leaves allow writes until [`Self::log_protect`] has
    /// been through all pages.
    pub fn log_take(&mut self, first: u64) -> u64 {
        let mut taken = 0;
        for (bit, gfn) in (first..self.nr_frames().min(first + LOG_STEP)).enumerate() {
            // What was never written is not written here either, see `without`.
            let info = &mut self.gfns[idx(gfn)];
            if info.flags & WRITTEN != 0 {
                info.flags &= !WRITTEN;
                taken |= 1 << bit;
            }
        }
        taken
    }
}
