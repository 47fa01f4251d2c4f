//! Frames that the guest gives up, and gets back.
#![allow(
    clippy::cast_possible_truncation,
    reason = "small numbers of a small machine"
)]

mod common;

use blanket_abi::device::exit;
use blanket_abi::xen::errno;
use blanket_abi::xen::hypercall::memory::{
    CURRENT_RESERVATION, DECREASE_RESERVATION as DOWN, MAXIMUM_RESERVATION, MEMORY_MAP,
    POPULATE_PHYSMAP as UP,
};
use blanket_abi::xen::hypercall::{self as nr, mmuext, vcpu};
use blanket_abi::{Gfn, Va};
use common::guest::{Guest, KERNEL_RW, TABLE};
use common::{Setup, World, fuzz};
use std::sync::atomic::Ordering::SeqCst;

fn world() -> (World, Guest) {
    fuzz::start(Setup {
        vcpus: 2,
        ram: 1024,
        pool: 256,
        ..Setup::default()
    })
}

fn has(w: &World, gfn: u64) -> bool {
    w.vm.mmu.lock().has(Gfn(gfn))
}

#[test]
fn the_host_gets_what_is_given_up_when_nothing_leads_to_it() {
    let (mut w, _) = world();
    let gfns: Vec<u64> = (300..312).collect();
    for &gfn in &gfns {
        for id in 0..2 {
            assert!(w.store(id, Guest::direct(gfn), 5));
        }
    }
    // The fake host looks that no TLB has a translation left.
    assert_eq!(w.balloon(0, DOWN, &gfns), 12);
    let told = w.m.exits(exit::BALLOON);
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].args, [12, 1012, 0, 48]);
    let named: Vec<u8> = gfns
        .iter()
        .flat_map(|&g| (g as u32).to_le_bytes())
        .collect();
    assert_eq!(w.m.texts.borrow().last(), Some(&named));
    w.audit();
    assert_eq!(w.call(0, nr::MEMORY_OP, &[CURRENT_RESERVATION, 0]), 1012);
    assert_eq!(w.call(0, nr::MEMORY_OP, &[MAXIMUM_RESERVATION, 0]), 1024);
    for &gfn in &gfns {
        // The guest's own tables still name it.
        assert_eq!(w.access(1, Guest::direct(gfn), false, false), None);
    }
    assert_eq!(w.balloon(1, UP, &gfns[..6]), 6);
    assert_eq!(
        w.m.exits(exit::BALLOON).last().map(|e| e.args),
        Some([0, 1018, 0, 0])
    );
    assert_eq!(w.access(0, Guest::direct(300), false, false), Some(300));
    assert_eq!(w.m.words(300)[0].load(SeqCst), 0);
    assert_eq!(w.access(0, Guest::direct(311), true, false), None);
    w.audit();
}

#[test]
fn long_lists_go_in_pieces_and_end_where_something_is_wrong() {
    let (mut w, _) = world();
    let mut gfns: Vec<u64> = (300..900).collect();
    assert_eq!(w.balloon(0, DOWN, &gfns), 600);
    let told: Vec<_> = w.m.exits(exit::BALLOON).iter().map(|e| e.args[0]).collect();
    assert_eq!(told, [512, 88]);
    assert_eq!(w.balloon(0, UP, &gfns), 600);
    // Twice the same; what there is not; what the hypervisor has given.
    for wrong in [305, 1024, w.setup.shared_info(), 1 << 40, u64::MAX] {
        gfns[10] = wrong;
        assert_eq!(w.balloon(0, DOWN, &gfns), 10);
        assert_eq!(w.balloon(0, UP, &gfns), 10);
    }
    // What it has already.
    assert_eq!(w.balloon(0, UP, &[300]), 0);
    let at = w.m.arg_words(0, &[common::ARGS, 1, 9, 0x7ff0]);
    assert_eq!(w.call(0, nr::MEMORY_OP, &[DOWN, at]), errno::EINVAL);
    w.audit();
}

