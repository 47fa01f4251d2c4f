//! `bench`: one micro benchmark natively in an instance and in VMs on it, under the
//! module and inside KVM.
//!
//! Two boots: one that counts instructions (one nanosecond for each, exact and
//! repeatable), one by the clock, in which QEMU's own counters tell how often
//! the address space was changed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::build;
use crate::guestware;
use crate::initramfs;
use crate::kernels::{self, Flavour};
use crate::lab::Payload;
use crate::monitor::Monitor;
use crate::project::{Project, write_if_changed};
use crate::qemu::{self, End, Hardware, Machine};
use crate::setup::{self, Need};

/// Arguments of `bench`.
#[derive(clap::Args)]
pub struct Args {
    /// CPU model of the instance; one without SVM has no VM inside KVM.
    #[arg(long, default_value = "max")]
    cpu: String,
    /// Kernel of the instance and of the VM.
    #[arg(long, default_value = "cloud")]
    kernel: Flavour,
    /// Work of each row, as a part of its full count.
    #[arg(long, default_value_t = 0.3)]
    scale: f64,
    /// Repetitions of each row; the median is reported.
    #[arg(long, default_value_t = 5)]
    reps: u32,
    /// Only rows whose names begin so; prints, and leaves docs/benchmarks.md alone.
    #[arg(long)]
    only: Vec<String>,
    /// Only the run that counts instructions; leaves docs/benchmarks.md alone.
    #[arg(long)]
    instructions: bool,
    /// Instead of all that: so many small VMs at once, and what each costs beside its
    /// memory; writes its section of docs/benchmarks.md.
    #[arg(long, value_name = "VMS")]
    density: Option<u32>,
    /// Instead of all that: processes, mappings and pipe traffic by many workers at once,
    /// natively and in VMs with 1, 2 and 4 vCPUs on two CPUs, so many times; writes its
    /// section of docs/benchmarks.md.
    #[arg(long, value_name = "ROUNDS", num_args = 0..=1, default_missing_value = "3")]
    storm: Option<u32>,
    /// Only these kinds of storm; prints, and leaves docs/benchmarks.md alone.
    #[arg(long, requires = "storm")]
    kind: Vec<String>,
    /// A directory with a `blanket.ko` and a `blanket` that another state of the tree has
    /// made with `build --measured`, to take turns with this one.
    #[arg(long, value_name = "DIR", requires = "storm")]
    against: Option<PathBuf>,
    /// Instead of all that: what so many moves of a VM cost, beside QEMU's own live migration
    /// of the same guest; writes its section of docs/benchmarks.md.
    #[arg(long, value_name = "MOVES", num_args = 0..=1, default_missing_value = "3")]
    moves: Option<u32>,
    /// Instead of all that: what disks and networks cost, natively and in VMs, by instruction
    /// count; writes its section of docs/benchmarks.md. Rows are called `disk/read-4k`,
    /// `tap/udp-send` and so on.
    #[arg(long)]
    io: bool,
    /// Instead of all that: what BMcast costs a bare-metal machine; writes its section of docs/benchmarks.md.
    #[arg(long)]
    metal: bool,
    /// Compare what the VMs cost against native with docs/benchmarks.tsv, by instruction
    /// count, and fail if a row is more than 5 % dearer.
    #[arg(long)]
    guard: bool,
    /// Leave out the VM inside KVM.
    #[arg(long)]
    no_kvm: bool,
}

impl Args {
    /// What each test run compares: a row for each way into the core, under the module.
    pub fn short_guard() -> Self {
        Self {
            cpu: "max".into(),
            kernel: Flavour::Cloud,
            scale: 0.3,
            reps: 5,
            only: GUARDED.iter().map(|&row| row.to_owned()).collect(),
            instructions: true,
            guard: true,
            density: None,
            moves: None,
            storm: None,
            kind: Vec::new(),
            against: None,
            io: false,
            metal: false,
            no_kvm: true,
        }
    }

    /// All rows, under the module and inside KVM.
    pub fn long_guard() -> Self {
        Self {
            only: Vec::new(),
            no_kvm: false,
            ..Self::short_guard()
        }
    }
}

/// System call, signal and fault, context switch, page tables.
const GUARDED: &[&str] = &[
    "sys_null",
    "sig_prot_fault",
    "ctx_2p_0K",
    "fault_anon",
    "fault_cow",
    "mprotect_pair",
];

