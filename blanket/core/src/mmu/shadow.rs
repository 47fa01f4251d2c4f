//! Making, filling, linking and dropping shadows.

use super::{
    Epochs, FREE, GROUP, Mmu, Need, PoolInfo, SHADOW, USER_ROOT, WRAPPER, bits, gfn32, idx,
    occupied,
};
use crate::machine::{Host, Memory};
use crate::pte;
use blanket_abi::Gfn;
use core::sync::atomic::Ordering::Relaxed;

/// First and last L4 index of the hypervisor's slots.
const HOLE: core::ops::Range<usize> = 256..272;

impl Mmu {
    /// The shadow of (gfn, level), if there is one.
    #[inline]
    pub(super) fn shadow_of(&self, gfn: u64, level: u8) -> Option<u32> {
        let mut page = self.gfns.get(idx(gfn))?.shadow;
        while page != 0 {
            let p = &self.pool[page as usize];
            if p.level == level {
                return Some(page);
            }
            page = p.next;
        }
        None
    }

    /// The shadow of (gfn, level), made and filled if it must be. The gfn must
    /// be marked for the level.
    pub(super) fn shadow_make<M: Memory + Host>(
        &mut self,
        m: &M,
        ep: &Epochs,
        gfn: Gfn,
        level: u8,
    ) -> Result<u32, Need> {
        if let Some(page) = self.shadow_of(gfn.0, level) {
            return Ok(page);
        }
        if m.frame(gfn).is_none() {
            return Err(Need::Frame(gfn));
        }
        let page = self.alloc(m, ep, SHADOW)?;
        if level >= 4 && self.la57 {
            match self.alloc(m, ep, WRAPPER) {
                Ok(wrapper) => {
                    m.gfns(page)[HOLE.start].store(wrapper, Relaxed);
                    let entry = m.pool_pte(page) | pte::P | pte::RW | pte::U | pte::A;
                    m.pool(wrapper)[0].store(entry, Relaxed);
                    m.pool(wrapper)[511].store(entry, Relaxed);
                }
                Err(e) => {
                    self.release(ep, page);
                    return Err(e);
                }
            }
        }
        self.made += 1;
        let info = &mut self.gfns[idx(gfn.0)];
        self.pool[page as usize] = PoolInfo {
            gfn: gfn32(gfn.0),
            next: info.shadow,
            // Held while it is filled: filling can free what nobody refers to.
            refs: 1,
            level,
            state: SHADOW,
            live: 0,
            groups: 0,
        };
        info.shadow = page;
        if level >= 4 {
            for (slot, &entry) in HOLE.zip(&self.hole) {
                let hide = level == USER_ROOT && slot == HOLE.start;
                m.pool(page)[slot].store(if hide { 0 } else { entry }, Relaxed);
            }
        }
        // Middle tables are left to faults: in a new process nothing below exists.
        match level {
            1 => self.prefill(m, ep, page),
            4.. => self.link_kernel_half(m, ep, page),
            _ => {}
        }
        self.pool[page as usize].refs -= 1;
        Ok(page)
    }

    /// Fills an L1 shadow from its guest table, as far as the frames are there.
    pub(super) fn prefill<M: Memory + Host>(&mut self, m: &M, ep: &Epochs, page: u32) {
        let gfn = self.pool[page as usize].gfn;
        let Some(words) = m.frame(Gfn(u64::from(gfn))) else {
            return;
        };
        for group in bits(occupied(words, 0..64)) {
            let first = group * GROUP;
            for (i, word) in (first..).zip(&words[first..first + GROUP]) {
                let guest = word.load(Relaxed);
                // Short of pool pages for the reverse map: the rest comes by faults.
                if guest & pte::P != 0 && self.leaf_set(m, ep, page, i, guest).is_err() {
                    return;
                }
            }
        }
    }

    /// Links a root to the shadows of the kernel's tables, which all processes share.
    fn link_kernel_half<M: Memory + Host>(&mut self, m: &M, ep: &Epochs, page: u32) {
        let gfn = self.pool[page as usize].gfn;
        let Some(words) = m.frame(Gfn(u64::from(gfn))) else {
            return;
        };
        for group in bits(occupied(words, HOLE.end / GROUP..64)) {
            let first = group * GROUP;
            for (i, word) in (first..).zip(&words[first..first + GROUP]) {
                let guest = word.load(Relaxed);
                if guest & (pte::P | pte::PS) == pte::P
                    && let Some(child) = self.shadow_of(pte::frame(guest), 3)
                {
                    self.link(m, ep, page, i, child, guest);
                }
            }
        }
    }

