//! `package`: Debian packages of the static commands and of the module.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use xshell::cmd;

use crate::build;
use crate::demo;
use crate::initramfs::{self, Files};
use crate::kernels::{self, Flavour};
use crate::lab::Payload;
use crate::project::Project;
use crate::qemu::{self, End, Hardware, Machine};
use crate::setup::{self, Need};

/// Arguments of `package`.
#[derive(clap::Args)]
pub struct Args {
    /// Then install them on a bare Debian 12 instance with one CPU and 1 GiB in
    /// QEMU, and run a VM there (as root; takes some minutes).
    #[arg(long)]
    pub test: bool,
}

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Where the module's sources go; dkms wants this name.
const SOURCES: &str = concat!("usr/src/blanket-", env!("CARGO_PKG_VERSION"));

/// The `package` verb.
pub fn run(project: &Project, args: &Args) -> Result<()> {
    setup::ensure(project, &[Need::Build, Need::Boot])?;
    let packages = [
        command(project)?,
        module(project)?,
        supercloud(project)?,
        bmcast(project)?,
    ];
    for package in &packages {
        println!("{}", package.display());
    }
    if args.test {
        try_out(project, &packages)
    } else {
        Ok(())
    }
}

/// A package's tree under target/package, empty.
fn tree(project: &Project, name: &str) -> Result<PathBuf> {
    let dir = project.out_dir("package")?.join(name);
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("cannot empty {}", dir.display()))?;
    }
    fs::create_dir_all(dir.join("DEBIAN"))?;
    Ok(dir)
}

fn put(root: &Path, path: &str, mode: u32, content: &[u8]) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let to = root.join(path);
    let parent = to.parent().context("a file without a directory")?;
    fs::create_dir_all(parent)?;
    fs::write(&to, content).with_context(|| format!("cannot write {}", to.display()))?;
    fs::set_permissions(&to, fs::Permissions::from_mode(mode))?;
    Ok(())
}

fn copy(root: &Path, path: &str, mode: u32, from: &Path) -> Result<()> {
    let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    put(root, path, mode, &content)
}

/// Makes the package of what is in `root`.
fn pack(project: &Project, root: &Path, control: &str) -> Result<PathBuf> {
    let sh = project.shell()?;
    let kib = cmd!(sh, "du -sk --exclude=DEBIAN {root}").quiet().read()?;
    let kib = kib.split_whitespace().next().unwrap_or("0").to_owned();
    put(
        root,
        "DEBIAN/control",
        0o644,
        format!("{control}Installed-Size: {kib}\n").as_bytes(),
    )?;
    let to = project.out_dir("package")?;
    let built = cmd!(sh, "dpkg-deb --root-owner-group -Zxz --build {root} {to}")
        .quiet()
        .read()?;
    // "dpkg-deb: building package 'x' in '/path/x.deb'."
    let path = built
        .rsplit('\'')
        .nth(1)
        .context("dpkg-deb names no package")?;
    Ok(PathBuf::from(path))
}

const LICENCE: &str = "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\n\
    Upstream-Name: blanket\n\nFiles: *\nCopyright: the Blanket contributors\n\
    License: Apache-2.0 OR MIT\n\nFiles: usr/src/*\nCopyright: the Blanket contributors\n\
    License: GPL-2.0 OR MIT\n";

