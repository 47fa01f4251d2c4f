//! Where things are, and the few file operations that every verb shares.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use xshell::Shell;

/// The checkout and its output directories.
pub struct Project {
    /// Root of the checkout.
    pub root: PathBuf,
    /// Kernels, images and logs that xtask makes. Always inside the checkout,
    /// so that builds with different cargo target directories share kernels.
    pub out: PathBuf,
    /// Cargo's target directory.
    pub cargo_target: PathBuf,
    /// The core counts what costs something to count ([`Self::measured`]).
    pub measured: bool,
}

impl Project {
    /// Finds the checkout from where xtask was compiled.
    pub fn locate() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("xtask is not inside a checkout")?
            .to_path_buf();
        ensure!(
            root.join("Cargo.toml").exists(),
            "{} is no checkout any more",
            root.display()
        );
        let out = root.join("target");
        let cargo_target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(dir) => std::path::absolute(PathBuf::from(dir))?,
            None => out.clone(),
        };
        Ok(Self {
            root,
            out,
            cargo_target,
            measured: false,
        })
    }

    /// The same checkout with a core that measures its lock, and with outputs beside
    /// the others.
    pub fn measured(&self) -> Self {
        Self {
            root: self.root.clone(),
            out: self.out.clone(),
            cargo_target: self.cargo_target.clone(),
            measured: true,
        }
    }

    /// `name`, or the same for outputs with a core that measures.
    pub fn output(&self, name: &str) -> String {
        format!("{name}{}", if self.measured { "-measured" } else { "" })
    }

    /// A shell in the checkout's root.
    pub fn shell(&self) -> Result<Shell> {
        let sh = Shell::new()?;
        sh.change_dir(&self.root);
        Ok(sh)
    }

    /// The cargo that runs us, or the one on the path.
    pub fn cargo(&self) -> String {
        std::env::var("CARGO").unwrap_or_else(|_| "cargo".into())
    }

    /// Creates directory `relative` of the output directory.
    pub fn out_dir(&self, relative: &str) -> Result<PathBuf> {
        let dir = self.out.join(relative);
        fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(dir)
    }

    /// Takes the lock that guards output `name` against other xtask processes;
    /// it is held until the answer is dropped.
    pub fn lock(&self, name: &str) -> Result<File> {
        let path = self.out_dir("locks")?.join(name);
        let file =
            File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        file.lock()
            .with_context(|| format!("cannot lock {}", path.display()))?;
        Ok(file)
    }
}

/// Copies `from` to `to` unless the contents are the same already, so that what
/// is built from `to` is not built again.
pub fn copy_if_changed(from: &Path, to: &Path) -> Result<()> {
    let new = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    write_if_changed(to, &new)
}

/// Writes `content` to `to` unless it is there already.
pub fn write_if_changed(to: &Path, content: &[u8]) -> Result<()> {
    if fs::read(to).is_ok_and(|old| old == content) {
        return Ok(());
    }
    fs::write(to, content).with_context(|| format!("cannot write {}", to.display()))
}
