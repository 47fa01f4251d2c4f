//! Entries to the guest kernel and the ways back, byte for byte
//! (`public/arch-x86/xen-x86_64.h`, `xen/arch/x86/x86_64/entry.S`).

mod common;

use blanket_abi::device::{crash, exit};
use blanket_abi::xen::event::op;
use blanket_abi::xen::hypercall::{self as nr, callback, vgcf};
use blanket_abi::xen::shared::vcpu_info;
use blanket_core::pte;
use blanket_core::vcpu::{entry, rflags};
use common::guest::{DIRECT, EVENT, FAILSAFE, Guest, KERNEL_RW, SYSCALL, TEXT, USER, handler};
use common::{ARGS, ARGS_SIZE, Setup, World};
use std::sync::atomic::Ordering::SeqCst;

/// Kernel stack that `stack_switch` has set.
const KERNEL_SP: u64 = ARGS + ARGS_SIZE;
/// Stack in use, for entries from kernel mode; not aligned.
const SP: u64 = ARGS + ARGS_SIZE / 2 + 8;
const CS_KERNEL: u64 = 0xe033;
const SS: u64 = 0xe02b;

fn world() -> (World, Guest) {
    let (mut w, g) = World::booted(Setup::default());
    set_masked(&w, false);
    let f = &mut w.regs[0];
    (f.rip, f.cs, f.ss, f.rsp) = (TEXT, CS_KERNEL, SS, SP);
    f.rflags = rflags::IF | rflags::ONE | 0x40;
    (f.rcx, f.r11) = (0xcccc, 0x1111);
    (w, g)
}

/// To user mode, as the iret hypercall does it.
fn user(w: &mut World) {
    w.cpu0(|c| c.to_user_mode());
    let f = &mut w.regs[0];
    (f.rip, f.cs, f.ss, f.rsp) = (USER + 0x10, 0x33, 0x2b, 0x7fff_0000_0ff8);
}

fn info(w: &World, field: u64) -> u64 {
    w.m.words(w.setup.shared_info())[field as usize / 8].load(SeqCst)
}

fn masked(w: &World) -> bool {
    info(w, vcpu_info::MASK) >> 8 & 0xff != 0
}

fn set_masked(w: &World, mask: bool) {
    w.m.bytes(w.setup.shared_info())[vcpu_info::MASK as usize].store(u8::from(mask), SeqCst);
}

fn code(w: &World, gfn: u64, at: u64, bytes: &[u8]) {
    for (i, &b) in bytes.iter().enumerate() {
        w.m.bytes(gfn)[at as usize + i].store(b, SeqCst);
    }
}

fn enter(w: &mut World, vector: u64, error: u64) {
    w.cpu0(|c| {
        (c.f.vector, c.f.error) = (vector, error);
        c.enter();
    });
}

/// The words of the frame on top of the stack.
fn frame<const N: usize>(w: &World) -> [u64; N] {
    w.m.words_at(w.regs[0].rsp, N).try_into().expect("N words")
}

// ---- frames ----

#[test]
fn a_frame_from_user_mode_without_an_error_code() {
    let (mut w, _) = world();
    (w.m.cpu().gs.set(0x1000), w.m.cpu().kgs.set(0x2000));
    user(&mut w);
    assert_eq!(
        (w.m.cpu().gs.get(), w.m.cpu().cr3.get()),
        (0x2000, w.fast[0].user_cr3)
    );
    w.regs[0].rflags |= rflags::AC | rflags::TF | rflags::DF | rflags::NT;
    let before = w.regs[0];
    enter(&mut w, 0, 0);
    let f = w.regs[0];
    assert_eq!((f.rip, f.cs, f.ss), (handler(0), CS_KERNEL, SS));
    assert_eq!(f.rsp, KERNEL_SP - 7 * 8);
    let flags = before.rflags;
    assert_eq!(
        frame(&w),
        [0xcccc, 0x1111, before.rip, 0x33, flags, before.rsp, 0x2b]
    );
    let gone = rflags::AC | rflags::TF | rflags::NT;
    assert_eq!(
        f.rflags,
        before.rflags & !gone,
        "DF is the guest's, IF stays"
    );
    assert_eq!((w.m.cpu().gs.get(), w.fast[0].kernel_mode), (0x1000, 1));
    assert_eq!(w.m.cpu().cr3.get(), w.fast[0].kernel_cr3);
    assert!(!masked(&w), "the gate does not mask");
}

#[test]
fn a_frame_from_user_mode_with_an_error_code() {
    for vector in [10u64, 11, 12, 17, 21] {
        let (mut w, _) = world();
        user(&mut w);
        let before = w.regs[0];
        enter(&mut w, vector, 0xe02b);
        assert_eq!(w.regs[0].rip, handler(vector as u8));
        assert_eq!(w.regs[0].rsp, KERNEL_SP - 8 * 8);
        assert_eq!(
            frame(&w),
            [
                0xcccc,
                0x1111,
                0xe02b,
                before.rip,
                0x33,
                before.rflags,
                before.rsp,
                0x2b
            ]
        );
    }
}

