//! The report of a VM that the hypervisor ended: printed, and kept in a file.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use blanket_vmm::core_image;
use blanket_vmm::instance::Instance;
use blanket_vmm::vm::End;

use crate::exit;

/// What the report of a VM says whose process could not write one.
const KILLED: &str = "The VM's process was killed.\n";

/// The file for a report of a process that cannot open it later. It says that the process
/// was killed until that ends in another way, when it is empty or holds the report.
#[derive(Debug)]
pub struct Report(File);

impl Report {
    /// Opens it.
    pub fn new(path: &Path) -> io::Result<Self> {
        let mut file = open(path)?;
        file.write_all(KILLED.as_bytes())?;
        Ok(Self(file))
    }

    fn replace(&mut self, text: &str) -> io::Result<()> {
        self.0.set_len(0)?;
        self.0.rewind()?;
        self.0.write_all(text.as_bytes())
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        // An orderly end; one with a report has written more.
        let killed = self
            .0
            .metadata()
            .is_ok_and(|file| file.len() == KILLED.len() as u64);
        if killed && let Err(error) = self.0.set_len(0) {
            tracing::warn!(%error, "the file for a report is not empty");
        }
    }
}

/// Whether the report at `path` is that of a process that was killed.
pub fn tells_of_a_kill(path: &Path) -> bool {
    std::fs::read_to_string(path).is_ok_and(|text| text == KILLED)
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

/// Writes the report of a crash to `path`, which may be `opened` already, where it stays
/// until the name is used again. `None` if the VM did not end by a crash.
pub fn keep(
    path: &Path,
    opened: Option<Report>,
    instance: &Instance,
    end: &End,
) -> Result<Option<PathBuf>> {
    if !matches!(end, End::Crash(_)) {
        return Ok(None);
    }
    let text = text(instance, end);
    let written = match opened {
        Some(mut report) => report.replace(&text),
        None => open(path).and_then(|mut file| file.write_all(text.as_bytes())),
    };
    written.with_context(|| format!("cannot keep the report in {}", path.display()))?;
    Ok(Some(path.to_owned()))
}

/// Names the functions in a report that the core with build id `core` made.
pub fn named(report: &str, core: &[u8; 32]) -> String {
    if *core == core_image::BUILD_ID {
        core_image::name_places(report)
    } else {
        report.to_owned()
    }
}

fn text(instance: &Instance, end: &End) -> String {
    let core = instance.core_build_id();
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs());
    let spec = instance.spec();
    let mut text = format!(
        "VM {} ({}), boot {}, up {:.1} s, {} vCPUs, {} MiB\n\
         ended: {} at {seconds} (Unix time)\n\
         command: blanket {}, host {}, core {}\n\
         kernel: {} {}\n\n",
        spec.name,
        instance.uuid(),
        instance.boots(),
        instance.uptime().as_secs_f64(),
        spec.vcpus,
        spec.memory >> 20,
        exit::word(end),
        env!("CARGO_PKG_VERSION"),
        instance.host(),
        core_image::digits(&core),
        instance.booted(),
        spec.cmdline,
    );
    if let Some(sentence) = exit::sentence(end) {
        text.push_str(&named(&sentence, &core));
        text.push('\n');
    }
    text
}
