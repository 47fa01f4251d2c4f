//! Debian 12 as a whole-disk image, as somebody would bring it from a cloud: GPT, an EFI
//! system partition, systemd, cloud-init, sshd, GRUB's configuration, a stock kernel.
//!
//! The packages are Debian's own, in their own default configuration; what is set here is
//! what an administrator sets (network, source of cloud-init's data, fstab). No user, no
//! password and no host key is in the image: cloud-init brings them (NoCloud).

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use xshell::{Shell, cmd};

use crate::apt;
use crate::project::{Project, write_if_changed};
use crate::setup::{self, Need};

/// How much is in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Variant {
    /// A system that boots, has a network, and lets its user in.
    Base,
    /// The same with PostgreSQL (and pgbench), fio and iperf3.
    Full,
    /// The same with the kernel that has the drivers of real machines.
    Metal,
}

/// Arguments of `image`.
#[derive(clap::Args)]
pub struct Args {
    /// How much is in it.
    #[arg(value_enum, default_value = "base")]
    variant: Variant,
}

/// The `image` verb.
pub fn run(project: &Project, args: &Args) -> Result<()> {
    println!("{}", image(project, args.variant)?.display());
    println!("{}", qcow2(project, args.variant)?.display());
    Ok(())
}

/// What all variants have but a kernel, without what these depend on.
const BASE: &[&str] = &[
    "systemd",
    "systemd-sysv",
    "systemd-resolved",
    "libpam-systemd",
    "dbus",
    "udev",
    "initramfs-tools",
    "zstd",
    "grub-cloud-amd64",
    "cloud-init",
    "openssh-server",
    "sudo",
    "iproute2",
    "iputils-ping",
    "netbase",
    "nftables",
    "iptables",
    "util-linux",
    "e2fsprogs",
    "procps",
    "kmod",
];

/// What is more in all but [`Variant::Base`].
const FULL: &[&str] = &["postgresql", "postgresql-contrib", "fio", "iperf3"];

/// Sector of 512 bytes where the EFI system partition starts, and its length.
const ESP: (u64, u64) = (2048, 64 << 11);
/// The same for the partition in which GRUB for BIOS would be installed.
const BIOS_BOOT: (u64, u64) = (ESP.0 + ESP.1, 4 << 11);
/// Where the root file system starts; it has the rest.
pub const ROOT_START: u64 = BIOS_BOOT.0 + BIOS_BOOT.1;
/// Left free for the second copy of the partition table.
const TAIL: u64 = 2048;

/// `root=UUID=` of every image: the recipe gives the same disk each time.
pub const ROOT_UUID: &str = "b1a2c3d4-5e6f-4a7b-8c9d-0e1f2a3b4c5d";
const DISK_UUID: &str = "5C0D1E2F-3A4B-4C5D-9E6F-7A8B9C0D1E2F";
const ESP_ID: &str = "B1A2C3D4";

impl Variant {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Full => "full",
            Self::Metal => "metal",
        }
    }

    fn packages(self) -> Vec<&'static str> {
        let (kernel, more): (_, &[&str]) = match self {
            Self::Base => ("linux-image-cloud-amd64", &[]),
            Self::Full => ("linux-image-cloud-amd64", FULL),
            Self::Metal => ("linux-image-amd64", FULL),
        };
        let all = std::iter::once(&kernel).chain(BASE).chain(more);
        all.copied().collect()
    }

    /// Size of the disk, MiB. The files are sparse.
    fn size_mib(self) -> u64 {
        match self {
            Self::Base => 2048,
            Self::Full | Self::Metal => 4096,
        }
    }
}

/// The raw image of `variant`, made unless that was done before. It is to be read only:
/// whoever boots it writes to a copy or an overlay.
pub fn image(project: &Project, variant: Variant) -> Result<PathBuf> {
    Ok(made(project, variant)?.join("disk.raw"))
}

