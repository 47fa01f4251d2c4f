//! `bench --metal`: what it costs to start an OS while its image streams in, beside a disk that has it already, a disk
//! in the network, and copying first; what is left of BMcast when it is gone; and what a database and a network notice meanwhile.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use xshell::cmd;

use super::checks::{PATIENCE, Site};
use super::image;
use super::machine::{Hardware, Machine};
use super::whole::{self, Debian};
use super::{Disk, prepare};
use crate::build;
use crate::debian::{self, Variant};
use crate::guestware;
use crate::monitor::Monitor;
use crate::page;
use crate::project::Project;

/// What the page's section begins with.
pub const TITLE: &str = "\n## Machines of metal\n";

/// Most bytes a second in the background while a start is measured.
const BOOT_RATE: &str = "16M";

/// Most bytes a second in the background while the timeline is drawn, so that it has something to show.
const TIMELINE_RATE: &str = "4M";

/// Makes all of it, prints the section of the page, and writes it there.
pub fn run(project: &Project) -> Result<()> {
    let mut text = format!(
        "{TITLE}\nMade by `cargo xtask bench --metal`. The machine is QEMU's (q35, OVMF, one thread for all of its CPUs); seconds are \
         those of the emulator on the machine that ran it, and say nothing of hardware. Counts of instructions and bytes are exact.\n\n"
    );
    let profile = project.out_dir("bench")?.join("profile");
    let timeline = timeline(project, &profile)?;
    text += &starts(project, &profile)?;
    text += &counts(project)?;
    text += &timeline;
    println!("{text}");
    page::write_section(project, TITLE, &text)
}

/// How a start went.
struct Start {
    loader: Duration,
    ready: Duration,
    /// Bytes that were read of the disk until then, by whoever.
    read: u64,
}

