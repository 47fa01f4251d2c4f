//! `memory_op` with lists and numbers that do not fit.
//!
//! XSA-212: `memory_exchange` wrote its results behind a check that did not cover where
//! the list begins, so a guest wrote to any address. XSA-29 was the same call before it.
//! XSA-385: more frames than the domain may have. XSA-213: a multicall that returns
//! to another mode than it came from, with an `iret` or a change of root inside.

use blanket_abi::xen::hypercall::{self as nr, memory, mmuext};

use crate::kernel::{Kernel, SCRATCH, TABLES, attempt, hypercall, install_handlers};
use crate::rng::Rng;
use crate::tables::{ROOTS, SELF, ext, update};

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
        match rng.below(6) {
            0 | 1 => {
                multicall(k, rng);
                continue;
            }
            2 => {
                balloon(k, rng);
                continue;
            }
            _ => {}
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

/// Frames that are given up, used all the same (as pages, tables, roots), and asked for
/// again, while the other vCPU uses them too.
fn balloon(k: &Kernel, rng: &mut Rng) {
    // Not the roots, into which the other vCPU puts this kernel before it goes onto them,
    // nor the pages that may be its stack at the moment.
    let tables = |rng: &mut Rng| ROOTS + rng.below(TABLES - ROOTS);
    let stacks = k.scratch_gfn(TABLES)..=k.scratch_gfn(SCRATCH - 1);
    let gfns: [u64; 8] = core::array::from_fn(|_| {
        let any = rng.gfn(k);
        if k.deadly || !k.vital(any) && !stacks.contains(&any) && rng.once_in(3) {
            any
        } else {
            k.scratch_gfn(tables(rng))
        }
    });
    let some = |cmd: u64, list: &[u64]| {
        let words = [list.as_ptr() as u64, list.len() as u64, 0, SELF];
        hypercall(nr::MEMORY_OP, [cmd, words.as_ptr() as u64, 0, 0, 0])
    };
    some(memory::DECREASE_RESERVATION, &gfns);
    let window = k.scratch(tables(rng));
    for gfn in gfns {
        let entry = gfn << 12 | 0x67;
        match rng.below(7) {
            0 => ext(mmuext::PIN_L1 + rng.below(4) as u32, gfn, 0),
            1 => update(gfn << 12 | rng.below(512) * 8, rng.entry(k)),
            2 => ext(mmuext::NEW_USER_BASEPTR, gfn, 0),
            3 => ext(mmuext::CLEAR_PAGE, gfn, 0),
            4 => ext(mmuext::COPY_PAGE, gfn, k.scratch_gfn(rng.below(SCRATCH))),
            5 => update(
                k.scratch_gfn(rng.below(TABLES)) << 12 | rng.below(512) * 8,
                entry,
            ),
            _ => hypercall(nr::UPDATE_VA_MAPPING, [window, entry, 2, 0, 0]),
        };
        attempt(k, || {
            let at = window as *mut u64;
            // SAFETY: a scratch page of ours, or none: then a fault ends the attempt.
            unsafe { at.write_volatile(at.read_volatile() | 1) };
        });
    }
    // A list ends at the first frame that is not out.
    for gfn in gfns {
        some(memory::POPULATE_PHYSMAP, &[gfn]);
    }
    crate::tables::restore_scratch(k);
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
