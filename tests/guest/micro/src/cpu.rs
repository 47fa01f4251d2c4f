//! Rows that use the CPU only: the same in a guest as below it.

use crate::sys::{Bench, timed};
use std::hint::black_box;

/// Dependent divisions of doubles.
pub fn double_division(_: &Bench, n: u64) -> f64 {
    let mut x = black_box(1.7_f64);
    let y = black_box(1.000_000_1_f64);
    let time = timed(|| {
        for _ in 0..n / 8 {
            x = x / y / y / y / y / y / y / y / y;
        }
    });
    black_box(x);
    time
}

/// Dependent shifts and exclusive ors.
pub fn xorshift(_: &Bench, n: u64) -> f64 {
    let mut x = black_box(88_172_645_463_325_252_u64);
    let time = timed(|| {
        for _ in 0..n {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
        }
    });
    black_box(x);
    time
}
