//! Page faults: what the guest's tables say, and what the shadow lacks.

use super::{Epochs, Mmu, Need, idx};
use crate::machine::{Host, Memory};
use crate::pte;
use blanket_abi::{Gfn, Va};
use core::sync::atomic::Ordering::{Relaxed, SeqCst};

/// The access that faulted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Access {
    /// It was a write.
    pub write: bool,
    /// It was an instruction fetch.
    pub fetch: bool,
}

/// What a fault turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The shadow lacked something that the guest's tables allow; it has it now.
    Fixed,
    /// The guest's tables do not allow the access.
    Guest {
        /// A translation was there, with too few rights.
        present: bool,
    },
    /// A write to a read-only page that is a page table: entry `index` of `gfn`.
    Table {
        /// The table.
        gfn: Gfn,
    },
}

impl Mmu {
    /// Handles a fault at `va` (outside the hypervisor's range) under the root
    /// shadow `root`.
    ///
    /// # Errors
    /// See [`Need`].
    pub fn fault<M: Memory + Host>(
        &mut self,
        m: &M,
        ep: &Epochs,
        root: u32,
        va: Va,
        access: Access,
    ) -> Result<Fault, Need> {
        let absent = Fault::Guest { present: false };
        let denied = Fault::Guest { present: true };
        let mut tables = [Gfn(0); 5];
        let mut entries = [0u64; 5];
        let (mut rw, mut nx) = (true, false);
        tables[4] = self.root_gfn(root);
        for level in [4u8, 3, 2, 1] {
            let l = level as usize;
            let table = tables[l];
            if !self.has(table) {
                return Ok(denied);
            }
            let entry = m.frame(table).ok_or(Need::Frame(table))?[va.index(level)].load(Relaxed);
            if entry & pte::P == 0 {
                return Ok(absent);
            }
            if level > 1 && entry & pte::PS != 0 {
                return Ok(denied);
            }
            rw &= entry & pte::RW != 0;
            nx |= entry & pte::NX != 0;
            entries[l] = entry;
            tables[l - 1] = Gfn(pte::frame(entry));
        }
        let target = tables[0];
        if !self.has(target) {
            return Ok(denied);
        }
        if access.write && !rw {
            let table = self.gfns[idx(target.0)].mark != 0;
            return Ok(if table {
                Fault::Table { gfn: target }
            } else {
                denied
            });
        }
        if access.fetch && nx {
            return Ok(denied);
        }
        if m.frame_pte(target) == 0 {
            return Err(Need::Frame(target));
        }

        let bits = pte::A | if access.write { pte::D } else { 0 };
        let leaf_index = va.index(1);
        let mut leaf = entries[1];
        if leaf & bits != bits {
            let cell = &m.frame(tables[1]).ok_or(Need::Frame(tables[1]))?[leaf_index];
            if cell
                .compare_exchange(leaf, leaf | bits, SeqCst, Relaxed)
                .is_err()
            {
                // The guest changed it meanwhile: let the access fault again.
                return Ok(Fault::Fixed);
            }
            leaf |= bits;
            self.written(tables[1]);
        }
        if access.write {
            self.written(target);
        }

        // Every shadow on the way is held until the end: a leaf that makes a
        // table writable can free shadows.
        let mut path = [root; 4];
        let mut held = 0;
        let mut done = Ok(());
        for level in [3u8, 2, 1] {
            let l = level as usize;
            // A frame can have lost its mark (it was mapped writable) while the
            // tables above still point at it.
            match self
                .mark_tree(m, ep, tables[l], level)
                .and_then(|()| self.shadow_make(m, ep, tables[l], level))
            {
                Ok(child) => {
                    self.pool[child as usize].refs += 1;
                    self.link(
                        m,
                        ep,
                        path[held],
                        va.index(level + 1),
                        child,
                        entries[l + 1],
                    );
                    held += 1;
                    path[held] = child;
                }
                Err(e) => {
                    done = Err(e);
                    break;
                }
            }
        }
        if done.is_ok() {
            let page = path[3];
            if self.pool[page as usize].live == 0 {
                self.prefill(m, ep, page);
            }
            done = self.leaf_set(m, ep, page, leaf_index, leaf);
            if done.is_ok() {
                self.neighbours(m, ep, page, tables[1], leaf_index);
            }
        }
        for &page in &path[1..=held] {
            self.put(m, ep, page);
        }
        done.map(|()| Fault::Fixed)
    }

    /// Fills the empty leaves around one that faulted: the host gives frames in
    /// blocks, so what was missing for one was likely missing for all.
    fn neighbours<M: Memory + Host>(
        &mut self,
        m: &M,
        ep: &Epochs,
        page: u32,
        table: Gfn,
        index: usize,
    ) {
        let Some(words) = m.frame(table) else { return };
        let first = index & !15;
        for (i, word) in words.iter().enumerate().skip(first).take(16) {
            if m.pool(page)[i].load(Relaxed) == 0 {
                let guest = word.load(Relaxed);
                if guest & (pte::P | pte::A) == (pte::P | pte::A)
                    && self.leaf_set(m, ep, page, i, guest).is_err()
                {
                    return;
                }
            }
        }
    }
}
