//! The shadow MMU.
//!
//! The hardware only ever walks shadow tables, which translate guest virtual
//! addresses to host frames. A shadow is one pool page bound to a guest table
//! (gfn, level). The rules that keep it right, in place of Xen's type counts:
//!
//! * **Marks.** One byte per gfn says at which table levels the frame is in use.
//!   A mark is set on the whole tree below a pinned or loaded root, and on a
//!   child when a marked table gets an entry for it; it is cleared when the
//!   frame becomes writable through a leaf. Writes to marked frames reach the
//!   core (the guest maps its tables read-only), so shadows follow them.
//! * **Binding.** A pool page stays bound to its (gfn, level) while anything
//!   refers to it. A freed page is used again only after every vCPU in the core
//!   world has reloaded CR3 ([`Epochs`]), so no stale paging-structure entry can
//!   ever read one level's table as another's.
//! * **A new table is not writable in any TLB.** When a frame gets its first mark,
//!   vCPUs that may have a writable translation of it are flushed first.
//! * **Safety needs only one fact**: every leaf holds a frame of this VM. A guest
//!   that breaks the read-only discipline hurts its own coherence, nothing else.
//! * **Every leaf is in the reverse map** of its gfn, so that a frame can be taken
//!   back at any time.
//! * **While the dirty log is on, a writable leaf's frame is noted as written** (`log.rs`).
//! * **A frame that the guest has given up**, or has not got yet, has no leaf, no shadow
//!   and no mark, and gets none until the guest has it.
//! * **"Drop everything" is always a correct answer**: shadows are a cache.

mod audit;
mod balloon;
mod fault;
mod log;
mod reclaim;
mod revoke;
mod rmap;
mod shadow;
mod table;

pub use audit::{AuditReport, Broken};
pub use fault::{Access, Fault};
pub use log::LOG_STEP;
pub use reclaim::PageList;

use crate::idx;
use crate::machine::{Host, Memory};
use blanket_abi::layout::{
    GFN_INFO_SIZE, POOL_GONE, POOL_INFO_LEVEL, POOL_INFO_SIZE, POOL_INFO_STATE, POOL_KERNEL_ROOT,
    POOL_SHADOW, POOL_USER_ROOT,
};
use core::sync::atomic::{AtomicU64, Ordering};

/// What the core knows of a guest frame. The module allocates 16 bytes for each.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct GfnInfo {
    /// Leaves that map the frame: two in place, or an overflow chain in the second.
    rmap: [u32; 2],
    /// First shadow of the frame (0 = none).
    shadow: u32,
    /// Bit `level - 1` is set while the frame is a table of that level.
    mark: u8,
    /// [`TURNED`], [`WRITTEN`].
    flags: u8,
    /// Low bits of the epoch in which a writable leaf was last taken away.
    writable_until: u16,
}

/// Whether the guest has the frame is the other way round than at the start
/// (`balloon.rs`).
const TURNED: u8 = 1;
/// The frame was written since the dirty log was taken (`log.rs`).
const WRITTEN: u8 = 2;

/// What the core knows of a pool page. The module allocates 24 bytes for each.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct PoolInfo {
    /// The guest table that this page shadows.
    gfn: u32,
    /// Next shadow of the same gfn, or next free page.
    next: u32,
    /// Parents and vCPUs that refer to the shadow; for a free page the epoch at
    /// which it was freed.
    refs: u32,
    /// 1 to 4, or [`USER_ROOT`].
    level: u8,
    state: u8,
    /// Entries that are not zero.
    live: u16,
    /// Bit per group of [`GROUP`] entries: clear if all of them are zero. Set with
    /// an entry, cleared when the shadow is emptied.
    groups: u64,
}

const _: () = assert!(
    size_of::<GfnInfo>() as u64 == GFN_INFO_SIZE && size_of::<PoolInfo>() as u64 == POOL_INFO_SIZE
);

// Whoever audits the tables from outside finds the roots by these.
const _: () = assert!(
    core::mem::offset_of!(PoolInfo, level) as u64 == POOL_INFO_LEVEL
        && core::mem::offset_of!(PoolInfo, state) as u64 == POOL_INFO_STATE
        && POOL_KERNEL_ROOT == 4
        && POOL_USER_ROOT == USER_ROOT as u64
        && POOL_SHADOW == SHADOW as u64
        && POOL_GONE == GONE as u64
);

/// Level of a shadow of a user root: an L4 without the M2P slot.
const USER_ROOT: u8 = 5;

const FREE: u8 = 0;
const SHADOW: u8 = 1;
/// The second page of a 5-level root.
const WRAPPER: u8 = 2;
/// A page of reverse-map nodes.
const NODES: u8 = 3;
/// Not in use, and the host has its memory.
const GONE: u8 = 4;

/// Why an operation could not finish. The caller drops the lock, mends it, and
/// runs the operation again; all operations may be repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The host has not given this frame yet.
    Frame(blanket_abi::Gfn),
    /// No pool page is free.
    Pool,
    /// Much was done already; let interrupts in.
    Breath,
    /// A frame becomes a page table, and these vCPUs (a mask) may still have a
    /// writable translation of it in their TLBs.
    Flush(u64),
}

