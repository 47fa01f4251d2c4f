//! A VM as the backends of its devices see it.

use std::sync::Arc;

use blanket_abi::Gfn;
use blanket_devices::grant::Grants;
use blanket_devices::{Guest, Listener};
use blanket_xenstore::{ConnId, Store};
use vm_memory::GuestMemoryError;

use crate::builder::Domain;
use crate::hypervisor::Machine;
use crate::vm::Ports;
use crate::xenstore::Xenstore;

/// What [`blanket_devices`] needs of a VM.
pub(crate) struct Hub {
    grants: Arc<Grants>,
    machine: Arc<dyn Machine>,
    ports: Arc<Ports>,
    xenstore: Arc<Xenstore>,
    vcpus: u32,
}

impl Hub {
    pub(crate) fn new(
        domain: &Domain,
        machine: Arc<dyn Machine>,
        ports: Arc<Ports>,
        xenstore: Arc<Xenstore>,
        vcpus: u32,
    ) -> Result<Self, GuestMemoryError> {
        let boot = &domain.boot;
        let grants = Grants::new(
            &domain.memory,
            boot.ram_frames,
            Gfn(boot.grant_base),
            boot.grant_frames,
        )?;
        Ok(Self {
            grants: Arc::new(grants),
            machine,
            ports,
            xenstore,
            vcpus,
        })
    }
}

impl Guest for Hub {
    fn grants(&self) -> &Arc<Grants> {
        &self.grants
    }

    fn raise(&self, port: u32) {
        if let Err(error) = self.machine.raise(port) {
            tracing::debug!(port, %error, "the guest is not notified");
        }
    }

    fn listen(&self, port: u32, listener: Option<Arc<dyn Listener>>) {
        // The ports of start_info are not the guest's to give to a device.
        if port > crate::builder::CONSOLE_PORT {
            self.ports.set(port, listener);
        }
    }

    fn store(&self, act: &mut dyn FnMut(&mut Store, ConnId)) {
        self.xenstore.with_store(act);
    }

    fn vcpus(&self) -> u32 {
        self.vcpus
    }
}