/// The same disk as qcow2.
pub fn qcow2(project: &Project, variant: Variant) -> Result<PathBuf> {
    Ok(made(project, variant)?.join("disk.qcow2"))
}

/// QEMU's options for an instance with a copy of the image as its second disk, `/dev/vdb`.
/// What is written to it is lost with the instance.
pub fn drive(project: &Project, variant: Variant) -> Result<Vec<String>> {
    let image = image(project, variant)?;
    let drive = format!(
        "file={},format=raw,if=virtio,snapshot=on,discard=unmap",
        image.display()
    );
    Ok(vec!["-drive".into(), drive])
}

/// The directory with both.
fn made(project: &Project, variant: Variant) -> Result<PathBuf> {
    let name = variant.name();
    let _lock = project.lock(&format!("debian-{name}"))?;
    let dir = project.out_dir(&format!("images/debian-{name}"))?;
    let mirrors = apt::host_mirrors()?;
    let recipe = recipe(variant);
    // Written last: its presence says that the images are whole, and by what.
    let mark = dir.join("recipe");
    if fs::read_to_string(&mark).is_ok_and(|old| old == recipe) {
        return Ok(dir);
    }
    let _ = fs::remove_file(&mark);
    setup::ensure(project, &[Need::Images])?;
    let start = Instant::now();
    eprintln!("images: making Debian 12 ({name}), which takes minutes");
    let sh = project.shell()?;
    bootstrap(&sh, variant, &mirrors, &dir)?;
    disk(&sh, variant, &dir)?;
    write_if_changed(&mark, recipe.as_bytes())?;
    eprintln!(
        "images: {} made in {} seconds",
        dir.join("disk.raw").display(),
        start.elapsed().as_secs()
    );
    Ok(dir)
}

/// All that decides what is in an image, but the state of Debian's archive.
fn recipe(variant: Variant) -> String {
    format!(
        "{}\n{PREPARE}\n{CUSTOMIZE}\n{}\n{}\n",
        variant.packages().join(" "),
        table(variant),
        populate(variant)
    )
}

/// Packages to a tar archive. Mmdebstrap needs no root where it may make user namespaces.
fn bootstrap(sh: &Shell, variant: Variant, mirrors: &(String, String), dir: &Path) -> Result<()> {
    let script = |name: &str, text: &str| -> Result<PathBuf> {
        let script = dir.join(name);
        write_if_changed(&script, text.as_bytes())?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        Ok(script)
    };
    let (prepare, customize) = (script("prepare", PREPARE)?, script("customize", CUSTOMIZE)?);
    let (debian, security) = mirrors;
    let keys = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]";
    let sources = [
        format!("deb {keys} {debian} bookworm main"),
        format!("deb {keys} {debian} bookworm-updates main"),
        format!("deb {keys} {security} bookworm-security main"),
    ];
    let include = variant.packages().join(",");
    let mode = if is_root(sh)? { "root" } else { "unshare" };
    // What the machine's apt needs to reach a mirror. The image does not keep it.
    let options: Vec<String> = apt::host_proxies(sh)?
        .into_iter()
        .map(|option| format!("--aptopt={option}"))
        .collect();
    let tar = dir.join("root.tar");
    cmd!(
        sh,
        "mmdebstrap --quiet --mode={mode} --variant=minbase --include={include} {options...}
         --essential-hook={prepare} --customize-hook={customize} bookworm {tar} {sources...}"
    )
    .quiet()
    .run()
    .context("mmdebstrap failed; its messages are above")
}