    /// Makes leaf `i` of an L1 shadow say what `guest` says, as far as the frame
    /// is there and accessed and dirty bits allow.
    #[inline]
    pub(super) fn leaf_set<M: Memory + Host>(
        &mut self,
        m: &M,
        ep: &Epochs,
        page: u32,
        i: usize,
        guest: u64,
    ) -> Result<(), Need> {
        let mut new = 0;
        let mut new_gfn = 0;
        let gfn = pte::frame(guest);
        if guest & (pte::P | pte::A) == (pte::P | pte::A) && self.has(Gfn(gfn)) {
            let host = m.frame_pte(Gfn(gfn));
            if host != 0 {
                new_gfn = gfn32(gfn);
                new = host | pte::P | pte::U | pte::A | (guest & pte::NX);
                if guest & (pte::RW | pte::D) == (pte::RW | pte::D) && self.may_write(gfn) {
                    new |= pte::RW | pte::D;
                    if self.gfns[idx(gfn)].mark != 0 {
                        self.untable(m, ep, new_gfn);
                    }
                }
            }
        }
        let cell = &m.pool(page)[i];
        let old = cell.load(Relaxed);
        if old == new {
            return Ok(());
        }
        let names = &m.gfns(page)[i];
        let same = old != 0 && new != 0 && names.load(Relaxed) == new_gfn;
        if old != 0 && !same {
            self.leaf_clear(m, ep, page, i);
        }
        if new != 0 {
            if !same {
                self.rmap_add(m, ep, new_gfn, location(page, i))?;
                names.store(new_gfn, Relaxed);
                self.note_entry(page, i);
            }
            cell.store(new, Relaxed);
            if same && old & !new & pte::RW != 0 {
                self.note_write_protected(ep, new_gfn);
            }
        }
        Ok(())
    }

    /// Takes away leaf `i` of an L1 shadow, if there is one.
    #[inline]
    pub(super) fn leaf_clear<M: Memory>(&mut self, m: &M, ep: &Epochs, page: u32, i: usize) {
        let cell = &m.pool(page)[i];
        let old = cell.load(Relaxed);
        if old != 0 {
            cell.store(0, Relaxed);
            let gfn = m.gfns(page)[i].load(Relaxed);
            self.rmap_remove(m, gfn, location(page, i));
            self.pool[page as usize].live -= 1;
            if old & pte::RW != 0 {
                self.note_write_protected(ep, gfn);
            }
        }
    }

    /// Makes entry `i` of a non-leaf shadow point at `child`, with the rights of
    /// the guest's entry.
    pub(super) fn link<M: Memory + Host>(
        &mut self,
        m: &M,
        ep: &Epochs,
        page: u32,
        i: usize,
        child: u32,
        guest: u64,
    ) {
        let new = m.pool_pte(child) | pte::P | pte::U | pte::A | (guest & (pte::RW | pte::NX));
        let old = m.pool(page)[i].load(Relaxed);
        if old == new {
            return;
        }
        self.pool[child as usize].refs += 1;
        if old != 0 {
            self.unlink(m, ep, page, i);
        }
        m.gfns(page)[i].store(child, Relaxed);
        m.pool(page)[i].store(new, Relaxed);
        self.note_entry(page, i);
    }

    /// Counts a new entry.
    #[inline]
    fn note_entry(&mut self, page: u32, i: usize) {
        let p = &mut self.pool[page as usize];
        p.live += 1;
        p.groups |= 1 << (i / GROUP);
    }

    /// Clears entry `i` of a non-leaf shadow.
    pub(super) fn unlink<M: Memory + Host>(&mut self, m: &M, ep: &Epochs, page: u32, i: usize) {
        let cell = &m.pool(page)[i];
        if cell.load(Relaxed) == 0 {
            return;
        }
        cell.store(0, Relaxed);
        self.pool[page as usize].live -= 1;
        let child = m.gfns(page)[i].load(Relaxed);
        self.put(m, ep, child);
    }

    /// Drops one reference. A shadow that nobody refers to is freed, unless the
    /// guest still keeps the table (it is then likely to come back).
    pub(super) fn put<M: Memory + Host>(&mut self, m: &M, ep: &Epochs, page: u32) {
        let p = &mut self.pool[page as usize];
        p.refs -= 1;
        if p.refs == 0 && self.gfns[p.gfn as usize].mark & mark_bit(p.level) == 0 {
            self.free(m, ep, page);
        }
    }

    /// Clears every entry of a shadow; it stays bound.
    pub(super) fn empty<M: Memory + Host>(&mut self, m: &M, ep: &Epochs, page: u32) {
        let PoolInfo { level, groups, .. } = self.pool[page as usize];
        self.pool[page as usize].groups = 0;
        for group in bits(groups) {
            for i in group * GROUP..(group + 1) * GROUP {
                if level == 1 {
                    self.leaf_clear(m, ep, page, i);
                } else if !(level >= 4 && HOLE.contains(&i)) {
                    self.unlink(m, ep, page, i);
                }
            }
        }
    }

