//! Counters of running VMs in Prometheus' text format, version 0.0.4
//! (`prometheus.io/docs/instrumenting/exposition_formats`).

use std::fmt::Write as _;

use crate::control::Info;
use crate::stats::Stats;

/// A metric: its name without the prefix, its type, and what it says.
struct Family {
    name: &'static str,
    kind: &'static str,
    help: &'static str,
    samples: fn(&Info, &Stats) -> Vec<Sample>,
}

/// Labels beside the VM's name, and a value.
type Sample = (Vec<(&'static str, String)>, f64);

const PAGE: f64 = 4096.0;

/// Counts are exact up to 2^53, as in everything that reads this format.
#[allow(
    clippy::cast_precision_loss,
    reason = "the format's numbers are doubles"
)]
const fn number(count: u64) -> f64 {
    count as f64
}

fn one(value: f64) -> Vec<Sample> {
    vec![(Vec::new(), value)]
}

/// A sample for each entry of a table of counters.
fn table(label: &'static str, counters: &std::collections::BTreeMap<String, u64>) -> Vec<Sample> {
    counters
        .iter()
        .map(|(name, &count)| (vec![(label, name.clone())], number(count)))
        .collect()
}

/// Samples of the core's own counters, also those that are 0.
fn core(stats: &Stats, label: &'static str, names: &[(&str, &str)]) -> Vec<Sample> {
    names
        .iter()
        .map(|(value, counter)| {
            let count = stats.counters.get(*counter).copied().unwrap_or(0);
            (vec![(label, (*value).to_owned())], number(count))
        })
        .collect()
}

fn core_one(stats: &Stats, counter: &str) -> Vec<Sample> {
    one(number(stats.counters.get(counter).copied().unwrap_or(0)))
}

