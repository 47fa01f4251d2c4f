//! The rules of the shadow MMU, one by one (`blanket_core::mmu`).

mod common;

use blanket_abi::device::exit;
use blanket_abi::xen::hypercall::{self as nr, mmuext};
use blanket_abi::{Gfn, Va};
use blanket_core::mmu::Broken;
use blanket_core::pte;
use common::guest::{DIRECT, Guest, KERNEL_RW, TABLE, TEXT, USER};
use common::{Reached, Setup, World};
use std::sync::atomic::Ordering::SeqCst;

fn world(la57: bool) -> (World, Guest) {
    World::booted(Setup {
        la57,
        ..Setup::default()
    })
}

fn mark(w: &World, gfn: u64) -> u8 {
    w.vm.mmu.lock().mark(Gfn(gfn))
}

fn mapped(w: &World, gfn: u64) -> u64 {
    w.vm.mmu.lock().mapped(&w.m, Gfn(gfn))
}

/// The leaf of the shadow for `va`, as the CPU would find it.
fn leaf(w: &World, va: u64) -> Option<u64> {
    w.switch_to(0);
    w.m.walk(Va(va), false, false, false)
        .ok()
        .map(|(_, leaf)| leaf)
}

#[test]
fn boot_marks_the_whole_tree_and_nothing_else() {
    let (w, g) = world(false);
    for gfn in 0..w.setup.frames() {
        assert_eq!(mark(&w, gfn) != 0, g.tables.contains(&gfn), "gfn {gfn}");
    }
    assert_eq!(mark(&w, g.root), 8);
    w.audit();
}

#[test]
fn a_fault_fills_what_the_guest_allows_and_no_more() {
    let (mut w, g) = world(false);
    let data = 100;
    assert_eq!(w.access(0, Guest::direct(data), true, false), Some(data));
    assert_eq!(w.access(0, TEXT, false, true), Some(g.text));
    assert_eq!(w.access(0, TEXT, true, false), None, "text is read-only");
    assert_eq!(
        w.access(0, 0x1234_5000, false, false),
        None,
        "nothing is mapped there"
    );
    assert_eq!(
        w.access(0, Guest::direct(g.root), false, false),
        Some(g.root)
    );
    w.audit();
}

#[test]
fn no_execute_and_rights_of_upper_levels_hold() {
    let (mut w, mut g) = world(false);
    let va = 0xffff_c900_0000_0000;
    let l1 = g.leaf_table(&w.m, g.root, va);
    let data = g.alloc();
    assert_eq!(w.mmuext(0, mmuext::PIN_L4, g.root, 0), 0);
    assert_eq!(w.update(0, l1, 0, data << 12 | KERNEL_RW | pte::NX), 0);
    assert_eq!(w.access(0, va, true, false), Some(data));
    assert_eq!(w.access(0, va, false, true), None);
    // The L3 entry loses RW: nothing below is writable any more.
    let l3_entry = w.m.words(g.root)[Va(va).index(4)].load(SeqCst);
    assert_eq!(
        w.update(0, g.root, Va(va).index(4) as u64, l3_entry & !pte::RW),
        0
    );
    w.mmuext(0, mmuext::TLB_FLUSH_LOCAL, 0, 0);
    assert_eq!(w.access(0, va, true, false), None);
    assert_eq!(w.access(0, va, false, false), Some(data));
    w.audit();
}

#[test]
fn accessed_and_dirty_bits_follow_the_accesses() {
    let (mut w, mut g) = world(false);
    let va = DIRECT + (100 << 12);
    let l1 = g.leaf_table(&w.m, g.root, va);
    let cell = Va(va).index(1);
    assert_eq!(
        w.update(0, l1, cell as u64, 100 << 12 | pte::P | pte::RW),
        0
    );
    assert_eq!(leaf(&w, va), None, "not accessed: no leaf");
    assert!(w.access(0, va, false, false).is_some());
    assert_eq!(w.m.words(l1)[cell].load(SeqCst) & (pte::A | pte::D), pte::A);
    assert_eq!(
        leaf(&w, va).expect("a leaf") & pte::RW,
        0,
        "clean: not writable in the shadow"
    );
    assert!(w.access(0, va, true, false).is_some());
    assert_eq!(
        w.m.words(l1)[cell].load(SeqCst) & (pte::A | pte::D),
        pte::A | pte::D
    );
    assert_ne!(leaf(&w, va).expect("a leaf") & pte::RW, 0);
    // PRESERVE_AD keeps what the hardware set.
    let at = w.m.arg_words(
        0,
        &[
            l1 << 12 | (cell as u64) << 3 | 2,
            100 << 12 | pte::P | pte::RW,
        ],
    );
    assert_eq!(w.call(0, nr::MMU_UPDATE, &[at, 1, 0, 0x7ff0]), 0);
    assert_eq!(
        w.m.words(l1)[cell].load(SeqCst) & (pte::A | pte::D),
        pte::A | pte::D
    );
    w.audit();
}