#[test]
fn a_frame_from_kernel_mode_keeps_the_stack_and_shows_ring_0() {
    let (mut w, _) = world();
    let before = w.regs[0];
    enter(&mut w, 0, 0);
    assert_eq!(w.regs[0].rsp, (SP & !15) - 7 * 8);
    assert_eq!(
        frame(&w),
        [0xcccc, 0x1111, TEXT, 0xe030, before.rflags, SP, SS]
    );
    assert!(w.m.cpu().invlpgs.borrow().is_empty());
}

#[test]
fn event_masks_go_into_the_frame_and_out_of_the_gate() {
    for was in [false, true] {
        for gate_masks in [false, true] {
            let (mut w, _) = world();
            let list =
                w.m.arg_words(0, &[u64::from(gate_masks) << 10, handler(0), 0, 0]);
            assert_eq!(w.call(0, nr::SET_TRAP_TABLE, &[list]), 0);
            set_masked(&w, was);
            w.regs[0].rflags |= rflags::IOPL;
            enter(&mut w, 0, 0);
            let [_, _, _, cs, flags, _, _] = frame(&w);
            assert_eq!(cs, 0xe030 | u64::from(was) << 32);
            assert_eq!(flags & rflags::IF != 0, !was);
            assert_eq!(flags & rflags::IOPL, 0, "no privilege shows");
            assert_eq!(masked(&w), was || gate_masks);
            assert_ne!(
                w.regs[0].rflags & rflags::IF,
                0,
                "the real flag is always set"
            );
            assert_eq!(w.regs[0].rflags & rflags::IOPL, 0);
        }
    }
}

#[test]
fn system_calls() {
    let (mut w, _) = world();
    user(&mut w);
    w.regs[0].rflags |= rflags::DF;
    let before = w.regs[0];
    enter(&mut w, entry::SYSCALL, 0);
    let f = w.regs[0];
    assert_eq!((f.rip, f.rsp), (SYSCALL, KERNEL_SP - 56));
    let flags = before.rflags & !rflags::DF;
    assert_eq!(
        frame(&w),
        [0xcccc, 0x1111, before.rip, 0x33, flags, before.rsp, 0x2b]
    );
    assert!(masked(&w), "the callback was registered so");
    assert_eq!(f.rflags & rflags::DF, 0);
}

#[test]
fn a_system_call_without_a_callback_does_not_exist() {
    let (mut w, _) = world();
    user(&mut w);
    let rip = w.regs[0].rip;
    enter(&mut w, entry::SYSCALL32, 0);
    assert_eq!(w.regs[0].rip, handler(6));
    let [_, _, at, ..] = frame::<7>(&w);
    assert_eq!(at, rip - 2, "on the instruction");
}

#[test]
fn stacks_and_handlers_that_cannot_be_used_end_the_guest() {
    let (mut w, _) = world();
    w.regs[0].rsp = 0x1234_0000;
    let end = w.crashes(|c| c.inject(0, None));
    assert_eq!(end.why, crash::GUEST);
    assert!(end.text.contains("no stack"), "{}", end.text);

    for bad in [
        0,
        0x20,
        0xffff_8000_0000_1000,
        0x8000_0000_0000,
        u64::MAX - 8,
    ] {
        let (mut w, _) = world();
        user(&mut w);
        let end = w.crashes(|c| {
            c.v.kernel_sp = bad;
            c.inject(0, None);
        });
        assert_eq!(end.why, crash::GUEST, "{bad:#x}");
    }

    let (mut w, _) = world();
    assert_eq!(w.call(0, nr::SET_TRAP_TABLE, &[0]), 0);
    let end = w.crashes(|c| c.inject(14, Some(0)));
    assert_eq!(end.why, crash::GUEST);
    assert!(end.text.contains("exception 14"), "{}", end.text);
}

#[test]
fn host_interrupts_leave_and_come_back_with_fresh_translations() {
    for (vector, reason, arg) in [
        (2, exit::NMI, 0),
        (18, exit::MCE, 0),
        (0xef, exit::INTR, 0xef),
        (32, exit::INTR, 32),
    ] {
        let (mut w, _) = world();
        let (before, loads) = (w.regs[0].rip, w.m.cpu().loads.get());
        enter(&mut w, vector, 0);
        let log = w.m.log.borrow().clone();
        assert_eq!((log.len(), log[0].reason, log[0].args[0]), (1, reason, arg));
        assert_eq!(w.regs[0].rip, before, "the guest sees nothing");
        assert!(w.m.cpu().loads.get() > loads);
    }
}

#[test]
fn debug_exceptions_collect_their_status() {
    let (mut w, _) = world();
    w.m.cpu().dr6.set(0xffff_4ff1);
    enter(&mut w, 1, 0);
    assert_eq!(w.regs[0].rip, handler(1));
    assert_eq!(w.call(0, nr::GET_DEBUGREG, &[6]), 0xffff_4ff1);
    assert_eq!(w.call(0, nr::SET_DEBUGREG, &[6, 0]), 0);
    assert_eq!(w.call(0, nr::GET_DEBUGREG, &[6]), 0xffff_0ff0);
}

