//! Page tables: cycles, self maps, tables of one level used as another, entries for
//! frames of others and for the hypervisor's range, changes behind the core's back.

use blanket_abi::xen::hypercall::{self as nr, mmu, mmuext};

use crate::kernel::{Kernel, SCRATCH, TABLES, VIRT_BASE, attempt, hypercall};
use crate::rng::Rng;

pub const SELF: u64 = 0x7ff0;

pub fn update(ptr: u64, val: u64) -> i64 {
    let request = [ptr, val];
    hypercall(nr::MMU_UPDATE, [request.as_ptr() as u64, 1, 0, SELF, 0])
}

pub fn ext(cmd: u32, a: u64, b: u64) -> i64 {
    let op = [u64::from(cmd), a, b];
    hypercall(nr::MMUEXT_OP, [op.as_ptr() as u64, 1, 0, SELF, 0])
}

/// Tables 0 to 2 are roots that have this kernel, so that one may live on them.
pub const ROOTS: u64 = 3;
const KERNEL_SLOT: u64 = 511;

fn kernel_entry(k: &Kernel) -> u64 {
    let root = VIRT_BASE + (k.root << 12);
    // SAFETY: the builder mapped its tables, read-only.
    unsafe { ((root + KERNEL_SLOT * 8) as *const u64).read_volatile() }
}

pub fn prepare(k: &Kernel) {
    for n in 0..ROOTS {
        update(k.scratch_gfn(n) << 12 | KERNEL_SLOT * 8, kernel_entry(k));
    }
}

/// Onto a root of ours. Another attack may have taken this kernel out of it.
pub fn enter_root(k: &Kernel, n: u64) {
    let gfn = k.scratch_gfn(n % ROOTS);
    if !k.deadly {
        update(gfn << 12 | KERNEL_SLOT * 8, kernel_entry(k));
    }
    ext(mmuext::NEW_BASEPTR, gfn, 0);
}

/// Maps every scratch page where it belongs, writable, whatever attacks have made of it.
pub fn restore_scratch(k: &Kernel) {
    for n in 0..SCRATCH {
        let entry = k.scratch_gfn(n) << 12 | 0x67;
        hypercall(nr::UPDATE_VA_MAPPING, [k.scratch(n), entry, 2, 0, 0]);
    }
}

/// Looks at an address, and sometimes writes there. What is found does not matter.
fn touch(k: &Kernel, rng: &mut Rng, va: u64) {
    let kind = rng.below(4);
    attempt(k, || {
        let at = va as *mut u64;
        // SAFETY: none: a fault ends the attempt, and a write may land in any memory
        // of this kernel but its code and stack, which no table here maps.
        unsafe {
            match kind {
                0 => at.write_volatile(va),
                1 => core::arch::asm!("lock or qword ptr [{}], 1", in(reg) at),
                _ => {
                    at.read_volatile();
                }
            }
        }
    });
}

/// An address in the part that tables of ours map, not this kernel's.
fn lower(rng: &mut Rng) -> u64 {
    let slot = rng.pick(&[0, 1, 2, 255, 256, 257, 258, 259, 271, 272, 510]);
    let low = rng.next() & 0x7f_ffff_fff8;
    let va = slot << 39 | low & rng.pick(&[0x1f_fff8, 0x3fff_fff8, 0x7f_ffff_fff8, 0xff8]);
    if slot >= 256 { va | 0xffff << 48 } else { va }
}

