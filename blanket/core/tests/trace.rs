//! The trace: what is recorded, when it begins and ends.

#![allow(
    clippy::cast_possible_truncation,
    reason = "small numbers of a small machine"
)]

mod common;

use blanket_abi::device::{exit, pending};
use blanket_abi::trace::{Record, kind};
use blanket_abi::xen::hypercall as nr;
use blanket_core::machine::Host as _;
use blanket_core::vcpu::entry;
use common::World;
use common::guest::TEXT;
use common::trap::{SP, user, world};
use std::sync::atomic::Ordering::SeqCst;

/// As the VMM does it, and as the vCPU sees it on its way back to the guest.
fn switch(w: &mut World, on: bool) {
    w.m.page.trace.store(on.into(), SeqCst);
    w.cpu0(|c| {
        c.m.pending_of(0).fetch_or(pending::KICK, SeqCst);
        c.prepare_return();
    });
}

/// As the traced one of the two functions that the entry code calls.
fn enter(w: &mut World, vector: u64, error: u64) {
    w.cpu0(|c| {
        (c.f.vector, c.f.error) = (vector, error);
        if c.fast.traced {
            c.trace_entry();
        }
        c.enter();
    });
}

fn records(w: &World) -> Vec<Record> {
    w.m.cpus[0].trace.read().collect()
}

#[test]
fn entries_exits_and_what_is_in_a_multicall() {
    let (mut w, _) = world();
    switch(&mut w, true);
    assert_eq!(w.fast[0].trap, 0x1001, "the traced entry");
    let call = [nr::XEN_VERSION, 0, 0, 0x77, 0, 0, 0, 0];
    let at = w.m.arg_words(0, &[call, call].concat());
    (w.regs[0].rax, w.regs[0].rdi, w.regs[0].rsi) = (nr::MULTICALL, at, 2);
    enter(&mut w, entry::SYSCALL, 0);
    w.m.cpu().cr2.set(0x7000_0000);
    enter(&mut w, 14, 4);
    w.cpu0(|c| c.exit(exit::KICK, [2, 0, 0, 0]));
    user(&mut w);
    enter(&mut w, 0xef, 0);

    let all = records(&w);
    let what: Vec<_> = all.iter().map(|r| (r.kind, r.what)).collect();
    assert_eq!(
        what,
        [
            (kind::HYPERCALL, nr::MULTICALL as u32),
            (kind::MULTICALL, nr::XEN_VERSION as u32),
            (kind::MULTICALL, nr::XEN_VERSION as u32),
            (kind::TRAP, 14),
            (kind::EXIT, exit::KICK),
            (kind::TRAP, 0xef),
            (kind::EXIT, exit::INTR),
        ]
    );
    assert_eq!((all[0].args[0], all[0].args[1], all[0].rip), (at, 2, TEXT));
    assert_eq!(all[1].args, [0, 0x77, 0, 0]);
    assert_eq!(all[3].args[..3], [4, 0x7000_0000, SP]);
    assert_eq!(all[4].args, [2, 0, 0, 0]);
    assert!(all[4].kernel && !all[5].kernel);
    assert!(all.is_sorted_by_key(|r| (r.number, r.tsc)));
}

#[test]
fn off_nothing_is_recorded_and_numbers_go_on_where_they_were() {
    let (mut w, _) = world();
    w.cpu0(|c| c.follow_trace());
    enter(&mut w, 0xef, 0);
    assert_eq!(records(&w), []);
    switch(&mut w, true);
    enter(&mut w, 0xef, 0);
    let first = records(&w);
    assert_eq!(first.first().map(|r| r.number), Some(1));
    switch(&mut w, false);
    assert_eq!(w.fast[0].trap, 0x1000);
    enter(&mut w, 0xef, 0);
    assert_eq!(records(&w), first);
    switch(&mut w, true);
    enter(&mut w, 0xef, 0);
    let number = first.last().map(|r| r.number + 1);
    assert_eq!(records(&w).get(first.len()).map(|r| r.number), number);
}
