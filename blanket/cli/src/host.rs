//! Which hypervisor runs a VM: Blanket's module, or this machine's KVM.

use std::sync::Arc;

use anyhow::{Result, anyhow};
use blanket_vmm::device::{Device, Error as DeviceError};
use blanket_vmm::hypervisor::Hypervisor;
use blanket_vmm::kvm;

use crate::args::Host;
use crate::{doctor, exit};

/// Opens what the user chose, or what works: KVM where a test guest really runs in
/// it, since it needs no module and shields the host from the core; else the module.
pub fn open(choice: Host) -> Result<Arc<dyn Hypervisor>> {
    match choice {
        Host::Kvm => kvm::probe().map(shared).map_err(|error| kvm_hint(&error)),
        Host::Module => Device::open().map(shared).map_err(module_hint),
        Host::Auto => {
            let without_kvm = match kvm::probe() {
                Ok(kvm) => return Ok(shared(kvm)),
                Err(error) => error,
            };
            tracing::info!("not inside KVM: {without_kvm}");
            Device::open().map(shared).map_err(|error| {
                if matches!(without_kvm, kvm::Error::NoDevice) {
                    return module_hint(error);
                }
                // There is a KVM: whoever reads this may have expected it.
                let next = module_next(&error);
                let error = anyhow!("{error}; and {without_kvm}");
                let mend = kvm::mend(&without_kvm);
                let both: Vec<String> = mend.map(str::to_owned).into_iter().chain(next).collect();
                exit::hint(&error, both.join("; or: "))
            })
        }
    }
}

/// What a VM runs on, by its hypervisor's name.
pub fn sentence(name: &str) -> &'static str {
    if name == "kvm" {
        "inside this machine's KVM"
    } else {
        "under Blanket's module"
    }
}

fn shared(hypervisor: impl Hypervisor + 'static) -> Arc<dyn Hypervisor> {
    Arc::new(hypervisor)
}

/// Which of not installed, not loaded, no permission holds, and what to do.
pub fn module_hint(error: DeviceError) -> anyhow::Error {
    let next = module_next(&error);
    let error = anyhow::Error::new(error);
    match next {
        Some(next) => exit::hint(&error, next),
        None => error,
    }
}

fn module_next(error: &DeviceError) -> Option<String> {
    match error {
        DeviceError::NoDevice(_) => doctor::module_hint(),
        DeviceError::Permission(_) => Some(doctor::PERMISSION.into()),
        DeviceError::Version { .. } => Some(
            "install the blanket and blanket-dkms packages of one release, then: \
             sudo rmmod blanket && sudo modprobe blanket"
                .into(),
        ),
        DeviceError::Quota => {
            Some("end a VM, or as root: echo N >/sys/module/blanket/parameters/max_vms".into())
        }
        _ => Some("`blanket doctor` looks for the cause".into()),
    }
}

fn kvm_hint(error: &kvm::Error) -> anyhow::Error {
    let next = kvm::mend(error).unwrap_or("leave out --host kvm, so that the module is used");
    exit::hint(&anyhow!("{error}"), next.to_owned())
}
