//! `bench --storm`: many workers that make processes, mappings and pipe traffic at once,
//! natively and in VMs with 1, 2 and 4 vCPUs, on an instance with two CPUs.
//!
//! The core in it is built to measure its lock (`lock-stats`).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::build;
use crate::guestware;
use crate::initramfs;
use crate::kernels::{self, Flavour};
use crate::lab::Payload;
use crate::project::Project;
use crate::qemu::{self, End, Hardware, Machine};

/// What the page's section begins with.
pub const TITLE: &str = "\n## Storms\n";
/// vCPUs of the VMs.
const SIZES: [u32; 3] = [1, 2, 4];
/// Milliseconds of each storm.
const LENGTH: u32 = 3000;
const WORKERS: u32 = 8;
/// Ticks of `/proc/PID/stat` in a second, on every Linux that we know of.
const TICKS: f64 = 100.0;

/// Where a storm takes place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    /// The instance.
    Native,
    /// A VM with so many vCPUs.
    Vm(u32),
    /// The same under what it is compared with.
    Other(u32),
}

/// Runs it, prints the section of the page, and writes it there if it is whole. With
/// `against`, a directory with another module and command, VMs of both take turns.
pub fn run(project: &Project, rounds: u32, kinds: &[String], against: Option<&Path>) -> Result<()> {
    let measured = project.measured();
    let kernel = kernels::fetch(project, Flavour::Cloud)?;
    let programs = guestware::programs(project)?;
    let storm = format!(
        "storm --workers {WORKERS} --milliseconds {LENGTH} {}",
        kinds.join(" ")
    );
    let mut payload = Payload::new(project, &kernel, Hardware::Virtio, "EPYC,-svm")?;
    payload.module(&build::module_for(&measured, &kernel)?);
    payload.program(&build::command(&measured)?)?;
    payload.archive.add(&programs);
    payload.guest_kernel(&kernel);
    payload.guest_initrd(&initramfs::guest(project, Some(&storm), &programs)?)?;
    if let Some(dir) = against {
        payload.archive.copy_tree("against", dir)?;
    }
    // Round by round, so that what else the machine does meets all of them.
    let mut round = format!("echo STORM-PLACE native 0\n{storm} || exit 1\n");
    let mut vms = |name: &str, command: &str, module: &str| {
        let _ = writeln!(round, "rmmod blanket; insmod {module} || exit 1");
        for vcpus in SIZES {
            let _ = write!(
                round,
                "echo STORM-PLACE {name} {vcpus}\n{command} run --host module --kernel \
                 /guest/vmlinuz --initrd /guest/initrd.img --memory 512M --cpus {vcpus} \
                 --stats-on-exit --cmdline 'console=hvc0 quiet' || exit 1\n"
            );
        }
    };
    if against.is_some() {
        vms("other", "/against/blanket", "/against/blanket.ko");
    }
    vms("vm", "blanket", "/lab/blanket.ko");
    payload.command(&format!(
        "round=0\nwhile [ $round -lt {rounds} ]; do round=$((round + 1))\n{round}done\n"
    ));
    let machine = Machine::new("EPYC,-svm", kernel.clone(), "2560M");
    let dir = qemu::run_dir(project)?;
    let mut reader = Reader::new(dir.join("pid"));
    let timeout = Duration::from_secs(120 + 480 * u64::from(rounds));
    let outcome = qemu::run_in(
        project,
        dir,
        &[machine],
        &payload.archive,
        timeout,
        &mut reader,
    )?;
    if outcome.end != End::Exit(0) {
        eprint!("{}", outcome.console_tail(100));
        bail!("the instance ended with {:?}", outcome.end);
    }
    outcome.discard();
    let text = section(&reader.samples, &kernel.release, rounds)?;
    println!("{text}");
    if kinds.is_empty() {
        crate::page::write_section(project, TITLE, &text)?;
    }
    Ok(())
}

/// What came of one place, for each round.
#[derive(Default)]
struct Samples {
    /// Operations per second, by the kind of storm.
    rates: BTreeMap<String, Vec<f64>>,
    /// Operations per second that QEMU had a CPU.
    by_cpu: BTreeMap<String, Vec<f64>>,
    /// What the core and the module counted.
    counters: BTreeMap<String, Vec<f64>>,
}

/// Takes figures out of the output as it comes.
struct Reader {
    held: Vec<u8>,
    pid: PathBuf,
    place: Place,
    samples: BTreeMap<Place, Samples>,
    /// Ticks that QEMU had used when the storm began.
    begun: Option<f64>,
}