/// Which epoch each vCPU has seen. A vCPU that reloads CR3 sees the present one;
/// a vCPU in the host world has seen all, since it reloads on entry.
#[derive(Debug)]
pub struct Epochs {
    now: AtomicU64,
    seen: [AtomicU64; blanket_abi::layout::MAX_VCPUS as usize],
}

impl Default for Epochs {
    fn default() -> Self {
        Self::new()
    }
}

impl Epochs {
    /// No vCPU is in the core world.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            now: AtomicU64::new(1),
            seen: [const { AtomicU64::new(u64::MAX) }; blanket_abi::layout::MAX_VCPUS as usize],
        }
    }
    /// vCPU `id` is about to load CR3.
    #[inline]
    pub fn enter(&self, id: u32) {
        if let Some(s) = self.seen.get(id as usize) {
            s.store(self.now.load(Ordering::SeqCst), Ordering::SeqCst);
        }
    }
    /// vCPU `id` is about to leave for the host world.
    #[inline]
    pub fn leave(&self, id: u32) {
        if let Some(s) = self.seen.get(id as usize) {
            s.store(u64::MAX, Ordering::Release);
        }
    }
    /// Whether vCPU `id` is in the core world and may hold TLB entries.
    #[inline]
    #[must_use]
    pub fn inside(&self, id: u32) -> bool {
        self.seen
            .get(id as usize)
            .is_some_and(|s| s.load(Ordering::SeqCst) != u64::MAX)
    }
    /// Begins an epoch; its number.
    pub fn begin(&self) -> u64 {
        self.now.fetch_add(1, Ordering::SeqCst) + 1
    }
    /// Whether vCPU `id` has loaded CR3 in epoch `since` or later, or is away.
    #[must_use]
    pub fn reached(&self, id: u32, since: u64) -> bool {
        self.seen
            .get(id as usize)
            .is_none_or(|s| s.load(Ordering::SeqCst) >= since)
    }
    /// Notes that the host will flush the TLB of vCPU `id`, which began before epoch
    /// `since` and does not run, before it runs again.
    pub fn reach(&self, id: u32, since: u64) {
        if let Some(s) = self.seen.get(id as usize) {
            s.fetch_max(since, Ordering::SeqCst);
        }
    }
    /// The present epoch.
    fn now(&self) -> u64 {
        self.now.load(Ordering::SeqCst)
    }
    /// The vCPUs, of the first `nr_vcpus`, that may not have loaded CR3 since the
    /// end of epoch `e`.
    fn stale(&self, e: u64, nr_vcpus: u32) -> u64 {
        (0..nr_vcpus)
            .filter(|&id| !self.reached(id, e + 1))
            .fold(0, |mask, id| mask | 1 << id)
    }
    fn retire(&self) -> u32 {
        low(self.begin())
    }
    fn all_past(&self, tag: u32, nr_vcpus: u32) -> bool {
        self.seen.iter().take(nr_vcpus as usize).all(|s| {
            let seen = s.load(Ordering::SeqCst);
            seen == u64::MAX || low(seen).wrapping_sub(tag) < 1 << 31
        })
    }
}

/// Entries of a table that are looked at together: most groups are all zero.
const GROUP: usize = 8;

/// Bit per group of a guest's table that has an entry. Guests leave most of a
/// table empty, and a look at 512 entries is most of the cost of a new process.
#[inline]
fn occupied(words: &crate::machine::Words, groups: core::ops::Range<usize>) -> u64 {
    let mut bits = 0;
    let (chunks, _) = words.as_chunks::<GROUP>();
    for (g, c) in chunks
        .iter()
        .enumerate()
        .take(groups.end)
        .skip(groups.start)
    {
        let any = c[0].load(Ordering::Relaxed)
            | c[1].load(Ordering::Relaxed)
            | c[2].load(Ordering::Relaxed)
            | c[3].load(Ordering::Relaxed)
            | c[4].load(Ordering::Relaxed)
            | c[5].load(Ordering::Relaxed)
            | c[6].load(Ordering::Relaxed)
            | c[7].load(Ordering::Relaxed);
        if any != 0 {
            bits |= 1 << g;
        }
    }
    bits
}

/// The set bits of a word, lowest first.
#[inline]
fn bits(mut word: u64) -> impl Iterator<Item = usize> {
    core::iter::from_fn(move || {
        let bit = (word != 0).then(|| word.trailing_zeros() as usize)?;
        word &= word - 1;
        Some(bit)
    })
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "the low half is what is meant"
)]
const fn low(v: u64) -> u32 {
    v as u32
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "the low bits are what is meant"
)]
const fn low16(v: u64) -> u16 {
    v as u16
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "callers bound the value by the frame count"
)]
const fn gfn32(gfn: u64) -> u32 {
    gfn as u32
}

