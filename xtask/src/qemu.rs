//! QEMU as the cloud's hypervisor (L0): machines, accelerators, running one.

mod outcome;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use xshell::cmd;

use crate::apt::{Apt, BACKPORTED};
use crate::initramfs::Initramfs;
use crate::kernels::{self, Flavour, Kernel};
use crate::project::{Project, write_if_changed};

pub use outcome::{End, Outcome, fault_of};

/// The emulator's name.
pub const QEMU: &str = "qemu-system-x86_64";

/// The virtual hardware that a provider gives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Hardware {
    /// virtio-net and virtio-blk.
    #[default]
    Virtio,
    /// NVMe and an Intel network card.
    NvmeE1000e,
    /// vmxnet3 and pvscsi.
    Vmware,
}

impl Hardware {
    /// Drivers to load, by module name.
    pub fn modules(self) -> &'static [&'static str] {
        match self {
            Self::Virtio => &["virtio_pci", "virtio_net", "virtio_blk"],
            Self::NvmeE1000e => &["nvme", "e1000e"],
            Self::Vmware => &["vmxnet3", "vmw_pvscsi", "sd_mod"],
        }
    }

    /// A stock kernel that has these drivers.
    pub fn kernel(self) -> Flavour {
        match self {
            Self::Virtio => Flavour::Cloud,
            Self::NvmeE1000e | Self::Vmware => Flavour::Generic,
        }
    }

    fn network_card(self) -> &'static str {
        match self {
            Self::Virtio => "virtio-net-pci",
            Self::NvmeE1000e => "e1000e",
            Self::Vmware => "vmxnet3",
        }
    }

    fn disk(self) -> &'static [&'static str] {
        match self {
            Self::Virtio => &["virtio-blk-pci,drive=disk"],
            Self::NvmeE1000e => &["nvme,drive=disk,serial=blanket-lab"],
            Self::Vmware => &["pvscsi", "scsi-hd,drive=disk"],
        }
    }
}

/// What runs the machine's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// QEMU's translator.
    Tcg,
    /// The host's KVM.
    Kvm,
}

/// The lines that are whole now, of output that comes in pieces; `held` keeps the rest.
pub fn whole_lines(held: &mut Vec<u8>, bytes: &[u8]) -> Vec<String> {
    held.extend_from_slice(bytes);
    let Some(end) = held.iter().rposition(|byte| *byte == b'\n') else {
        return Vec::new();
    };
    let whole: Vec<u8> = held.drain(..=end).collect();
    let text = String::from_utf8_lossy(&whole);
    text.lines()
        .map(|line| line.trim_end().to_owned())
        .collect()
}

/// One instance's hardware and kernel.
#[derive(Clone, Debug)]
pub struct Machine {
    /// QEMU CPU model with its options.
    pub cpu: String,
    /// Virtual hardware.
    pub hardware: Hardware,
    /// Stock kernel.
    pub kernel: Kernel,
    /// Memory as QEMU's `-m` takes it.
    pub memory: String,
    /// CPUs.
    pub smp: u32,
    /// Count instructions: one CPU, one nanosecond for each instruction.
    pub icount: bool,
    /// Added to the kernel's command line.
    pub append: String,
    /// Number in the group, from 1.
    pub node: u32,
    /// Address of the group's network (`ADDRESS:PORT`, multicast); none alone.
    pub group: Option<String>,
    /// How many companions the first one has. Each has a link with it that nobody else is on and
    /// that gives nobody its own packets back: a group's network does, and a bridge in an
    /// instance goes wrong by that.
    pub companions: u32,
    /// More options for QEMU.
    pub extra: Vec<String>,
}

impl Machine {
    /// Two CPUs on virtual hardware, alone, with nothing added.
    pub fn new(cpu: &str, kernel: Kernel, memory: &str) -> Self {
        Self {
            cpu: cpu.into(),
            hardware: Hardware::Virtio,
            kernel,
            memory: memory.into(),
            smp: 2,
            icount: false,
            append: String::new(),
            node: 1,
            group: None,
            companions: 0,
            extra: Vec::new(),
        }
    }

