//! All unsafe code of the core: entry assembly, windows onto memory, CPU
//! registers, and the way to the host. The logic above it is `blanket-core`.
//!
//! The crate is empty on targets that have an operating system.
#![no_std]
#![cfg(target_os = "none")]
#![allow(
    clippy::cast_possible_truncation,
    reason = "only u64 to usize, on a 64-bit target; other casts name their reason"
)]

mod cpu;
mod entry;
mod host;
mod kvm;
mod machine;
mod module;
mod report;
mod start;

pub use machine::Hal;
