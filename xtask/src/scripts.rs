//! What instances run in the cases that are scripts with settings.

/// A script behind what such scripts share.
macro_rules! with_common {
    ($script:literal) => {
        with_common!("", $script)
    };
    ($settings:literal, $($script:literal),+) => {
        concat!(
            "cat >/tmp/tick.sh <<'S'\n",
            include_str!("../../tests/lab-scripts/tick.sh"),
            "S\n",
            include_str!("../../tests/lab-scripts/common.sh"),
            $settings,
            $(include_str!(concat!("../../tests/lab-scripts/", $script))),+
        )
    };
}

/// Such a script for the first of two instances.
macro_rules! with_other {
    ($script:literal) => {
        with_common!("", "two-instances.sh", $script)
    };
}

/// A script for nodes whose VMs have their addresses from a network of the nodes' own.
macro_rules! with_lease {
    ($script:literal) => {
        concat!(
            "cat >/tmp/lease.sh <<'S'\n",
            include_str!("../../tests/lab-scripts/lease.sh"),
            "S\n",
            with_other!($script)
        )
    };
}

/// What the guests of these scripts do.
pub const TICK: &str = include_str!("../../tests/lab-scripts/tick.sh");

pub const KILL_VMM: &str = with_common!("kill-vmm.sh");
pub const KILL_VMM_LONG: &str = with_common!("ROUNDS=40 SEED=2\n", "kill-vmm.sh");
pub const HOST_CPUS: &str = with_common!("host-cpus.sh");
pub const SUSPEND: &str = with_common!("suspend.sh");
pub const MEMORY_SHORT: &str = with_common!("memory-short.sh");
pub const CONFINED: &str = with_common!("confined.sh");
pub const SYSTEMD_SCOPE: &str = with_common!("systemd-scope.sh");
pub const MEMORY_SHORT_INSTANCE: &str = with_common!("WHOLE=yes\n", "memory-short.sh");

pub const HOSTILE: &str = with_common!("hostile.sh");
pub const HOSTILE_SOAK: &str = with_common!("SEEDS=2400 DEADLY=100\n", "hostile.sh");
pub const HOSTILE_MOVES: &str = with_common!(
    "(while sleep 0.2; do echo 1 >/proc/sys/vm/compact_memory; done) &\n",
    "hostile.sh"
);

pub const SAVE: &str = with_common!("save.sh");
pub const SAVE_BETWEEN: &str = with_common!("HOSTS='kvm module kvm'\n", "save.sh");

pub const MIGRATE: &str = with_common!("HOSTS='module module module'\n", "migrate.sh");
pub const MIGRATE_BETWEEN: &str = with_common!("HOSTS='kvm module kvm module'\n", "migrate.sh");

pub const MIGRATE_POST_COPY: &str = with_common!("HOSTS='module module'\n", "migrate-post-copy.sh");
pub const MIGRATE_POST_COPY_KVM: &str =
    with_common!("HOSTS='kvm module kvm'\n", "migrate-post-copy.sh");

pub const MIGRATE_POST_COPY_FAILURES: &str = with_common!("migrate-post-copy-failures.sh");

pub const MIGRATE_FAILURES: &str = with_common!(
    "WALK='ready:source go:cut runs:destination'\n",
    "migrate-failures.sh"
);
pub const MIGRATE_FAILURES_LONG: &str = with_common!(
    "WALK='copy:cut copy:destination ready:cut ready:destination go:cut runs:cut known:cut \
     ready:source go:source runs:source go:destination runs:destination copy:source copy:cut'\n",
    "migrate-failures.sh"
);

pub const MOVE_COST: &str = with_common!("", "move-cost.sh", "move-cost-qemu.sh");
pub const MIGRATE_SLOW: &str = with_common!("POST_COPY=never\n", "migrate-slow.sh");
pub const MIGRATE_POST_COPY_SLOW: &str = with_common!("POST_COPY=auto\n", "migrate-slow.sh");
pub const MIGRATE_OTHER_CPU: &str = with_other!("migrate-other-cpu.sh");
pub const MIGRATE_LESSER_CPU: &str = with_other!("migrate-lesser-cpu.sh");

pub const NODES: &str = with_other!("nodes.sh");
pub const NODES_DRAIN: &str = with_other!("nodes-drain.sh");

pub const DISKS: &str = with_common!("disks.sh");
pub const DISK_FULL: &str = with_common!("disk-full.sh");
pub const HOSTILE_DEVICES: &str = with_common!("hostile-devices.sh");
pub const HOSTILE_DEVICES_LONG: &str =
    with_common!("SEEDS=40 FIRST=5 STEPS=60\n", "hostile-devices.sh");

