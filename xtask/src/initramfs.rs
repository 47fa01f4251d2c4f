//! Initramfs archives for instances (L1) and for the VMs in them (L2).

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use cpio::newc::{Builder, ModeFileType, trailer};
use xshell::cmd;

use crate::kernels::Kernel;
use crate::project::Project;

/// Files of the host by their paths in an archive.
pub type Files = BTreeMap<String, PathBuf>;

/// The last part of a path.
pub fn file_name(path: &Path) -> Result<String> {
    let name = path.file_name();
    let name = name.with_context(|| format!("{} names no file", path.display()))?;
    Ok(name.to_string_lossy().into_owned())
}

/// The files of an archive by their path without a leading slash. A parent
/// sorts before its children, as the kernel's unpacker needs it.
#[derive(Clone, Default)]
pub struct Initramfs {
    entries: BTreeMap<String, Entry>,
}

#[derive(Clone)]
enum Entry {
    Directory,
    File { mode: u32, content: Content },
    Link(String),
    CharDevice { major: u32, minor: u32 },
}

#[derive(Clone)]
enum Content {
    Bytes(Vec<u8>),
    File(PathBuf),
}

impl Initramfs {
    /// A static busybox with all its names, the usual directories, a console.
    pub fn with_busybox(project: &Project) -> Result<Self> {
        let mut this = Self::default();
        for dir in [
            "proc", "sys", "dev", "tmp", "run", "root", "etc", "lib", "share", "mnt",
        ] {
            this.directory(dir);
        }
        let busybox = ["/bin/busybox", "/usr/bin/busybox"]
            .into_iter()
            .map(Path::new)
            .find(|path| path.exists())
            .context("no busybox: run `cargo xtask setup`")?;
        this.copy("bin/busybox", 0o755, busybox);
        let sh = project.shell()?;
        for name in cmd!(sh, "{busybox} --list").quiet().read()?.lines() {
            this.link(&format!("bin/{name}"), "busybox");
        }
        this.link("sbin", "bin");
        this.entries.insert(
            "dev/console".into(),
            Entry::CharDevice { major: 5, minor: 1 },
        );
        this.entries
            .insert("dev/null".into(), Entry::CharDevice { major: 1, minor: 3 });
        this.text(
            "etc/passwd",
            0o644,
            "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n",
        );
        this.text("etc/group", 0o644, "root:x:0:\nnogroup:x:65534:\n");
        Ok(this)
    }

    /// Adds executable files.
    pub fn add(&mut self, files: &Files) {
        for (path, from) in files {
            self.copy(path, 0o755, from);
        }
    }

    /// Adds a directory and its parents.
    pub fn directory(&mut self, path: &str) {
        self.parents(path);
        self.entries.entry(path.into()).or_insert(Entry::Directory);
    }

    /// Adds a file with this text.
    pub fn text(&mut self, path: &str, mode: u32, text: &str) {
        self.bytes(path, mode, text.as_bytes().to_vec());
    }

    /// Adds a file with these bytes.
    pub fn bytes(&mut self, path: &str, mode: u32, bytes: Vec<u8>) {
        self.parents(path);
        self.entries.insert(
            path.into(),
            Entry::File {
                mode,
                content: Content::Bytes(bytes),
            },
        );
    }

    /// Adds a copy of the host's file `from`, read when the archive is written.
    pub fn copy(&mut self, path: &str, mode: u32, from: &Path) {
        self.parents(path);
        let content = Content::File(from.to_path_buf());
        self.entries
            .insert(path.into(), Entry::File { mode, content });
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.entries
            .entry(path.into())
            .or_insert_with(|| Entry::Link(target.into()));
    }

