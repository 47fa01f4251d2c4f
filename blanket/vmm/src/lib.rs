//! Blanket's user-space side: from a kernel file to a running VM.
//!
//! [`kernel`] reads the kernel, [`builder`] makes a domain of it, [`device`] gives
//! the domain to the module or [`kvm`] to a KVM VM, [`vm`] runs its vCPUs, [`console`] and [`xenstore`]
//! serve it, and [`instance`] ties them together over reboots. Guest memory is
//! shared with a hostile writer: it is read once, checked, and never trusted.

pub mod balloon;
pub mod boot;
pub mod builder;
pub mod console;
pub mod core_image;
pub mod cpu;
pub mod device;
pub mod devices;
pub mod entropy;
pub mod generation;
mod hub;
pub mod hypervisor;
pub mod instance;
pub mod kernel;
pub mod kvm;
pub mod migration;
mod pressure;
pub mod ring;
pub mod saved;
mod shared_page;
pub mod trace;
pub mod vm;
mod watch;
pub mod xenstore;

pub use blanket_devices::thread;

use blanket_devices::sync;

#[cfg(any(test, feature = "testing"))]
pub mod testing;
