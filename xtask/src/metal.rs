//! `lab-metal`: a bare-metal machine that QEMU plays, with UEFI firmware and AMD-V, on which BMcast starts an OS.

mod image;

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::build;
use crate::project::Project;
use crate::qemu;
use crate::setup::{self, Need};

/// The machine's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Disk {
    /// SATA, by AHCI.
    Ahci,
    /// NVMe.
    Nvme,
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
    /// More options for QEMU.
    #[arg(long, allow_hyphen_values = true, default_value = "")]
    qemu: String,
    /// What the OS runs.
    #[arg(last = true)]
    command: Vec<String>,
}

const FIRMWARE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// The `lab-metal` verb.
pub fn run(project: &Project, args: &Args) -> Result<()> {
    setup::ensure(
        project,
        &[Need::Build, Need::Boot, Need::Images, Need::Metal],
    )?;
    let dir = qemu::run_dir(project)?;
    let command = if args.command.is_empty() {
        "true".to_owned()
    } else {
        args.command.join(" ")
    };
    let image = image::make(project, &dir, &command)?;
    fs::copy(VARIABLES, dir.join("vars.fd"))?;
    let disk = dir.join("disk.raw");
    fs::copy(&image, &disk)?;
    let medium = dir.join("medium");
    if !args.native {
        fs::create_dir_all(medium.join("EFI/BOOT"))?;
        fs::copy(build::efi(project)?, medium.join("EFI/BOOT/BOOTX64.EFI"))?;
    }
    let console = play(project, args, &dir)?;
    println!("{console}");
    ensure!(
        console.contains("METAL-EXIT 0"),
        "the machine did not end as it should: {}",
        dir.display()
    );
    fs::remove_dir_all(&dir)?;
    Ok(())
}

/// Runs the machine to its end; what it said.
fn play(project: &Project, args: &Args, dir: &Path) -> Result<String> {
    let mut command = qemu::command(project, false)?;
    let smp = args.smp.to_string();
    command.args([
        "-machine",
        "q35",
        "-cpu",
        "EPYC,-smap",
        "-smp",
        &smp,
        "-m",
        &args.memory,
    ]);
    command.args([
        "-accel",
        "tcg",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    command.args([
        "-serial",
        "file:console.log",
        "-qmp",
        "unix:qmp,server=on,wait=off",
    ]);
    command
        .arg("-drive")
        .arg(format!("if=pflash,format=raw,readonly=on,file={FIRMWARE}"));
    command.args(["-drive", "if=pflash,format=raw,file=vars.fd"]);
    command.args([
        "-drive",
        "if=none,id=disk,file=disk.raw,format=raw,discard=unmap",
    ]);
    match args.disk {
        Disk::Ahci => command.args([
            "-device",
            "ide-hd,bus=ide.0,drive=disk,serial=metal,bootindex=2",
        ]),
        Disk::Nvme => command.args(["-device", "nvme,drive=disk,serial=metal,bootindex=2"]),
    };
    if !args.native {
        command.args([
            "-drive",
            "if=none,id=medium,file=fat:medium,format=raw,readonly=on",
        ]);
        command.args([
            "-device",
            "qemu-xhci",
            "-device",
            "usb-storage,drive=medium,bootindex=1",
        ]);
    }
    command.args(args.qemu.split_whitespace());
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let mut machine = qemu::spawn(command, dir)?;
    let end = Instant::now() + Duration::from_secs(args.timeout);
    while machine.child.try_wait()?.is_none() {
        if Instant::now() > end {
            let said = said(dir);
            bail!("not done after {} s\n{said}", args.timeout);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(said(dir))
}

/// The console without what moves a cursor.
fn said(dir: &Path) -> String {
    let bytes = fs::read(dir.join("console.log")).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let mut out = String::new();
    let mut rest = text.chars().peekable();
    while let Some(letter) = rest.next() {
        if letter == '\u{1b}' {
            for letter in rest.by_ref() {
                if letter.is_ascii_alphabetic() {
                    break;
                }
            }
        } else if letter != '\r' {
            out.push(letter);
        }
    }
    out
}