// ---- page faults ----

#[test]
fn page_faults_tell_address_and_mode() {
    // (from user mode, mapped, error of the CPU, error that the guest sees)
    let (p, wr, us, id) = (pte::PF_PRESENT, pte::PF_WRITE, pte::PF_USER, pte::PF_FETCH);
    for (from_user, va, error, want) in [
        (false, 0x1234_5678, us, 0),
        (false, 0x1234_5678, us | wr, wr),
        (false, 0x1234_5678, us | id, id),
        (true, 0x1234_5678, us | wr, us | wr),
        (false, TEXT + 8, us | wr | p, wr | p),
        // User mode does not see the kernel's part at all.
        (true, TEXT + 8, us | p, us),
        // The hypervisor's part is there, but not the guest's.
        (false, 0xffff_8080_0000_0000, us | p, p),
        (true, 0xffff_8080_0000_0000, us | wr | p, us | wr | p),
    ] {
        let (mut w, _) = world();
        if from_user {
            user(&mut w);
        }
        w.m.cpu().cr2.set(va);
        enter(&mut w, 14, error);
        assert_eq!(w.regs[0].rip, handler(14), "{va:#x}");
        assert_eq!(frame::<8>(&w)[2], want, "{va:#x} {error:#x}");
        assert_eq!(info(&w, vcpu_info::CR2), va);
    }
}

#[test]
fn addresses_that_only_five_levels_have_are_general_protection() {
    let (mut w, _) = world();
    w.m.cpu().cr2.set(0x8000_0000_0000);
    enter(&mut w, 14, pte::PF_USER);
    assert_eq!(w.regs[0].rip, handler(13));
    assert_eq!(frame::<8>(&w)[2], 0);
}

#[test]
fn a_reserved_bit_in_a_shadow_is_our_own_fault() {
    let (mut w, _) = world();
    w.m.cpu().cr2.set(TEXT);
    let end = w.crashes(|c| {
        (c.f.vector, c.f.error) = (14, pte::PF_USER | pte::PF_PRESENT | pte::PF_RESERVED);
        c.enter();
    });
    assert_eq!(end.why, crash::CORE);
}

// ---- software interrupts, privileged instructions ----

#[test]
fn software_interrupts_go_through_open_gates_only() {
    // int 0x80 from user mode.
    let (mut w, g) = world();
    code(&w, g.user_text, 0x10, &[0xcd, 0x80]);
    user(&mut w);
    let before = w.regs[0];
    enter(&mut w, 13, 0x80 << 3 | 2);
    assert_eq!(w.regs[0].rip, handler(0x80));
    assert_eq!(
        frame(&w),
        [
            0xcccc,
            0x1111,
            before.rip + 2,
            0x33,
            before.rflags,
            before.rsp,
            0x2b
        ]
    );
    // A closed gate, from both modes: #GP with the gate's index.
    for from_user in [false, true] {
        let (mut w, g) = world();
        let gfn = if from_user { g.user_text } else { g.text };
        code(&w, gfn, 0x10, &[0xcd, 14]);
        if from_user {
            user(&mut w);
        } else {
            w.regs[0].rip = TEXT + 0x10;
        }
        let rip = w.regs[0].rip;
        enter(&mut w, 13, 0xdead);
        assert_eq!(w.regs[0].rip, handler(13));
        let f: [u64; 8] = frame(&w);
        assert_eq!((f[2], f[3]), (14 << 3 | 2, rip));
    }
    // The kernel counts as ring 1.
    let (mut w, g) = world();
    let list = w.m.arg_words(0, &[99 | 1 << 8, handler(99), 0, 0]);
    assert_eq!(w.call(0, nr::SET_TRAP_TABLE, &[list]), 0);
    code(&w, g.text, 0, &[0xcd, 99]);
    enter(&mut w, 13, 0);
    assert_eq!(w.regs[0].rip, handler(99));
}

#[test]
fn forced_cpuid_works_in_both_modes() {
    for from_user in [false, true] {
        let (mut w, g) = world();
        let bytes = [0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x0f, 0xa2];
        code(
            &w,
            if from_user { g.user_text } else { g.text },
            0x10,
            &bytes,
        );
        if from_user {
            user(&mut w);
        }
        let f = &mut w.regs[0];
        f.rip = if from_user { USER } else { TEXT } + 0x10;
        (f.rax, f.rbx, f.rcx, f.rdx) = (0xffff_ffff_4000_0000, u64::MAX, u64::MAX, u64::MAX);
        let rip = f.rip;
        enter(&mut w, 6, 0);
        let f = w.regs[0];
        assert_eq!(f.rip, rip + 7);
        assert_eq!(
            (f.rbx, f.rcx, f.rdx),
            (0x566e_6558, 0x6558_4d4d, 0x4d4d_566e),
            "XenVMMXenVMM"
        );
        assert!(f.rax >= 0x4000_0002 && f.rax <= 0x4000_00ff);
    }
    // A plain ud2 is the guest's own.
    let (mut w, g) = world();
    code(&w, g.text, 0, &[0x0f, 0x0b, 0x90]);
    enter(&mut w, 6, 0);
    assert_eq!(w.regs[0].rip, handler(6));
    assert_eq!(frame::<7>(&w)[2], TEXT);
}

