//! The host takes frames back: what has to be done before a guest runs on.
#![allow(
    clippy::cast_possible_truncation,
    reason = "small numbers of a small machine"
)]

mod common;

use blanket_abi::device::{crash, exit};
use blanket_abi::xen::event::op;
use blanket_abi::xen::hypercall::{self as nr, vcpu};
use blanket_abi::xen::shared::{runstate, shared_info};
use blanket_core::machine::Host;
use common::guest::Guest;
use common::{Setup, World, fuzz};
use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::Ordering::SeqCst;

fn world() -> (World, Guest) {
    fuzz::start(Setup {
        vcpus: 2,
        ..Setup::default()
    })
}

/// The host takes `gfns` at the next exit, and gives what it is asked for.
fn take_at_exit(w: &World, gfns: &[u64]) {
    let gfns = Cell::new(Some(gfns.to_vec()));
    w.m.set_hook(move |m, _| {
        for gfn in gfns.take().unwrap_or_default() {
            m.lose(gfn);
        }
        None
    });
}

#[test]
fn leaves_of_what_was_taken_are_gone_when_a_vcpu_is_back() {
    let (mut w, _) = world();
    let va = Guest::direct(100);
    assert_eq!(w.access(0, va, true, false), Some(100));
    assert_eq!(w.access(1, va, true, false), Some(100));
    take_at_exit(&w, &[100]);
    // The fake machine refuses to load a root before they are gone.
    w.on(0, |c| {
        c.exit(exit::INTR, [0; 4]);
    });
    for id in 0..2 {
        w.switch_to(id);
        assert!(w.m.walk(blanket_abi::Va(va), false, false, true).is_err());
    }
    w.audit();
    assert_eq!(w.access(1, va, true, false), Some(100));
    assert_eq!(w.m.exits(exit::FRAME).last().map(|e| e.args[0]), Some(100));
}

#[test]
fn standing_frames_are_back_before_the_guest_is() {
    let (mut w, _) = world();
    let shared = w.setup.shared_info();
    let area = Guest::direct(90);
    let at = w.m.arg_words(0, &[area]);
    let register = vcpu::REGISTER_VCPU_TIME_MEMORY_AREA;
    assert_eq!(w.call(0, nr::VCPU_OP, &[register, 0, at]), 0);
    let at = w.m.arg_words(0, &[Guest::direct(92) - 16]);
    let register = vcpu::REGISTER_RUNSTATE_MEMORY_AREA;
    assert_eq!(w.call(0, nr::VCPU_OP, &[register, 0, at]), 0);
    for gfns in [&[shared][..], &[90], &[91], &[92], &[92, 91, 90, shared]] {
        take_at_exit(&w, gfns);
        w.on(0, |c| {
            c.exit(exit::BREATH, [0; 4]);
        });
        for gfn in [shared, 90, 91, 92] {
            assert!(w.m.present(gfn), "{gfn} of {gfns:?}");
        }
    }
    // And what belongs there gets there.
    take_at_exit(&w, &[91, 92]);
    w.on(0, |c| c.set_runstate(runstate::BLOCKED));
    let state = w.m.words(91)[510].load(SeqCst);
    assert_eq!(state as u32, runstate::BLOCKED);
}

#[test]
fn an_event_finds_shared_info_that_was_taken() {
    let (mut w, _) = world();
    let at = w.m.arg_words(0, &[1]);
    assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::BIND_IPI, at]), 0);
    let port = w.m.words_at(at, 1)[0] >> 32;
    let at = w.m.arg_words(0, &[port]);
    assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::UNMASK, at]), 0);
    // vCPU 0 is in the guest when the host takes the frame.
    w.m.lose(w.setup.shared_info());
    assert_eq!(w.call(0, nr::EVENT_CHANNEL_OP, &[op::SEND, at]), 0);
    let word = shared_info::EVTCHN_PENDING as usize / 8 + port as usize / 64;
    let pending = w.m.words(w.setup.shared_info())[word].load(SeqCst);
    assert_ne!(pending & 1 << (port % 64), 0);
}

#[test]
fn a_host_without_the_frame_ends_the_vm() {
    let (mut w, _) = world();
    let shared = w.setup.shared_info();
    w.m.refused.borrow_mut().insert(shared);
    take_at_exit(&w, &[shared]);
    let end = w.crashes(|c| {
        c.exit(exit::INTR, [0; 4]);
    });
    assert_eq!(end.why, crash::MEMORY);
}

#[test]
fn a_copy_goes_on_however_often_the_host_takes_its_frames() {
    let (mut w, _) = world();
    // Over a page's end, both pages taken whenever the other one is asked for.
    let va = Guest::direct(101) - 64;
    let asked = Rc::new(Cell::new(0));
    let count = Rc::clone(&asked);
    w.m.set_hook(move |m, e| {
        if e.reason == exit::FRAME && count.get() < 100 {
            count.set(count.get() + 1);
            for gfn in [100, 101] {
                if gfn != e.args[0] {
                    m.lose(gfn);
                }
            }
        }
        None
    });
    w.m.lose(100);
    w.m.lose(101);
    let copied = w.on(0, |c| {
        c.copy_out(blanket_abi::Va(va), &[0xa5; 128])
            .and_then(|()| c.copy_in(blanket_abi::Va(va), &mut [0; 128]))
    });
    assert_eq!(copied, Ok(()));
    assert_eq!(asked.get(), 100);
}

#[test]
fn much_that_was_taken_is_done_in_batches() {
    // More leaves than one hold of the lock may remove.
    let (mut w, mut g) = fuzz::start(Setup {
        vcpus: 2,
        pool: 512,
        ram: 512,
        ..Setup::default()
    });
    let kernel = common::guest::KERNEL_RW;
    for n in 0..8 {
        let va = 0xffff_c900_0000_0000 + n * 0x20_0000;
        let l1 = g.leaf_table(&w.m, g.root, va);
        for i in 0..512 {
            w.m.words(l1)[i].store(300 << 12 | kernel, SeqCst);
        }
    }
    for n in 0..8 {
        assert_eq!(
            w.access(0, 0xffff_c900_0000_0000 + n * 0x20_0000, true, false),
            Some(300)
        );
    }
    let leaves = w.audit().leaves;
    assert!(leaves >= 4096, "{leaves}");
    w.m.log.borrow_mut().clear();
    take_at_exit(&w, &[300]);
    w.on(0, |c| {
        c.exit(exit::INTR, [0; 4]);
    });
    assert!(w.m.exits(exit::BREATH).len() >= 2);
    assert!(w.audit().leaves + 4096 <= leaves);
    assert_eq!(w.m.vm_page().revoked[0].load(SeqCst), 0);
}
