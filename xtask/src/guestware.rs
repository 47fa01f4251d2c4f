//! What tests and benchmarks run in instances and VMs: our static programs, the
//! scripts of `tests/guest`, Debian's stress-ng with its libraries.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use xshell::cmd;

use crate::apt::{Apt, NEWEST};
use crate::build;
use crate::initramfs::{Files, file_name};
use crate::project::Project;

/// The static programs of VMs, in /bin.
pub fn programs(project: &Project) -> Result<Files> {
    in_bin(build::guest_programs(project)?)
}

/// What instances have besides. Not for VMs: an initrd is memory of each.
pub fn instance_programs(project: &Project) -> Result<Files> {
    in_bin(build::instance_programs(project)?)
}

/// What measures disks and networks.
pub fn io_cost(project: &Project) -> Result<Files> {
    in_bin(build::io_cost(project)?)
}

/// What compares what goes through networks.
pub fn net_check(project: &Project) -> Result<Files> {
    in_bin(build::net_check(project)?)
}

/// What drives virtual networks, and Debian's programs that it starts.
pub fn fabric(project: &Project) -> Result<Files> {
    let mut files = in_bin(build::fabric(project)?)?;
    let programs = ["nft", "dnsmasq"];
    files.extend(debian_programs(
        project,
        "fabric-tools",
        FABRIC_TOOLS,
        &programs,
    )?);
    Ok(files)
}

fn in_bin(programs: Vec<PathBuf>) -> Result<Files> {
    let mut files = Files::new();
    for program in programs {
        let name = file_name(&program)?;
        files.insert(format!("bin/{name}"), program);
    }
    Ok(files)
}

/// `tests/guest/scripts`, in /tests.
pub fn scripts(project: &Project) -> Result<Files> {
    let dir = project.root.join("tests/guest/scripts");
    let mut files = Files::new();
    for entry in fs::read_dir(&dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let entry = entry?;
        files.insert(
            format!("tests/{}", entry.file_name().to_string_lossy()),
            entry.path(),
        );
    }
    Ok(files)
}

/// Packages that stress-ng of Debian 12 loads libraries from, and its own.
const STRESS_NG: &[&str] = &[
    "stress-ng",
    "libapparmor1",
    "libbsd0",
    "libc6",
    "libcrypt1",
    "libdrm2",
    "libegl1",
    "libexpat1",
    "libffi8",
    "libgbm1",
    "libgles2",
    "libglvnd0",
    "libipsec-mb1",
    "libjpeg62-turbo",
    "libjudydebian1",
    "libkmod2",
    "liblzma5",
    "libmd0",
    "libsctp1",
    "libssl3",
    "libwayland-server0",
    "libxxhash0",
    "libzstd1",
    "zlib1g",
];

/// Packages that fio of Debian 12 loads libraries from, and its own: it knows many kinds of storage.
const FIO: &[&str] = &[
    "fio",
    "libacl1",
    "libaio1",
    "libargon2-1",
    "libblkid1",
    "libboost-iostreams1.74.0",
    "libboost-thread1.74.0",
    "libbz2-1.0",
    "libc6",
    "libcom-err2",
    "libcryptsetup12",
    "libdaxctl1",
    "libdevmapper1.02.1",
    "libffi8",
    "libfmt9",
    "libgcc-s1",
    "libgfapi0",
    "libgfrpc0",
    "libgfxdr0",
    "libglusterfs0",
    "libgmp10",
    "libgnutls30",
    "libgssapi-krb5-2",
    "libhogweed6",
    "libibverbs1",
    "libicu72",
    "libidn2-0",
    "libjson-c5",
    "libk5crypto3",
    "libkeyutils1",
    "libkmod2",
    "libkrb5-3",
    "libkrb5support0",
    "liblzma5",
    "libnbd0",
    "libndctl6",
    "libnettle8",
    "libnl-3-200",
    "libnl-route-3-200",
    "libnuma1",
    "libp11-kit0",
    "libpcre2-8-0",
    "libpmem1",
    "libpmemblk1",
    "librados2",
    "librbd1",
    "librdmacm1",
    "libselinux1",
    "libssl3",
    "libstdc++6",
    "libtasn1-6",
    "libtirpc3",
    "libudev1",
    "libunistring2",
    "libuuid1",
    "libxml2",
    "libzstd1",
    "zlib1g",
];

