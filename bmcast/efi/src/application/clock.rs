//! Time, by the TSC.

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;

use super::cpu;

/// Cycles of a millisecond.
static PER_MILLI: AtomicU64 = AtomicU64::new(1_000_000);

/// Measures the TSC against the firmware's clock.
pub fn measure() {
    let before = cpu::tsc();
    uefi::boot::stall(Duration::from_millis(20));
    let cycles = cpu::tsc().wrapping_sub(before) / 20;
    PER_MILLI.store(cycles.max(1000), Ordering::Relaxed);
}

/// Microseconds since the machine began.
pub fn micros() -> u64 {
    let per_milli = u128::from(PER_MILLI.load(Ordering::Relaxed));
    u64::try_from(u128::from(cpu::tsc()) * 1000 / per_milli).unwrap_or(u64::MAX)
}
