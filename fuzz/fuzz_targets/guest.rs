//! A whole guest on a fake machine: hypercalls of all numbers with their structures
//! (events, grant copies, descriptors, page tables), iret frames, instructions. The
//! steps are those of `blanket/core/tests/coverage_fuzz.rs`, chosen by the fuzzer's bytes.
#![no_main]

#[path = "../../blanket/core/tests/common/mod.rs"]
mod common;

use common::calls;
use libfuzzer_sys::{Corpus, fuzz_target};
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use std::sync::Once;

fuzz_target!(|data: &[u8]| -> Corpus {
    // The end of a guest is a panic of the fake machine, which is caught.
    static QUIET: Once = Once::new();
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| ())));
    if data.len() < 8 {
        return Corpus::Reject;
    }
    let rng = TestRng::from_seed(RngAlgorithm::PassThrough, data);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let steps = (proptest::collection::vec(calls::op(), 1..40), proptest::bool::ANY, 0u64..1 << 20);
    let Ok(tree) = steps.new_tree(&mut runner) else {
        return Corpus::Reject;
    };
    let (ops, la57, thief) = tree.current();
    if let Err(broken) = calls::run(&ops, la57, thief, |_, _| ()) {
        eprintln!("{broken}");
        std::process::abort();
    }
    Corpus::Keep
});
