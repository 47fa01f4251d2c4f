//! Arbitrary hypercalls, traps and registers from a guest of three vCPUs: the
//! outcome is an answer or the end of that guest, and the core's own state holds.
#![allow(
    clippy::cast_possible_truncation,
    reason = "small numbers of a small machine"
)]

mod common;

use common::calls::{Op, op, run};
use common::fuzz;
use proptest::prelude::*;

proptest! {
    #![proptest_config(fuzz::cases(150))]

    #[test]
    fn no_guest_breaks_the_core(ops in prop::collection::vec(op(), 1..60), la57: bool, thief: Option<u64>) {
        if let Err(e) = run(&ops, la57, thief.unwrap_or(0), |_, _| ()) {
            return Err(TestCaseError::fail(e));
        }
    }
}

#[test]
fn the_generator_reaches_most_calls() {
    use proptest::strategy::ValueTree;
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (mut done, mut calls) = (0, std::collections::BTreeMap::<u64, u32>::new());
    for _ in 0..60 {
        let ops = prop::collection::vec(op(), 40..41)
            .new_tree(&mut runner)
            .expect("a value")
            .current();
        done += run(&ops, false, 0, |w, op| {
            if let Op::Call {
                vcpu,
                call,
                multi: false,
                ..
            } = *op
                && w.regs[vcpu as usize].rax.cast_signed() >= 0
            {
                *calls.entry(call).or_default() += 1;
            }
        })
        .unwrap_or_else(|e| panic!("{e}"));
    }
    assert!(done > 60 * 40 / 2, "only {done} steps of {}", 60 * 40);
    assert!(calls.len() > 15, "only these calls ever succeed: {calls:?}");
}
