//! `lab`: stock-kernel instances in QEMU, as a cloud would give them.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::build;
use crate::debian::{self, Variant};
use crate::guestware;
use crate::initramfs::{self, Files, Initramfs};
use crate::kernels::{self, Flavour, Kernel};
use crate::project::Project;
use crate::qemu::{self, End, Hardware, Machine};
use crate::setup::{self, Need};
use crate::system;

/// Arguments of `lab`.
#[derive(clap::Args)]
pub struct Args {
    /// QEMU CPU model; the default is a provider without nested virtualization.
    #[arg(long, default_value = "EPYC,-svm")]
    cpu: String,
    /// Virtual hardware of the instances.
    #[arg(long, value_enum, default_value_t)]
    hw: Hardware,
    /// Kernel of the instances: cloud, generic, rt, cloud-6.12, generic-6.12 or
    /// a file [default: one that has the hardware's drivers].
    #[arg(long)]
    kernel: Option<String>,
    /// Memory of each instance.
    #[arg(long, default_value = "2G")]
    memory: String,
    /// CPUs of each instance.
    #[arg(long, default_value_t = 2)]
    smp: u32,
    /// Directory whose content the instances find at /share.
    #[arg(long)]
    share: Option<PathBuf>,
    /// Give the instances a disk of Debian 12 at /dev/vdb (a copy: what is written is lost),
    /// and Debian's ssh, passt and iperf3.
    #[arg(long)]
    image: Option<Variant>,
    /// Number of instances, on one network as 10.77.0.N; the command runs in the first.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=200))]
    nodes: u32,
    /// Count instructions: one CPU, time is one nanosecond for each instruction.
    #[arg(long)]
    icount: bool,
    /// Added to the instances' kernel command line.
    #[arg(long, default_value = "")]
    append: String,
    /// Seconds after which the instances are stopped.
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// Stock kernels to have at /guest/vmlinuz-NAME, for VMs.
    #[arg(long, default_value = "cloud")]
    guest: Vec<Flavour>,
    /// Do not load the module.
    #[arg(long)]
    no_module: bool,
    /// Build nothing: use the module and the command if they are there.
    #[arg(long)]
    no_build: bool,
    /// Options for QEMU itself, such as `-d int,cpu_reset -D qemu-trace.log`;
    /// files land in the run's directory.
    #[arg(long, allow_hyphen_values = true, default_value = "")]
    qemu: String,
    /// Keep the run's directory under target/lab.
    #[arg(long)]
    keep: bool,
    /// What to run (by `sh -c` when it is one word); a shell when absent.
    #[arg(last = true)]
    command: Vec<String>,
}

/// The `lab` verb. Ends the process with the command's exit code.
pub fn run(project: &Project, args: &Args) -> Result<()> {
    setup::ensure(project, &[Need::Build, Need::Boot])?;
    let kernel = match &args.kernel {
        None => kernels::fetch(project, args.hw.kernel())?,
        Some(name) => match <Flavour as clap::ValueEnum>::from_str(name, false) {
            Ok(flavour) => kernels::fetch(project, flavour)?,
            Err(_) => Kernel::from_file(Path::new(name))?,
        },
    };
    let module = find_module(project, &kernel, args.no_build)?;
    let mut payload = Payload::new(project, &kernel, args.hw, &args.cpu)?;
    if let (Some(module), false) = (&module, args.no_module) {
        payload.module(module);
    }
    if let Some(command) = find_command(project, args.no_build)? {
        payload.program(&command)?;
        let supercloud = command.with_file_name("supercloud");
        if !args.no_build {
            payload.program(&build::supercloud(project)?)?;
        } else if supercloud.exists() {
            payload.program(&supercloud)?;
        }
    }
    for flavour in &args.guest {
        payload.guest_kernel(&kernels::fetch(project, *flavour)?);
    }
    payload.guest_initrd(&initramfs::guest(project, None, &Files::new())?)?;
    if let Some(share) = &args.share {
        payload.archive.copy_tree("share", share)?;
    }
    let mut extra: Vec<String> = args.qemu.split_whitespace().map(str::to_owned).collect();
    if let Some(variant) = args.image {
        extra.extend(debian::drive(project, variant)?);
        payload.network_tools(&guestware::network_tools(project)?);
        payload.more_modules(project, &kernel, &["tun"])?;
    }
    let group = (args.nodes > 1).then(group_address);
    let machines: Vec<Machine> = (1..=args.nodes)
        .map(|node| Machine {
            cpu: args.cpu.clone(),
            hardware: args.hw,
            kernel: kernel.clone(),
            memory: args.memory.clone(),
            smp: args.smp,
            icount: args.icount,
            append: args.append.clone(),
            node,
            group: group.clone(),
            companions: 0,
            extra: extra.clone(),
        })
        .collect();
    if args.command.is_empty() {
        ensure!(args.nodes == 1, "--nodes needs a COMMAND");
        ensure!(
            std::io::stdin().is_terminal(),
            "no COMMAND, and standard input is no terminal for a shell"
        );
        return qemu::interactive(project, &machines[0], &payload.archive);
    }
    payload.command(&command_text(&args.command));
    let timeout = Duration::from_secs(args.timeout);
    let outcome = qemu::run(
        project,
        &machines,
        &payload.archive,
        timeout,
        &mut std::io::stdout().lock(),
    )?;
    let code = match outcome.end {
        End::Exit(code) => code,
        End::Died | End::TimedOut => 125,
    };
    if outcome.complaints > 0 {
        eprintln!(
            "lab: {} complaints in the instance's kernel log",
            outcome.complaints
        );
    }
    if code != 0 {
        eprintln!("lab: console log: {}", outcome.console().display());
    }
    if outcome.complaints > 0 || !matches!(outcome.end, End::Exit(_)) {
        eprintln!("lab: its last lines:");
        eprint!("{}", outcome.console_tail(100));
    }
    match outcome.end {
        End::Exit(_) => {}
        End::Died => eprintln!("lab: the instance died before the command had ended"),
        End::TimedOut => eprintln!("lab: stopped after {} seconds", args.timeout),
    }
    if code == 0 && !args.keep {
        outcome.discard();
    }
    std::process::exit(code)
}

