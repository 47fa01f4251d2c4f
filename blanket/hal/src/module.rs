//! Below `blanket.ko`: every exit is a world switch.

use crate::cpu::{self, msr};
use crate::entry;
use crate::machine::Hal;
use core::sync::atomic::Ordering;

/// Leaves to the module and comes back. What the host's world changed is put right
/// here: segments, their bases, debug registers.
pub fn exit(hal: &Hal, reason: u32, args: [u64; 4]) -> i64 {
    let selectors = cpu::selectors();
    let bases = [
        cpu::rdmsr(msr::FS_BASE),
        cpu::rdmsr(msr::GS_BASE),
        cpu::rdmsr(msr::KERNEL_GS_BASE),
    ];
    // SAFETY: this vCPU's own block; the module writes none of this field.
    let dr7 = unsafe { (&raw const (*hal.raw_switch()).guest_dr7).read_volatile() };
    if dr7 & 0xff != 0 {
        cpu::set_dr(7, 0x400);
    }
    let ret = hal.call(reason, args, |sw| {
        // SAFETY: `sw` is this vCPU's block, and the core's state is where the
        // module expects it (`Switch::exit_entry`).
        unsafe { entry::blanket_leave(sw) }
    });
    hal.load_core_root();
    if dr7 & 0xff != 0 {
        for (nr, dr) in (0u8..).zip(&hal.local().dr) {
            cpu::set_dr(nr, dr.load(Ordering::Relaxed));
        }
        cpu::set_dr(7, dr7);
    }
    hal.restore_segments(selectors, bases);
    ret
}
