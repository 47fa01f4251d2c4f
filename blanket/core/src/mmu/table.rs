//! Marks, and writes to guest page tables.

use super::shadow::mark_bit;
use super::{Epochs, GROUP, Mmu, Need, PoolInfo, bits, gfn32, idx, occupied};

use crate::machine::{Host, Memory};
use crate::pte;
use blanket_abi::Gfn;
use core::sync::atomic::Ordering::{Relaxed, SeqCst};

/// Groups of the hypervisor's slots in a root.
const HOLE_GROUPS: u64 = 3 << (256 / GROUP);

impl Mmu {
    /// Marks the tree below `gfn`, a table of `level` (1 to 4).
    ///
    /// # Errors
    /// See [`Need`]; what was marked stays marked.
    pub fn mark_tree<M: Memory + Host>(
        &mut self,
        m: &M,
        ep: &Epochs,
        gfn: Gfn,
        level: u8,
    ) -> Result<(), Need> {
        let bit = mark_bit(level);
        match self.gfns.get(idx(gfn.0)) {
            Some(info) if info.mark & bit == 0 && self.has(gfn) => {
                if info.mark == 0 {
                    self.settled(ep, gfn32(gfn.0))?;
                }
            }
            _ => return Ok(()),
        }
        if level > 1 {
            self.spend()?;
            let words = m.frame(gfn).ok_or(Need::Frame(gfn))?;
            let mut groups = occupied(words, 0..64);
            if level == 4 {
                groups &= !HOLE_GROUPS;
            }
            for group in bits(groups) {
                for word in &words[group * GROUP..(group + 1) * GROUP] {
                    let entry = word.load(Relaxed);
                    if entry & (pte::P | pte::PS) == pte::P {
                        self.mark_tree(m, ep, Gfn(pte::frame(entry)), level - 1)?;
                    }
                }
            }
        }
        self.gfns[idx(gfn.0)].mark |= bit;
        Ok(())
    }

    /// Writes entry `i` of frame `gfn`: `f` gives the new value for the old one
    /// and may be called again. Shadows follow. A frame that is no table is
    /// plain memory. Returns the old value and the new one.
    ///
    /// # Errors
    /// See [`Need`]; nothing has been written then.
    #[inline]
    pub fn write_entry<M: Memory + Host>(
        &mut self,
        m: &M,
        ep: &Epochs,
        gfn: Gfn,
        i: usize,
        mut f: impl FnMut(u64) -> u64,
    ) -> Result<(u64, u64), Need> {
        let cell = &m.frame(gfn).ok_or(Need::Frame(gfn))?[i & 511];
        let mark = self.gfns[idx(gfn.0)].mark;
        let mut old = cell.load(Relaxed);
        loop {
            let new = f(old);
            if mark & !1 != 0 && new & pte::P != 0 {
                for level in 2..=4 {
                    let hole = level == 4 && (256..272).contains(&(i & 511));
                    if mark & mark_bit(level) != 0 && !hole && new & pte::PS == 0 {
                        self.mark_tree(m, ep, Gfn(pte::frame(new)), level - 1)?;
                    }
                }
            }
            match cell.compare_exchange(old, new, SeqCst, Relaxed) {
                Ok(_) => {
                    self.written(gfn);
                    if mark != 0 && old != new {
                        self.entry_changed(m, ep, gfn, i & 511, new);
                    }
                    return Ok((old, new));
                }
                Err(now) => old = now,
            }
        }
    }

    /// Brings the shadows of a table up to date with its entry `i`.
    #[inline]
    fn entry_changed<M: Memory + Host>(
        &mut self,
        m: &M,
        ep: &Epochs,
        gfn: Gfn,
        i: usize,
        new: u64,
    ) {
        let gfn = gfn32(gfn.0);
        let first = self.gfns[gfn as usize].shadow;
        if first == 0 {
            return;
        }
        let PoolInfo { level, next, .. } = self.pool[first as usize];
        if level == 1 && next == 0 {
            // Nearly always: one shadow, a leaf table.
            self.leaf_follow(m, ep, first, i, new);
            return;
        }
        for page in self.shadows(gfn) {
            if !self.is_shadow(page, gfn) {
                continue;
            }
            let level = self.pool[page as usize].level;
            if level == 1 {
                self.leaf_follow(m, ep, page, i, new);
            } else if !(level >= 4 && (256..272).contains(&i)) {
                let below = if level >= 4 { 3 } else { level - 1 };
                let child = (new & (pte::P | pte::PS) == pte::P)
                    .then(|| self.shadow_of(pte::frame(new), below))
                    .flatten();
                match child {
                    Some(child) => self.link(m, ep, page, i, child, new),
                    None => self.unlink(m, ep, page, i),
                }
            }
        }
    }

    /// Makes leaf `i` of an L1 shadow follow its table. The shadow is held: a leaf
    /// that makes a table writable frees shadows, this one perhaps.
    #[inline]
    fn leaf_follow<M: Memory + Host>(&mut self, m: &M, ep: &Epochs, page: u32, i: usize, new: u64) {
        if new & (pte::P | pte::A) != (pte::P | pte::A) {
            // None is made: nothing can go but the leaf.
            self.leaf_clear(m, ep, page, i);
            return;
        }
        self.pool[page as usize].refs += 1;
        if self.leaf_set(m, ep, page, i, new).is_err() {
            // No room for the reverse map: the leaf is left to a fault.
            self.leaf_clear(m, ep, page, i);
        }
        self.put(m, ep, page);
    }

    /// Walks the guest tables from root `gfn` to the leaf table that maps `va`
    /// and returns it.
    ///
    /// # Errors
    /// See [`Need`]; `Ok(None)` when a level is missing.
    pub fn leaf_table<M: Memory + Host>(
        &self,
        m: &M,
        root: Gfn,
        va: blanket_abi::Va,
    ) -> Result<Option<Gfn>, Need> {
        let mut gfn = root;
        for level in [4, 3, 2] {
            if !self.has(gfn) {
                return Ok(None);
            }
            let entry = m.frame(gfn).ok_or(Need::Frame(gfn))?[va.index(level)].load(Relaxed);
            if entry & (pte::P | pte::PS) != pte::P {
                return Ok(None);
            }
            gfn = Gfn(pte::frame(entry));
        }
        Ok(self.has(gfn).then_some(gfn))
    }
}
