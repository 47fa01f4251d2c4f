//! The whole-system cases of `cargo xtask test`: a table of instances (L1) and
//! the VMs (L2) in them. Adding a case is adding an entry to [`cases`].

mod case;
mod kinds;
mod matrix;

use crate::debian::Variant;
use crate::everywhere::Event;
use crate::kernels::Flavour;
use crate::qemu::Hardware;
use crate::scripts::{
    BALLOON, CONFINED, DEBIAN, DEBIAN_LOAD, DEBIAN_MOVES, DEBIAN_POSTGRES, DEMO_NODES, DENSITY_8,
    DENSITY_40, DISK_FULL, DISKS, HOST_CPUS, HOSTILE_DEVICES, HOSTILE_DEVICES_LONG, HOSTILE_MOVES,
    HOSTILE_SOAK, KEXEC_CRASH, KEXEC_NOW, KILL_VMM, KILL_VMM_LONG, LOCKED_DOWN, MEMORY_GROWS,
    MEMORY_SHORT, MEMORY_SHORT_INSTANCE, MERGED_10, MIGRATE, MIGRATE_BETWEEN, MIGRATE_FAILURES,
    MIGRATE_FAILURES_LONG, MIGRATE_LESSER_CPU, MIGRATE_OTHER_CPU, MIGRATE_POST_COPY,
    MIGRATE_POST_COPY_FAILURES, MIGRATE_POST_COPY_KVM, MIGRATE_POST_COPY_SLOW, MIGRATE_SLOW,
    NETWORK, NETWORK_4, NODES, NODES_DRAIN, NODES_NETWORK, NODES_SNAPSHOT, SAVE, SAVE_BETWEEN,
    SHADOW_RECLAIM, SIGNED_ONLY, SUSPEND, SYSTEMD_SCOPE, TAKEN_SAMPLE, TAKEN_SOAK, VIRTUAL_NETWORK,
    VMM_TRICKS, VMM_TRICKS_ALL,
};

use kinds::{
    NMIS, audit, core_failure, debian, density, disks, everywhere, guest, hard_times, hostile,
    hostile_devices, ioctl_fuzz, isolated, kvm, long, machine_checks, memory, memory_moves,
    memory_taken, migrate, network, observe, save, two_clouds, virtual_network,
};

pub use case::{Adapter, Case, Companion, Expect, Guest, Work};
pub use kinds::FABRIC_MODULES;

/// What every combination of the matrix runs: processes, memory, time, CPUs.
const BASICS: &str = include_str!("../../tests/lab-scripts/basics.sh");

/// Two thousand programs, four at a time; each must have run with its argument.
const FORK_EXEC: &str = "seq 1 2000 >/tmp/numbers && \
     xargs -n 1 -P 4 /bin/echo </tmp/numbers | sort -n | cmp - /tmp/numbers";

/// More vCPUs than CPUs. Each must do its part of each kind, with workers that are tied
/// to vCPUs and pipes from one to the next; then as the scheduler likes.
const STORM: &str = "storm --each 30 && storm --milliseconds 500";

