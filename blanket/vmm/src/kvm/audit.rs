//! What the page tables of a KVM VM map: a walk of every root, as `blanket.ko` does
//! it for its own VMs (`blanket/kmod/audit.c`).
//!
//! Whose a frame is comes from others than the tables: the guest's frames are a
//! memory slot, and the pages of the other slot were noted by what they were given
//! out for. Which pages of the pool are roots is the core's word; the roots that
//! vCPUs have loaded must be among them.

use std::collections::HashSet;
use std::sync::atomic::Ordering;

use blanket_abi::PAGE_SIZE;
use blanket_abi::device::{Audit, audit};
use blanket_abi::kvm::RAM_BASE;
use blanket_abi::layout::{
    HOLE_END_SLOT, HOLE_FIRST_SLOT, IMAGE, M2P, POOL_INFO_SIZE, POOL_INFO_STATE, POOL_KERNEL_ROOT,
    POOL_SHADOW, POOL_USER_ROOT, VCPU, VCPU_STRIDE, WINDOW, vcpu as area,
};

use super::Error;
use super::space::{
    RECURSIVE, RO, RW, RX, SLOT_CORE, SLOT_M2P, SLOT_POOL, SLOT_WINDOW, SLOTS, Space, USER_RO,
    entry,
};

/// What a page of the core's memory was given out for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// A table of the hypervisor's slots.
    Table,
    /// The root that the core starts on.
    Root,
    /// Code of the image.
    Text,
    /// Data that nobody changes.
    Rodata,
    /// Any other data of the core.
    Data,
    /// The identity table.
    M2p,
    /// The shadow pool.
    Pool,
}

/// Bits of an entry that are not the frame's.
const FLAGS: u64 = !entry::FRAME;
const LINK_BITS: u64 = entry::P | entry::RW | entry::US | entry::A | entry::D | entry::NX;

struct Walk<'a> {
    space: &'a Space,
    /// Tables that were walked, with their levels.
    seen: HashSet<(u64, u32)>,
    out: Audit,
}

impl Space {
    /// Walks all roots. The VM must stand still, its core in the middle of nothing.
    ///
    /// # Errors
    /// None that a built space has.
    pub fn audit(&self) -> Result<Audit, Error> {
        let mut walk = Walk {
            space: self,
            seen: HashSet::new(),
            out: Audit {
                frames: self.frames,
                ..Audit::default()
            },
        };
        for slot in 0..SLOTS {
            let va = M2P + slot as u64 * step(4);
            walk.own_table(slot, walk.hole_entry(slot), 3, va)?;
        }
        if let Some(l3) = self.entry_l3 {
            walk.entry_table(self.base + l3, 3, IMAGE)?;
        }
        walk.core_roots()?;
        walk.start_root()?;
        for hw in &self.switches {
            for root in [area::KERNEL_CR3, area::USER_CR3] {
                walk.loaded_root(walk.word(hw - area::HW + root)?);
            }
        }
        Ok(walk.out)
    }
}

/// Bytes that one entry of a table translates.
fn step(level: u32) -> u64 {
    1 << (12 + 9 * (level - 1))
}