impl Start {
    /// Until a machine is in multi-user mode.
    fn of(machine: &Machine, dir: &Path) -> Result<Self> {
        let loader = machine.wait_for("Welcome to GRUB", PATIENCE)?;
        let ready = machine.wait_for("MULTI-USER", PATIENCE)?;
        let stats = Monitor::open(&dir.join("qmp"))?.ask(r#"{"execute":"query-blockstats"}"#)?;
        let disk = stats.as_array().into_iter().flatten();
        let disk = disk.into_iter().find(|one| one["device"] == "disk");
        let read = disk.and_then(|disk| disk["stats"]["rd_bytes"].as_u64());
        Ok(Self {
            loader,
            ready,
            read: read.context("QEMU does not say what was read")?,
        })
    }
}

/// Ends with this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a machine runs of which only the start is of interest.
const UP: &str = "exec >/dev/ttyS0 2>&1; echo MULTI-USER";

/// A whole Debian, to multi-user mode.
fn starts(project: &Project, profile: &Path) -> Result<String> {
    let image = debian::image(project, Variant::Metal)?;
    let bytes = fs::metadata(&image)?.len();
    let (local, network) = (from_disk(project, &image)?, from_network(project, &image)?);
    let (streamed, first) = from_image(project, &image, None)?;
    let (again, second) = from_image(project, &image, Some(profile))?;
    let mut text = format!(
        "### Until a whole Debian is in multi-user mode\n\nTwo CPUs, 1 GiB, a SATA disk; an image of {} GiB.\n\n\
         | the disk | GRUB runs | multi-user | of a local disk's time | read of the disk |\n|---|---:|---:|---:|---:|\n",
        bytes >> 30
    );
    for (what, start) in [
        ("holds the image already", &local),
        (
            "is in the network (NBD; the emulator does it, and the machine does not pay)",
            &network,
        ),
        ("is empty, the image streams in (BMcast)", &streamed),
        (
            "the same, in the order of an earlier boot (`bmcast profile`)",
            &again,
        ),
    ] {
        writeln!(
            text,
            "| {what} | {:.1} s | {:.1} s | {:.2} | {} MiB |",
            start.loader.as_secs_f64(),
            start.ready.as_secs_f64(),
            start.ready.as_secs_f64() / local.ready.as_secs_f64(),
            start.read >> 20
        )?;
    }
    for (which, fetched) in [("", &first), ("With the profile ", &second)] {
        writeln!(
            text,
            "\n{which}BMcast had fetched {} MiB that the guest waited for ({:.2} of what the start from the local disk read), and {} MiB that nobody waited for.",
            fetched.wanted >> 20,
            quotient(fetched.wanted, local.read),
            fetched.background >> 20
        )?;
    }
    text.push('\n');
    text += "Copying first, at 1 Gbit/s, and starting then: the copy is arithmetic (the ceiling of any such link), what follows are the seconds above, so that the quotient is one of two kinds of seconds.\n\n\
             | image | copied in | and started | BMcast | times |\n|---|---:|---:|---:|---:|\n";
    for gib in [4u64, 32] {
        let copied = gib as f64 * f64::from(1u32 << 30) * 8.0 / 1e9;
        // The firmware has to come up twice.
        let both = copied + local.loader.as_secs_f64() + local.ready.as_secs_f64();
        let streamed = streamed.ready.as_secs_f64();
        writeln!(
            text,
            "| {gib} GiB | {copied:.0} s | {both:.0} s | {streamed:.0} s | {:.1} |",
            both / streamed
        )?;
    }
    text.push('\n');
    Ok(text)
}

/// From its own disk, which holds the image.
fn from_disk(project: &Project, image: &Path) -> Result<Start> {
    let dir = prepare(project)?;
    let debian = Debian::new(project, &dir, UP)?;
    let (sh, disk) = (project.shell()?, dir.join("disk.raw"));
    cmd!(sh, "cp --sparse=always {image} {disk}")
        .quiet()
        .run()?;
    let machine = Machine::start(project, &debian.hardware(Disk::Ahci, 2, false, ""), &dir)?;
    let start = Start::of(&machine, &dir)?;
    machine.cut()?;
    fs::remove_dir_all(&dir)?;
    Ok(start)
}

/// From a disk in the network, for as long as it runs.
fn from_network(project: &Project, image: &Path) -> Result<Start> {
    let dir = prepare(project)?;
    let debian = Debian::new(project, &dir, UP)?;
    let socket = dir.join("nbd");
    let _server = Running(
        Command::new("qemu-nbd")
            .args(["--snapshot", "--format=raw", "--persistent", "--shared=8"])
            .arg("--socket")
            .arg(&socket)
            .arg(image)
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start qemu-nbd")?,
    );
    while !socket.exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut hardware = debian.hardware(Disk::Ahci, 2, false, "");
    hardware.disk_file = format!(
        "format=raw,file.driver=nbd,file.server.type=unix,file.server.path={}",
        socket.display()
    );
    let machine = Machine::start(project, &hardware, &dir)?;
    let start = Start::of(&machine, &dir)?;
    machine.cut()?;
    fs::remove_dir_all(&dir)?;
    Ok(start)
}

/// Bytes that BMcast has fetched until then.
struct Fetched {
    wanted: u64,
    background: u64,
}

/// From an empty disk, out of an image that streams in.
fn from_image(project: &Project, image: &Path, profile: Option<&Path>) -> Result<(Start, Fetched)> {
    let dir = prepare(project)?;
    let debian = Debian::new(project, &dir, UP)?;
    // Its manifest is beside it, and others use the image, too.
    let own = dir.join("image.raw");
    fs::hard_link(image, &own)?;
    if let Some(profile) = profile {
        let (sh, bmcast) = (project.shell()?, build::bmcast(project)?);
        cmd!(sh, "{bmcast} manifest {own} --profile {profile}")
            .quiet()
            .ignore_stdout()
            .run()?;
    }
    let site = Site::with_image(project, dir, own, BOOT_RATE)?;
    let machine = site.machine(project, &debian.hardware(Disk::Ahci, 2, true, ""))?;
    let start = Start::of(&machine, site.dir())?;
    let status: Value = serde_json::from_str(&site.server.status(true)?)?;
    machine.cut()?;
    fs::remove_dir_all(site.without_server())?;
    let machines = status.as_array().and_then(|machines| machines.first());
    let machine = machines.unwrap_or(&status);
    let chunks = |key: &str| {
        let chunks = machine[key].as_u64();
        chunks.with_context(|| format!("no {key} in {status}"))
    };
    let fetched = Fetched {
        wanted: chunks("demand_chunks")? << 16,
        background: chunks("background_chunks")? << 16,
    };
    Ok((start, fetched))
}

fn quotient(of: u64, by: u64) -> f64 {
    of as f64 / by as f64
}

/// What is run when there is no VMM, or none any more.
const MICRO: &str = r#"
under() { dd if=/dev/cpu/0/msr bs=8 iflag=skip_bytes skip=$((0xc0010114)) count=1 2>/dev/null | od -An -tx8 | grep -c 18; }
echo "UNDER $(under)"
until [ $(under) = 0 ]; do sleep 0.2; done
micro --hello /bin/hello --scale 0.1 --reps 5 >/tmp/out
cat /tmp/out"#;

/// What user programs and the kernel cost after BMcast has gone, and where it never was, by instructions.
fn counts(project: &Project) -> Result<String> {
    let dir = prepare(project)?;
    let image = image::make(project, &dir, MICRO, &guestware::programs(project)?)?;
    let site = Site::with_image(project, dir, image, "1G")?;
    let hardware = |medium| Hardware {
        smp: 1,
        counts: true,
        ..Hardware::new(medium)
    };
    let machine = site.machine(project, &hardware(true))?;
    let with = machine.end(PATIENCE)?;
    drop(machine);
    ensure!(with.contains("UNDER 1"), "there was no VMM:\n{with}");
    fs::copy(site.image(), site.disk())?;
    let machine = site.machine(project, &hardware(false))?;
    let without = machine.end(PATIENCE)?;
    drop(machine);
    ensure!(without.contains("UNDER 0"), "there was a VMM:\n{without}");
    fs::remove_dir_all(site.without_server())?;
    let mut text = "### When it is gone\n\nInstructions (one CPU, one nanosecond each), after BMcast has left and on a machine that never had it.\n\n\
                    | operation | unit | never had it | after it | difference |\n|---|---|---:|---:|---:|\n"
        .to_owned();
    let before = rows(&without);
    ensure!(!before.is_empty(), "nothing was measured:\n{without}");
    for (name, value, unit) in before {
        let after = rows(&with)
            .into_iter()
            .find(|row| row.0 == name)
            .with_context(|| format!("{name} was not measured after it"))?;
        writeln!(
            text,
            "| {name} | {unit} | {value} | {} | {:+.2} % |",
            after.1,
            (after.1 / value - 1.0) * 100.0
        )?;
    }
    text.push('\n');
    Ok(text)
}

/// Rows as `micro` prints them: a name, a value, a unit.
fn rows(said: &str) -> Vec<(String, f64, String)> {
    said.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let (name, value, unit) = (words.next()?, words.next()?, words.next()?);
            let known = unit == "ns" || unit == "MiB/s";
            known.then_some((name.to_owned(), value.parse().ok()?, unit.to_owned()))
        })
        .collect()
}

