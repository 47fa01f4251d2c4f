//! `blanket disk save` and `restore`: what is in disks that no VM uses, in a file.

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::Path;

use anyhow::{Context as _, Result};
use blanket_disk::Disk as _;
use blanket_vmm::saved::disks::{self, AtRest, Error};
use serde::Serialize;

use crate::disk::DiskSpec;
use crate::exit::{hint, show};
use crate::saved::{Kept, Part, there};

#[derive(Serialize)]
struct Saved {
    /// Bytes of the file.
    bytes: u64,
    /// Bytes of each disk.
    sizes: Vec<u64>,
}

fn at_rest(specs: &[DiskSpec], read_only: bool) -> Result<Vec<AtRest>> {
    specs.iter().map(|spec| spec.at_rest(read_only)).collect()
}

/// `blanket disk save`. The file has its name only when it is whole; until then, and no longer, the
/// disks are locked.
pub fn save(file: &Path, specs: &[DiskSpec], json: bool) -> Result<()> {
    if std::fs::symlink_metadata(file).is_ok() {
        return Err(there(file));
    }
    let disks = at_rest(specs, true)?;
    let part = Part::new(file)?;
    let written = part
        .file()
        .try_clone()
        .map_err(anyhow::Error::new)
        .and_then(|to| Ok(disks::write(Kept(BufWriter::new(to)), &disks)?));
    let bytes = match written {
        Ok(bytes) => bytes,
        // All that is in it is in the disks.
        Err(error) => {
            part.remove();
            return Err(error.context(file.display().to_string()));
        }
    };
    part.name(file)?;
    let saved = Saved {
        bytes,
        sizes: disks.iter().map(|disk| disk.image.size()).collect(),
    };
    show(&saved, json, |saved| {
        let mib = saved.bytes.div_ceil(1 << 20);
        format!("{} has what is in the disks ({mib} MiB)\n", file.display())
    })
}

/// `blanket disk restore`.
pub fn restore(file: &Path, specs: &[DiskSpec]) -> Result<()> {
    let named = || file.display().to_string();
    let from = File::open(file).with_context(named)?;
    let disks = at_rest(specs, false)?;
    disks::read(BufReader::new(from), &disks).map_err(|error| {
        let begun = matches!(error, Error::File(_) | Error::Fill(_));
        let error = anyhow::Error::new(error).context(named());
        if !begun {
            return error;
        }
        let next =
            "the disks may have a part of it: remove them, and make new ones (blanket disk create)";
        hint(&error, next)
    })
}
