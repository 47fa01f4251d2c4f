//! Frames that the guest has given up (`memory_op`, `decrease_reservation`), or has not
//! got yet: the host has their memory, and nothing of the guest's may lead to them until
//! it has asked for them.
//!
//! Everything that takes a frame number from the guest asks [`Mmu::has`], under the
//! MMU lock and right where the number is used: tables on a walk, leaves, roots, what
//! hypercalls name. A frame that is out is treated like one that never existed.

use super::{Epochs, Mmu, Need, TURNED, gfn32, idx};
use crate::machine::{Host, Memory};
use blanket_abi::Gfn;
use blanket_abi::state::mark;

/// Leaves of one frame that are removed under one hold of the lock.
const LEAVES: u32 = 2048;

impl Mmu {
    /// The guest has not got the frames from `first` to before `end` at the start. Said
    /// once, before anything else is done. Their records are not written, so that what
    /// the guest never asks for costs no memory.
    #[must_use]
    pub fn without(mut self, first: u64, end: u64) -> Self {
        let end = end.min(self.nr_frames());
        if first < end {
            self.later = (first, end);
            self.out = end - first;
            self.whole = first;
        }
        self
    }

    /// Whether the guest has the frame: there is one of this number, and it has not been
    /// given up, or is back.
    #[inline]
    #[must_use]
    pub fn has(&self, gfn: Gfn) -> bool {
        gfn.0 < self.whole || self.has_by_record(gfn)
    }

    #[inline(never)]
    pub(super) fn has_by_record(&self, gfn: Gfn) -> bool {
        let later = gfn.0 >= self.later.0 && gfn.0 < self.later.1;
        self.gfns
            .get(idx(gfn.0))
            .is_some_and(|info| (info.flags & TURNED != 0) == later)
    }

    /// Frames of RAM that the guest has not got.
    #[must_use]
    pub fn out(&self) -> u64 {
        self.out
    }

    /// What a frame is to the guest, for [`Self::set_mark`] ([`blanket_abi::state::mark`]).
    #[must_use]
    pub fn mark_of(&self, gfn: Gfn) -> u8 {
        let levels = self.gfns.get(idx(gfn.0)).map_or(0, |info| info.mark);
        levels & mark::LEVELS | if self.has(gfn) { 0 } else { mark::OUT }
    }

    /// Makes a frame what another core's MMU had it for; before anything else is done
    /// with it.
    pub fn set_mark(&mut self, gfn: Gfn, byte: u8) {
        let (has, out) = (self.has(gfn), byte & mark::OUT != 0);
        let Some(info) = self.gfns.get_mut(idx(gfn.0)) else {
            return;
        };
        // A frame that is out is no table.
        let levels = if out { 0 } else { byte & mark::LEVELS };
        // What is as it was is not written, see `without`.
        if info.mark != levels {
            info.mark = levels;
        }
        if has == out {
            info.flags ^= TURNED;
            if out {
                self.goes_out(gfn);
            } else {
                self.out = self.out.saturating_sub(1);
            }
        }
    }

    fn goes_out(&mut self, gfn: Gfn) {
        self.out += 1;
        self.whole = self.whole.min(gfn.0);
    }

    /// The guest gives a frame up. False: it has not got it, or the frame is a table
    /// that other tables or vCPUs refer to; nothing has changed then. A mark alone is
    /// no reason: marks stay when a guest is done with a table.
    ///
    /// TLBs may hold translations of the frame until all vCPUs have flushed.
    ///
    /// # Errors
    /// See [`Need`]: more leaves than are removed in one go.
    pub fn give_up<M: Memory + Host>(
        &mut self,
        m: &M,
        ep: &Epochs,
        gfn: Gfn,
    ) -> Result<bool, Need> {
        if !self.has(gfn) {
            return Ok(false);
        }
        let nr = gfn32(gfn.0);
        let used = |&page: &u32| self.is_shadow(page, nr) && self.pool[page as usize].refs != 0;
        if self.shadows(nr).iter().any(used) {
            return Ok(false);
        }
        let mut left = LEAVES;
        if !self.leaves_remove(m, ep, nr, &mut left) {
            return Err(Need::Breath);
        }
        self.untable(m, ep, nr);
        self.gfns[nr as usize].flags ^= TURNED;
        // Whatever was in it is gone.
        self.written(gfn);
        self.goes_out(gfn);
        Ok(true)
    }

    /// The guest gets a frame, as long as more than `floor` frames are out. False:
    /// it has it already, or may not have more.
    pub fn take_in(&mut self, gfn: Gfn, floor: u64) -> bool {
        if gfn.0 >= self.nr_frames() || self.has(gfn) || self.out <= floor {
            return false;
        }
        self.gfns[idx(gfn.0)].flags ^= TURNED;
        self.written(gfn);
        self.out -= 1;
        true
    }
}