/// How much dearer a row may be than the committed one.
const TOLERANCE: f64 = 1.05;
/// The committed counts.
const COMMITTED: &str = "docs/benchmarks.tsv";

const REFERENCE: &str = include_str!("../../tests/lab-scripts/xen-reference.tsv");

/// One row as one run gave it.
#[derive(Clone, Debug, PartialEq)]
struct Row {
    name: String,
    unit: String,
    value: f64,
    /// Operations in one repetition.
    count: f64,
    /// Address space changes for one operation.
    loads: Option<f64>,
}

/// Rows of the instance and of the VMs.
#[derive(Default)]
struct Run {
    native: Vec<Row>,
    module: Vec<Row>,
    kvm: Vec<Row>,
    /// What the core and KVM counted over all rows, as `blanket run` prints it.
    exits: Vec<(String, u64)>,
}

/// Where the rows that come are from.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Part {
    #[default]
    Native,
    Module,
    Kvm,
    /// Behind the VM's rows: its counters, under one of these titles.
    Exits,
}

/// The `bench` verb.
pub fn run(project: &Project, args: &Args) -> Result<()> {
    setup::ensure(project, &[Need::Build, Need::Boot])?;
    if let Some(guests) = args.density {
        return crate::density::run(project, guests);
    }
    if let Some(moves) = args.moves {
        return crate::moves::run(project, moves);
    }
    if let Some(rounds) = args.storm {
        return crate::storm::run(project, rounds, &args.kind, args.against.as_deref());
    }
    if args.metal {
        return crate::metal::bench(project);
    }
    if args.io {
        return crate::io_cost::run(project, args.scale, args.reps, !args.no_kvm, &args.only);
    }
    let counted = boot(project, args, true)?;
    if args.guard {
        return guard(project, &counted);
    }
    let clocked = if args.instructions {
        Run::default()
    } else {
        boot(project, args, false)?
    };
    let text = format!("{}{}", table(&counted, &clocked)?, exits(&counted.exits));
    println!("{text}");
    if args.only.is_empty() && !args.no_kvm {
        write_if_changed(
            &project.root.join(COMMITTED),
            committed(&counted).as_bytes(),
        )?;
    }
    if args.only.is_empty() && !args.instructions {
        let release = kernels::fetch(project, args.kernel)?.release;
        let page = page(args, &release, &text)
            + &crate::page::section(project, crate::storm::TITLE)
            + &crate::page::section(project, crate::density::TITLE)
            + &crate::page::section(project, crate::moves::TITLE)
            + &crate::page::section(project, crate::io_cost::TITLE)
            + &crate::page::section(project, crate::metal::BENCH_TITLE);
        write_if_changed(&project.root.join(crate::page::PAGE), page.as_bytes())?;
    }
    Ok(())
}

/// The counts of a run as they are committed.
fn committed(run: &Run) -> String {
    let mut text = String::from(
        "# The instruction counts of benchmarks.md for programs: what `cargo xtask bench --guard`\n\
         # compares with. Written by `cargo xtask bench --instructions`.\n\
         # operation, unit, native, VM under the module, VM inside KVM\n",
    );
    for row in &run.native {
        let of = |rows: &[Row]| {
            rows.iter()
                .find(|vm| vm.name == row.name)
                .map_or("-".into(), |vm| number(vm.value))
        };
        let _ = writeln!(
            text,
            "{}\t{}\t{}\t{}\t{}",
            row.name,
            row.unit,
            number(row.value),
            of(&run.module),
            of(&run.kvm)
        );
    }
    text
}

/// Compares a run with the committed counts.
fn guard(project: &Project, run: &Run) -> Result<()> {
    let path = project.root.join(COMMITTED);
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let compared = compare(&text, run)?;
    for line in &compared.lines {
        println!("{line}");
    }
    ensure!(compared.rows > 0, "no row was compared");
    ensure!(
        compared.dearer.is_empty(),
        "more than {:.0} % dearer than in {COMMITTED}: {}",
        (TOLERANCE - 1.0) * 100.0,
        compared.dearer.join(", ")
    );
    Ok(())
}

/// How a run stands against the committed counts.
#[derive(Default)]
struct Compared {
    lines: Vec<String>,
    rows: usize,
    dearer: Vec<String>,
}

