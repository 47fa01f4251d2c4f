//! Identity maps: the guest's nested page tables, and the VMM's own.
//!
//! Pages of 1 GiB above 4 GiB where the CPU has them, of 2 MiB below, and of 4 KiB in the first 2 MiB, where the fixed
//! MTRRs give each page a type of its own.

/// Where page tables come from.
pub trait Frames {
    /// Physical address of a page of zeros; none when they are used up.
    fn frame(&mut self) -> Option<u64>;
    /// The table at a physical address that [`frame`](Self::frame) has given.
    fn table(&mut self, address: u64) -> &mut [u64; 512];
}

/// There are no more frames for tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the VMM's memory for page tables is used up")]
pub struct NoFrames;

/// Present.
pub const PRESENT: u64 = 1;
/// Writable.
pub const WRITABLE: u64 = 1 << 1;
/// For users; nested tables need it, since a guest's accesses count as a user's (APM 15.25.5).
pub const USER: u64 = 1 << 2;
/// A large page.
const LARGE: u64 = 1 << 7;
/// Bits of an address in an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const GIB: u64 = 1 << 30;
const MIB2: u64 = 2 << 20;

/// How a CPU maps.
#[derive(Clone, Copy, Debug)]
pub struct Width {
    /// Bits of a physical address.
    pub bits: u32,
    /// Whether it has pages of 1 GiB.
    pub gigabytes: bool,
}

/// Maps each physical address of the CPU's to itself, with `flags`, by four levels; the root.
pub fn identity(frames: &mut impl Frames, width: Width, flags: u64) -> Result<u64, NoFrames> {
    let root = frames.frame().ok_or(NoFrames)?;
    // Four levels reach 48 bits.
    let end = 1u64 << width.bits.clamp(32, 48);
    let mut address = 0;
    while address < end {
        let pdpt = below(frames, root, index(address, 39), flags)?;
        if address < 4 * GIB || !width.gigabytes {
            let directory = below(frames, pdpt, index(address, 30), flags)?;
            for entry in 0..512 {
                let at = address + entry * MIB2;
                frames.table(directory)[index(at, 21)] = at | flags | LARGE;
            }
        } else {
            frames.table(pdpt)[index(address, 30)] = address | flags | LARGE;
        }
        address += GIB;
    }
    set(frames, root, 0, 0, flags)?;
    Ok(root)
}

/// Maps the page of 4 KiB at `from` to the frame `to` with `flags`, those of no entry for none. Larger pages that it
/// lies in are split.
pub fn set(
    frames: &mut impl Frames,
    root: u64,
    from: u64,
    to: u64,
    flags: u64,
) -> Result<(), NoFrames> {
    let mut table = root;
    for shift in [39, 30, 21] {
        let slot = index(from, shift);
        let entry = frames.table(table)[slot];
        table = if entry & PRESENT == 0 {
            below(frames, table, slot, PRESENT | WRITABLE | USER)?
        } else if entry & LARGE != 0 {
            let lower = frames.frame().ok_or(NoFrames)?;
            let step = 1u64 << (shift - 9);
            let large = if shift == 30 { LARGE } else { 0 };
            let flags = entry & !ADDRESS & !LARGE;
            for (number, lower) in (0..).zip(frames.table(lower).iter_mut()) {
                *lower = ((entry & ADDRESS) + number * step) | flags | large;
            }
            frames.table(table)[slot] = lower | flags;
            lower
        } else {
            entry & ADDRESS
        };
    }
    frames.table(table)[index(from, 12)] = if flags == 0 { 0 } else { to & ADDRESS | flags };
    Ok(())
}

/// The table under an entry, which is made when it is not there.
fn below(frames: &mut impl Frames, table: u64, slot: usize, flags: u64) -> Result<u64, NoFrames> {
    let entry = frames.table(table)[slot];
    if entry & PRESENT != 0 {
        return Ok(entry & ADDRESS);
    }
    let lower = frames.frame().ok_or(NoFrames)?;
    frames.table(table)[slot] = lower | flags;
    Ok(lower)
}

fn index(address: u64, shift: u32) -> usize {
    usize::try_from(address >> shift & 511).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::boxed::Box;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    struct Pool(Vec<Box<[u64; 512]>>, usize);

    impl Frames for Pool {
        fn frame(&mut self) -> Option<u64> {
            if self.0.len() == self.1 {
                return None;
            }
            self.0.push(Box::new([0; 512]));
            Some(u64::try_from(self.0.len()).unwrap() << 12)
        }
        fn table(&mut self, address: u64) -> &mut [u64; 512] {
            let number = usize::try_from(address >> 12).unwrap();
            &mut self.0[number - 1]
        }
    }

    /// Where an address leads, with the flags of all levels together.
    fn lookup(pool: &mut Pool, root: u64, address: u64) -> Option<(u64, u64)> {
        let mut table = root;
        let mut flags = PRESENT | WRITABLE | USER;
        for shift in [39, 30, 21, 12] {
            let entry = pool.table(table)[index(address, shift)];
            flags &= entry;
            if entry & PRESENT == 0 {
                return None;
            }
            if shift == 12 || entry & LARGE != 0 {
                let mask = (1u64 << shift) - 1;
                return Some((entry & ADDRESS & !mask | address & mask, flags));
            }
            table = entry & ADDRESS;
        }
        None
    }

    proptest! {
        #[test]
        fn each_address_leads_to_itself(address in 0u64..1 << 40, gigabytes: bool, hole in 0u64..1 << 28) {
            let mut pool = Pool(Vec::new(), 4000);
            let width = Width { bits: 40, gigabytes };
            let root = identity(&mut pool, width, PRESENT | WRITABLE | USER).unwrap();
            prop_assert_eq!(lookup(&mut pool, root, address), Some((address, 7)));
            let hole = hole << 12;
            set(&mut pool, root, hole, 0, 0).unwrap();
            prop_assert_eq!(lookup(&mut pool, root, hole), None);
            let expected = (address >> 12 != hole >> 12).then_some((address, 7));
            prop_assert_eq!(lookup(&mut pool, root, address), expected);
            for beside in [hole.wrapping_sub(1), hole + 4096] {
                if beside < 1 << 40 {
                    prop_assert_eq!(lookup(&mut pool, root, beside), Some((beside, 7)));
                }
            }
            set(&mut pool, root, hole, 0x5000, PRESENT).unwrap();
            prop_assert_eq!(lookup(&mut pool, root, hole + 7), Some((0x5007, PRESENT)));
        }
    }

    #[test]
    fn no_frames_is_an_error() {
        let width = Width {
            bits: 40,
            gigabytes: true,
        };
        assert_eq!(identity(&mut Pool(Vec::new(), 3), width, 7), Err(NoFrames));
    }
}
