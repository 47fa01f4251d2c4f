//! The report of a VM that the hypervisor ended: printed, and kept in a file.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use blanket_vmm::core_image;
use blanket_vmm::instance::Instance;
use blanket_vmm::vm::End;

use crate::exit;

/// Opens the file for a report, for a process that cannot later.
pub fn open(path: &Path) -> io::Result<File> {
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
    opened: Option<File>,
    instance: &Instance,
    end: &End,
) -> Result<Option<PathBuf>> {
    if !matches!(end, End::Crash(_)) {
        return Ok(None);
    }
    let text = text(instance, end);
    opened
        .map_or_else(|| open(path), Ok)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("cannot keep the report in {}", path.display()))?;
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