impl Reader {
    fn new(pid: PathBuf) -> Self {
        Self {
            held: Vec::new(),
            pid,
            place: Place::Native,
            samples: BTreeMap::new(),
            begun: None,
        }
    }

    fn line(&mut self, line: &str) {
        println!("{line}");
        let words: Vec<&str> = line.split_whitespace().collect();
        let samples = self.samples.entry(self.place).or_default();
        match words[..] {
            ["STORM-PLACE", name, vcpus] => {
                let vcpus = vcpus.parse().unwrap_or_default();
                self.place = match name {
                    "vm" => Place::Vm(vcpus),
                    "other" => Place::Other(vcpus),
                    _ => Place::Native,
                };
            }
            ["STORM-BEGIN", _] => self.begun = ticks(&self.pid),
            ["STORM", kind, ops, us] => {
                let figure = |word: &str, name| {
                    word.strip_prefix(name)
                        .and_then(|text| text.parse::<f64>().ok())
                };
                let (Some(ops), Some(us)) = (figure(ops, "ops="), figure(us, "us=")) else {
                    return;
                };
                let add = |table: &mut BTreeMap<String, Vec<f64>>, value| {
                    table.entry(kind.to_owned()).or_default().push(value);
                };
                add(&mut samples.rates, ops / us * 1e6);
                if let (Some(begun), Some(now)) = (self.begun.take(), ticks(&self.pid)) {
                    add(&mut samples.by_cpu, ops / (now - begun).max(1.0) * TICKS);
                }
            }
            [name, count] if line.starts_with("  ") => {
                if let Ok(count) = count.parse() {
                    let name = name.to_owned();
                    samples.counters.entry(name).or_default().push(count);
                }
            }
            _ => {}
        }
    }
}

/// CPU time that QEMU has used.
fn ticks(pid: &Path) -> Option<f64> {
    let pid = fs::read_to_string(pid).ok()?;
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).ok()?;
    // Behind the name, which is in parentheses: fields 3 and on (proc(5)).
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |n: usize| fields.get(n - 3)?.parse::<f64>().ok();
    Some(field(14)? + field(15)?)
}

impl Write for Reader {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        for line in qemu::whole_lines(&mut self.held, bytes) {
            self.line(&line);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The middle of some values; of an even number, the mean of the two.
fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[half]),
        _ => Some(f64::midpoint(sorted[half - 1], sorted[half])),
    }
}

/// The figures as a section of the page.
fn section(samples: &BTreeMap<Place, Samples>, release: &str, rounds: u32) -> Result<String> {
    let native = samples
        .get(&Place::Native)
        .context("nothing came from the instance")?;
    ensure!(!native.rates.is_empty(), "no storm took place");
    let mut text = format!(
        "{TITLE}\n\
         Made by `cargo xtask bench --storm {rounds}`, which writes this section: {WORKERS} workers at once \
         (`tests/guest/storm`) make processes (`fork`, `exec`), mappings (`mmap`, `mprotect`, and `threads`: \
         mprotect by the threads of one process) and pipe traffic (`pipe`), in an instance with two CPUs and in VMs \
         with 1, 2 and 4 vCPUs on it, under the module. All run the stock kernel {release}. The figures are medians \
         of {rounds} rounds of {} seconds each, by the clock, under QEMU's translator with a thread for each CPU, \
         on a machine that does other things as well: they say how VMs of different sizes compare, \
         and nothing of hardware. Rates are operations per second; behind the stroke, operations per second \
         of CPU time that QEMU got, which the machine's other work disturbs less.\n",
        LENGTH / 1000
    );
    if samples.contains_key(&Place::Other(1)) {
        text.push_str(
            "\nBefore (`--against DIR`; VMs of both states took turns in one instance):\n",
        );
        tables(&mut text, samples, Place::Other);
        text.push_str("\nAfter:\n");
    }
    tables(&mut text, samples, Place::Vm);
    Ok(text)
}