    /// The model with what every run needs taken off. QEMU 7.2 checks the stack
    /// reads of a ring-3 `iretq` as supervisor accesses, so a guest kernel in
    /// ring 3 dies under SMAP; and it counts a `rep stosb` byte by byte, which a
    /// CPU with ERMS would use to clear pages.
    fn cpu_option(&self) -> String {
        let mut cpu = self.cpu.clone();
        for flag in ["-smap"].into_iter().chain(self.icount.then_some("-erms")) {
            // A case that wants the feature says so.
            let wanted = format!("+{}", &flag[1..]);
            if !cpu
                .split(',')
                .any(|option| option == flag || option == wanted)
            {
                cpu.push(',');
                cpu.push_str(flag);
            }
        }
        // Without SVM, QEMU 7.2 ends the extended CPUID leaves before the one that
        // tells the address sizes, and a kernel with 5-level paging goes wrong.
        if cpu.starts_with("max") && !cpu.contains("xlevel") {
            cpu.push_str(",min-xlevel=0x8000000a");
        }
        cpu
    }

    /// What its network cards are on.
    fn networks(&self) -> Vec<String> {
        match (&self.group, self.companions, self.node) {
            (None, 0, _) => vec!["user,restrict=on".into()],
            (Some(group), 0, _) => vec![format!("socket,mcast={group},localaddr=127.0.0.1")],
            (_, companions, 1) => (2..2 + companions)
                .map(|node| link(&format!("link{node}"), &format!("node{node}/link")))
                .collect(),
            (.., node) => vec![link("link", &format!("../link{node}"))],
        }
    }

    fn options(&self, accelerator: Accelerator) -> Vec<String> {
        let mut options = vec!["-machine".to_owned(), "q35".into()];
        let mut add = |words: &[&str]| options.extend(words.iter().map(|word| (*word).to_owned()));
        add(&["-cpu", &self.cpu_option(), "-m", &self.memory]);
        if self.icount {
            add(&["-accel", "tcg,thread=single", "-smp", "1"]);
            add(&[
                "-icount",
                "shift=0,sleep=off",
                "-rtc",
                "base=2026-01-01,clock=vm",
            ]);
        } else {
            let accel = match accelerator {
                // With a thread for each CPU the instance died once (docs/testing.md).
                Accelerator::Tcg if has_svm(&self.cpu) => "tcg,thread=single",
                Accelerator::Tcg => "tcg,thread=multi",
                Accelerator::Kvm => "kvm",
            };
            // A machine that can never have a second CPU gets QEMU 7.2's other
            // cmpxchg16b, which leaves wrong flags: Linux 6.12 dies of it in its
            // allocator.
            let most = self.smp.max(2);
            add(&[
                "-accel",
                accel,
                "-smp",
                &format!("{},maxcpus={most}", self.smp),
            ]);
        }
        add(&[
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ]);
        for (number, network) in self.networks().iter().enumerate() {
            let card = format!(
                "{},netdev=net{number},romfile=,mac=52:54:00:77:{number:02x}:{:02x}",
                self.hardware.network_card(),
                self.node
            );
            let network = format!("{network},id=net{number}");
            add(&["-netdev", &network, "-device", &card]);
        }
        add(&["-drive", "if=none,id=disk,file=disk.img,format=raw"]);
        for device in self.hardware.disk() {
            add(&["-device", device]);
        }
        options.extend(self.extra.iter().cloned());
        options
    }
}

/// A link to another machine's directory, as `-netdev` takes it.
fn link(own: &str, other: &str) -> String {
    format!("dgram,local.type=unix,local.path={own},remote.type=unix,remote.path={other}")
}

/// Whether a CPU model has AMD's virtualization, which QEMU's translator can emulate.
pub fn has_svm(cpu: &str) -> bool {
    let mut options = cpu.split(',');
    let model = options.next().unwrap_or_default();
    let amd = model.starts_with("EPYC") || model.starts_with("Opteron") || model == "max";
    options.fold(amd, |has, option| match option {
        "svm" | "svm=on" | "+svm" => true,
        "-svm" | "svm=off" => false,
        _ => has,
    })
}

