//! Checks the shadow MMU's own state against its rules, without allocating, so
//! that the same check runs in host tests and, where asked for, in the image.
//!
//! The audit visits every pool page and follows every reverse-map chain: its cost
//! is that of the whole shadow pool, so it is no part of any path of a guest.

use super::{FREE, GONE, GROUP, GfnInfo, Mmu, NODES, SHADOW, USER_ROOT, WRAPPER, shadow::mark_bit};
use crate::machine::{Host, Memory};
use crate::pte;
use blanket_abi::Gfn;
use core::sync::atomic::Ordering::Relaxed;

/// L4 index range of the hypervisor's slots.
const HOLE: core::ops::Range<usize> = 256..272;

/// What an audit saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AuditReport {
    /// Shadows.
    pub shadows: u32,
    /// Free pages that were in use before.
    pub free: u32,
    /// Pages whose memory the host has.
    pub gone: u32,
    /// Second pages of 5-level roots.
    pub wrappers: u32,
    /// Pages of reverse-map nodes.
    pub nodes: u32,
    /// Leaves.
    pub leaves: u64,
    /// Leaves that may be written through.
    pub writable: u64,
    /// Writable leaves of frames that are marked as tables. Zero for a guest that
    /// maps its tables read-only before it uses them.
    pub writable_tables: u64,
    /// Entries that point at another shadow.
    pub links: u64,
}

/// The first rule that does not hold. `page` and `i` say where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "page, index and gfn, as in the text above")]
pub enum Broken {
    /// A page's state is none of those that exist.
    State { page: u32 },
    /// A shadow is not in the chain of its gfn, or the chain is too long, or has
    /// a level twice, or holds something that is no shadow of the gfn.
    Chain { gfn: u32, page: u32 },
    /// A free page is not zero.
    NotZero { page: u32, i: usize },
    /// The free list does not hold exactly the free pages.
    FreeList { listed: u32, free: u32 },
    /// The count of live entries is wrong.
    Live { page: u32, counted: u32 },
    /// An entry's group is taken for empty.
    Group { page: u32, i: usize },
    /// The reference count is not what parents and roots make it.
    Refs { page: u32, surplus: u32 },
    /// Nobody refers to the shadow and its frame is not marked: a leak.
    Leaked { page: u32 },
    /// A leaf's frame is outside the VM.
    Foreign { page: u32, i: usize },
    /// A leaf's frame is not the one that the host has given for its gfn.
    Frame { page: u32, i: usize, gfn: u32 },
    /// A leaf has bits that leaves must not have, or lacks some.
    LeafBits { page: u32, i: usize },
    /// A leaf allows writes of a frame that the dirty log does not have.
    Unlogged { page: u32, i: usize, gfn: u32 },
    /// A leaf is missing in the reverse map.
    NotMapped { page: u32, i: usize, gfn: u32 },
    /// The reverse map has more entries than there are leaves.
    Surplus { mapped: u64, leaves: u64 },
    /// An entry does not point at the shadow that it names, or that shadow has
    /// the wrong level.
    Link { page: u32, i: usize },
    /// An entry for a shadow has bits that it must not have, or lacks some.
    LinkBits { page: u32, i: usize },
    /// A slot of the hypervisor is not what the module gave.
    Hole { page: u32, i: usize },
    /// The second page of a 5-level root is wrong, or (page 0) their number is.
    Wrapper { page: u32 },
    /// A frame that the guest has not got has a leaf, a shadow or a mark; or (gfn
    /// `u32::MAX`) their number is wrong.
    Out { gfn: u32 },
    /// Reverse-map nodes have been lost or are in two places.
    Nodes { counted: u32, pages: u32 },
}

impl Mmu {
    /// What pool page `page` is bound to: gfn and level (5 = user root).
    #[doc(hidden)]
    #[must_use]
    pub fn binding(&self, page: u32) -> Option<(u32, u8)> {
        let p = self.pool.get(page as usize)?;
        (p.state == SHADOW).then_some((p.gfn, p.level))
    }