impl Walk<'_> {
    fn broken(&mut self, rule: u32, level: u32, va: u64, entry: u64) {
        if self.out.broken == 0 {
            (self.out.rule, self.out.level) = (rule, level);
            (self.out.va, self.out.entry) = (va, entry & FLAGS);
        }
        self.out.broken += 1;
    }

    fn word(&self, offset: u64) -> Result<u64, Error> {
        Ok(self.space.word(offset)?.load(Ordering::Relaxed))
    }

    /// What the frame of an entry was given out for, if it is the core's.
    fn purpose(&self, entry: u64) -> Option<Use> {
        let offset = (entry & entry::FRAME).checked_sub(self.space.base)?;
        let uses = &self.space.uses;
        let at = uses.partition_point(|(end, _)| *end <= offset);
        uses.get(at).map(|(_, what)| *what)
    }

    /// The guest's frame of an entry, if it is one.
    fn gfn(&self, entry: u64) -> Option<u64> {
        let gfn = (entry & entry::FRAME).checked_sub(RAM_BASE)? / PAGE_SIZE;
        (gfn < self.space.frames).then_some(gfn)
    }

    /// The entries of a table of the core's memory.
    fn table(&self, entry: u64) -> Result<Vec<u64>, Error> {
        let at = (entry & entry::FRAME) - self.space.base;
        (0..512).map(|i| self.word(at + i * 8)).collect()
    }

    // ---- the guest's part ----

    fn guest_table(&mut self, at: u64, level: u32, va: u64, user: bool) -> Result<(), Error> {
        if self.purpose(at) != Some(Use::Pool) {
            self.broken(audit::TABLE, level + 1, va, at);
            return Ok(());
        }
        if !self.seen.insert((at & entry::FRAME, level)) {
            return Ok(());
        }
        self.out.tables += 1;
        for (i, word) in self.table(at)?.into_iter().enumerate() {
            let mut here = va + i as u64 * step(level);
            if level == 4 && i >= 256 {
                here |= 0xffff << 48;
            }
            if level == 4 && (HOLE_FIRST_SLOT..HOLE_END_SLOT).contains(&i) {
                let slot = i - HOLE_FIRST_SLOT;
                let hidden = user && slot == SLOT_M2P;
                let want = match (self.space.entry_l3, slot) {
                    _ if hidden => 0,
                    (None, _) | (_, SLOT_M2P) => self.hole_entry(slot),
                    (Some(l3), SLOT_CORE) => {
                        (self.space.base + l3) | entry::P | entry::RW | entry::A
                    }
                    _ => 0,
                };
                if word != want {
                    self.broken(audit::HOLE, level, here, word);
                }
                continue;
            }
            self.guest_entry(word, level, here)?;
        }
        Ok(())
    }

    fn guest_entry(&mut self, word: u64, level: u32, va: u64) -> Result<(), Error> {
        if word & entry::P == 0 {
            if word != 0 {
                self.broken(audit::ABSENT, level, va, word);
            }
            return Ok(());
        }
        if word & FLAGS & !LINK_BITS != 0 {
            self.broken(audit::BITS, level, va, word);
        }
        if word & entry::US == 0 {
            self.broken(audit::RIGHTS, level, va, word);
        }
        if level > 1 {
            return self.guest_table(word, level - 1, va, false);
        }
        self.out.leaves += 1;
        self.out.writable += u64::from(word & entry::RW != 0);
        if self.gfn(word).is_none() {
            self.broken(audit::FOREIGN, level, va, word);
        }
        Ok(())
    }

    // ---- the hypervisor's part ----

    /// The level-4 entry of one of the hypervisor's slots, as it must be.
    fn hole_entry(&self, slot: usize) -> u64 {
        let Some(l3) = self.space.l3.get(slot) else {
            return 0;
        };
        let user = if slot == SLOT_M2P { entry::US } else { 0 };
        (self.space.base + l3) | entry::P | entry::RW | entry::A | user
    }

    fn own_table(&mut self, slot: usize, at: u64, level: u32, va: u64) -> Result<(), Error> {
        // One place for each table: nothing is in two slots.
        if self.purpose(at) != Some(Use::Table) || !self.seen.insert((at & entry::FRAME, level)) {
            self.broken(audit::TABLE, level + 1, va, at);
            return Ok(());
        }
        let user = if slot == SLOT_M2P { entry::US } else { 0 };
        let link = entry::P | entry::RW | entry::A | entry::D | user;
        for (i, word) in (0u64..).zip(self.table(at)?) {
            let here = va + i * step(level);
            if level == 3 && i == RECURSIVE && matches!(slot, SLOT_WINDOW | SLOT_POOL) {
                // The tables of this slot, read-only.
                if word != (at & entry::FRAME) | RO | entry::D {
                    self.broken(audit::OWN, level, here, word);
                }
            } else if word & entry::P == 0 {
                if word != 0 {
                    self.broken(audit::ABSENT, level, here, word);
                }
            } else if level == 1 {
                self.own_leaf(slot, word, here)?;
            } else {
                if word & FLAGS != link {
                    self.broken(audit::RIGHTS, level, here, word);
                }
                self.own_table(slot, word, level - 1, here)?;
            }
        }
        Ok(())
    }

    fn own_leaf(&mut self, slot: usize, word: u64, va: u64) -> Result<(), Error> {
        self.out.own += 1;
        let flags = word & FLAGS;
        let want = match slot {
            SLOT_WINDOW => {
                if flags != RW {
                    self.broken(audit::RIGHTS, 1, va, word);
                }
                if self.gfn(word) != Some((va - WINDOW) / PAGE_SIZE) {
                    self.broken(audit::WINDOW, 1, va, word);
                }
                return Ok(());
            }
            SLOT_M2P => {
                let first = (va - M2P) / 8;
                let right = self.purpose(word) == Some(Use::M2p)
                    && self.table(word)?.into_iter().eq(first..first + 512);
                if !right {
                    self.broken(audit::M2P, 1, va, word);
                }
                (USER_RO, Use::M2p)
            }
            SLOT_POOL => (RW, Use::Pool),
            _ => match flags {
                RX => (RX, Use::Text),
                RO => (RO, Use::Rodata),
                _ => (RW, Use::Data),
            },
        };
        if flags != want.0 {
            self.broken(audit::RIGHTS, 1, va, word);
        }
        if self.purpose(word) != Some(want.1) {
            self.broken(audit::OWN, 1, va, word);
        }
        Ok(())
    }

    // ---- the entry area ----

    /// Whether an isolated guest's roots may show the page at `va`.
    fn entry_page(&self, va: u64) -> bool {
        let (start, text, idt) = self.space.entry_section;
        let Some(at) = va.checked_sub(VCPU) else {
            return (IMAGE + start..IMAGE + start + text).contains(&va) || va == IMAGE + idt;
        };
        let off = at & (VCPU_STRIDE - 1);
        at / VCPU_STRIDE < self.space.switches.len() as u64
            && ((area::ENTRY..area::ENTRY + text).contains(&off)
                || off == area::HW - PAGE_SIZE
                || off == area::HW + PAGE_SIZE
                || (area::IST..area::IST + 0x8000).contains(&off)
                || (area::GDT..area::TRANS_GDT).contains(&off))
    }

    /// The same pages as in the hole, with no more rights, and only those above.
    fn entry_table(&mut self, at: u64, level: u32, va: u64) -> Result<(), Error> {
        if self.purpose(at) != Some(Use::Table) || !self.seen.insert((at & entry::FRAME, level)) {
            self.broken(audit::TABLE, level + 1, va, at);
            return Ok(());
        }
        let link = entry::P | entry::RW | entry::A | entry::D;
        for (i, word) in (0u64..).zip(self.table(at)?) {
            let here = va + i * step(level);
            if word & entry::P == 0 {
                if word != 0 {
                    self.broken(audit::ABSENT, level, here, word);
                }
            } else if level > 1 {
                if word & FLAGS != link {
                    self.broken(audit::RIGHTS, level, here, word);
                }
                self.entry_table(word, level - 1, here)?;
            } else {
                self.out.entry_area += 1;
                let own = self.own_word(here)?;
                let writes = entry::RW | entry::D;
                if !self.entry_page(here) || (own ^ word) & entry::FRAME != 0 {
                    self.broken(audit::OWN, level, here, word);
                } else if (own ^ word) & !writes != 0 || word & !own != 0 {
                    self.broken(audit::RIGHTS, level, here, word);
                }
            }
        }
        Ok(())
    }

    /// What the hole has at `va`, or 0.
    fn own_word(&self, va: u64) -> Result<u64, Error> {
        let mut table = self.space.l3[SLOT_CORE];
        for level in [3, 2, 1] {
            let word = self.word(table + (va >> (12 + 9 * (level - 1)) & 511) * 8)?;
            if level == 1 || word & entry::P == 0 {
                return Ok(word);
            }
            table = (word & entry::FRAME) - self.space.base;
        }
        Ok(0)
    }

    // ---- roots ----

    /// Those that the core's records say.
    fn core_roots(&mut self) -> Result<(), Error> {
        let (pool, pages) = self.space.pool;
        for page in 1..pages {
            let record = self.space.pool_info + page * POOL_INFO_SIZE;
            // gfn, next; refs, level, state, live; groups.
            let [_, _, _, _, level, state, ..] = self.word(record + 8)?.to_le_bytes();
            const _: () = assert!(POOL_INFO_STATE == 8 + 5);
            let root = [POOL_KERNEL_ROOT, POOL_USER_ROOT].contains(&level.into());
            if u64::from(state) == POOL_SHADOW && root {
                self.out.roots += 1;
                let at = self.space.base + pool + page * PAGE_SIZE;
                self.guest_table(at, 4, 0, u64::from(level) == POOL_USER_ROOT)?;
            }
        }
        Ok(())
    }

    /// What a vCPU will load when it runs on, or has.
    fn loaded_root(&mut self, cr3: u64) {
        if cr3 == 0 {
            return;
        }
        self.out.loaded += 1;
        if cr3 & FLAGS != 0 || !self.seen.contains(&(cr3, 4)) {
            self.broken(audit::ROOT, 4, 0, cr3);
        }
    }

    /// The root that the core starts on, and keeps if it is isolated: the hypervisor's slots and nothing else.
    fn start_root(&mut self) -> Result<(), Error> {
        for (i, word) in self.table(self.space.root())?.into_iter().enumerate() {
            let want = match i {
                HOLE_FIRST_SLOT.. => self.hole_entry(i - HOLE_FIRST_SLOT),
                _ => 0,
            };
            if word != want {
                self.broken(audit::TRANSITION, 4, i as u64 * step(4), word);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use blanket_abi::layout::{HOLE_FIRST_SLOT, POOL_INFO_LEVEL};

    use super::super::space::tests::{space, space_of};
    use super::*;

    /// Pool pages of the tests' guest: a kernel root, a user root, three levels below.
    const ROOTS: [u64; 2] = [1, 2];
    const BELOW: [u64; 3] = [3, 4, 5];

    fn set(space: &Space, offset: u64, value: u64) {
        space
            .word(offset)
            .expect("inside")
            .store(value, Ordering::Relaxed);
    }

    fn pool(space: &Space, page: u64) -> u64 {
        space.pool.0 + page * PAGE_SIZE
    }

    fn with_guest() -> Space {
        guest_in(space(false).0)
    }

    /// A space in which the core has made two roots with one leaf.
    fn guest_in(space: Space) -> Space {
        let user = entry::P | entry::US | entry::A;
        let hole = space.guest_hole();
        for (root, level) in ROOTS.into_iter().zip([POOL_KERNEL_ROOT, POOL_USER_ROOT]) {
            let record = space.pool_info + root * POOL_INFO_SIZE + 8;
            let shift = (POOL_INFO_LEVEL - 8) * 8;
            set(&space, record, level << shift | POOL_SHADOW << (shift + 8));
            for (slot, word) in (0u64..).zip(&hole) {
                let hidden = level == POOL_USER_ROOT && slot == 0;
                let at = pool(&space, root) + (HOLE_FIRST_SLOT as u64 + slot) * 8;
                set(&space, at, if hidden { 0 } else { *word });
            }
            let below = space.base + pool(&space, BELOW[0]);
            set(&space, pool(&space, root) + 8, below | user | entry::RW);
        }
        for pair in BELOW.windows(2) {
            let below = space.base + pool(&space, pair[1]);
            set(&space, pool(&space, pair[0]) + 16, below | user | entry::RW);
        }
        set(&space, pool(&space, BELOW[2]) + 24, leaf(7));
        let hw = space.switches[1];
        let cr3 = space.base + pool(&space, ROOTS[1]);
        set(&space, hw + area::USER_CR3 - area::HW, cr3);
        space
    }

    fn leaf(gfn: u64) -> u64 {
        let flags = entry::P | entry::US | entry::A | entry::D | entry::RW | entry::NX;
        (RAM_BASE + gfn * PAGE_SIZE) | flags
    }

    #[test]
    fn a_good_vm_breaks_no_rule() {
        let (fresh, domain) = space(false);
        let found = fresh.audit().expect("audited");
        assert_eq!(
            (found.broken, found.roots, found.loaded),
            (0, 0, 0),
            "{found:x?}"
        );
        assert!(found.own > domain.frames, "the window alone has as many");
        let found = with_guest().audit().expect("audited");
        assert_eq!((found.broken, found.rule), (0, 0), "{found:x?}");
        assert_eq!((found.roots, found.loaded), (2, 1));
        // The tables below are shared.
        assert_eq!((found.tables, found.leaves, found.writable), (5, 1, 1));
    }

    /// Breaks one thing, and wants to hear of it.
    fn breaks(rule: u32, wreck: impl FnOnce(&Space)) {
        let space = with_guest();
        wreck(&space);
        let found = space.audit().expect("audited");
        assert!(found.broken > 0 && found.rule == rule, "{rule}: {found:x?}");
    }

    #[test]
    fn each_rule_is_looked_at() {
        let l1 = |space: &Space| pool(space, BELOW[2]) + 24;
        let last = with_guest().frames;
        // Just outside of the guest's memory on either side, and the core's own.
        breaks(audit::FOREIGN, |s| set(s, l1(s), leaf(last)));
        breaks(audit::FOREIGN, |s| set(s, l1(s), leaf(0) - PAGE_SIZE));
        breaks(audit::FOREIGN, |s| {
            set(s, l1(s), (s.base + pool(s, 1)) | leaf(0) & FLAGS);
        });
        breaks(audit::ABSENT, |s| set(s, l1(s), leaf(7) & !entry::P));
        breaks(audit::BITS, |s| set(s, l1(s), leaf(7) | 1 << 8));
        breaks(audit::BITS, |s| set(s, l1(s), leaf(7) | 1 << 52));
        breaks(audit::BITS, |s| {
            set(s, pool(s, BELOW[1]) + 16, leaf(7) | 1 << 7)
        });
        breaks(audit::RIGHTS, |s| set(s, l1(s), leaf(7) & !entry::US));
        breaks(audit::TABLE, |s| set(s, pool(s, BELOW[1]) + 16, leaf(7)));
        breaks(audit::HOLE, |s| {
            set(s, pool(s, ROOTS[0]) + 258 * 8, 0);
        });
        breaks(audit::HOLE, |s| {
            // The user root has no identity table.
            let word = s.word(pool(s, ROOTS[0]) + 256 * 8).expect("inside");
            set(s, pool(s, ROOTS[1]) + 256 * 8, word.load(Ordering::Relaxed));
        });
        breaks(audit::HOLE, |s| {
            let word = s.word(pool(s, ROOTS[0]) + 257 * 8).expect("inside");
            set(s, pool(s, ROOTS[0]) + 271 * 8, word.load(Ordering::Relaxed));
        });
        breaks(audit::ROOT, |s| {
            let cr3 = s.base + pool(s, BELOW[0]);
            set(s, s.switches[0] + area::KERNEL_CR3 - area::HW, cr3);
        });
        breaks(audit::TRANSITION, |s| {
            set(s, s.root() - s.base + 8, leaf(7))
        });
    }

    #[test]
    fn an_isolated_guest_sees_the_entry_area_only() {
        use blanket_abi::layout::{IMAGE, VCPU, VM_PAGE};
        let isolated = || guest_in(space_of(false, true).0);
        let found = isolated().audit().expect("audited");
        assert_eq!((found.broken, found.rule), (0, 0), "{found:x?}");
        // One page of text and the IDT; of each vCPU text, two pages, four stacks, GDT, LDT.
        assert_eq!(found.entry_area, 2 + 3 * (1 + 2 + 4 + 15 + 16));
        let breaks = |rule, wreck: &dyn Fn(&Space)| {
            let space = isolated();
            wreck(&space);
            let found = space.audit().expect("audited");
            assert!(found.broken > 0 && found.rule == rule, "{rule}: {found:x?}");
        };
        // A root with all of the hole; with the window.
        for slot in [1, 2] {
            breaks(audit::HOLE, &|s| {
                let full = s.root() - s.base + (HOLE_FIRST_SLOT as u64 + slot) * 8;
                let word = s.word(full).expect("inside").load(Ordering::Relaxed);
                let at = pool(s, ROOTS[0]) + (HOLE_FIRST_SLOT as u64 + slot) * 8;
                set(s, at, word);
            });
        }
        let shown = |s: &Space, va: u64| {
            let mut table = s.entry_l3.expect("isolated");
            for level in [3, 2] {
                let at = table + (va >> (12 + 9 * (level - 1)) & 511) * 8;
                let word = s.word(at).expect("inside").load(Ordering::Relaxed);
                table = (word & entry::FRAME) - s.base;
            }
            table + (va >> 12 & 511) * 8
        };
        let copy = |s: &Space, va: u64, to: u64| {
            let word = s.word(own(s, va)).expect("inside").load(Ordering::Relaxed);
            set(s, shown(s, to), word);
        };
        // The switch block, a lower page of the stack, the VM page, the image's header.
        breaks(audit::OWN, &|s| copy(s, VCPU + area::HW, VCPU + area::HW));
        breaks(audit::OWN, &|s| {
            copy(s, VCPU + area::STACK, VCPU + area::STACK)
        });
        breaks(audit::OWN, &|s| {
            copy(s, VM_PAGE, VCPU + area::HW + PAGE_SIZE)
        });
        breaks(audit::OWN, &|s| copy(s, IMAGE, IMAGE));
        breaks(audit::RIGHTS, &|s| {
            let at = shown(s, VCPU + area::GDT);
            let word = s.word(at).expect("inside").load(Ordering::Relaxed);
            set(s, at, word | entry::US);
        });
    }

    /// The leaf entry of `va` in the hole.
    fn own(space: &Space, va: u64) -> u64 {
        let index = |level: u32| va >> (12 + 9 * (level - 1)) & 511;
        let slot = usize::try_from(index(4)).expect("small") - HOLE_FIRST_SLOT;
        let mut table = space.l3[slot];
        for level in [3, 2] {
            let word = space.word(table + index(level) * 8).expect("inside");
            table = (word.load(Ordering::Relaxed) & entry::FRAME) - space.base;
        }
        table + index(1) * 8
    }

    #[test]
    fn the_hypervisors_part_is_looked_at() {
        use blanket_abi::layout::{IMAGE, POOL, VM_PAGE};
        let change = |va: u64, f: fn(u64) -> u64| {
            move |s: &Space| {
                let at = own(s, va);
                let word = s.word(at).expect("inside").load(Ordering::Relaxed);
                set(s, at, f(word));
            }
        };
        breaks(
            audit::WINDOW,
            change(WINDOW + 5 * PAGE_SIZE, |w| w + PAGE_SIZE),
        );
        breaks(audit::RIGHTS, change(WINDOW, |w| w | entry::US));
        breaks(audit::RIGHTS, change(VM_PAGE, |w| w | entry::US));
        breaks(audit::RIGHTS, change(VM_PAGE, |w| w & !entry::NX));
        // Text that may be written, and data that passes for text.
        breaks(audit::RIGHTS, change(IMAGE, |w| w | entry::RW));
        breaks(audit::OWN, change(VM_PAGE, |w| w & entry::FRAME | RX));
        breaks(
            audit::OWN,
            change(POOL + PAGE_SIZE, |w| w & FLAGS | RAM_BASE),
        );
        breaks(audit::ABSENT, change(POOL + PAGE_SIZE, |w| w & !entry::P));
        breaks(audit::RIGHTS, change(M2P, |w| w | entry::RW));
        breaks(audit::M2P, |s| {
            let page = s.word(own(s, M2P)).expect("inside").load(Ordering::Relaxed);
            set(s, (page & entry::FRAME) - s.base + 80, 11);
        });
    }
}
