//! How a running VM moves from one host to another.
//!
//! Three parts that know nothing of VMs: [`precopy`] decides when memory has been sent
//! often enough, [`handover`] is the protocol by which exactly one of the two sides comes
//! out with the VM, and [`link`] is the connection between them, or several ([`lanes`]). What
//! is sent is a saved VM (`blanket-snapshot`) of which pages come more than once.
//!
//! [`clock`] is how its guest's clock goes on although the hosts' clocks differ.
//!
//! Where the VM is given with a part of its memory, [`pull`] is how the rest follows.
//!
//! The protocol is described in `docs/migration.md` and checked by a model of every loss
//! and crash (`tests/model.rs`), which runs the very functions of [`handover`].

pub mod clock;
pub mod handover;
pub mod lanes;
pub mod link;
pub mod message;
pub mod pages;
pub mod precopy;
pub mod pull;

#[cfg(any(test, feature = "testing"))]
pub mod testing;