#[test]
fn a_hypercall_changes_the_shadow_at_once() {
    let (mut w, mut g) = world(false);
    let va = Guest::direct(90);
    let l1 = g.leaf_table(&w.m, g.root, va);
    assert!(w.access(0, va, true, false).is_some());
    assert_eq!(
        w.call(0, nr::UPDATE_VA_MAPPING, &[va, 91 << 12 | KERNEL_RW, 2]),
        0
    );
    assert_eq!(w.access(0, va, false, false), Some(91));
    assert_eq!(w.update(0, l1, Va(va).index(1) as u64, 0), 0);
    assert_eq!(leaf(&w, va), None);
    assert_eq!(w.access(0, va, false, false), None);
    w.audit();
}

#[test]
fn a_table_that_becomes_writable_is_no_table() {
    let (mut w, mut g) = world(false);
    let va = 0x5000_0000_0000;
    let (table, data) = (g.alloc(), g.alloc());
    let l1 = g.leaf_table(&w.m, g.root, va);
    let l2 = g.leaf_table(&w.m, g.root, va + (1 << 21));
    assert_ne!(l1, l2);
    assert_eq!(w.mmuext(0, mmuext::PIN_L4, g.root, 0), 0);
    // `table` becomes an L1 table: read-only first, then pinned, then linked.
    assert_eq!(
        w.call(
            0,
            nr::UPDATE_VA_MAPPING,
            &[Guest::direct(table), table << 12 | pte::P | pte::A, 2]
        ),
        0
    );
    w.m.words(table)[0].store(data << 12 | KERNEL_RW, SeqCst);
    assert_eq!(w.mmuext(0, mmuext::PIN_L1, table, 0), 0);
    assert_eq!(mark(&w, table), 1);
    assert!(
        !w.store(0, Guest::direct(table), 0),
        "a table is not writable"
    );
    // Unpinned and writable again: plain memory.
    assert_eq!(w.mmuext(0, mmuext::UNPIN, table, 0), 0);
    assert_eq!(
        w.call(
            0,
            nr::UPDATE_VA_MAPPING,
            &[Guest::direct(table), table << 12 | KERNEL_RW, 2]
        ),
        0
    );
    assert!(w.store(0, Guest::direct(table), 0x1234));
    assert_eq!(mark(&w, table), 0);
    w.audit();
}

#[test]
fn writes_of_the_guest_kernel_to_a_table_are_emulated() {
    let (mut w, mut g) = world(false);
    let va = Guest::direct(80);
    let l1 = g.leaf_table(&w.m, g.root, va);
    let at = Guest::direct(l1) + 8 * Va(va).index(1) as u64;
    // mov %rax, (%rdi)
    for (i, b) in [0x48, 0x89, 0x07].into_iter().enumerate() {
        w.m.bytes(g.text)[i].store(b, SeqCst);
    }
    assert!(w.access(0, va, true, false).is_some());
    assert_eq!(w.access(0, TEXT, false, true), Some(g.text));
    w.regs[0].rip = TEXT;
    w.regs[0].rax = 81 << 12 | KERNEL_RW;
    w.regs[0].rdi = at;
    w.m.cpu().cr2.set(at);
    w.on(0, |c| {
        c.f.vector = 14;
        c.f.error = 7;
        c.enter();
        assert_eq!(c.f.rip, TEXT + 3);
    });
    assert_eq!(w.access(0, va, false, false), Some(81));
    w.audit();
}