/// Cases that are about one thing each.
fn single() -> Vec<Case> {
    vec![
        Case {
            name: "doctor".into(),
            work: Work::Instance {
                script: "blanket doctor",
                guests: vec![],
            },
            expect: vec![Expect::Line(
                "VMs under the module are not isolated from their core",
            )],
            ..Case::default()
        },
        Case {
            name: "doctor-meltdown".into(),
            cpu: "Haswell-noTSX,-vmx",
            work: Work::Instance {
                script: "blanket doctor",
                guests: vec![],
            },
            expect: vec![Expect::Line(
                "VMs under the module are isolated from their core, since the CPU has Meltdown",
            )],
            ..Case::default()
        },
        Case {
            name: "doctor-without-module".into(),
            adapter: Adapter::None,
            work: Work::Instance {
                script: "blanket doctor",
                guests: vec![],
            },
            expect: vec![
                Expect::Exit(1),
                Expect::Line("module"),
                Expect::NoLine("panicked"),
            ],
            ..Case::default()
        },
        Case {
            name: "kvm-doctor".into(),
            cpu: "EPYC,+smap",
            adapter: Adapter::None,
            work: Work::Instance {
                script: include_str!("../../tests/lab-scripts/kvm-doctor.sh"),
                guests: vec![Flavour::Cloud],
            },
            expect: vec![
                Expect::Line("a test guest ran in it; VMs run inside KVM (NX, SMEP, SMAP)"),
                Expect::Line("vm1 runs inside this machine's KVM"),
                Expect::Line("VMs inside KVM are not isolated from their core"),
            ],
            ..Case::default()
        },
        Case {
            name: "module-unloads".into(),
            work: Work::Instance {
                script: "rmmod blanket && ! test -e /dev/blanket && insmod /lab/blanket.ko && \
                         test -c /dev/blanket && rmmod blanket",
                guests: vec![],
            },
            ..Case::default()
        },
        Case {
            name: "abi-same-as-instance".into(),
            timeout: 900,
            work: Work::Instance {
                script: include_str!("../../tests/lab-scripts/compare-abi.sh"),
                guests: vec![Flavour::Cloud],
            },
            ..Case::default()
        },
        everywhere("nmi-everywhere", Event::Nmi, NMIS),
        machine_checks(),
        long(isolated(machine_checks())),
        Case {
            name: "idle-clock".into(),
            // By instructions: an emulator's own clock would count its host's load.
            icount: true,
            work: Work::Instance {
                script: include_str!("../../tests/lab-scripts/idle-clock.sh"),
                guests: vec![Flavour::Cloud],
            },
            ..Case::default()
        },
        Case {
            name: "lifecycle".into(),
            long: true,
            timeout: 1200,
            work: Work::Instance {
                script: include_str!("../../blanket/cli/tests/lifecycle.sh"),
                guests: vec![Flavour::Cloud],
            },
            ..Case::default()
        },
        Case {
            name: "failures".into(),
            work: Work::Instance {
                script: include_str!("../../tests/lab-scripts/failures.sh"),
                guests: vec![Flavour::Cloud],
            },
            expect: vec![Expect::Line("FAILURES-OK")],
            ..Case::default()
        },
        Case {
            name: "failures-no-nx".into(),
            cpu: "EPYC,-svm,-nx",
            work: Work::Instance {
                script: "! test -e /dev/blanket && dmesg | grep 'blanket: cannot run here' && \
                         blanket doctor",
                guests: vec![],
            },
            expect: vec![
                Expect::Exit(1),
                Expect::Line("cannot run here"),
                Expect::Line("lacks nx"),
            ],
            ..Case::default()
        },
        observe("observe"),
        hard_times("kill-vmm", 420, KILL_VMM),
        long(hard_times("kill-vmm-long", 5400, KILL_VMM_LONG)),
        long(kvm(hard_times("kvm-kill-vmm", 600, KILL_VMM))),
        hard_times("host-cpus", 420, HOST_CPUS),
        long(kvm(hard_times("kvm-host-cpus", 600, HOST_CPUS))),
        Case {
            host: Flavour::Generic,
            ..hard_times("suspend", 420, SUSPEND)
        },
        hard_times("balloon", 600, BALLOON),
        long(kvm(hard_times("kvm-balloon", 1800, BALLOON))),
        hard_times("memory-grows", 300, MEMORY_GROWS),
        long(Case {
            work: Work::Instance {
                script: MEMORY_GROWS,
                guests: vec![Flavour::Cloud612],
            },
            ..hard_times("memory-grows-6.12", 300, MEMORY_GROWS)
        }),
        long(kvm(hard_times("kvm-memory-grows", 900, MEMORY_GROWS))),
        hard_times("shadow-reclaim", 600, SHADOW_RECLAIM),
        long(kvm(hard_times("kvm-shadow-reclaim", 1200, SHADOW_RECLAIM))),
        Case {
            network: true,
            modules: &["tun"],
            ..hard_times("confined", 600, CONFINED)
        },
        hard_times("memory-short", 420, MEMORY_SHORT),
        long(hard_times(
            "memory-short-instance",
            900,
            MEMORY_SHORT_INSTANCE,
        )),
        Case {
            append: "module.sig_enforce=1",
            ..hard_times("signed-only", 240, SIGNED_ONLY)
        },
        kvm(Case {
            append: "module.sig_enforce=1 lockdown=confidentiality",
            ..hard_times("kvm-locked-down", 420, LOCKED_DOWN)
        }),
        density("density", DENSITY_8, 600),
        long(density("density-40", DENSITY_40, 3600)),
        long(density("memory-merged-ten", MERGED_10, 1800)).expecting("MERGED guests=10"),
        long(hard_times("kexec", 420, KEXEC_NOW)),
        Case {
            append: "crashkernel=256M",
            ..hard_times("kdump", 420, KEXEC_CRASH)
        },
        long(kvm(Case {
            append: "crashkernel=256M",
            ..hard_times("kvm-kdump", 600, KEXEC_CRASH)
        })),
        long(kvm(observe("kvm-observe"))),
        Case {
            name: "two-guests".into(),
            timeout: 240,
            work: Work::Instance {
                script: include_str!("../../tests/lab-scripts/two-guests.sh"),
                guests: vec![Flavour::Cloud, Flavour::Generic],
            },
            ..Case::default()
        },
        save("save", SAVE),
        long(Case {
            cpu: "EPYC",
            ..save("save-between-hosts", SAVE_BETWEEN)
        }),
        migrate("migrate", MIGRATE),
        long(Case {
            cpu: "EPYC",
            ..migrate("migrate-between-hosts", MIGRATE_BETWEEN)
        }),
        long(two_clouds(virtual_network("demo-nodes", DEMO_NODES))).expecting("DEMO-NODES-OK"),
        Case {
            memory: "1G",
            ..two_clouds(migrate("nodes", NODES))
        }
        .expecting("NODES-OK"),
        long(Case {
            memory: "3G",
            timeout: 1800,
            ..two_clouds(migrate("nodes-drain", NODES_DRAIN))
        })
        .expecting("NODES-DRAIN-OK"),
        Case {
            cpu: "Skylake-Server",
            host: Flavour::Generic,
            memory: "1G",
            companions: &[Companion {
                cpu: "Nehalem",
                hardware: Hardware::Virtio,
            }],
            ..migrate("migrate-other-cpu", MIGRATE_OTHER_CPU)
        },
        Case {
            cpu: "EPYC",
            host: Flavour::Generic,
            memory: "1G",
            supercloud: true,
            companions: &[Companion {
                cpu: "EPYC,-svm,-avx,-avx2,-fma,-f16c",
                hardware: Hardware::Virtio,
            }],
            ..migrate("migrate-lesser-cpu", MIGRATE_LESSER_CPU)
        }
        .expecting("LESSER-CPU-OK"),
        migrate("migrate-post-copy", MIGRATE_POST_COPY),
        long(Case {
            cpu: "EPYC",
            ..migrate("migrate-post-copy-kvm", MIGRATE_POST_COPY_KVM)
        }),
        long(migrate(
            "migrate-post-copy-failures",
            MIGRATE_POST_COPY_FAILURES,
        )),
        long(hard_times(
            "migrate-post-copy-slow",
            600,
            MIGRATE_POST_COPY_SLOW,
        )),
        long(hard_times("migrate-slow", 600, MIGRATE_SLOW)),
        migrate("migrate-failures", MIGRATE_FAILURES),
        long(Case {
            timeout: 1800,
            ..migrate("migrate-failures-long", MIGRATE_FAILURES_LONG)
        }),
        network("network", NETWORK, 900),
        long(kvm(network("kvm-network", NETWORK_4, 900))),
        long(virtual_network("virtual-network", VIRTUAL_NETWORK)).expecting("VIRTUAL-NETWORK-OK"),
        Case {
            supercloud: true,
            ..virtual_network("nodes-network", NODES_NETWORK)
        }
        .expecting("NODES-NETWORK-OK"),
        two_clouds(virtual_network("nodes-snapshot", NODES_SNAPSHOT))
            .expecting("NODES-SNAPSHOT-OK"),
        debian("debian", Variant::Base, 2700, DEBIAN),
        long(debian("debian-load", Variant::Full, 5400, DEBIAN_LOAD)),
        long(debian(
            "debian-postgres",
            Variant::Full,
            10_800,
            DEBIAN_POSTGRES,
        )),
        long(Case {
            host: Flavour::Generic,
            modules: &["tun", "bridge"],
            companions: &[
                Companion {
                    cpu: "EPYC",
                    hardware: Hardware::NvmeE1000e,
                },
                Companion {
                    cpu: "EPYC,-svm",
                    hardware: Hardware::Virtio,
                },
            ],
            ..debian("debian-moves", Variant::Full, 7200, DEBIAN_MOVES)
        }),
        long(kvm(debian("kvm-debian", Variant::Base, 3600, DEBIAN))),
        Case {
            long: true,
            image: Some(Variant::Base),
            whole_system: true,
            ..hard_times("systemd-scope", 2400, SYSTEMD_SCOPE)
        }
        .expecting("SYSTEMD-SCOPE-OK"),
        guest("fork-exec", 600, 2, FORK_EXEC),
        guest("stress", 600, 2, "N=10 sh /tests/stress.sh"),
        Case {
            stress_ng: true,
            ..guest("stress-ng", 900, 2, "N=20 sh /tests/stress-ng.sh")
        },
        long(guest("stress-long", 3600, 4, "sh /tests/stress.sh")),
        Case {
            name: "stress-ng-long".into(),
            long: true,
            stress_ng: true,
            timeout: 7200,
            // Four workers of each stressor; those of `clone` want 130 MiB each.
            work: Work::Guest(Guest {
                vcpus: 4,
                memory: "1G",
                script: "sh /tests/stress-ng.sh all",
                ..Guest::default()
            }),
            ..Case::default()
        },
        disks("disks", 600, DISKS),
        disks("disk-full", 420, DISK_FULL),
        guest("storm", 300, 4, STORM),
        long(kvm(guest("kvm-storm", 600, 4, STORM))),
        guest("hotplug", 300, 4, "abi-test hotplug"),
        long(kvm(guest("kvm-stress", 900, 2, "N=5 sh /tests/stress.sh"))),
        long(kvm(guest(
            "kvm-stress-4vcpu",
            1800,
            4,
            "N=20 sh /tests/stress.sh",
        ))),
        long(kvm(guest("kvm-hotplug", 300, 4, "abi-test hotplug"))),
        kvm(Case {
            name: "kvm-abi-same-as-instance".into(),
            long: true,
            timeout: 900,
            work: Work::Instance {
                script: include_str!("../../tests/lab-scripts/compare-abi.sh"),
                guests: vec![Flavour::Cloud],
            },
            ..Case::default()
        }),
        core_failure("core-failure"),
        long(kvm(core_failure("kvm-core-failure"))),
        ioctl_fuzz(
            "ioctl-fuzz",
            include_str!("../../tests/lab-scripts/ioctl-fuzz.sh"),
        ),
        Case {
            long: true,
            timeout: 7200,
            ..ioctl_fuzz(
                "ioctl-fuzz-long",
                concat!(
                    "STEPS=200000 FIRST=100\n",
                    include_str!("../../tests/lab-scripts/ioctl-fuzz.sh")
                ),
            )
        },
        hard_times("vmm-tricks", 900, VMM_TRICKS),
        long(hard_times("vmm-tricks-all", 1800, VMM_TRICKS_ALL)),
        audit("audit"),
        long(kvm(audit("kvm-audit"))),
        isolated(audit("audit")).expecting("isolated: the guest's roots show"),
        long(isolated(kvm(audit("kvm-audit")))).expecting("isolated: the guest's roots show"),
        long(isolated(hostile("hostile"))),
        hostile("hostile"),
        long(kvm(hostile("kvm-hostile"))),
        Case {
            long: true,
            expect: vec![Expect::Line("taken back ")],
            ..memory_moves("memory-moves")
        },
        long(hard_times("hostile-memory-moves", 1200, HOSTILE_MOVES)),
        hostile_devices("hostile-devices", 600, HOSTILE_DEVICES),
        long(hostile_devices(
            "hostile-devices-long",
            4 * 3600,
            HOSTILE_DEVICES_LONG,
        )),
        long(hard_times("hostile-soak", 4 * 3600, HOSTILE_SOAK)),
        memory_taken("memory-taken", TAKEN_SAMPLE),
        Case {
            long: true,
            timeout: 3600,
            ..memory_taken("memory-taken-soak", TAKEN_SOAK)
        },
        Case {
            long: true,
            host: Flavour::Cloud612,
            ..memory_taken("memory-taken-6.12", TAKEN_SAMPLE)
        },
        Case {
            name: "memory-merged".into(),
            long: true,
            timeout: 900,
            work: Work::Instance {
                script: include_str!("../../tests/lab-scripts/memory-merged.sh"),
                guests: vec![Flavour::Cloud],
            },
            expect: vec![
                Expect::Line("taken back "),
                Expect::Line("MiB saved by merging"),
            ],
            ..Case::default()
        },
        kvm(long(memory_moves("kvm-memory-moves"))),
        kvm(Case {
            name: "kvm-shadow-paging".into(),
            long: true,
            timeout: 900,
            work: Work::Instance {
                script: include_str!("../../tests/lab-scripts/kvm-shadow-paging.sh"),
                guests: vec![Flavour::Cloud],
            },
            ..Case::default()
        }),
        kvm(Case {
            name: "kvm-idle-clock".into(),
            long: true,
            icount: true,
            work: Work::Instance {
                script: include_str!("../../tests/lab-scripts/idle-clock.sh"),
                guests: vec![Flavour::Cloud],
            },
            ..Case::default()
        }),
        memory("memory-128M", "128M"),
        long(memory("memory-1G", "1G")),
        Case {
            memory: "4G",
            long: true,
            ..memory("memory-2G", "2G")
        },
        Case {
            name: "hardware-nvme-e1000e".into(),
            hardware: Hardware::NvmeE1000e,
            host: Flavour::Generic,
            ..Case::default()
        },
        Case {
            name: "hardware-vmware".into(),
            long: true,
            hardware: Hardware::Vmware,
            host: Flavour::Generic,
            ..Case::default()
        },
    ]
}

