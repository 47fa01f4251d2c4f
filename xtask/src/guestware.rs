//! What tests and benchmarks run in instances and VMs: our static programs, the
//! scripts of `tests/guest`, Debian's stress-ng with its libraries.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use xshell::cmd;

use crate::apt::{Apt, NEWEST};
use crate::build;
use crate::initramfs::Files;
use crate::project::Project;

/// The static programs of VMs, in /bin.
pub fn programs(project: &Project) -> Result<Files> {
    in_bin(build::guest_programs(project)?)
}

/// What instances have besides. Not for VMs: an initrd is memory of each.
pub fn instance_programs(project: &Project) -> Result<Files> {
    in_bin(build::instance_programs(project)?)
}

fn in_bin(programs: Vec<PathBuf>) -> Result<Files> {
    let mut files = Files::new();
    for program in programs {
        let name = program
            .file_name()
            .context("a program without a name")?
            .to_string_lossy();
        files.insert(format!("bin/{name}"), program.clone());
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

/// Debian's stress-ng, in /bin, with the libraries that it loads.
pub fn stress_ng(project: &Project) -> Result<Files> {
    let _lock = project.lock("stress-ng")?;
    let dir = project.out_dir("stress-ng")?;
    let (root, mark) = (dir.join("root"), dir.join("whole"));
    if !mark.exists() {
        eprintln!("test: fetching stress-ng");
        let packages: Vec<String> = STRESS_NG.iter().map(|name| (*name).to_owned()).collect();
        Apt::new(project)?.unpack(&packages, NEWEST, &dir, &root)?;
        fs::write(&mark, "")?;
    }
    let libraries = [
        root.join("lib/x86_64-linux-gnu"),
        root.join("usr/lib/x86_64-linux-gnu"),
    ];
    let path = libraries
        .each_ref()
        .map(|dir| dir.display().to_string())
        .join(":");
    let program = root.join("usr/bin/stress-ng");
    let sh = project.shell()?;
    let loader = root.join("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2");
    let list = cmd!(sh, "{loader} --library-path {path} --list {program}")
        .quiet()
        .read()?;
    let mut files = Files::new();
    for line in list.lines() {
        // "libm.so.6 => /path/libm.so.6 (0x...)"
        let Some((name, rest)) = line.trim().split_once(" => ") else {
            continue;
        };
        let from = PathBuf::from(rest.split(" (").next().unwrap_or_default());
        ensure!(
            from.is_file(),
            "stress-ng wants {name}, which is in none of its packages"
        );
        if !name.starts_with('/') {
            files.insert(format!("lib/x86_64-linux-gnu/{name}"), from);
        }
    }
    files.insert("lib64/ld-linux-x86-64.so.2".into(), loader);
    files.insert("bin/stress-ng".into(), program);
    Ok(files)
}
