//! `blanket disk`: images, and disks that no VM uses.

use std::path::Path;

use serde::Deserialize;
use supercloud_api::Error;

use super::{Blanket, LOOK, SAVE};

/// What `blanket disk info --json` says of an image.
#[derive(Clone, Debug, Deserialize)]
pub struct DiskInfo {
    /// Its format.
    pub format: String,
    /// Bytes that a guest sees.
    pub size: u64,
}

impl Blanket {
    /// Makes an image.
    ///
    /// # Errors
    /// The command's own.
    pub async fn disk_create(
        &self,
        file: &Path,
        format: &str,
        size: u64,
        backing: Option<(&Path, &str)>,
    ) -> Result<(), Error> {
        let mut command = self.command(&["disk", "create", "--format", format]);
        if let Some((backing, format)) = backing {
            command
                .arg("--backing")
                .arg(backing)
                .args(["--backing-format", format]);
        }
        // The size is a multiple of a sector, and the command wants a unit.
        command.args(["--size", &format!("{}K", size.div_ceil(1024))]);
        command.arg(file);
        self.done(command, LOOK).await.map(drop)
    }

    /// What an image is.
    ///
    /// # Errors
    /// It is none.
    pub async fn disk_info(&self, file: &Path, format: Option<&str>) -> Result<DiskInfo, Error> {
        let mut command = self.command(&["disk", "info", "--json"]);
        if let Some(format) = format {
            command.args(["--format", format]);
        }
        command.arg(file);
        let output = self.done(command, LOOK).await?;
        let mut all: Vec<DiskInfo> = self.read(&output.stdout)?;
        if all.is_empty() {
            return Err(Error::failed(format!("{} is no image", file.display())));
        }
        Ok(all.swap_remove(0))
    }

    /// Writes the disk that a VM's cloud-init reads to a new file.
    ///
    /// # Errors
    /// The command's own.
    pub async fn seed(&self, file: &Path, vm: &str, cloud_init: &str) -> Result<(), Error> {
        let mut command = self.command(&["disk", "seed", "--name", vm, "--cloud-init", cloud_init]);
        command.arg(file);
        self.done(command, LOOK).await.map(drop)
    }

    /// Writes what is in disks that no VM uses to a new file: as for `--disk`, all of it or, with
    /// a base, what is their own. The bytes of each. They are locked meanwhile; if nobody waits for
    /// it any more, it ends.
    ///
    /// # Errors
    /// The command's own.
    pub async fn disk_save(&self, to: &Path, disks: &[String]) -> Result<Vec<u64>, Error> {
        #[derive(Deserialize)]
        struct Saved {
            sizes: Vec<u64>,
        }
        let mut command = self.command(&["disk", "save", "--json"]);
        command.kill_on_drop(true).arg(to).args(disks);
        let output = self.done(command, SAVE).await?;
        let saved: Saved = self.read(&output.stdout)?;
        if saved.sizes.len() == disks.len() {
            return Ok(saved.sizes);
        }
        Err(Error::failed("blanket has saved other disks"))
    }

    /// Fills new disks with what [`Self::disk_save`] has written. If nobody waits for it any more,
    /// it ends.
    ///
    /// # Errors
    /// The command's own; then there is a part of it in them.
    pub async fn disk_restore(&self, from: &Path, disks: &[String]) -> Result<(), Error> {
        let mut command = self.command(&["disk", "restore"]);
        command.kill_on_drop(true).arg(from).args(disks);
        self.done(command, SAVE).await.map(drop)
    }
}

/// A disk for `--disk`: a comma in a path is written twice. An image that it stands on is named
/// by its directory and its hash: a VM that moves takes it not along.
#[must_use]
pub fn disk_option(path: &str, format: &str, base: Option<(&Path, &str)>) -> String {
    let mut text = format!("{},format={format}", path.replace(',', ",,"));
    if let Some((directory, hash)) = base {
        let directory = directory.display().to_string().replace(',', ",,");
        text.push_str(&format!(",backing={directory},base=blake3:{hash}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_disks() {
        assert_eq!(
            disk_option("/a,b", "qcow2", Some((Path::new("/i"), "f0"))),
            "/a,,b,format=qcow2,backing=/i,base=blake3:f0"
        );
    }
}