#[test]
fn revoked_frames_have_no_leaf_and_come_back_by_faults() {
    for la57 in [false, true] {
        let (mut w, mut g) = world(la57);
        // Many leaves of one frame: in place, one chain node, several nodes.
        let va = 0xffff_c900_0000_0000;
        let l1 = g.leaf_table(&w.m, g.root, va);
        assert_eq!(w.mmuext(0, mmuext::PIN_L4, g.root, 0), 0);
        for n in [1u64, 2, 3, 15, 16, 17, 40] {
            for i in 0..n {
                assert_eq!(w.update(0, l1, i, 100 << 12 | KERNEL_RW), 0);
            }
            w.mmuext(0, mmuext::NEW_BASEPTR, g.root, 0);
            for i in 0..n {
                assert_eq!(
                    w.access(0, va + (i << 12), true, false),
                    Some(100),
                    "{i} of {n}"
                );
            }
            let report = w.audit();
            assert!(mapped(&w, 100) >= n, "{report:?}");
            w.revoke(100);
            assert_eq!(mapped(&w, 100), 0);
            w.audit();
            assert_eq!(w.access(0, va, true, false), Some(100));
            w.audit();
        }
    }
}

#[test]
fn leaves_of_one_frame_go_in_any_order() {
    let (mut w, mut g) = world(false);
    let va = 0xffff_c900_0000_0000;
    let l1 = g.leaf_table(&w.m, g.root, va);
    w.mmuext(0, mmuext::PIN_L4, g.root, 0);
    for i in 0..64 {
        w.update(0, l1, i, 100 << 12 | KERNEL_RW);
        w.access(0, va + (i << 12), true, false);
    }
    // A step that visits all 64 in a mixed order.
    for i in (0..64).map(|i| i * 37 % 64) {
        w.update(0, l1, i, 0);
        w.audit();
    }
    assert!(mapped(&w, 100) <= 2, "what remains is the direct map");
}

#[test]
fn a_frame_that_the_host_lacks_is_asked_for_once() {
    let (mut w, _) = world(false);
    w.m.log.borrow_mut().clear();
    assert_eq!(w.access(0, Guest::direct(100), false, false), Some(100));
    let mut asked: Vec<u64> = w.m.exits(exit::FRAME).iter().map(|e| e.args[0]).collect();
    assert!(asked.contains(&100));
    asked.sort_unstable();
    assert!(asked.windows(2).all(|a| a[0] != a[1]), "{asked:?}");
}

#[test]
fn entries_beyond_the_vm_reach_nothing() {
    let (mut w, mut g) = world(false);
    let va = 0xffff_c900_0000_0000;
    let l1 = g.leaf_table(&w.m, g.root, va);
    w.mmuext(0, mmuext::PIN_L4, g.root, 0);
    let frames = w.setup.frames();
    for gfn in [frames, frames + 1, 1 << 24, 1 << 32, (1 << 40) - 1] {
        assert_eq!(w.update(0, l1, 0, gfn << 12 | KERNEL_RW), 0, "{gfn:#x}");
        assert_eq!(w.access(0, va, true, false), None, "{gfn:#x}");
        // The same as a table, at every level.
        for (level, table) in [(4, g.root), (2, l1)] {
            let spare = if level == 4 { 300 } else { 5 };
            assert_eq!(w.update(0, table, spare, gfn << 12 | TABLE), 0);
        }
        assert_eq!(
            w.access(0, 0xffff_0000_0000_0000 | 300 << 39, false, false),
            None
        );
        assert_eq!(w.mmuext(0, mmuext::NEW_BASEPTR, gfn, 0), -22);
        assert_eq!(w.mmuext(0, mmuext::NEW_USER_BASEPTR, gfn, 0), -22);
        assert_eq!(w.mmuext(0, mmuext::PIN_L4, gfn, 0), -22);
        assert_eq!(w.update(0, gfn, 0, 0), -22);
        w.audit();
    }
}

#[test]
fn large_pages_are_refused_at_every_level() {
    let (mut w, mut g) = world(false);
    let va = 0xffff_c900_0000_0000;
    let l1 = g.leaf_table(&w.m, g.root, va);
    w.mmuext(0, mmuext::PIN_L4, g.root, 0);
    w.update(0, l1, 0, 100 << 12 | KERNEL_RW);
    assert_eq!(w.access(0, va, true, false), Some(100));
    let l3 = pte::frame(w.m.words(g.root)[Va(va).index(4)].load(SeqCst));
    let l2 = pte::frame(w.m.words(l3)[Va(va).index(3)].load(SeqCst));
    for (table, level) in [(g.root, 4), (l3, 3), (l2, 2)] {
        let i = Va(va).index(level);
        let entry = w.m.words(table)[i].load(SeqCst);
        assert_eq!(w.update(0, table, i as u64, entry | pte::PS), 0);
        assert_eq!(leaf(&w, va), None);
        assert_eq!(w.access(0, va, false, false), None, "level {level}");
        w.audit();
        assert_eq!(w.update(0, table, i as u64, entry), 0);
        assert_eq!(w.access(0, va, true, false), Some(100));
    }
    // At level 1 the bit is PAT, and the core keeps its own memory types.
    w.update(
        0,
        l1,
        0,
        100 << 12 | KERNEL_RW | pte::PS | 1 << 3 | 1 << 4 | 1 << 8,
    );
    assert_eq!(w.access(0, va, true, false), Some(100));
    w.audit();
}

