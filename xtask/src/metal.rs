//! `lab-metal`: a bare-metal machine that QEMU plays, with UEFI firmware and AMD-V, on which BMcast starts an OS.

mod image;

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use xshell::cmd;

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

const FIRMWARE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// The `lab-metal` verb.
pub fn run(project: &Project, args: &Args) -> Result<()> {
    let needs = [Need::Build, Need::Boot, Need::Images, Need::Metal];
    setup::ensure(project, &needs)?;
    let dir = qemu::run_dir(project)?;
    let command = if args.command.is_empty() {
        "true".to_owned()
    } else {
        args.command.join(" ")
    };
    let image = image::make(project, &dir, &command)?;
    fs::copy(VARIABLES, dir.join("vars.fd"))?;
    let disk = dir.join("disk.raw");
    let server = if args.native {
        fs::copy(&image, &disk)?;
        None
    } else {
        let size = fs::metadata(&image)?.len();
        File::create(&disk)?.set_len(size + args.more_disk * (1 << 20))?;
        Some(Server::start(project, &image, &dir)?)
    };
    if let Some(server) = &server {
        server.medium(project, &dir)?;
    }
    let console = play(project, args, &dir)?;
    println!("{console}");
    if let Some(server) = &server {
        println!("{}", server.status()?);
    }
    ensure!(
        console.contains("METAL-EXIT 0"),
        "the machine did not end as it should: {}",
        dir.display()
    );
    if !args.keep {
        fs::remove_dir_all(&dir)?;
    }
    Ok(())
}

/// `bmcast serve`, which ends with this.
struct Server {
    child: Child,
    command: PathBuf,
    port: u16,
    /// The image's.
    id: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(project: &Project, image: &Path, dir: &Path) -> Result<Self> {
        let command = build::bmcast(project)?;
        let mut child = Command::new(&command)
            .arg("serve")
            .arg(image)
            .args(["--listen", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(File::create(dir.join("server.log"))?)
            .spawn()
            .context("cannot start bmcast serve")?;
        let mut line = String::new();
        let out = child.stdout.take().context("no standard output")?;
        BufReader::new(out).read_line(&mut line)?;
        // IMAGE: N bytes, id ID, at http://ADDRESS:PORT
        let found = line.trim().rsplit_once(", id ").and_then(|(_, rest)| {
            let (id, address) = rest.split_once(", at ")?;
            Some((id.to_owned(), address.rsplit(':').next()?.parse().ok()?))
        });
        let (id, port) = found.with_context(|| format!("bmcast serve did not start: {line}"))?;
        Ok(Self {
            child,
            command,
            port,
            id,
        })
    }

    /// Makes the medium that the machine boots from. Under QEMU's user-mode network, this machine is 10.0.2.2.
    fn medium(&self, project: &Project, dir: &Path) -> Result<()> {
        let (sh, bmcast) = (project.shell()?, &self.command);
        let id = &self.id;
        let seen = format!("http://10.0.2.2:{}", self.port);
        let (efi, out) = (build::efi(project)?, dir.join("medium.img"));
        cmd!(
            sh,
            "{bmcast} image --server {seen} --manifest-id {id} --efi {efi} --out {out} --machine metal"
        )
        .quiet()
        .ignore_stdout()
        .run()?;
        Ok(())
    }

    fn status(&self) -> Result<String> {
        let output = Command::new(&self.command)
            .args([
                "status",
                "--server",
                &format!("http://127.0.0.1:{}", self.port),
            ])
            .output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// Runs the machine to its end; what it said.
fn play(project: &Project, args: &Args, dir: &Path) -> Result<String> {
    let mut command = qemu::command(project, false)?;
    let smp = args.smp.to_string();
    let words = |command: &mut Command, text: &str| {
        command.args(text.split_whitespace());
    };
    words(
        &mut command,
        "-machine q35 -cpu EPYC,-smap -accel tcg -display none",
    );
    words(&mut command, "-nodefaults -no-user-config -no-reboot");
    words(
        &mut command,
        "-serial file:console.log -qmp unix:qmp,server=on,wait=off",
    );
    command.args(["-smp", &smp, "-m", &args.memory]);
    let firmware = format!("if=pflash,format=raw,readonly=on,file={FIRMWARE}");
    command.args(["-drive", &firmware]);
    words(&mut command, "-drive if=pflash,format=raw,file=vars.fd");
    words(
        &mut command,
        "-drive if=none,id=disk,file=disk.raw,format=raw,discard=unmap",
    );
    words(
        &mut command,
        match args.disk {
            Disk::Ahci => "-device ide-hd,bus=ide.0,drive=disk,serial=metal,bootindex=2",
            Disk::Nvme => "-device nvme,drive=disk,serial=metal,bootindex=2",
        },
    );
    if !args.native {
        words(
            &mut command,
            "-drive if=none,id=medium,file=medium.img,format=raw,readonly=on",
        );
        words(
            &mut command,
            "-device qemu-xhci -device usb-storage,drive=medium,bootindex=1",
        );
        words(&mut command, "-netdev user,id=vmm");
        let card = match args.card {
            Card::Virtio => "virtio-net-pci",
            Card::E1000e => "e1000e",
        };
        command.args(["-device", &format!("{card},netdev=vmm,romfile=")]);
    }
    words(&mut command, &args.qemu);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let mut machine = qemu::spawn(command, dir)?;
    let end = Instant::now() + Duration::from_secs(args.timeout);
    while machine.child.try_wait()?.is_none() {
        if Instant::now() > end {
            bail!("not done after {} s\n{}", args.timeout, said(dir));
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