pub fn attack(k: &Kernel, rng: &mut Rng) {
    for _ in 0..12 {
        let table = rng.below(TABLES);
        let gfn = k.scratch_gfn(table);
        match rng.below(17) {
            14 => superpage(k, rng),
            15 => recursive(k, rng),
            16 => user_and_global(k, rng),
            0..5 => {
                // Mostly links among the tables: trees, cycles, level confusion.
                let val = if rng.once_in(3) {
                    rng.entry(k)
                } else {
                    k.scratch_gfn(rng.below(TABLES)) << 12 | 0x67
                };
                let slot = match rng.below(4) {
                    0 => 256 + rng.below(16),
                    1 => rng.below(512),
                    _ => rng.pick(&[0, 1, 2, 255, 272, 510]),
                };
                if table >= ROOTS || slot != KERNEL_SLOT {
                    let kind = rng.pick(&[mmu::NORMAL, mmu::PRESERVE_AD]);
                    update(gfn << 12 | slot * 8 | kind, val);
                }
            }
            5 => {
                ext(rng.below(4) as u32 + mmuext::PIN_L1, gfn, 0);
            }
            6 => {
                ext(mmuext::UNPIN, gfn, 0);
            }
            7 | 8 => {
                // Onto a root of ours, look around, and let the main loop go back.
                enter_root(k, rng.below(ROOTS));
                for _ in 0..6 {
                    let va = lower(rng);
                    touch(k, rng, va);
                }
            }
            9 => {
                ext(mmuext::NEW_USER_BASEPTR, rng.gfn(k), 0);
            }
            10 => {
                // Read-only or not: the core must not care.
                let rights = rng.pick(&[0x25, 0x67, 0x65, 0x8000_0000_0000_0067]);
                let va = k.scratch(table);
                hypercall(
                    nr::UPDATE_VA_MAPPING,
                    [va, gfn << 12 | rights, rng.below(8), 0, 0],
                );
            }
            11 => {
                // A store into a table, which faults if it is mapped read-only.
                let slot = rng.below(KERNEL_SLOT);
                let val = rng.entry(k);
                let at = k.scratch(table) + slot * 8;
                attempt(k, || {
                    // SAFETY: memory of this kernel, whatever it is used as.
                    unsafe { (at as *mut u64).write_volatile(val) }
                });
            }
            12 => {
                let va = rng.address(k);
                let val = rng.entry(k);
                if !(VIRT_BASE..).contains(&va) {
                    hypercall(nr::UPDATE_VA_MAPPING, [va, val, rng.next() & 7, 0, 0]);
                }
            }
            _ => {
                let request = k.fill(rng, 32, |rng, i| {
                    if i % 2 == 0 {
                        let gfn = k.scratch_gfn(ROOTS + rng.below(TABLES - ROOTS));
                        gfn << 12 | rng.below(4096)
                    } else {
                        rng.entry(k)
                    }
                });
                let count = if rng.once_in(8) { rng.next() } else { 16 };
                hypercall(
                    nr::MMU_UPDATE,
                    [request, count.min(16), rng.address(k), SELF, 0],
                );
            }
        }
    }
}

/// XSA-148: an L2 entry with the superpage bit, which must not become a 2 MiB mapping
/// of whatever follows the frame; then its rights change without the frame changing.
fn superpage(k: &Kernel, rng: &mut Rng) {
    let l2 = k.scratch_gfn(ROOTS + rng.below(TABLES - ROOTS));
    let slot = rng.below(512);
    for flags in [0xe7, 0x1e7, 0xa7, 0xe5, 0x67] {
        let frame = if rng.once_in(2) {
            rng.below(64) << 9
        } else {
            rng.gfn(k)
        };
        update(l2 << 12 | slot * 8, frame << 12 | flags);
    }
    link(k, rng, l2);
}

/// XSA-182, and what recursive entries were used for since: a table that maps itself,
/// read-only first and then writable, by an update that changes the rights alone.
fn recursive(k: &Kernel, rng: &mut Rng) {
    let table = rng.below(TABLES);
    let gfn = k.scratch_gfn(table);
    let slot = rng.pick(&[0, 1, 255, 272, 510]);
    for flags in [
        0x25,
        0x27,
        0x65,
        0x67,
        0x8000_0000_0000_0025,
        0x8000_0000_0000_0067,
    ] {
        update(gfn << 12 | slot * 8 | mmu::NORMAL, gfn << 12 | flags);
        if rng.once_in(2) {
            update(
                gfn << 12 | slot * 8 | mmu::PRESERVE_AD,
                gfn << 12 | flags ^ 2,
            );
        }
    }
    enter_root(k, rng.below(ROOTS));
    // Through the entry at one, two, three and four levels.
    let base = slot << 39 | if slot >= 256 { 0xffff << 48 } else { 0 };
    for va in [
        base,
        base | slot << 30,
        base | slot << 30 | slot << 21,
        base | slot << 30 | slot << 21 | slot << 12,
    ] {
        touch(k, rng, va + slot * 8);
    }
}

/// Bits that only a hypervisor may decide about (XSA-173: reserved bits of the upper
/// half; global and user bits of the guest kernel's own pages), in tables of all levels.
fn user_and_global(k: &Kernel, rng: &mut Rng) {
    let gfn = k.scratch_gfn(ROOTS + rng.below(TABLES - ROOTS));
    for bit in [2, 3, 4, 7, 8, 9, 11, 52, 58, 59, 62, 63] {
        let frame = k.scratch_gfn(rng.below(SCRATCH));
        update(
            gfn << 12 | rng.below(512) * 8,
            (frame << 12 | 0x67) ^ 1 << bit,
        );
    }
    // A frame number beyond what any CPU has.
    update(gfn << 12 | rng.below(512) * 8, 0x000f_ffff_ffff_f067);
    link(k, rng, gfn);
}

/// Hangs a table into one of our roots at some level, and looks through it.
fn link(k: &Kernel, rng: &mut Rng, gfn: u64) {
    let root = k.scratch_gfn(rng.below(ROOTS));
    let slot = rng.pick(&[0, 1, 255, 272]);
    update(root << 12 | slot * 8, gfn << 12 | 0x67);
    enter_root(k, rng.below(ROOTS));
    for _ in 0..4 {
        let va = lower(rng);
        touch(k, rng, va);
    }
}
