//! The logic of Blanket's core: what a hypervisor must decide for a PV guest,
//! and no more.
//!
//! The crate has no unsafe code and no allocation, and knows neither the host nor
//! the CPU except through the traits of [`machine`]. The same code therefore runs
//! in the core image, where `blanket-hal` implements those traits, and in host
//! tests, where fakes do.
//!
//! | module | what it does |
//! |---|---|
//! | [`mmu`] | shadow page tables, reverse map, marks |
//! | [`trap`], [`emulate`] | exceptions, privileged instructions, page-table writes |
//! | [`hypercall`] | the Xen PV calls; [`hypercall::coverage`] says which |
//! | [`evtchn`], [`grant`] | event channels, grant table |
//! | [`time`] | pvclock, timers, run-state |
//! | [`context`] | a vCPU at work: frames, copies, kicks, the way back to the guest |
//! | `lock` | the lock of the shadow MMU, and what it costs |
//! | `reclaim` | free shadow pages that go back to a host that is short of memory |
//! | `copy` | copies for a core on a root of its own |
//! | [`state`] | a VM that stands still is written down, and taken up again |
//! | [`trace`] | records of entries and exits, while they are wanted |
//! | [`insn`], [`cpuid`] | decoders and the CPUID policy |
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub use blanket_abi::cpuid;

mod arrive;
pub mod context;
mod copy;
pub mod emulate;
pub mod evtchn;
pub mod grant;
pub mod hypercall;
mod inject;
pub mod insn;
mod lock;
pub mod machine;
pub mod mmu;
pub mod pte;
mod reclaim;
pub mod state;
pub mod time;
pub mod trace;
pub mod trap;
pub mod vcpu;
pub mod vm;

/// A number that indexes something. The core runs on 64-bit CPUs only.
#[allow(
    clippy::cast_possible_truncation,
    reason = "usize has 64 bits wherever the core runs"
)]
#[inline]
pub(crate) const fn idx(v: u64) -> usize {
    v as usize
}
