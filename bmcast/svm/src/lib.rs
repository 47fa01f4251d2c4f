//! AMD's secure virtual machine as BMcast uses it: the [`Vmcb`], identity maps for nested paging
//! and for the VMM itself ([`paging`]), and what an exit without decode assists needs: the guest's own page
//! tables ([`walk()`]) and its instruction ([`emulate`]).
//!
//! Nothing here touches the CPU: all of it runs under host tests. Facts are from AMD's Architecture
//! Programmer's Manual, volume 2 ("APM"), chapter 15 and appendices B and C.
#![no_std]

mod emulate;
pub mod paging;
mod permissions;
mod vmcb;
mod walk;

pub use emulate::{Bus, Cannot, emulate};
pub use permissions::{IO_PAGES, MSR_PAGES, allow_msr, trap_msr, trap_port};
pub use vmcb::{
    Control, DescriptorTable, Intercepts1, Intercepts2, Save, Segment, Vmcb, exit, io_exit::IoExit,
};
pub use walk::{Mode, walk};

/// General registers by their number in the encoding of instructions: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8
/// to R15.
pub type Registers = [u64; 16];
