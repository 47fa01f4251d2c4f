//! The logic of Blanket's core.
#![no_std]
#![forbid(unsafe_code)]

pub mod cpuid;
pub mod evtchn;
pub mod insn;
