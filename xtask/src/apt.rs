//! Debian packages that are fetched and unpacked, never installed.
//!
//! Apt runs with a configuration and state of its own under `target/apt`, so the
//! host's sources are not changed and need not carry backports.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use xshell::{Shell, cmd};

use crate::project::{Project, write_if_changed};

const SUITE: &str = "bookworm";
const BACKPORTS: &str = "bookworm-backports";

/// Selects what a Debian 12 machine would install.
pub const NEWEST: &[&str] = &[];
/// Selects what its backports have.
pub const BACKPORTED: &[&str] = &["-o", "APT::Default-Release=bookworm-backports"];

/// Apt with its own sources and state.
pub struct Apt<'a> {
    project: &'a Project,
    options: Vec<String>,
}

impl<'a> Apt<'a> {
    /// Apt whose package lists are there; the first use fetches them.
    pub fn new(project: &'a Project) -> Result<Self> {
        let _lock = project.lock("apt")?;
        let dir = project.out_dir("apt")?;
        for sub in ["etc", "lists/partial", "cache/archives/partial", "log"] {
            project.out_dir(&format!("apt/{sub}"))?;
        }
        let (mirror, security) = host_mirrors()?;
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
    pub fn depends(&self, package: &str, release: &[&str]) -> Result<Vec<String>> {
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

    /// Downloads `packages` to `debs`.
    pub fn download(&self, packages: &[String], release: &[&str], debs: &Path) -> Result<()> {
        let _lock = self.project.lock("apt")?;
        fs::create_dir_all(debs)?;
        let sh = self.project.shell()?;
        sh.change_dir(debs);
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
        Ok(())
    }

    /// Downloads `packages` and unpacks them to `root`.
    pub fn unpack(
        &self,
        packages: &[String],
        release: &[&str],
        dir: &Path,
        root: &Path,
    ) -> Result<()> {
        let debs = dir.join("debs");
        fs::create_dir_all(root)?;
        self.download(packages, release, &debs)?;
        let sh = self.project.shell()?;
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

/// The mirror that this machine uses for Debian.
pub fn mirror() -> Result<String> {
    Ok(host_mirrors()?.0)
}

/// The mirrors that this machine uses for Debian 12 and its security updates,
/// from its own apt sources in either format.
pub fn host_mirrors() -> Result<(String, String)> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(entries) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(entries.flatten().map(|entry| entry.path()));
    }
    let texts: Vec<String> = files
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok())
        .collect();
    let find = |suite: &str| {
        texts
            .iter()
            .find_map(|text| mirror_in(text, suite))
            .with_context(|| {
                format!(
                    "no apt source of this machine has {suite}; add Debian 12's sources to \
                     /etc/apt/sources.list, as a new Debian 12 has them"
                )
            })
    };
    Ok((find(SUITE)?, find(&format!("{SUITE}-security"))?))
}

/// Options by which this machine's apt reaches its mirrors, as lines of apt.conf.
pub fn host_proxies(sh: &Shell) -> Result<Vec<String>> {
    let dump = cmd!(sh, "apt-config dump Acquire").quiet().read()?;
    Ok(dump
        .lines()
        .filter(|line| is_proxy(line))
        .map(str::to_owned)
        .collect())
}

/// Whether a line of `apt-config dump` sets a proxy, or how one is found.
fn is_proxy(line: &str) -> bool {
    let Some((name, value)) = line.split_once(' ') else {
        return false;
    };
    name.to_ascii_lowercase().contains("::proxy") && value != "\"\";"
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
    fn proxies_are_found() {
        assert!(is_proxy("Acquire::http::Proxy \"http://cache:3142\";"));
        assert!(!is_proxy("Acquire::http::Proxy \"\";"));
        assert!(!is_proxy("Acquire::Languages \"none\";"));
    }

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
}
