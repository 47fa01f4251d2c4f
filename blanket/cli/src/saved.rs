//! `blanket save`, and what `blanket run --restore` reads.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, ErrorKind, Seek as _, Write};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, anyhow, bail};
use blanket_vmm::instance::Instance;
use blanket_vmm::saved::{self, Machine};
use serde::Serialize;

use crate::args::Run;
use crate::client::wait_gone;
use crate::control::{Answer, Request, ask_with};
use crate::exit::{hint, show};
use crate::registry::Registry;

/// What is said of a VM that was saved.
#[derive(Serialize)]
struct Saved {
    /// Bytes of the file.
    bytes: u64,
    /// Pages of memory in it.
    pages: u64,
    /// Milliseconds for which the VM stood still.
    stood_ms: u64,
}

/// `blanket save`. The file has its name only when it is whole.
pub fn save(name: &str, file: &Path, keep_running: bool, json: bool) -> Result<ExitCode> {
    let there = || -> Result<()> {
        if fs::symlink_metadata(file).is_ok() {
            let error = anyhow!("{} is there already", file.display());
            return Err(hint(&error, "give the name of a new file"));
        }
        Ok(())
    };
    there()?;
    let part = Part::new(file)?;
    let request = Request::Save { end: !keep_running };
    let stream = Registry::open()?.connect(name)?;
    let answer = ask_with(&stream, &request, &[part.file.as_fd()]);
    let (bytes, pages, stood_ms) = match answer.with_context(|| name.to_owned())? {
        Answer::Saved {
            bytes,
            pages,
            stood_ms,
        } => (bytes, pages, stood_ms),
        Answer::Gone => bail!("{name} ended before it was saved"),
        other => bail!("{name} answers {other:?}"),
    };
    there()?;
    part.keep(file)?;
    if !keep_running {
        wait_gone(&stream);
    }
    let saved = Saved {
        bytes,
        pages,
        stood_ms,
    };
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

/// A file that is not whole yet. It is removed unless it is kept.
struct Part {
    file: File,
    path: PathBuf,
}

impl Part {
    fn new(file: &Path) -> Result<Self> {
        let mut name = file
            .file_name()
            .with_context(|| format!("{} names no file", file.display()))?
            .to_owned();
        name.push(".part");
        let path = file.with_file_name(name);
        let opened = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = opened.with_context(|| path.display().to_string())?;
        Ok(Self { file, path })
    }

    fn keep(self, file: &Path) -> Result<()> {
        let named = fs::rename(&self.path, file);
        named.with_context(|| format!("{} cannot be renamed", self.path.display()))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // Gone if it was kept.
        let _ = fs::remove_file(&self.path);
    }
}

/// A file that is on its disk when it is flushed, which is before its VM ends.
struct Kept(BufWriter<File>);

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
pub fn answer(instance: &Instance, handed: Vec<OwnedFd>, end: bool) -> Answer {
    let Ok([file]) = <[OwnedFd; 1]>::try_from(handed) else {
        return Answer::Error("there is no file to write to".into());
    };
    let file = Kept(BufWriter::new(File::from(file)));
    match instance.save(file, end) {
        Ok(saved) => Answer::Saved {
            bytes: saved.bytes,
            pages: saved.pages,
            stood_ms: u64::try_from(saved.stood.as_millis()).unwrap_or(u64::MAX),
        },
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
