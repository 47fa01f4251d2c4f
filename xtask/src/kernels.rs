//! Stock Debian kernels, fetched as packages and unpacked, never installed.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;
use xshell::cmd;

use crate::apt::{Apt, BACKPORTED, NEWEST};
use crate::project::Project;
use crate::setup::{self, Need};

/// A stock kernel of Debian 12 or its backports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, ValueEnum)]
pub enum Flavour {
    /// `linux-image-cloud-amd64` 6.1: virtual hardware only.
    Cloud,
    /// `linux-image-amd64` 6.1.
    Generic,
    /// `linux-image-rt-amd64` 6.1.
    Rt,
    /// `linux-image-cloud-amd64` 6.12 of the backports.
    #[value(name = "cloud-6.12")]
    Cloud612,
    /// `linux-image-amd64` 6.12 of the backports.
    #[value(name = "generic-6.12")]
    Generic612,
}

impl Flavour {
    fn metapackage(self) -> &'static str {
        match self {
            Self::Cloud | Self::Cloud612 => "linux-image-cloud-amd64",
            Self::Generic | Self::Generic612 => "linux-image-amd64",
            Self::Rt => "linux-image-rt-amd64",
        }
    }

    /// Backports are taken only when named; the newest of all other suites is
    /// what a Debian 12 machine has.
    fn release(self) -> &'static [&'static str] {
        match self {
            Self::Cloud | Self::Generic | Self::Rt => NEWEST,
            Self::Cloud612 | Self::Generic612 => BACKPORTED,
        }
    }
}

impl fmt::Display for Flavour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value().ok_or(fmt::Error)?;
        f.write_str(value.get_name())
    }
}

/// An unpacked kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// `cloud`, `generic`, ... or the file's name.
    pub name: String,
    /// `uname -r` of it; empty for a bare file.
    pub release: String,
    /// The bzImage.
    pub vmlinuz: PathBuf,
    /// `/` of the unpacked packages; none for a bare file.
    pub root: Option<PathBuf>,
}

impl Kernel {
    /// A kernel image without modules or headers.
    pub fn from_file(path: &Path) -> Result<Self> {
        let vmlinuz = fs::canonicalize(path).with_context(|| {
            format!("--kernel {}: neither a flavour nor a file", path.display())
        })?;
        let name = path
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        Ok(Self {
            name,
            release: String::new(),
            vmlinuz,
            root: None,
        })
    }

    /// Files of `modules` and of all they depend on, in loading order. Names
    /// that the kernel does not have as a module (built in, or not at all) are
    /// left out.
    pub fn modules(&self, modules: &[&str]) -> Result<Vec<PathBuf>> {
        let Some(root) = &self.root else {
            return Ok(Vec::new());
        };
        let base = root.join("lib/modules").join(&self.release);
        let dep = base.join("modules.dep");
        let text =
            fs::read_to_string(&dep).with_context(|| format!("cannot read {}", dep.display()))?;
        let mut by_name = HashMap::new();
        for line in text.lines() {
            let (file, deps) = line
                .split_once(':')
                .context("modules.dep has a line without ':'")?;
            by_name.insert(module_name(file), (file, deps));
        }
        let mut order: Vec<PathBuf> = Vec::new();
        for module in modules {
            let Some((file, deps)) = by_name.get(*module) else {
                continue;
            };
            // depmod lists dependencies so that the last is to be loaded first.
            for file in deps.split_whitespace().rev().chain([*file]) {
                let path = base.join(file);
                if !order.contains(&path) {
                    order.push(path);
                }
            }
        }
        Ok(order)
    }

    /// Directory to give to kbuild as the kernel's headers; fetched when needed.
    pub fn headers(&self, project: &Project) -> Result<PathBuf> {
        let root = self.root.as_ref().with_context(|| {
            format!(
                "{} is a bare file: no headers to build a module against",
                self.name
            )
        })?;
        let dir = root
            .join("usr/src")
            .join(format!("linux-headers-{}", self.release));
        let _lock = project.lock(&format!("kernel-{}", self.name))?;
        if !dir.join("Makefile").exists() {
            fetch_headers(project, self, root)?;
        }
        Ok(dir)
    }
}

