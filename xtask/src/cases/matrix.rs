//! Instances times kernels times numbers of vCPUs.

use super::{Adapter, Case, Guest, Work};
use crate::kernels::Flavour;

/// An instance of the matrix.
struct Instance {
    name: &'static str,
    adapter: Adapter,
    cpu: &'static str,
    append: &'static str,
    smp: u32,
    host: Flavour,
}

const fn instance(name: &'static str, cpu: &'static str, smp: u32, host: Flavour) -> Instance {
    Instance {
        name,
        adapter: Adapter::Module,
        cpu,
        append: "",
        smp,
        host,
    }
}

const fn inside_kvm(name: &'static str, smp: u32, host: Flavour) -> Instance {
    Instance {
        adapter: Adapter::Kvm,
        ..instance(name, "EPYC", smp, host)
    }
}

/// CPU models, one and two CPUs, and the two kernels that instances are tried with;
/// in the last two, VMs run inside KVM.
const INSTANCES: &[Instance] = &[
    instance("epyc", "EPYC,-svm", 2, Flavour::Cloud),
    instance("epyc-1cpu-6.12", "EPYC,-svm", 1, Flavour::Cloud612),
    instance("skylake", "Skylake-Server,-vmx", 2, Flavour::Cloud612),
    instance("nehalem", "Nehalem,-vmx", 1, Flavour::Cloud),
    Instance {
        append: "pti=on",
        ..instance("haswell-pti", "Haswell-noTSX,-vmx", 2, Flavour::Cloud)
    },
    instance("la57", "max,la57=on,-svm", 2, Flavour::Cloud612),
    Instance {
        // Taken off every model otherwise, see `qemu.rs`.
        cpu: "EPYC,+smap",
        ..inside_kvm("kvm", 2, Flavour::Cloud)
    },
    inside_kvm("kvm-1cpu-6.12", 1, Flavour::Cloud612),
];
const KERNELS: &[Flavour] = &[
    Flavour::Cloud,
    Flavour::Generic,
    Flavour::Rt,
    Flavour::Cloud612,
];
const VCPUS: &[u32] = &[1, 2, 4];

/// Every instance with two guest kernels; vCPU counts rotate so that each pair of (kernel,
/// vCPUs) occurs. With `--long`, all three in full.
pub fn matrix() -> Vec<Case> {
    let mut cases = Vec::new();
    for (row, instance) in INSTANCES.iter().enumerate() {
        for (column, kernel) in KERNELS.iter().enumerate() {
            let sampled = (row + column) % 2 == 0;
            for (turn, vcpus) in VCPUS.iter().enumerate() {
                cases.push(Case {
                    name: format!("matrix-{}-{kernel}-{vcpus}vcpu", instance.name),
                    long: !sampled || (row + column) % VCPUS.len() != turn,
                    adapter: instance.adapter,
                    cpu: instance.cpu,
                    append: instance.append,
                    smp: instance.smp,
                    host: instance.host,
                    work: Work::Guest(Guest {
                        kernel: *kernel,
                        vcpus: *vcpus,
                        ..Guest::default()
                    }),
                    ..Case::default()
                });
            }
        }
    }
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    /// In the default run, every instance has two kernels and two numbers of vCPUs, and every
    /// kernel runs with every number of vCPUs.
    #[test]
    fn sample_has_every_kernel_with_every_number_of_vcpus() {
        let (mut guests, mut kernels, mut vcpus) =
            (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        for case in matrix().into_iter().filter(|case| !case.long) {
            let Work::Guest(guest) = &case.work else {
                unreachable!("matrix of guests")
            };
            let instance = format!("{}{}{}", case.cpu, case.smp, case.host);
            kernels.insert((instance.clone(), guest.kernel.to_string()));
            vcpus.insert((instance, guest.vcpus));
            guests.insert((guest.kernel.to_string(), guest.vcpus));
        }
        assert_eq!(guests.len(), KERNELS.len() * VCPUS.len());
        assert_eq!(kernels.len(), 2 * INSTANCES.len());
        assert_eq!(vcpus.len(), 2 * INSTANCES.len());
    }
}
