//! Calls that a guest can make as long as it likes, and stops in the middle.
//!
//! XSA-45 and XSA-97 (operations that are not preemptible hold a CPU), XSA-158 and XSA-299
//! (what is restarted does not find what it left), XSA-246 (a count that is off by the
//! interruption).

use blanket_abi::xen::hypercall::{self as nr, mmu, mmuext};

use crate::kernel::{Kernel, SCRATCH, TABLES, hypercall};
use crate::rng::Rng;
use crate::tables::{SELF, ext, update};

pub fn attack(k: &Kernel, rng: &mut Rng) {
    match rng.below(4) {
        // A tree of tables that refer to each other everywhere, pinned as a whole.
        0 => {
            let level = rng.below(4) as u32 + mmuext::PIN_L1;
            for _ in 0..64 {
                let from = k.scratch_gfn(3 + rng.below(TABLES - 3));
                let to = k.scratch_gfn(rng.below(TABLES));
                update(from << 12 | rng.below(511) * 8, to << 12 | 0x67);
            }
            let gfn = k.scratch_gfn(3 + rng.below(TABLES - 3));
            ext(level, gfn, 0);
            ext(mmuext::UNPIN, gfn, 0);
        }
        // A long list, with a count of what was done that is this kernel's to write.
        1 => {
            let list = k.fill(rng, 512, |rng, i| {
                if i % 2 == 0 {
                    let gfn = k.scratch_gfn(3 + rng.below(TABLES - 3));
                    gfn << 12 | rng.below(512) * 8 | rng.pick(&[mmu::NORMAL, mmu::PRESERVE_AD])
                } else {
                    k.scratch_gfn(rng.below(SCRATCH)) << 12 | 0x25
                }
            }) & !4095;
            // The upper bit of the count is Xen's own mark of a call that goes on.
            // More than there are would run what lies behind as requests.
            let count = if k.deadly {
                rng.pick(&[256, 256 | 1 << 31, 1 << 31, u64::MAX >> 1])
            } else {
                256
            };
            let done = if rng.once_in(2) {
                list + 2048
            } else {
                k.scratch(43)
            };
            hypercall(nr::MMU_UPDATE, [list, count, done, SELF, 0]);
        }
        // Multicalls of calls that let interrupts in, timers firing meanwhile.
        2 => {
            let op = k.fill(rng, 3, |_, i| {
                [u64::from(mmuext::TLB_FLUSH_ALL), 0, 0][i as usize]
            });
            let list = k.fill(rng, 512, |_, i| match i % 8 {
                0 => nr::MMUEXT_OP,
                2 => op,
                3 => 1,
                5 => SELF,
                _ => 0,
            }) & !4095;
            for _ in 0..4 {
                hypercall(nr::MULTICALL, [list, 64, 0, 0, 0]);
            }
        }
        // Many small calls.
        _ => {
            for _ in 0..500 {
                hypercall(nr::XEN_VERSION, [0, 0, 0, 0, 0]);
            }
        }
    }
}