/// The tar archive to a disk.
fn disk(sh: &Shell, variant: Variant, dir: &Path) -> Result<()> {
    let raw = dir.join("disk.raw");
    let _ = fs::remove_file(&raw);
    fs::File::create(&raw)?.set_len(variant.size_mib() << 20)?;
    let sbin = path_with_sbin();
    cmd!(sh, "sfdisk --quiet {raw}")
        .env("PATH", &sbin)
        .stdin(table(variant))
        .quiet()
        .run()
        .context("sfdisk failed")?;
    // Files keep their owners in a namespace like mmdebstrap's.
    let helper: &[&str] = if is_root(sh)? {
        &[]
    } else {
        &["mmdebstrap", "--unshare-helper"]
    };
    let script = populate(variant);
    let words = helper.iter().copied().chain(["sh", "-euc", &script]);
    let words: Vec<&str> = words.collect();
    let (program, rest) = words.split_first().context("an empty command")?;
    cmd!(sh, "{program} {rest...} sh {dir}")
        .env("PATH", &sbin)
        .quiet()
        .ignore_stdout()
        .run()
        .context("the image's file systems were not made")?;
    let qcow2 = dir.join("disk.qcow2");
    cmd!(sh, "qemu-img convert -q -f raw -O qcow2 {raw} {qcow2}")
        .quiet()
        .run()
        .context("qemu-img failed")
}

/// The partition table, for sfdisk. The numbers are those of Debian's own cloud images.
fn table(variant: Variant) -> String {
    let end = (variant.size_mib() << 11) - TAIL;
    format!(
        "label: gpt\nlabel-id: {DISK_UUID}\n\
         1 : start={ROOT_START}, size={}, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, uuid={DISK_UUID}\n\
         14 : start={}, size={}, type=21686148-6449-6E6F-744E-656564454649\n\
         15 : start={}, size={}, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B\n",
        end - ROOT_START,
        BIOS_BOOT.0,
        BIOS_BOOT.1,
        ESP.0,
        ESP.1,
    )
}

/// Shell that fills the partitions of `$1/disk.raw` from `$1/root.tar`, and removes that.
fn populate(variant: Variant) -> String {
    let root_kib = ((variant.size_mib() << 11) - TAIL - ROOT_START) / 2;
    format!(
        r#"
tree=$1/tree
rm -rf "$tree"
mkdir "$tree"
tar --numeric-owner --xattrs --xattrs-include='*' -C "$tree" -xf "$1/root.tar"
rm -f "$1/esp"
mkfs.vfat -n EFI -i {ESP_ID} -C "$1/esp" {esp_kib}
mcopy -s -i "$1/esp" "$tree"/boot/efi/EFI ::/
dd if="$1/esp" of="$1/disk.raw" bs=512 seek={esp} conv=notrunc,sparse status=none
rm -rf "$tree"/boot/efi/EFI
mke2fs -F -q -t ext4 -L root -U {ROOT_UUID} -E offset={root_bytes},hash_seed={ROOT_UUID} \
    -d "$tree" "$1/disk.raw" {root_kib}k
rm -rf "$tree" "$1/root.tar" "$1/esp"
"#,
        esp = ESP.0,
        esp_kib = ESP.1 / 2,
        root_bytes = ROOT_START << 9,
    )
}

/// Run by mmdebstrap with the new system's root, before all packages but the essential ones.
///
/// What an installer asks first. Cloud-init is told not to search for clouds that are not there
/// (`dpkg-reconfigure cloud-init`).
const PREPARE: &str = r#"#!/bin/sh
set -eu
root=$1
echo debian >"$root"/etc/hostname
printf '127.0.0.1\tlocalhost\n127.0.1.1\tdebian\n::1\tlocalhost ip6-localhost\n' >"$root"/etc/hosts
cat >"$root"/etc/fstab <<END
UUID=b1a2c3d4-5e6f-4a7b-8c9d-0e1f2a3b4c5d / ext4 errors=remount-ro 0 1
UUID=B1A2-C3D4 /boot/efi vfat umask=0077 0 0
END
chroot "$root" debconf-set-selections <<END
cloud-init cloud-init/datasources multiselect NoCloud, None
locales locales/default_environment_locale select C.UTF-8
END
"#;

/// Run by mmdebstrap with the new system's root, after all packages.
///
/// `update-grub` is Debian's own. It asks `grub-probe` about the disk under `/`, which is not
/// there yet, so for that one call something else answers what grub-probe would.
const CUSTOMIZE: &str = r#"#!/bin/sh
set -eu
root=$1
uuid=b1a2c3d4-5e6f-4a7b-8c9d-0e1f2a3b4c5d

