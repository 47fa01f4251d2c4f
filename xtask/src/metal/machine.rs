//! The machine, and the server that it has its image from.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use xshell::cmd;

use super::{Card, Disk};
use crate::build;
use crate::project::Project;
use crate::qemu::{self, Running};

const FIRMWARE: &str = "/usr/share/OVMF/OVMF_CODE_4M.fd";
const VARIABLES: &str = "/usr/share/OVMF/OVMF_VARS_4M.fd";

/// A machine's disk in its directory.
const DISK_FILE: &str = "file=disk.raw,format=raw,discard=unmap";

/// The machine's hardware.
#[derive(Clone, Debug)]
pub struct Hardware {
    /// Its disk.
    pub disk: Disk,
    /// The VMM's card.
    pub card: Card,
    /// CPUs.
    pub smp: u32,
    /// Memory as QEMU's `-m` takes it.
    pub memory: String,
    /// Whether the boot medium is plugged in.
    pub medium: bool,
    /// The file that the disk is, as QEMU's `-drive` takes it.
    pub disk_file: String,
    /// A reset starts the machine anew; else it ends it.
    pub resets: bool,
    /// Its time is the instructions that it does.
    pub counts: bool,
    /// More options for QEMU.
    pub extra: Vec<String>,
}

impl Hardware {
    /// A SATA disk, virtio-net, two CPUs.
    pub fn new(medium: bool) -> Self {
        Self {
            disk: Disk::Ahci,
            card: Card::Virtio,
            smp: 2,
            memory: "1G".into(),
            medium,
            disk_file: DISK_FILE.into(),
            resets: false,
            counts: false,
            extra: Vec::new(),
        }
    }
}

/// What a machine has said, with the time of each line.
#[derive(Default)]
struct Said {
    lines: Mutex<(Vec<(Duration, String)>, bool)>,
    more: Condvar,
}

/// A fault of the emulator's own: an assertion of its, or what its CPU did and no CPU does, which BMcast says.
#[derive(Debug, thiserror::Error)]
#[error("the emulator has a fault of its own: {0}")]
pub struct Fault(String);

/// How BMcast says that the CPU exits in a way in which no CPU does.
const NO_CPU_DOES: &str = "the VMM's own state was saved as the guest's";
/// How BMcast says that nothing more will come.
const OVER: &str = ": cannot go on";

/// A machine that is on. It is switched off with this.
pub struct Machine {
    running: Running,
    dir: PathBuf,
    said: Arc<Said>,
    start: Instant,
}

impl Machine {
    /// Switches it on: `disk.raw` in `dir` is its disk, `medium.img` its medium.
    pub fn start(project: &Project, hardware: &Hardware, dir: &Path) -> Result<Self> {
        let variables = dir.join("vars.fd");
        if !variables.exists() {
            fs::copy(VARIABLES, &variables)?;
        }
        let mut command = qemu::command(project, hardware.counts)?;
        let smp = hardware.smp.to_string();
        let words = |command: &mut Command, text: &str| {
            command.args(text.split_whitespace());
        };
        words(
            &mut command,
            "-machine q35 -cpu EPYC,-smap -accel tcg,thread=single -display none",
        );
        words(&mut command, "-nodefaults -no-user-config");
        if hardware.counts {
            words(
                &mut command,
                "-icount shift=0,sleep=off -rtc base=2026-01-01,clock=vm",
            );
        }
        if !hardware.resets {
            command.arg("-no-reboot");
        }
        words(
            &mut command,
            "-chardev stdio,id=line,signal=off -serial chardev:line",
        );
        words(&mut command, "-qmp unix:qmp,server=on,wait=off");
        command.args(["-smp", &smp, "-m", &hardware.memory]);
        let firmware = format!("if=pflash,format=raw,readonly=on,file={FIRMWARE}");
        command.args(["-drive", &firmware]);
        words(&mut command, "-drive if=pflash,format=raw,file=vars.fd");
        let disk = format!("if=none,id=disk,{}", hardware.disk_file);
        command.args(["-drive", &disk]);
        words(
            &mut command,
            match hardware.disk {
                Disk::Ahci => "-device ide-hd,bus=ide.0,drive=disk,serial=metal,bootindex=2",
                Disk::Nvme => "-device nvme,drive=disk,serial=metal,bootindex=2",
            },
        );
        if hardware.medium {
            words(
                &mut command,
                "-drive if=none,id=medium,file=medium.img,format=raw,readonly=on",
            );
            words(
                &mut command,
                "-device qemu-xhci -device usb-storage,drive=medium,bootindex=1",
            );
            words(&mut command, "-netdev user,id=vmm");
            let card = match hardware.card {
                Card::Virtio => "virtio-net-pci",
                Card::E1000e => "e1000e",
            };
            command.args(["-device", &format!("{card},netdev=vmm,romfile=")]);
        }
        command.args(&hardware.extra);
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let start = Instant::now();
        let mut running = qemu::spawn(command, dir)?;
        let out = running.child.stdout.take().context("no standard output")?;
        let said = Arc::new(Said::default());
        let listener = Arc::clone(&said);
        let serial = File::create(dir.join("serial.log"))?;
        thread::spawn(move || listen(out, start, &listener, serial));
        Ok(Self {
            running,
            dir: dir.to_path_buf(),
            said,
            start,
        })
    }

