//! What the guest's programs can try, in user mode: `int n`, `sysenter`, ports, segment
//! loads, MSRs, huge addresses, and single-stepping over the entries.
//!
//! XSA-7 (CVE-2012-0217: SYSRET to an address that is not canonical faults in ring 0),
//! XSA-260 (CVE-2018-8897: a debug exception held back by MOV SS comes in ring 0),
//! XSA-204 (SYSCALL with TF set), XSA-339 (SYSENTER with NT), XSA-156 (#DB without end),
//! XSA-44 (SYSENTER with a return address that is not canonical).

use blanket_abi::xen::hypercall::{self as nr, callback, mmuext, vgcf};

use crate::instructions::{code, iret};
use crate::kernel::{KERNEL_CS, KERNEL_SS, Kernel, SCRATCH, TABLES, attempt, hypercall};
use crate::rng::Rng;

const TF: u64 = 1 << 8;
const NT: u64 = 1 << 14;
const AC: u64 = 1 << 18;
const RF: u64 = 1 << 16;

/// Addresses around the holes, where the next instruction's address is in another world.
fn edge(rng: &mut Rng) -> u64 {
    rng.pick(&[
        0x0000_7fff_ffff_fffe,
        0x0000_7fff_ffff_ffff,
        0x0000_8000_0000_0000,
        0xffff_7fff_ffff_ffff,
        0xffff_8000_0000_0000,
        0xffff_87ff_ffff_fffe,
        0xffff_8800_0000_0000,
        0xffff_ffff_ffff_fffe,
        u64::MAX,
        0x4141_4141_4141_4141,
    ])
}

pub fn attack(k: &Kernel, rng: &mut Rng) {
    let op = [u64::from(mmuext::NEW_USER_BASEPTR), k.root, 0];
    hypercall(nr::MMUEXT_OP, [op.as_ptr() as u64, 1, 0, 0x7ff0, 0]);
    let stack = k.scratch(TABLES + rng.below(SCRATCH - TABLES)) + 2048;
    for _ in 0..8 {
        let at = code(k, rng, true);
        let mut rip = at;
        let mut flags = 0x202;
        let mut how = 0;
        match rng.below(5) {
            // Stepping through what is there, entries included.
            0 => flags |= TF,
            // All flags that an entry must not keep.
            1 => flags |= rng.pick(&[NT, AC, RF, NT | TF, AC | TF, RF | TF]),
            // Back as by SYSRET, to where it must not go.
            2 => {
                how = vgcf::IN_SYSCALL;
                rip = edge(rng);
            }
            3 => rip = edge(rng),
            // The system call entry of the kernel itself is an address like that.
            _ => {
                for kind in [callback::SYSCALL, callback::SYSENTER, callback::SYSCALL32] {
                    let register = [u64::from(kind), edge(rng)];
                    let at = register.as_ptr() as u64;
                    hypercall(nr::CALLBACK_OP, [callback::REGISTER, at, 0, 0, 0]);
                }
            }
        }
        let frame = [
            rng.next(),
            rng.next(),
            at,
            how,
            rip,
            KERNEL_CS,
            flags,
            stack,
            KERNEL_SS,
        ];
        attempt(k, || iret(&frame));
        crate::kernel::install_handlers(k);
    }
    breakpoints(k, rng);
}

/// Hardware breakpoints on everything that an entry touches, then user mode.
fn breakpoints(k: &Kernel, rng: &mut Rng) {
    for (register, value) in [
        (0, edge(rng)),
        (1, rng.address(k)),
        (2, 0xffff_8080_1002_0000),
        (3, k.scratch(TABLES)),
        (7, 0x400 | rng.next() & 0xffff_00ff),
    ] {
        hypercall(nr::SET_DEBUGREG, [register, value, 0, 0, 0]);
    }
    let at = code(k, rng, true);
    let stack = k.scratch(TABLES) + 8;
    let frame = [0, 0, 0, 0, at, KERNEL_CS, 0x202 | TF, stack, KERNEL_SS];
    attempt(k, || iret(&frame));
    hypercall(nr::SET_DEBUGREG, [7, 0x400, 0, 0, 0]);
}