/// All cases.
pub fn cases() -> Vec<Case> {
    let mut cases = single();
    let also_in_kvm = ["two-guests", "stress-ng", "memory-128M", "memory-1G"];
    let inside: Vec<Case> = cases
        .iter()
        .filter(|case| also_in_kvm.contains(&case.name.as_str()))
        .map(|case| {
            kvm(Case {
                name: format!("kvm-{}", case.name),
                timeout: case.timeout * 2,
                // One of them in each run, the others when there is time.
                long: case.name != "two-guests",
                ..case.clone()
            })
        })
        .collect();
    cases.extend(inside);
    let matrix = matrix::matrix();
    // The hosts that entries differ by: page-table isolation, five levels, KVM; and the
    // program that looks closest.
    let also_isolated = [
        "matrix-epyc-cloud-1vcpu",
        "matrix-haswell-pti-generic-2vcpu",
        "matrix-la57-cloud-4vcpu",
        "matrix-kvm-cloud-1vcpu",
        "abi-same-as-instance",
        "kvm-abi-same-as-instance",
    ];
    let chosen: Vec<Case> = cases
        .iter()
        .chain(&matrix)
        .filter(|case| also_isolated.contains(&case.name.as_str()))
        .map(|case| Case {
            long: case.name.contains("abi"),
            timeout: case.timeout * 2,
            ..isolated(case.clone())
        })
        .collect();
    cases.extend(chosen);
    cases.extend(matrix);
    cases
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique() {
        let cases = cases();
        let names: BTreeSet<&String> = cases.iter().map(|case| &case.name).collect();
        assert_eq!(names.len(), cases.len());
    }
}
