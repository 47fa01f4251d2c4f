//! Counters with names.

use std::collections::BTreeMap;
use std::fmt;

use blanket_abi::device::{counter, exit};
use blanket_vmm::instance::Counters;
use serde::{Deserialize, Serialize};

use crate::control::Memory;
use crate::setting::Confinement;

/// A VM's counters, by name; those that are 0 are left out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Exits of the core by reason; inside KVM, where most of them are answered by
    /// the core itself, also those.
    pub exits: BTreeMap<String, u64>,
    /// Hypercalls by name.
    pub hypercalls: BTreeMap<String, u64>,
    /// Other counters of the core.
    pub counters: BTreeMap<String, u64>,
    /// Counters of the hypervisor below, by its own names: KVM's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub host: BTreeMap<String, u64>,
    /// Frames of guest memory that are present.
    pub frames: u64,
    /// The guest's memory: what it is to have, and has.
    #[serde(default)]
    pub memory: Memory,
    /// Pages of shadow memory.
    pub shadow_pages: u64,
    /// Nanoseconds that vCPUs spent in the guest.
    pub guest_ns: u64,
    /// Times that the host took guest memory back, under the module.
    #[serde(default)]
    pub revocations: u64,
    /// Frames that it took.
    #[serde(default)]
    pub revoked_frames: u64,
    /// In which box its process is, and which limits it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confinement: Option<Confinement>,
}

/// Names of `public/xen.h`.
const HYPERCALLS: [&str; 42] = [
    "set_trap_table",
    "mmu_update",
    "set_gdt",
    "stack_switch",
    "set_callbacks",
    "fpu_taskswitch",
    "sched_op_compat",
    "platform_op",
    "set_debugreg",
    "get_debugreg",
    "update_descriptor",
    "hypercall_11",
    "memory_op",
    "multicall",
    "update_va_mapping",
    "set_timer_op",
    "event_channel_op_compat",
    "xen_version",
    "console_io",
    "physdev_op_compat",
    "grant_table_op",
    "vm_assist",
    "update_va_mapping_otherdomain",
    "iret",
    "vcpu_op",
    "set_segment_base",
    "mmuext_op",
    "xsm_op",
    "nmi_op",
    "sched_op",
    "callback_op",
    "xenoprof_op",
    "event_channel_op",
    "physdev_op",
    "hvm_op",
    "sysctl",
    "domctl",
    "kexec_op",
    "tmem_op",
    "argo_op",
    "xenpmu_op",
    "dm_op",
];

fn counter_name(index: usize) -> Option<&'static str> {
    Some(match index {
        counter::PF_GUEST => "page-faults-to-guest",
        counter::PF_SHADOW => "page-faults-shadow",
        counter::PT_WRITE => "page-table-writes",
        counter::PRIV_OP => "privileged-instructions",
        counter::UPCALL => "upcalls",
        counter::SHADOW_MADE => "shadows-made",
        counter::SHADOW_DROP_ALL => "shadows-dropped",
        counter::CR3_LOAD => "cr3-loads",
        counter::SLOW_SYSCALL => "slow-syscalls",
        counter::SLOW_IRET => "slow-irets",
        counter::TRAP => "traps-to-guest",
        counter::FAST_SYSCALL => "fast-syscalls",
        counter::FAST_IRET => "fast-irets",
        counter::LOCK_CONTENDED => "lock-contended",
        counter::LOCK_WAITED => "lock-cycles-waited",
        counter::LOCK_YIELDED => "lock-yields",
        counter::LOCK_TAKEN => "lock-taken",
        counter::LOCK_HELD => "lock-cycles-held",
        counter::LOCK_PREEMPTED => "lock-holder-preempted",
        _ => return None,
    })
}

