//! Stock Debian kernels, fetched as packages and unpacked, never installed.
//!
//! Apt runs with a configuration and state of its own under `target/apt`, so the
//! host's sources are not changed and need not carry backports.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use xshell::cmd;

use crate::project::{Project, write_if_changed};
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

const SUITE: &str = "bookworm";
const BACKPORTS: &str = "bookworm-backports";
const NEWEST: &[&str] = &[];
const BACKPORTED: &[&str] = &["-o", "APT::Default-Release=bookworm-backports"];
const MIRROR: &str = "http://mirror.invalid/debian";
const SECURITY_MIRROR: &str = "http://security.mirror.invalid/debian-security";

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

/// Apt with its own sources and state.
struct Apt<'a> {
    project: &'a Project,
    options: Vec<String>,
}

impl<'a> Apt<'a> {
    fn new(project: &'a Project) -> Result<Self> {
        let _lock = project.lock("apt")?;
        let dir = project.out_dir("apt")?;
        for sub in ["etc", "lists/partial", "cache/archives/partial", "log"] {
            project.out_dir(&format!("apt/{sub}"))?;
        }
        let (mirror, security) = host_mirrors();
        let keys = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]";
        let sources = format!(
            "deb {keys} {mirror} {SUITE} main\n\
             deb {keys} {mirror} {SUITE}-updates main\n\
             deb {keys} {mirror} {BACKPORTS} main\n\
             deb {keys} {security} {SUITE}-security main\n"
        );
        let list = dir.join("etc/sources.list");
        let updated = dir.join("updated");
        if fs::read_to_string(&list).ok().as_deref() != Some(&sources) {
            let _ = fs::remove_file(&updated);
            write_if_changed(&list, sources.as_bytes())?;
        }
        write_if_changed(&dir.join("status"), b"")?;
        let at = |path: &str| dir.join(path).display().to_string();
        let options = [
            format!("Dir::Etc::SourceList={}", at("etc/sources.list")),
            "Dir::Etc::SourceParts=/dev/null".into(),
            "Dir::Etc::Preferences=/dev/null".into(),
            "Dir::Etc::PreferencesParts=/dev/null".into(),
            format!("Dir::State={}", at("")),
            format!("Dir::State::Lists={}", at("lists")),
            format!("Dir::State::Status={}", at("status")),
            format!("Dir::Cache={}", at("cache")),
            format!("Dir::Log={}", at("log")),
            "APT::Architecture=amd64".into(),
            "APT::Sandbox::User=root".into(),
            "Acquire::Languages=none".into(),
            // The host's hooks are about the host's lists.
            "APT::Update::Post-Invoke-Success::=true".into(),
        ]
        .into_iter()
        .flat_map(|option| ["-o".to_owned(), option])
        .collect();
        let apt = Self { project, options };
        if !updated.exists() {
            apt.update()?;
            fs::write(updated, "")?;
        }
        Ok(apt)
    }

    fn update(&self) -> Result<()> {
        let (sh, options) = (&self.project.shell()?, &self.options);
        eprintln!("kernels: fetching Debian's package lists");
        cmd!(sh, "apt-get -qq {options...} update")
            .quiet()
            .run()
            .context("apt-get update failed")
    }

    /// Direct dependencies of `package` in the version that `release` selects.
    fn depends(&self, package: &str, release: &[&str]) -> Result<Vec<String>> {
        let (sh, options) = (&self.project.shell()?, &self.options);
        let show = cmd!(
            sh,
            "apt-cache {options...} {release...} show --no-all-versions {package}"
        )
        .quiet()
        .read()
        .with_context(|| format!("Debian has no package {package}"))?;
        let line = show
            .lines()
            .find_map(|line| line.strip_prefix("Depends: "))
            .unwrap_or_default();
        Ok(line
            .split([',', '|'])
            .filter_map(|dependency| dependency.split_whitespace().next())
            .map(str::to_owned)
            .collect())
    }

    /// Downloads `packages` and unpacks them to `root`.
    fn unpack(&self, packages: &[String], release: &[&str], dir: &Path, root: &Path) -> Result<()> {
        let _lock = self.project.lock("apt")?;
        let debs = dir.join("debs");
        fs::create_dir_all(&debs)?;
        fs::create_dir_all(root)?;
        let sh = self.project.shell()?;
        sh.change_dir(&debs);
        let options = &self.options;
        let download = || {
            cmd!(
                sh,
                "apt-get -qq {options...} {release...} download {packages...}"
            )
            .quiet()
            .ignore_stdout()
        };
        // The mirror may have dropped what an older list names.
        if download().ignore_stderr().run().is_err() {
            self.update()?;
            download()
                .run()
                .with_context(|| format!("cannot download {}", packages.join(" ")))?;
        }
        let mut unpacked = 0;
        for entry in fs::read_dir(&debs)? {
            let deb = entry?.path();
            cmd!(sh, "dpkg-deb -x {deb} {root}").quiet().run()?;
            unpacked += 1;
        }
        if unpacked < packages.len() {
            bail!(
                "{} packages wanted, {unpacked} in {}",
                packages.len(),
                debs.display()
            );
        }
        fs::remove_dir_all(&debs).with_context(|| format!("cannot remove {}", debs.display()))
    }
}

/// The mirrors that this machine uses for Debian 12 and its security updates,
/// from its own apt sources in either format.
fn host_mirrors() -> (String, String) {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    let texts: Vec<String> = files
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok())
        .collect();
    let find = |suite: &str, fallback: &str| {
        texts
            .iter()
            .find_map(|text| mirror_in(text, suite))
            .unwrap_or_else(|| fallback.to_owned())
    };
    (
        find(SUITE, MIRROR),
        find(&format!("{SUITE}-security"), SECURITY_MIRROR),
    )
}

/// The URI that one sources file names for `suite`, if any.
fn mirror_in(text: &str, suite: &str) -> Option<String> {
    let mut uri = None;
    for line in text.lines().map(str::trim) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [] => uri = None,
            ["URIs:", first, ..] => uri = Some(*first),
            ["Suites:", suites @ ..] if suites.contains(&suite) => {
                return uri.map(|uri| uri.trim_end_matches('/').to_owned());
            }
            ["deb", rest @ ..] => {
                let at = rest.iter().position(|word| word.contains("://"))?;
                if rest.get(at + 1) == Some(&suite) {
                    return Some(rest[at].trim_end_matches('/').to_owned());
                }
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_in_both_formats() {
        let deb822 = "Types: deb\nURIs: http://a/debian/\nSuites: bookworm bookworm-updates\n\n\
                      Types: deb\nURIs: http://b/security\nSuites: bookworm-security\n";
        assert_eq!(
            mirror_in(deb822, "bookworm").as_deref(),
            Some("http://a/debian")
        );
        assert_eq!(
            mirror_in(deb822, "bookworm-security").as_deref(),
            Some("http://b/security")
        );
        let list = "# x\ndeb [signed-by=/k] http://c/debian bookworm main\n";
        assert_eq!(
            mirror_in(list, "bookworm").as_deref(),
            Some("http://c/debian")
        );
        assert_eq!(mirror_in(list, "bookworm-backports"), None);
    }

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