const FAMILIES: &[Family] = &[
    Family {
        name: "vm_info",
        kind: "gauge",
        help: "A running VM and what it runs on; always 1.",
        samples: |info, _| {
            let labels = vec![("uuid", info.uuid.clone()), ("host", info.host.clone())];
            vec![(labels, 1.0)]
        },
    },
    Family {
        name: "uptime_seconds",
        kind: "gauge",
        help: "Seconds since the VM was started.",
        samples: |info, _| one(info.uptime_seconds),
    },
    Family {
        name: "boots_total",
        kind: "counter",
        help: "How often the VM was booted. Other counters begin again at each boot.",
        samples: |info, _| one(f64::from(info.boots)),
    },
    Family {
        name: "vcpus",
        kind: "gauge",
        help: "vCPUs of the VM.",
        samples: |info, _| one(f64::from(info.vcpus)),
    },
    Family {
        name: "memory_bytes",
        kind: "gauge",
        help: "Memory that the VM starts with.",
        samples: |info, _| one(number(info.memory)),
    },
    Family {
        name: "memory_max_bytes",
        kind: "gauge",
        help: "Memory that the VM's guest can be given at most.",
        samples: |_, stats| one(number(stats.memory.most_bytes)),
    },
    Family {
        name: "memory_target_bytes",
        kind: "gauge",
        help: "Memory that the VM's guest is asked to have.",
        samples: |_, stats| one(number(stats.memory.target_bytes)),
    },
    Family {
        name: "memory_current_bytes",
        kind: "gauge",
        help: "Memory that the VM's guest has: the rest is given up to the instance.",
        samples: |_, stats| one(number(stats.memory.current_bytes)),
    },
    Family {
        name: "memory_present_bytes",
        kind: "gauge",
        help: "Frames of guest memory that the instance has given.",
        samples: |_, stats| one(number(stats.frames) * PAGE),
    },
    Family {
        name: "revoked_frames_total",
        kind: "counter",
        help: "Frames that the instance took back while the VM ran. 0 inside KVM, which does not tell.",
        samples: |_, stats| one(number(stats.revoked_frames)),
    },
    Family {
        name: "shadow_pages",
        kind: "gauge",
        help: "Pages of shadow memory.",
        samples: |_, stats| one(number(stats.shadow_pages)),
    },
    Family {
        name: "guest_seconds_total",
        kind: "counter",
        help: "Time that vCPUs spent in the core world. 0 inside KVM, which does not tell.",
        #[allow(
            clippy::cast_precision_loss,
            reason = "the format's numbers are doubles"
        )]
        samples: |_, stats| one(stats.guest_ns as f64 / 1e9),
    },
    Family {
        name: "exits_total",
        kind: "counter",
        help: "Exits of the core by reason; inside KVM most of them are answered by the core itself.",
        samples: |_, stats| table("reason", &stats.exits),
    },
    Family {
        name: "world_switches_total",
        kind: "counter",
        help: "Times that a vCPU left the core for the host: world switches, or exits of KVM.",
        samples: |info, stats| {
            one(number(match &*info.host {
                "kvm" => stats.host.get("exits").copied().unwrap_or(0),
                _ => stats.exits.values().sum(),
            }))
        },
    },
    Family {
        name: "hypercalls_total",
        kind: "counter",
        help: "Hypercalls by name.",
        samples: |_, stats| table("hypercall", &stats.hypercalls),
    },
    Family {
        name: "page_faults_total",
        kind: "counter",
        help: "Page faults by what became of them.",
        samples: |_, stats| {
            core(
                stats,
                "outcome",
                &[
                    ("guest", "page-faults-to-guest"),
                    ("shadow", "page-faults-shadow"),
                    ("table-write", "page-table-writes"),
                ],
            )
        },
    },
    Family {
        name: "traps_total",
        kind: "counter",
        help: "Exceptions handed to the guest, other than page faults.",
        samples: |_, stats| core_one(stats, "traps-to-guest"),
    },
    Family {
        name: "upcalls_total",
        kind: "counter",
        help: "Deliveries of events to the guest.",
        samples: |_, stats| core_one(stats, "upcalls"),
    },
    Family {
        name: "emulated_instructions_total",
        kind: "counter",
        help: "Privileged instructions emulated.",
        samples: |_, stats| core_one(stats, "privileged-instructions"),
    },
    Family {
        name: "syscalls_total",
        kind: "counter",
        help: "System calls of the guest's programs by path through the core.",
        samples: |_, stats| {
            core(
                stats,
                "path",
                &[("fast", "fast-syscalls"), ("slow", "slow-syscalls")],
            )
        },
    },
    Family {
        name: "irets_total",
        kind: "counter",
        help: "Iret hypercalls by path through the core.",
        samples: |_, stats| {
            core(
                stats,
                "path",
                &[("fast", "fast-irets"), ("slow", "slow-irets")],
            )
        },
    },
    Family {
        name: "root_loads_total",
        kind: "counter",
        help: "Loads of CR3 in the core's slow paths.",
        samples: |_, stats| core_one(stats, "cr3-loads"),
    },
    Family {
        name: "shadows_made_total",
        kind: "counter",
        help: "Shadow pages made.",
        samples: |_, stats| core_one(stats, "shadows-made"),
    },
    Family {
        name: "shadow_reclaims_total",
        kind: "counter",
        help: "Times that all shadows were dropped for want of memory.",
        samples: |_, stats| core_one(stats, "shadows-dropped"),
    },
    Family {
        name: "lock_contended_total",
        kind: "counter",
        help: "Times that a vCPU found the lock of the shadow MMU held by another.",
        samples: |_, stats| core_one(stats, "lock-contended"),
    },
    Family {
        name: "lock_waited_cycles_total",
        kind: "counter",
        help: "TSC cycles that vCPUs spun for it.",
        samples: |_, stats| core_one(stats, "lock-cycles-waited"),
    },
    Family {
        name: "lock_yields_total",
        kind: "counter",
        help: "Times that a vCPU waited for it so long that the host was asked to run others.",
        samples: |_, stats| core_one(stats, "lock-yields"),
    },
    Family {
        name: "kvm_total",
        kind: "counter",
        help: "KVM's own counters, by its names.",
        samples: |_, stats| table("counter", &stats.host),
    },
];

/// All metrics of all `vms`, each family in one piece as the format wants it.
pub fn text(vms: &[(Info, Stats)]) -> String {
    let mut out = String::new();
    for family in FAMILIES {
        let mut head = false;
        for (info, stats) in vms {
            for (labels, value) in (family.samples)(info, stats) {
                if !std::mem::replace(&mut head, true) {
                    // Writing to a String cannot fail.
                    let _ = writeln!(
                        out,
                        "# HELP blanket_{0} {1}\n# TYPE blanket_{0} {2}",
                        family.name, family.help, family.kind
                    );
                }
                let _ = write!(
                    out,
                    "blanket_{}{{vm=\"{}\"",
                    family.name,
                    escaped(&info.name)
                );
                for (name, text) in labels {
                    let _ = write!(out, ",{name}=\"{}\"", escaped(&text));
                }
                let _ = writeln!(out, "}} {value}");
            }
        }
    }
    out
}

