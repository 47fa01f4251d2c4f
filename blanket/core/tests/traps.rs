//! Entries to the guest kernel and the ways back, byte for byte
//! (`public/arch-x86/xen-x86_64.h`, `xen/arch/x86/x86_64/entry.S`).

#![allow(
    clippy::cast_possible_truncation,
    reason = "small numbers of a small machine"
)]

mod common;

use blanket_abi::device::{crash, exit};
use blanket_abi::xen::event::op;
use blanket_abi::xen::hypercall::{self as nr, callback, vgcf};
use blanket_abi::xen::shared::vcpu_info;
use blanket_core::pte;
use blanket_core::vcpu::{entry, rflags};
use common::World;
use common::guest::{DIRECT, EVENT, FAILSAFE, SYSCALL, TEXT, USER, handler};
use common::trap::{
    CS_KERNEL, KERNEL_SP, SP, SS, enter, frame, info, masked, set_masked, user, world,
};
use std::sync::atomic::Ordering::SeqCst;

// ---- frames ----

#[test]
fn a_frame_from_user_mode_without_an_error_code() {
    let (mut w, _) = world();
    w.m.cpu().gs.set(0x1000);
    w.m.cpu().kgs.set(0x2000);
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
    // The program gets its direction flag back, the kernel begins without.
    assert_eq!(
        frame(&w),
        [
            0xcccc,
            0x1111,
            before.rip,
            0x33,
            before.rflags,
            before.rsp,
            0x2b
        ]
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
    w.m.cpu().gs.set(0x1000);
    w.m.cpu().kgs.set(0x2000);
    set_masked(&w, true);
    let asked = !(1 << 8);
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