/// `/` of the unpacked emulator, which is that of Debian's backports: 7.2, that
/// of Debian 12, leaves garbage in the flags after `cmpxchg16b`, so that an
/// interrupt that comes then takes a Linux 6.12 down, as instance and as VM.
pub fn emulator(project: &Project) -> Result<PathBuf> {
    let _lock = project.lock("qemu")?;
    let dir = project.out_dir("qemu")?;
    let (root, mark) = (dir.join("root"), dir.join("whole"));
    if !mark.exists() {
        eprintln!("lab: fetching QEMU of Debian's backports");
        let packages = [
            "qemu-system-x86",
            "qemu-system-common",
            "qemu-system-data",
            "seabios",
        ];
        let packages = packages.map(str::to_owned);
        Apt::new(project)?.unpack(&packages, BACKPORTED, &dir, &root)?;
        fs::write(&mark, "")?;
    }
    Ok(root)
}

/// A fresh directory `target/lab/N`.
pub fn run_dir(project: &Project) -> Result<PathBuf> {
    let base = project.out_dir("lab")?;
    for number in 1..100_000 {
        let dir = base.join(number.to_string());
        match fs::create_dir(&dir) {
            Ok(()) => return Ok(dir),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot create {}", dir.display()));
            }
        }
    }
    bail!("{} is full: remove it", base.display())
}

/// A QEMU process with its files in a directory of its own. It ends with this.
pub struct Running {
    /// The process.
    pub child: Child,
    dir: PathBuf,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Large and made anew for each run.
        for name in ["initramfs", "disk.img"] {
            let _ = fs::remove_file(self.dir.join(name));
        }
    }
}

/// How the second serial line is connected.
enum Line {
    /// Read by us.
    Piped,
    /// The user's terminal.
    Terminal,
    /// Nobody listens; that the process has ended is seen at its standard output.
    Null,
}

/// The emulator without its options. It does not outlive this process, however that ends.
pub fn command(project: &Project, icount: bool) -> Result<Command> {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]);
    if icount {
        // QEMU 10.0 stops early in the boot when it counts instructions and the
        // CPU model is `max`; 7.2 is also what the reference figures were made on.
        command.arg(QEMU);
        return Ok(command);
    }
    let emulator = emulator(project)?;
    command.arg(emulator.join("usr/bin").join(QEMU));
    for data in ["usr/share/qemu", "usr/share/seabios"] {
        command.arg("-L").arg(emulator.join(data));
    }
    command.env(
        "QEMU_MODULE_DIR",
        emulator.join("usr/lib/x86_64-linux-gnu/qemu"),
    );
    Ok(command)
}

/// Starts it in a directory, where it leaves its command line, its errors and its pid.
pub fn spawn(mut command: Command, dir: &Path) -> Result<Running> {
    let text: Vec<OsString> = command.get_args().map(ToOwned::to_owned).collect();
    fs::write(dir.join("command"), format!("{text:?}\n"))?;
    let child = command
        .current_dir(dir)
        .stderr(File::create(dir.join("qemu.log"))?)
        .spawn()
        .context("cannot start QEMU through setpriv")?;
    // setpriv becomes QEMU.
    fs::write(dir.join("pid"), child.id().to_string())?;
    Ok(Running {
        child,
        dir: dir.to_path_buf(),
    })
}

