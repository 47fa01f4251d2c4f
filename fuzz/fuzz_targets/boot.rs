//! The boot record, which a VMM hands over: the core starts with it, or ends the VM.
#![no_main]

#[path = "../../blanket/core/tests/common/mod.rs"]
mod common;

use blanket_abi::device::{Boot, crash};
use common::{Setup, World};
use libfuzzer_sys::{arbitrary::Arbitrary, fuzz_target};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

#[derive(Arbitrary, Debug)]
struct Input {
    /// Fields of the record; those with a bit in `small` are made small.
    words: [u64; 12],
    small: u16,
}

fuzz_target!(|input: Input| {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| std::panic::set_hook(Box::new(|_| ())));
    let setup = Setup::default();
    let word = |n: usize| {
        if input.small & 1 << n != 0 {
            input.words[n] % (setup.frames() + 2)
        } else {
            input.words[n]
        }
    };
    let boot = Boot {
        ram_frames: word(0),
        shared_info: word(1),
        grant_base: word(2),
        grant_frames: word(3),
        cr3: word(4),
        rip: word(5),
        rsp: word(6),
        start_info: word(7),
        flags: word(8) & 1,
        hypercall_page: word(9),
        start_frames: word(10),
        most_frames: word(11),
        ..Boot::default()
    };
    let mut world = World::new(setup, boot);
    let started = catch_unwind(AssertUnwindSafe(|| {
        world.on(0, |c| {
            c.boot();
            c.prepare_return();
        });
    }));
    let crashed = world.m.crashed.borrow_mut().take();
    let known = crashed.is_some_and(|c| [crash::GUEST, crash::MEMORY].contains(&c.why));
    if started.is_err() && !known {
        eprintln!("the core panicked over {boot:?}");
        std::process::abort();
    }
});
