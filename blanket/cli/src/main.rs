//! `blanket`: VMs on a machine without nested virtualization.

mod args;
mod audit;
mod client;
mod cloud_init;
mod confine;
mod control;
mod cpu;
mod crash;
mod disk;
mod disk_save;
mod doctor;
mod exit;
mod group;
mod handing;
mod host;
mod keeper;
mod limits;
mod migrate;
mod net;
mod prometheus;
mod registry;
mod run;
mod saved;
mod setting;
mod stats;
mod table;
mod trace;
mod user;

use std::io::Write as _;
use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use crate::args::{Arguments, Command, Format};
use crate::exit::Hint;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    start_log();
    let result = match arguments.command {
        Command::Doctor {
            json,
            force,
            kernel,
        } => doctor::command(json, force, kernel.as_deref()),
        Command::Run(mut run) => run::command(&mut run),
        Command::Cpu { host, json } => cpu::command(host, json),
        Command::Ps { json } => client::ps(json),
        Command::Console { name } => client::console(&name),
        Command::Stats { name, json, format } => {
            let format = if json { Some(Format::Json) } else { format };
            client::stats(name.as_deref(), format.unwrap_or_default())
        }
        Command::Trace {
            name,
            follow,
            off,
            json,
        } => trace::command(&name, follow, off, json),
        Command::Balloon {
            name,
            size,
            timeout,
            json,
        } => client::balloon(&name, size, timeout, json),
        Command::Save {
            name,
            file,
            disks,
            keep_running,
            json,
        } => saved::save(&name, &file, disks, keep_running, json),
        Command::Migrate(wanted) => migrate::command(&wanted),
        Command::Upgrade { name } => client::upgrade(&name),
        Command::Disk { command } => disk::command(&command),
        Command::Net { command } => net::command(&command),
        Command::Audit { name, json } => client::audit(&name, json),
        Command::Stop { name, timeout } => client::stop(&name, timeout),
        Command::Reboot { name, timeout } => client::reboot(&name, timeout),
        Command::Kill { name, waiting } => client::kill(&name, waiting),
        Command::Keep(left) => keeper::command(&left),
        Command::Generate { what } => generate(&what),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            report(&error);
            ExitCode::from(exit::FAILURE)
        }
    }
}

/// Writes an error with its causes, and the command that mends it.
fn report(error: &anyhow::Error) {
    eprintln!("blanket: {}", exit::text(error));
    if let Some(hint) = error.downcast_ref::<Hint>() {
        eprintln!("  {hint}");
    }
}

fn start_log() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("BLANKET_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
}

/// Writes the man pages or a shell's completions, for packages.
fn generate(what: &args::Generated) -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    let mut command = Arguments::command();
    match what {
        args::Generated::Man { directory } => clap_mangen::generate_to(command, directory)?,
        args::Generated::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut command, "blanket", &mut text);
            out.write_all(&text)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