/// The module for `kernel`: built now, or as it was built last. None while the
/// checkout has no module yet, or for a kernel that is a bare file.
pub fn find_module(project: &Project, kernel: &Kernel, as_is: bool) -> Result<Option<PathBuf>> {
    let source = project.root.join("blanket/kmod");
    if kernel.root.is_none()
        || !(source.join("Kbuild").exists() || source.join("Makefile").exists())
    {
        return Ok(None);
    }
    let built = project
        .out
        .join("kmod")
        .join(&kernel.release)
        .join("blanket.ko");
    if as_is {
        return Ok(built.exists().then_some(built));
    }
    build::module_for(project, kernel).map(Some)
}

/// The static command, likewise.
pub fn find_command(project: &Project, as_is: bool) -> Result<Option<PathBuf>> {
    if !project.root.join("blanket/cli/Cargo.toml").exists() {
        return Ok(None);
    }
    let built = project.out.join("bin/blanket");
    if as_is {
        return Ok(built.exists().then_some(built));
    }
    build::command(project).map(Some)
}

/// A multicast address for one group of instances; the port is what keeps
/// groups apart, so it comes from our process id.
pub fn group_address() -> String {
    format!("230.0.77.1:{}", 20_000 + std::process::id() % 40_000)
}

fn command_text(words: &[String]) -> String {
    match words {
        [text] => text.clone(),
        words => quoted(words),
    }
}

/// Words as the shell takes them, each as it is.
pub fn quoted(words: &[String]) -> String {
    let quoted: Vec<String> = words
        .iter()
        .map(|word| format!("'{}'", word.replace('\'', r"'\''")))
        .collect();
    quoted.join(" ")
}

