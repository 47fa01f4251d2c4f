//! The first page tables.

use blanket_abi::{Gfn, PAGE_SIZE, Va};
use vm_memory::{Bytes, GuestAddress};

use super::layout::ENTRIES;
use super::{Error, FrameRange, GuestMemory, Layout, address};

/// Page-table entry bits (Intel SDM volume 3, 4.5).
pub(super) mod pte {
    /// Present, user, accessed, dirty: what every entry has.
    pub const BASE: u64 = 1 | 1 << 2 | 1 << 5 | 1 << 6;
    /// Writable.
    pub const RW: u64 = 1 << 1;
}

/// Writes the tables of the first mapping and those that map the p2m list.
pub fn write(memory: &GuestMemory, layout: &Layout) -> Result<(), Error> {
    let root = layout.tables.first;
    let all = FrameRange {
        first: Gfn(0),
        count: layout.mapped,
    };
    map(memory, layout, root, root.0 + 1, layout.virt_base, all)?;
    if layout.p2m_tables.count > 0 {
        map(
            memory,
            layout,
            root,
            layout.p2m_tables.first.0,
            layout.p2m_va,
            layout.p2m,
        )?;
    }
    Ok(())
}

/// Maps `frames` at `start`, within one L4 slot of `root`, with tables from frame
/// `first_table` on in the order L3, L2s, L1s. The tables of the first mapping are
/// mapped without write permission: a guest may not write its tables directly.
fn map(
    memory: &GuestMemory,
    layout: &Layout,
    root: Gfn,
    first_table: u64,
    start: Va,
    frames: FrameRange,
) -> Result<(), Error> {
    let last = start.0 + (frames.count - 1) * PAGE_SIZE;
    // Number of the table of `level` that covers `va`, counted from the first one.
    let nth = |va: u64, level: u8| (va >> shift(level)) - (start.0 >> shift(level));
    let l3 = first_table;
    let l2 = l3 + nth(last, 3) + 1;
    let l1 = l2 + nth(last, 2) + 1;
    let table = |va: u64, level: u8| match level {
        1 => Gfn(l1 + nth(va, 1)),
        2 => Gfn(l2 + nth(va, 2)),
        3 => Gfn(l3 + nth(va, 3)),
        _ => root,
    };
    let set = |va: u64, level: u8, frame: Gfn, bits: u64| {
        let at = table(va, level).base() + Va(va).index(level) as u64 * 8;
        memory.write_slice(&(frame.base() | bits).to_le_bytes(), GuestAddress(at))
    };
    for level in 1..=3 {
        for n in 0..=nth(last, level) {
            let va = ((start.0 >> shift(level)) + n) << shift(level);
            set(
                va.max(start.0),
                level + 1,
                table(va.max(start.0), level),
                pte::BASE | pte::RW,
            )?;
        }
    }
    for n in 0..frames.count {
        let frame = Gfn(frames.first.0 + n);
        let is_table = (layout.tables.first.0..layout.tables.end()).contains(&frame.0);
        let bits = if is_table {
            pte::BASE
        } else {
            pte::BASE | pte::RW
        };
        set(start.0 + n * PAGE_SIZE, 1, frame, bits)?;
    }
    Ok(())
}

/// log2 of the bytes that one table of `level` maps.
fn shift(level: u8) -> u32 {
    12 + 9 * u32::from(level)
}

/// Writes the list of machine frames: the identity for RAM, "none" up to the end
/// of its last page, which the guest reads too.
pub fn write_p2m(memory: &GuestMemory, layout: &Layout) -> Result<(), Error> {
    for n in 0..layout.p2m.count {
        let mut page = Vec::with_capacity(4096);
        for frame in n * ENTRIES..(n + 1) * ENTRIES {
            let entry = if frame < layout.ram_frames {
                frame
            } else {
                u64::MAX
            };
            page.extend_from_slice(&entry.to_le_bytes());
        }
        memory.write_slice(&page, address(Gfn(layout.p2m.first.0 + n)))?;
    }
    Ok(())
}
