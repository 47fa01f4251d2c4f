//! QEMU as a peer: the same guest as a machine of QEMU's own, in the instance that Blanket's VM is
//! in. There is no KVM there, so it translates; and as it would take long to boot in that way, the
//! guest boots on this machine, and goes on in the instance from a file.

use std::fs;
use std::io::{BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use crate::guestware;
use crate::initramfs::{self, Files, file_name};
use crate::kernels::Kernel;
use crate::lab::quoted;
use crate::measured::CPU;
use crate::monitor::Monitor;
use crate::project::Project;
use crate::qemu;
use crate::scripts::TICK;

/// Pieces of work that the guest has done before it is written to the file.
const WORKED: usize = 5;
/// Longest time until it has.
const PATIENCE: Duration = Duration::from_secs(300);
/// Where all of it is in the instance.
const HOME: &str = "peer";
const LOADER: &str = "/lib64/ld-linux-x86-64.so.2";
/// What a machine without a display loads.
const FIRMWARE: [&str; 4] = [
    "usr/share/seabios/bios-256k.bin",
    "usr/share/qemu/kvmvapic.bin",
    "usr/share/qemu/linuxboot.bin",
    "usr/share/qemu/linuxboot_dma.bin",
];

/// QEMU with the state of a guest that works.
pub struct Peer {
    dir: PathBuf,
    /// By their path in the instance.
    pub files: Files,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// The machine's options; to move, it has to be the same everywhere.
fn machine(kernel: &Path, initrd: &Path, memory: &str) -> Vec<String> {
    let options = format!(
        "-machine q35 -cpu {CPU},-smap -m {memory} -accel tcg -smp 1 -nodefaults -no-user-config \
         -display none -no-reboot -serial chardev:console"
    );
    let mut options: Vec<String> = options.split_whitespace().map(str::to_owned).collect();
    for (option, file) in [("-kernel", kernel), ("-initrd", initrd)] {
        options.extend([option.into(), file.display().to_string()]);
    }
    let append = "console=ttyS0 tsc=reliable no_timer_check panic=-1 quiet";
    options.extend(["-append".into(), append.into()]);
    options
}

/// What a script in the instance calls `qemu`.
pub fn function(memory: &str) -> Result<String> {
    let home = Path::new("/").join(HOME);
    let own = |name: &str| home.join(name).display().to_string();
    let loader = format!("lib/{}", file_name(Path::new(LOADER))?);
    let mut words = vec![own(&loader), "--library-path".into(), own("lib")];
    words.extend([own("qemu"), "-L".into(), own("firmware")]);
    words.extend(machine(&home.join("kernel"), &home.join("initrd"), memory));
    Ok(format!("qemu() {{ exec {} \"$@\"; }}\n", quoted(&words)))
}

impl Peer {
    /// Boots the guest on this machine, and has it written to a file when it works. What QEMU left
    /// stays where it was if that fails.
    pub fn boot(project: &Project, kernel: &Kernel, memory: &str) -> Result<Self> {
        let dir = qemu::run_dir(project)?;
        let initrd = dir.join("initrd");
        initramfs::guest(project, Some(TICK), &Files::new())?.write(&initrd)?;
        let state = state(project, &dir, &machine(&kernel.vmlinuz, &initrd, memory))
            .with_context(|| format!("QEMU's guest: see {}", dir.display()))?;

        let root = qemu::emulator(project)?;
        let program = root.join("usr/bin").join(qemu::QEMU);
        let mut files = Files::new();
        let mut has = |name: &str, file: PathBuf| files.insert(format!("{HOME}/{name}"), file);
        for (library, file) in guestware::loaded(project, Path::new(LOADER), "", &program)? {
            has(&format!("lib/{library}"), file);
        }
        has(
            &format!("lib/{}", file_name(Path::new(LOADER))?),
            LOADER.into(),
        );
        for file in FIRMWARE {
            let file = root.join(file);
            has(&format!("firmware/{}", file_name(&file)?), file);
        }
        has("qemu", program);
        has("kernel", kernel.vmlinuz.clone());
        has("initrd", initrd);
        has("state", state);
        Ok(Self { dir, files })
    }
}

/// A file with the state of a guest that works.
fn state(project: &Project, dir: &Path, machine: &[String]) -> Result<PathBuf> {
    let mut command = qemu::command(project, false)?;
    command
        .args(machine)
        .args(["-chardev", "stdio,id=console,signal=off"])
        .args(["-qmp", "unix:qmp,server=on,wait=off"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut running = qemu::spawn(command, dir)?;
    let console = running.child.stdout.take();
    works(console.context("QEMU has no output")?)?;
    let state = dir.join("state");
    let mut monitor = Monitor::open(&dir.join("qmp"))?;
    monitor.ask(
        r#"{"execute":"migrate-set-capabilities","arguments":{"capabilities":[{"capability":"events","state":true}]}}"#,
    )?;
    let to = serde_json::json!({"uri": format!("file:{}", state.display())});
    monitor.ask(&format!(r#"{{"execute":"migrate","arguments":{to}}}"#))?;
    monitor.event(|event| {
        event["event"] == "MIGRATION"
            && (event["data"]["status"] == "completed" || event["data"]["status"] == "failed")
    })?;
    let now = monitor.ask(r#"{"execute":"query-migrate"}"#)?;
    ensure!(now["status"] == "completed", "it is not written: {now}");
    Ok(state)
}

/// Waits until the guest has worked, as its console says. That is read to its end, so that the guest
/// never waits for a reader.
fn works(console: impl Read + Send + 'static) -> Result<()> {
    let (says, heard) = mpsc::channel();
    std::thread::spawn(move || {
        let lines = BufReader::new(console).lines().map_while(Result::ok);
        // Nobody listens any more to a guest that works.
        lines.for_each(|line| drop(says.send(line)));
    });
    let deadline = Instant::now() + PATIENCE;
    let mut worked = 0;
    while worked < WORKED {
        let left = deadline.saturating_duration_since(Instant::now());
        let line = heard.recv_timeout(left).context("it does not work")?;
        ensure!(!line.contains("BAD"), "it works wrong");
        worked += usize::from(line.contains("TICK "));
    }
    Ok(())
}
