//! Whether `blanket-boot` finds in a real Debian what its GRUB would start.

use std::fs::{self, File};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use blanket_boot::{Image, Loader, RawFile, initrd};

use crate::debian::{self, ROOT_UUID, Variant};
use crate::project::Project;

/// Reads the image of [`Variant::Base`]; how many things held.
pub fn run(project: &Project) -> Result<u32> {
    let path = debian::image(project, Variant::Base)?;
    let before = fs::metadata(&path)?.modified()?;
    let disk = RawFile::new(File::open(&path)?)?;
    let mut image = Image::open(Arc::new(disk))?;
    let menu = image.menu()?;
    ensure!(menu.loader == Loader::Grub, "not GRUB's: {}", menu.config);
    ensure!(menu.notes.is_empty(), "notes: {:?}", menu.notes);
    // One kernel: by itself, again under the advanced options, and its recovery mode.
    ensure!(menu.entries.len() == 3, "entries: {:?}", menu.entries);
    let default = menu.pick(None)?;
    let release = default
        .kernel()
        .strip_prefix("/boot/vmlinuz-")
        .context("the default's kernel is elsewhere")?;
    ensure!(
        release.ends_with("-cloud-amd64"),
        "the default's kernel is {release}"
    );
    let initrds: Vec<&str> = default.initrds().collect();
    ensure!(
        initrds == [format!("/boot/initrd.img-{release}")],
        "the default's initrds are {initrds:?}"
    );
    let start =
        format!("BOOT_IMAGE=/boot/vmlinuz-{release} root=UUID={ROOT_UUID} ro console=tty0 ");
    ensure!(
        default.cmdline.starts_with(&start),
        "the default's command line is {:?}",
        default.cmdline
    );
    let recovery = menu.pick(Some("recovery mode"))?;
    ensure!(
        recovery.cmdline.contains(" single "),
        "recovery's command line is {:?}",
        recovery.cmdline
    );
    let boot = image.load(default)?;
    ensure!(
        boot.kernel.get(0x202..0x206) == Some(b"HdrS"),
        "{} is no bzImage",
        boot.description
    );
    ensure!(
        initrd::driver(&boot.initrd, initrd::BLOCK_DRIVER)? == initrd::Driver::Module,
        "the driver is not where Debian puts it"
    );
    ensure!(
        initrd::driver(&boot.initrd, "xen-netfront")? == initrd::Driver::Module,
        "the network's driver is not where Debian puts it"
    );
    ensure!(
        initrd::driver(&boot.initrd, "no-such-driver").is_err(),
        "a driver was found that does not exist"
    );
    ensure!(
        fs::metadata(&path)?.modified()? == before,
        "the image was written to"
    );
    Ok(10)
}
