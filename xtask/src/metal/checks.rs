//! What `test` asks of BMcast on a whole machine.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::image::{self, SCRATCH};
use super::machine::{Fault, Hardware, Machine, Server};
use super::{Disk, prepare};
use crate::initramfs::Files;
use crate::project::Project;

/// How long a machine may take for anything: far more than it does.
pub const PATIENCE: Duration = Duration::from_secs(400);

/// So little that nothing is installed unless the guest wants it, however busy the host is.
pub const SLOWEST: &str = "64K";

/// What the OS does: reads what it knows the sums of, writes to a partition while the rest is installed (which it
/// reads for that if it is told to), waits until no CPU has a VMM under it, and does both again.
pub const WORK: &str = r#"
mount -t ext4 -o ro $part /mnt && cd /mnt || exit 1
sums() { echo 3 >/proc/sys/vm/drop_caches; md5sum -c sums >/tmp/sums || cat /tmp/sums; [ $(grep -c OK /tmp/sums) = 4 ]; }
block() { yes "block $1 of the guest's own" | head -c 65536 | dd of=$scratch bs=65536 seek=$1 conv=notrunc,fsync 2>/dev/null; }
# VM_CR: reads as switched off while there is a VMM.
under() { for c in $(seq 0 $(($(nproc) - 1))); do
    dd if=/dev/cpu/$c/msr bs=8 iflag=skip_bytes skip=$((0xc0010114)) count=1 2>/dev/null | od -An -tx8
done | grep -c 18; }
sums && echo SUMS-BEFORE
under_at_first=$(under)
n=0
while [ $n -lt 12 ]; do block $((n * 2)); echo "SYNCED $((n * 2))"; n=$((n + 1)); done
# All that has not come is wanted now; writes go on meanwhile.
[ -e /wants-all ] && cat $disk >/dev/null &
while [ $n -lt 24 ]; do block $((n * 2)); echo "SYNCED $((n * 2))"; n=$((n + 1)); done
until [ $(under) = 0 ]; do sleep 0.2; done
[ -e /dev/kvm ] && echo KVM-TOO-EARLY $under_at_first
echo "LEFT $under_at_first of $(nproc) CPUs had a VMM"
sums && echo SUMS-AFTER
while [ $n -lt 32 ]; do block $((n * 2)); echo "SYNCED $((n * 2))"; n=$((n + 1)); done
insmod /lab/modules.d/kvm-amd.ko 2>/dev/null
[ -e /dev/kvm ] && echo KVM-THERE
true"#;

/// A machine with an empty disk and a server.
pub struct Site {
    dir: PathBuf,
    image: PathBuf,
    /// It.
    pub server: Server,
}

impl Site {
    /// With an image in which [`WORK`] is done. At most `rate` bytes a second come that nobody waits for.
    pub fn new(project: &Project, rate: &str) -> Result<Self> {
        let wants_all = if rate == SLOWEST {
            "touch /wants-all\n"
        } else {
            ""
        };
        let script = format!("{wants_all}{WORK}");
        Self::with_script(project, rate, &script, &Files::new())
    }

    /// With an image in which a script is run, and programs for it.
    pub fn with_script(
        project: &Project,
        rate: &str,
        script: &str,
        programs: &Files,
    ) -> Result<Self> {
        let dir = prepare(project)?;
        let image = image::make(project, &dir, script, programs)?;
        Self::with_image(project, dir, image, rate)
    }

    /// With this image, in this directory.
    pub fn with_image(project: &Project, dir: PathBuf, image: PathBuf, rate: &str) -> Result<Self> {
        let size = fs::metadata(&image)?.len();
        File::create(dir.join("disk.raw"))?.set_len(size + (16 << 20))?;
        let server = Server::start(project, &image, &dir)?;
        server.medium(project, &dir, Some(rate))?;
        Ok(Self { dir, image, server })
    }

