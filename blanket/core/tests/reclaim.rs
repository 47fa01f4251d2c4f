//! Shadow pages that the host wants back.
#![allow(
    clippy::cast_possible_truncation,
    reason = "small numbers of a small machine"
)]

mod common;

use blanket_abi::Va;
use blanket_abi::device::exit;
use blanket_abi::xen::hypercall::UPDATE_VA_MAPPING;
use blanket_core::pte;
use common::guest::{Guest, KERNEL_RW};
use common::{Setup, World, fuzz};
use std::sync::atomic::Ordering::SeqCst;

const AREA: u64 = 0xffff_c900_0000_0000;

/// A VM whose pool has grown: many tables, of which most are then no tables any more.
fn after_a_storm(pool: u32) -> (World, Guest) {
    let (mut w, mut g) = fuzz::start(Setup {
        vcpus: 2,
        ram: 1024,
        pool,
        ..Setup::default()
    });
    storm(&mut w, &mut g, 150);
    (w, g)
}

fn storm(w: &mut World, g: &mut Guest, tables: u64) {
    let mut all = Vec::new();
    for n in 0..tables {
        let va = AREA + n * 0x20_0000;
        let l1 = g.leaf_table(&w.m, g.root, va);
        w.m.words(l1)[0].store(900 << 12 | KERNEL_RW, SeqCst);
        let read_only = l1 << 12 | pte::P | pte::A;
        assert_eq!(
            w.call(0, UPDATE_VA_MAPPING, &[Guest::direct(l1), read_only, 0]),
            0
        );
        assert_eq!(w.access((n & 1) as u32, va, true, false), Some(900));
        all.push(l1);
    }
    for n in (0..tables).rev() {
        let va = AREA + n * 0x20_0000;
        // As Linux frees a table: out of its parent, then writable.
        let below =
            |table: u64, level| pte::frame(w.m.words(table)[Va(va).index(level)].load(SeqCst));
        let l2 = below(below(g.root, 4), 3);
        assert_eq!(w.update(0, l2, Va(va).index(2) as u64, 0), 0);
        let table = Guest::direct(all[n as usize]);
        let leaf = all[n as usize] << 12 | KERNEL_RW;
        assert_eq!(w.call(0, UPDATE_VA_MAPPING, &[table, leaf, 0]), 0);
        assert!(w.store(0, table, 0));
    }
}

#[test]
fn a_pool_that_grew_shrinks_and_grows_again() {
    let (mut w, mut g) = after_a_storm(512);
    let before = w.audit();
    assert!(before.free >= 150, "{before:?}");
    let pages = w.m.page.pool_pages.load(SeqCst);
    w.reclaim(1);
    let after = w.audit();
    assert_eq!(after.free, 32, "{after:?}");
    assert_eq!(after.gone, before.free - 32);
    assert_eq!(w.m.page.pool_gone.load(SeqCst), after.gone.into());
    assert_eq!(w.m.pool_taken.borrow().len(), after.gone as usize);
    // Nothing more to give.
    w.m.log.borrow_mut().clear();
    w.reclaim(0);
    assert_eq!(w.m.exits(exit::TRIM), []);
    // What went is filled before the pool grows.
    storm(&mut w, &mut g, 150);
    let again = w.audit();
    assert!(again.gone < after.gone, "{again:?}");
    assert!(!w.m.exits(exit::FILL).is_empty());
    assert_eq!(w.m.page.pool_pages.load(SeqCst), pages);
}

#[test]
fn a_host_that_fills_nothing_is_a_pool_at_its_limit() {
    let (mut w, mut g) = after_a_storm(224);
    w.reclaim(0);
    assert!(w.audit().gone > 100);
    w.m.set_hook(|_, e| (e.reason == exit::FILL || e.reason == exit::POOL).then_some(-12));
    // It drops what it has, again and again, and goes on.
    storm(&mut w, &mut g, 150);
    w.audit();
    assert_eq!(w.m.crashed.borrow().clone(), None);
}
