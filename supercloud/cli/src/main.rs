//! `supercloud`: nodes, and VMs on them that are run, listed and moved by name.

mod add;
mod args;
mod ask;
mod console;
mod cpu;
mod exit;
mod net;
mod node;
mod other;
mod snapshot;
mod vm;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use supercloud_api::Error;

use crate::args::{Arguments, Command, Generated, NodeCommand};
use crate::ask::To;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let json = arguments.json;
    let is_agent = matches!(
        arguments.command,
        Command::Node {
            command: NodeCommand::Start(_)
        }
    );
    start_log(if is_agent { "info" } else { "warn" });
    match run(arguments) {
        Ok(code) => code,
        Err(error) => exit::report(&error, json),
    }
}

fn run(arguments: Arguments) -> Result<ExitCode, Error> {
    let json = arguments.json;
    let to = To {
        node: arguments.node,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Error::failed(format!("threads: {error}")))?;
    runtime.block_on(async {
        match arguments.command {
            Command::Node { command } => node::command(&to, command, json).await,
            Command::Vm { command } => vm::command(&to, command, json).await,
            Command::Net { command } => net::command(&to, command, json).await,
            Command::Snapshot { command } => snapshot::command(&to, command, json).await,
            Command::Image { command } => other::image(&to, command, json).await,
            Command::Operation { command } => other::operation(&to, command, json).await,
            Command::Events => other::events(&to, json).await,
            Command::Metrics => other::metrics(&to).await,
            Command::Openapi => other::openapi(),
            Command::Generate { what } => generate(&what),
        }
    })
}

fn start_log(default: &str) {
    use tracing_subscriber::EnvFilter;
    let filter =
        EnvFilter::try_from_env("SUPERCLOUD_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
}

/// Writes the man pages or a shell's completions, for packages.
fn generate(what: &Generated) -> Result<ExitCode, Error> {
    let mut command = Arguments::command();
    match what {
        Generated::Man { directory } => clap_mangen::generate_to(command, directory)
            .map_err(|error| Error::failed(format!("{}: {error}", directory.display())))?,
        Generated::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut command, "supercloud", &mut text);
            exit::output(&String::from_utf8_lossy(&text))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
