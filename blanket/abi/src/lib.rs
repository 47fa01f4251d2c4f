//! Blanket's interfaces as data.
//!
//! Three contracts meet in this crate and nothing else lives here: the Xen PV
//! ABI that stock guest kernels speak ([`xen`]), the device ABI between
//! `blanket.ko` and its two callers, the VMM above and the core beside it
//! ([`device`]), and the layout of the address range that the Xen ABI reserves
//! for the hypervisor ([`layout`]). There is no logic and no `unsafe`.
#![no_std]
#![forbid(unsafe_code)]

pub mod addr;
pub mod device;
pub mod layout;
pub mod xen;

pub use addr::{Gfn, Hfn, PAGE_SHIFT, PAGE_SIZE, Va};
