//! Privileged and odd instructions in kernel and user mode, and return frames of all
//! kinds on the way there.

use core::arch::asm;

use blanket_abi::xen::hypercall::{self as nr, mmuext};

use crate::kernel::{KERNEL_CS, KERNEL_SS, Kernel, SCRATCH, TABLES, attempt, hypercall};
use crate::rng::Rng;

/// Instructions without operands in memory. The kernel is left by none of them.
const CODES: &[&[u8]] = &[
    &[0xcd, 0x00],                               // int 0 ...
    &[0xcd, 0x02],                               // int 2
    &[0xcd, 0x03],                               // int 3
    &[0xcd, 0x08],                               // int 8
    &[0xcd, 0x0e],                               // int 14
    &[0xcd, 0x12],                               // int 18
    &[0xcd, 0x80],                               // int 0x80
    &[0xcd, 0x82],                               // int 0x82, Xen's old gate
    &[0xcd, 0xf1],                               // int 0xf1, the core's own vector inside KVM
    &[0xcd, 0xff],                               // int 0xff
    &[0xcc],                                     // int3
    &[0xf1],                                     // int1
    &[0x0f, 0x34],                               // sysenter
    &[0x0f, 0x35],                               // sysexit
    &[0x48, 0x0f, 0x07],                         // sysretq
    &[0x48, 0xcf],                               // iretq
    &[0xe4, 0x71],                               // in al, 0x71
    &[0xe6, 0x80],                               // out 0x80, al
    &[0xec],                                     // in al, dx
    &[0xee],                                     // out dx, al
    &[0x6e],                                     // outsb
    &[0x0f, 0x30],                               // wrmsr
    &[0x0f, 0x32],                               // rdmsr
    &[0x0f, 0x33],                               // rdpmc
    &[0x0f, 0x01, 0xd0],                         // xgetbv
    &[0x0f, 0x01, 0xd1],                         // xsetbv
    &[0x0f, 0x01, 0xd8],                         // vmrun
    &[0x0f, 0x01, 0xd9],                         // vmmcall
    &[0x0f, 0x01, 0xc1],                         // vmcall
    &[0x0f, 0x01, 0xda],                         // vmload
    &[0x0f, 0x01, 0xdd],                         // clgi
    &[0x0f, 0x01, 0xdf],                         // invlpga
    &[0x0f, 0x01, 0xf8],                         // swapgs
    &[0x0f, 0x01, 0xca],                         // clac
    &[0x0f, 0x01, 0xcb],                         // stac
    &[0x0f, 0x06],                               // clts
    &[0x0f, 0x08],                               // invd
    &[0x0f, 0x09],                               // wbinvd
    &[0x0f, 0x20, 0xc0],                         // mov rax, cr0
    &[0x0f, 0x20, 0xd8],                         // mov rax, cr3
    &[0x0f, 0x22, 0xc0],                         // mov cr0, rax
    &[0x0f, 0x22, 0xd8],                         // mov cr3, rax
    &[0x0f, 0x22, 0xe0],                         // mov cr4, rax
    &[0x44, 0x0f, 0x22, 0xc0],                   // mov cr8, rax
    &[0x0f, 0x21, 0xf8],                         // mov rax, dr7
    &[0x0f, 0x23, 0xc0],                         // mov dr0, rax
    &[0x0f, 0x23, 0xf8],                         // mov dr7, rax
    &[0x0f, 0x01, 0x10],                         // lgdt [rax]
    &[0x0f, 0x01, 0x18],                         // lidt [rax]
    &[0x0f, 0x01, 0x38],                         // invlpg [rax]
    &[0x0f, 0x00, 0xd8],                         // ltr ax
    &[0x0f, 0x00, 0xd0],                         // lldt ax
    &[0x0f, 0x01, 0xf0],                         // lmsw ax
    &[0xfa],                                     // cli
    &[0xfb],                                     // sti
    &[0xf4],                                     // hlt
    &[0x0f, 0x0b],                               // ud2
    &[0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x0f, 0xa2], // Xen's prefix and cpuid
    &[0x0f, 0xa2],                               // cpuid
    &[0x8e, 0xd0],                               // mov ss, ax
    &[0x17],                                     // no instruction in 64-bit mode
    &[0xf3, 0x48, 0x0f, 0xae, 0xd8],             // wrgsbase rax
    &[0xf3, 0x0f, 0xc7, 0xf8],                   // rdpid
    &[0x0f, 0xae, 0x28],                         // xrstor [rax]
];

