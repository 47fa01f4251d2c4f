//! What goes wrong on a machine while its image is installed: chunks that are not what they should be, writes and reads
//! that the disk fails, a guest that discards, resets its controller and itself, a kernel that starts another one, and a
//! disk that is too small.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use anyhow::{Result, ensure};

use super::Disk;
use super::checks::{PATIENCE, SLOWEST, Site, has};
use super::image::{self, SCRATCH};
use super::machine::Hardware;
use crate::guestware;
use crate::initramfs::Files;
use crate::project::Project;

/// What the OS does: at its first start it discards, writes, has its driver reset the controller while there are
/// commands on it, and the machine start anew without a power cut; at its second it waits until all is there.
///
/// The blocks of 64 KiB that it uses: 2 and 4 are written, 8 to 11 discarded, 40 cannot be read, 255 says that the machine has been reset.
const WORK: &str = r#"
sums() { mount -t ext4 -o ro $part /mnt && cd /mnt || return 1
    echo 3 >/proc/sys/vm/drop_caches; md5sum -c sums >/tmp/sums || cat /tmp/sums; cd /; umount /mnt; [ $(grep -c OK /tmp/sums) = 4 ]; }
block() { yes "block $1 of the guest's own" | head -c 65536 | dd of=$scratch bs=65536 seek=$1 conv=notrunc,fsync 2>/dev/null && echo "SYNCED $1"; }
is_block() { dd if=$scratch bs=65536 skip=$1 count=1 iflag=direct 2>/dev/null | head -n 1 | grep -q "block $1 of"; }
under() { for c in $(seq 0 $(($(nproc) - 1))); do
    dd if=/dev/cpu/$c/msr bs=8 iflag=skip_bytes skip=$((0xc0010114)) count=1 2>/dev/null | od -An -tx8
done | grep -c 18; }
unreadable() { ! dd if=$scratch of=/dev/null bs=65536 skip=40 count=1 iflag=direct 2>/dev/null && dd if=$scratch of=/dev/null bs=65536 skip=41 count=1 iflag=direct 2>/dev/null; }
if is_block 255; then
    is_block 2 && is_block 4 && echo BLOCKS-THERE
    sums && echo SUMS-AFTER
    # All that has not come is wanted now; what cannot be read is gone around.
    dd if=$disk of=/dev/null bs=65536 conv=noerror 2>/dev/null
    until [ $(under) = 0 ]; do sleep 0.2; done
    unreadable && echo READ-ERROR-AFTER
    sums && echo SUMS-WITHOUT
    return 0
