//! Grants: the table itself, and copies with every bound wrong.
//!
//! Classes of Xen's advisories: XSA-224 and XSA-234 (map and unmap that do not match),
//! XSA-255 and XSA-268 (version changes under use), XSA-226 (transitive grants),
//! XSA-295 and XSA-334 (arguments that change while they are read).

use core::sync::atomic::Ordering::Relaxed;

use blanket_abi::xen::domid;
use blanket_abi::xen::grant::op;
use blanket_abi::xen::hypercall as nr;

use crate::kernel::{Kernel, attempt, hypercall};
use crate::rng::Rng;

/// A page of the guest's address space for the grant table, if it lets us map it.
fn grant_frame(k: &Kernel) -> u64 {
    // The builder puts the table behind the shared info.
    k.shared_info + 1
}

fn small(rng: &mut Rng) -> u64 {
    match rng.below(5) {
        0 => rng.below(16),
        1 => rng.below(20_000),
        2 => 4096 - rng.below(24),
        3 => rng.next() & 0xffff,
        _ => rng.next() & 0xffff_ffff,
    }
}

fn domain(rng: &mut Rng) -> u64 {
    rng.pick(&[
        u64::from(domid::SELF),
        0,
        u64::from(domid::GUEST),
        0x7ff1,
        0x7ff2,
        0xffff,
    ])
}

/// Entries of the table (`struct grant_entry_v1`: flags, domain, frame), written
/// behind the hypervisor's back: it is this VM's memory.
fn write_entries(k: &Kernel, rng: &mut Rng) {
    let va = k.scratch(40);
    let frame = grant_frame(k) + rng.below(32);
    hypercall(nr::UPDATE_VA_MAPPING, [va, frame << 12 | 0x67, 2, 0, 0]);
    for _ in 0..16 {
        let at = va + rng.below(512) * 8;
        let entry = rng.next() & 0xffff | domain(rng) << 16 | rng.gfn(k) << 32;
        attempt(k, || {
            // SAFETY: the page that was just mapped, or a fault.
            unsafe { (at as *mut u64).write_volatile(entry) }
        });
    }
    let back = k.scratch_gfn(40) << 12 | 0x67;
    hypercall(nr::UPDATE_VA_MAPPING, [va, back, 2, 0, 0]);
}

/// `struct gnttab_copy`: source and destination of {frame or reference, domain,
/// offset}, length, flags, status. 40 bytes.
fn copies(k: &Kernel, rng: &mut Rng) {
    let count = 1 + rng.below(4);
    let args = k.fill(rng, count * 5, |rng, i| match i % 5 {
        0 | 2 => {
            if rng.once_in(2) {
                rng.gfn(k)
            } else {
                small(rng)
            }
        }
        1 | 3 => domain(rng) | small(rng) << 16,
        _ => small(rng) & 0xffff | rng.below(8) << 16,
    });
    let claimed = match rng.below(6) {
        0 if k.deadly => rng.next(),
        1 if k.deadly => 1 << 31,
        2 if k.deadly => 100_000,
        _ => count,
    };
    hypercall(nr::GRANT_TABLE_OP, [op::COPY, args, claimed, 0, 0]);
}

pub fn attack(k: &Kernel, rng: &mut Rng) {
    for _ in 0..12 {
        match rng.below(8) {
            0 => write_entries(k, rng),
            1..4 => copies(k, rng),
            4 => {
                // `struct gnttab_setup_table`: domain, frames, status, list.
                let list = if rng.once_in(2) {
                    rng.address(k)
                } else {
                    k.scratch(41)
                };
                let words = [domain(rng) | small(rng) << 32, 0, list];
                let args = k.fill(rng, 3, |_, i| words[i as usize]);
                hypercall(
                    nr::GRANT_TABLE_OP,
                    [op::SETUP_TABLE, args, 1 + rng.below(2), 0, 0],
                );
            }
            5 => {
                let version = rng.below(4);
                let args = k.fill(rng, 1, |_, _| version);
                hypercall(nr::GRANT_TABLE_OP, [op::SET_VERSION, args, 1, 0, 0]);
                hypercall(nr::GRANT_TABLE_OP, [op::GET_STATUS_FRAMES, args, 1, 0, 0]);
            }
            6 => {
                // A handle that was never given, one page of it mapped over another.
                let cmd = rng.pick(&[op::MAP, op::UNMAP, op::TRANSFER, op::SWAP_REF]);
                let args = k.fill(rng, 12, |rng, _| rng.word(k));
                hypercall(nr::GRANT_TABLE_OP, [cmd, args, rng.below(4), 0, 0]);
            }
            _ => {
                // The list changes while it is read: the other vCPU writes there too.
                let args = k.fill(rng, 20, |rng, _| small(rng));
                k.word_at(args).store(rng.gfn(k), Relaxed);
                hypercall(nr::GRANT_TABLE_OP, [op::COPY, args, 4, 0, 0]);
            }
        }
    }
}