/// It is the cost against native that is compared: a native row that changed, because
/// the stock kernel did, changes both.
fn compare(committed: &str, run: &Run) -> Result<Compared> {
    let mut compared = Compared::default();
    for line in committed.lines().filter(|line| !line.starts_with('#')) {
        let cells: Vec<&str> = line.split('\t').collect();
        let [name, unit, native, module, kvm] = cells[..] else {
            bail!("{COMMITTED} has a bad line: {line}")
        };
        let Some(now) = run.native.iter().find(|row| row.name == name) else {
            continue;
        };
        for (host, rows, then) in [("module", &run.module, module), ("KVM", &run.kvm, kvm)] {
            let Some(vm) = rows.iter().find(|row| row.name == name) else {
                continue;
            };
            let (Ok(native), Ok(then)) = (native.parse::<f64>(), then.parse::<f64>()) else {
                bail!("{COMMITTED} has no number for {name} ({host})")
            };
            let before = ratio(unit, then, native);
            let after = ratio(unit, vm.value, now.value);
            let change = after / before;
            compared.rows += 1;
            compared.lines.push(format!(
                "{name} {host}: {before:.3} of native, now {after:.3} ({:+.1} %)",
                (change - 1.0) * 100.0
            ));
            if change > TOLERANCE {
                compared.dearer.push(format!("{name} ({host})"));
            }
        }
    }
    Ok(compared)
}

fn boot(project: &Project, args: &Args, icount: bool) -> Result<Run> {
    let kernel = kernels::fetch(project, args.kernel)?;
    let programs = guestware::programs(project)?;
    let mut micro = format!(
        "micro --hello /bin/hello --scale {} --reps {}",
        args.scale, args.reps
    );
    for only in &args.only {
        let _ = write!(micro, " --only '{only}'");
    }
    // When counting, the console's traffic must stay out of the measure; by the
    // clock, each row must come when it is done, for its counters to be read.
    let measure = if icount {
        format!("{micro} >/tmp/out; cat /tmp/out")
    } else {
        micro
    };
    let mut payload = Payload::new(project, &kernel, Hardware::Virtio, &args.cpu)?;
    payload.module(&build::module_for(project, &kernel)?);
    payload.program(&build::command(project)?)?;
    payload.archive.add(&programs);
    payload.guest_kernel(&kernel);
    payload.guest_initrd(&initramfs::guest(project, Some(&measure), &programs)?)?;
    let vm = |host: &str| {
        format!(
            "echo BENCH-{host}\nblanket run --host {host} --kernel /guest/vmlinuz \
             --initrd /guest/initrd.img --memory 1024M --cpus 1 --stats-on-exit \
             --cmdline 'console=hvc0 quiet' || exit\n"
        )
    };
    let inside_kvm = qemu::has_svm(&args.cpu) && !args.no_kvm;
    payload.command(&format!(
        "echo BENCH-native\n({measure})\n{}{}",
        vm("module"),
        if inside_kvm { vm("kvm") } else { String::new() }
    ));
    let machine = Machine {
        smp: 1,
        icount,
        ..Machine::new(&args.cpu, kernel, "2560M")
    };
    let dir = qemu::run_dir(project)?;
    let counters = (!icount).then(|| dir.join("qmp"));
    let mut reader = Reader::new(counters, args.reps);
    let timeout = Duration::from_secs(3000);
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
        bail!("the benchmark's instance ended with {:?}", outcome.end);
    }
    outcome.discard();
    ensure!(
        !reader.run.native.is_empty(),
        "no row came from the instance"
    );
    ensure!(!reader.run.module.is_empty(), "no row came from the VM");
    ensure!(
        !inside_kvm || !reader.run.kvm.is_empty(),
        "no row came from the VM inside KVM"
    );
    Ok(reader.run)
}

/// Takes rows out of the output as it comes.
struct Reader {
    held: Vec<u8>,
    run: Run,
    part: Part,
    /// QEMU's control socket, when its counters are wanted.
    socket: Option<PathBuf>,
    counters: Option<Counters>,
    last: Option<f64>,
    reps: u32,
}

