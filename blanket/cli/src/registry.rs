//! The directory in which running VMs can be found: one control socket each.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};

use crate::crash;
use crate::exit::hint;
use crate::keeper;

/// A directory of control sockets.
#[derive(Clone, Debug)]
pub struct Registry {
    directory: PathBuf,
}

/// A VM's own entry; dropping it removes it.
#[derive(Debug)]
pub struct Entry {
    path: PathBuf,
    /// The name that the VM got.
    pub name: String,
}

impl Registry {
    /// The user's registry: `/run/blanket` for root, `$XDG_RUNTIME_DIR/blanket` for
    /// others. Only its owner may use it.
    pub fn open() -> Result<Self> {
        let root = rustix::process::geteuid().is_root();
        let directory = match std::env::var_os("BLANKET_RUNTIME_DIR") {
            Some(path) if !path.is_empty() => PathBuf::from(path),
            _ if root => PathBuf::from("/run/blanket"),
            _ => match std::env::var_os("XDG_RUNTIME_DIR") {
                Some(path) if !path.is_empty() => Path::new(&path).join("blanket"),
                _ => {
                    return Err(hint(
                        &anyhow!(
                            "XDG_RUNTIME_DIR is not set: there is no place for control sockets"
                        ),
                        "log in through PAM, or set XDG_RUNTIME_DIR to a directory of your own",
                    ));
                }
            },
        };
        Self::at(directory)
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// A registry at a given place, which is created.
    pub fn at(directory: PathBuf) -> Result<Self> {
        let shown = directory.display().to_string();
        match DirBuilder::new().mode(0o700).create(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(error).with_context(|| format!("cannot create {shown}"));
            }
            _ => {}
        }
        let found = std::fs::symlink_metadata(&directory)
            .with_context(|| format!("cannot look at {shown}"))?;
        if !found.is_dir() || found.uid() != rustix::process::geteuid().as_raw() {
            bail!("{shown} is not a directory of the current user");
        }
        if found.mode() & 0o077 != 0 {
            let error = anyhow!("{shown} is open to other users");
            return Err(hint(&error, format!("chmod 700 {shown}")));
        }
        Ok(Self { directory })
    }

    /// Takes a name and its control socket; without a name, the first free one of
    /// vm1, vm2, ...
    pub fn claim(&self, name: Option<&str>) -> Result<(Entry, UnixListener)> {
        if let Some(name) = name {
            return self.bind(name)?.ok_or_else(|| {
                hint(
                    &anyhow!("a VM named {name} is running"),
                    format!("choose another --name, or end it with `blanket stop {name}`"),
                )
            });
        }
        for number in 1..100_000 {
            if let Some(found) = self.bind(&format!("vm{number}"))? {
                return Ok(found);
            }
        }
        bail!("there is no free name left")
    }

