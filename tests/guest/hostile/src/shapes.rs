//! Structures where they do not belong: not aligned, over the end of a page into one
//! that is missing, read-only, a page table, or the hypervisor's.
//!
//! Classes: XSA-155 (read twice), XSA-7's relatives that copy by words, XSA-25 and XSA-31
//! (lengths that wrap around).

use blanket_abi::xen::hypercall::{self as nr, mmuext, vcpu};

use crate::kernel::{Kernel, SCRATCH, TABLES, attempt, hypercall};
use crate::rng::Rng;
use crate::tables;

/// Calls that take a structure, with where its address goes and what is around it.
const TAKERS: &[(u64, [u64; 4], usize)] = &[
    (nr::SET_TRAP_TABLE, [0, 0, 0, 0], 0),
    (nr::MMU_UPDATE, [0, 1, 0, 0x7ff0], 0),
    (nr::MMU_UPDATE, [0, 1, 0, 0x7ff0], 2),
    (nr::SET_GDT, [0, 16, 0, 0], 0),
    (nr::MEMORY_OP, [9, 0, 0, 0], 1),
    (nr::MEMORY_OP, [12, 0, 0, 0], 1),
    (nr::MULTICALL, [0, 2, 0, 0], 0),
    (nr::XEN_VERSION, [1, 0, 0, 0], 1),
    (nr::XEN_VERSION, [2, 0, 0, 0], 1),
    (nr::XEN_VERSION, [6, 0, 0, 0], 1),
    (nr::CONSOLE_IO, [0, 64, 0, 0], 2),
    (nr::GRANT_TABLE_OP, [6, 0, 1, 0], 1),
    (nr::GRANT_TABLE_OP, [5, 0, 2, 0], 1),
    (nr::VCPU_OP, [vcpu::REGISTER_VCPU_INFO, 0, 0, 0], 2),
    (nr::VCPU_OP, [vcpu::GET_RUNSTATE_INFO, 0, 0, 0], 2),
    (
        nr::VCPU_OP,
        [vcpu::REGISTER_RUNSTATE_MEMORY_AREA, 0, 0, 0],
        2,
    ),
    (
        nr::VCPU_OP,
        [vcpu::REGISTER_VCPU_TIME_MEMORY_AREA, 0, 0, 0],
        2,
    ),
    (nr::VCPU_OP, [vcpu::INITIALISE, 1, 0, 0], 2),
    (nr::MMUEXT_OP, [0, 1, 0, 0x7ff0], 0),
    (nr::CALLBACK_OP, [0, 0, 0, 0], 1),
    (nr::EVENT_CHANNEL_OP, [6, 0, 0, 0], 1),
    (nr::EVENT_CHANNEL_OP, [5, 0, 0, 0], 1),
    (nr::PHYSDEV_OP, [6, 0, 0, 0], 1),
    (nr::VM_ASSIST, [0, 0, 0, 0], 1),
];

pub fn attack(k: &Kernel, rng: &mut Rng) {
    // Two pages in a row of which the second is missing, read-only, or a table.
    let page = TABLES + rng.below(SCRATCH - TABLES - 1);
    let second = k.scratch(page + 1);
    let entry = match rng.below(5) {
        0 => 0,
        1 => k.scratch_gfn(page + 1) << 12 | 0x25,
        2 => k.scratch_gfn(rng.below(TABLES)) << 12 | 0x25,
        3 => k.scratch_gfn(page) << 12 | 0x67,
        _ => k.scratch_gfn(page + 1) << 12 | 0x67,
    };
    hypercall(nr::UPDATE_VA_MAPPING, [second, entry, 2, 0, 0]);
    for _ in 0..24 {
        let (number, mut args, slot) = rng.pick(TAKERS);
        args[slot] = match rng.below(6) {
            0 => second - rng.below(64),
            1 => second - 1,
            2 => second - 4096 + rng.below(4096),
            3 => 0xffff_8000_0000_0000 - rng.below(64),
            4 => 0x0000_8000_0000_0000 - rng.below(64),
            _ => rng.address(k),
        };
        if rng.once_in(4) {
            let other = (slot + 1) % 4;
            // A length or a count that wraps an end around.
            if number != nr::MULTICALL {
                args[other] = rng.pick(&[u64::MAX, 1 << 63, 1 << 61, 1 << 32, 0]);
            }
        }
        hypercall(number, [args[0], args[1], args[2], args[3], 0]);
    }
    crate::kernel::install_handlers(k);
    // The LDT from a page that is missing or a table, with descriptors used at once.
    tables::ext(mmuext::SET_LDT, second, 512);
    let selector = (rng.below(512) << 3 | 7) as u32;
    attempt(k, || {
        // SAFETY: 64-bit code uses no data segment, and a bad one faults.
        unsafe { core::arch::asm!("mov ds, {:e}", in(reg) selector) }
    });
    tables::ext(mmuext::SET_LDT, 0, 0);
}
