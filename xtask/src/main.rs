//! `cargo xtask`: builds, boots, tests and packages Blanket.
//!
//! One file for each verb; what several verbs need is in [`project`] (paths),
//! [`kernels`] (stock Debian kernels), [`initramfs`] and [`qemu`].

mod abi_check;
mod apt;
mod audit_check;
mod bench;
mod boot_check;
mod build;
mod cases;
mod compile_check;
mod debian;
mod demo;
mod density;
mod everywhere;
mod fetch_check;
mod gdb;
mod guestware;
mod initramfs;
mod io_cost;
mod kernels;
mod lab;
mod measured;
mod metal;
mod monitor;
mod moves;
mod package;
mod page;
mod project;
mod qemu;
mod scripts;
mod setup;
mod storm;
mod system;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Builds, boots, tests and packages Blanket.
#[derive(Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install the Debian packages that the other verbs need.
    Setup,
    /// Two stock kernels as VMs on an instance without nested virtualization.
    Demo(demo::Args),
    /// Check everything: style, unit tests, whole systems in the lab.
    Test(test::Args),
    /// A micro benchmark natively and in a VM, by instruction count and clock.
    Bench(bench::Args),
    /// Debian packages of the command and the module.
    Package(package::Args),
    /// Make a disk image of a whole Debian 12, and say where it is.
    Image(debian::Args),
    /// Build the core image, the kernel module and the static `blanket` command.
    Build(build::Args),
    /// Boot stock-kernel instances in QEMU and run a command in the first.
    Lab(lab::Args),
    /// Boot a bare-metal machine, played by QEMU, whose image streams in.
    LabMetal(metal::Args),
    /// An empty bare-metal machine, played by QEMU, that has its OS at once.
    DemoMetal,
}

fn main() -> ExitCode {
    match verb(&Cli::parse().verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn verb(verb: &Verb) -> anyhow::Result<()> {
    let project = project::Project::locate()?;
    match verb {
        Verb::Setup => setup::run(&project),
        Verb::Demo(args) => demo::run(&project, args),
        Verb::Test(args) => test::run(&project, args),
        Verb::Bench(args) => bench::run(&project, args),
        Verb::Package(args) => package::run(&project, args),
        Verb::Image(args) => debian::run(&project, args),
        Verb::Build(args) => build::run(&project, args),
        Verb::Lab(args) => lab::run(&project, args),
        Verb::LabMetal(args) => metal::run(&project, args),
        Verb::DemoMetal => metal::demo(&project),
    }
}
