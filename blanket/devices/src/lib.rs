//! Backends of the Xen PV devices that a VM has, and what they stand on: the guest's
//! grants ([`grant`]), rings in memory that it grants ([`ring`]), and the bus on which
//! both sides find each other through the xenstore ([`bus`]).
//!
//! A guest is a hostile frontend: what lies in shared memory is copied once and then
//! checked, all that it counts is bounded, and a frontend that breaks the rules has its
//! device closed, which harms nobody else.

pub mod block;
pub mod bus;
pub mod grant;
mod guest;
mod kick;
mod limit;
pub mod net;
mod page;
pub mod ring;
mod running;
pub mod sync;
pub mod thread;
mod written;

#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use guest::{Guest, GuestMemory, Listener};
pub use kick::Kick;
pub use limit::{Limiter, Limits};
pub use page::Page;