#[test]
fn the_hypervisors_slots_are_not_the_guests() {
    let (mut w, g) = world(false);
    for slot in 256..272u64 {
        assert_eq!(w.update(0, g.root, slot, 100 << 12 | TABLE), 0);
        let va = 0xffff_0000_0000_0000 | slot << 39;
        assert_eq!(w.access(0, va, false, false), None);
        assert_eq!(w.call(0, nr::UPDATE_VA_MAPPING, &[va, 0, 0]), -22);
        assert_eq!(mark(&w, 100), 0, "what these slots name is no table");
    }
    w.mmuext(0, mmuext::NEW_BASEPTR, g.root, 0);
    w.audit();
}

#[test]
fn self_maps_and_level_confusion_do_no_harm() {
    for la57 in [false, true] {
        let (mut w, g) = world(la57);
        // The root names itself: every level is a shadow of the same frame.
        assert_eq!(w.update(0, g.root, 300, g.root << 12 | TABLE & !pte::D), 0);
        let slot = |i: u64| i << 39 | i << 30 | i << 21 | i << 12;
        let va = 0xffff_0000_0000_0000 | slot(300);
        assert_eq!(w.access(0, va, false, false), Some(g.root));
        w.audit();
        // Writing a table through itself never ends, and hurts nobody else.
        assert_eq!(w.try_access(0, va, true, false), Reached::Never);
        w.audit();
        assert_eq!(w.access(0, TEXT, false, true), Some(g.text));
        w.mmuext(0, mmuext::NEW_BASEPTR, g.root, 0);
        w.audit();
    }
}

#[test]
fn user_roots_hide_the_m2p_and_share_tables() {
    for la57 in [false, true] {
        let (mut w, g) = world(la57);
        assert_eq!(w.access(0, USER, true, false), Some(g.user_text));
        w.on(0, |c| c.to_user_mode());
        assert_eq!(w.access(0, USER, true, false), Some(g.user_text));
        assert_eq!(w.access(0, DIRECT, false, false), None);
        // That fault went to the guest kernel, which is where the vCPU is now.
        assert_eq!(w.fast[0].kernel_mode, 1);
        assert_eq!(w.access(0, Guest::direct(70), false, false), Some(70));
        w.audit();
    }
}

#[test]
fn roots_with_a_low_slot_work_with_five_levels() {
    let (mut w, g) = world(true);
    assert_eq!(w.access(0, USER, true, false), Some(g.user_text));
    for _ in 0..3 {
        assert_eq!(w.mmuext(0, mmuext::NEW_BASEPTR, g.root, 0), 0);
        assert_eq!(w.mmuext(0, mmuext::NEW_USER_BASEPTR, g.user_root, 0), 0);
        assert_eq!(w.access(0, USER, true, false), Some(g.user_text));
        assert_eq!(w.access(0, TEXT, false, true), Some(g.text));
        w.audit();
    }
    w.vm.mmu.lock().drop_all(&w.m, &w.vm.epochs);
    w.audit();
    assert_eq!(w.access(0, TEXT, false, true), Some(g.text));
}

#[test]
fn dropping_everything_is_a_correct_answer() {
    for la57 in [false, true] {
        let (mut w, g) = world(la57);
        for gfn in 0..w.setup.frames() {
            w.access(0, Guest::direct(gfn), false, false);
        }
        w.vm.mmu.lock().drop_all(&w.m, &w.vm.epochs);
        let r = w.audit();
        assert_eq!((r.leaves, r.links), (0, 0));
        w.mmuext(0, mmuext::NEW_USER_BASEPTR, 0, 0);
        w.vm.mmu.lock().drop_all(&w.m, &w.vm.epochs);
        let r = w.audit();
        assert_eq!(r.shadows, 1, "only the root that is in use");
        assert_eq!((r.wrappers, r.nodes), (u32::from(la57), 0));
        assert_eq!(w.access(0, Guest::direct(90), true, false), Some(90));
        assert_eq!(w.access(0, TEXT, false, true), Some(g.text));
        w.audit();
    }
}