/// The tree of a command: it, its man pages, completions and papers.
fn command_tree(project: &Project, name: &str, program: &Path) -> Result<PathBuf> {
    let root = tree(project, name)?;
    let sh = project.shell()?;
    copy(&root, &format!("usr/bin/{name}"), 0o755, program)?;
    let man = tree(project, &format!("man-{name}"))?;
    cmd!(sh, "{program} generate man {man}").quiet().run()?;
    for entry in fs::read_dir(&man)? {
        let page = entry?.path();
        let name = page
            .file_name()
            .context("a page without a name")?
            .to_string_lossy();
        if page.is_file() {
            copy(&root, &format!("usr/share/man/man1/{name}"), 0o644, &page)?;
        }
    }
    cmd!(sh, "gzip -9nr {root}/usr/share/man").quiet().run()?;
    for (shell, path) in [
        (
            "bash",
            format!("usr/share/bash-completion/completions/{name}"),
        ),
        ("zsh", format!("usr/share/zsh/vendor-completions/_{name}")),
        (
            "fish",
            format!("usr/share/fish/vendor_completions.d/{name}.fish"),
        ),
    ] {
        let text = cmd!(sh, "{program} generate completions {shell}")
            .quiet()
            .read()?;
        put(&root, &path, 0o644, format!("{text}\n").as_bytes())?;
    }
    let papers = format!("usr/share/doc/{name}");
    put(
        &root,
        &format!("{papers}/copyright"),
        0o644,
        LICENCE.as_bytes(),
    )?;
    let readme = project.root.join("README.md");
    copy(&root, &format!("{papers}/README.md"), 0o644, &readme)?;
    Ok(root)
}

fn command(project: &Project) -> Result<PathBuf> {
    let blanket = build::command(project)?;
    let root = command_tree(project, "blanket", &blanket)?;
    let control = format!(
        "Package: blanket\nVersion: {VERSION}\nArchitecture: amd64\nSection: admin\n\
         Priority: optional\nMaintainer: the Blanket contributors <blanket@localhost>\n\
         Recommends: blanket-dkms (= {VERSION})\n\
         Description: VMs on a machine without nested virtualization\n \
         Runs unmodified stock Linux kernels as VMs on any x86-64 Linux instance, without VMX,\n \
         SVM or a custom kernel on either side. This package has the command, which is static.\n"
    );
    pack(project, &root, &control)
}

fn supercloud(project: &Project) -> Result<PathBuf> {
    let program = build::supercloud(project)?;
    let root = command_tree(project, "supercloud", &program)?;
    copy(
        &root,
        "usr/lib/systemd/system/supercloud.service",
        0o644,
        &project.root.join("supercloud/cli/supercloud.service"),
    )?;
    put(&root, "DEBIAN/postinst", 0o755, RELOAD.as_bytes())?;
    put(&root, "DEBIAN/prerm", 0o755, STOP_AGENT.as_bytes())?;
    let control = format!(
        "Package: supercloud\nVersion: {VERSION}\nArchitecture: amd64\nSection: admin\n\
         Priority: optional\nMaintainer: the Blanket contributors <blanket@localhost>\n\
         Depends: blanket (= {VERSION})\n\
         Description: several instances as nodes, and VMs that move between them\n \
         The agent of a node and the command that talks to it. VMs are run, listed and moved by\n \
         name, while they run, between instances of any provider.\n"
    );
    pack(project, &root, &control)
}

fn bmcast(project: &Project) -> Result<PathBuf> {
    let program = build::bmcast(project)?;
    let root = command_tree(project, "bmcast", &program)?;
    let efi = build::efi(project)?;
    copy(&root, "usr/lib/bmcast/bmcast.efi", 0o644, &efi)?;
    let control = format!(
        "Package: bmcast\nVersion: {VERSION}\nArchitecture: amd64\nSection: admin\n\
         Priority: optional\nMaintainer: the Blanket contributors <blanket@localhost>\n\
         Description: bare-metal machines that start at once\n \
         Serves an image, makes the medium that a machine boots from, and shows how far it is. The\n \
         medium's thin VMM starts the OS while the image streams in, and then removes itself.\n"
    );
    pack(project, &root, &control)
}

