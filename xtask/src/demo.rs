//! `demo`: a VM that moves between two nodes; two stock kernels as VMs on an instance
//! without nested virtualization, a whole Debian there, and the two kernels on an instance that
//! has it.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use xshell::cmd;

use crate::build;
use crate::cases;
use crate::debian;
use crate::guestware;
use crate::initramfs::{self, Files};
use crate::kernels::{self, Flavour, Kernel};
use crate::lab::Payload;
use crate::project::Project;
use crate::qemu::{self, Accelerator, End, Hardware, Machine};
use crate::scripts::{DEBIAN_DEMO, DEMO_NODES};
use crate::setup::{self, Need};

/// Arguments of `demo`.
#[derive(clap::Args)]
pub struct Args {
    /// On this machine itself, without QEMU: loads the module here (as root).
    #[arg(long)]
    here: bool,
}

/// CPU model of an instance without nested virtualization, and of one with it.
const WITHOUT: &str = "EPYC,-svm";
const WITH: &str = "EPYC";

/// What is shown: in the lab, on a machine itself, and on a bare Debian by `package`.
pub const SCRIPT: &str = include_str!("../../tests/lab-scripts/demo.sh");

/// Kernels of the two VMs.
pub const GUESTS: [Flavour; 2] = [Flavour::Cloud, Flavour::Generic];

/// Prints what is being done and how long the whole has taken so far.
struct Steps(Instant);

impl Steps {
    fn say(&self, text: &str) {
        println!("[{:6.1} s] {text}", self.0.elapsed().as_secs_f64());
    }
}

/// The `demo` verb.
pub fn run(project: &Project, args: &Args) -> Result<()> {
    let steps = Steps(Instant::now());
    setup::ensure(project, &[Need::Build, Need::Boot])?;
    let guests: Vec<Kernel> = GUESTS
        .into_iter()
        .map(|flavour| kernels::fetch(project, flavour))
        .collect::<Result<_>>()?;
    let names: Vec<&str> = guests.iter().map(|guest| guest.release.as_str()).collect();
    steps.say(&format!("stock Debian kernels: {}", names.join(" and ")));
    steps.say("building the core, the module and the commands, which takes minutes the first time");
    if args.here {
        with_module_here(project, &guests, &steps)?
    } else {
        moves(project, &guests, &steps)?;
        in_lab(project, WITHOUT, &guests, &steps)?;
        debian(project, &steps)?;
        if kvm_works(project)? {
            steps.say(
                "this machine's own KVM works: the same kernels as VMs inside it, without QEMU",
            );
            on_this_machine(project, &guests)?;
        } else {
            in_lab(project, WITH, &guests, &steps)?;
        }
    }
    steps.say("done");
    Ok(())
}

/// Whether VMs run inside the KVM of this machine: not whether there is a `/dev/kvm`.
fn kvm_works(project: &Project) -> Result<bool> {
    let sh = project.shell()?;
    let command = build::command(project)?;
    let report = cmd!(sh, "{command} doctor --json")
        .quiet()
        .ignore_status()
        .ignore_stderr()
        .read()?;
    let report: serde_json::Value = serde_json::from_str(&report).context("blanket doctor")?;
    Ok(report["facts"]["kvm"]["state"] == "works")
}

fn in_lab(project: &Project, cpu: &str, guests: &[Kernel], steps: &Steps) -> Result<()> {
    let host = kernels::fetch(project, Flavour::Cloud)?;
    let inside_kvm = qemu::has_svm(cpu);
    let mut payload = Payload::new(project, &host, Hardware::Virtio, cpu)?;
    if !inside_kvm {
        payload.module(&build::module_for(project, &host)?);
    }
    payload.program(&build::command(project)?)?;
    steps.say(if inside_kvm {
        "an instance with nested virtualization, on which Blanket needs no module:"
    } else {
        "built: the core, the module, the blanket command"
    });
    for guest in guests {
        payload.guest_kernel(guest);
    }
    payload.guest_initrd(&initramfs::guest(project, None, &Files::new())?)?;
    let kernels = pairs(guests, |guest| {
        format!("/guest/vmlinuz-{}", guest.name).into()
    });
    payload.archive.text("root/demo.sh", 0o644, SCRIPT);
    let unload = if inside_kvm {
        ""
    } else {
        " && rmmod blanket && ! test -e /dev/blanket"
    };
    payload.command(&format!(
        "KERNELS='{kernels}' MKINITRD=lab-initrd sh /root/demo.sh{unload}"
    ));
    let machine = Machine::new(cpu, host, "2G");
    let by = match qemu::accelerator(project)? {
        Accelerator::Tcg => "emulated",
        Accelerator::Kvm => "under this machine's KVM",
    };
    steps.say(&format!(
        "booting an instance with 2 CPUs and 2 GiB, {by}; times below are its own"
    ));
    show(project, &[machine], &payload, 600)?;
    steps.say(if inside_kvm {
        "VMs ended, instance powered off"
    } else {
        "VMs ended, module unloaded, instance powered off"
    });
    Ok(())
}

