//! What a backend needs of the VM that it serves.

use std::sync::Arc;

use blanket_xenstore::{ConnId, Store};
use vm_memory::GuestMemoryMmap;

use crate::grant::Grants;

/// Memory of a VM, shared with the guest.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Told when the guest notifies a port.
pub trait Listener: Send + Sync {
    /// Called by a vCPU's thread: must not wait.
    fn notified(&self);
}

/// The consumer's side of a VM.
pub trait Guest: Send + Sync {
    /// The pages that the guest grants.
    fn grants(&self) -> &Arc<Grants>;

    /// Notifies the guest on an event channel port that it allocated for its backend.
    /// Nothing happens for one that it did not.
    fn raise(&self, port: u32);

    /// Sets who is told when the guest notifies a port; nobody with `None`.
    fn listen(&self, port: u32, listener: Option<Arc<dyn Listener>>);

    /// Uses the xenstore as domain 0. The guest is told of what changes afterwards.
    fn store(&self, act: &mut dyn FnMut(&mut Store, ConnId));

    /// vCPUs of the VM.
    fn vcpus(&self) -> u32;
}