#[test]
fn an_instruction_at_the_end_of_the_last_page_is_still_read() {
    let (mut w, g) = world();
    code(&w, g.text, 0xffe, &[0x0f, 0x30]);
    let f = &mut w.regs[0];
    (f.rip, f.rcx, f.rax, f.rdx) = (TEXT + 0xffe, 0xc000_0100, 0x5000, 0);
    enter(&mut w, 13, 0);
    assert_eq!((w.regs[0].rip, w.m.cpu().fs.get()), (TEXT + 0x1000, 0x5000));
}

/// Runs one instruction in the guest kernel that the CPU refuses.
fn privileged(w: &mut World, g: &Guest, bytes: &[u8]) -> bool {
    code(w, g.text, 0, &[0x90; 16]);
    code(w, g.text, 0, bytes);
    w.regs[0].rip = TEXT;
    w.regs[0].rsp = SP;
    enter(w, 13, 0);
    let done = w.regs[0].rip == TEXT + bytes.len() as u64;
    assert!(done || w.regs[0].rip == handler(13));
    done
}

#[test]
fn model_specific_registers() {
    let (mut w, g) = world();
    let rdmsr = |w: &mut World, g: &Guest, nr: u64| {
        w.regs[0].rcx = nr;
        privileged(w, g, &[0x0f, 0x32]).then(|| w.regs[0].rax & 0xffff_ffff | w.regs[0].rdx << 32)
    };
    let wrmsr = |w: &mut World, g: &Guest, nr: u64, val: u64| {
        (w.regs[0].rcx, w.regs[0].rax, w.regs[0].rdx) = (nr, val & 0xffff_ffff, val >> 32);
        privileged(w, g, &[0x0f, 0x30])
    };
    for (nr, base) in [
        (0xc000_0100, 0x7f12_3456_7000),
        (0xc000_0101, 0xffff_8881_0000_0000),
        (0xc000_0102, 0),
    ] {
        assert!(wrmsr(&mut w, &g, nr, base));
        assert_eq!(rdmsr(&mut w, &g, nr), Some(base));
        assert!(!wrmsr(&mut w, &g, nr, 0x8000_0000_0000), "not canonical");
        assert_eq!(rdmsr(&mut w, &g, nr), Some(base));
    }
    assert_eq!(rdmsr(&mut w, &g, 0xc000_0080), Some(0xd01));
    assert!(wrmsr(&mut w, &g, 0xc000_0080, 0xd01));
    assert!(!wrmsr(&mut w, &g, 0xc000_0080, 0x501));
    assert_eq!(rdmsr(&mut w, &g, 0x277), Some(0x0005_0100_0704_06));
    assert_eq!(rdmsr(&mut w, &g, 0x1b), Some(0xfee0_0900));
    for unknown in [
        0x174,
        0x175,
        0xc000_0081,
        0xc000_0082,
        0x48,
        0x6e0,
        0x3a,
        0x1234,
    ] {
        assert_eq!(rdmsr(&mut w, &g, unknown), None, "{unknown:#x}");
        assert!(!wrmsr(&mut w, &g, unknown, 1), "{unknown:#x}");
    }
    // In user mode nothing of this exists.
    code(&w, g.user_text, 0x10, &[0x0f, 0x32]);
    user(&mut w);
    w.regs[0].rcx = 0x10;
    enter(&mut w, 13, 0);
    assert_eq!(w.regs[0].rip, handler(13));
}

#[test]
fn control_registers() {
    let (mut w, g) = world();
    let mov_from = |w: &mut World, g: &Guest, cr: u8| {
        privileged(w, g, &[0x0f, 0x20, 0xc0 | cr << 3]).then(|| w.regs[0].rax)
    };
    let mov_to = |w: &mut World, g: &Guest, cr: u8, val: u64| {
        w.regs[0].rax = val;
        privileged(w, g, &[0x0f, 0x22, 0xc0 | cr << 3])
    };
    let cr0 = mov_from(&mut w, &g, 0).expect("a value");
    assert_eq!(
        cr0 & 0x8001_0001,
        0x8001_0001,
        "paging, write protect, protected mode"
    );
    assert!(mov_to(&mut w, &g, 0, cr0 | 8) && mov_to(&mut w, &g, 0, cr0));
    for bit in [0, 16, 31] {
        assert!(!mov_to(&mut w, &g, 0, cr0 & !(1 << bit)));
    }
    assert_eq!(mov_from(&mut w, &g, 3), Some(g.root << 12));
    assert!(mov_to(&mut w, &g, 2, 0x1234));
    assert_eq!(mov_from(&mut w, &g, 2), Some(0x1234));
    // What it may not change in CR4 is ignored; OSXSAVE shows from the start.
    let cr4 = mov_from(&mut w, &g, 4).expect("a value");
    assert_eq!(cr4 & (1 << 18 | 1 << 5), 1 << 18 | 1 << 5);
    assert!(mov_to(&mut w, &g, 4, u64::MAX));
    let now = mov_from(&mut w, &g, 4).expect("a value");
    for hidden in [4, 7, 12, 13, 16, 17, 20, 21, 22] {
        assert_eq!(now & 1 << hidden, 0, "CR4 bit {hidden}");
    }
    assert!(!mov_to(&mut w, &g, 8, 0));
}

