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

#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use guest::{Guest, GuestMemory, Listener};
pub use kick::Kick;
pub use limit::{Limiter, Limits};
pub use page::Page;

/// Bytes of a thread's stack; Rust's own default is a huge page on some hosts.
const STACK: usize = 512 << 10;

/// A thread to be, with a name (15 bytes of it are shown) and a small stack.
fn thread(name: impl Into<String>) -> std::thread::Builder {
    std::thread::Builder::new()
        .name(name.into())
        .stack_size(STACK)
}
