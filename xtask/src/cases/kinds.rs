//! Kinds of cases: what those of one kind have in common.

use super::{Adapter, Case, Companion, Expect, Guest, Work};
use crate::debian::Variant;
use crate::everywhere::Event;
use crate::kernels::Flavour;
use crate::qemu::Hardware;
use crate::scripts::HOSTILE;

/// Walks of all roots of VMs that run.
pub(super) fn audit(name: &str) -> Case {
    Case {
        name: name.into(),
        timeout: 900,
        work: Work::Instance {
            script: include_str!("../../../tests/lab-scripts/audit.sh"),
            guests: vec![Flavour::Cloud],
        },
        expect: vec![Expect::Line("no entry maps what it must not")],
        ..Case::default()
    }
}

/// Something bad happens to VMMs or to the instance; the script's last word is `...-OK`.
pub(super) fn hard_times(name: &str, timeout: u64, script: &'static str) -> Case {
    Case {
        name: name.into(),
        timeout,
        work: Work::Instance {
            script,
            guests: vec![Flavour::Cloud],
        },
        expect: vec![Expect::Line("-OK")],
        ..Case::default()
    }
}

/// A VM with fio, and a machine with small file systems and block devices.
pub(super) fn disks(name: &str, timeout: u64, script: &'static str) -> Case {
    Case {
        fio: true,
        drivers: &["xen_blkfront"],
        // zram's blocks are pages.
        modules: &["loop", "zram", "lzo_rle", "lz4"],
        ..hard_times(name, timeout, script)
    }
}

pub(super) fn density(name: &str, script: &'static str, timeout: u64) -> Case {
    Case {
        memory: "6G",
        ..hard_times(name, timeout, script)
    }
}

/// Counters for a collector, and the trace.
pub(super) fn observe(name: &str) -> Case {
    Case {
        name: name.into(),
        timeout: 420,
        work: Work::Instance {
            script: include_str!("../../../tests/lab-scripts/observe.sh"),
            guests: vec![Flavour::Cloud],
        },
        expect: vec![Expect::Line("OBSERVE-OK")],
        ..Case::default()
    }
}

/// Programs that hold the device and mean ill, beside a VM that works.
pub(super) fn ioctl_fuzz(name: &str, script: &'static str) -> Case {
    Case {
        name: name.into(),
        timeout: 600,
        work: Work::Instance {
            script,
            guests: vec![Flavour::Cloud],
        },
        expect: vec![Expect::Line("IOCTL-FUZZ-OK")],
        ..Case::default()
    }
}

/// A VM with a disk and a network that is saved and goes on.
pub(super) fn save(name: &str, script: &'static str) -> Case {
    Case {
        drivers: &["xen_blkfront", "xen_netfront"],
        modules: &["tun"],
        ..hard_times(name, 900, script)
    }
}

/// A VM that moves while it runs.
pub(super) fn migrate(name: &str, script: &'static str) -> Case {
    Case {
        drivers: &["xen_blkfront", "xen_netfront"],
        modules: &["tun", "bridge"],
        ..hard_times(name, 900, script)
    }
}

/// Two VMs and their networks.
pub(super) fn network(name: &str, script: &'static str, timeout: u64) -> Case {
    Case {
        net_check: true,
        drivers: &["xen_netfront"],
        network: true,
        modules: &["tun", "bridge"],
        ..hard_times(name, timeout, script)
    }
    .expecting("NETWORK-OK")
}

/// A case between two instances as of two clouds, of which only the second one has
/// virtualization and whose devices differ, with the command of nodes.
pub(super) fn two_clouds(case: Case) -> Case {
    Case {
        host: Flavour::Generic,
        drivers: &["xen_blkfront", "xen_netfront"],
        supercloud: true,
        companions: &[Companion {
            cpu: "EPYC",
            hardware: Hardware::NvmeE1000e,
        }],
        ..case
    }
}

/// A network of VMs over two instances.
pub(super) fn virtual_network(name: &str, script: &'static str) -> Case {
    Case {
        fabric: true,
        memory: "1G",
        drivers: &["xen_netfront"],
        modules: FABRIC_MODULES,
        companions: &[Companion {
            cpu: "EPYC,-svm",
            hardware: Hardware::Virtio,
        }],
        ..hard_times(name, 900, script)
    }
}

/// What a kernel loads by itself where it can: devices, and what the rules are made of.
pub const FABRIC_MODULES: &[&str] = &[
    // What libcrc32c, which connection tracking wants, looks for without depending on it.
    "crc32c_generic",
    "tun",
    "bridge",
    "veth",
    "vxlan",
    "wireguard",
    "nf_tables",
    "nft_chain_nat",
    "nft_ct",
    "nft_nat",
    "nft_masq",
    "nft_fib_inet",
    "nft_objref",
    "nft_limit",
    "nft_connlimit",
    "nft_meta_bridge",
];

