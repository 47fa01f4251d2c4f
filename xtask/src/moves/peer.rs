//! QEMU as a peer: the same guest as a machine of QEMU's own, in the instance that Blanket's VM is
//! in. There is no KVM there, so it translates; and as it would take long to boot in that way, the
//! guest boots on this machine, and goes on in the instance from a file.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use xshell::cmd;

use crate::initramfs::{self, Files};
use crate::kernels::Kernel;
use crate::measured::CPU;
use crate::monitor::Monitor;
use crate::project::Project;
use crate::qemu;
use crate::scripts::TICK;

/// Pieces of work that the guest has done before it is written to the file.
const WORKED: usize = 5;
/// Longest time for anything of QEMU's.
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

/// The machine, in the shell's words; to move, it has to be the same everywhere.
fn machine(program: &str, kernel: &str, initrd: &str, memory: &str) -> String {
    format!(
        "{program} -machine q35 -cpu {CPU},-smap -m {memory} -accel tcg -smp 1 -nodefaults -no-user-config \
         -display none -no-reboot -serial chardev:console -kernel {kernel} -initrd {initrd} \
         -append 'console=ttyS0 tsc=reliable no_timer_check panic=-1 quiet'"
    )
}

/// What a script in the instance calls `qemu`.
pub fn function(memory: &str) -> String {
    let program = format!(
        "/{HOME}/lib/{} --library-path /{HOME}/lib /{HOME}/qemu -L /{HOME}/firmware",
        file_name(Path::new(LOADER))
    );
    let (kernel, initrd) = (format!("/{HOME}/kernel"), format!("/{HOME}/initrd"));
    let machine = machine(&program, &kernel, &initrd, memory);
    format!("qemu() {{ exec {machine} \"$@\"; }}\n")
}

impl Peer {
    /// Boots the guest on this machine, and has it written to a file when it works.
    pub fn boot(project: &Project, kernel: &Kernel, memory: &str) -> Result<Self> {
        let mut this = Self {
            dir: qemu::run_dir(project)?,
            files: Files::new(),
        };
        let root = qemu::emulator(project)?;
        let program = root.join("usr/bin").join(qemu::QEMU);
        let initrd = this.dir.join("initrd");
        initramfs::guest(project, Some(TICK), &Files::new())?.write(&initrd)?;
        let state = this.state(&root, &program, kernel, &initrd, memory)?;
        this.has("qemu", &program);
        this.has("kernel", &kernel.vmlinuz);
        this.has("initrd", &initrd);
        this.has("state", &state);
        for file in FIRMWARE {
            let file = root.join(file);
            this.has(&format!("firmware/{}", file_name(&file)), &file);
        }
        for library in libraries(project, &program)? {
            this.has(&format!("lib/{}", file_name(&library)), &library);
        }
        Ok(this)
    }

    fn has(&mut self, name: &str, file: &Path) {
        self.files.insert(format!("{HOME}/{name}"), file.into());
    }

    fn state(
        &self,
        root: &Path,
        program: &Path,
        kernel: &Kernel,
        initrd: &Path,
        memory: &str,
    ) -> Result<PathBuf> {
        let firmware = ["usr/share/qemu", "usr/share/seabios"].map(|dir| root.join(dir));
        let program = format!(
            "exec setpriv --pdeathsig KILL -- {} -L {} -L {}",
            program.display(),
            firmware[0].display(),
            firmware[1].display()
        );
        let vmlinuz = kernel.vmlinuz.display().to_string();
        let machine = machine(&program, &vmlinuz, &initrd.display().to_string(), memory);
        let child = Command::new("sh")
            .arg("-c")
            .arg(format!(
                "{machine} -chardev file,id=console,path=console.log -qmp unix:qmp,server=on,wait=off"
            ))
            .current_dir(&self.dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(self.dir.join("qemu.log"))?)
            .spawn()
            .context("cannot start QEMU")?;
        let _running = Running(child);
        let works = until(|| Ok(ticks(&self.dir)? >= WORKED));
        works.with_context(|| format!("QEMU's guest does not work: see {}", self.dir.display()))?;
        let state = self.dir.join("state");
        let mut monitor = Monitor::open(&self.dir.join("qmp"))?;
        monitor.ask(&format!(
            r#"{{"execute":"migrate","arguments":{{"uri":"file:{}"}}}}"#,
            state.display()
        ))?;
        until(|| {
            let now = monitor.ask(r#"{"execute":"query-migrate"}"#)?;
            match now["status"].as_str() {
                Some("completed") => Ok(true),
                Some("failed" | "cancelled") => bail!("QEMU does not write it: {now}"),
                _ => Ok(false),
            }
        })?;
        Ok(state)
    }
}

/// A process that is ended when this is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a program of this machine loads, and what loads it.
fn libraries(project: &Project, program: &Path) -> Result<Vec<PathBuf>> {
    let sh = project.shell()?;
    let list = cmd!(sh, "{LOADER} --list {program}").quiet().read()?;
    // "libm.so.6 => /path/libm.so.6 (0x...)"
    let paths = list
        .lines()
        .filter_map(|line| line.split_once(" => ")?.1.split_whitespace().next());
    let mut all: Vec<PathBuf> = paths.map(PathBuf::from).collect();
    all.push(LOADER.into());
    Ok(all)
}

fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// How often the guest has worked.
fn ticks(dir: &Path) -> Result<usize> {
    let console = match fs::read(dir.join("console.log")) {
        Ok(console) => console,
        // QEMU makes it when it begins.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error.into()),
    };
    Ok(String::from_utf8_lossy(&console).matches("TICK ").count())
}

fn until(mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !holds()? {
        ensure!(begun.elapsed() < PATIENCE, "it takes too long");
        // QEMU has no event for what a guest writes.
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}