impl Reader {
    fn new(socket: Option<PathBuf>, reps: u32) -> Self {
        Self {
            held: Vec::new(),
            run: Run::default(),
            part: Part::default(),
            socket,
            counters: None,
            last: None,
            reps,
        }
    }

    fn line(&mut self, line: &str) {
        println!("{line}");
        match line {
            "BENCH-module" => self.part = Part::Module,
            "BENCH-kvm" => self.part = Part::Kvm,
            "exits:" | "kvm:" if matches!(self.part, Part::Kvm | Part::Exits) => {
                self.part = Part::Exits;
            }
            _ if line.ends_with(':') && self.part == Part::Exits => self.part = Part::Kvm,
            _ => {}
        }
        if self.part == Part::Exits {
            let mut words = line.split_whitespace();
            if let (Some(name), Some(Ok(count))) = (words.next(), words.next().map(str::parse)) {
                self.run.exits.push((name.to_owned(), count));
            }
            return;
        }
        let row = parse(line);
        // The first sample of a list is at its head line.
        if row.is_none() && !line.starts_with("# micro") {
            return;
        }
        let now = self.sample();
        if let Some(mut row) = row {
            if let (Some(now), Some(last)) = (now, self.last) {
                row.loads = Some((now - last) / operations(&row, self.reps));
            }
            match self.part {
                Part::Native => self.run.native.push(row),
                Part::Module => self.run.module.push(row),
                Part::Kvm | Part::Exits => self.run.kvm.push(row),
            }
        }
        self.last = now;
    }