fi
echo "$(under) CPUs with a VMM"
block 2
blkdiscard -o $((8 * 65536)) -l $((4 * 65536)) $scratch && echo DISCARDED
unreadable && echo READ-ERROR
# The driver goes with commands on the controller, and comes back, which resets it.
pci=$(readlink -f /sys/block/${disk#/dev/} | grep -o '0000:[0-9a-f:.]*' | tail -n 1)
driver=$(readlink -f /sys/bus/pci/devices/$pci/driver)
for round in 1 2 3; do
    for at in 0 20 40 60; do dd if=$disk of=/dev/null bs=1M skip=$((at + round * 5)) count=20 iflag=direct 2>/dev/null & done
    sleep 0.1
    echo $pci >$driver/unbind
    wait
    echo $pci >$driver/bind
    until [ -b $scratch ]; do sleep 0.1; done
    echo "RESET $round"
done
sums && echo SUMS-BEFORE
block 4
block 255
echo "STARTS-ANEW, $(under) CPUs with a VMM"
reboot -f
"#;

/// By SATA.
pub fn ahci(project: &Project) -> Result<u32> {
    faults(project, Disk::Ahci)
}

/// By NVMe.
pub fn nvme(project: &Project) -> Result<u32> {
    faults(project, Disk::Nvme)
}

/// The sector at the begin of a block of the guest's.
const fn sector_of(block: u64) -> u64 {
    SCRATCH.0 + block * 128
}

fn faults(project: &Project, disk: Disk) -> Result<u32> {
    let site = Site::with_script(project, SLOWEST, WORK, &Files::new())?;
    // What the machine asks for first, and something that is in a file.
    let spoilt = [
        Spoilt::chunk_at(site.image(), 2048 << 9)?,
        Spoilt::chunk_at(site.image(), image::DATA.0 << 9)?,
    ];
    let failing = format!(
        "file=blkdebug::disk.raw,format=raw,discard=unmap,\
         file.inject-error.0.event=none,file.inject-error.0.iotype=write,file.inject-error.0.once=on,file.inject-error.0.sector={},\
         file.inject-error.1.event=none,file.inject-error.1.iotype=read,file.inject-error.1.sector={}",
        sector_of(20),
        sector_of(40)
    );
    let hardware = Hardware {
        disk,
        disk_file: failing,
        resets: true,
        ..Hardware::new(true)
    };
    let machine = site.machine(project, &hardware)?;
    for spoilt in spoilt {
        machine.wait_for(
            &format!("chunk {} is not what it should be", spoilt.chunk),
            PATIENCE,
        )?;
        spoilt.mend(site.image())?;
    }
    let said = machine.end(PATIENCE)?;
    has(
        &said,
        &[
            "2 CPUs with a VMM",
            "DISCARDED",
            "READ-ERROR",
            "RESET 3",
            "SUMS-BEFORE",
            "STARTS-ANEW, 2 CPUs with a VMM",
            "BLOCKS-THERE",
            "SUMS-AFTER",
            "READ-ERROR-AFTER",
            "SUMS-WITHOUT",
            "METAL-EXIT 0",
        ],
    )?;
    drop(machine);
    site.disk_is_right_without(&said, &[8, 9, 10, 11])?;
    fs::remove_dir_all(site.without_server())?;
    Ok(1)
}

/// A chunk of the image that the server sends otherwise than it has promised.
struct Spoilt {
    chunk: u64,
    at: u64,
}

impl Spoilt {
    /// The chunk with this byte.
    fn chunk_at(image: &Path, at: u64) -> Result<Self> {
        let spoilt = Self {
            chunk: at >> 16,
            at,
        };
        spoilt.flip(image)?;
        Ok(spoilt)
    }

    fn mend(self, image: &Path) -> Result<()> {
        self.flip(image)
    }

    fn flip(&self, image: &Path) -> Result<()> {
        let mut file = File::options().read(true).write(true).open(image)?;
        let mut byte = [0];
        file.seek(SeekFrom::Start(self.at))?;
        file.read_exact(&mut byte)?;
        file.seek(SeekFrom::Start(self.at))?;
        file.write_all(&[byte[0] ^ 1])?;
        Ok(())
    }
}

/// A disk that the image does not fit on is refused before anything is written.
pub fn too_small(project: &Project) -> Result<u32> {
    let site = Site::with_script(project, SLOWEST, "true", &Files::new())?;
    let bytes = fs::metadata(site.image())?.len();
    File::create(site.disk())?.set_len(bytes)?;
    let machine = site.machine(project, &Hardware::new(true))?;
    machine.wait_for("with the record of what is installed", PATIENCE)?;
    machine.cut()?;
    let mut disk = File::open(site.disk())?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = disk.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        ensure!(
            buffer[..read].iter().all(|byte| *byte == 0),
            "something was written to a disk that is too small"
        );
    }
    fs::remove_dir_all(site.without_server())?;
    Ok(1)
}

/// Four CPUs; two of them go and come; then the kernel starts another one in its place, which does not go through the
/// firmware.
const NEXT_KERNEL: &str = r#"
sums() { mount -t ext4 -o ro $part /mnt && cd /mnt || return 1
    echo 3 >/proc/sys/vm/drop_caches; md5sum -c sums >/tmp/sums || cat /tmp/sums; cd /; umount /mnt; [ $(grep -c OK /tmp/sums) = 4 ]; }
under() { for c in $(seq 0 $(($(nproc) - 1))); do
    dd if=/dev/cpu/$c/msr bs=8 iflag=skip_bytes skip=$((0xc0010114)) count=1 2>/dev/null | od -An -tx8
done | grep -c 18; }
again() { for c in 1 3; do echo 0 >/sys/devices/system/cpu/cpu$c/online; done
    for c in 3 1; do echo 1 >/sys/devices/system/cpu/cpu$c/online; done
    echo "$1: $(under) of $(nproc) CPUs with a VMM"; }
if grep -q next_kernel /proc/cmdline; then
    sums && echo SUMS-NEXT
    again NEXT
    cat $disk >/dev/null
    until [ $(under) = 0 ]; do sleep 0.2; done
    again AFTER
    sums && echo SUMS-AFTER
    return 0
fi
again FIRST
mkdir /esp
mount -t vfat -o ro ${part%?}1 /esp || return 1
kexec now /esp/vmlinuz /esp/initrd "$(cat /proc/cmdline) next_kernel"
"#;

/// A kernel in the place of another, and CPUs that come and go, under the VMM.
pub fn next_kernel(project: &Project) -> Result<u32> {
    let programs = guestware::instance_programs(project)?;
    let site = Site::with_script(project, SLOWEST, NEXT_KERNEL, &programs)?;
    // An IOMMU that the OS finds would not let the VMM's own DMA through.
    let hardware = Hardware {
        smp: 4,
        extra: vec!["-device".into(), "intel-iommu".into()],
        ..Hardware::new(true)
    };
    let machine = site.machine(project, &hardware)?;
    let said = machine.end(PATIENCE)?;
    has(
        &said,
        &[
            "IOMMU is hidden",
            "FIRST: 4 of 4",
            "SUMS-NEXT",
            "NEXT: 4 of 4",
            "AFTER: 0 of 4",
            "SUMS-AFTER",
            "METAL-EXIT 0",
        ],
    )?;
    drop(machine);
    site.disk_is_right(&said)?;
    fs::remove_dir_all(site.without_server())?;
    Ok(1)
}