#[test]
fn debug_registers_never_point_at_the_core() {
    let (mut w, g) = world();
    let mov_to = |w: &mut World, g: &Guest, dr: u8, val: u64| {
        w.regs[0].rax = val;
        privileged(w, g, &[0x0f, 0x23, 0xc0 | dr << 3])
    };
    assert!(mov_to(&mut w, &g, 0, TEXT) && mov_to(&mut w, &g, 3, 0x1000));
    for bad in [
        0xffff_8000_0000_0000,
        0xffff_8080_1000_0000,
        0xffff_87ff_ffff_ffff,
        0x8000_0000_0000,
    ] {
        assert!(!mov_to(&mut w, &g, 1, bad), "{bad:#x}");
    }
    assert!(mov_to(&mut w, &g, 7, 0x000d_0401));
    assert_eq!(w.m.cpu().dr.borrow()[7], 0x000d_0401);
    // General detect goes, I/O breakpoints are refused.
    assert!(mov_to(&mut w, &g, 7, 0x2401));
    assert_eq!(w.m.cpu().dr.borrow()[7] & 0x2000, 0);
    assert!(!mov_to(&mut w, &g, 7, 0x0002_0401));
    assert!(!mov_to(&mut w, &g, 7, 1 << 32 | 0x401));
}

#[test]
fn extended_control_register_keeps_to_the_mask() {
    let (mut w, g) = world();
    for (val, ok) in [
        (1u64, true),
        (3, true),
        (7, true),
        (0, false),
        (2, false),
        (5, false),
        (0xe7, false),
        (1 << 9 | 1, false),
        (1 << 63 | 1, false),
    ] {
        let f = &mut w.regs[0];
        (f.rcx, f.rax, f.rdx) = (0, val & 0xffff_ffff, val >> 32);
        assert_eq!(privileged(&mut w, &g, &[0x0f, 0x01, 0xd1]), ok, "{val:#x}");
    }
    assert_eq!(w.m.cpu().xcr0.get(), 7);
}

#[test]
fn ports_answer_all_ones_where_the_guest_has_the_privilege() {
    let (mut w, g) = world();
    w.regs[0].rax = 0;
    assert!(!privileged(&mut w, &g, &[0xec]), "no privilege yet");
    let iopl = w.m.arg_words(0, &[1]);
    assert_eq!(w.call(0, nr::PHYSDEV_OP, &[6, iopl]), 0);
    for (bytes, old, want) in [
        (
            &[0xecu8][..],
            0x1122_3344_5566_7788u64,
            0x1122_3344_5566_77ffu64,
        ),
        (&[0x66, 0xed], 0x1122_3344_5566_7788, 0x1122_3344_5566_ffff),
        (&[0xed], 0x1122_3344_5566_7788, 0xffff_ffff),
        (&[0xe4, 0x61], 0, 0xff),
    ] {
        w.regs[0].rax = old;
        assert!(privileged(&mut w, &g, bytes));
        assert_eq!(w.regs[0].rax, want, "{bytes:x?}");
    }
    assert!(privileged(&mut w, &g, &[0xee]) && privileged(&mut w, &g, &[0xfa]));
    let iopl = w.m.arg_words(0, &[4]);
    assert_eq!(w.call(0, nr::PHYSDEV_OP, &[6, iopl]), -22);
    for refused in [&[0xf4u8][..], &[0x0f, 0x01, 0xf8], &[0x0f, 0x08]] {
        assert!(!privileged(&mut w, &g, refused), "{refused:x?}");
    }
}

// ---- writes to page tables ----

/// Executes `bytes`, a write with the address in rdi, to the entry of `va` in the
/// table that maps it.
fn table_write(w: &mut World, g: &mut Guest, bytes: &[u8], at: u64) -> bool {
    code(w, g.text, 0, bytes);
    let f = &mut w.regs[0];
    (f.rip, f.rdi, f.rsp) = (TEXT, at, SP);
    w.m.cpu().cr2.set(at);
    enter(w, 14, pte::PF_USER | pte::PF_WRITE | pte::PF_PRESENT);
    let done = w.regs[0].rip == TEXT + bytes.len() as u64;
    assert!(done || w.regs[0].rip == handler(14));
    done
}

