//! Disk images made with the tools that make real ones.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use blanket_boot::{Image, RawFile};

/// A file system to be.
#[derive(Clone, Copy)]
pub enum Format {
    /// With its UUID.
    Ext4(&'static str),
    /// With its UUID.
    Xfs(&'static str),
    /// With its UUID.
    Btrfs(&'static str),
    /// With its volume id, eight digits.
    Fat(&'static str),
    /// Nothing but these bytes, at this offset.
    Raw(usize, &'static [u8]),
}

/// What is in a file system.
#[derive(Default)]
pub struct Tree {
    files: Vec<(String, Vec<u8>)>,
    links: Vec<(String, String)>,
}

impl Tree {
    pub fn file(mut self, path: &str, content: impl AsRef<[u8]>) -> Self {
        self.files.push((path.into(), content.as_ref().to_vec()));
        self
    }

    pub fn link(mut self, path: &str, target: &str) -> Self {
        self.links.push((path.into(), target.into()));
        self
    }

    fn write(&self, root: &Path) {
        fs::create_dir_all(root).unwrap();
        for (path, content) in &self.files {
            let path = root.join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        for (path, target) in &self.links {
            let path = root.join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink(target, path).unwrap();
        }
    }
}

/// A partition to be: its row for sfdisk without start and size, its format, its content.
pub struct Part {
    pub row: &'static str,
    pub mib: u64,
    pub format: Format,
    pub tree: Tree,
}

fn run(program: &str, arguments: &[&str], input: &str) {
    let path = format!(
        "{}:/usr/sbin:/sbin",
        std::env::var("PATH").unwrap_or_default()
    );
    let mut child = Command::new(program)
        .args(arguments)
        .env("PATH", path)
        .env("SOURCE_DATE_EPOCH", "1700000000")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}; ./x setup installs it"));
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let out = child.wait_with_output().unwrap();
    let message = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program}: {message}");
}

/// A disk in a directory of its own.
pub struct Disk {
    directory: tempfile::TempDir,
    pub path: PathBuf,
}

impl Disk {
    /// `label` is `gpt`, `dos`, or empty for a file system without partitions.
    pub fn new(label: &str, parts: &[Part]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let this = Self { directory, path };
        let total: u64 = parts.iter().map(|part| part.mib + 1).sum::<u64>() + 2;
        let disk = File::create(&this.path).unwrap();
        disk.set_len(total << 20).unwrap();
        let name = this.path.to_str().unwrap().to_owned();
        if label.is_empty() {
            let content = this.file_system(&parts[0], 0);
            fs::rename(content, &this.path).unwrap();
            return this;
        }
        let mut script = format!("label: {label}\n");
        let mut start = 1;
        let mut extended = false;
        for part in parts {
            if part.row.starts_with("logical") && !extended {
                extended = true;
                let rest = total - start - 1;
                script += &format!("start={start}MiB, size={rest}MiB, type=5\n");
                start += 1;
            }
            let row = part.row.trim_start_matches("logical").trim();
            script += &format!("start={start}MiB, size={}MiB{row}\n", part.mib);
            start += part.mib + 1;
        }
        run("sfdisk", &["--quiet", &name], &script);
        let mut start = 1;
        let mut extended = false;
        for (number, part) in parts.iter().enumerate() {
            if part.row.starts_with("logical") && !extended {
                extended = true;
                start += 1;
            }
            let content = this.file_system(part, number);
            run(
                "dd",
                &[
                    &format!("if={}", content.display()),
                    &format!("of={name}"),
                    "bs=1M",
                    &format!("seek={start}"),
                    "conv=notrunc,sparse",
                    "status=none",
                ],
                "",
            );
            fs::remove_file(content).unwrap();
            start += part.mib + 1;
        }
        this
    }

    fn file_system(&self, part: &Part, number: usize) -> PathBuf {
        let path = self.directory.path().join(format!("part{number}"));
        let tree = self.directory.path().join(format!("tree{number}"));
        part.tree.write(&tree);
        let file = File::create(&path).unwrap();
        file.set_len(part.mib << 20).unwrap();
        let (name, root) = (path.to_str().unwrap(), tree.to_str().unwrap());
        match part.format {
            Format::Ext4(uuid) => run(
                "mke2fs",
                &["-q", "-F", "-t", "ext4", "-U", uuid, "-d", root, name],
                "",
            ),
            Format::Btrfs(uuid) => run("mkfs.btrfs", &["-q", "-U", uuid, "-r", root, name], ""),
            Format::Xfs(uuid) => {
                let proto = self.directory.path().join("proto");
                let mut text = "/\n0 0\nd--755 0 0\n".to_owned();
                describe(&tree, &mut text);
                text += "$\n";
                fs::write(&proto, text).unwrap();
                run(
                    "mkfs.xfs",
                    &[
                        "-q",
                        "-m",
                        &format!("uuid={uuid}"),
                        "-p",
                        proto.to_str().unwrap(),
                        name,
                    ],
                    "",
                );
            }
            Format::Fat(id) => {
                run("mkfs.vfat", &["-i", id, name], "");
                for entry in fs::read_dir(&tree).unwrap() {
                    let entry = entry.unwrap().path();
                    run(
                        "mcopy",
                        &["-s", "-i", name, entry.to_str().unwrap(), "::/"],
                        "",
                    );
                }
            }
            Format::Raw(offset, bytes) => file.write_all_at(bytes, offset as u64).unwrap(),
        }
        path
    }

    pub fn open(&self) -> blanket_boot::Result<Image> {
        let disk = RawFile::new(File::open(&self.path).unwrap()).unwrap();
        Image::open(Arc::new(disk))
    }
}

/// A tree in the language of mkfs.xfs.
fn describe(directory: &Path, out: &mut String) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let kind = path.symlink_metadata().unwrap().file_type();
        if kind.is_symlink() {
            let target = fs::read_link(&path).unwrap();
            *out += &format!("{name} l--777 0 0 {}\n", target.display());
        } else if kind.is_dir() {
            *out += &format!("{name} d--755 0 0\n");
            describe(&path, out);
            *out += "$\n";
        } else {
            *out += &format!("{name} ---644 0 0 {}\n", path.display());
        }
    }
}

/// Bytes that stand for a kernel or an initrd: long enough for many blocks, and its own.
pub fn bytes(name: &str, length: usize) -> Vec<u8> {
    let seed = name
        .bytes()
        .fold(7u32, |sum, byte| sum.wrapping_mul(31) ^ u32::from(byte));
    let mut state = seed | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state.to_le_bytes()[0]
        })
        .collect()
}
