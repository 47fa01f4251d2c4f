//! `blanket save`, and what `blanket run --restore` reads.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, ErrorKind, Seek as _, Write};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, anyhow};
use blanket_vmm::instance::Instance;
use blanket_vmm::saved::{self, Machine};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::args::Run;
use crate::client::wait_gone;
use crate::control::{Answer, Refused, Request, Saved, ask_with};
use crate::exit::{hint, show};
use crate::registry::Registry;

/// `blanket save`. The file has its name only when it is whole.
pub fn save(
    name: &str,
    file: &Path,
    disks: bool,
    keep_running: bool,
    json: bool,
) -> Result<ExitCode> {
    if fs::symlink_metadata(file).is_ok() {
        return Err(there(file));
    }
    let stream = Registry::open()?.connect(name)?;
    let part = Part::new(file)?;
    let request = Request::Save {
        end: !keep_running,
        disks,
    };
    let saved = match ask_with(&stream, &request, &[part.file.as_fd()]) {
        Ok(Answer::Saved(saved)) => saved,
        // The VM goes on: there is nothing in the file that it has not.
        Err(error) if error.is::<Refused>() => {
            part.remove();
            return Err(error.context(name.to_owned()));
        }
        // It may have ended with all that it was in the file.
        Ok(Answer::Gone) => return Err(part.left(&anyhow!("{name} ended before it answered"))),
        Ok(other) => return Err(part.left(&anyhow!("{name} answers {other:?}"))),
        Err(error) => return Err(part.left(&error.context(name.to_owned()))),
    };
    part.name(file)?;
    if !keep_running {
        wait_gone(&stream);
    }
    show(&saved, json, |saved| {
        let ends = if keep_running { "goes on" } else { "has ended" };
        format!(
            "{name} is in {} ({} MiB, {} pages) and {ends}; it stood still for {} ms\n",
            file.display(),
            saved.bytes.div_ceil(1 << 20),
            saved.pages,
            saved.stood_ms,
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Nothing is written over.
pub(crate) fn there(file: &Path) -> anyhow::Error {
    let error = anyhow!("{} is there already", file.display());
    hint(&error, "give the name of a new file")
}

/// A file that has not its name yet. It is never removed when it may be all that is left
/// of a VM.
pub(crate) struct Part {
    file: File,
    path: PathBuf,
}

impl Part {
    /// Makes it, readable by its owner alone: it holds all of the guest's secrets.
    pub(crate) fn new(file: &Path) -> Result<Self> {
        let mut name = file
            .file_name()
            .with_context(|| format!("{} names no file", file.display()))?
            .to_owned();
        name.push(".part");
        let path = file.with_file_name(name);
        let opened = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path);
        let file = opened.map_err(|error| {
            let left = error.kind() == ErrorKind::AlreadyExists;
            let error = anyhow::Error::new(error).context(path.display().to_string());
            if left {
                let next = "it is being written, or was left behind by a save that was cut short: \
                            remove it if no VM is missing, or give another name";
                hint(&error, next)
            } else {
                error
            }
        })?;
        let part = Self { file, path };
        // The VM ends when its file is on its disk; so must be the file's name.
        part.sync_directory()?;
        Ok(part)
    }

    /// What is written to.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Gives it its name, which nothing has.
    pub(crate) fn name(&self, file: &Path) -> Result<()> {
        renameat_with(CWD, &self.path, CWD, file, RenameFlags::NOREPLACE)
            .map_err(|error| {
                if error == Errno::EXIST {
                    self.left(&there(file))
                } else {
                    self.left(&anyhow::Error::new(error).context(file.display().to_string()))
                }
            })
            .and_then(|()| self.sync_directory())
    }

    /// A failure after which it stays.
    fn left(&self, error: &anyhow::Error) -> anyhow::Error {
        let next = format!(
            "what was written stays in {}; `blanket run --restore` says whether it is whole",
            self.path.display()
        );
        hint(error, next)
    }

    /// Removes it.
    pub(crate) fn remove(self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!("{} stays: {error}", self.path.display());
        }
    }

    fn sync_directory(&self) -> Result<()> {
        let directory = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let synced = File::open(directory).and_then(|directory| directory.sync_all());
        synced.with_context(|| directory.display().to_string())
    }
}

/// A file that is on its disk when it is flushed, which is before its VM ends.
pub(crate) struct Kept(pub(crate) BufWriter<File>);

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()?;
        self.0.get_ref().sync_all()
    }
}

/// The VM's part of it.
pub fn answer(instance: &Instance, handed: Vec<OwnedFd>, end: bool, disks: bool) -> Answer {
    let Ok([file]) = <[OwnedFd; 1]>::try_from(handed) else {
        return Answer::Error("there is no file to write to".into());
    };
    let file = Kept(BufWriter::new(File::from(file)));
    match instance.save(file, disks, end) {
        Ok(saved) => Answer::Saved(Saved {
            bytes: saved.bytes,
            pages: saved.pages,
            stood_ms: u64::try_from(saved.stood.as_millis()).unwrap_or(u64::MAX),
        }),
        Err(error) => Answer::Error(error.to_string()),
    }
}

/// The file that a VM is to go on from, and what is in it, with which `run` is completed.
pub fn open(run: &mut Run) -> Result<Option<(Machine, File)>> {
    let Some(path) = &run.restore else {
        return Ok(None);
    };
    let named = || path.display().to_string();
    let mut file = File::open(path).map_err(|error| {
        let missing = error.kind() == ErrorKind::NotFound;
        let error = anyhow::Error::new(error).context(named());
        if missing {
            hint(&error, "give the path of a file that `blanket save` wrote")
        } else {
            error
        }
    })?;
    let machine = saved::machine(BufReader::new(&file)).with_context(named)?;
    file.rewind().with_context(named)?;
    run.memory = machine.memory;
    run.max_memory = Some(machine.max_memory);
    run.cpus = machine.vcpus;
    run.name.get_or_insert_with(|| machine.name.clone());
    Ok(Some((machine, file)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::exit::text;

    #[test]
    fn a_part_is_its_owners_and_gets_a_name_that_nothing_has() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = directory.path().join("web.vm");
        let part = Part::new(&file).expect("made");
        let mode = part.file.metadata().expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let second = Part::new(&file).err().expect("it is there");
        assert!(text(&second).contains("web.vm.part"), "{second}");

        // Another file came meanwhile: neither is lost.
        fs::write(&file, "another").expect("written");
        let error = part.name(&file).expect_err("it is there");
        assert!(text(&error).contains("is there already"), "{error}");
        assert_eq!(fs::read(&file).expect("there"), b"another");
        assert!(part.path.exists());

        fs::remove_file(&file).expect("removed");
        part.name(&file).expect("named");
        assert!(file.exists() && !part.path.exists());
    }

    #[test]
    fn a_part_is_removed() {
        let directory = tempfile::tempdir().expect("a directory");
        let part = Part::new(&directory.path().join("web.vm")).expect("made");
        part.remove();
        assert_eq!(fs::read_dir(directory.path()).expect("there").count(), 0);
    }
}