fn start(
    project: &Project,
    machine: &Machine,
    accelerator: Accelerator,
    payload: &Initramfs,
    dir: &Path,
    nonce: &str,
    line: &Line,
) -> Result<Running> {
    payload.write(&dir.join("initramfs"))?;
    let disk = File::create(dir.join("disk.img"))?;
    disk.set_len(256 << 20)?;
    // Once an instance's kernel panicked while pages of a VM inside its KVM moved.
    let still = if has_svm(&machine.cpu) {
        "transparent_hugepage=never "
    } else {
        ""
    };
    // A busy machine's timer may be late when the instance tries whether it works.
    let append = format!(
        "console=ttyS0 tsc=reliable no_timer_check panic=-1 oops=panic quiet LAB_NODE={} LAB_NONCE={nonce} {still}{}",
        machine.node, machine.append
    );
    let mut command = command(project, machine.icount)?;
    command.args(machine.options(accelerator));
    command.args([
        "-chardev",
        "file,id=console,path=console.log",
        "-serial",
        "chardev:console",
    ]);
    match line {
        Line::Piped | Line::Terminal => {
            command.args([
                "-chardev",
                "stdio,id=line,signal=off",
                "-serial",
                "chardev:line",
            ]);
        }
        Line::Null => {
            command.args(["-serial", "null"]);
        }
    }
    command.args(["-qmp", "unix:qmp,server=on,wait=off"]);
    command.arg("-kernel").arg(&machine.kernel.vmlinuz);
    command.args(["-initrd", "initramfs", "-append", &append]);
    match line {
        Line::Piped => command.stdin(Stdio::null()).stdout(Stdio::piped()),
        Line::Terminal => command.stdin(Stdio::inherit()).stdout(Stdio::inherit()),
        Line::Null => command.stdin(Stdio::null()).stdout(Stdio::piped()),
    };
    spawn(command, dir)
}

/// Boots `machines` with `payload`; the first runs the command in it. What the
/// command writes goes to `sink` as it comes.
pub fn run(
    project: &Project,
    machines: &[Machine],
    payload: &Initramfs,
    timeout: Duration,
    sink: &mut dyn Write,
) -> Result<Outcome> {
    run_in(project, run_dir(project)?, machines, payload, timeout, sink)
}

/// As [`run`] in a directory made by [`run_dir`], where QEMU's control socket
/// is `qmp`.
pub fn run_in(
    project: &Project,
    dir: PathBuf,
    machines: &[Machine],
    payload: &Initramfs,
    timeout: Duration,
    sink: &mut dyn Write,
) -> Result<Outcome> {
    let deadline = Instant::now() + timeout;
    let (first, others) = machines.split_first().context("a group without machines")?;
    let nonce = nonce()?;
    let accelerator = accelerator(project)?;
    let mut companions = Vec::new();
    for machine in others {
        let dir = dir.join(format!("node{}", machine.node));
        fs::create_dir(&dir)?;
        companions.push(start(
            project,
            machine,
            accelerator,
            payload,
            &dir,
            &nonce,
            &Line::Null,
        )?);
    }
    let mut running = start(
        project,
        first,
        accelerator,
        payload,
        &dir,
        &nonce,
        &Line::Piped,
    )?;
    let output = running.child.stdout.take().context("QEMU has no output")?;
    let (mut reader, over) = LineReader::new(output, &nonce);
    for companion in &mut companions {
        let output = companion.child.stdout.take();
        let output = output.context("QEMU has no output")?;
        outcome::watch(output, companion.dir.clone(), over.clone());
    }
    let end = reader.pump(deadline, sink)?;
    if matches!(end, End::Exit(_)) {
        // It powers off on its own; this gives its console log time to be whole.
        reader.wait_end(Instant::now() + Duration::from_secs(5));
    }
    Ok(Outcome {
        end,
        complaints: reader.complaints,
        dir,
    })
}

/// Boots `machine` with the user's terminal on its second serial line.
pub fn interactive(project: &Project, machine: &Machine, payload: &Initramfs) -> Result<()> {
    let dir = run_dir(project)?;
    let accelerator = accelerator(project)?;
    let mut running = start(
        project,
        machine,
        accelerator,
        payload,
        &dir,
        "-",
        &Line::Terminal,
    )?;
    running.child.wait()?;
    drop(running);
    let _ = fs::remove_dir_all(&dir);
    Ok(())
}

