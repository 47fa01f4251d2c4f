//! A whole Debian on a machine: from an empty disk to multi-user mode, under load while it is installed, and from its
//! own disk afterwards.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use xshell::cmd;

use super::checks::{SLOWEST, Site, has};
use super::machine::{Hardware, Machine};
use super::trace::{EVENTS, Written};
use super::{Disk, prepare};
use crate::apt::Apt;
use crate::debian::{self, Variant};
use crate::project::Project;

/// How long a machine may take for anything: far more than it does.
pub const PATIENCE: Duration = Duration::from_secs(1500);

/// By SATA with two CPUs.
pub fn ahci(project: &Project) -> Result<u32> {
    check(project, Disk::Ahci, 2)
}

/// By SATA with one CPU.
pub fn one_cpu(project: &Project) -> Result<u32> {
    check(project, Disk::Ahci, 1)
}

/// By NVMe with four CPUs.
pub fn nvme(project: &Project) -> Result<u32> {
    check(project, Disk::Nvme, 4)
}

/// A machine that starts a whole Debian, and what runs there once multi-user mode is reached, at each boot.
pub struct Debian {
    /// What is plugged in: a disk for cloud-init, and the OS's own network card.
    plugged: String,
}

impl Debian {
    /// With a script, its files in `dir`.
    pub fn new(project: &Project, dir: &Path, script: &str) -> Result<Self> {
        let seed = seed(project, dir, script)?;
        let plugged = format!(
            "-device qemu-xhci,id=seeds,addr=0x11 -drive if=none,id=seed,file={},format=raw,readonly=on \
             -device usb-storage,bus=seeds.0,drive=seed,removable=on \
             -netdev user,id=os,restrict=on -device e1000,netdev=os,mac=52:54:00:0b:0c:0d,addr=0x10,romfile=",
            seed.display()
        );
        Ok(Self { plugged })
    }

    /// The machine, with more of QEMU's options.
    pub fn hardware(&self, disk: Disk, smp: u32, medium: bool, more: &str) -> Hardware {
        let plugged = format!("{} {more}", self.plugged);
        Hardware {
            disk,
            smp,
            extra: plugged.split_whitespace().map(str::to_owned).collect(),
            ..Hardware::new(medium)
        }
    }
}

/// What cloud-init is given.
fn user_data(script: &str) -> String {
    let script: String = script
        .lines()
        .map(|line| format!("      {line}\n"))
        .collect();
    format!(
        "#cloud-config\n\
         ssh_genkeytypes: [ed25519]\n\
         no_ssh_fingerprints: true\n\
         ssh: {{emit_keys_to_console: false}}\n\
         apt: {{preserve_sources_list: true}}\n\
         bootcmd:\n\
         \x20 - [systemd-run, --no-block, --unit=work, -p, After=multi-user.target, sh, /var/lib/work.sh]\n\
         write_files:\n\
         \x20 - path: /var/lib/work.sh\n\
         \x20   content: |\n{script}"
    )
}

/// A disk with what cloud-init looks for (NoCloud), and a package.
fn seed(project: &Project, dir: &Path, script: &str) -> Result<PathBuf> {
    let sh = project.shell()?;
    let (seed, debs) = (dir.join("seed.img"), dir.join("debs"));
    Apt::new(project)?.download(&["hello".to_owned()], &[], &debs)?;
    let files = [
        ("user-data", user_data(script)),
        (
            "meta-data",
            "instance-id: metal\nlocal-hostname: metal\n".into(),
        ),
    ];
    cmd!(sh, "mkfs.vfat -n CIDATA -C {seed} 4096")
        .quiet()
        .ignore_stdout()
        .run()?;
    for (name, text) in files {
        let (path, to) = (dir.join(name), format!("::/{name}"));
        fs::write(&path, text)?;
        cmd!(sh, "mcopy -i {seed} {path} {to}").quiet().run()?;
    }
    for deb in fs::read_dir(&debs)? {
        let deb = deb?.path();
        cmd!(sh, "mcopy -i {seed} {deb} ::/hello.deb")
            .quiet()
            .run()?;
    }
    Ok(seed)
}

/// Streams, installs under load, leaves; each sector is the image's or what the guest wrote; its file systems are whole;
/// it starts from its own disk without a server.
fn check(project: &Project, disk: Disk, smp: u32) -> Result<u32> {
    let dir = prepare(project)?;
    let image = debian::image(project, Variant::Metal)?;
    let debian = Debian::new(
        project,
        &dir,
        include_str!("../../../tests/metal/debian.sh"),
    )?;
    let trace = dir.join("trace.log");
    let events = dir.join("events");
    fs::write(&events, EVENTS.join("\n") + "\n")?;
    let traced = format!("-trace events={} -D {}", events.display(), trace.display());
    let site = Site::with_image(project, dir, image, SLOWEST)?;
    let machine = site.machine(project, &debian.hardware(disk, smp, true, &traced))?;
    let said = machine.end(PATIENCE)?;
    drop(machine);
    has(
        &said,
        &[
            &format!("MULTI-USER {smp} CPUs"),
            &format!("{smp} with a VMM"),
            &format!("FIO-VERIFIED, {smp} CPUs with a VMM"),
            "PACKAGES-DONE",
            "LEFT",
            "VERIFIED-AFTER",
            "METAL-EXIT 0",
        ],
    )?;
    let sectors = usize::try_from(fs::metadata(site.image())?.len() >> 9)?;
    let written = Written::new(sectors, own_memory(&said)?).read(&trace)?;
    let (by_guest, by_vmm) = written.counts();
    ensure!(
        by_guest > 0 && by_vmm > 0,
        "{by_guest} sectors were written by the guest, {by_vmm} by the VMM: the trace is not whole"
    );
    let image = site.image().to_owned();
    let dir = site.without_server();
    let installed = dir.join("disk.raw");
    written.disk_is_right(&installed, &image)?;
    file_system_is_whole(project, &installed)?;
    let machine = Machine::start(project, &debian.hardware(disk, smp, false, ""), &dir)?;
    let again = machine.end(PATIENCE)?;
    has(&again, &["FROM-OWN-DISK", "METAL-EXIT 0"])?;
    for said in [&said, &again] {
        for line in said.lines().filter(|line| line.contains("MULTI-USER")) {
            println!("{}", line.trim());
        }
    }
    println!("{by_guest} sectors are the guest's, {by_vmm} the VMM's");
    fs::remove_dir_all(&dir)?;
    Ok(3)
}

/// Where the VMM says that its memory is.
fn own_memory(said: &str) -> Result<std::ops::Range<u64>> {
    let line = said
        .lines()
        .find(|line| line.starts_with("bmcast:") && line.ends_with(" free"))
        .context("the VMM has not said where its memory is")?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let word_behind = |name: &str| {
        let at = words.iter().position(|word| *word == name)?;
        words.get(at + 1).copied()
    };
    let kib: u64 = word_behind("of").context("no size")?.parse()?;
    let at = word_behind("at").and_then(|at| at.strip_prefix("0x"));
    let at = u64::from_str_radix(at.context("no address")?, 16)?;
    Ok(at..at + (kib << 10))
}

/// Has `e2fsck` look at the root file system.
fn file_system_is_whole(project: &Project, disk: &Path) -> Result<()> {
    let sh = project.shell()?;
    let at = format!("{}?offset={}", disk.display(), debian::ROOT_START << 9);
    cmd!(sh, "e2fsck -fn {at}")
        .env("PATH", debian::path_with_sbin())
        .quiet()
        .ignore_stdout()
        .run()
        .context("the root file system is not whole")
}