/// A whole Debian as a VM, in an instance that has its image.
pub(super) fn debian(name: &str, image: Variant, timeout: u64, script: &'static str) -> Case {
    Case {
        image: Some(image),
        network: true,
        memory: "3G",
        modules: &["tun"],
        work: Work::Instance {
            script,
            guests: vec![],
        },
        ..hard_times(name, timeout, script)
    }
    .expecting("DEBIAN-OK")
}

/// A core that fails on purpose, beside a VM that works.
pub(super) fn core_failure(name: &str) -> Case {
    Case {
        name: name.into(),
        timeout: 600,
        work: Work::Instance {
            script: include_str!("../../../tests/lab-scripts/core-failure.sh"),
            guests: vec![Flavour::Cloud],
        },
        expect: vec![Expect::Line("CORE-FAILURE-OK")],
        ..Case::default()
    }
}

pub(super) const NMIS: &str = concat!(
    "EVENT=NMI HANDLER=exc_nmi\n",
    include_str!("../../../tests/lab-scripts/everywhere.sh")
);
const MACHINE_CHECKS: &str = concat!(
    // The CPU has Meltdown.
    "export BLANKET_ISOLATE=${BLANKET_ISOLATE:-off}\n",
    "EVENT=MCE HANDLER=exc_machine_check\n",
    include_str!("../../../tests/lab-scripts/everywhere.sh")
);

/// Events at each instruction of the world switch.
pub(super) fn everywhere(name: &str, event: Event, script: &'static str) -> Case {
    Case {
        name: name.into(),
        inject: Some(event),
        // One CPU, which the debugger steps.
        smp: 1,
        timeout: 600,
        work: Work::Instance {
            script,
            guests: vec![Flavour::Cloud],
        },
        ..Case::default()
    }
}

/// Linux survives these on Intel's models only, and the cloud kernel was built without a
/// handler for any.
pub(super) fn machine_checks() -> Case {
    Case {
        cpu: "Skylake-Server,-vmx",
        host: Flavour::Generic,
        ..everywhere("mce-everywhere", Event::MachineCheck, MACHINE_CHECKS)
    }
}

/// A kernel that attacks the core, beside a VM that works.
pub(super) fn hostile(name: &str) -> Case {
    hard_times(name, 600, HOSTILE)
}

/// A kernel that attacks its devices' backends, beside a VM that works.
pub(super) fn hostile_devices(name: &str, timeout: u64, script: &'static str) -> Case {
    Case {
        modules: &["tun"],
        ..hard_times(name, timeout, script)
    }
}

impl Case {
    /// With one more claim about its output.
    pub(super) fn expecting(mut self, line: &'static str) -> Self {
        self.expect.push(Expect::Line(line));
        self
    }
}

/// The same case, with `--long` only.
pub(super) fn long(case: Case) -> Case {
    Case { long: true, ..case }
}

/// The same case with VMs that are isolated from their core.
pub(super) fn isolated(case: Case) -> Case {
    Case {
        name: format!("{}-isolated", case.name),
        isolate: true,
        ..case
    }
}

/// The same case inside the instance's KVM.
pub(super) fn kvm(case: Case) -> Case {
    Case {
        cpu: "EPYC",
        adapter: Adapter::Kvm,
        ..case
    }
}

pub(super) fn guest(name: &str, timeout: u64, vcpus: u32, script: &'static str) -> Case {
    Case {
        name: name.into(),
        timeout,
        work: Work::Guest(Guest {
            vcpus,
            script,
            ..Guest::default()
        }),
        ..Case::default()
    }
}

/// The host takes a VM's memory: it moves and swaps it.
pub(super) fn memory_taken(name: &str, script: &'static str) -> Case {
    Case {
        name: name.into(),
        // zram's own, and what it compresses with: 6.1's default, then 6.12's.
        modules: &["zram", "lzo_rle", "lz4"],
        timeout: 900,
        work: Work::Instance {
            script,
            guests: vec![Flavour::Cloud],
        },
        expect: vec![Expect::Line("taken back ")],
        ..Case::default()
    }
}

pub(super) fn memory_moves(name: &str) -> Case {
    Case {
        name: name.into(),
        timeout: 900,
        work: Work::Instance {
            script: include_str!("../../../tests/lab-scripts/memory-moves.sh"),
            guests: vec![Flavour::Cloud],
        },
        ..Case::default()
    }
}

pub(super) fn memory(name: &str, memory: &'static str) -> Case {
    Case {
        name: name.into(),
        work: Work::Guest(Guest {
            memory,
            ..Guest::default()
        }),
        ..Case::default()
    }
}