    /// Switches the machine on.
    pub fn machine(&self, project: &Project, hardware: &Hardware) -> Result<Machine> {
        Machine::start(project, hardware, &self.dir)
    }

    /// The image.
    pub fn image(&self) -> &Path {
        &self.image
    }

    /// Where everything of the machine is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The machine's disk.
    pub fn disk(&self) -> PathBuf {
        self.dir.join("disk.raw")
    }

    /// Ends the server; the directory.
    pub fn without_server(self) -> PathBuf {
        self.dir
    }

    /// That the disk is the image, but for the blocks that the guest has said it wrote.
    pub fn disk_is_right(&self, said: &str) -> Result<()> {
        self.disk_is_right_without(said, &[])
    }

    /// The same where the guest has discarded these blocks, which are zeros.
    pub fn disk_is_right_without(&self, said: &str, discarded: &[usize]) -> Result<()> {
        let mut expected = fs::read(&self.image)?;
        let mut put = |number: usize, block: &[u8]| -> Result<()> {
            let at = usize::try_from(SCRATCH.0 << 9)? + number * block.len();
            expected[at..at + block.len()].copy_from_slice(block);
            Ok(())
        };
        for number in synced(said) {
            put(number, &pattern(number))?;
        }
        for number in discarded {
            put(*number, &[0; 65536])?;
        }
        same(&self.disk(), &expected)
    }
}

/// Numbers of the blocks that were synced.
fn synced(said: &str) -> Vec<usize> {
    said.lines()
        .filter_map(|line| line.trim().strip_prefix("SYNCED ")?.parse().ok())
        .collect()
}

/// What the guest writes as block `number`.
fn pattern(number: usize) -> Vec<u8> {
    let line = format!("block {number} of the guest's own\n");
    line.bytes().cycle().take(65536).collect()
}

/// That a disk begins with these bytes.
fn same(disk: &Path, expected: &[u8]) -> Result<()> {
    let mut found = vec![0; expected.len()];
    File::open(disk)?
        .read_exact_at(&mut found, 0)
        .with_context(|| format!("cannot read {}", disk.display()))?;
    let wrong: Vec<usize> = (0..expected.len() / 512)
        .filter(|sector| {
            let range = sector * 512..(sector + 1) * 512;
            found[range.clone()] != expected[range]
        })
        .collect();
    ensure!(
        wrong.is_empty(),
        "{} sectors of the disk are wrong, the first is {}",
        wrong.len(),
        wrong[0]
    );
    Ok(())
}

/// That the machine has said all of this.
pub fn has(said: &str, wanted: &[&str]) -> Result<()> {
    for text in wanted {
        ensure!(
            said.contains(text),
            "the machine did not say {text}. It said:\n{said}"
        );
    }
    Ok(())
}

/// Does a check, once more if the emulator fell over an assertion of its own.
pub fn check(project: &Project, check: fn(&Project) -> Result<u32>) -> Result<u32> {
    check(project).or_else(|error| match error.downcast_ref::<Fault>() {
        Some(fault) => {
            println!("once more: {fault}");
            check(project)
        }
        None => Err(error),
    })
}

/// Streams, installs, leaves; the disk is right; the machine starts from it without a server.
pub fn streams(project: &Project) -> Result<u32> {
    streams_to(project, Disk::Ahci)
}

/// The same with an NVMe disk.
pub fn streams_to_nvme(project: &Project) -> Result<u32> {
    streams_to(project, Disk::Nvme)
}

