//! `io-cost`: what a disk or network operation costs the whole machine, in instructions.
//!
//! `io-cost serve` runs in the instance: it says how much the machine's one CPU has worked,
//! and is the other end of the network. `io-cost disk` and `io-cost net` do the operations,
//! in the instance or in a VM on it, and ask the server before and after. Under QEMU's
//! `-icount shift=0` a tick of the time stamp counter is an instruction.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "counts and lengths are far below the limits of the types"
)]

mod aio;
mod client;
mod disk;
mod net;
mod server;

use std::net::Ipv4Addr;
use std::process::ExitCode;

const USAGE: &str = "usage: io-cost serve\n\
                     \x20      io-cost [OPTION]... disk SERVER NAME DEVICE [NAME DEVICE]...\n\
                     \x20      io-cost [OPTION]... net SERVER NAME [tcp-receive, to leave it out]\n\
                     options: --scale F, --reps N, --only DEVICE[/ROW] (the beginning of it) as often as wanted";

/// What goes wrong: in words.
type Result<T> = std::result::Result<T, String>;

/// Names the call that failed.
fn failed(what: &str) -> impl Fn(std::io::Error) -> String + '_ {
    move |error| format!("{what}: {error}")
}

fn run() -> Result<()> {
    let (mut scale, mut reps, mut only) = (1.0, 3, Vec::new());
    let mut words = Vec::new();
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or(format!("{arg} wants a value\n{USAGE}"));
        let wrong = |_| format!("{arg} wants a number\n{USAGE}");
        match arg.as_str() {
            "--scale" => scale = value()?.parse().map_err(|_| wrong(()))?,
            "--reps" => reps = value()?.parse().map_err(|_| wrong(()))?,
            "--only" => only.push(value()?),
            _ => words.push(arg),
        }
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let meter = |address: &str| -> Result<client::Meter> {
        let address: Ipv4Addr = address
            .parse()
            .map_err(|_| format!("{address} is no address\n{USAGE}"))?;
        client::Meter::new(address, scale, reps, &only)
    };
    let mut rows = Vec::new();
    let done = match words[..] {
        ["serve"] => return server::run(),
        ["disk", server, ref disks @ ..] if !disks.is_empty() && disks.len() % 2 == 0 => {
            let meter = meter(server)?;
            disks
                .chunks(2)
                .try_for_each(|disk| disk::rows(&meter, disk[0], disk[1], &mut rows))
        }
        ["net", server, name, ref without @ ..] => {
            net::rows(&meter(server)?, name, without, &mut rows)
        }
        _ => return Err(USAGE.into()),
    };
    // Not before: a console that is written to costs something, too.
    for row in rows {
        println!("{row}");
    }
    done
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("io-cost: {error}");
            ExitCode::FAILURE
        }
    }
}
