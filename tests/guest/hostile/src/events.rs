//! Event channels, grants, vCPUs and timers, with arguments that almost fit.

use blanket_abi::xen::hypercall::{self as nr, vcpu};

use crate::kernel::{Kernel, hypercall};
use crate::rng::Rng;

pub fn attack(k: &Kernel, rng: &mut Rng) {
    for _ in 0..16 {
        let small = |rng: &mut Rng| match rng.below(6) {
            0 => rng.below(4),
            1 => rng.below(64),
            2 => rng.below(4100),
            3 => 0x7ff0 + rng.below(16),
            4 => rng.next() & 0xffff_ffff,
            _ => rng.next(),
        };
        match rng.below(4) {
            0 | 1 => {
                // Two 32-bit fields in a word.
                let args = k.fill(rng, 4, |rng, _| small(rng) << 32 | small(rng) & 0xffff_ffff);
                hypercall(nr::EVENT_CHANNEL_OP, [rng.below(16), args, 0, 0, 0]);
            }
            2 => {
                let args = k.fill(rng, 24, |rng, _| {
                    if rng.once_in(3) {
                        rng.address(k)
                    } else {
                        small(rng) << 32 | small(rng) & 0xffff_ffff
                    }
                });
                let count = rng.pick(&[0, 1, 2, 3, 1000]);
                hypercall(nr::GRANT_TABLE_OP, [rng.below(14), args, count, 0, 0]);
            }
            _ => {
                let cmd = rng.below(15);
                if cmd != vcpu::DOWN {
                    let args = k.fill(rng, 64, |rng, _| rng.word(k));
                    hypercall(nr::VCPU_OP, [cmd, small(rng), args, 0, 0]);
                }
            }
        }
    }
}
