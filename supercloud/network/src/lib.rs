//! A user's virtual network over his nodes.
//!
//! The nodes are joined by WireGuard. A network is a bridge on each node that has to do with it, and a
//! VXLAN device that joins these bridges inside of WireGuard. Nothing learns where a VM is: every entry of
//! every table is written by this crate from the caller's records ([`Wanted`]), so a VM that moves keeps its
//! MAC, its address and its connections as soon as the entries say where it is now ([`Fabric::moved`]).
//!
//! [`Fabric::apply`] makes the kernel be as wanted: it looks what there is, works out the difference
//! (`plan.rs`, which knows no kernel and is tested without one), and does it. Doing it again does nothing; what
//! somebody else changed is mended; what is not ours (see [`names`]) is not touched.
//!
//! `docs/virtual-network.md` has the picture, and a packet's way.

mod check;
mod dnsmasq;
mod error;
mod fabric;
mod firewall;
mod kernel;
mod key;
pub mod names;
mod plan;
mod state;
mod target;
mod wanted;

pub use error::{Error, Invalid};
pub use fabric::{Fabric, Options, Report};
pub use key::{PrivateKey, PublicKey};
pub use wanted::{Mac, Network, NodeNumber, NodePeer, Port, Protocol, Published, Vni, Wanted};