/// A word that the command cannot guess: marks the end of its output.
fn nonce() -> Result<String> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Reads an instance's second serial line: the command's output, then a frame
/// `<RS>LAB-EXIT <nonce> <code> <complaints>\n`.
struct LineReader {
    heard: Receiver<Heard>,
    mark: Vec<u8>,
    held: Vec<u8>,
    complaints: u32,
}

/// What a [`LineReader`] hears of.
enum Heard {
    /// The instance wrote this.
    Bytes(Vec<u8>),
    /// Its emulator, or that of one of its companions, has ended.
    Over,
}

impl LineReader {
    /// It, and where to tell it that a companion is gone.
    fn new(mut output: impl Read + Send + 'static, nonce: &str) -> (Self, Sender<Heard>) {
        let (sender, heard) = mpsc::channel();
        let over = sender.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = output.read(&mut buffer) {
                if sender.send(Heard::Bytes(buffer[..count].to_vec())).is_err() {
                    return;
                }
            }
            let _ = sender.send(Heard::Over);
        });
        let reader = Self {
            heard,
            mark: format!("\x1eLAB-EXIT {nonce} ").into_bytes(),
            held: Vec::new(),
            complaints: 0,
        };
        (reader, over)
    }

    fn pump(&mut self, deadline: Instant, sink: &mut dyn Write) -> Result<End> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let end = match self.heard.recv_timeout(left) {
                Ok(Heard::Bytes(chunk)) => {
                    self.held.extend_from_slice(&chunk);
                    if let Some(end) = self.take(sink)? {
                        return Ok(end);
                    }
                    continue;
                }
                Ok(Heard::Over) | Err(RecvTimeoutError::Disconnected) => End::Died,
                Err(RecvTimeoutError::Timeout) => End::TimedOut,
            };
            sink.write_all(&self.held)?;
            sink.flush()?;
            return Ok(end);
        }
    }

    /// Passes on all that cannot be part of the frame.
    fn take(&mut self, sink: &mut dyn Write) -> Result<Option<End>> {
        let mut from = 0;
        while let Some(at) = self.held[from..].iter().position(|byte| *byte == 0x1e) {
            let at = from + at;
            let rest = &self.held[at..];
            if rest.starts_with(&self.mark) {
                let Some(length) = rest.iter().position(|byte| *byte == b'\n') else {
                    return self.release(at, sink).map(|()| None);
                };
                let text = String::from_utf8_lossy(&rest[self.mark.len()..length]).into_owned();
                let mut words = text.split_whitespace();
                let code = words.next().and_then(|word| word.parse().ok());
                let code = code.with_context(|| format!("bad end frame: {text:?}"))?;
                self.complaints = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
                self.release(at, sink)?;
                return Ok(Some(End::Exit(code)));
            }
            if self.mark.starts_with(rest) {
                return self.release(at, sink).map(|()| None);
            }
            from = at + 1;
        }
        self.release(self.held.len(), sink).map(|()| None)
    }

    fn release(&mut self, count: usize, sink: &mut dyn Write) -> Result<()> {
        sink.write_all(&self.held[..count])?;
        sink.flush()?;
        self.held.drain(..count);
        Ok(())
    }

    fn wait_end(&self, deadline: Instant) {
        let left = || deadline.saturating_duration_since(Instant::now());
        while let Ok(Heard::Bytes(_)) = self.heard.recv_timeout(left()) {}
    }
}