    /// Adds the tree under the host's directory `from` at `path`.
    pub fn copy_tree(&mut self, path: &str, from: &Path) -> Result<()> {
        use std::os::unix::fs::PermissionsExt;
        self.directory(path);
        for entry in
            fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))?
        {
            let entry = entry?;
            let inner = format!("{path}/{}", entry.file_name().to_string_lossy());
            // Links are followed: what they name may not be in the archive.
            let meta = fs::metadata(entry.path())
                .with_context(|| format!("cannot read {}", entry.path().display()))?;
            if meta.is_dir() {
                self.copy_tree(&inner, &entry.path())?;
            } else if meta.is_file() {
                self.copy(&inner, meta.permissions().mode() & 0o777, &entry.path());
            }
        }
        Ok(())
    }

    /// Modules of `kernel` that init loads, and what they depend on; they take the place of
    /// those named before.
    pub fn modules(&mut self, project: &Project, kernel: &Kernel, names: &[&str]) -> Result<()> {
        let mut list = String::new();
        for file in kernel.modules(names)? {
            let name = file
                .file_name()
                .context("a module without a name")?
                .to_string_lossy();
            let path = format!("lab/modules.d/{}", name.trim_end_matches(".xz"));
            if name.ends_with(".xz") {
                let sh = project.shell()?;
                let unpacked = cmd!(sh, "xz -dc {file}").quiet().output()?;
                self.bytes(&path, 0o644, unpacked.stdout);
            } else {
                self.copy(&path, 0o644, &file);
            }
            list.push_str(&format!("/{path}\n"));
        }
        self.text("lab/modules", 0o644, &list);
        Ok(())
    }

    fn parents(&mut self, path: &str) {
        for (slash, _) in path.match_indices('/') {
            self.entries
                .entry(path[..slash].into())
                .or_insert(Entry::Directory);
        }
    }

    /// Writes the archive, not compressed: under emulation, unpacking costs more
    /// than copying does.
    pub fn write(&self, to: &Path) -> Result<()> {
        let file = File::create(to).with_context(|| format!("cannot create {}", to.display()))?;
        let mut out = BufWriter::with_capacity(1 << 20, file);
        self.write_to(&mut out)?;
        out.flush()
            .with_context(|| format!("cannot write {}", to.display()))
    }

    /// Writes the archive to an open file or a buffer.
    pub fn write_to(&self, mut out: &mut impl Write) -> Result<()> {
        for (inode, (path, entry)) in (1..).zip(&self.entries) {
            let builder = Builder::new(path).ino(inode);
            match entry {
                Entry::Directory => {
                    let builder = builder
                        .mode(0o755)
                        .set_mode_file_type(ModeFileType::Directory);
                    builder.write(&mut out, 0).finish()?;
                }
                Entry::CharDevice { major, minor } => {
                    let builder = builder.mode(0o600).set_mode_file_type(ModeFileType::Char);
                    let builder = builder.rdev_major(*major).rdev_minor(*minor);
                    builder.write(&mut out, 0).finish()?;
                }
                Entry::Link(target) => {
                    let builder = builder
                        .mode(0o777)
                        .set_mode_file_type(ModeFileType::Symlink);
                    put(builder, target.as_bytes(), &mut out)?;
                }
                Entry::File { mode, content } => {
                    let builder = builder
                        .mode(*mode)
                        .set_mode_file_type(ModeFileType::Regular);
                    match content {
                        Content::Bytes(bytes) => put(builder, bytes, &mut out)?,
                        Content::File(from) => {
                            let bytes = fs::read(from)
                                .with_context(|| format!("cannot read {}", from.display()))?;
                            put(builder, &bytes, &mut out)?;
                        }
                    }
                }
            }
        }
        trailer(&mut out)?;
        Ok(())
    }
}

fn put(builder: Builder, bytes: &[u8], out: &mut impl Write) -> Result<()> {
    let size = u32::try_from(bytes.len()).context("a file does not fit a cpio archive")?;
    let mut writer = builder.write(out, size);
    writer.write_all(bytes)?;
    writer.finish()?;
    Ok(())
}

/// Init of a VM: says that it is ready, runs `/cmd` when there is one, else a
/// shell on its console.
const GUEST_INIT: &str = r#"#!/bin/sh
export PATH=/bin HOME=/root TERM=linux
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs tmp /tmp
mount -t tmpfs run /run
ip link set lo up
for module in $(cat /lab/modules 2>/dev/null); do insmod $module; done
echo "GUEST-READY $(uname -r)"
if [ -e /cmd ]; then
    sh /cmd
    echo "GUEST-EXIT $?"
else
    setsid -c sh -l </dev/hvc0 >/dev/hvc0 2>&1
fi
poweroff -f
"#;

/// The archive that VMs boot from. With a `script` the VM runs it, says
/// `GUEST-EXIT n` and powers off. `files` are copied to their paths. Drivers that its kernel
/// has as modules are added by [`Initramfs::modules`].
pub fn guest(project: &Project, script: Option<&str>, files: &Files) -> Result<Initramfs> {
    let mut archive = Initramfs::with_busybox(project)?;
    archive.text("init", 0o755, GUEST_INIT);
    if let Some(script) = script {
        archive.text("cmd", 0o644, script);
    }
    archive.add(files);
    Ok(archive)
}
