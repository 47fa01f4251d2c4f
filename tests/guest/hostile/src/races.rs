//! Two vCPUs at the same tables. With one vCPU these are attacks of their own.
//!
//! XSA-286 (entries changed through a linear mapping while they are read), XSA-299
//! (restartable operations that come back to changed tables), XSA-310 and XSA-317 (pin
//! and unpin, or port allocation, against each other), XSA-45 in part, XSA-401 and
//! XSA-402 (a frame becomes a table while it is still written).

use core::sync::atomic::Ordering::Relaxed;

use blanket_abi::xen::event::op as event;
use blanket_abi::xen::hypercall::{self as nr, mmuext, vcpu};

use crate::kernel::{Kernel, TABLES, attempt, hypercall};
use crate::rng::Rng;
use crate::tables::{SELF, enter_root, ext, update};

/// Tables of the higher levels, which both vCPUs choose from.
const FEW: u64 = 4;

pub fn attack(k: &Kernel, rng: &mut Rng) {
    match rng.below(6) {
        // The same few tables pinned as different levels and let go.
        0 => {
            for _ in 0..32 {
                let gfn = k.scratch_gfn(rng.below(FEW));
                let level = rng.pick(&[
                    mmuext::PIN_L1,
                    mmuext::PIN_L2,
                    mmuext::PIN_L3,
                    mmuext::PIN_L4,
                    mmuext::UNPIN,
                    mmuext::UNPIN,
                ]);
                ext(level, gfn, 0);
            }
        }
        // Entries of a table change, by hypercall here and by stores there, while a
        // root is loaded that walks it.
        1 => {
            let table = 3 + rng.below(FEW);
            let (va, gfn) = (k.scratch(table), k.scratch_gfn(table));
            for _ in 0..16 {
                let slot = rng.below(16);
                let entry = rng.entry(k);
                update(gfn << 12 | slot * 8, entry);
                attempt(k, || {
                    // SAFETY: a scratch page of this kernel, whatever it is used as.
                    unsafe { ((va + slot * 8) as *mut u64).write_volatile(entry ^ 2) }
                });
                if rng.once_in(4) {
                    enter_root(k, rng.below(3));
                    let at = slot << 12 | rng.below(512) * 8;
                    attempt(k, || {
                        // SAFETY: none: a fault ends it.
                        unsafe { (at as *const u64).read_volatile() };
                    });
                }
            }
        }
        // A frame becomes a table here and writable there.
        2 => {
            let table = rng.below(FEW);
            for _ in 0..16 {
                let gfn = k.scratch_gfn(table);
                if k.cpu == 0 {
                    ext(mmuext::PIN_L1, gfn, 0);
                    ext(mmuext::UNPIN, gfn, 0);
                } else {
                    let rights = rng.pick(&[0x67, 0x25]);
                    hypercall(
                        nr::UPDATE_VA_MAPPING,
                        [k.scratch(table), gfn << 12 | rights, 2 | 4, 0, 0],
                    );
                }
                k.word_at(k.scratch(TABLES)).fetch_add(1, Relaxed);
            }
        }
        // Ports bound, closed and sent to at once.
        3 => {
            for _ in 0..24 {
                let port = rng.below(8);
                let args = k.fill(rng, 3, |rng, i| match i {
                    0 => port | rng.below(3) << 32,
                    _ => rng.below(8) | rng.below(8) << 32,
                });
                let op = rng.pick(&[
                    event::BIND_IPI,
                    event::CLOSE,
                    event::SEND,
                    event::BIND_VIRQ,
                    event::ALLOC_UNBOUND,
                    event::BIND_VCPU,
                    event::UNMASK,
                    event::STATUS,
                ]);
                hypercall(nr::EVENT_CHANNEL_OP, [op, args, 0, 0, 0]);
            }
        }
        // The other vCPU's places: info, run state, start, NMI.
        4 => {
            for _ in 0..12 {
                let other = 1 - k.cpu as u64;
                let args = k.fill(rng, 8, |rng, _| rng.word(k));
                let cmd = rng.pick(&[
                    vcpu::REGISTER_VCPU_INFO,
                    vcpu::REGISTER_RUNSTATE_MEMORY_AREA,
                    vcpu::INITIALISE,
                    vcpu::UP,
                    vcpu::SEND_NMI,
                    vcpu::IS_UP,
                ]);
                if k.deadly || cmd != vcpu::REGISTER_VCPU_INFO {
                    hypercall(nr::VCPU_OP, [cmd, other, args, 0, 0]);
                }
            }
        }
        // Flushes of each other, with masks that name vCPUs that are not there.
        _ => {
            for _ in 0..12 {
                let mask = k.fill(rng, 1, |rng, _| rng.next());
                let cmd = rng.pick(&[
                    mmuext::TLB_FLUSH_MULTI,
                    mmuext::INVLPG_MULTI,
                    mmuext::TLB_FLUSH_ALL,
                    mmuext::INVLPG_ALL,
                ]);
                let op = [u64::from(cmd), rng.address(k), mask];
                hypercall(nr::MMUEXT_OP, [op.as_ptr() as u64, 1, 0, SELF, 0]);
            }
        }
    }
}
