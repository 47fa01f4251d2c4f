//! A VM's trace as people read it: [`blanket_abi::trace`].

use std::fmt::Write as _;

use blanket_abi::device::exit;
use blanket_abi::trace::kind;
use blanket_abi::xen::hypercall;
use serde::{Deserialize, Serialize};

use crate::hypervisor::{Crash, CrashKind};

/// Records that a crash report ends with.
const IN_REPORTS: usize = 32;

/// A record of one vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The vCPU.
    pub vcpu: u32,
    /// From 1 for each vCPU, without gaps while the trace is on.
    pub number: u64,
    /// Time-stamp counter.
    pub tsc: u64,
    /// One of [`blanket_abi::trace::kind`].
    pub kind: u8,
    /// Which of its kind.
    pub what: u32,
    /// The guest was in kernel mode.
    pub kernel: bool,
    /// The guest's instruction pointer.
    pub rip: u64,
    /// Arguments.
    pub args: [u64; 4],
}

impl Record {
    /// As the core wrote it.
    #[must_use]
    pub fn of(vcpu: u32, record: &blanket_abi::trace::Record) -> Self {
        Self {
            vcpu,
            number: record.number,
            tsc: record.tsc,
            kind: record.kind,
            what: record.what,
            kernel: record.kernel,
            rip: record.rip,
            args: record.args,
        }
    }

    /// What happened, without time and place.
    fn event(&self) -> String {
        let [a, b, c, d] = self.args;
        match self.kind {
            kind::HYPERCALL | kind::MULTICALL => {
                let what = if self.kind == kind::HYPERCALL {
                    "hypercall"
                } else {
                    "  multicall"
                };
                let name = hypercall::name(self.what.into());
                let name = name.map_or_else(|| format!("number {}", self.what), str::to_lowercase);
                format!("{what} {name} {a:#x} {b:#x} {c:#x} {d:#x}")
            }
            kind::TRAP => {
                let what = match self.what {
                    14 => return format!("page fault at {b:#x} error {a:#x} rsp {c:#x}"),
                    256 => return format!("slow syscall {d} rsp {c:#x}"),
                    257 => return format!("32-bit syscall {d} rsp {c:#x}"),
                    258 => "failed return".to_owned(),
                    vector @ 0..32 => format!("exception {vector}"),
                    vector => format!("interrupt {vector:#x}"),
                };
                format!("{what} error {a:#x} rsp {c:#x}")
            }
            kind::EXIT => {
                let name = exit::name(self.what);
                let name = name.map_or_else(|| format!("number {}", self.what), str::to_lowercase);
                format!("exit {name} {a:#x} {b:#x} {c:#x} {d:#x}")
            }
            other => format!(
                "kind {other} number {} {a:#x} {b:#x} {c:#x} {d:#x}",
                self.what
            ),
        }
    }
}

/// Brings the records of all vCPUs into the order of time.
pub fn sort(records: &mut [Record]) {
    records.sort_unstable_by_key(|r| (r.tsc, r.vcpu, r.number));
}

/// A line for each record, with the time since `begin` (a time-stamp) in microseconds.
#[must_use]
pub fn text(records: &[Record], begin: u64, tsc_khz: u64) -> String {
    let mut out = String::new();
    for record in records {
        let ticks = i128::from(record.tsc) - i128::from(begin);
        // Tenths of a microsecond.
        let time = ticks * 10_000 / i128::from(tsc_khz.max(1));
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "{:>10}.{} vCPU {:<2} {} {:#018x}  {}",
            time / 10,
            (time % 10).abs(),
            record.vcpu,
            if record.kernel { "kernel" } else { "user  " },
            record.rip,
            record.event()
        );
    }
    out
}

/// The last records as the end of a crash report; times count back from the last one.
/// Empty where nothing was traced.
#[must_use]
pub fn tail(records: &[Record], tsc_khz: u64) -> String {
    let mut all = records.to_vec();
    sort(&mut all);
    let last = &all[all.len().saturating_sub(IN_REPORTS)..];
    match last.last() {
        Some(end) => format!(
            "the last {} records of the trace, times in microseconds before the end:\n{}",
            last.len(),
            text(last, end.tsc, tsc_khz)
        ),
        None => String::new(),
    }
}

/// Adds the trace to the report of a VM that ended through the core's fault.
pub fn add_to(crash: &mut Crash, records: &[Record], tsc_khz: u64) {
    if crash.kind == CrashKind::Core && !records.is_empty() {
        if !crash.report.ends_with('\n') {
            crash.report.push('\n');
        }
        crash.report.push_str(&tail(records, tsc_khz));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(number: u64, kind: u8, what: u32, args: [u64; 4]) -> Record {
        Record {
            vcpu: 1,
            number,
            tsc: number * 2_000,
            kind,
            what,
            kernel: true,
            rip: 0xffff_ffff_8100_0000,
            args,
        }
    }

    #[test]
    fn records_are_told_by_name() {
        let all = [
            record(1, kind::HYPERCALL, 1, [0xa, 0xb, 0, 0]),
            record(2, kind::MULTICALL, 47, [0; 4]),
            record(3, kind::TRAP, 14, [6, 0x7fff_1000, 0x10, 0]),
            record(4, kind::EXIT, exit::FRAME, [0x55, 0, 0, 0]),
            record(5, 99, 3, [0; 4]),
        ];
        let text = text(&all, 2_000, 2_000_000);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].contains("0.0 vCPU 1 ") && lines[0].contains("kernel 0xffffffff81000000"));
        assert!(
            lines[0].ends_with("hypercall mmu_update 0xa 0xb 0x0 0x0"),
            "{text}"
        );
        assert!(
            lines[1].contains(" 1.0 vCPU") && lines[1].contains("multicall number 47"),
            "{text}"
        );
        assert!(
            lines[2].ends_with("page fault at 0x7fff1000 error 0x6 rsp 0x10"),
            "{text}"
        );
        assert!(lines[3].contains("exit frame 0x55"), "{text}");
        assert!(lines[4].contains("kind 99 number 3"), "{text}");
    }

    #[test]
    fn a_report_of_the_cores_own_fault_ends_with_the_trace() {
        let mut all: Vec<Record> = (1..=100)
            .rev()
            .map(|n| record(n, kind::EXIT, exit::IDLE, [n; 4]))
            .collect();
        all[0].vcpu = 0;
        let crash = |kind| Crash {
            kind,
            report: "why".into(),
        };
        let mut core = crash(CrashKind::Core);
        add_to(&mut core, &all, 1_000_000);
        assert!(
            core.report.starts_with("why\nthe last 32 records"),
            "{}",
            core.report
        );
        assert_eq!(core.report.lines().count(), 34);
        let last = core.report.lines().last().expect("lines");
        assert!(
            last.contains(" 0.0 vCPU 0 ") && last.contains("0x64"),
            "{last}"
        );
        for mut other in [crash(CrashKind::Guest), crash(CrashKind::Core)] {
            let records: &[Record] = if other.kind == CrashKind::Guest {
                &all
            } else {
                &[]
            };
            add_to(&mut other, records, 1_000_000);
            assert_eq!(other.report, "why");
        }
    }
}