/// Two instances with different virtual hardware become nodes, as of two clouds, of which one
/// gives virtualization; a VM moves between them while it runs.
fn moves(project: &Project, guests: &[Kernel], steps: &Steps) -> Result<()> {
    let host = kernels::fetch(project, Flavour::Generic)?;
    let guest = guests.first().context("no kernel")?;
    let mut payload = Payload::new(project, &host, Hardware::Virtio, WITHOUT)?;
    let drivers = [
        &["kvm_amd"],
        cases::FABRIC_MODULES,
        Hardware::NvmeE1000e.modules(),
    ]
    .concat();
    payload.more_modules(project, &host, &drivers)?;
    payload.module(&build::module_for(project, &host)?);
    payload.program(&build::command(project)?)?;
    payload.program(&build::supercloud(project)?)?;
    payload.archive.add(&guestware::fabric(project)?);
    payload.guest_kernel(guest);
    let mut initrd = initramfs::guest(project, None, &Files::new())?;
    initrd.modules(project, guest, &["xen_blkfront", "xen_netfront"])?;
    payload.guest_initrd(&initrd)?;
    payload.archive.text("lab/companion", 0o644, "");
    payload.command(DEMO_NODES);
    steps.say("two nodes as of two clouds, and a VM that moves between them while it runs:");
    let here = Machine {
        companions: 1,
        ..Machine::new(WITHOUT, host, "1G")
    };
    let there = Machine {
        cpu: WITH.into(),
        hardware: Hardware::NvmeE1000e,
        node: 2,
        ..here.clone()
    };
    show(project, &[here, there], &payload, 900)?;
    steps.say("VM ended, instances powered off");
    Ok(())
}

/// A whole Debian as a VM, out of its own disk image.
fn debian(project: &Project, steps: &Steps) -> Result<()> {
    let variant = debian::Variant::Base;
    let drive = debian::drive(project, variant)?;
    let host = kernels::fetch(project, Flavour::Cloud)?;
    let mut payload = Payload::new(project, &host, Hardware::Virtio, WITHOUT)?;
    payload.more_modules(project, &host, &["tun"])?;
    payload.module(&build::module_for(project, &host)?);
    payload.program(&build::command(project)?)?;
    payload.network_tools(&guestware::network_tools(project)?);
    payload.command(DEBIAN_DEMO);
    steps.say("an instance without nested virtualization, and a whole Debian as its VM:");
    let machine = Machine {
        extra: drive,
        ..Machine::new(WITHOUT, host, "3G")
    };
    show(project, &[machine], &payload, 2700)?;
    steps.say("VM ended, instance powered off");
    Ok(())
}

/// Boots an instance, and others beside it, and shows what its command says.
fn show(project: &Project, machines: &[Machine], payload: &Payload, seconds: u64) -> Result<()> {
    let timeout = Duration::from_secs(seconds);
    let mut out = std::io::stdout().lock();
    let outcome = qemu::run(project, machines, &payload.archive, timeout, &mut out)?;
    drop(out);
    if outcome.end == End::Exit(0) && outcome.complaints == 0 {
        outcome.discard();
        return Ok(());
    }
    eprint!("{}", outcome.console_tail(100));
    match outcome.end {
        End::Exit(0) => bail!(
            "the instance's kernel complained: {}",
            outcome.console().display()
        ),
        End::Exit(code) => bail!("the demo's script ended with {code}"),
        End::Died => bail!("the instance died: {}", outcome.console().display()),
        End::TimedOut => bail!("not done after {} s", timeout.as_secs()),
    }
}

fn with_module_here(project: &Project, guests: &[Kernel], steps: &Steps) -> Result<()> {
    let sh = project.shell()?;
    ensure!(
        cmd!(sh, "id -u").quiet().read()? == "0",
        "--here loads a module: run it as root (sudo ./x demo --here)"
    );
    let release = cmd!(sh, "uname -r").quiet().read()?;
    let headers = PathBuf::from(format!("/lib/modules/{release}/build"));
    ensure!(
        headers.join("Makefile").exists(),
        "no kernel headers at {}: apt-get install linux-headers-{release}",
        headers.display()
    );
    let module = build::module(project, &fs::canonicalize(headers)?)?;
    steps.say("built: the core, the module");
    let loaded = Path::new("/dev/blanket").exists();
    if !loaded {
        cmd!(sh, "insmod {module}")
            .quiet()
            .run()
            .context("the module does not load here")?;
        steps.say("module loaded");
    }
    let result = on_this_machine(project, guests);
    if !loaded {
        cmd!(sh, "rmmod blanket").quiet().run()?;
        steps.say("module unloaded");
    }
    result
}

/// Runs the demo's script on this machine, with what `blanket` finds here.
fn on_this_machine(project: &Project, guests: &[Kernel]) -> Result<()> {
    let sh = project.shell()?;
    let command = build::command(project)?;
    let dir = project.out_dir("demo")?;
    let script = dir.join("demo.sh");
    fs::write(&script, SCRIPT)?;
    let initrd = dir.join("initrd.img");
    initramfs::guest(project, None, &Files::new())?.write(&initrd)?;
    let mkinitrd = dir.join("mkinitrd");
    fs::write(&mkinitrd, HERE_INITRD)?;
    let path = format!(
        "{}:{}",
        command.parent().unwrap_or(Path::new("/")).display(),
        std::env::var("PATH").unwrap_or_default()
    );
    cmd!(sh, "sh {script}")
        .env("PATH", path)
        .env("KERNELS", pairs(guests, |guest| guest.vmlinuz.clone()))
        .env(
            "MKINITRD",
            format!("sh {} {}", mkinitrd.display(), initrd.display()),
        )
        .quiet()
        .run()
        .context("the demo's script failed")
}

/// As `lab-initrd`, with the base archive's path as its first argument.
pub const HERE_INITRD: &str = r#"dir=$(mktemp -d)
cp "$2" $dir/cmd
cat "$1"
cd $dir && echo cmd | busybox cpio -o -H newc 2>/dev/null
rm -r $dir
"#;

fn pairs(guests: &[Kernel], file: impl Fn(&Kernel) -> PathBuf) -> String {
    let pairs: Vec<String> = guests
        .iter()
        .map(|guest| format!("{}={}", guest.name, file(guest).display()))
        .collect();
    pairs.join(" ")
}