rm -f "$root"/etc/apt/sources.list.d/* "$root"/etc/apt/apt.conf.d/99mmdebstrap
cat >"$root"/etc/apt/sources.list <<END
deb http://deb.debian.org/debian bookworm main
deb http://deb.debian.org/debian bookworm-updates main
deb http://deb.debian.org/debian-security bookworm-security main
END
# Each system that is made of the image is to have keys of its own.
rm -f "$root"/etc/ssh/ssh_host_*
chroot "$root" systemctl --quiet enable systemd-networkd

mv "$root"/usr/sbin/grub-probe "$root"/usr/sbin/grub-probe.real
cat >"$root"/usr/sbin/grub-probe <<'END'
#!/bin/sh
target=
for word; do
    case $word in --target=*) target=${word#*=} ;; esac
done
case $target in
device) echo /dev/vda1 ;;
disk) echo /dev/vda ;;
fs) echo ext2 ;;
fs_uuid) echo b1a2c3d4-5e6f-4a7b-8c9d-0e1f2a3b4c5d ;;
partmap) echo gpt ;;
compatibility_hint) echo hd0,gpt1 ;;
hints_string) echo "--hint-bios=hd0,gpt1 --hint-efi=hd0,gpt1 --hint-baremetal=ahci0,gpt1" ;;
esac
END
chmod 755 "$root"/usr/sbin/grub-probe
# GRUB's scripts name the root by UUID only where udev knows the UUID.
mkdir -p "$root"/dev/disk/by-uuid
: >"$root"/dev/disk/by-uuid/$uuid
mkdir -p "$root"/boot/grub
chroot "$root" update-grub
rm -r "$root"/dev/disk
mv "$root"/usr/sbin/grub-probe.real "$root"/usr/sbin/grub-probe

# As grub-install --removable leaves it, with the binary that Debian builds in advance.
efi=$root/boot/efi/EFI
mkdir -p "$efi"/BOOT "$efi"/debian
cp "$root"/usr/lib/grub/x86_64-efi/monolithic/grubx64.efi "$efi"/BOOT/BOOTX64.EFI
cat >"$efi"/debian/grub.cfg <<END
search.fs_uuid $uuid root
set prefix=(\$root)'/boot/grub'
configfile \$prefix/grub.cfg
END
"#;

fn is_root(sh: &Shell) -> Result<bool> {
    Ok(cmd!(sh, "id -u").quiet().read()? == "0")
}

/// Debian keeps mkfs and sfdisk where not everyone's path leads.
pub fn path_with_sbin() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{path}:/usr/sbin:/sbin")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partitions_do_not_overlap() {
        for variant in [Variant::Base, Variant::Full, Variant::Metal] {
            let end = (variant.size_mib() << 11) - TAIL;
            assert!(ESP.0 + ESP.1 <= BIOS_BOOT.0 && BIOS_BOOT.0 + BIOS_BOOT.1 <= ROOT_START);
            assert!(ROOT_START < end);
            for start in [ESP.0, BIOS_BOOT.0, ROOT_START] {
                assert_eq!(start % 2048, 0);
            }
        }
    }

    #[test]
    fn the_recipe_names_one_file_system() {
        assert!(CUSTOMIZE.contains(&format!("uuid={ROOT_UUID}")));
        assert!(CUSTOMIZE.contains(&format!("fs_uuid) echo {ROOT_UUID}")));
        assert!(PREPARE.contains(&format!("UUID={ROOT_UUID} / ext4")));
        assert!(PREPARE.contains("UUID=B1A2-C3D4") && ESP_ID == "B1A2C3D4");
    }

    #[test]
    fn variants_have_recipes_of_their_own() {
        assert_ne!(recipe(Variant::Base), recipe(Variant::Full));
    }
}