/// A database and pings, round by round: while there is a VMM, and for some rounds without.
const ROUNDS: &str = r#"exec >/dev/ttyS0 2>&1
modprobe msr
under() { for c in 0 1; do dd if=/dev/cpu/$c/msr bs=8 iflag=skip_bytes skip=$((0xc0010114)) count=1 2>/dev/null | od -An -tx8; done | grep -c 18; }
echo MULTI-USER
systemctl start postgresql
su postgres -c "pgbench -q -i -s 2" >/run/init 2>&1 || cat /run/init
without=0
while [ $without -lt 4 ]; do
    at=$(under)
    ping -q -c 25 -i 0.2 10.0.2.2 >/run/ping &
    tps=$(su postgres -c "pgbench -n -c 2 -j 2 -T 8" 2>&1 | sed -n 's/^tps = \([0-9.]*\).*/\1/p')
    wait
    rtt=$(sed -n 's|^rtt [^=]*= [0-9.]*/\([0-9.]*\)/.*|\1|p' /run/ping)
    echo "ROUND $(cut -d' ' -f1 /proc/uptime) $at $tps $rtt"
    [ $at = 0 ] && without=$((without + 1))
done
echo METAL-EXIT 0
systemctl --no-block poweroff"#;

/// What PostgreSQL and the network notice; the machine's profile goes to a file.
fn timeline(project: &Project, profile: &Path) -> Result<String> {
    let image = debian::image(project, Variant::Metal)?;
    let dir = prepare(project)?;
    let debian = Debian::new(project, &dir, ROUNDS)?;
    let site = Site::with_image(project, dir, image, TIMELINE_RATE)?;
    let machine = site.machine(project, &debian.hardware(Disk::Ahci, 2, true, ""))?;
    let said = machine.end(whole::PATIENCE)?;
    drop(machine);
    site.server.profile(project, profile)?;
    fs::remove_dir_all(site.without_server())?;
    let mut text = format!(
        "### What a database and a network notice\n\nPostgreSQL under pgbench (two clients, read and write), and the time of a ping to the next machine, in rounds of some \
         8 s of the OS's clock; the image is installed meanwhile, at up to {TIMELINE_RATE}B/s.\n\n\
         | the OS is up for | CPUs with a VMM | transactions per second | round trip |\n|---:|---:|---:|---:|\n"
    );
    let mut rounds = 0;
    for line in said.lines() {
        let Some(round) = line.trim().strip_prefix("ROUND ") else {
            continue;
        };
        let words: Vec<&str> = round.split_whitespace().collect();
        let [at, under, tps, rtt] = words[..] else {
            anyhow::bail!("a round was not measured: {line}");
        };
        let (at, tps): (f64, f64) = (at.parse()?, tps.parse()?);
        writeln!(text, "| {at:.0} s | {under} | {tps:.0} | {rtt} ms |")?;
        rounds += 1;
    }
    ensure!(rounds > 4, "{rounds} rounds were measured:\n{said}");
    text.push('\n');
    Ok(text)
}
