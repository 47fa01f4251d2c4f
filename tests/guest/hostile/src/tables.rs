//! Page tables: cycles, self maps, tables of one level used as another, entries for
//! frames of others and for the hypervisor's range, changes behind the core's back.

use blanket_abi::xen::hypercall::{self as nr, mmu, mmuext};

use crate::kernel::{Kernel, TABLES, VIRT_BASE, attempt, hypercall};
use crate::rng::Rng;

const SELF: u64 = 0x7ff0;

fn update(ptr: u64, val: u64) -> i64 {
    let request = [ptr, val];
    hypercall(nr::MMU_UPDATE, [request.as_ptr() as u64, 1, 0, SELF, 0])
}

fn ext(cmd: u32, a: u64, b: u64) -> i64 {
    let op = [u64::from(cmd), a, b];
    hypercall(nr::MMUEXT_OP, [op.as_ptr() as u64, 1, 0, SELF, 0])
}

/// Tables 0 to 2 are roots that have this kernel, so that one may live on them.
const ROOTS: u64 = 3;
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

/// Looks at an address, and sometimes writes there. What is found does not matter.
fn touch(rng: &mut Rng, va: u64) {
    let kind = rng.below(4);
    attempt(|| {
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
        match rng.below(14) {
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
                ext(mmuext::NEW_BASEPTR, k.scratch_gfn(rng.below(ROOTS)), 0);
                for _ in 0..6 {
                    let va = lower(rng);
                    touch(rng, va);
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
                attempt(|| {
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