/// `kernel/drivers/net/virtio_net.ko.xz` is module `virtio_net`.
fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split(".ko").next().unwrap_or(name).replace('-', "_")
}

/// Fetches and unpacks `flavour` unless that was done before.
pub fn fetch(project: &Project, flavour: Flavour) -> Result<Kernel> {
    let name = flavour.to_string();
    let _lock = project.lock(&format!("kernel-{name}"))?;
    let dir = project.out_dir(&format!("kernels/{name}"))?;
    let root = dir.join("root");
    // Written last: its presence says that the tree is whole.
    let mark = dir.join("release");
    if !mark.exists() {
        setup::ensure(project, &[Need::Boot])?;
        let apt = Apt::new(project)?;
        let package = apt
            .depends(flavour.metapackage(), flavour.release())?
            .into_iter()
            .find(|package| package.starts_with("linux-image-"))
            .with_context(|| format!("{} depends on no image", flavour.metapackage()))?;
        let release = package.trim_start_matches("linux-image-").to_owned();
        eprintln!("kernels: fetching {name} ({package})");
        apt.unpack(
            std::slice::from_ref(&package),
            flavour.release(),
            &dir,
            &root,
        )?;
        let sh = &project.shell()?;
        cmd!(sh, "depmod -b {root} {release}")
            .env("PATH", path_with_sbin())
            .quiet()
            .run()?;
        fs::write(&mark, &release)?;
    }
    let release = fs::read_to_string(&mark)?;
    let vmlinuz = root.join("boot").join(format!("vmlinuz-{release}"));
    Ok(Kernel {
        name,
        release,
        vmlinuz,
        root: Some(root),
    })
}

/// Debian keeps depmod in /usr/sbin, which is not on everyone's path.
fn path_with_sbin() -> String {
    format!(
        "{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_default()
    )
}

fn fetch_headers(project: &Project, kernel: &Kernel, root: &Path) -> Result<()> {
    setup::ensure(project, &[Need::Build, Need::Boot])?;
    let apt = Apt::new(project)?;
    let release = if kernel.name.ends_with("6.12") {
        BACKPORTED
    } else {
        NEWEST
    };
    let mut packages = BTreeSet::new();
    let mut todo = vec![format!("linux-headers-{}", kernel.release)];
    while let Some(package) = todo.pop() {
        if packages.insert(package.clone()) {
            todo.extend(
                apt.depends(&package, release)?
                    .into_iter()
                    .filter(|dependency| {
                        dependency.starts_with("linux-headers-")
                            || dependency.starts_with("linux-kbuild-")
                    }),
            );
        }
    }
    let packages: Vec<String> = packages.into_iter().collect();
    eprintln!("kernels: fetching {}", packages.join(" "));
    let dir = root.parent().context("kernel root has no parent")?;
    let staging = dir.join("headers");
    let _ = fs::remove_dir_all(&staging);
    apt.unpack(&packages, release, dir, &staging)?;
    // The headers' Makefile includes that of the -common package by its
    // absolute path on an installed system.
    let src = staging.join("usr/src");
    for entry in fs::read_dir(&src)? {
        let makefile = entry?.path().join("Makefile");
        if !makefile.is_file() {
            continue;
        }
        let text = fs::read_to_string(&makefile)?;
        let moved = format!("include {}/usr/src/", root.display());
        fs::write(&makefile, text.replace("include /usr/src/", &moved))?;
    }
    let sh = &project.shell()?;
    cmd!(sh, "cp -a {staging}/usr {root}").quiet().run()?;
    fs::remove_dir_all(&staging)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn module_names() {
        assert_eq!(
            module_name("kernel/drivers/scsi/vmw_pvscsi.ko"),
            "vmw_pvscsi"
        );
        assert_eq!(
            module_name("kernel/net/9p/9pnet-virtio.ko.xz"),
            "9pnet_virtio"
        );
    }
}
