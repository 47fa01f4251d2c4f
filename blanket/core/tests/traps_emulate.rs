//! What the CPU refuses to a guest kernel and the core does in its stead
//! (`xen/arch/x86/pv/emul-priv-op.c`, `ro-page-fault.c`).

#![allow(
    clippy::cast_possible_truncation,
    reason = "small numbers of a small machine"
)]

mod common;

use blanket_abi::xen::hypercall as nr;
use blanket_core::pte;
use common::World;
use common::guest::{Guest, KERNEL_RW, TEXT, USER, handler};
use common::trap::{SP, code, enter, frame, user, world};
use std::sync::atomic::Ordering::SeqCst;

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
fn programs_get_the_profile_where_their_cpuid_faults() {
    for faults in [0, 1] {
        let (mut w, g) = world();
        w.m.page.cpuid_faults = faults;
        code(&w, g.user_text, 0x10, &[0x0f, 0xa2]);
        user(&mut w);
        let rip = USER + 0x10;
        (w.regs[0].rip, w.regs[0].rax) = (rip, 0x4000_0000);
        enter(&mut w, 13, 0);
        if faults != 0 {
            assert_eq!((w.regs[0].rip, w.regs[0].rbx), (rip + 2, 0x566e_6558));
        } else {
            // Then the CPU refused something else: the guest's own fault.
            assert_eq!(w.regs[0].rip, handler(13));
        }
    }
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
    assert_eq!(rdmsr(&mut w, &g, 0x277), Some(0x0000_0501_0007_0406));
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
fn a_lesser_cpu_is_what_kernel_and_programs_find() {
    use blanket_core::cpuid::Hidden;
    const LEAF: [u8; 2] = [0x0f, 0xa2];
    for mask in [3, 0] {
        let (mut w, g) = world();
        w.m.page.xcr0_mask = mask;
        let mut hidden = Hidden::default();
        assert!(hidden.insert("aes") && hidden.insert("bmi1"));
        w.m.page.cpuid_hidden = hidden.0;
        w.m.page.cpuid_faults = 1;
        let mut found = |program: bool, leaf: u64| {
            if program {
                code(&w, g.user_text, 0x10, &LEAF);
                user(&mut w);
                (w.regs[0].rax, w.regs[0].rcx) = (leaf, 0);
                enter(&mut w, 13, 0);
                w.cpu0(|c| c.to_kernel_mode());
                (w.regs[0].cs, w.regs[0].ss) = (common::trap::CS_KERNEL, common::trap::SS);
            } else {
                (w.regs[0].rax, w.regs[0].rcx) = (leaf, 0);
                assert!(privileged(&mut w, &g, &LEAF));
            }
            (w.regs[0].rbx, w.regs[0].rcx)
        };
        let [(_, one), (seven, _)] = [found(false, 1), found(false, 7)];
        assert_eq!((found(true, 1).1, found(true, 7).0), (one, seven));
        // AES and AVX are gone, SSE4.2 is there; XSAVE and OSXSAVE go by the mask.
        assert_eq!(one & (1 << 25 | 1 << 28 | 1 << 20), 1 << 20);
        assert_eq!(one >> 26 & 3, if mask == 0 { 0 } else { 3 });
        assert_eq!(seven & (1 << 3 | 1 << 5), 0, "BMI1, AVX2");
        for val in [1u64, 3, 7] {
            (w.regs[0].rcx, w.regs[0].rax, w.regs[0].rdx) = (0, val, 0);
            let ok = privileged(&mut w, &g, &[0x0f, 0x01, 0xd1]);
            assert_eq!(ok, val & !u64::from(mask) == 0, "{val:#x} of {mask:#x}");
        }
    }
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
