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
    // Eight bytes choose the machine, and each eight behind them one step: what the fuzzer
    // changes, drops or moves is a step. (proptest's own way to draw from given bytes
    // halves them at each choice, and never ends once they are used up.)
    let mut words = data.chunks_exact(8).take(41).map(|word| {
        let mut seed = [0; 32];
        seed[..8].copy_from_slice(word);
        seed
    });
    let Some(machine) = words.next() else {
        return Corpus::Reject;
    };
    let thief = u64::from(machine[1]) << 12 | u64::from(machine[2]);
    let op = calls::op();
    let steps: Result<Vec<_>, _> = words
        .map(|seed| {
            let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
            let mut runner = TestRunner::new_with_rng(Config::default(), rng);
            op.new_tree(&mut runner).map(|tree| tree.current())
        })
        .collect();
    let Ok(steps) = steps else {
        return Corpus::Reject;
    };
    if let Err(broken) = calls::run(&steps, machine[0] & 1 != 0, thief, |_, _| ()) {
        eprintln!("{broken}");
        std::process::abort();
    }
    Corpus::Keep
});