    /// Bits of the levels at which a frame is marked as a table.
    #[doc(hidden)]
    #[must_use]
    pub fn mark(&self, gfn: Gfn) -> u8 {
        self.gfns.get(super::idx(gfn.0)).map_or(0, |g| g.mark)
    }

    /// Leaves that map `gfn`, by the reverse map.
    #[doc(hidden)]
    #[must_use]
    pub fn mapped<M: Memory>(&self, m: &M, gfn: Gfn) -> u64 {
        let mut n = 0;
        if gfn.0 < self.nr_frames() {
            self.rmap_each(m, super::gfn32(gfn.0), |_| n += 1);
        }
        n
    }

    /// Checks everything. `roots` are the shadows that vCPUs hold, each as often
    /// as it is held.
    ///
    /// # Errors
    /// The first rule that does not hold.
    #[doc(hidden)]
    pub fn audit<M: Memory + Host>(&mut self, m: &M, roots: &[u32]) -> Result<AuditReport, Broken> {
        let mut r = AuditReport::default();
        let mut roots_of_5 = 0;
        for page in 1..self.fresh {
            match self.pool[page as usize].state {
                FREE => {
                    r.free += 1;
                    zero(m, page, 0..512)?;
                }
                GONE => r.gone += 1,
                WRAPPER => r.wrappers += 1,
                NODES => r.nodes += 1,
                SHADOW => {
                    r.shadows += 1;
                    self.audit_chain(page)?;
                    if self.pool[page as usize].level == 1 {
                        self.audit_leaves(m, page, &mut r)?;
                    } else {
                        roots_of_5 += self.audit_links(m, page, &mut r)?;
                    }
                }
                _ => return Err(Broken::State { page }),
            }
        }
        self.audit_free_list(r.free)?;
        self.audit_gone(r.gone)?;
        self.audit_out()?;
        if r.wrappers != roots_of_5 {
            return Err(Broken::Wrapper { page: 0 });
        }
        self.audit_rmap(m, r.nodes, &mut r)?;
        self.audit_refs(m, roots)?;
        Ok(r)
    }

    fn audit_chain(&self, page: u32) -> Result<(), Broken> {
        let gfn = self.pool[page as usize].gfn;
        let broken = Broken::Chain { gfn, page };
        let mut at = self.gfns.get(gfn as usize).ok_or(broken)?.shadow;
        let (mut levels, mut found) = (0u8, false);
        while at != 0 {
            let p = self.pool.get(at as usize).ok_or(broken)?;
            let bit = 1u8.checked_shl(u32::from(p.level)).unwrap_or(0);
            if p.state != SHADOW
                || p.gfn != gfn
                || !(1..=USER_ROOT).contains(&p.level)
                || levels & bit != 0
            {
                return Err(broken);
            }
            levels |= bit;
            found |= at == page;
            at = p.next;
        }
        if found { Ok(()) } else { Err(broken) }
    }

    fn audit_leaves<M: Memory>(&self, m: &M, page: u32, r: &mut AuditReport) -> Result<(), Broken> {
        let mut live = 0;
        for (i, word) in m.pool(page).iter().enumerate() {
            let leaf = word.load(Relaxed);
            if leaf == 0 {
                continue;
            }
            live += 1;
            self.audit_group(page, i)?;
            let gfn = m.gfns(page)[i].load(Relaxed);
            let info: &GfnInfo = self
                .gfns
                .get(gfn as usize)
                .ok_or(Broken::Foreign { page, i })?;
            let host = m.frame_pte(Gfn(u64::from(gfn)));
            if host == 0 || leaf & pte::FRAME != host & pte::FRAME {
                return Err(Broken::Frame { page, i, gfn });
            }
            let writable = leaf & pte::RW != 0;
            let must = pte::P | pte::U | pte::A | if writable { pte::D } else { 0 };
            let may = must | pte::FRAME | pte::NX | host | if writable { pte::RW } else { 0 };
            if leaf & must != must || leaf & !may != 0 {
                return Err(Broken::LeafBits { page, i });
            }
            let mut there = 0;
            self.rmap_each(m, gfn, |loc| {
                there += u32::from(loc == super::shadow::location(page, i))
            });
            if there != 1 {
                return Err(Broken::NotMapped { page, i, gfn });
            }
            if writable {
                if !self.may_write(gfn.into()) {
                    return Err(Broken::Unlogged { page, i, gfn });
                }
                r.writable += 1;
                r.writable_tables += u64::from(info.mark != 0);
            }
        }
        r.leaves += u64::from(live);
        self.audit_live(page, live)
    }