/// `syscall`, which from user mode ends the attempt; in kernel mode `ud2` does.
const LEAVE: &[u8] = &[0x0f, 0x05, 0x0f, 0x0b];

/// The code above with random registers, then `syscall`, in a page of its own.
pub fn code(k: &Kernel, rng: &mut Rng, in_user: bool) -> u64 {
    let at = k.scratch(TABLES + rng.below(SCRATCH - TABLES)) + 64 * rng.below(60);
    let mut to = at as *mut u8;
    let mut put = |bytes: &[u8]| {
        for &byte in bytes {
            // SAFETY: at most 80 bytes of a scratch page.
            unsafe {
                to.write_volatile(byte);
                to = to.add(1);
            }
        }
    };
    for opcode in [0xb8u8, 0xb9, 0xba] {
        put(&[0x48, opcode]);
        put(&rng.word(k).to_le_bytes());
    }
    for _ in 0..=rng.below(3) {
        let code = rng.pick(CODES);
        // In kernel mode a stack pointer from nowhere is the end: the next fault has no
        // place for its frame.
        if in_user || k.deadly || code != [0x48, 0xcf] {
            put(code);
        }
    }
    put(LEAVE);
    at
}

/// Leaves by the iret hypercall with this frame.
pub fn iret(frame: &[u64; 9]) {
    // SAFETY: none: where it goes is the attack.
    unsafe {
        asm!("mov rsp, {}", "mov eax, 23", "syscall", "ud2", in(reg) frame.as_ptr(), options(noreturn));
    }
}

pub fn attack(k: &Kernel, rng: &mut Rng) {
    let kind = rng.below(4);
    // To user mode, on a root that has this kernel's pages.
    if !k.deadly || kind != 3 {
        let op = [u64::from(mmuext::NEW_USER_BASEPTR), k.root, 0];
        hypercall(nr::MMUEXT_OP, [op.as_ptr() as u64, 1, 0, 0x7ff0, 0]);
    }
    let at = code(k, rng, matches!(kind, 1 | 2));
    let stack = k.scratch(TABLES + rng.below(SCRATCH - TABLES)) + 2048;
    match kind {
        0 => {
            attempt(k, || {
                // SAFETY: the code there does what it does; registers are lost.
                unsafe { asm!("jmp {}", in(reg) at, options(noreturn)) }
            });
        }
        1 | 2 => {
            let flags = rng.next() & 0x3f_7fd5 & !(1 << 8) | 0x202;
            let frame = [
                rng.next(),
                rng.next(),
                rng.next(),
                0,
                at,
                0xe033,
                flags,
                stack,
                0xe02b,
            ];
            attempt(k, || iret(&frame));
        }
        _ => {
            let landing = k.trap();
            let selector = |rng: &mut Rng, good: u64| match rng.below(3) {
                0 => good,
                1 => rng.next() & 0xffff,
                _ => rng.next(),
            };
            let rip = if rng.once_in(2) {
                landing
            } else {
                rng.address(k)
            };
            let frame = [
                rng.next(),
                rng.next(),
                rng.next(),
                rng.pick(&[0, 0x100, u64::MAX]),
                rip,
                selector(rng, KERNEL_CS & !3),
                // With events masked, nothing ends a loop in what is found there.
                if k.deadly {
                    rng.next()
                } else {
                    rng.next() | 0x200
                },
                if k.deadly && rng.once_in(16) {
                    rng.address(k)
                } else {
                    stack
                },
                selector(rng, KERNEL_SS),
            ];
            attempt(k, || iret(&frame));
        }
    }
}
