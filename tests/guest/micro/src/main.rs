//! `micro`: times small kernel operations, each the median of some
//! repetitions, and prints `name value unit` lines.
//!
//! The rows, operations and counts follow the project's table of native Linux
//! and real Xen PV, so that its figures compare. Under an instruction-counting
//! emulator (1 ns = 1 instruction) the values are exact instruction counts.
//!
//! Rust's start-up code is left out (`no_main`): it makes a signal stack and
//! other memory that every fork would have to copy.

#![no_main]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    clippy::cast_precision_loss,
    reason = "counts and times are far below the limits of the types"
)]

mod cpu;
mod ipc;
mod kernel;
mod memory;
mod process;
mod sys;

use std::fmt::Write as _;
use std::io::Write as _;
use sys::Bench;

/// What a row's value means.
#[derive(Clone, Copy, PartialEq)]
enum Unit {
    /// Nanoseconds for one operation.
    Nanoseconds,
    /// Mebibytes a second; one operation moves 1 MiB.
    MebibytesPerSecond,
}

impl Unit {
    fn name(self) -> &'static str {
        match self {
            Self::Nanoseconds => "ns",
            Self::MebibytesPerSecond => "MiB/s",
        }
    }
}

/// One row: `run` does that many operations and returns nanoseconds for all.
struct Row {
    name: &'static str,
    run: fn(&Bench, u64) -> f64,
    /// Operations in one repetition at scale 1.
    count: f64,
    unit: Unit,
}

const fn ns(name: &'static str, run: fn(&Bench, u64) -> f64, count: f64) -> Row {
    Row {
        name,
        run,
        count,
        unit: Unit::Nanoseconds,
    }
}

const fn rate(name: &'static str, run: fn(&Bench, u64) -> f64, count: f64) -> Row {
    Row {
        name,
        run,
        count,
        unit: Unit::MebibytesPerSecond,
    }
}

const ROWS: &[Row] = &[
    ns("sys_null", kernel::null, 100_000.0),
    ns("sys_read_zero", kernel::read_zero, 50_000.0),
    ns("sys_write_null", kernel::write_null, 50_000.0),
    ns("sys_stat", kernel::stat, 15_000.0),
    ns("sys_open_close", kernel::open_close, 8_000.0),
    ns("sys_select64", kernel::select64, 4_000.0),
    ns("sys_sched_yield", kernel::sched_yield, 30_000.0),
    ns("clock_gettime", kernel::clock_gettime, 50_000.0),
    ns("sig_install", kernel::signal_install, 50_000.0),
    ns("sig_deliver", kernel::signal_deliver, 15_000.0),
    ns("sig_prot_fault", memory::protection_fault, 6_000.0),
    ns("pipe_roundtrip", ipc::pipe_roundtrip, 4_000.0),
    ns("unix_roundtrip", ipc::unix_roundtrip, 3_000.0),
    ns("ctx_2p_0K", ipc::context_switch_0k, 4_000.0),
    ns("ctx_2p_64K", ipc::context_switch_64k, 3_000.0),
    ns("fork_exit_wait", process::fork_exit, 120.0),
    ns("fork_exec_wait", process::fork_exec, 60.0),
    ns("fork_sh_c", process::fork_shell, 20.0),
    ns("fault_file_around16", memory::fault_file, 4_000.0),
    ns("fault_anon", memory::fault_anonymous, 16_000.0),
    ns("fault_cow", memory::fault_copy, 5_000.0),
    ns("mmap_munmap_1M", memory::map_unmap, 5_000.0),
    ns("mmap_touch_file_1M", memory::touch_file, 250.0),
    ns("mmap_touch_anon_1M", memory::touch_anonymous, 80.0),
    ns("mprotect_pair", memory::mprotect_pair, 6_000.0),
    ns("cpu_double_div", cpu::double_division, 1e6),
    ns("cpu_int_xorshift", cpu::xorshift, 1e7),
    rate("bw_unix", ipc::unix_bandwidth, 24.0),
    rate("bw_pipe", ipc::pipe_bandwidth, 48.0),
    rate("bw_mem_read", memory::read_bandwidth, 150.0),
    rate("bw_mem_write", memory::write_bandwidth, 100.0),
    rate("bw_mem_copy", memory::copy_bandwidth, 300.0),
];

const USAGE: &str = "usage: micro [--scale F] [--reps N] [--only PREFIX]... [--hello PATH] [--file PATH] [--json] [--list] [--tsc]";

struct Options {
    scale: f64,
    reps: usize,
    only: Vec<String>,
    hello: String,
    file: String,
    json: bool,
}

/// The median and the range of one row's repetitions.
struct Measured {
    name: &'static str,
    unit: Unit,
    median: f64,
    low: f64,
    high: f64,
    count: u64,
}