#[test]
fn tables_in_use_and_the_cores_own_places_stay() {
    let (mut w, mut g) = world();
    let area = Guest::direct(400);
    let at = w.m.arg_words(0, &[area]);
    let time = vcpu::REGISTER_VCPU_TIME_MEMORY_AREA;
    assert_eq!(w.call(1, nr::VCPU_OP, &[time, 1, at]), 0);
    let at = w.m.arg_words(0, &[Guest::direct(402) - 16]);
    let runstate = vcpu::REGISTER_RUNSTATE_MEMORY_AREA;
    assert_eq!(w.call(1, nr::VCPU_OP, &[runstate, 1, at]), 0);
    let info = w.m.arg_words(0, &[403, 64]);
    assert_eq!(
        w.call(0, nr::VCPU_OP, &[vcpu::REGISTER_VCPU_INFO, 1, info]),
        0
    );
    let va = 0xffff_c900_0000_0000;
    let l1 = g.leaf_table(&w.m, g.root, va);
    w.m.words(l1)[0].store(500 << 12 | KERNEL_RW, SeqCst);
    assert_eq!(w.access(0, va, true, false), Some(500));
    for kept in [g.root, g.user_root, l1, 400, 401, 402, 403] {
        assert_eq!(w.balloon(0, DOWN, &[kept]), 0, "{kept}");
        assert!(has(&w, kept));
    }
    // A table that only a mark is left of.
    w.m.words(600)[0].store(601 << 12 | TABLE, SeqCst);
    assert_eq!(w.mmuext(0, mmuext::PIN_L1, 600, 0), 0);
    assert!(w.vm.mmu.lock().is_table(Gfn(600)));
    assert_eq!(w.balloon(0, DOWN, &[600]), 1);
    w.audit();
}

#[test]
fn nothing_takes_a_frame_that_is_out() {
    let (mut w, mut g) = world();
    let va = 0xffff_c900_0000_0000;
    let l1 = g.leaf_table(&w.m, g.root, va);
    assert_eq!(w.balloon(0, DOWN, &[700]), 1);
    for cmd in [
        mmuext::PIN_L1,
        mmuext::PIN_L4,
        mmuext::NEW_BASEPTR,
        mmuext::NEW_USER_BASEPTR,
        mmuext::CLEAR_PAGE,
        mmuext::COPY_PAGE,
    ] {
        assert_eq!(w.mmuext(0, cmd, 700, 300), errno::EINVAL, "{cmd}");
    }
    assert_eq!(w.mmuext(0, mmuext::COPY_PAGE, 300, 700), errno::EINVAL);
    assert_eq!(w.update(0, 700, 0, 1), errno::EINVAL);
    assert_eq!(
        w.call(0, nr::UPDATE_DESCRIPTOR, &[700 << 12, 0]),
        errno::EINVAL
    );
    let at = w.m.arg_words(0, &[700, 0]);
    assert_eq!(w.call(0, nr::SET_GDT, &[at, 16]), errno::EINVAL);
    assert_eq!(
        w.call(0, nr::VCPU_OP, &[vcpu::REGISTER_VCPU_INFO, 0, at]),
        errno::EINVAL
    );
    // In a table, as a leaf and as a table.
    assert_eq!(w.update(0, l1, 0, 700 << 12 | KERNEL_RW), 0);
    assert_eq!(w.access(0, va, true, false), None);
    assert_eq!(w.access(0, va, false, false), None);
    let l2 = g.alloc();
    assert_eq!(w.update(0, g.root, 300, l2 << 12 | TABLE), 0);
    assert_eq!(w.update(0, l2, 0, 700 << 12 | TABLE), 0);
    let below = 0xffff_0000_0000_0000 | 300 << 39;
    assert_eq!(w.access(0, below, false, false), None);
    for isolated in [0, 1] {
        for at in [va, below] {
            let copied = w.cpu0(|c| {
                c.fast.isolated = isolated;
                let copied = (c.copy_in(Va(at), &mut [0; 8]), c.copy_out(Va(at), &[0; 8]));
                c.fast.isolated = 0;
                copied
            });
            assert_eq!(copied, (Err(errno::EFAULT), Err(errno::EFAULT)));
        }
    }
    // The fake host would have said no to a core that asks for the frame.
    assert!(!w.m.present(700) && !has(&w, 700));
    w.audit();
    assert_eq!(w.balloon(0, UP, &[700]), 1);
    assert_eq!(w.access(0, va, true, false), Some(700));
    w.audit();
}

#[test]
fn no_more_comes_back_than_the_target_allows() {
    let (mut w, _) = world();
    let gfns: Vec<u64> = (300..400).collect();
    assert_eq!(w.balloon(0, DOWN, &gfns), 100);
    for (target, back) in [(924, 0), (900, 0), (934, 10), (1024, 90), (0, 0)] {
        w.m.page.target.store(target, SeqCst);
        let from = w.vm.mmu.lock().out();
        let gfns: Vec<u64> = gfns.iter().copied().filter(|&g| !has(&w, g)).collect();
        assert_eq!(w.balloon(0, UP, &gfns), back);
        assert_eq!(w.vm.mmu.lock().out() + back.cast_unsigned(), from);
    }
    // A target takes nothing by itself.
    w.m.page.target.store(1, SeqCst);
    assert_eq!(w.balloon(0, DOWN, &gfns[..1]), 1);
    assert_eq!(w.balloon(0, UP, &gfns[..1]), 0);
    w.m.page.target.store(0, SeqCst);
    assert_eq!(w.balloon(0, UP, &gfns[..1]), 1);
}