/// The shadow MMU of one VM. The caller keeps it behind the VM's MMU lock.
#[derive(Debug)]
pub struct Mmu {
    gfns: &'static mut [GfnInfo],
    pool: &'static mut [PoolInfo],
    /// L4 entries of the hypervisor's slots.
    hole: [u64; 16],
    la57: bool,
    nr_vcpus: u32,
    /// First pool page that was never used. Page 0 is kept, as the null index.
    fresh: u32,
    free_head: u32,
    free_tail: u32,
    /// Free pages that wait for nobody.
    ready_head: u32,
    /// Free pages, of both lists.
    free: u32,
    /// Pages whose memory the host has.
    gone_head: u32,
    gone: u32,
    node_free: u32,
    budget: u32,
    /// Frames that the guest has not got at the start: from, to.
    later: (u64, u64),
    /// Frames that the guest has not got.
    out: u64,
    /// The guest has all frames below this one: most questions end here.
    whole: u64,
    /// Whether it is noted which frames are written.
    logging: bool,
    /// Shadow pages made since the start.
    pub made: u64,
}

/// Tables that one operation may visit before it asks for a breath.
const BUDGET: u32 = 512;

impl Mmu {
    /// `gfns` has one record for each frame of the VM, `pool` one for each page
    /// that the pool may ever have; both are zeroed. `hole` are the L4 entries
    /// of slots 256 to 271.
    #[must_use]
    pub fn new(
        gfns: &'static mut [GfnInfo],
        pool: &'static mut [PoolInfo],
        hole: [u64; 16],
        la57: bool,
        nr_vcpus: u32,
    ) -> Self {
        Self {
            whole: gfns.len() as u64,
            gfns,
            pool,
            hole,
            la57,
            nr_vcpus,
            fresh: 1,
            free_head: 0,
            free_tail: 0,
            ready_head: 0,
            free: 0,
            gone_head: 0,
            gone: 0,
            node_free: 0,
            budget: BUDGET,
            later: (0, 0),
            out: 0,
            logging: false,
            made: 0,
        }
    }

    /// Frames of the VM.
    #[inline]
    #[must_use]
    pub fn nr_frames(&self) -> u64 {
        self.gfns.len() as u64
    }

    /// Starts an operation: it may visit [`BUDGET`] tables before a breath.
    #[inline]
    pub fn begin(&mut self) {
        self.budget = BUDGET;
    }

    fn spend(&mut self) -> Result<(), Need> {
        if self.budget == 0 {
            return Err(Need::Breath);
        }
        self.budget -= 1;
        Ok(())
    }

    fn alloc<M: Memory + Host>(&mut self, m: &M, ep: &Epochs, state: u8) -> Result<u32, Need> {
        let page = if let Some(page) = self.pop_free(ep) {
            page
        } else {
            let have = m
                .vm_page()
                .pool_pages
                .load(Ordering::Acquire)
                .min(self.pool.len() as u64);
            if u64::from(self.fresh) >= have {
                return Err(Need::Pool);
            }
            self.fresh += 1;
            self.fresh - 1
        };
        self.pool[page as usize] = PoolInfo {
            state,
            ..PoolInfo::default()
        };
        Ok(page)
    }

    /// Gives back a page whose words are all zero.
    fn release(&mut self, ep: &Epochs, page: u32) {
        self.pool[page as usize] = PoolInfo {
            refs: ep.retire(),
            state: FREE,
            ..PoolInfo::default()
        };
        if self.free_tail == 0 {
            self.free_head = page;
        } else {
            self.pool[self.free_tail as usize].next = page;
        }
        self.free_tail = page;
        self.free += 1;
    }

    /// Whether freed pages wait for vCPUs to reload CR3.
    #[must_use]
    pub fn has_retired(&self) -> bool {
        self.free_head != 0
    }

    /// A leaf of `gfn` that allowed writes was changed or is gone.
    #[inline]
    fn note_write_protected(&mut self, ep: &Epochs, gfn: u32) {
        // The new leaf must be seen before the epoch is read: a vCPU that loads CR3
        // in a later epoch than is noted here must not walk the old one.
        if self.nr_vcpus > 1 {
            core::sync::atomic::fence(Ordering::SeqCst);
        }
        self.gfns[gfn as usize].writable_until = low16(ep.now());
    }

    /// Whether all vCPUs have flushed their TLBs since `gfn` was last writable. The
    /// guest announces a new page table without a flush, because Xen flushes when a
    /// frame's type changes (`xen/arch/x86/mm.c`, `_get_page_type`); with a writable
    /// translation left, its writes to the table would go past the core.
    fn settled(&self, ep: &Epochs, gfn: u32) -> Result<(), Need> {
        let now = ep.now();
        // The latest epoch with these low bits: at worst one flush too many.
        let ago = low16(now).wrapping_sub(self.gfns[gfn as usize].writable_until);
        let until = now.saturating_sub(u64::from(ago));
        match ep.stale(until, self.nr_vcpus) {
            0 => Ok(()),
            mask => Err(Need::Flush(mask)),
        }
    }

    /// Whether the frame is in use as a page table.
    #[inline]
    #[must_use]
    pub fn is_table(&self, gfn: blanket_abi::Gfn) -> bool {
        self.gfns.get(idx(gfn.0)).is_some_and(|g| g.mark != 0)
    }
}
