//! The reverse map: for each gfn, the shadow leaves that map it.
//!
//! Most frames have one or two leaves (the direct map and one process), which
//! fit the frame's record. More go into a chain of nodes of 15 leaves each;
//! nodes live in pool pages, 64 to a page. A leaf's location is
//! `pool page * 512 + index`; page 0 is never a shadow, so 0 means none.

use super::{Epochs, Mmu, NODES, Need};
use crate::machine::{Host, Memory};
use core::sync::atomic::Ordering::Relaxed;

const NODE: u32 = 1 << 31;
const WORDS: u32 = 16;
const LEAVES: u32 = WORDS - 1;
const COUNT_SHIFT: u32 = 28;

/// u32 slot `i` of node `node`.
fn load<M: Memory>(m: &M, node: u32, i: u32) -> u32 {
    let word = m.pool(node >> 6)[node_word(node, i)].load(Relaxed);
    super::low(word >> (32 * (i & 1)))
}

fn store<M: Memory>(m: &M, node: u32, i: u32, val: u32) {
    let cell = &m.pool(node >> 6)[node_word(node, i)];
    let shift = 32 * (i & 1);
    let keep = cell.load(Relaxed) & !(0xffff_ffff << shift);
    cell.store(keep | u64::from(val) << shift, Relaxed);
}

const fn node_word(node: u32, i: u32) -> usize {
    ((node & 63) * (WORDS / 2) + i / 2) as usize
}

impl Mmu {
    /// Pages that hold nodes have 64 of them: 64 bytes each.
    fn node_alloc<M: Memory + Host>(&mut self, m: &M, ep: &Epochs) -> Result<u32, Need> {
        if self.node_free == 0 {
            let page = self.alloc(m, ep, NODES)?;
            for i in (0..64).rev() {
                let node = page << 6 | i;
                store(m, node, 0, self.node_free);
                self.node_free = node;
            }
        }
        let node = self.node_free;
        self.node_free = load(m, node, 0);
        Ok(node)
    }

    fn node_release<M: Memory>(&mut self, m: &M, node: u32) {
        store(m, node, 0, self.node_free);
        self.node_free = node;
    }

    /// Gives back all pages of nodes. No leaf may be left.
    pub(super) fn nodes_drop<M: Memory>(&mut self, m: &M, ep: &Epochs) {
        self.node_free = 0;
        for page in 1..self.fresh {
            if self.pool[page as usize].state == NODES {
                for word in m.pool(page) {
                    word.store(0, Relaxed);
                }
                self.release(ep, page);
            }
        }
    }

    #[inline]
    pub(super) fn rmap_add<M: Memory + Host>(
        &mut self,
        m: &M,
        ep: &Epochs,
        gfn: u32,
        loc: u32,
    ) -> Result<(), Need> {
        let r = &mut self.gfns[gfn as usize].rmap;
        if r[0] == 0 {
            r[0] = loc;
            return Ok(());
        }
        if r[1] == 0 {
            r[1] = loc;
            return Ok(());
        }
        self.rmap_add_chain(m, ep, gfn, loc)
    }

    #[cold]
    fn rmap_add_chain<M: Memory + Host>(
        &mut self,
        m: &M,
        ep: &Epochs,
        gfn: u32,
        loc: u32,
    ) -> Result<(), Need> {
        let second = self.gfns[gfn as usize].rmap[1];
        if second & NODE != 0 {
            let node = second & !NODE;
            let head = load(m, node, 0);
            let count = head >> COUNT_SHIFT;
            if count < LEAVES {
                store(m, node, count + 1, loc);
                store(m, node, 0, head + (1 << COUNT_SHIFT));
                return Ok(());
            }
        }
        let node = self.node_alloc(m, ep)?;
        if second & NODE != 0 {
            store(m, node, 0, 1 << COUNT_SHIFT | (second & !NODE));
            store(m, node, 1, loc);
        } else {
            store(m, node, 0, 2 << COUNT_SHIFT);
            store(m, node, 1, second);
            store(m, node, 2, loc);
        }
        self.gfns[gfn as usize].rmap[1] = NODE | node;
        Ok(())
    }

    #[inline]
    pub(super) fn rmap_remove<M: Memory>(&mut self, m: &M, gfn: u32, loc: u32) {
        let r = &mut self.gfns[gfn as usize].rmap;
        if r[0] == loc {
            r[0] = 0;
        } else if r[1] == loc {
            r[1] = 0;
        } else {
            self.rmap_remove_chain(m, gfn, loc);
        }
    }

    #[cold]
    fn rmap_remove_chain<M: Memory>(&mut self, m: &M, gfn: u32, loc: u32) {
        let second = self.gfns[gfn as usize].rmap[1];
        debug_assert!(second & NODE != 0, "a leaf is missing in the reverse map");
        if second & NODE == 0 {
            return;
        }
        let first = second & !NODE;
        let head = load(m, first, 0);
        let count = head >> COUNT_SHIFT;
        let last = load(m, first, count);
        let mut node = first;
        while node != 0 {
            let h = load(m, node, 0);
            for i in 1..=(h >> COUNT_SHIFT) {
                if load(m, node, i) == loc {
                    // The first node's last leaf fills the gap.
                    store(m, node, i, last);
                    if count == 1 {
                        let next = head & ((1 << COUNT_SHIFT) - 1);
                        self.gfns[gfn as usize].rmap[1] = if next == 0 { 0 } else { NODE | next };
                        self.node_release(m, first);
                    } else {
                        store(m, first, 0, head - (1 << COUNT_SHIFT));
                    }
                    return;
                }
            }
            node = h & ((1 << COUNT_SHIFT) - 1);
        }
        debug_assert!(false, "a leaf is missing in the reverse map");
    }

    /// One location that maps `gfn`, or 0.
    pub(super) fn rmap_any<M: Memory>(&self, m: &M, gfn: u32) -> u32 {
        let r = self.gfns[gfn as usize].rmap;
        if r[0] != 0 {
            r[0]
        } else if r[1] & NODE != 0 {
            load(m, r[1] & !NODE, 1)
        } else {
            r[1]
        }
    }

    /// Calls `f` for each location that maps `gfn`; returns the nodes in use.
    pub(super) fn rmap_each<M: Memory>(&self, m: &M, gfn: u32, mut f: impl FnMut(u32)) -> u32 {
        let [first, second] = self.gfns[gfn as usize].rmap;
        if first != 0 {
            f(first);
        }
        if second & NODE == 0 {
            if second != 0 {
                f(second);
            }
            return 0;
        }
        let (mut node, mut nodes) = (second & !NODE, 0);
        while node != 0 && nodes <= self.fresh << 6 {
            let head = load(m, node, 0);
            for i in 1..=(head >> COUNT_SHIFT) {
                f(load(m, node, i));
            }
            node = head & ((1 << COUNT_SHIFT) - 1);
            nodes += 1;
        }
        nodes
    }

    /// Free nodes, counted up to one more than `most`.
    pub(super) fn nodes_free<M: Memory>(&self, m: &M, most: u32) -> u32 {
        let (mut node, mut n) = (self.node_free, 0);
        while node != 0 && n <= most {
            n += 1;
            node = load(m, node, 0);
        }
        n
    }
}