/// Entry point that the C library calls.
#[unsafe(no_mangle)]
pub extern "C" fn main() -> i32 {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|a| a == "--tsc") {
        println!("TSC {} MONO {:.0}", sys::tsc(), sys::now());
        return 0;
    }
    if args.iter().any(|a| a == "--list") {
        for row in ROWS {
            println!("{}", row.name);
        }
        return 0;
    }
    match parse(&args).and_then(|options| run(&options)) {
        Ok(()) => 0,
        Err(message) => {
            eprintln!("micro: {message}");
            2
        }
    }
}

fn parse(args: &[String]) -> Result<Options, String> {
    let mut options = Options {
        scale: 1.0,
        reps: 7,
        only: Vec::new(),
        hello: "/hello".to_string(),
        file: "/tmp/micro.file".to_string(),
        json: false,
    };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || {
            args.next()
                .cloned()
                .ok_or_else(|| format!("{arg} needs a value\n{USAGE}"))
        };
        let bad = |text: &str| format!("{text} is not a good value for {arg}\n{USAGE}");
        match arg.as_str() {
            "--scale" => {
                let text = value()?;
                let scale = text
                    .parse()
                    .ok()
                    .filter(|s: &f64| s.is_finite() && *s > 0.0);
                options.scale = scale.ok_or_else(|| bad(&text))?;
            }
            "--reps" => {
                let text = value()?;
                let reps = text.parse().ok().filter(|r| (1..=1000).contains(r));
                options.reps = reps.ok_or_else(|| bad(&text))?;
            }
            "--only" => options.only.push(value()?),
            "--hello" => options.hello = value()?,
            "--file" => options.file = value()?,
            "--json" => options.json = true,
            _ => return Err(format!("{arg} is not an option\n{USAGE}")),
        }
    }
    Ok(options)
}

fn run(options: &Options) -> Result<(), String> {
    let bench = Bench::new(&options.file, &options.hello)?;
    let begun = (sys::now(), sys::tsc());
    if !options.json {
        println!("# micro scale={} reps={}", options.scale, options.reps);
    }
    let mut rows = Vec::new();
    for row in ROWS {
        if !options.only.is_empty()
            && !options
                .only
                .iter()
                .any(|p| row.name.starts_with(p.as_str()))
        {
            continue;
        }
        let measured = measure(row, &bench, options);
        if !options.json {
            print_line(&measured)?;
        }
        rows.push(measured);
    }
    let seconds = (sys::now() - begun.0) / 1e9;
    let tsc_per_ns = (sys::tsc() - begun.1) as f64 / (seconds * 1e9);
    if options.json {
        println!("{}", json(&rows, options, seconds, tsc_per_ns));
    } else {
        println!("# total {seconds:.2} s (CLOCK_MONOTONIC), tsc {tsc_per_ns:.6} ticks/ns");
    }
    bench.remove_file();
    if rows.is_empty() {
        Err("no row has that name".to_string())
    } else {
        Ok(())
    }
}

fn measure(row: &Row, bench: &Bench, options: &Options) -> Measured {
    let least = if row.count < 1000.0 { 4 } else { 32 };
    let count = ((row.count * options.scale) as u64)
        .max(least)
        .next_multiple_of(8);
    let warm_up = if row.unit == Unit::MebibytesPerSecond {
        1
    } else {
        (count / 8).max(1)
    };
    (row.run)(bench, warm_up);
    let mut values: Vec<f64> = Vec::with_capacity(options.reps);
    for _ in 0..options.reps {
        let each = (row.run)(bench, count) / count as f64;
        values.push(if row.unit == Unit::MebibytesPerSecond {
            1e9 / each
        } else {
            each
        });
    }
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let median = if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(values[middle - 1], values[middle])
    };
    Measured {
        name: row.name,
        unit: row.unit,
        median,
        low: values[0],
        high: values[values.len() - 1],
        count,
    }
}

fn print_line(m: &Measured) -> Result<(), String> {
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:<20} {:>10.1} {}   # spread {:+.1}%..{:+.1}% n={}",
        m.name,
        m.median,
        m.unit.name(),
        (m.low / m.median - 1.0) * 100.0,
        (m.high / m.median - 1.0) * 100.0,
        m.count
    )
    .and_then(|()| out.flush())
    .map_err(|e| format!("standard output: {e}"))
}

fn json(rows: &[Measured], options: &Options, seconds: f64, tsc_per_ns: f64) -> String {
    let mut text = format!(
        "{{\"scale\":{},\"reps\":{},\"seconds\":{seconds},\"tsc_per_ns\":{tsc_per_ns},\"rows\":[",
        options.scale, options.reps
    );
    for (i, m) in rows.iter().enumerate() {
        let comma = if i == 0 { "" } else { "," };
        let unit = m.unit.name();
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "{comma}{{\"name\":\"{}\",\"value\":{},\"unit\":\"{unit}\",\"low\":{},\"high\":{},\"n\":{}}}",
            m.name, m.median, m.low, m.high, m.count
        );
    }
    text.push_str("]}");
    text
}
