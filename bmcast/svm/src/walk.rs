//! A guest's own page tables (APM volume 2, chapter 5).

/// How a guest's CPU translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER.
    pub efer: u64,
}

const PAGING: u64 = 1 << 31;
const PSE: u64 = 1 << 4;
const PAE: u64 = 1 << 5;
const LA57: u64 = 1 << 12;
const LMA: u64 = 1 << 10;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The physical address of a linear one. `read` gives 8 bytes of guest memory at an aligned physical address, or
/// nothing where none is. Permissions are not looked at: the CPU has executed there.
pub fn walk(mode: Mode, linear: u64, mut read: impl FnMut(u64) -> Option<u64>) -> Option<u64> {
    if mode.cr0 & PAGING == 0 {
        return Some(linear & 0xffff_ffff);
    }
    if mode.cr4 & PAE == 0 {
        return walk_32(mode, linear & 0xffff_ffff, &mut read);
    }
    let (mut table, shifts): (u64, &[u32]) = if mode.efer & LMA == 0 {
        // Three levels, the first of four entries.
        let pointers = mode.cr3 & 0xffff_ffe0;
        let entry = read(pointers + (linear >> 30 & 3) * 8)?;
        if entry & 1 == 0 {
            return None;
        }
        (entry & ADDRESS, &[21, 12])
    } else if mode.cr4 & LA57 != 0 {
        (mode.cr3 & ADDRESS, &[48, 39, 30, 21, 12])
    } else {
        (mode.cr3 & ADDRESS, &[39, 30, 21, 12])
    };
    for shift in shifts {
        let entry = read(table + (linear >> shift & 511) * 8)?;
        if entry & 1 == 0 {
            return None;
        }
        if *shift == 12 || (*shift <= 30 && entry & 1 << 7 != 0) {
            let mask = (1u64 << shift) - 1;
            return Some(entry & ADDRESS & !mask | linear & mask);
        }
        table = entry & ADDRESS;
    }
    None
}

fn walk_32(mode: Mode, linear: u64, read: &mut impl FnMut(u64) -> Option<u64>) -> Option<u64> {
    let mut entry_at = |address: u64| {
        let both = read(address & !7)?;
        Some(both >> ((address & 4) * 8) & 0xffff_ffff)
    };
    let entry = entry_at((mode.cr3 & 0xffff_f000) + (linear >> 22) * 4)?;
    if entry & 1 == 0 {
        return None;
    }
    if entry & 1 << 7 != 0 && mode.cr4 & PSE != 0 {
        return Some(entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32 | linear & 0x3f_ffff);
    }
    let entry = entry_at((entry & 0xffff_f000) + (linear >> 12 & 1023) * 4)?;
    (entry & 1 != 0).then_some(entry & 0xffff_f000 | linear & 0xfff)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn long(cr3: u64, la57: bool) -> Mode {
        Mode {
            cr0: PAGING | 1,
            cr3,
            cr4: PAE | if la57 { LA57 } else { 0 },
            efer: LMA | 1 << 8,
        }
    }

    #[test]
    fn four_levels_and_large_pages() {
        let memory: HashMap<u64, u64> = HashMap::from([
            (0x1000 + 8 * 0x1ff, 0x2003),
            (0x2000 + 8 * 0x1fe, 0x3003),
            (0x3000 + 8 * 3, 0x4003),
            (0x4000 + 8 * 5, 0x8000_0000_dead_b063),
            (0x3000 + 8 * 4, 0x0040_00e3),
            (0x2000, 0x4000_00a3),
        ]);
        let read = |at: u64| Some(memory.get(&at).copied().unwrap_or(0));
        let at = |linear| walk(long(0x1000 | 5, false), linear, read);
        assert_eq!(at(0xffff_ffff_8060_5123), Some(0xdead_b123));
        assert_eq!(at(0xffff_ffff_8081_2345), Some(0x0041_2345));
        assert_eq!(at(0xffff_ff80_0abc_def0), Some(0x4abc_def0));
        assert_eq!(at(0xffff_ffff_8060_6123), None);
        assert_eq!(at(0), None);
    }

    #[test]
    fn without_paging_and_by_32_bits() {
        let none = |_| None;
        let mode = Mode {
            cr0: 1,
            cr3: 0,
            cr4: 0,
            efer: 0,
        };
        assert_eq!(walk(mode, 0x1_0000_1234, none), Some(0x1234));
        let memory: HashMap<u64, u64> =
            HashMap::from([(0x1000, 0x2003 << 32), (0x2000, 0x5003 << 32)]);
        let read = |at: u64| Some(memory.get(&at).copied().unwrap_or(0));
        let mode = Mode {
            cr0: PAGING | 1,
            cr3: 0x1000,
            cr4: 0,
            efer: 0,
        };
        assert_eq!(walk(mode, 0x0040_1abc, read), Some(0x5abc));
        assert_eq!(walk(mode, 0x0080_1abc, read), None);
    }

    proptest! {
        #[test]
        fn nonsense_ends(cr0: u64, cr3: u64, cr4: u64, efer: u64, linear: u64, entry: u64) {
            let mut reads = 0;
            let _ = walk(Mode { cr0, cr3, cr4, efer }, linear, |_| {
                reads += 1;
                Some(entry)
            });
            prop_assert!(reads <= 5);
        }
    }
}