    /// Waits until it says a line with `text`; when that was, from when it was switched on.
    pub fn wait_for(&self, text: &str, patience: Duration) -> Result<Duration> {
        let end = Instant::now() + patience;
        let mut lines = self.said.lines.lock().expect("a listener panicked");
        loop {
            if let Some((at, _)) = lines.0.iter().find(|(_, line)| line.contains(text)) {
                return Ok(*at);
            }
            let left = end.saturating_duration_since(Instant::now());
            if lines.1 || left.is_zero() {
                let what = if lines.1 { "ended" } else { "is not so far" };
                drop(lines);
                self.is_sound()?;
                bail!(
                    "the machine {what} after {:.0} s, and did not say {text:?}. It said:\n{}",
                    self.start.elapsed().as_secs_f64(),
                    self.said()
                );
            }
            lines = self
                .said
                .more
                .wait_timeout(lines, left)
                .expect("a listener panicked")
                .0;
        }
    }

    /// Waits until it is off; what it said.
    pub fn end(&self, patience: Duration) -> Result<String> {
        let end = Instant::now() + patience;
        let mut lines = self.said.lines.lock().expect("a listener panicked");
        while !lines.1 {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(lines);
                bail!(
                    "the machine is still on after {:.0} s. It said:\n{}",
                    self.start.elapsed().as_secs_f64(),
                    self.said()
                );
            }
            lines = self
                .said
                .more
                .wait_timeout(lines, left)
                .expect("a listener panicked")
                .0;
        }
        drop(lines);
        self.is_sound()?;
        Ok(self.said())
    }

    /// That the emulator has no fault of its own.
    fn is_sound(&self) -> Result<()> {
        let exited = || {
            let said = self.said();
            said.lines()
                .find(|line| line.contains(NO_CPU_DOES))
                .map(str::to_owned)
        };
        match qemu::fault_of(&self.dir).or_else(exited) {
            Some(line) => Err(Fault(line).into()),
            None => Ok(()),
        }
    }

    /// Everything that it has said.
    pub fn said(&self) -> String {
        let lines = self.said.lines.lock().expect("a listener panicked");
        lines
            .0
            .iter()
            .map(|(_, line)| format!("{line}\n"))
            .collect()
    }

    /// Pulls its plug.
    pub fn cut(mut self) -> Result<()> {
        self.running.child.kill()?;
        self.running.child.wait()?;
        Ok(())
    }
}

/// Takes lines, without what moves a cursor, as they come; all of it goes to a file.
fn listen(out: ChildStdout, start: Instant, said: &Said, mut serial: File) {
    let mut line = String::new();
    let mut in_escape = false;
    for byte in BufReader::new(out).bytes() {
        let Ok(byte) = byte else { break };
        let _ = serial.write_all(&[byte]);
        match byte {
            _ if in_escape => in_escape = !byte.is_ascii_alphabetic(),
            0x1b => in_escape = true,
            b'\n' => {
                let text = std::mem::take(&mut line);
                if !text.trim().is_empty() {
                    let mut lines = said.lines.lock().expect("a reader panicked");
                    lines.1 |= text.contains(OVER);
                    lines.0.push((start.elapsed(), text.trim_end().to_owned()));
                    said.more.notify_all();
                }
            }
            b'\r' => {}
            byte => line.push(char::from(byte)),
        }
    }
    let mut lines = said.lines.lock().expect("a reader panicked");
    if !line.trim().is_empty() {
        lines.0.push((start.elapsed(), line));
    }
    lines.1 = true;
    said.more.notify_all();
}

/// `bmcast serve`, which ends with this.
pub struct Server {
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
    /// Serves an image on the loopback.
    pub fn start(project: &Project, image: &Path, dir: &Path) -> Result<Self> {
        let command = build::bmcast(project)?;
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(&command)
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

    /// Makes the medium that the machine boots from. Under QEMU's user-mode network, this machine
    /// is 10.0.2.2. `rate`: most bytes a second that come while nobody waits for them.
    pub fn medium(&self, project: &Project, dir: &Path, rate: Option<&str>) -> Result<()> {
        let (sh, bmcast) = (project.shell()?, &self.command);
        let id = &self.id;
        let seen = format!("http://10.0.2.2:{}", self.port);
        let (efi, out) = (build::efi(project)?, dir.join("medium.img"));
        let rate: Vec<&str> = rate.into_iter().flat_map(|rate| ["--rate", rate]).collect();
        cmd!(
            sh,
            "{bmcast} image --server {seen} --manifest-id {id} --efi {efi} --out {out}
             --machine metal --disk metal --log-serial {rate...}"
        )
        .quiet()
        .ignore_stdout()
        .run()?;
        Ok(())
    }

    /// Writes to a file in which order the machine has read its image.
    pub fn profile(&self, project: &Project, out: &Path) -> Result<()> {
        let (sh, bmcast) = (project.shell()?, &self.command);
        let url = format!("http://127.0.0.1:{}", self.port);
        cmd!(sh, "{bmcast} profile metal --server {url} --out {out}")
            .quiet()
            .run()?;
        Ok(())
    }

    /// What it has heard of the machines: a table, or JSON.
    pub fn status(&self, json: bool) -> Result<String> {
        let url = format!("http://127.0.0.1:{}", self.port);
        let mut command = Command::new(&self.command);
        command.args(["status", "--server", &url]);
        if json {
            command.arg("--json");
        }
        let output = command.output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Stops it where it is, or lets it go on.
    pub fn freeze(&self, project: &Project, still: bool) -> Result<()> {
        let (sh, pid) = (project.shell()?, self.child.id().to_string());
        let signal = if still { "-STOP" } else { "-CONT" };
        cmd!(sh, "kill {signal} {pid}").quiet().run()?;
        Ok(())
    }
}
