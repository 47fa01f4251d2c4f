//! `demo-metal`: an empty machine that has its OS at once, and loses its hypervisor.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::checks::{PATIENCE, Site};
use super::machine::{Hardware, Machine};
use crate::project::Project;

/// The `demo-metal` verb.
pub fn run(project: &Project) -> Result<()> {
    let start = Instant::now();
    let say = |text: &str| println!("[{:6.1} s] {text}", start.elapsed().as_secs_f64());
    say(
        "building bmcast.efi, the command, and an image: GRUB, a stock Debian kernel, files with known sums",
    );
    let site = Site::new(project, "4M")?;
    say(
        "a machine with UEFI, two CPUs and an empty SATA disk is switched on, with BMcast's medium in it",
    );
    let machine = site.machine(project, &Hardware::new(true))?;
    let at = |text: &str| machine.wait_for(text, PATIENCE);
    let loader = at("Welcome to GRUB")?;
    say("GRUB runs, from a disk that holds nothing yet");
    let ready = at("METAL-READY")?;
    say("the OS is up; what the server has heard of the machine:");
    print!("{}", site.server.status(false)?);
    let sums = at("SUMS-BEFORE")?;
    say("its files have the right sums; it writes to its disk while the rest is installed");
    let left = at("LEFT ")?;
    say(
        "all of the image is on the disk, and both CPUs run without a hypervisor: VM_CR says so, SVM is the OS's",
    );
    print!("{}", site.server.status(false)?);
    let said = machine.end(PATIENCE)?;
    ensure!(
        said.contains("METAL-EXIT 0"),
        "the machine did not end as it should:\n{said}"
    );
    site.disk_is_right(&said)?;
    say("switched off; every sector of its disk is the image's, or what the OS wrote there");
    let bytes = fs::metadata(site.image())?.len();
    let dir = site.without_server();
    let again = Machine::start(project, &Hardware::new(false), &dir)?;
    let native = again.wait_for("METAL-READY", PATIENCE)?;
    again.end(PATIENCE)?;
    say("switched on again without medium, card and server: it starts from its own disk");
    fs::remove_dir_all(&dir)?;
    let seconds = |time: Duration| format!("{:.1} s", time.as_secs_f64());
    println!(
        "\nfrom switching on, {} MiB of image, all under emulation:",
        bytes >> 20
    );
    for (what, time) in [
        ("GRUB, streamed", loader),
        ("the OS is up, streamed", ready),
        ("its files are read and right", sums),
        ("nothing underneath any more", left),
        ("the OS is up, from its own disk", native),
    ] {
        println!("  {what:<34}{:>9}", seconds(time));
    }
    Ok(())
}