#[test]
fn a_small_pool_is_used_again_and_again() {
    for la57 in [false, true] {
        let setup = Setup {
            pool: 16,
            la57,
            ..Setup::default()
        };
        let (mut w, mut g) = World::booted(setup);
        // More tables than the pool has pages: eight regions of two megabytes.
        let regions: Vec<u64> = (0..8).map(|i| 0xffff_c900_0000_0000 + (i << 30)).collect();
        for &va in &regions {
            let l1 = g.leaf_table(&w.m, g.root, va);
            w.m.words(l1)[3].store(100 << 12 | KERNEL_RW, SeqCst);
        }
        w.mmuext(0, mmuext::PIN_L4, g.root, 0);
        w.mmuext(0, mmuext::NEW_BASEPTR, g.root, 0);
        for _ in 0..4 {
            for &va in &regions {
                assert_eq!(w.access(0, va + 0x3000, true, false), Some(100));
                w.audit();
            }
        }
    }
}

#[test]
fn freed_pages_wait_until_every_cpu_has_reloaded() {
    let (mut w, mut g) = World::booted(Setup {
        vcpus: 2,
        pool: 24,
        ..Setup::default()
    });
    // vCPU 1 runs on the same kernel root.
    let root = g.root;
    w.on(1, |c| {
        c.fast.kernel_mode = 1;
        let (page, cr3) = c.mmu(|mmu, m, ep| {
            let page = mmu.root_get(m, ep, Gfn(root), false)?;
            Ok((page, mmu.root_cr3(m, page)))
        });
        c.v.kernel_root = page;
        c.fast.kernel_cr3 = cr3;
        c.load_root();
    });
    let va = 0xffff_c900_0000_0000;
    let l1 = g.leaf_table(&w.m, g.root, va);
    let spare = g.alloc();
    w.m.words(l1)[0].store(100 << 12 | KERNEL_RW, SeqCst);
    w.mmuext(0, mmuext::PIN_L4, g.root, 0);
    w.mmuext(0, mmuext::NEW_BASEPTR, g.root, 0);
    assert_eq!(w.access(1, va, true, false), Some(100));
    w.switch_to(1);
    let page_of = |w: &World| w.vm.mmu.lock().mapped(&w.m, Gfn(100));
    assert!(page_of(&w) > 0);
    // vCPU 0 frees the L1 shadow, vCPU 1 may have it in its caches.
    w.update(
        0,
        pte::frame(
            w.m.words(pte::frame(w.m.words(g.root)[Va(va).index(4)].load(SeqCst)))[Va(va).index(3)]
                .load(SeqCst),
        ),
        Va(va).index(2) as u64,
        0,
    );
    w.update(0, g.root, Va(va).index(4) as u64, 0);
    w.call(
        0,
        nr::UPDATE_VA_MAPPING,
        &[Guest::direct(l1), l1 << 12 | KERNEL_RW, 2],
    );
    assert_eq!(w.access(0, Guest::direct(l1), true, false), Some(l1));
    let before = w.audit();
    assert!(before.free >= 1, "{before:?}");
    // New shadows must not use it while vCPU 1 is inside.
    for i in 0..6u64 {
        let va = 0xffff_d000_0000_0000 + (i << 30);
        let l1 = g.leaf_table(&w.m, g.root, va);
        w.m.words(l1)[0].store(spare << 12 | KERNEL_RW, SeqCst);
        w.mmuext(0, mmuext::PIN_L4, g.root, 0);
        w.mmuext(0, mmuext::NEW_BASEPTR, g.root, 0);
        assert_eq!(w.access(0, va, true, false), Some(spare));
        w.audit();
    }
}

#[test]
fn endless_trees_are_marked_with_breaths_between() {
    let (mut w, mut g) = World::booted(Setup {
        ram: 1200,
        pool: 64,
        ..Setup::default()
    });
    // One L3 whose 512 entries are 512 different L2 tables, each with itself as
    // its only L1: more tables than one breath may visit.
    let l3 = g.alloc();
    for i in 0..512 {
        let l2 = g.alloc();
        w.m.words(l2)[0].store(l2 << 12 | TABLE, SeqCst);
        w.m.words(l3)[i].store(l2 << 12 | TABLE, SeqCst);
    }
    (0..w.setup.frames()).for_each(|gfn| w.m.give(gfn));
    w.m.log.borrow_mut().clear();
    assert_eq!(w.mmuext(0, mmuext::PIN_L3, l3, 0), 0);
    assert!(!w.m.exits(exit::BREATH).is_empty(), "interrupts get in");
    assert_eq!(mark(&w, l3), 4);
    w.audit();
}