#[test]
fn page_table_writes_of_every_kind() {
    let (mut w, mut g) = world();
    let va = Guest::direct(90);
    let l1 = g.leaf_table(&w.m, g.root, va);
    let i = blanket_abi::Va(va).index(1);
    let at = Guest::direct(l1) + 8 * i as u64;
    let entry = |w: &World| w.m.words(l1)[i].load(SeqCst);
    assert_eq!(w.access(0, va, true, false), Some(90));
    assert_eq!(w.access(0, TEXT, false, true), Some(g.text));
    let first = entry(&w);

    // xchg %rax, (%rdi): the old value comes back.
    w.regs[0].rax = 91 << 12 | KERNEL_RW;
    assert!(table_write(&mut w, &mut g, &[0x48, 0x87, 0x07], at));
    assert_eq!((w.regs[0].rax, entry(&w)), (first, 91 << 12 | KERNEL_RW));
    assert_eq!(w.access(0, va, true, false), Some(91));

    // lock and %rax, (%rdi): RW goes, flags are those of the result.
    w.regs[0].rax = !pte::RW;
    w.regs[0].rflags |= 0x8c5;
    assert!(table_write(&mut w, &mut g, &[0xf0, 0x48, 0x21, 0x07], at));
    assert_eq!(entry(&w), 91 << 12 | (KERNEL_RW & !pte::RW));
    assert_eq!(
        w.regs[0].rflags & 0x8c1,
        0,
        "neither zero, sign, carry nor overflow"
    );
    assert_eq!(w.access(0, va, true, false), None);
    assert_eq!(w.access(0, va, false, false), Some(91));

    // lock btr $1 would be no change; lock cmpxchg that succeeds, then fails.
    let now = entry(&w);
    (w.regs[0].rax, w.regs[0].rcx) = (now, 92 << 12 | KERNEL_RW);
    assert!(table_write(
        &mut w,
        &mut g,
        &[0xf0, 0x48, 0x0f, 0xb1, 0x0f],
        at
    ));
    assert_eq!(
        (entry(&w), w.regs[0].rflags & 0x40),
        (92 << 12 | KERNEL_RW, 0x40)
    );
    (w.regs[0].rax, w.regs[0].rcx) = (0, 0);
    assert!(table_write(
        &mut w,
        &mut g,
        &[0xf0, 0x48, 0x0f, 0xb1, 0x0f],
        at
    ));
    assert_eq!(
        (entry(&w), w.regs[0].rflags & 0x40),
        (92 << 12 | KERNEL_RW, 0)
    );
    assert_eq!(w.regs[0].rax, 92 << 12 | KERNEL_RW);
    assert_eq!(w.access(0, va, true, false), Some(92));

    // movb $0, (%rdi): only one byte of the entry.
    assert!(table_write(&mut w, &mut g, &[0xc6, 0x07, 0x00], at));
    assert_eq!(entry(&w), 92 << 12);
    assert_eq!(w.access(0, va, false, false), None);
    // movl $imm, 4(%rdi): the upper half.
    assert!(table_write(
        &mut w,
        &mut g,
        &[0xc7, 0x07, 0x01, 0, 0, 0],
        at + 4
    ));
    assert_eq!(entry(&w), 1 << 32 | 92 << 12);

    // A write that crosses two entries is not one that Linux makes.
    let before = (entry(&w), w.m.words(l1)[i + 1].load(SeqCst));
    w.regs[0].rax = u64::MAX;
    assert!(!table_write(&mut w, &mut g, &[0x48, 0x89, 0x07], at + 4));
    assert_eq!((entry(&w), w.m.words(l1)[i + 1].load(SeqCst)), before);
    let f: [u64; 8] = frame(&w);
    assert_eq!((f[2], f[3]), (pte::PF_WRITE | pte::PF_PRESENT, TEXT));
    // Nor is an instruction that nobody knows.
    assert!(!table_write(&mut w, &mut g, &[0x0f, 0x11, 0x07], at));
    w.audit();
}

#[test]
fn user_mode_writes_no_tables() {
    let (mut w, mut g) = world();
    // The guest maps a table for its user mode, read-only.
    let l1 = g.leaf_table(&w.m, g.user_root, USER);
    let kernel_l1 = g.leaf_table(&w.m, g.root, USER);
    w.update(0, l1, 1, g.root << 12 | pte::P | pte::A | pte::U);
    w.update(0, kernel_l1, 1, g.root << 12 | pte::P | pte::A | pte::U);
    user(&mut w);
    code(&w, g.user_text, 0x10, &[0x48, 0x89, 0x07]);
    w.m.cpu().cr2.set(USER + 0x1000);
    let before = w.m.words(g.root)[0].load(SeqCst);
    enter(&mut w, 14, pte::PF_USER | pte::PF_WRITE | pte::PF_PRESENT);
    assert_eq!(w.regs[0].rip, handler(14));
    assert_eq!(
        frame::<8>(&w)[2],
        pte::PF_USER | pte::PF_WRITE | pte::PF_PRESENT
    );
    assert_eq!(w.m.words(g.root)[0].load(SeqCst), before);
}

// ---- iret ----

fn iret(w: &mut World, words: [u64; 9]) {
    let at = w.m.arg_words(0x100, &words);
    w.cpu0(|c| {
        (c.f.rax, c.f.rsp) = (nr::IRET, at);
        c.hypercall();
    });
}