/// KVM where a stock kernel really boots under it, else the translator. A
/// `/dev/kvm` that opens proves nothing: some machines have one under which no
/// kernel gets past its first instructions. The answer is kept for this host
/// kernel and QEMU.
pub fn accelerator(project: &Project) -> Result<Accelerator> {
    if File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_err()
    {
        return Ok(Accelerator::Tcg);
    }
    let _lock = project.lock("kvm-probe")?;
    let sh = project.shell()?;
    let qemu = emulator(project)?.join("usr/bin").join(QEMU);
    let version = cmd!(sh, "{qemu} --version").quiet().read()?;
    let release = cmd!(sh, "uname -rv").quiet().read()?;
    let key = format!(
        "{}\n{release}\n",
        version.lines().next().unwrap_or_default()
    );
    let cache = project.out_dir("lab")?.join("kvm-probe");
    if let Ok(known) = fs::read_to_string(&cache)
        && let Some(answer) = known.strip_prefix(&key)
    {
        return Ok(if answer == "yes" {
            Accelerator::Kvm
        } else {
            Accelerator::Tcg
        });
    }
    eprintln!("lab: trying whether a stock kernel boots under this machine's /dev/kvm");
    let works = kvm_boots(project)?;
    let answer = if works { "yes" } else { "no" };
    eprintln!("lab: {answer}");
    write_if_changed(&cache, format!("{key}{answer}").as_bytes())?;
    Ok(if works {
        Accelerator::Kvm
    } else {
        Accelerator::Tcg
    })
}

fn kvm_boots(project: &Project) -> Result<bool> {
    let mut payload = Initramfs::with_busybox(project)?;
    payload.text(
        "init",
        0o755,
        "#!/bin/sh\nmount -t devtmpfs dev /dev\n\
         printf '\\036LAB-EXIT %s 0 0\\n' $LAB_NONCE >/dev/ttyS1\npoweroff -f\n",
    );
    let machine = Machine::new(
        "EPYC,-svm",
        kernels::fetch(project, Flavour::Cloud)?,
        "512M",
    );
    let dir = run_dir(project)?;
    let nonce = nonce()?;
    let mut running = start(
        project,
        &machine,
        Accelerator::Kvm,
        &payload,
        &dir,
        &nonce,
        &Line::Piped,
    )?;
    let output = running.child.stdout.take().context("QEMU has no output")?;
    let deadline = Instant::now() + Duration::from_secs(10);
    let end = LineReader::new(output, &nonce)
        .0
        .pump(deadline, &mut std::io::sink())?;
    drop(running);
    let _ = fs::remove_dir_all(&dir);
    Ok(end == End::Exit(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(chunks: &[&[u8]]) -> (End, Vec<u8>, u32) {
        let bytes: Vec<u8> = chunks.concat();
        let (mut reader, _over) = LineReader::new(std::io::Cursor::new(bytes), "abc");
        let mut sink = Vec::new();
        let end = reader
            .pump(Instant::now() + Duration::from_secs(5), &mut sink)
            .unwrap();
        (end, sink, reader.complaints)
    }

    #[test]
    fn lines_come_when_they_are_whole() {
        let mut held = Vec::new();
        assert!(whole_lines(&mut held, b"on").is_empty());
        assert_eq!(whole_lines(&mut held, b"e\r\n\ntw"), ["one", ""]);
        assert_eq!(whole_lines(&mut held, b"o\n"), ["two"]);
        assert!(held.is_empty());
    }

    #[test]
    fn models_with_svm_are_known() {
        assert!(has_svm("EPYC") && has_svm("max") && has_svm("qemu64,+svm"));
        assert!(!has_svm("EPYC,-svm") && !has_svm("max,la57=on,-svm") && !has_svm("Nehalem"));
    }

    #[test]
    fn frame_ends_the_output() {
        let (end, out, complaints) = feed(&[b"hello\n\x1eLAB-EXIT abc 3 2\nmore"]);
        assert_eq!(
            (end, out.as_slice(), complaints),
            (End::Exit(3), &b"hello\n"[..], 2)
        );
    }

    #[test]
    fn other_separators_pass() {
        let (end, out, _) = feed(&[b"a\x1eb\x1eLAB-EXIT xyz 0 0\n", b"\x1eLAB-EXIT abc 0 0\n"]);
        assert_eq!(end, End::Exit(0));
        assert_eq!(out, b"a\x1eb\x1eLAB-EXIT xyz 0 0\n");
    }

    #[test]
    fn end_without_frame_is_a_death() {
        let (end, out, _) = feed(&[b"text\x1eLAB-EX"]);
        assert_eq!((end, out.as_slice()), (End::Died, &b"text\x1eLAB-EX"[..]));
    }
}