    fn free<M: Memory + Host>(&mut self, m: &M, ep: &Epochs, page: u32) {
        self.empty(m, ep, page);
        let PoolInfo {
            gfn, next, level, ..
        } = self.pool[page as usize];
        // Take it out of the gfn's chain (at most five long).
        let head = self.gfns[gfn as usize].shadow;
        if head == page {
            self.gfns[gfn as usize].shadow = next;
        } else {
            let mut prev = head;
            while prev != 0 && self.pool[prev as usize].next != page {
                prev = self.pool[prev as usize].next;
            }
            if prev != 0 {
                self.pool[prev as usize].next = next;
            }
        }
        if level >= 4 {
            for slot in HOLE {
                m.pool(page)[slot].store(0, Relaxed);
            }
            if self.la57 {
                let wrapper = self.wrapper(m, page);
                m.pool(wrapper)[0].store(0, Relaxed);
                m.pool(wrapper)[511].store(0, Relaxed);
                self.release(ep, wrapper);
            }
        }
        self.release(ep, page);
    }

    /// The frame is no table any more: its shadows are emptied, and freed unless
    /// something still refers to them.
    pub(super) fn untable<M: Memory + Host>(&mut self, m: &M, ep: &Epochs, gfn: u32) {
        self.gfns[gfn as usize].mark = 0;
        for page in self.shadows(gfn) {
            if self.is_shadow(page, gfn) {
                self.empty(m, ep, page);
            }
            if self.is_shadow(page, gfn) && self.pool[page as usize].refs == 0 {
                self.free(m, ep, page);
            }
        }
    }

    /// The shadows of a gfn, one for each level at most; 0 = none. Work on one
    /// of them can free another, so each is checked with [`Self::is_shadow`].
    pub(super) fn shadows(&self, gfn: u32) -> [u32; 5] {
        let mut all = [0; 5];
        let mut page = self.gfns[gfn as usize].shadow;
        for slot in &mut all {
            *slot = page;
            page = self.pool[page as usize].next;
            if page == 0 {
                break;
            }
        }
        all
    }

    /// Whether `page` still is a shadow of `gfn`.
    pub(super) fn is_shadow(&self, page: u32, gfn: u32) -> bool {
        let p = &self.pool[page as usize];
        page != 0 && p.state == SHADOW && p.gfn == gfn
    }

    /// Drops every shadow; those that a vCPU has loaded as a root stay, empty.
    pub fn drop_all<M: Memory + Host>(&mut self, m: &M, ep: &Epochs) {
        for page in 1..self.fresh {
            if self.pool[page as usize].state == SHADOW {
                self.empty(m, ep, page);
            }
        }
        self.nodes_drop(m, ep);
        for page in 1..self.fresh {
            let p = self.pool[page as usize];
            if p.state == SHADOW && p.refs == 0 {
                self.free(m, ep, page);
            }
        }
        debug_assert!(self.pool[0].state == FREE);
    }

    /// Loads a root for a vCPU: returns the shadow to use, with a reference.
    ///
    /// # Errors
    /// See [`Need`].
    pub fn root_get<M: Memory + Host>(
        &mut self,
        m: &M,
        ep: &Epochs,
        gfn: Gfn,
        user: bool,
    ) -> Result<u32, Need> {
        self.mark_tree(m, ep, gfn, 4)?;
        let page = self.shadow_make(m, ep, gfn, if user { USER_ROOT } else { 4 })?;
        self.pool[page as usize].refs += 1;
        Ok(page)
    }

    /// Gives back a root that [`Self::root_get`] returned.
    pub fn root_put<M: Memory + Host>(&mut self, m: &M, ep: &Epochs, page: u32) {
        if page != 0 {
            self.put(m, ep, page);
        }
    }

    /// The value for CR3 that walks `page`.
    #[must_use]
    pub fn root_cr3<M: Memory>(&self, m: &M, page: u32) -> u64 {
        if self.la57 {
            m.pool_pte(self.wrapper(m, page))
        } else {
            m.pool_pte(page)
        }
    }

    /// The page above root `page` on a host with 5-level paging. Its number is kept
    /// in a slot of the hypervisor, where a root has no child.
    pub(super) fn wrapper<M: Memory>(&self, m: &M, page: u32) -> u32 {
        m.gfns(page)[HOLE.start].load(Relaxed)
    }

    /// gfn of the guest table that root `page` shadows.
    #[must_use]
    pub fn root_gfn(&self, page: u32) -> Gfn {
        Gfn(u64::from(self.pool[page as usize].gfn))
    }
}

/// A leaf's place, as the reverse map keeps it.
#[allow(clippy::cast_possible_truncation, reason = "an index below 512")]
pub(super) const fn location(page: u32, i: usize) -> u32 {
    page << 9 | (i as u32 & 511)
}

/// Bit in a gfn's mark for a shadow level.
pub(super) const fn mark_bit(level: u8) -> u8 {
    if level >= 4 { 8 } else { 1 << (level - 1) }
}