/// The unit is not started by itself: the first start makes a cluster, or joins one.
const RELOAD: &str = r#"#!/bin/sh
set -e
if [ "$1" = configure ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi
exit 0
"#;

/// VMs go on without their agent.
const STOP_AGENT: &str = r#"#!/bin/sh
set -e
if [ "$1" = remove ] && [ -d /run/systemd/system ]; then
    systemctl disable --now supercloud.service || true
fi
exit 0
"#;

/// Files of the module's directory that are not part of it.
const NOT_SHIPPED: &[&str] = &["60-blanket.rules"];

fn module(project: &Project) -> Result<PathBuf> {
    let core = build::core(project)?;
    let root = tree(project, "blanket-dkms")?;
    let source = project.root.join("blanket/kmod");
    let (sh, kmod) = (project.shell()?, "blanket/kmod");
    // What is in the repository, and not what a build may have left beside it.
    let files = cmd!(sh, "git ls-files {kmod}").quiet().read()?;
    for file in files.lines() {
        let name = file.trim_start_matches("blanket/kmod/");
        if !name.contains('/') && !NOT_SHIPPED.contains(&name) {
            copy(
                &root,
                &format!("{SOURCES}/{name}"),
                0o644,
                &source.join(name),
            )?;
        }
    }
    let conf = fs::read_to_string(source.join("dkms.conf")).context("no dkms.conf")?;
    ensure!(
        conf.contains(&format!("PACKAGE_VERSION=\"{VERSION}\"")),
        "dkms.conf does not say PACKAGE_VERSION=\"{VERSION}\""
    );
    copy(&root, &format!("{SOURCES}/blanket-core.bin"), 0o644, &core)?;
    copy(
        &root,
        "usr/lib/udev/rules.d/60-blanket.rules",
        0o644,
        &source.join("60-blanket.rules"),
    )?;
    put(
        &root,
        "usr/lib/modules-load.d/blanket.conf",
        0o644,
        b"blanket\n",
    )?;
    put(
        &root,
        "usr/lib/sysusers.d/blanket.conf",
        0o644,
        b"g blanket -\n",
    )?;
    put(
        &root,
        "usr/share/doc/blanket-dkms/copyright",
        0o644,
        LICENCE.as_bytes(),
    )?;
    let script = |text: &str| text.replace("@VERSION@", VERSION);
    put(&root, "DEBIAN/postinst", 0o755, script(POSTINST).as_bytes())?;
    put(&root, "DEBIAN/prerm", 0o755, script(PRERM).as_bytes())?;
    let control = format!(
        "Package: blanket-dkms\nVersion: {VERSION}\nArchitecture: amd64\nSection: kernel\n\
         Priority: optional\nMaintainer: the Blanket contributors <blanket@localhost>\n\
         Depends: dkms\n\
         Recommends: linux-headers-amd64 | linux-headers-cloud-amd64 | linux-headers-rt-amd64\n\
         Description: VMs on a machine without nested virtualization: the kernel module\n \
         Source of blanket.ko, with the core image inside, which dkms builds for each kernel.\n"
    );
    pack(project, &root, &control)
}

const POSTINST: &str = r#"#!/bin/sh
set -e
if [ "$1" = configure ]; then
    getent group blanket >/dev/null || groupadd --system blanket
    # Also for the next kernels: dkms builds for those when they are installed.
    /usr/lib/dkms/common.postinst blanket @VERSION@ /usr/share/blanket-dkms "" "$2"
    modprobe -q blanket || echo "blanket: not loaded now; see 'blanket doctor'" >&2
fi
exit 0
"#;

const PRERM: &str = r#"#!/bin/sh
set -e
if [ "$1" = remove ] || [ "$1" = upgrade ] || [ "$1" = deconfigure ]; then
    modprobe -qr blanket || true
    if [ "$(dkms status -m blanket -v @VERSION@)" ]; then
        dkms remove -m blanket -v @VERSION@ --all
    fi
fi
exit 0
"#;

/// CPU model of the instance that the packages are tried on.
const BARE: &str = "EPYC,-svm";

/// Installs the packages with apt on a Debian 12 that knows no Rust, in an
/// instance with one CPU and 1 GiB, and runs a VM there.
fn try_out(project: &Project, packages: &[PathBuf]) -> Result<()> {
    let kernel = kernels::fetch(project, Flavour::Cloud)?;
    let disk = bare_debian(project, &kernel.release)?;
    let mut payload = Payload::new(project, &kernel, Hardware::Virtio, BARE)?;
    payload.modules(project, &kernel, &["virtio_pci", "virtio_blk", "ext4"])?;
    for package in packages {
        let name = package
            .file_name()
            .context("a package without a name")?
            .to_string_lossy();
        payload
            .archive
            .copy(&format!("packages/{name}"), 0o644, package);
    }
    for flavour in demo::GUESTS {
        payload.guest_kernel(&kernels::fetch(project, flavour)?);
    }
    payload.archive.text("demo/demo.sh", 0o644, demo::SCRIPT);
    payload
        .archive
        .text("demo/mkinitrd", 0o644, demo::HERE_INITRD);
    let script = "echo VM-WORKS\n";
    payload.guest_initrd(&initramfs::guest(project, Some(script), &Files::new())?)?;
    payload.command(TRY_OUT);
    let machine = Machine {
        cpu: BARE.into(),
        hardware: Hardware::Virtio,
        kernel,
        memory: "1G".into(),
        smp: 1,
        icount: false,
        append: String::new(),
        node: 1,
        group: None,
        companions: 0,
        extra: vec![
            "-drive".into(),
            format!(
                "if=none,id=root,file={},format=raw,snapshot=on",
                disk.display()
            ),
            "-device".into(),
            "virtio-blk-pci,drive=root,serial=root".into(),
        ],
    };
    let mut out = std::io::stdout().lock();
    let timeout = Duration::from_secs(1800);
    let outcome = qemu::run(project, &[machine], &payload.archive, timeout, &mut out)?;
    drop(out);
    if outcome.end != End::Exit(0) {
        eprint!("{}", outcome.console_tail(100));
        bail!(
            "the packages do not work on a bare instance: {:?}",
            outcome.end
        );
    }
    outcome.discard();
    println!("the packages work on a bare instance");
    Ok(())
}

/// Runs in the instance, from its initramfs.
const TRY_OUT: &str = r#"set -e
# until_works LOG COMMAND...: for half a minute, or a word of why in LOG.
until_works() {
    log=$1
    shift
    tries=0
    until "$@"; do
        tries=$((tries + 1))
        [ $tries -lt 300 ] || { cat $log; exit 1; }
        sleep 0.1
    done
}
for disk in /sys/block/vd*; do
    [ "$(cat $disk/serial)" = root ] && mount -t ext4 /dev/${disk##*/} /mnt
done
[ -e /mnt/usr/bin/apt-get ]
for dir in proc sys dev dev/pts; do mount -o bind /$dir /mnt/$dir; done
mount -t tmpfs run /mnt/run
mkdir /mnt/run/it
cp -r /packages /guest /demo /mnt/run/it/
rm -r /packages /guest /demo
! [ -e /mnt/usr/bin/cargo ]
export DEBIAN_FRONTEND=noninteractive
chroot /mnt sh -c 'apt-get -q install -y /run/it/packages/*.deb'
chroot /mnt blanket doctor
chroot /mnt blanket run --kernel /run/it/guest/vmlinuz --initrd /run/it/guest/initrd.img \
    --memory 128M --cmdline 'console=hvc0 quiet' </dev/null >/tmp/out 2>&1 || { cat /tmp/out; exit 1; }
cat /tmp/out
grep -q VM-WORKS /tmp/out
[ -e /mnt/usr/share/man/man1/blanket.1.gz ]
# The demo's script by Debian's own shell and programs, as `./x demo --here` runs it.
chroot /mnt env KERNELS='cloud=/run/it/guest/vmlinuz-cloud generic=/run/it/guest/vmlinuz-generic' \
    MKINITRD='sh /run/it/demo/mkinitrd /run/it/guest/initrd.img' sh /run/it/demo/demo.sh
# A node of its own, and a VM by its name.
[ -e /mnt/usr/share/man/man1/supercloud.1.gz ]
[ -e /mnt/usr/lib/systemd/system/supercloud.service ]
# A server of an image, and a medium for it, with the VMM that the package has.
[ -e /mnt/usr/share/man/man1/bmcast.1.gz ]
chroot /mnt sh -c 'head -c 1000000 /dev/urandom >/run/it/image'
chroot /mnt bmcast serve /run/it/image --listen 127.0.0.1:7788 >/tmp/serve.log 2>&1 &
server=$!
until_works /tmp/serve.log chroot /mnt bmcast image --server http://127.0.0.1:7788 --out /run/it/medium
kill $server
wait $server || true
chroot /mnt supercloud node start --name bare --listen 127.0.0.1:7700 2>/tmp/agent.log &
agent=$!
until_works /tmp/agent.log chroot /mnt supercloud node list
chroot /mnt supercloud vm run --name web --kernel /run/it/guest/vmlinuz --initrd /run/it/guest/initrd.img \
    --memory 128M --cmdline 'console=hvc0 quiet' || { cat /tmp/agent.log; exit 1; }
until_works /tmp/agent.log chroot /mnt sh -c 'supercloud vm logs web | grep VM-WORKS'
until chroot /mnt supercloud vm list | grep 'web .*ended'; do sleep 0.1; done
chroot /mnt supercloud vm rm web
# Another node has it installed and added by ssh, as from another machine.
mkdir -p /mnt/run/sshd /mnt/root/.ssh
chroot /mnt sh -c 'ssh-keygen -q -t ed25519 -N "" -f /root/.ssh/id_ed25519
    cp /root/.ssh/id_ed25519.pub /root/.ssh/authorized_keys
    echo "StrictHostKeyChecking accept-new" >/root/.ssh/config
    /usr/sbin/sshd -p 2222'
here='chroot /mnt env SUPERCLOUD_RUNTIME_DIR=/run/here SUPERCLOUD_DATA_DIR=/run/here-data supercloud'
$here node start --name here --listen 127.0.0.1:7701 2>/tmp/here.log &
other=$!
until_works /tmp/here.log $here node list
packages=$(cd /mnt; for file in run/it/packages/*.deb; do echo "--package /$file"; done)
$here node add ssh://root@127.0.0.1:2222 $packages || { cat /tmp/here.log /tmp/agent.log; exit 1; }
$here node list
$here node list | grep -q '^bare .*reachable'
sshd=$(cat /mnt/run/sshd.pid)
kill $sshd
while kill -0 $sshd 2>/dev/null; do sleep 0.1; done
kill $agent $other
wait $agent
wait $other
chroot /mnt apt-get -q remove -y bmcast supercloud blanket blanket-dkms
! grep -q '^blanket ' /proc/modules
umount /mnt/run /mnt/dev/pts /mnt/dev /mnt/sys /mnt/proc /mnt
"#;

/// A disk image of a minimal Debian 12 that has what the packages depend on and
/// what the demo's script runs, so that the instance needs no network.
fn bare_debian(project: &Project, release: &str) -> Result<PathBuf> {
    setup::install_missing(project, &["mmdebstrap", "e2fsprogs"])?;
    let _lock = project.lock("bare-debian")?;
    let dir = project.out_dir("package")?;
    let (disk, mark) = (dir.join("bare-debian.img"), dir.join("bare-debian.for"));
    let include = format!(
        "dkms,linux-headers-{release},gcc-12,kmod,passwd,busybox-static,openssh-server,openssh-client"
    );
    if fs::read_to_string(&mark).is_ok_and(|made_for| made_for == include) {
        return Ok(disk);
    }
    eprintln!("package: making a minimal Debian 12");
    let sh = project.shell()?;
    let (tar, tree) = (dir.join("bare-debian.tar"), dir.join("bare-debian"));
    let sources = project.out_dir("apt/etc")?.join("sources.list");
    cmd!(
        sh,
        "mmdebstrap --quiet --variant=minbase --include={include} bookworm {tar} {sources}"
    )
    .quiet()
    .run()?;
    let _ = fs::remove_dir_all(&tree);
    fs::create_dir_all(&tree)?;
    cmd!(sh, "tar -xpf {tar} -C {tree}").quiet().run()?;
    let _ = fs::remove_file(&disk);
    cmd!(sh, "mke2fs -q -t ext4 -d {tree} {disk} 3G")
        .quiet()
        .run()?;
    fs::remove_dir_all(&tree)?;
    fs::remove_file(&tar)?;
    fs::write(&mark, include)?;
    Ok(disk)
}