#[test]
fn iret_to_user_mode() {
    let (mut w, _) = world();
    (w.m.cpu().gs.set(0x1000), w.m.cpu().kgs.set(0x2000));
    set_masked(&w, true);
    let asked = u64::MAX & !(1 << 8);
    iret(&mut w, [1, 2, 3, 0, USER, 0x33, asked, 0x7fff_0000, 0x28]);
    let f = w.regs[0];
    assert_eq!((f.rax, f.r11, f.rcx), (1, 2, 3));
    assert_eq!((f.rip, f.cs, f.rsp, f.ss), (USER, 0x33, 0x7fff_0000, 0x2b));
    assert_eq!(
        f.rflags & (rflags::IOPL | rflags::VM | 1 << 19 | 1 << 20),
        0
    );
    assert_ne!(f.rflags & rflags::IF, 0);
    assert_eq!(f.rflags >> 22, 0, "bits that do not exist");
    assert_eq!((w.fast[0].kernel_mode, w.m.cpu().gs.get()), (0, 0x2000));
    assert_eq!(w.m.cpu().cr3.get(), w.fast[0].user_cr3);
    assert!(!masked(&w));
}

#[test]
fn iret_to_kernel_mode() {
    let (mut w, _) = world();
    iret(&mut w, [1, 2, 3, vgcf::IN_SYSCALL, TEXT, 0xe030, 2, SP, 0]);
    let f = w.regs[0];
    assert_eq!((f.rip, f.cs, f.rsp), (TEXT, CS_KERNEL, SP));
    assert_eq!(f.ss, SS, "a null stack selector cannot be used at CPL 3");
    assert_eq!((f.r11, f.rcx), (2, TEXT), "as sysret leaves them");
    assert_ne!(f.rflags & rflags::IF, 0, "the real flag is always set");
    assert_eq!(w.fast[0].kernel_mode, 1);
    assert!(masked(&w), "the frame's flag was clear");
}

#[test]
fn iret_that_cannot_be_ends_the_guest() {
    let (mut w, _) = world();
    let end = w.crashes(|c| {
        (c.f.rax, c.f.rsp) = (nr::IRET, 0x1000_0000);
        c.hypercall();
    });
    assert_eq!(end.why, crash::GUEST);
    let (mut w, _) = world();
    assert_eq!(w.mmuext(0, nr::mmuext::NEW_USER_BASEPTR, 0, 0), 0);
    let at = w.m.arg_words(0x100, &[0, 0, 0, 0, USER, 0x33, 2, 0, 0x2b]);
    let end = w.crashes(|c| {
        (c.f.rax, c.f.rsp) = (nr::IRET, at);
        c.hypercall();
    });
    assert_eq!(end.why, crash::GUEST);
    assert!(end.text.contains("user root"), "{}", end.text);
}

#[test]
fn a_return_that_faults_goes_to_the_failsafe_callback() {
    let (mut w, _) = world();
    user(&mut w);
    w.m.cpu().selectors.set([0x11, 0x22, 0x33, 0x44]);
    w.regs[0].cs = 0x1b;
    let before = w.regs[0];
    enter(&mut w, entry::IRET_FAULT, 0);
    let f = w.regs[0];
    assert_eq!(
        (f.rip, f.cs, f.ss, f.rsp),
        (FAILSAFE, CS_KERNEL, SS, KERNEL_SP - 11 * 8)
    );
    assert_eq!(
        frame(&w),
        [
            0xcccc,
            0x1111,
            0x11,
            0x22,
            0x33,
            0x44,
            before.rip,
            0x1b,
            before.rflags,
            before.rsp,
            0x2b
        ]
    );
    assert!(masked(&w), "the callback was registered so");
    assert_eq!(w.fast[0].kernel_mode, 1);
}

// ---- events and NMIs ----

fn nmi_callback(w: &mut World) {
    let at = w.m.arg_words(0, &[u64::from(callback::NMI), handler(2)]);
    assert_eq!(w.call(0, nr::CALLBACK_OP, &[callback::REGISTER, at]), 0);
}

#[test]
fn an_event_is_delivered_once_and_masks() {
    let (mut w, _) = world();
    let at = w.m.arg_words(0, &[0]);
    assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::BIND_IPI, at]), 0);
    let port = w.m.words_at(at, 1)[0] >> 32;
    let at = w.m.arg_words(0, &[port]);
    assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::UNMASK, at]), 0);
    let at = w.m.arg_words(0, &[port]);
    assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::SEND, at]), 0);
    assert_eq!(info(&w, vcpu_info::PENDING) & 0xff, 1);
    assert_eq!(info(&w, vcpu_info::PENDING_SEL), 1 << (port / 64));
    let before = w.regs[0];
    w.cpu0(|c| c.prepare_return());
    assert_eq!(w.regs[0].rip, EVENT);
    assert_eq!(
        frame(&w),
        [0xcccc, 0x1111, TEXT, 0xe030, before.rflags, SP, SS]
    );
    assert!(masked(&w));
    assert_eq!(
        info(&w, vcpu_info::PENDING) & 0xff,
        1,
        "the guest clears it"
    );
    let sp = w.regs[0].rsp;
    w.cpu0(|c| c.prepare_return());
    assert_eq!(w.regs[0].rsp, sp, "masked now");
    // The handler returns without clearing it: delivered again.
    iret(&mut w, [0, 0, 0, 0, TEXT, 0xe030, rflags::IF, SP, SS]);
    w.cpu0(|c| c.prepare_return());
    assert_eq!(w.regs[0].rip, EVENT);
}