/// A label's value as the format quotes it.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use prometheus_parse::{Scrape, Value};

    use super::*;
    use crate::control::Memory;
    use crate::setting::Confinement;

    fn vm(name: &str, host: &str) -> (Info, Stats) {
        let info = Info {
            name: name.into(),
            uuid: "u".into(),
            generation_id: "1:2".into(),
            pid: 1,
            host: host.into(),
            vcpus: 2,
            memory: 256 << 20,
            balloon: Memory::default(),
            phase: "running".into(),
            incoming: None,
            uptime_seconds: 1.5,
            boots: 1,
            kernel: "k".into(),
            initrd: None,
            cmdline: String::new(),
            console: "none".into(),
            confinement: Confinement::default(),
        };
        let counts = |of: &[(&str, u64)]| -> BTreeMap<String, u64> {
            of.iter().map(|(n, c)| ((*n).to_owned(), *c)).collect()
        };
        let stats = Stats {
            confinement: None,
            exits: counts(&[("interrupt", 5), ("idle", 7)]),
            hypercalls: counts(&[("mmu_update", 3), ("iret", 9_007_199_254_740_992)]),
            counters: counts(&[("page-faults-shadow", 11), ("fast-syscalls", 13)]),
            host: if host == "kvm" {
                counts(&[("exits", 17)])
            } else {
                BTreeMap::new()
            },
            frames: 100,
            memory: Memory {
                most_bytes: 256 << 20,
                target_bytes: 64 << 20,
                current_bytes: 65 << 20,
            },
            revocations: 21,
            revoked_frames: 23,
            shadow_pages: 19,
            guest_ns: 1_500_000_000,
        };
        (info, stats)
    }

    #[test]
    fn a_parser_reads_back_what_was_counted() {
        let vms = [vm("one", "module"), vm("two", "kvm")];
        let text = text(&vms);
        let lines = text.lines().map(|line| Ok(line.to_owned()));
        let scrape = Scrape::parse(lines).expect("of the format");
        let find = |metric: &str, labels: &[(&str, &str)]| {
            let found: Vec<_> = scrape
                .samples
                .iter()
                .filter(|s| {
                    s.metric == metric && labels.iter().all(|(n, v)| s.labels.get(n) == Some(v))
                })
                .collect();
            assert_eq!(found.len(), 1, "{metric} {labels:?} in\n{text}");
            match found[0].value {
                Value::Counter(value) | Value::Gauge(value) => value,
                ref other => panic!("{metric} is {other:?}"),
            }
        };
        let is = |metric, labels: &[(&str, &str)], value: f64| {
            let got = find(metric, labels);
            assert!((got - value).abs() < 1e-9, "{metric} {labels:?}: {got}");
        };
        let one = ("vm", "one");
        is("blanket_revoked_frames_total", &[one], 23.0);
        is("blanket_exits_total", &[one, ("reason", "idle")], 7.0);
        is("blanket_world_switches_total", &[one], 12.0);
        is("blanket_world_switches_total", &[("vm", "two")], 17.0);
        let iret = [one, ("hypercall", "iret")];
        is("blanket_hypercalls_total", &iret, 9_007_199_254_740_992.0);
        is(
            "blanket_page_faults_total",
            &[one, ("outcome", "shadow")],
            11.0,
        );
        is(
            "blanket_page_faults_total",
            &[one, ("outcome", "guest")],
            0.0,
        );
        is("blanket_shadow_pages", &[one], 19.0);
        is("blanket_memory_max_bytes", &[one], 268_435_456.0);
        is("blanket_memory_target_bytes", &[one], 67_108_864.0);
        is("blanket_memory_current_bytes", &[one], 68_157_440.0);
        is("blanket_memory_present_bytes", &[one], 409_600.0);
        is("blanket_guest_seconds_total", &[one], 1.5);
        is(
            "blanket_kvm_total",
            &[("vm", "two"), ("counter", "exits")],
            17.0,
        );
        is("blanket_vm_info", &[("vm", "two"), ("host", "kvm")], 1.0);
    }

    /// What the parser is lenient about.
    #[test]
    fn families_are_whole_and_each_line_is_well_formed() {
        let text = text(&[vm("one", "module"), vm("a\"b\\c", "kvm")]);
        let mut done: BTreeSet<&str> = BTreeSet::new();
        let mut family = "";
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# ") {
                let (word, rest) = rest.split_once(' ').expect("two words");
                let (name, _) = rest.split_once(' ').expect("three words");
                match word {
                    "HELP" => assert!(done.insert(name), "{name} is in two pieces"),
                    "TYPE" => family = name,
                    _ => panic!("{line}"),
                }
                continue;
            }
            let (series, value) = line.rsplit_once(' ').expect("a value");
            let (name, labels) = series.split_once('{').expect("labels");
            assert_eq!(name, family, "{line}");
            assert!(labels.ends_with("\"}"), "{line}");
            assert!(value.parse::<f64>().is_ok(), "{line}");
            let plain = |c: char| c.is_ascii_lowercase() || c == '_';
            assert!(name.chars().all(plain), "{line}");
        }
        assert!(text.contains(r#"vm="a\"b\\c""#), "{text}");
        assert!(text.ends_with('\n'));
        for family in FAMILIES {
            assert_eq!(family.kind == "counter", family.name.ends_with("_total"));
        }
    }

    #[test]
    fn no_vm_is_no_metric() {
        assert_eq!(text(&[]), "");
    }
}
