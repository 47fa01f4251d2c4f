//! `lab-metal`: a bare-metal machine that QEMU plays, with UEFI firmware and AMD-V, on which BMcast starts an OS.

mod bench;
mod checks;
mod demo;
mod faults;
mod image;
mod machine;
mod trace;
mod whole;

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::initramfs::Files;
use crate::project::Project;
use crate::qemu;
use crate::setup::{self, Need};
use machine::{Hardware, Machine, Server};

pub use bench::{TITLE as BENCH_TITLE, run as bench};
pub use checks::{
    check, power_cuts, power_cuts_long, power_cuts_nvme, server_gone, streams, streams_to_nvme,
};
pub use demo::run as demo;
pub use faults::{ahci as faults, next_kernel, nvme as faults_nvme, too_small};
pub use whole::{ahci as debian, nvme as debian_nvme, one_cpu as debian_one_cpu};

/// The machine's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Disk {
    /// SATA, by AHCI.
    Ahci,
    /// NVMe.
    Nvme,
}

/// The VMM's network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Card {
    /// virtio-net.
    Virtio,
    /// Intel 82574L.
    E1000e,
}

/// Arguments of `lab-metal`.
#[derive(clap::Args)]
pub struct Args {
    /// The machine's disk.
    #[arg(long, value_enum, default_value = "ahci")]
    disk: Disk,
    /// CPUs.
    #[arg(long, default_value_t = 2)]
    smp: u32,
    /// Memory.
    #[arg(long, default_value = "1G")]
    memory: String,
    /// Start the OS without BMcast, from a disk that holds the image.
    #[arg(long)]
    native: bool,
    /// Seconds after which the machine is stopped.
    #[arg(long, default_value_t = 300)]
    timeout: u64,
    /// The VMM's network card.
    #[arg(long, value_enum, default_value = "virtio")]
    card: Card,
    /// MiB that the disk has more than the image.
    #[arg(long, default_value_t = 64)]
    more_disk: u64,
    /// Most bytes a second that come while nobody waits for them, such as 2M.
    #[arg(long)]
    rate: Option<String>,
    /// Keep the run's directory under target/lab.
    #[arg(long)]
    keep: bool,
    /// More options for QEMU.
    #[arg(long, allow_hyphen_values = true, default_value = "")]
    qemu: String,
    /// What the OS runs.
    #[arg(last = true)]
    command: Vec<String>,
}

/// Installs what metal needs, and answers with a directory for a run.
fn prepare(project: &Project) -> Result<PathBuf> {
    let needs = [Need::Build, Need::Boot, Need::Images, Need::Metal];
    setup::ensure(project, &needs)?;
    qemu::run_dir(project)
}

/// The `lab-metal` verb.
pub fn run(project: &Project, args: &Args) -> Result<()> {
    let dir = prepare(project)?;
    let command = if args.command.is_empty() {
        "true".to_owned()
    } else {
        args.command.join(" ")
    };
    let image = image::make(project, &dir, &command, &Files::new())?;
    let disk = dir.join("disk.raw");
    let server = if args.native {
        fs::copy(&image, &disk)?;
        None
    } else {
        let size = fs::metadata(&image)?.len();
        File::create(&disk)?.set_len(size + (args.more_disk << 20))?;
        let server = Server::start(project, &image, &dir)?;
        server.medium(project, &dir, args.rate.as_deref())?;
        Some(server)
    };
    let hardware = Hardware {
        disk: args.disk,
        card: args.card,
        smp: args.smp,
        memory: args.memory.clone(),
        extra: args.qemu.split_whitespace().map(str::to_owned).collect(),
        ..Hardware::new(server.is_some())
    };
    let machine = Machine::start(project, &hardware, &dir)?;
    let said = machine.end(Duration::from_secs(args.timeout))?;
    println!("{said}");
    if let Some(server) = &server {
        println!("{}", server.status(false)?);
    }
    ensure!(
        said.contains("METAL-EXIT 0"),
        "the machine did not end as it should: {}",
        dir.display()
    );
    if !args.keep {
        fs::remove_dir_all(&dir)?;
    }
    Ok(())
}
