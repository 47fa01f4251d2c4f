//! Hypercalls of all numbers with arguments of all kinds, and in multicalls.

use blanket_abi::xen::hypercall::{self as nr, mmuext, sched, vcpu};

use crate::kernel::{Kernel, hypercall, install_handlers};
use crate::rng::Rng;

/// A call that would end this kernel at once, or change its root for nothing.
fn pointless(number: u64, args: &[u64; 5]) -> bool {
    match number {
        nr::IRET => true,
        nr::SCHED_OP => matches!(
            args[0],
            sched::SHUTDOWN | sched::BLOCK | sched::POLL | sched::REMOTE_SHUTDOWN
        ),
        nr::VCPU_OP => args[0] == vcpu::DOWN,
        _ => false,
    }
}

fn one(k: &Kernel, rng: &mut Rng) -> (u64, [u64; 5]) {
    let number = match rng.below(16) {
        0 => rng.next(),
        1 => rng.below(64),
        _ => rng.below(42),
    };
    let mut args = [0; 5];
    for arg in &mut args {
        *arg = match rng.below(3) {
            0 => rng.below(20),
            1 => rng.word(k),
            _ => {
                let words = 1 + rng.below(16);
                k.fill(rng, words, |rng, _| rng.word(k))
            }
        };
    }
    if number == nr::MMUEXT_OP {
        // An operation on the present root is another family's business.
        args[0] = k.fill(rng, 9, |rng, i| match i % 3 {
            0 => rng.pick(&[
                mmuext::PIN_L1,
                mmuext::PIN_L2,
                mmuext::PIN_L3,
                mmuext::PIN_L4,
                mmuext::UNPIN,
                mmuext::TLB_FLUSH_LOCAL,
                mmuext::INVLPG_LOCAL,
                mmuext::TLB_FLUSH_MULTI,
                mmuext::INVLPG_MULTI,
                mmuext::TLB_FLUSH_ALL,
                mmuext::INVLPG_ALL,
                mmuext::SET_LDT,
                mmuext::CLEAR_PAGE,
                mmuext::COPY_PAGE,
                99,
            ]) as u64,
            _ => rng.word(k),
        });
        args[1] = rng.below(4);
    }
    if number == nr::SCHED_OP && args[0] > 7 {
        args[0] = rng.word(k);
    }
    (number, args)
}

/// A call that this kernel survives, as far as it can be told by its number and arguments.
pub fn one_with_a_point(k: &Kernel, rng: &mut Rng) -> (u64, [u64; 5]) {
    loop {
        let (number, args) = one(k, rng);
        if !pointless(number, &args) {
            return (number, args);
        }
    }
}

pub fn attack(k: &Kernel, rng: &mut Rng) {
    for _ in 0..16 {
        if rng.once_in(6) {
            // `struct multicall_entry`: number, result, six arguments.
            let calls = 1 + rng.below(8);
            let mut row = (0, [0; 5]);
            let list = k.fill(rng, calls * 8, |rng, i| match i % 8 {
                0 => {
                    row = one_with_a_point(k, rng);
                    row.0
                }
                1 | 7 => rng.next(),
                n => row.1[n as usize - 2],
            });
            let count = if rng.once_in(10) { rng.word(k) } else { calls };
            // Longer lists would run what lies behind this one as calls.
            hypercall(nr::MULTICALL, [list, count.min(calls), 0, 0, 0]);
            install_handlers(k);
            continue;
        }
        let (number, args) = one(k, rng);
        if !pointless(number, &args) {
            hypercall(number, args);
        }
        // A kernel without handlers dies of its next fault, and attacks no more.
        if matches!(
            number,
            nr::SET_TRAP_TABLE | nr::CALLBACK_OP | nr::SET_CALLBACKS | nr::STACK_SWITCH
        ) {
            install_handlers(k);
        }
    }
}