    fn audit_group(&self, page: u32, i: usize) -> Result<(), Broken> {
        if self.pool[page as usize].groups >> (i / GROUP) & 1 == 0 {
            return Err(Broken::Group { page, i });
        }
        Ok(())
    }

    fn audit_live(&self, page: u32, counted: u32) -> Result<(), Broken> {
        if u32::from(self.pool[page as usize].live) == counted {
            Ok(())
        } else {
            Err(Broken::Live { page, counted })
        }
    }

    /// Returns how many pages of its own the shadow has beside itself.
    fn audit_links<M: Memory>(&self, m: &M, page: u32, r: &mut AuditReport) -> Result<u32, Broken> {
        let level = self.pool[page as usize].level;
        let below = if level >= 4 { 3 } else { level - 1 };
        let mut live = 0;
        for (i, word) in m.pool(page).iter().enumerate() {
            let entry = word.load(Relaxed);
            if level >= 4 && HOLE.contains(&i) {
                let hide = level == USER_ROOT && i == HOLE.start;
                if entry != if hide { 0 } else { self.hole[i - HOLE.start] } {
                    return Err(Broken::Hole { page, i });
                }
                continue;
            }
            if entry == 0 {
                continue;
            }
            live += 1;
            self.audit_group(page, i)?;
            let child = m.gfns(page)[i].load(Relaxed);
            let known = child != 0 && child < self.fresh;
            let fits = known && {
                let c = &self.pool[child as usize];
                c.state == SHADOW
                    && c.level == below
                    && entry & pte::FRAME == m.pool_pte(child) & pte::FRAME
            };
            if !fits {
                return Err(Broken::Link { page, i });
            }
            let must = pte::P | pte::U | pte::A;
            let may = must | pte::FRAME | pte::RW | pte::NX | m.pool_pte(child);
            if entry & must != must || entry & !may != 0 {
                return Err(Broken::LinkBits { page, i });
            }
        }
        r.links += u64::from(live);
        self.audit_live(page, live)?;
        if level < 4 || !self.la57 {
            return Ok(0);
        }
        let wrapper = self.wrapper(m, page);
        let want = m.pool_pte(page) | pte::P | pte::RW | pte::U | pte::A;
        let fits = wrapper != 0
            && wrapper < self.fresh
            && self.pool[wrapper as usize].state == WRAPPER
            && [0, 511]
                .iter()
                .all(|&i| m.pool(wrapper)[i].load(Relaxed) == want);
        if !fits {
            return Err(Broken::Wrapper { page });
        }
        zero(m, wrapper, 1..511).map_err(|_| Broken::Wrapper { page })?;
        Ok(1)
    }

    fn audit_out(&self) -> Result<(), Broken> {
        let mut out = 0;
        for (gfn, info) in (0u32..).zip(self.gfns.iter()) {
            let has = self.has_by_record(Gfn(gfn.into()));
            if self.has(Gfn(gfn.into())) != has {
                return Err(Broken::Out { gfn });
            }
            if has {
                continue;
            }
            if info.rmap != [0; 2] || info.shadow != 0 || info.mark != 0 {
                return Err(Broken::Out { gfn });
            }
            out += 1;
        }
        if out == self.out {
            Ok(())
        } else {
            Err(Broken::Out { gfn: u32::MAX })
        }
    }