#[test]
fn the_audit_sees_what_is_wrong() {
    let (mut w, _) = world(false);
    w.access(0, Guest::direct(100), true, false);
    w.audit();
    // A root too many, a root too few.
    let roots = w.roots();
    let mut mmu = w.vm.mmu.lock();
    assert!(matches!(
        mmu.audit(&w.m, &roots[1..]),
        Err(Broken::Refs { surplus: 1, .. })
    ));
    assert!(mmu.audit(&w.m, &roots).is_ok());
    // The host takes a frame without telling.
    w.m.take(100);
    assert!(matches!(
        mmu.audit(&w.m, &roots),
        Err(Broken::Frame { gfn: 100, .. })
    ));
}

#[test]
fn a_pool_without_room_for_a_root_of_two_pages_is_emptied() {
    // Roots of 5-level hosts take two pages: one free page is not enough, and it
    // is free again after each try.
    let setup = Setup {
        pool: 13,
        la57: true,
        ..Setup::default()
    };
    let (mut w, g) = World::booted(setup);
    for round in 0..3 {
        for gfn in 60..90 {
            assert_eq!(w.mmuext(0, mmuext::NEW_BASEPTR, gfn, 0), 0);
            w.audit();
        }
        assert_eq!(w.mmuext(0, mmuext::NEW_BASEPTR, g.root, 0), 0);
        assert_eq!(
            w.access(0, TEXT, false, true),
            Some(g.text),
            "round {round}"
        );
    }
}

#[test]
fn a_pool_that_is_too_small_ends_the_vm() {
    let (mut w, _) = World::booted(Setup {
        pool: 5,
        ..Setup::default()
    });
    let crash = w.crashes(|c| {
        // The error is never seen: the VM ends.
        let _never = c.resolve(Va(DIRECT), false);
    });
    assert_eq!(crash.why, blanket_abi::device::crash::MEMORY);
    assert!(crash.text.contains("pool is too small"), "{}", crash.text);
}

#[test]
fn pages_of_the_reverse_map_are_given_back() {
    let (mut w, mut g) = world(false);
    let va = 0xffff_c900_0000_0000;
    let l1 = g.leaf_table(&w.m, g.root, va);
    w.mmuext(0, mmuext::PIN_L4, g.root, 0);
    for i in 0..512 {
        w.update(0, l1, i, (90 + i % 30) << 12 | KERNEL_RW);
        w.access(0, va + (i << 12), true, false);
    }
    assert!(w.audit().nodes > 0);
    w.vm.mmu.lock().drop_all(&w.m, &w.vm.epochs);
    assert_eq!(w.audit().nodes, 0);
    for i in 0..512 {
        assert_eq!(w.access(0, va + (i << 12), true, false), Some(90 + i % 30));
    }
    w.audit();
}

#[test]
fn a_leaf_that_unmakes_its_own_table_is_not_written_into_a_free_page() {
    let (mut w, mut g) = world(false);
    let va = 0xffff_c900_0000_0000;
    let l1 = g.leaf_table(&w.m, g.root, va);
    w.m.words(l1)[1].store(100 << 12 | KERNEL_RW, SeqCst);
    w.mmuext(0, mmuext::PIN_L4, g.root, 0);
    assert_eq!(w.access(0, va + 0x1000, true, false), Some(100));
    // Nobody refers to the shadow of the leaf table any more; the mark keeps it.
    let l3 = pte::frame(w.m.words(g.root)[Va(va).index(4)].load(SeqCst));
    let l2 = pte::frame(w.m.words(l3)[Va(va).index(3)].load(SeqCst));
    assert_eq!(w.update(0, l2, Va(va).index(2) as u64, 0), 0);
    // The table maps itself writable: it is no table any more, its shadow goes.
    assert_eq!(w.update(0, l1, 0, l1 << 12 | KERNEL_RW), 0);
    let report = w.audit();
    assert_eq!((mark(&w, l1), mapped(&w, l1)), (0, 0), "{report:?}");
}
