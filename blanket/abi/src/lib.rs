//! Blanket's interfaces as data.
//!
//! Contracts meet in this crate and nothing else lives here: the Xen PV ABI that
//! stock guest kernels speak ([`xen`]) and the CPU that they see ([`cpuid`]), the
//! device ABI between `blanket.ko` and its two callers, the VMM above and the core
//! beside it ([`device`]), what takes its place inside KVM ([`kvm`]), and the
//! layout of the address range that the Xen ABI reserves for the hypervisor
//! ([`layout`]), the core's records of what it does ([`trace`]), and of a VM that stands
//! still ([`state`]). There is no `unsafe`.
#![no_std]
#![forbid(unsafe_code)]

pub mod addr;
pub mod cpuid;
pub mod device;
pub mod kvm;
pub mod layout;
pub mod state;
pub mod trace;
pub mod xen;

pub use addr::{Gfn, Hfn, PAGE_SHIFT, PAGE_SIZE, Va};
