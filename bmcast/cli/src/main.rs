//! `bmcast`: serves images to bare-metal machines, makes the media that they boot from, and shows how
//! far they are.

mod args;
mod client;
mod exit;
mod machines;
mod media;
mod profile;
mod range;
mod serve;
mod source;
mod status;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};

use crate::args::{Arguments, Command, Generated};
use crate::exit::Error;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let json = arguments.json;
    let is_server = matches!(arguments.command, Command::Serve(_));
    start_log(if is_server { "info" } else { "warn" });
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => exit::report(&error, json),
    }
}

fn run(arguments: Arguments) -> Result<(), Error> {
    let json = arguments.json;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Error::failed(format!("threads: {error}")))?;
    runtime.block_on(async {
        match arguments.command {
            Command::Serve(arguments) => serve::command(arguments, json).await,
            Command::Manifest(arguments) => source::command(arguments, json),
            Command::Profile(arguments) => profile::command(arguments).await,
            Command::Image(arguments) => media::command(arguments, json).await,
            Command::Status(arguments) => status::command(arguments, json).await,
            Command::Generate { what } => generate(&what),
        }
    })
}

/// Writes the man pages or a shell's completions, for packages.
fn generate(what: &Generated) -> Result<(), Error> {
    let mut command = Arguments::command();
    match what {
        Generated::Man { directory } => clap_mangen::generate_to(command, directory)
            .map_err(|error| Error::file(directory, &error)),
        Generated::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(*shell, &mut command, "bmcast", &mut text);
            exit::output(&String::from_utf8_lossy(&text))
        }
    }
}

fn start_log(default: &str) {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("BMCAST_LOG").unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
}