fn streams_to(project: &Project, disk: Disk) -> Result<u32> {
    let hardware = |medium| Hardware {
        disk,
        ..Hardware::new(medium)
    };
    let site = Site::new(project, SLOWEST)?;
    let mut checked = 0;
    let said = {
        let machine = site.machine(project, &hardware(true))?;
        machine.end(PATIENCE)?
    };
    has(
        &said,
        &[
            "SUMS-BEFORE",
            "LEFT 2 of 2",
            "SUMS-AFTER",
            "SYNCED 62",
            "KVM-THERE",
            "METAL-EXIT 0",
        ],
    )?;
    site.disk_is_right(&said)?;
    checked += 1;
    let status: serde_json::Value = serde_json::from_str(&site.server.status(true)?)?;
    ensure!(
        status.to_string().contains("de-virtualized"),
        "the server was not told: {status}"
    );
    // With the medium still there, BMcast finds that nothing is to be done.
    let machine = site.machine(project, &hardware(true))?;
    has(&machine.end(PATIENCE)?, &["LEFT 0 of 2", "METAL-EXIT 0"])?;
    checked += 1;
    drop(site.server);
    let machine = Machine::start(project, &hardware(false), &site.dir)?;
    let again = machine.end(PATIENCE)?;
    has(&again, &["SUMS-BEFORE", "LEFT 0 of 2", "METAL-EXIT 0"])?;
    checked += 1;
    fs::remove_dir_all(&site.dir)?;
    Ok(checked)
}

/// The server is gone for `away` while the OS starts: it waits, and goes on.
pub fn server_gone(project: &Project) -> Result<u32> {
    let site = Site::new(project, SLOWEST)?;
    let machine = site.machine(project, &Hardware::new(true))?;
    machine.wait_for("Welcome to GRUB", PATIENCE)?;
    site.server.freeze(project, true)?;
    // What is not an event: for how long it is away.
    std::thread::sleep(Duration::from_secs(20));
    site.server.freeze(project, false)?;
    let said = machine.end(PATIENCE)?;
    has(&said, &["SUMS-BEFORE", "SUMS-AFTER", "METAL-EXIT 0"])?;
    site.disk_is_right(&said)?;
    fs::remove_dir_all(&site.dir)?;
    Ok(1)
}

/// The plug is pulled a few times.
pub fn power_cuts(project: &Project) -> Result<u32> {
    cuts(project, Disk::Ahci, 3)
}

/// The same with an NVMe disk.
pub fn power_cuts_nvme(project: &Project) -> Result<u32> {
    cuts(project, Disk::Nvme, 3)
}

/// The plug is pulled twenty times.
pub fn power_cuts_long(project: &Project) -> Result<u32> {
    cuts(project, Disk::Ahci, 20)
}

/// Pulls the plug while the image is installed and the guest writes, `times` times, each time at another moment of its
/// boot; then lets it end.
///
/// What the emulator was told to flush and what it was not are both there afterwards: what a volatile cache loses is for
/// the model in `bmcast-install` to show.
fn cuts(project: &Project, disk: Disk, times: u32) -> Result<u32> {
    let hardware = Hardware {
        disk,
        ..Hardware::new(true)
    };
    let site = Site::new(project, SLOWEST)?;
    let mut all = String::new();
    let moments = [
        "image ",
        "Welcome to GRUB",
        "METAL-READY",
        "SUMS-BEFORE",
        "SYNCED 4",
        "SYNCED 20",
    ];
    let mut seen = 0;
    for number in 0..times {
        let machine = site.machine(project, &hardware)?;
        let moment = moments[usize::try_from(number)? % moments.len()];
        // Once it is installed there is no VMM that says so.
        if machine.wait_for(moment, PATIENCE).is_err() {
            machine.end(PATIENCE)?;
            ensure!(moment == "image ", "{}", machine.said());
        }
        all.push_str(&machine.said());
        machine.cut()?;
        seen += 1;
    }
    ensure!(seen == times, "{seen} cuts");
    let machine = site.machine(project, &hardware)?;
    let said = machine.end(PATIENCE)?;
    has(&said, &["SUMS-BEFORE", "SUMS-AFTER", "METAL-EXIT 0"])?;
    all.push_str(&said);
    site.disk_is_right(&all)?;
    fs::remove_dir_all(&site.dir)?;
    Ok(1)
}