/// Init of an instance.
const INIT: &str = r#"#!/bin/sh
export PATH=/bin HOME=/root TERM=linux
# Out of the initramfs, whose root nobody can leave: passt wants to.
if [ -e /lab/leave-initramfs ]; then
    rm /lab/leave-initramfs
    mkdir /new
    mount -t tmpfs -o size=90% root /new
    mkdir /new/proc /new/sys /new/dev
    for name in /*; do
        case $name in /new | /proc | /sys | /dev) ;; *) cp -a $name /new/ ;; esac
    done
    cp -a /dev/console /dev/null /new/dev/
    exec /new/bin/busybox switch_root /new /init
fi
if [ -e /lab/hand-over ]; then . /lab/hand-over; fi
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
ln -s /proc/self/fd /dev/fd
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
hostname node$LAB_NODE
ip link set lo up
for module in $(cat /lab/modules); do insmod $module; done
# What KVM could not enter, it shows: for the log of a case that fails.
dump=/sys/module/kvm_amd/parameters/dump_invalid_vmcb
if [ -e $dump ]; then echo 1 >$dump; fi
if [ -e /sys/class/net/eth0 ]; then
    ip addr add 10.77.0.$LAB_NODE/24 dev eth0
    ip link set eth0 up
fi
if [ -e /lab/blanket.ko ]; then insmod /lab/blanket.ko; fi
cd /root
line=/dev/ttyS1
if [ "$LAB_NODE" != 1 ]; then
    # A shell for the first one, on a network that nobody else is on.
    while [ -e /lab/companion ]; do nc -l -p 7001 -e /bin/sh; done
    exec sleep 2147483647
elif [ -e /lab/command ]; then
    sh /lab/run
else
    stty -F $line sane
    echo "Instance $(uname -r). The shell's end is the instance's end." >$line
    setsid -c sh -l <$line >$line 2>&1
fi
poweroff -f
"#;

/// Runs the command. The second serial line carries its output and the end frame; kernel
/// messages have the first to themselves.
const RUN: &str = r#"#!/bin/sh
exec 3<>/dev/ttyS1
stty -F /dev/ttyS1 raw -echo clocal
sh /lab/command </dev/null >&3 2>&1
code=$?
bad='WARNING: CPU|BUG: |Oops: |INFO: task|rcu.*(stall|detected)|Call Trace:'
complaints=$(dmesg | grep -cE "$bad")
if [ $code != 0 ] || [ $complaints != 0 ]; then
    dmesg | tail -n 80 >/dev/ttyS0
    if [ $complaints != 0 ]; then dmesg | grep -E -A 8 "$bad" | head -n 60 >/dev/ttyS0; fi
fi
printf '\036LAB-EXIT %s %s %s\n' $LAB_NONCE $code $complaints >&3
# Waits until all of it has left (TCSADRAIN): the instance is off a moment later.
stty -F /dev/ttyS1 raw -echo clocal
"#;

/// Makes a VM's initramfs inside an instance: `lab-initrd SCRIPT [FILE...]`.
const LAB_INITRD: &str = r#"#!/bin/sh
# Writes /guest/initrd.img to standard output, with SCRIPT as the VM's /cmd and
# each FILE in its /bin.
set -e
dir=$(mktemp -d)
cp "$1" $dir/cmd
shift
mkdir $dir/bin
for file; do cp "$file" $dir/bin/; done
cat /guest/initrd.img
cd $dir
find . | cpio -o -H newc 2>/dev/null
rm -r $dir
"#;

/// What an instance finds in its initramfs.
pub struct Payload {
    /// The archive so far.
    pub archive: Initramfs,
    /// Modules of its kernel that init loads.
    modules: Vec<&'static str>,
}

impl Payload {
    /// Busybox, init and the drivers of `hardware` as `kernel` has them; KVM if the
    /// CPU model `cpu` has what it needs.
    pub fn new(project: &Project, kernel: &Kernel, hardware: Hardware, cpu: &str) -> Result<Self> {
        let mut archive = Initramfs::with_busybox(project)?;
        archive.text("init", 0o755, INIT);
        archive.text("lab/run", 0o755, RUN);
        archive.text("bin/lab-initrd", 0o755, LAB_INITRD);
        let mut this = Self {
            archive,
            modules: Vec::new(),
        };
        let mut modules = hardware.modules().to_vec();
        modules.extend(qemu::has_svm(cpu).then_some("kvm_amd"));
        this.modules(project, kernel, &modules)?;
        Ok(this)
    }

    /// Has init load these modules as well.
    pub fn more_modules(
        &mut self,
        project: &Project,
        kernel: &Kernel,
        names: &[&'static str],
    ) -> Result<()> {
        let all = [&self.modules, names].concat();
        self.modules(project, kernel, &all)
    }

    /// Has init load these modules of `kernel`, and what they depend on, instead
    /// of those named before.
    pub fn modules(
        &mut self,
        project: &Project,
        kernel: &Kernel,
        names: &[&'static str],
    ) -> Result<()> {
        self.modules = names.to_vec();
        self.archive.modules(project, kernel, names)
    }

    /// Adds Debian's ssh, passt and iperf3, and has init leave the initramfs, which passt
    /// has to.
    pub fn network_tools(&mut self, tools: &Files) {
        self.archive.add(tools);
        self.archive.text("lab/leave-initramfs", 0o644, "");
    }

    /// Has init hand the instance over to the Debian on its second disk.
    pub fn hand_over(&mut self, project: &Project, kernel: &Kernel) -> Result<()> {
        self.archive.text("lab/hand-over", 0o644, system::HAND_OVER);
        self.more_modules(project, kernel, system::MODULES)
    }

    /// Has init load this module.
    pub fn module(&mut self, module: &Path) {
        self.archive.copy("lab/blanket.ko", 0o644, module);
    }

    /// Adds a static program to /bin.
    pub fn program(&mut self, program: &Path) -> Result<()> {
        let name = initramfs::file_name(program)?;
        self.archive.copy(&format!("bin/{name}"), 0o755, program);
        Ok(())
    }

    /// Adds a kernel for VMs.
    pub fn guest_kernel(&mut self, kernel: &Kernel) {
        let name = format!("vmlinuz-{}", kernel.name);
        self.archive
            .copy(&format!("guest/{name}"), 0o644, &kernel.vmlinuz);
        self.archive.link("guest/vmlinuz", &name);
    }

    /// Adds the initramfs of VMs as /guest/initrd.img.
    pub fn guest_initrd(&mut self, initrd: &Initramfs) -> Result<()> {
        self.guest_initrd_as("initrd.img", initrd)
    }

    /// Adds an initramfs for VMs under another name.
    pub fn guest_initrd_as(&mut self, name: &str, initrd: &Initramfs) -> Result<()> {
        let mut bytes = Vec::new();
        initrd.write_to(&mut bytes)?;
        self.archive.bytes(&format!("guest/{name}"), 0o644, bytes);
        Ok(())
    }

    /// The shell text that the first instance runs.
    pub fn command(&mut self, text: &str) {
        self.archive.text("lab/command", 0o644, text);
    }
}
