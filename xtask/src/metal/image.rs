//! A small system for a bare-metal machine: GPT, an EFI system partition with GRUB, a stock kernel and an
//! initramfs, and a partition with files of which the sums are known.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use anyhow::Result;
use xshell::cmd;

use crate::apt::Apt;
use crate::initramfs::{Files, Initramfs};
use crate::kernels::{self, Flavour};
use crate::project::Project;

/// MiB of the image.
const SIZE: u64 = 192;
/// First sector and sectors of the EFI system partition.
const ESP: (u64, u64) = (2048, 96 << 11);
/// The same of the partition with files.
pub const DATA: (u64, u64) = (ESP.0 + ESP.1, 72 << 11);
/// The same of one without a file system, for the guest to write to.
pub const SCRATCH: (u64, u64) = (DATA.0 + DATA.1, 16 << 11);

/// Init of the machine: runs `/cmd` and switches the machine off.
const INIT: &str = r#"#!/bin/sh
export PATH=/bin HOME=/root TERM=linux
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs tmp /tmp
for module in $(cat /lab/modules); do insmod $module; done
until [ -e /dev/sda2 ] || [ -e /dev/nvme0n1p2 ]; do sleep 0.1; done
[ -e /dev/sda2 ] && disk=/dev/sda part=/dev/sda2 scratch=/dev/sda3 || { disk=/dev/nvme0n1; part=${disk}p2; scratch=${disk}p3; }
export disk part scratch
echo "METAL-READY $(uname -r) $(nproc) CPUs, $(cut -d. -f1 /proc/uptime) s"
. /cmd
echo "METAL-EXIT $?"
poweroff -f
"#;

/// GRUB's monolithic image, as Debian builds it.
fn grub(project: &Project) -> Result<PathBuf> {
    let _lock = project.lock("grub")?;
    let dir = project.out_dir("grub")?;
    let (root, mark) = (dir.join("root"), dir.join("whole"));
    if !mark.exists() {
        eprintln!("lab: fetching GRUB for UEFI");
        let packages = ["grub-efi-amd64-bin".to_owned()];
        Apt::new(project)?.unpack(&packages, &[], &dir, &root)?;
        fs::write(&mark, "")?;
    }
    Ok(root.join("usr/lib/grub/x86_64-efi/monolithic/grubx64.efi"))
}

/// The image in `dir`, with what is to run and programs for it; its file.
pub fn make(project: &Project, dir: &Path, script: &str, programs: &Files) -> Result<PathBuf> {
    let sh = project.shell()?;
    let kernel = kernels::fetch(project, Flavour::Generic)?;
    let mut archive = Initramfs::with_busybox(project)?;
    archive.text("init", 0o755, INIT);
    archive.text("cmd", 0o644, script);
    archive.add(programs);
    let modules = [
        "ahci",
        "nvme",
        "sd_mod",
        "crc32c_generic",
        "ext4",
        "vfat",
        "nls_cp437",
        "nls_ascii",
        "msr",
        "kvm_amd",
    ];
    archive.modules(project, &kernel, &modules)?;
    let initrd = dir.join("initrd");
    archive.write(&initrd)?;
    let esp = dir.join("esp");
    let _ = fs::remove_file(&esp);
    let kib = (ESP.1 / 2).to_string();
    cmd!(sh, "mkfs.vfat -n EFI -i B1A2C3D4 -C {esp} {kib}")
        .quiet()
        .ignore_stdout()
        .run()?;
    let menu = dir.join("grub.cfg");
    fs::write(
        &menu,
        "set timeout=0\nsearch --file /vmlinuz --set=root\n\
         linux /vmlinuz console=ttyS0 quiet panic=-1 oops=panic tsc=reliable no_timer_check\ninitrd /initrd\nboot\n",
    )?;
    let (grub, vmlinuz) = (grub(project)?, &kernel.vmlinuz);
    cmd!(sh, "mmd -i {esp} ::/EFI ::/EFI/BOOT ::/EFI/debian")
        .quiet()
        .run()?;
    for (from, to) in [
        (grub.as_path(), "::/EFI/BOOT/BOOTX64.EFI"),
        (&menu, "::/EFI/debian/grub.cfg"),
        (vmlinuz, "::/vmlinuz"),
        (&initrd, "::/initrd"),
    ] {
        cmd!(sh, "mcopy -i {esp} {from} {to}").quiet().run()?;
    }
    let tree = dir.join("tree");
    fs::create_dir_all(&tree)?;
    let mut sums = String::new();
    for number in 0..4u8 {
        let name = format!("file{number}");
        let bytes = noise(u64::from(number) + 1, 8 << 20);
        let path = tree.join(&name);
        fs::write(&path, &bytes)?;
        let sum = cmd!(sh, "md5sum {path}").quiet().read()?;
        let sum = sum.split_whitespace().next().unwrap_or_default().to_owned();
        sums.push_str(&format!("{sum}  {name}\n"));
    }
    fs::write(tree.join("sums"), sums)?;
    let raw = dir.join("image.raw");
    let _ = fs::remove_file(&raw);
    File::create(&raw)?.set_len(SIZE << 20)?;
    let partition = |(start, size): (u64, u64), kind: &str| {
        format!("start={start}, size={size}, type={kind}\n")
    };
    let linux = "0FC63DAF-8483-4772-8E79-3D69D8477DE4";
    let table = [
        "label: gpt\n".to_owned(),
        partition(ESP, "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"),
        partition(DATA, linux),
        partition(SCRATCH, linux),
    ]
    .concat();
    cmd!(sh, "sfdisk --quiet {raw}")
        .stdin(table)
        .quiet()
        .run()?;
    let mut image = File::options().write(true).open(&raw)?;
    image.seek(SeekFrom::Start(ESP.0 << 9))?;
    std::io::copy(&mut File::open(&esp)?, &mut image)?;
    let (offset, size) = (
        format!("offset={}", DATA.0 << 9),
        format!("{}k", DATA.1 / 2),
    );
    cmd!(
        sh,
        "mke2fs -F -q -t ext4 -O ^has_journal -E {offset} -d {tree} {raw} {size}"
    )
    .quiet()
    .ignore_stdout()
    .run()?;
    image.seek(SeekFrom::Start(SCRATCH.0 << 9))?;
    image.write_all(&noise(0, usize::try_from(SCRATCH.1 << 9)?))?;
    fs::remove_dir_all(&tree)?;
    fs::remove_file(&esp)?;
    Ok(raw)
}

/// Bytes that are the same each time and do not compress.
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .read_exact(&mut out)
        .ok();
    out
}