/// Rates and counters of VMs of all sizes.
fn tables(text: &mut String, samples: &BTreeMap<Place, Samples>, vm: fn(u32) -> Place) {
    text.push_str(
        "\n| storm | native | 1 vCPU | 2 vCPUs | 4 vCPUs | 2 against 1 | 4 against 1 | 4 against 2 |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    let kinds = samples
        .get(&Place::Native)
        .map(|s| s.rates.keys())
        .into_iter()
        .flatten();
    for kind in kinds {
        let of = |place: Place| -> Option<[f64; 2]> {
            let samples = samples.get(&place)?;
            let rate = median(samples.rates.get(kind)?)?;
            let by_cpu = samples.by_cpu.get(kind).and_then(|v| median(v));
            Some([rate, by_cpu.unwrap_or(0.0)])
        };
        let cell = |place| of(place).map_or("-".into(), |[a, b]| format!("{a:.0} / {b:.0}"));
        let ratio = |a, b| match (of(vm(a)), of(vm(b))) {
            (Some([a, c]), Some([b, d])) => format!("{:.2} / {:.2}", per(a, b), per(c, d)),
            _ => "-".into(),
        };
        let _ = writeln!(
            text,
            "| {kind} | {} | {} | {} | {} | {} | {} | {} |",
            cell(Place::Native),
            cell(vm(1)),
            cell(vm(2)),
            cell(vm(4)),
            ratio(2, 1),
            ratio(4, 1),
            ratio(4, 2)
        );
    }
    text.push_str(
        "\nWhat the VMs counted over their whole lives, boot included. The lock is that of the shadow MMU, the \
         only one that is taken often; cycles are of the TSC that the emulator gives.\n\n\
         | of the VM with | 1 vCPU | 2 vCPUs | 4 vCPUs |\n|---|---:|---:|---:|\n",
    );
    let count = |vcpus: u32, name: &str| -> f64 {
        let of = samples.get(&vm(vcpus)).and_then(|s| s.counters.get(name));
        of.and_then(|values| median(values)).unwrap_or(0.0)
    };
    let mut row = |title: &str, figure: &dyn Fn(u32) -> String| {
        let [one, two, four] = SIZES.map(figure);
        let _ = writeln!(text, "| {title} | {one} | {two} | {four} |");
    };
    row("times that the lock was taken", &|n| {
        format!("{:.0}", count(n, "lock-taken"))
    });
    row("cycles that it was held, mean", &|n| {
        let mean = per(count(n, "lock-cycles-held"), count(n, "lock-taken"));
        format!("{mean:.0}")
    });
    row("times that another vCPU held it", &|n| {
        let times = count(n, "lock-contended");
        let share = 100.0 * per(times, count(n, "lock-taken"));
        format!("{times:.0} ({share:.2} %)")
    });
    row("cycles of spinning then, mean", &|n| {
        let mean = per(count(n, "lock-cycles-waited"), count(n, "lock-contended"));
        format!("{mean:.0}")
    });
    for (title, name) in [
        ("waits so long that the host was asked", "lock-yields"),
        ("kicks of other vCPUs", "kick"),
        ("flushes of other vCPUs", "flush"),
        ("yields of all kinds", "yield"),
        ("waits for an event", "idle"),
        ("host interrupts", "interrupt"),
        ("page faults that filled a shadow", "page-faults-shadow"),
        ("page faults of the guest's own", "page-faults-to-guest"),
    ] {
        row(title, &|n| format!("{:.0}", count(n, name)));
    }
}

/// 0 where there is nothing to divide by.
fn per(a: f64, b: f64) -> f64 {
    if b > 0.0 { a / b } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_becomes_a_section() {
        let mut reader = Reader::new("/nonexistent/pid".into());
        let mut say = |text: &str| {
            reader.write_all(text.as_bytes()).expect("memory");
        };
        say("STORM-PLACE native 0\nSTORM-BEGIN fork\nSTORM fork ops=3000 us=1000000\r\nSTORM-OK\n");
        for round in [1u32, 2, 4] {
            say("STORM-PLACE other 4\nSTORM fork ops=700 us=1000000\n");
            say("STORM-PLACE vm 1\nSTORM fork ops=1000 us=1000000\nSTORM-PLACE vm 4\n");
            say(&format!(
                "STORM fork ops={} us=2000000\ncore:\n  lock-taken  200\n",
                1000 * round
            ));
            say("  lock-contended 3\n  lock-cycles-held 4000\n");
        }
        let text = section(&reader.samples, "6.1", 3).expect("whole");
        assert!(text.starts_with(TITLE) && text.contains("--storm 3") && !text.contains("Before"));
        assert!(
            text.contains("| fork | 3000 / 0 | 1000 / 0 | - | 1000 / 0 | - | 1.00 / 0.00 | - |"),
            "{text}"
        );
        assert!(text.contains("mean | 0 | 0 | 20 |"), "{text}");
        assert!(
            text.contains("held it | 0 (0.00 %) | 0 (0.00 %) | 3 (1.50 %) |"),
            "{text}"
        );
        assert!(section(&BTreeMap::new(), "6.1", 3).is_err());
    }
}
