//! Many calls for few instructions: a list of random calls is run again and again, and
//! one word of it is changed each time.

use core::sync::atomic::Ordering::Relaxed;

use blanket_abi::xen::hypercall as nr;

use crate::hypercalls::one_with_a_point;
use crate::kernel::{Kernel, hypercall, install_handlers};
use crate::rng::Rng;

/// Calls of a list, and words of each (`struct multicall_entry`).
const CALLS: u64 = 16;
const WORDS: u64 = 8;
/// How often the list is run.
const ROUNDS: u64 = 64;

pub fn attack(k: &Kernel, rng: &mut Rng) {
    let mut call = (0, [0; 5]);
    let list = k.fill(rng, CALLS * WORDS, |rng, i| match i % WORDS {
        0 => {
            call = one_with_a_point(k, rng);
            call.0
        }
        1 | 7 => 0,
        n => call.1[n as usize - 2],
    });
    // Near the end of a page the list is cut, and the calls behind it are another's.
    let whole = (4096 - (list & 0xfff)) / 8 / WORDS;
    for _ in 0..ROUNDS {
        hypercall(nr::MULTICALL, [list, CALLS.min(whole), 0, 0, 0]);
        install_handlers(k);
        let row = list + rng.below(CALLS.min(whole)) * WORDS * 8;
        // What these two do depends on their first argument, and some of it ends us.
        let number = k.word_at(row).load(Relaxed);
        let first = u64::from(matches!(number, nr::SCHED_OP | nr::VCPU_OP));
        let argument = 2 + first + rng.below(5 - first);
        k.word_at(row + argument * 8).store(rng.word(k), Relaxed);
    }
}
