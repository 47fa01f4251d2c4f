//! Where everything of a new domain lies; pure arithmetic.

use blanket_abi::layout::{MAX_FRAMES, added_later};
use blanket_abi::{Gfn, PAGE_SIZE, Va};

use super::{Error, GRANT_FRAMES};
use crate::kernel::Kernel;

/// Entries of a page table.
pub(super) const ENTRIES: u64 = 512;
/// The first mapping ends on a multiple of this many frames (4 MiB).
const MAP_ALIGN: u64 = 1024;
/// Mapped frames that must follow the boot stack (512 KiB).
const MAP_SLACK: u64 = 128;
/// The first mapping must fit one L2 table: the guest copies exactly one.
const MAP_MAX: u64 = ENTRIES * ENTRIES;
/// Memory that a kernel needs for itself beside its image before it can unpack
/// an initrd: page arrays, per-CPU areas, slab. Below it stock kernels die early
/// with an unclear message.
const BOOT_HEADROOM: u64 = (24 << 20) / PAGE_SIZE;

/// Bytes of the record that Linux keeps of each frame, also of those that it may get
/// later (`struct page`, `include/linux/mm_types.h`).
const FRAME_RECORD: u64 = 64;
/// Linux leaves alone what is more than so many times the RAM that it starts with
/// (`arch/x86/xen/setup.c`).
pub const EXTRA_MEM_RATIO: u64 = 10;

/// How much RAM a domain has, frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ram {
    /// At the start.
    pub start: u64,
    /// At most; not less.
    pub most: u64,
}

impl Ram {
    /// Frame numbers that are RAM's: more than the guest may have at once, when it may get
    /// some later.
    pub fn numbers(self) -> u64 {
        added_later(self.start, self.most).1
    }
}

/// Frames that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameRange {
    /// The first one.
    pub first: Gfn,
    /// How many.
    pub count: u64,
}

impl FrameRange {
    /// First frame after the range.
    #[must_use]
    pub fn end(self) -> u64 {
        self.first.0 + self.count
    }
}

/// The plan of a domain's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Virtual address of frame 0.
    pub virt_base: Va,
    /// Frames of RAM that the domain has at the start.
    pub ram_frames: u64,
    /// First frame after the kernel image.
    pub kernel_end: u64,
    /// The initrd.
    pub initrd: Option<FrameRange>,
    /// Whether the initrd lies outside the first mapping, named by frame number.
    pub initrd_by_frame: bool,
    /// start_info.
    pub start_info: Gfn,
    /// The xenstore ring.
    pub store: Gfn,
    /// The console ring.
    pub console: Gfn,
    /// L4, L3, L2 and the L1 tables of the first mapping, in this order.
    pub tables: FrameRange,
    /// The first stack.
    pub boot_stack: Gfn,
    /// Frames of the first mapping, from frame 0.
    pub mapped: u64,
    /// The list of machine frames, one u64 for each frame of RAM at the start.
    pub p2m: FrameRange,
    /// Where it is mapped.
    pub p2m_va: Va,
    /// L3, L2s and L1s that map the p2m list; empty if it lies in the first mapping.
    pub p2m_tables: FrameRange,
    /// Frame that is filled with hypercall stubs.
    pub hypercall_page: Option<Gfn>,
    /// Shared info, above RAM.
    pub shared_info: Gfn,
    /// Grant table, above RAM.
    pub grants: FrameRange,
}

/// Hands out frames upward.
struct Cursor(u64);

impl Cursor {
    fn take(&mut self, count: u64) -> FrameRange {
        let range = FrameRange {
            first: Gfn(self.0),
            count,
        };
        self.0 += count;
        range
    }
    fn page(&mut self) -> Gfn {
        self.take(1).first
    }
}

impl Layout {
    /// Plans a domain with this much RAM.
    pub(super) fn plan(kernel: &Kernel, initrd: u64, ram: Ram) -> Result<Self, Error> {
        check_addresses(kernel)?;
        if ram.most > super::MOST_RAM {
            return Err(super::too_large(ram.most));
        }

        let (layout, mut needed) = Self::place(kernel, initrd, ram)?;
        if needed <= ram.start {
            return Ok(layout);
        }
        // More RAM has a longer p2m list: find the size that is enough for itself.
        loop {
            let more = Ram {
                start: needed,
                most: ram.most.max(needed),
            };
            let (_, then) = Self::place(kernel, initrd, more)?;
            if then <= needed {
                return Err(Error::TooLittleMemory {
                    given: ram.start * PAGE_SIZE,
                    needed: needed * PAGE_SIZE,
                    initrd,
                });
            }
            needed = then;
        }
    }