    /// Binds a name's socket; `None` if it is in use. Replaces a stale one.
    fn bind(&self, name: &str) -> Result<Option<(Entry, UnixListener)>> {
        let path = self.socket(name);
        let shown = path.display();
        let _lock = self.lock()?;
        loop {
            match UnixListener::bind(&path) {
                Ok(listener) => {
                    let entry = Entry {
                        path,
                        name: name.to_owned(),
                    };
                    return Ok(Some((entry, listener)));
                }
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    if !self.is_stale(&path) {
                        return Ok(None);
                    }
                    remove(&path)?;
                }
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot create {shown}"));
                }
            }
        }
    }

    /// Names of the VMs that run, sorted. Removes entries of those that are gone.
    pub fn names(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        let _lock = self.lock()?;
        let entries = std::fs::read_dir(&self.directory)
            .with_context(|| format!("cannot list {}", self.directory.display()))?;
        for entry in entries {
            let path = entry.context("cannot list running VMs")?.path();
            let Some(name) = path
                .file_name()
                .and_then(|name| name.to_str())
                .and_then(|name| name.strip_suffix(".sock"))
            else {
                continue;
            };
            if self.is_stale(&path) {
                remove(&path)?;
            } else {
                names.push(name.to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// Connects to a VM's control socket.
    pub fn connect(&self, name: &str) -> Result<UnixStream> {
        UnixStream::connect(self.socket(name)).map_err(|error| match error.kind() {
            // Its socket is there, and nobody listens.
            io::ErrorKind::ConnectionRefused => killed(name),
            // Its socket was cleared away after it.
            io::ErrorKind::NotFound if crash::tells_of_a_kill(&self.crash(name)) => killed(name),
            io::ErrorKind::NotFound => hint(
                &anyhow!("no VM named {name} is running"),
                "`blanket ps` lists the VMs that are",
            ),
            _ => anyhow::Error::new(error).context(format!("cannot reach the VM {name}")),
        })
    }

    /// Where a VM's log goes when it runs in the background.
    pub fn log(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.log"))
    }

    /// Where the report of a VM that crashed is kept.
    pub fn crash(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.crash"))
    }

    /// As long as this is held, no socket is replaced.
    fn lock(&self) -> Result<File> {
        keeper::locked(&self.directory)
            .with_context(|| format!("cannot lock {}", self.directory.display()))
    }

    /// Where a VM's control socket is.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.sock"))
    }

    /// Whether nobody listens at a socket any more.
    fn is_stale(&self, path: &Path) -> bool {
        matches!(
            UnixStream::connect(path),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused
        )
    }
}

fn killed(name: &str) -> anyhow::Error {
    hint(
        &anyhow!("the VM {name} is gone without a word: its process was killed"),
        "sudo dmesg | grep -i 'killed process' tells if the kernel did it for want of memory",
    )
}

fn remove(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove the stale {}", path.display()))
        }
        _ => Ok(()),
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // If it is gone already, all the better.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::exit::Hint;

    fn registry() -> (tempfile::TempDir, Registry) {
        let directory = tempfile::tempdir().expect("a directory");
        let registry = Registry::at(directory.path().join("blanket")).expect("created");
        (directory, registry)
    }

    #[test]
    fn names_are_given_once_and_free_again_later() {
        let (_directory, registry) = registry();
        let (first, _listener) = registry.claim(None).expect("free");
        let (second, second_listener) = registry.claim(None).expect("free");
        assert_eq!((&*first.name, &*second.name), ("vm1", "vm2"));
        let error = registry.claim(Some("vm1")).expect_err("taken");
        assert!(
            error
                .downcast_ref::<Hint>()
                .is_some_and(|h| h.0.contains("blanket stop vm1"))
        );
        assert_eq!(registry.names().expect("listed"), ["vm1", "vm2"]);
        drop((second, second_listener));
        assert_eq!(registry.names().expect("listed"), ["vm1"]);
        assert_eq!(registry.claim(Some("web")).expect("free").0.name, "web");
    }

    #[test]
    fn stale_entries_vanish() {
        let (_directory, registry) = registry();
        let (entry, listener) = registry.claim(Some("dead")).expect("free");
        // As if the process had been killed: the file stays, nobody listens.
        drop(listener);
        std::mem::forget(entry);
        assert!(registry.socket("dead").exists());
        assert!(registry.connect("dead").is_err());
        assert_eq!(registry.names().expect("listed"), [""; 0]);
        assert!(!registry.socket("dead").exists());

        let (entry, listener) = registry.claim(Some("dead")).expect("free");
        drop(listener);
        std::mem::forget(entry);
        registry.claim(Some("dead")).expect("replaced");
    }

    #[test]
    fn a_directory_that_others_may_enter_is_refused() {
        let (directory, _registry) = registry();
        let path = directory.path().join("blanket");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("own");
        let error = Registry::at(path).expect_err("refused");
        assert!(
            error
                .downcast_ref::<Hint>()
                .is_some_and(|h| h.0.starts_with("chmod 700"))
        );
        let error = Registry::at("/proc/self/nothing".into()).expect_err("refused");
        assert!(error.to_string().contains("/proc/self/nothing"));
    }

    #[test]
    fn an_unknown_name_is_named() {
        let (_directory, registry) = registry();
        let error = registry.connect("nobody").expect_err("unknown");
        assert!(format!("{error:#}").contains("nobody"));
    }
}