pub const SHADOW_RECLAIM: &str = with_common!("shadow-reclaim.sh");
pub const BALLOON: &str = with_common!("balloon.sh");
pub const MEMORY_GROWS: &str = with_common!("memory-grows.sh");
pub const VMM_TRICKS: &str = with_common!("TRICKS='post-copy dirty-log munmap'\n", "vmm-tricks.sh");
pub const VMM_TRICKS_ALL: &str = with_common!(
    "TRICKS='unmapped-pages moved-away-and-back protected-and-back post-copy dirty-log fork \
     munmap no-access read-only moved-away punched'\n",
    "vmm-tricks.sh"
);

pub const KEXEC_NOW: &str = with_common!("export HOW=now\n", "kexec.sh");
pub const KEXEC_CRASH: &str = with_common!("export HOW=crash\n", "kexec.sh");

/// A kernel that takes signed modules only, as with Secure Boot: the module is not
/// loaded, and the word is what to do.
pub const SIGNED_ONLY: &str = "\
    ! test -e /dev/blanket || exit 1
    insmod /lab/blanket.ko 2>&1 && exit 1
    blanket doctor >said 2>&1 && exit 1
    cat said
    grep -q '^FAIL *signatures' said && grep -q sig_enforce said || exit 1
    blanket run --kernel /guest/vmlinuz 2>said </dev/null && exit 1
    cat said
    grep -q sign said && echo SIGNED-OK";

/// VMs inside KVM need no module.
pub const LOCKED_DOWN: &str = "\
    grep -q '\\[confidentiality\\]' /sys/kernel/security/lockdown 2>/dev/null ||
        { mount -t securityfs security /sys/kernel/security
          grep -q '\\[confidentiality\\]' /sys/kernel/security/lockdown || exit 1; }
    blanket doctor || exit 1
    echo 'uname -r' >script
    guest script && echo LOCKED-OK";

pub const TAKEN_SAMPLE: &str =
    with_common!("LIMIT=100M CPUS=2 MIB=12 ROUNDS=1\n", "memory-taken.sh");
pub const TAKEN_SOAK: &str =
    with_common!("LIMIT=100M CPUS=4 MIB=12 ROUNDS=10\n", "memory-taken.sh");

/// Many small VMs at once; `GUESTS` says how many.
pub const DENSITY: &str = include_str!("../../tests/lab-scripts/density.sh");
/// So many that the command's text, which they share, is not most of what one costs.
pub const DENSITY_8: &str = concat!(
    "GUESTS=8\n",
    include_str!("../../tests/lab-scripts/density.sh")
);
/// The figure that Blanket promises: 40 on an instance of 6 GiB and two CPUs.
pub const DENSITY_40: &str = concat!(
    "GUESTS=40\n",
    include_str!("../../tests/lab-scripts/density.sh")
);

/// Ten like guests whose memory KSM merges.
pub const MERGED_10: &str = concat!(
    "GUESTS=10 MERGED=100\n",
    include_str!("../../tests/lab-scripts/density.sh")
);

/// A network of VMs over two instances.
pub const VIRTUAL_NETWORK: &str = with_lease!("virtual-network.sh");

/// Snapshots by the commands of nodes.
pub const NODES_SNAPSHOT: &str = with_lease!("nodes-snapshot.sh");

/// The same by the commands of nodes.
pub const NODES_NETWORK: &str = with_lease!("nodes-network.sh");

/// A VM with a page that moves between two clouds.
pub const DEMO_NODES: &str = with_lease!("demo-nodes.sh");

/// Networks of two VMs.
pub const NETWORK: &str = with_common!("network.sh");
/// The same with four vCPUs.
pub const NETWORK_4: &str = with_common!("CPUS=4\n", "network.sh");

/// The same, shown.
pub const DEBIAN_DEMO: &str = concat!(
    include_str!("../../tests/lab-scripts/debian-common.sh"),
    include_str!("../../tests/lab-scripts/demo-debian.sh")
);

/// The same under load.
pub const DEBIAN_LOAD: &str = concat!(
    include_str!("../../tests/lab-scripts/debian-common.sh"),
    include_str!("../../tests/lab-scripts/debian-load.sh")
);

/// A database whose VM is killed.
pub const DEBIAN_POSTGRES: &str = concat!(
    "ROUNDS=10\n",
    include_str!("../../tests/lab-scripts/debian-common.sh"),
    include_str!("../../tests/lab-scripts/debian-postgres.sh")
);

/// A whole Debian with a database that moves ten times.
pub const DEBIAN_MOVES: &str = concat!(
    "MOVES=10\n",
    include_str!("../../tests/lab-scripts/debian-common.sh"),
    include_str!("../../tests/lab-scripts/two-instances.sh"),
    include_str!("../../tests/lab-scripts/debian-moves.sh")
);

/// A whole Debian: its system, disks and networks.
pub const DEBIAN: &str = concat!(
    include_str!("../../tests/lab-scripts/debian-common.sh"),
    include_str!("../../tests/lab-scripts/debian.sh")
);