impl From<Counters> for Stats {
    fn from(all: Counters) -> Self {
        let raw = &all.vm;
        let mut stats = Self {
            host: all.host.into_iter().map(|e| (e.name, e.count)).collect(),
            frames: raw.frames,
            memory: all.memory.into(),
            shadow_pages: raw.pool,
            guest_ns: raw.guest_ns,
            revocations: raw.revocations,
            revoked_frames: raw.revoked,
            ..Self::default()
        };
        for (reason, &count) in (0u32..).zip(&raw.exits) {
            if count > 0 {
                let name = exit::name(reason).map_or_else(|| format!("exit-{reason}"), Into::into);
                stats.exits.insert(name, count);
            }
        }
        for (index, &count) in raw.counters.iter().enumerate() {
            if count == 0 {
                continue;
            }
            if index < counter::PF_GUEST {
                let name = HYPERCALLS
                    .get(index - counter::HYPERCALL)
                    .map_or_else(|| format!("hypercall_{index}"), |name| (*name).to_owned());
                stats.hypercalls.insert(name, count);
            } else {
                let name =
                    counter_name(index).map_or_else(|| format!("counter-{index}"), Into::into);
                stats.counters.insert(name, count);
            }
        }
        stats
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |pages: u64| pages.div_ceil(256);
        // KVM's threads are in the guest or in its kernel, and do not say which.
        if self.guest_ns > 0 {
            writeln!(
                f,
                "guest time     {}.{:03} s",
                self.guest_ns / 1_000_000_000,
                self.guest_ns / 1_000_000 % 1000
            )?;
        }
        writeln!(f, "guest memory   {} MiB present", mib(self.frames))?;
        let Memory {
            most_bytes,
            target_bytes,
            current_bytes,
        } = self.memory;
        if (target_bytes, current_bytes) != (most_bytes, most_bytes) {
            writeln!(
                f,
                "balloon        the guest has {} of {} MiB, and is to have {}",
                current_bytes >> 20,
                most_bytes >> 20,
                target_bytes >> 20
            )?;
        }
        if self.revocations > 0 {
            writeln!(
                f,
                "taken back     {} frames in {} revocations",
                self.revoked_frames, self.revocations
            )?;
        }
        writeln!(
            f,
            "shadow memory  {} pages ({} MiB)",
            self.shadow_pages,
            mib(self.shadow_pages)
        )?;
        for (title, table) in [
            ("exits", &self.exits),
            ("hypercalls", &self.hypercalls),
            ("core", &self.counters),
            ("kvm", &self.host),
        ] {
            if table.is_empty() {
                continue;
            }
            writeln!(f, "{title}:")?;
            let mut rows: Vec<_> = table.iter().collect();
            rows.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
            for (name, count) in rows {
                writeln!(f, "  {name:<30} {count:>14}")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use blanket_abi::device::{COUNTERS, EXIT_REASONS, VmStats};
    use blanket_vmm::balloon;

    use super::*;

    #[test]
    fn counters_have_their_names() {
        let mut raw = VmStats {
            exits: [0; EXIT_REASONS],
            counters: [0; COUNTERS],
            frames: 512,
            pool: 3,
            guest_ns: 1_234_567_890,
            revocations: 9,
            revoked: 11,
        };
        raw.exits[exit::SEND as usize] = 7;
        raw.exits[31] = 1;
        raw.counters[23] = 100;
        raw.counters[47] = 1;
        raw.counters[counter::UPCALL] = 5;
        raw.counters[63] = 2;
        let stats = Stats::from(Counters {
            vm: raw,
            host: Vec::new(),
            memory: balloon::Memory {
                most: 256 << 20,
                target: 64 << 20,
                current: 65 << 20,
            },
        });
        assert_eq!(stats.exits["send"], 7);
        assert_eq!(stats.exits["exit-31"], 1);
        assert_eq!(stats.hypercalls["iret"], 100);
        assert_eq!(stats.hypercalls["hypercall_47"], 1);
        assert_eq!(stats.counters["upcalls"], 5);
        assert_eq!(stats.counters["counter-63"], 2);
        let text = stats.to_string();
        assert!(
            text.contains("1.234 s")
                && text.contains("2 MiB present")
                && text.contains("11 frames in 9 revocations")
                && text.contains("has 65 of 256 MiB, and is to have 64"),
            "{text}"
        );
        let json = serde_json::to_string(&stats).expect("plain data");
        assert_eq!(
            serde_json::from_str::<Stats>(&json).expect("the same"),
            stats
        );
    }
}