/// Of a VM that starts with 512 of its 1024 frames.
fn small_start() -> (World, Guest) {
    let setup = Setup {
        vcpus: 2,
        ram: 1024,
        start: 512,
        pool: 256,
        ..Setup::default()
    };
    fuzz::start(setup)
}

#[test]
fn what_the_guest_has_not_got_yet_is_as_given_up() {
    let (mut w, _) = small_start();
    assert_eq!(w.call(0, nr::MEMORY_OP, &[CURRENT_RESERVATION, 0]), 512);
    assert_eq!(w.call(0, nr::MEMORY_OP, &[MAXIMUM_RESERVATION, 0]), 1024);
    assert!(has(&w, 511) && !has(&w, 512) && !has(&w, 1023));
    assert!(has(&w, w.setup.shared_info()) && !has(&w, w.setup.frames()));
    // The guest's direct map names it all.
    for gfn in [512, 700, 1023] {
        for id in 0..2 {
            assert_eq!(w.access(id, Guest::direct(gfn), true, false), None);
        }
        assert_eq!(w.mmuext(0, mmuext::PIN_L1, gfn, 0), errno::EINVAL);
        assert_eq!(w.update(0, gfn, 0, 1), errno::EINVAL);
        assert_eq!(w.balloon(0, DOWN, &[gfn]), 0);
        assert!(!w.m.present(gfn), "the host was asked for {gfn}");
    }
    w.audit();
    // It grows, shrinks below and at the edge, and grows again.
    let gfns: Vec<u64> = (512..1024).rev().collect();
    assert_eq!(w.balloon(0, UP, &gfns[..256]), 256);
    assert_eq!(w.call(1, nr::MEMORY_OP, &[CURRENT_RESERVATION, 0]), 768);
    assert_eq!(w.access(1, Guest::direct(800), true, false), Some(800));
    assert_eq!(w.access(1, Guest::direct(767), true, false), None);
    assert!(!w.m.present(767), "the host gives what was asked for");
    w.audit();
    assert_eq!(w.balloon(1, DOWN, &[511, 800, 1023]), 3);
    assert_eq!(w.balloon(0, UP, &[512, 511, 1023]), 3);
    assert!(has(&w, 512) && has(&w, 511) && !has(&w, 800) && !has(&w, 513));
    w.audit();
}

#[test]
fn a_target_between_start_and_most_is_kept_to() {
    let (mut w, _) = small_start();
    let gfns: Vec<u64> = (512..1024).collect();
    w.m.page.target.store(512, SeqCst);
    assert_eq!(w.balloon(0, UP, &gfns), 0);
    w.m.page.target.store(600, SeqCst);
    assert_eq!(w.balloon(0, UP, &gfns), 88);
    assert_eq!(w.call(0, nr::MEMORY_OP, &[CURRENT_RESERVATION, 0]), 600);
    w.m.page.target.store(0, SeqCst);
    assert_eq!(w.balloon(0, UP, &gfns[88..]), 424);
    w.audit();
}

#[test]
fn the_map_has_what_may_come() {
    let (mut w, _) = small_start();
    let at = w.m.arg_words(0, &[16, common::ARGS + 0x100]);
    assert_eq!(w.call(0, nr::MEMORY_OP, &[MEMORY_MAP, at]), 0);
    let mut size = [0; 8];
    w.cpu0(|c| c.copy_in(Va(common::ARGS + 0x108), &mut size))
        .expect("there");
    assert_eq!(u64::from_le_bytes(size), 1024 << 12);
}

#[test]
fn it_has_more_numbers_than_it_may_have_frames() {
    let setup = Setup {
        ram: 1024,
        start: 512,
        most: 700,
        pool: 256,
        ..Setup::default()
    };
    let (mut w, _) = fuzz::start(setup);
    assert_eq!(w.call(0, nr::MEMORY_OP, &[MAXIMUM_RESERVATION, 0]), 700);
    assert_eq!(w.call(0, nr::MEMORY_OP, &[CURRENT_RESERVATION, 0]), 512);
    // Whichever it asks for, up to that; also when it is told to have more.
    let above: Vec<u64> = (900..1024).collect();
    assert_eq!(w.balloon(0, UP, &above), 124);
    for target in [0, 1000] {
        w.m.page.target.store(target, SeqCst);
        assert_eq!(w.balloon(0, UP, &[600]), 1);
        let rest: Vec<u64> = (601..700).collect();
        assert_eq!(w.balloon(0, UP, &rest), 63);
        assert_eq!(w.call(0, nr::MEMORY_OP, &[CURRENT_RESERVATION, 0]), 700);
        assert_eq!(w.balloon(0, DOWN, &rest[..63]), 63);
        assert_eq!(w.balloon(0, DOWN, &[600]), 1);
    }
    w.audit();
}