    fn audit_gone(&self, gone: u32) -> Result<(), Broken> {
        let (mut at, mut listed) = (self.gone_head, 0);
        while at != 0 && listed <= gone {
            match self.pool.get(at as usize) {
                Some(p) if p.state == GONE && at < self.fresh => {
                    listed += 1;
                    at = p.next;
                }
                _ => return Err(Broken::State { page: at }),
            }
        }
        if listed == gone && gone == self.gone {
            Ok(())
        } else {
            Err(Broken::FreeList { listed, free: gone })
        }
    }

    fn audit_free_list(&self, free: u32) -> Result<(), Broken> {
        let (mut at, mut last, mut listed) = (self.ready_head, 0, 0);
        while at != 0 && listed <= free {
            match self.pool.get(at as usize) {
                Some(p) if p.state == FREE && at < self.fresh => {
                    listed += 1;
                    at = p.next;
                }
                _ => return Err(Broken::State { page: at }),
            }
        }
        at = self.free_head;
        while at != 0 && listed <= free {
            match self.pool.get(at as usize) {
                Some(p) if p.state == FREE && at < self.fresh => {
                    listed += 1;
                    last = at;
                    at = p.next;
                }
                _ => return Err(Broken::State { page: at }),
            }
        }
        if listed == free && last == self.free_tail && free == self.free {
            Ok(())
        } else {
            Err(Broken::FreeList { listed, free })
        }
    }

    fn audit_rmap<M: Memory>(
        &self,
        m: &M,
        node_pages: u32,
        r: &mut AuditReport,
    ) -> Result<(), Broken> {
        let (mut mapped, mut nodes) = (0u64, 0u32);
        for gfn in 0..self.nr_frames() {
            nodes += self.rmap_each(m, super::gfn32(gfn), |_| mapped += 1);
        }
        if mapped != r.leaves {
            return Err(Broken::Surplus {
                mapped,
                leaves: r.leaves,
            });
        }
        let counted = nodes + self.nodes_free(m, node_pages * 64);
        if counted == node_pages * 64 {
            Ok(())
        } else {
            Err(Broken::Nodes {
                counted,
                pages: node_pages,
            })
        }
    }

    /// Takes every reference that it finds off the counts, looks at what remains,
    /// and puts them back.
    fn audit_refs<M: Memory>(&mut self, m: &M, roots: &[u32]) -> Result<(), Broken> {
        self.each_reference(m, roots, |refs| refs.wrapping_sub(1));
        let mut result = Ok(());
        for page in 1..self.fresh {
            let p = &self.pool[page as usize];
            if p.state == SHADOW && p.refs != 0 {
                result = Err(Broken::Refs {
                    page,
                    surplus: p.refs,
                });
                break;
            }
        }
        self.each_reference(m, roots, |refs| refs.wrapping_add(1));
        result?;
        for page in 1..self.fresh {
            let p = &self.pool[page as usize];
            let marked = self.gfns[p.gfn as usize].mark & mark_bit(p.level.max(1)) != 0;
            if p.state == SHADOW && p.refs == 0 && !marked {
                return Err(Broken::Leaked { page });
            }
        }
        Ok(())
    }

    fn each_reference<M: Memory>(&mut self, m: &M, roots: &[u32], f: impl Fn(u32) -> u32) {
        for page in 1..self.fresh {
            let (state, level) = (
                self.pool[page as usize].state,
                self.pool[page as usize].level,
            );
            if state != SHADOW || level == 1 {
                continue;
            }
            for i in (0..512).filter(|i| level < 4 || !HOLE.contains(i)) {
                if m.pool(page)[i].load(Relaxed) != 0 {
                    let child = m.gfns(page)[i].load(Relaxed);
                    let refs = &mut self.pool[child as usize].refs;
                    *refs = f(*refs);
                }
            }
        }
        for &root in roots.iter().filter(|&&r| r != 0) {
            let refs = &mut self.pool[root as usize].refs;
            *refs = f(*refs);
        }
    }
}

fn zero<M: Memory>(m: &M, page: u32, range: core::ops::Range<usize>) -> Result<(), Broken> {
    for i in range {
        if m.pool(page)[i].load(Relaxed) != 0 {
            return Err(Broken::NotZero { page, i });
        }
    }
    Ok(())
}
