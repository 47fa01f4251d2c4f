//! Descriptors of all kinds in GDT and LDT, and selectors that load them.

use core::arch::asm;

use blanket_abi::xen::hypercall::{self as nr, mmuext, segbase};

use crate::kernel::{Kernel, SCRATCH, TABLES, attempt, hypercall};
use crate::rng::Rng;

fn descriptor(k: &Kernel, rng: &mut Rng) -> u64 {
    match rng.below(5) {
        // Gates, TSSs and LDTs, code and data, of all privileges.
        0 => rng.next() & !(0x1f << 40) | rng.below(32) << 40 | 1 << 47,
        1 => 0x00cf_9b00_0000_ffff | rng.below(4) << 45,
        2 => 0x00cf_9300_0000_ffff | rng.below(4) << 45 | (rng.next() & 0xff_ffff) << 16,
        3 => rng.word(k),
        _ => rng.next(),
    }
}

pub fn attack(k: &Kernel, rng: &mut Rng) {
    for _ in 0..8 {
        match rng.below(7) {
            0 => {
                let frames = k.fill(rng, 14, |rng, _| rng.gfn(k));
                let entries = rng.pick(&[0, 1, 512, 513, 7168, 7169, 8192]) + rng.below(2);
                hypercall(nr::SET_GDT, [frames, entries, 0, 0, 0]);
            }
            1 | 2 => {
                let gfn = if rng.once_in(4) {
                    rng.gfn(k)
                } else {
                    k.scratch_gfn(TABLES + rng.below(SCRATCH - TABLES))
                };
                let at = gfn << 12 | rng.next() & 0xfff;
                hypercall(nr::UPDATE_DESCRIPTOR, [at, descriptor(k, rng), 0, 0, 0]);
            }
            3 => {
                let table = k.fill(rng, 64, descriptor_of(k));
                let op = [
                    u64::from(mmuext::SET_LDT),
                    if rng.once_in(3) {
                        rng.address(k)
                    } else {
                        table & !4095
                    },
                    rng.pick(&[0, 1, 64, 512, 8192, 8193, u64::MAX]),
                ];
                hypercall(nr::MMUEXT_OP, [op.as_ptr() as u64, 1, 0, 0x7ff0, 0]);
            }
            4 => {
                let which = rng.pick(&[
                    segbase::FS,
                    segbase::GS_USER,
                    segbase::GS_KERNEL,
                    segbase::GS_USER_SEL,
                    9,
                ]);
                hypercall(nr::SET_SEGMENT_BASE, [which, rng.word(k), 0, 0, 0]);
            }
            _ => {
                let selector = rng.next() as u16;
                let which = rng.below(5);
                attempt(k, || {
                    // SAFETY: 64-bit code uses no data segment, and a selector that
                    // the CPU refuses faults.
                    unsafe {
                        match which {
                            0 => asm!("mov ds, {:e}", in(reg) u32::from(selector)),
                            1 => asm!("mov es, {:e}", in(reg) u32::from(selector)),
                            2 => asm!("mov fs, {:e}", in(reg) u32::from(selector)),
                            3 => asm!("mov gs, {:e}", in(reg) u32::from(selector)),
                            _ => asm!("lar {0:e}, {0:e}", inout(reg) u32::from(selector) => _),
                        }
                    }
                });
            }
        }
    }
}

fn descriptor_of(k: &Kernel) -> impl FnMut(&mut Rng, u64) -> u64 + '_ {
    move |rng, _| descriptor(k, rng)
}