    fn sample(&mut self) -> Option<f64> {
        let socket = self.socket.as_ref()?;
        if self.counters.is_none() {
            self.counters = Counters::open(socket).ok();
        }
        self.counters.as_mut()?.flushes().ok()
    }
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

/// How often micro did the operation in all, with its warm-up.
fn operations(row: &Row, reps: u32) -> f64 {
    let warm_up = if row.unit == "ns" {
        (row.count / 8.0).floor().max(1.0)
    } else {
        1.0
    };
    row.count * f64::from(reps) + warm_up
}

/// `sys_null  337.2 ns   # spread -0.0%..+0.0% n=30000`
fn parse(line: &str) -> Option<Row> {
    let mut words = line.split_whitespace();
    let (name, value, unit) = (words.next()?, words.next()?, words.next()?);
    if unit != "ns" && unit != "MiB/s" {
        return None;
    }
    let count = words
        .find_map(|word| word.strip_prefix("n="))?
        .parse()
        .ok()?;
    Some(Row {
        name: name.into(),
        unit: unit.into(),
        value: value.parse().ok()?,
        count,
        loads: None,
    })
}

/// QEMU's counters of its TLB.
struct Counters {
    monitor: Monitor,
    /// MMU modes that this QEMU keeps a TLB for.
    modes: f64,
}

impl Counters {
    fn open(socket: &Path) -> Result<Self> {
        let mut monitor = Monitor::open(socket)?;
        let version = monitor.ask(r#"{"execute":"query-version"}"#)?;
        // `NB_MMU_MODES`: 8 for x86 up to QEMU 7, 16 for all targets since.
        let modes = if version["qemu"]["major"] == 7 {
            8.0
        } else {
            16.0
        };
        Ok(Self { monitor, modes })
    }

    /// Times that the whole TLB was flushed. On a CPU without PCIDs that is what
    /// a load of CR3 does; QEMU counts it once for each of its MMU modes.
    fn flushes(&mut self) -> Result<f64> {
        let answer = self.monitor.ask(
            r#"{"execute":"human-monitor-command","arguments":{"command-line":"info jit"}}"#,
        )?;
        let answer = answer.as_str().context("QEMU's monitor says no text")?;
        let number = |name: &str| -> Result<f64> {
            let (_, rest) = answer
                .split_once(name)
                .with_context(|| format!("QEMU tells no {name}"))?;
            let digits: String = rest
                .trim_start()
                .chars()
                .take_while(char::is_ascii_digit)
                .collect();
            Ok(digits.parse()?)
        };
        let partial = number("TLB partial flushes")? + number("TLB elided flushes")?;
        Ok(number("TLB full flushes")? + partial / self.modes)
    }
}

/// Rows that count into the mean: not bare computing, bandwidth, or the clock.
fn in_mean(name: &str) -> bool {
    !["cpu_", "bw_", "clock_"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
}

/// Cost of `value` as a multiple of `base`.
fn ratio(unit: &str, value: f64, base: f64) -> f64 {
    if unit == "ns" {
        value / base
    } else {
        base / value
    }
}

#[derive(Default)]
struct Mean {
    log: f64,
    count: f64,
}

impl Mean {
    fn add(&mut self, ratio: f64) {
        self.log += ratio.ln();
        self.count += 1.0;
    }

    fn text(&self) -> String {
        if self.count == 0.0 {
            "-".into()
        } else {
            format!("{:.2}", (self.log / self.count).exp())
        }
    }
}

fn table(counted: &Run, clocked: &Run) -> Result<String> {
    let by_name = |rows: &[Row]| -> BTreeMap<String, Row> {
        rows.iter()
            .map(|row| (row.name.clone(), row.clone()))
            .collect()
    };
    let (guest, kvm) = (by_name(&counted.module), by_name(&counted.kvm));
    let (clock_native, clock_guest) = (by_name(&clocked.native), by_name(&clocked.module));
    let clock_kvm = by_name(&clocked.kvm);
    let mut xen = BTreeMap::new();
    for line in REFERENCE.lines().filter(|line| !line.starts_with('#')) {
        let cells: Vec<&str> = line.split('\t').collect();
        let [name, unit, native, pv, loads] = cells[..] else {
            bail!("xen-reference.tsv has a bad line: {line}")
        };
        let cost = ratio(unit, pv.parse()?, native.parse()?);
        xen.insert(name, (cost, loads));
    }
    let mut text = String::from(
        "| operation | unit | native | VM | VM in KVM | VM/native | KVM/native | Xen PV/native \
         | CR3 loads native | VM | Xen PV | by the clock: native | VM | VM in KVM | VM/native |\n\
         |---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    let mut mean = Mean::default();
    let mut kvm_mean = Mean::default();
    let mut xen_mean = Mean::default();
    let mut clock_mean = Mean::default();
    for row in &counted.native {
        let Some(vm) = guest.get(&row.name) else {
            continue;
        };
        let cost = ratio(&row.unit, vm.value, row.value);
        let inside = kvm.get(&row.name);
        let inside_cost = inside.map(|vm| ratio(&row.unit, vm.value, row.value));
        let reference = xen.get(row.name.as_str());
        let clocks = clock_native.get(&row.name).zip(clock_guest.get(&row.name));
        if in_mean(&row.name) {
            mean.add(cost);
            if let Some(cost) = inside_cost {
                kvm_mean.add(cost);
            }
            if let Some((cost, _)) = reference {
                xen_mean.add(*cost);
            }
            if let Some((native, vm)) = clocks {
                clock_mean.add(ratio(&row.unit, vm.value, native.value));
            }
        }
        let loads = |row: Option<&Row>| {
            row.and_then(|row| row.loads)
                .map_or("-".into(), |loads| format!("{loads:.1}"))
        };
        let _ = write!(
            text,
            "| {} | {} | {} | {} | {} | {cost:.2} | {} | {} | {} | {} | {} ",
            row.name,
            row.unit,
            number(row.value),
            number(vm.value),
            inside.map_or("-".into(), |vm| number(vm.value)),
            inside_cost.map_or("-".into(), |cost| format!("{cost:.2}")),
            reference.map_or("-".into(), |(cost, _)| format!("{cost:.2}")),
            loads(clock_native.get(&row.name)),
            loads(clock_guest.get(&row.name)),
            reference.map_or("-", |(_, loads)| loads),
        );
        let _ = match clocks {
            Some((native, vm)) => writeln!(
                text,
                "| {} | {} | {} | {:.2} |",
                number(native.value),
                number(vm.value),
                clock_kvm
                    .get(&row.name)
                    .map_or("-".into(), |vm| number(vm.value)),
                ratio(&row.unit, vm.value, native.value)
            ),
            None => writeln!(text, "| - | - | - | - |"),
        };
    }
    let _ = writeln!(
        text,
        "| **geometric mean** | | | | | **{}** | **{}** | {} | | | | | | | {} |",
        mean.text(),
        kvm_mean.text(),
        xen_mean.text(),
        clock_mean.text()
    );
    Ok(text)
}

/// What the VM inside KVM left the guest for, over all rows.
fn exits(counters: &[(String, u64)]) -> String {
    if counters.is_empty() {
        return String::new();
    }
    let mut text = String::from(
        "\nWhat the VM inside KVM counted over its whole life: first what the core asked of its \
         host, most of which it answers without an exit, then KVM's own counters.\n\n\
         | counter | times |\n|---|---:|\n",
    );
    for (name, count) in counters {
        let _ = writeln!(text, "| {name} | {count} |");
    }
    text
}

fn number(value: f64) -> String {
    if value < 1000.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

fn page(args: &Args, release: &str, table: &str) -> String {
    format!(
        "# Benchmarks\n\n\
         Made by `cargo xtask bench --cpu {} --kernel {} --scale {} --reps {}`, which writes this \
         page.\n\n\
         The same static program, `tests/guest/micro`, runs natively in an instance (QEMU's \
         translator, one CPU), then in a VM on that instance under the module, and then in one \
         inside the instance's KVM, which QEMU emulates (one vCPU, 1024 MiB). All run the stock \
         kernel {release}. The first columns count instructions exactly: one nanosecond is \
         one instruction of the whole machine, the core, the module and KVM included. The CR3 loads are \
         changes of address space for one operation, as QEMU counts them in the second boot, and \
         the last columns are that boot by the clock. An emulator's clock says little about \
         hardware: in it a CR3 load costs microseconds, and what else runs on the machine shows.\n\n\
         The Xen PV columns are Xen 4.17 with the same kernel as a PV guest, measured once with the \
         same rows and the same settings (`tests/lab-scripts/xen-reference.tsv`). Bandwidth rows \
         (MiB/s) show the cost as native divided by VM. The mean leaves out `cpu_`, `bw_` and \
         `clock_` rows.\n\n\
         {table}",
        args.cpu, args.kernel, args.scale, args.reps
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows() {
        let row = parse("sys_null     337.2 ns   # spread -0.0%..+0.0% n=30000").unwrap();
        assert_eq!(
            (row.name.as_str(), row.value, row.count),
            ("sys_null", 337.2, 30000.0)
        );
        assert_eq!(operations(&row, 5), 153_750.0);
        assert_eq!(parse("# micro scale=0.3 reps=5"), None);
        assert_eq!(parse("GUEST-READY 6.1.0-56-cloud-amd64 now"), None);
    }

    #[test]
    fn the_guard_tells_dearer_rows() {
        let row = |name: &str, unit: &str, value| Row {
            name: name.into(),
            unit: unit.into(),
            value,
            count: 8.0,
            loads: None,
        };
        let committed = "# text\na\tns\t100.0\t200.0\t300.0\nbw\tMiB/s\t100.0\t50.0\t50.0\n\
                         other\tns\t1.0\t1.0\t1.0\n";
        let run = |vm, kvm, bandwidth| Run {
            native: vec![row("a", "ns", 50.0), row("bw", "MiB/s", 100.0)],
            module: vec![row("a", "ns", vm), row("bw", "MiB/s", bandwidth)],
            kvm: vec![row("a", "ns", kvm)],
            ..Run::default()
        };
        let good = compare(committed, &run(104.0, 140.0, 48.0)).unwrap();
        assert_eq!((good.rows, good.dearer.len()), (3, 0), "{:?}", good.lines);
        let bad = compare(committed, &run(106.0, 160.0, 47.0)).unwrap();
        assert_eq!(bad.dearer, ["a (module)", "a (KVM)", "bw (module)"]);
        assert!(compare("a b c", &run(1.0, 1.0, 1.0)).is_err());
    }

    #[test]
    fn table_has_rows_and_mean() {
        let row = |name: &str, value| Row {
            name: name.into(),
            unit: "ns".into(),
            value,
            count: 8.0,
            loads: None,
        };
        let run = Run {
            native: vec![row("sys_null", 100.0)],
            module: vec![row("sys_null", 250.0)],
            kvm: vec![row("sys_null", 260.0)],
            ..Run::default()
        };
        let text = table(&run, &Run::default()).unwrap();
        assert!(
            text.contains("| sys_null | ns | 100.0 | 250.0 | 260.0 | 2.50 | 2.60 | 2.95 |"),
            "{text}"
        );
        assert!(text.contains("**2.50** | **2.60** | 2.95"), "{text}");
    }
}
