//! `setup`: the Debian packages that the other verbs need.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use xshell::cmd;

use crate::project::Project;

/// What a verb is about to do; decides which packages it needs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// Compile the core, the module and the command.
    Build,
    /// Unpack kernels and boot them in QEMU; run the tests.
    Boot,
    /// Make disk images of whole systems, and read them.
    Images,
    /// Boot machines with UEFI firmware.
    Metal,
}

/// Debian packages by need. gcc-12 is what Debian 12's kernels were built with,
/// libelf1 is for the objtool of their headers, xz for the 6.12 modules; qemu-utils makes and
/// checks the disk images of unit tests, iproute2, passt, nftables and dnsmasq make the networks of others.
const PACKAGES: &[(Need, &[&str])] = &[
    (
        Need::Build,
        &["gcc", "gcc-12", "libc6-dev", "binutils", "make", "libelf1"],
    ),
    (
        Need::Boot,
        &[
            "qemu-system-x86",
            "qemu-utils",
            "busybox-static",
            "kmod",
            "xz-utils",
            "apt",
            "dpkg",
            "util-linux",
            "debian-archive-keyring",
            "iproute2",
            "passt",
            "nftables",
            "dnsmasq-base",
        ],
    ),
    (
        Need::Images,
        &[
            "mmdebstrap",
            "uidmap",
            "fdisk",
            "e2fsprogs",
            "dosfstools",
            "mtools",
            "xfsprogs",
            "btrfs-progs",
            "qemu-utils",
            "tar",
            "debian-archive-keyring",
        ],
    ),
    (Need::Metal, &["ovmf"]),
];

/// The `setup` verb: everything for every verb.
pub fn run(project: &Project) -> Result<()> {
    ensure(
        project,
        &[Need::Build, Need::Boot, Need::Images, Need::Metal],
    )?;
    println!("setup: everything is here");
    Ok(())
}

/// Installs what is missing for `needs`, and says what it installs.
pub fn ensure(project: &Project, needs: &[Need]) -> Result<()> {
    let wanted = PACKAGES
        .iter()
        .filter(|(need, _)| needs.contains(need))
        .flat_map(|(_, packages)| packages.iter().copied());
    install_missing(project, &wanted.collect::<Vec<_>>())
}

/// Installs those of `packages` that are not there.
pub fn install_missing(project: &Project, packages: &[&str]) -> Result<()> {
    let missing = || -> Vec<&str> {
        let absent = packages.iter().filter(|package| !installed(package));
        absent.copied().collect()
    };
    install(project, &missing())?;
    // To install one, apt may remove another that is newer than what this Debian has
    // (qemu-utils of the backports beside its QEMU): that one in Debian's own version.
    install(project, &missing())
}

/// Installs Debian packages, as root or through sudo.
pub fn install(project: &Project, packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    if !on_path("apt-get") {
        bail!(
            "this machine has no apt-get. Blanket's tests run on Debian 12; \
             elsewhere, install the equivalents of: {}",
            packages.join(" ")
        );
    }
    eprintln!("setup: installing {}", packages.join(" "));
    let sh = &project.shell()?;
    let root = cmd!(sh, "id -u").quiet().read()? == "0";
    if !root && !on_path("sudo") {
        bail!(
            "not root and no sudo. Run as root: apt-get install --no-install-recommends {}",
            packages.join(" ")
        );
    }
    let (program, env): (&str, &[&str]) = if root {
        ("env", &[])
    } else {
        ("sudo", &["env"])
    };
    let apt = || {
        cmd!(
            sh,
            "{program} {env...} DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0"
        )
    };
    let install = || {
        apt()
            .args(["install", "-y", "--no-install-recommends"])
            .args(packages)
            .quiet()
            .ignore_stdout()
    };
    // Package lists may be absent or old: fetch them only when the first try fails.
    if install().ignore_stderr().run().is_ok() {
        return Ok(());
    }
    apt()
        .arg("update")
        .quiet()
        .run()
        .context("apt-get update failed")?;
    install()
        .run()
        .with_context(|| format!("cannot install {}", packages.join(" ")))
}

fn installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["-W", "-f=${db:Status-Abbrev}", package])
        .stderr(Stdio::null())
        .output()
        .is_ok_and(|out| out.status.success() && out.stdout.starts_with(b"ii"))
}

/// Whether `program` is somewhere on the path.
pub fn on_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}