/// What logs in, and what a VM's user-mode network is, with where their libraries are.
const NETWORK_TOOLS: &[&str] = &[
    "iperf3",
    "libc6",
    "libcom-err2",
    "libgssapi-krb5-2",
    "libiperf0",
    "libk5crypto3",
    "libkeyutils1",
    "libkrb5-3",
    "libkrb5support0",
    "libpcre2-8-0",
    "libsctp1",
    "libselinux1",
    "libssl3",
    "openssh-client",
    "passt",
    "zlib1g",
];

/// What virtual networks are made with, with where their libraries are.
const FABRIC_TOOLS: &[&str] = &[
    "dnsmasq-base",
    "libc6",
    "libcap2",
    "libdbus-1-3",
    "libedit2",
    "libbsd0",
    "libgcrypt20",
    "libgmp10",
    "libgpg-error0",
    "libhogweed6",
    "libidn2-0",
    "libjansson4",
    "liblz4-1",
    "liblzma5",
    "libmd0",
    "libmnl0",
    "libnetfilter-conntrack3",
    "libnettle8",
    "libnfnetlink0",
    "libnftables1",
    "libnftnl11",
    "libsystemd0",
    "libtinfo6",
    "libunistring2",
    "libxtables12",
    "libzstd1",
    "nftables",
];

/// Debian's stress-ng, in /bin, with the libraries that it loads.
pub fn stress_ng(project: &Project) -> Result<Files> {
    debian_programs(project, "stress-ng", STRESS_NG, &["stress-ng"])
}

/// Debian's fio, in /bin, with the libraries that it loads.
pub fn fio(project: &Project) -> Result<Files> {
    debian_programs(project, "fio", FIO, &["fio"])
}

/// Debian's ssh, passt and iperf3, in /bin, with the libraries that they load.
pub fn network_tools(project: &Project) -> Result<Files> {
    let programs = ["ssh", "ssh-keygen", "passt", "iperf3"];
    debian_programs(project, "network-tools", NETWORK_TOOLS, &programs)
}

/// The libraries that a program loads, by the names that it wants them by, of those in `path` (in the
/// loader's own places if that is empty).
pub fn loaded(
    project: &Project,
    loader: &Path,
    path: &str,
    program: &Path,
) -> Result<Vec<(String, PathBuf)>> {
    let sh = project.shell()?;
    let list = cmd!(sh, "{loader} --library-path {path} --list {program}");
    let list = list.quiet().read()?;
    // "libm.so.6 => /path/libm.so.6 (0x...)"
    let lines = list.lines().filter_map(|line| {
        let (library, rest) = line.trim().split_once(" => ")?;
        let from = rest.split_once(" (").map_or(rest, |(from, _)| from);
        Some((library.to_owned(), from.into()))
    });
    Ok(lines.collect())
}

/// Programs out of packages, in /bin, with the libraries that they load.
fn debian_programs(
    project: &Project,
    what: &str,
    packages: &[&str],
    programs: &[&str],
) -> Result<Files> {
    let _lock = project.lock(what)?;
    let dir = project.out_dir(what)?;
    let (root, mark) = (dir.join("root"), dir.join("whole"));
    if !mark.exists() {
        eprintln!("tools: fetching {what}");
        let packages: Vec<String> = packages.iter().map(|name| (*name).to_owned()).collect();
        Apt::new(project)?.unpack(&packages, NEWEST, &dir, &root)?;
        fs::write(&mark, "")?;
    }
    let libraries = [
        root.join("lib/x86_64-linux-gnu"),
        root.join("usr/lib/x86_64-linux-gnu"),
        // Where librados has a part of its own.
        root.join("usr/lib/x86_64-linux-gnu/ceph"),
    ];
    let path = libraries
        .each_ref()
        .map(|dir| dir.display().to_string())
        .join(":");
    let loader = root.join("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2");
    let mut files = Files::new();
    for name in programs {
        let places = ["usr/bin", "usr/sbin"].map(|dir| root.join(dir).join(name));
        let program = places
            .iter()
            .find(|path| path.is_file())
            .with_context(|| format!("{name} is in none of its packages"))?;
        for (library, from) in loaded(project, &loader, &path, program)? {
            ensure!(
                from.starts_with(&root) && from.is_file(),
                "{name} wants {library}, which is in none of its packages"
            );
            if !library.starts_with('/') {
                files.insert(format!("lib/x86_64-linux-gnu/{library}"), from);
            }
        }
        files.insert(format!("bin/{name}"), program.clone());
    }
    files.insert("lib64/ld-linux-x86-64.so.2".into(), loader);
    Ok(files)
}