    /// Places everything in a domain of this much RAM, and says how much it needs.
    fn place(kernel: &Kernel, initrd: u64, ram: Ram) -> Result<(Self, u64), Error> {
        let notes = kernel.notes();
        let virt_base = Va(notes.virt_base);
        let kernel_end = kernel.end() / PAGE_SIZE;
        let initrd_frames = initrd.div_ceil(PAGE_SIZE);
        let p2m_frames = ram.start.div_ceil(ENTRIES);
        let mut next = Cursor(kernel_end);

        let mut initrd_range = None;
        if initrd_frames > 0 && !notes.mod_start_pfn {
            initrd_range = Some(next.take(initrd_frames));
        }
        let mut p2m = None;
        if notes.init_p2m.is_none() {
            p2m = Some(next.take(p2m_frames));
        }
        let start_info = next.page();
        let store = next.page();
        let console = next.page();

        // The tables lie in what they map, so their number follows from itself.
        let mut leaves = 1;
        let mapped = loop {
            let end = next.0 + 3 + leaves + 1 + MAP_SLACK;
            let mapped = end.next_multiple_of(MAP_ALIGN);
            if mapped > MAP_MAX {
                return Err(Error::TooLarge(
                    "the kernel and what must be mapped with it exceed 1 GiB".to_owned(),
                ));
            }
            if mapped / ENTRIES == leaves {
                break mapped;
            }
            leaves = mapped / ENTRIES;
        };
        let tables = next.take(3 + leaves);
        let boot_stack = next.page();
        next.0 = mapped;

        if initrd_frames > 0 && initrd_range.is_none() {
            initrd_range = Some(next.take(initrd_frames));
        }
        let (p2m, p2m_va, p2m_tables) = match (p2m, notes.init_p2m) {
            (None, Some(va)) => {
                let data = next.take(p2m_frames);
                (data, Va(va), next.take(tables_for(Va(va), p2m_frames)))
            }
            (data, _) => {
                let data = data.unwrap_or(FrameRange {
                    first: Gfn(0),
                    count: 0,
                });
                let va = Va(virt_base.0 + data.first.base());
                (
                    data,
                    va,
                    FrameRange {
                        first: Gfn(next.0),
                        count: 0,
                    },
                )
            }
        };

        // The guest unpacks the initrd beside itself before it frees it.
        let extra = (ram.most - ram.start).min(EXTRA_MEM_RATIO * ram.start);
        let records = extra.div_ceil(PAGE_SIZE / FRAME_RECORD);
        let needed = next.0 + initrd_frames + BOOT_HEADROOM + records;
        let layout = Self {
            virt_base,
            ram_frames: ram.start,
            kernel_end,
            initrd: initrd_range,
            initrd_by_frame: notes.mod_start_pfn,
            start_info,
            store,
            console,
            tables,
            boot_stack,
            mapped,
            p2m,
            p2m_va,
            p2m_tables,
            hypercall_page: notes
                .hypercall_page
                .map(|va| Gfn::containing(va - notes.virt_base)),
            shared_info: Gfn(ram.numbers()),
            grants: FrameRange {
                first: Gfn(ram.numbers() + 1),
                count: GRANT_FRAMES,
            },
        };
        Ok((layout, needed))
    }

    /// Virtual address of a frame of the first mapping.
    #[must_use]
    pub fn va(&self, frame: Gfn) -> Va {
        Va(self.virt_base.0 + frame.base())
    }
}

/// Tables of levels 3, 2 and 1 that map `frames` pages from `va` on, which do not
/// reach into another L4 slot.
fn tables_for(va: Va, frames: u64) -> u64 {
    let last = va.0 + frames.saturating_sub(1) * PAGE_SIZE;
    let spanned = |shift: u32| (last >> shift) - (va.0 >> shift) + 1;
    spanned(39) + spanned(30) + spanned(21)
}

fn check_addresses(kernel: &Kernel) -> Result<(), Error> {
    let notes = kernel.notes();
    let base = Va(notes.virt_base);
    let bad = |what: String| Err(Error::Kernel(what));
    if !base.is_guest() || !base.0.is_multiple_of(1 << 30) || base.0 < 1 << 47 {
        return bad(format!(
            "VIRT_BASE {:#x} is not a kernel address on a 1 GiB boundary",
            base.0
        ));
    }
    let in_image = |va: u64| va >= base.0 && va - base.0 < kernel.end();
    if !in_image(notes.entry) {
        return bad(format!(
            "its entry {:#x} lies outside of its image",
            notes.entry
        ));
    }
    if let Some(page) = notes.hypercall_page
        && !(in_image(page) && page.is_multiple_of(PAGE_SIZE))
    {
        return bad(format!(
            "its hypercall page {page:#x} is not a page of its image"
        ));
    }
    if let Some(va) = notes.init_p2m {
        let va = Va(va);
        let slot_end = MAX_FRAMES.div_ceil(ENTRIES) * PAGE_SIZE;
        if !va.is_guest()
            || !va.0.is_multiple_of(PAGE_SIZE)
            || va.index(4) == base.index(4)
            || (va.0 & ((1 << 39) - 1)) + slot_end > 1 << 39
        {
            return bad(format!(
                "INIT_P2M {:#x} is not a place for the p2m list",
                va.0
            ));
        }
    }
    Ok(())
}