#[test]
fn masked_events_wait() {
    let (mut w, _) = world();
    set_masked(&w, true);
    w.m.words(w.setup.shared_info())[0].fetch_or(1, SeqCst);
    w.cpu0(|c| c.prepare_return());
    assert_eq!(w.regs[0].rip, TEXT);
    set_masked(&w, false);
    w.cpu0(|c| c.prepare_return());
    assert_eq!(w.regs[0].rip, EVENT);
}

#[test]
fn nmis_come_first_and_not_into_each_other() {
    let (mut w, _) = world();
    assert_eq!(w.call(0, nr::VCPU_OP, &[nr::vcpu::SEND_NMI, 0, 0]), 0);
    nmi_callback(&mut w);
    w.m.words(w.setup.shared_info())[0].fetch_or(1, SeqCst);
    w.cpu0(|c| c.prepare_return());
    // The event's frame lies on the NMI's, so that the event's handler runs first
    // and returns into the NMI's.
    assert_eq!(w.regs[0].rip, EVENT);
    assert_eq!(frame::<7>(&w)[2], handler(2));
    let nmi_frame = frame::<7>(&w)[5];
    assert_eq!(w.m.words_at(nmi_frame, 7)[2], TEXT);
    assert_ne!(
        w.fast[0].slow_iret & 1,
        0,
        "the next iret must release NMIs"
    );
    // A second one waits for an iret.
    set_masked(&w, true);
    assert_eq!(w.call(0, nr::VCPU_OP, &[nr::vcpu::SEND_NMI, 0, 0]), 0);
    let rsp = w.regs[0].rsp;
    w.cpu0(|c| c.prepare_return());
    assert_eq!(w.regs[0].rsp, rsp);
    iret(&mut w, [0, 0, 0, 0, TEXT, 0xe030, 0, SP, SS]);
    assert_eq!(w.fast[0].slow_iret & 1, 0);
    w.cpu0(|c| c.prepare_return());
    assert_eq!(w.regs[0].rip, handler(2));
    assert_eq!(w.vm.nmi.load(SeqCst), 0);
}

#[test]
fn what_backends_raise_is_taken_on_the_way_back() {
    let (mut w, _) = world();
    // The console's port, which the builder bound.
    let port = 2u32;
    let at = w.m.arg_words(0, &[u64::from(port)]);
    assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::UNMASK, at]), 0);
    w.m.page.raised[0].fetch_or(1 << port, SeqCst);
    w.cpu0(|c| c.prepare_return());
    assert_eq!(w.regs[0].rip, TEXT, "nobody said that there is something");
    use blanket_core::machine::Host;
    w.m.switch()
        .pending
        .fetch_or(blanket_abi::device::pending::RAISED, SeqCst);
    w.cpu0(|c| c.prepare_return());
    assert_eq!(w.regs[0].rip, EVENT);
    assert_eq!(w.m.page.raised[0].load(SeqCst), 0);
    // And the other way: a send goes to the host.
    let at = w.m.arg_words(0, &[u64::from(port)]);
    assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::SEND, at]), 0);
    assert_eq!(w.m.exits(exit::SEND)[0].args[0], u64::from(port));
}

// ---- copies ----

#[test]
fn copies_stop_at_the_hypervisors_range_and_at_missing_pages() {
    let (mut w, _) = world();
    let mut buf = [0u8; 64];
    for bad in [
        0xffff_7fff_ffff_ffff,
        0xffff_8000_0000_0000,
        0xffff_87ff_ffff_ffc1,
        0x7fff_ffff_ffd0,
        u64::MAX - 10,
        u64::MAX,
        0x1000,
    ] {
        w.cpu0(|c| {
            assert_eq!(
                c.copy_in(blanket_abi::Va(bad), &mut buf),
                Err(-14),
                "{bad:#x}"
            );
            assert_eq!(c.copy_out(blanket_abi::Va(bad), &buf), Err(-14), "{bad:#x}");
        });
    }
    // Across two pages that are not there yet, and to a read-only one.
    w.cpu0(|c| {
        assert_eq!(
            c.copy_out(blanket_abi::Va(DIRECT + (91 << 12) - 5), b"0123456789"),
            Ok(())
        );
        let mut back = [0; 10];
        assert_eq!(
            c.copy_in(blanket_abi::Va(DIRECT + (91 << 12) - 5), &mut back),
            Ok(())
        );
        assert_eq!(&back, b"0123456789");
        assert_eq!(c.copy_out(blanket_abi::Va(TEXT), b"x"), Err(-14));
    });
}
