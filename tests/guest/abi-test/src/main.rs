//! Checks what a 64-bit x86 Linux kernel and the machine below it promise to
//! user programs. The same static binary runs on a bare instance and in a
//! guest on it; the lines that it prints must agree.
//!
//! Each line is `PASS name`, `FAIL name: why` or `INFO name: value`; the last
//! one is `ABI n passed, n failed`, and the exit code is 0 when none failed.
//! INFO values may differ between machines; their names may not.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "the program moves raw registers, addresses and C integers about"
)]

mod compat;
mod fpu;
mod harness;
mod machine;
mod memory;
mod privileged;
mod probe;
mod procs;
mod segments;
mod signals;
mod sigreturn;
mod sync;
mod sys;
mod syscalls;
mod time;
mod trace;

use harness::{Check, Options};
use std::process::ExitCode;

const USAGE: &str = "usage: abi-test [--scale F] [--timeout-scale F] [--only PREFIX]... [--except PREFIX]... [--timing] [--list]
       abi-test hotplug            take CPUs off line and back (root, more than one CPU)
       abi-test idle SECONDS       print the CPU time that an idle machine used
       abi-test clock              print CLOCK_REALTIME and CLOCK_MONOTONIC
       abi-test hypervisor         print the hypervisor's name as CPUID tells it to programs
       abi-test cpu                print which of its extensions a program finds, and which it can execute";

/// Every check, grouped by area.
const GROUPS: &[&[Check]] = &[
    signals::CHECKS,
    sigreturn::CHECKS,
    syscalls::CHECKS,
    privileged::CHECKS,
    segments::CHECKS,
    compat::CHECKS,
    trace::CHECKS,
    fpu::CHECKS,
    memory::CHECKS,
    procs::CHECKS,
    sync::CHECKS,
    time::CHECKS,
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["exec-helper", what, ..] => std::process::exit(procs::helper(what)),
        ["hotplug"] => hotplug(3),
        ["idle", seconds] => machine::idle(seconds).map(|()| 0),
        ["clock"] => {
            machine::clock();
            Ok(0)
        }
        ["hypervisor"] => {
            println!("{}", machine::hypervisor());
            Ok(0)
        }
        ["cpu"] => fpu::extensions().map(|line| {
            println!("CPU {line}");
            0
        }),
        _ => run(&args),
    };
    match result {
        Ok(failed) => ExitCode::from(u8::from(failed > 0)),
        Err(message) => {
            eprintln!("abi-test: {message}");
            ExitCode::from(2)
        }
    }
}

/// Runs the checks; the number of those that failed.
fn run(args: &[String]) -> Result<u32, String> {
    let options = parse(args)?;
    let tally = harness::run_all(GROUPS, &options);
    println!("ABI {} passed, {} failed", tally.passed, tally.failed);
    Ok(tally.failed)
}

fn hotplug(rounds: u32) -> Result<u32, String> {
    match machine::hotplug(rounds) {
        Ok(times) => {
            println!("PASS hotplug: {times} times off line and back");
            Ok(0)
        }
        Err(why) => {
            println!("FAIL hotplug: {why}");
            Ok(1)
        }
    }
}

fn parse(args: &[String]) -> Result<Options, String> {
    let mut options = Options {
        scale: 1.0,
        timeout_scale: 1.0,
        only: Vec::new(),
        except: Vec::new(),
        timing: false,
    };
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        let mut value = || {
            args.next()
                .cloned()
                .ok_or_else(|| format!("{arg} needs a value\n{USAGE}"))
        };
        let number = |text: String| {
            text.parse::<f64>()
                .ok()
                .filter(|n| n.is_finite() && *n > 0.0)
                .ok_or_else(|| format!("{text} is not a positive number\n{USAGE}"))
        };
        match arg.as_str() {
            "--scale" => options.scale = number(value()?)?,
            "--timeout-scale" => options.timeout_scale = number(value()?)?,
            "--only" => options.only.push(value()?),
            "--except" => options.except.push(value()?),
            "--timing" => options.timing = true,
            "--list" => {
                for check in GROUPS.iter().flat_map(|group| group.iter()) {
                    println!("{}", check.name);
                }
                std::process::exit(0);
            }
            _ => return Err(format!("{arg} is not an option\n{USAGE}")),
        }
    }
    Ok(options)
}
