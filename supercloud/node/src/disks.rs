//! Disks of VMs of this node: new ones, and those of a VM that did not run when a snapshot was
//! taken of it.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use supercloud_api::{Code, Disk, Error, Image, ImageFormat, SnapshotKind};

use crate::agent::Agent;
use crate::blanket::disk_option;
use crate::fail;
use crate::record::VmRecord;
use crate::vms::io;

impl Agent {
    /// What becomes of a disk as a user wants it: the agent's own on an image, or a file.
    pub(crate) async fn disk_of(
        &self,
        vm: &str,
        index: usize,
        wanted: &str,
    ) -> Result<Disk, Error> {
        if wanted.starts_with('/') {
            let info = self.blanket.disk_info(Path::new(wanted), None).await;
            let info = info.map_err(|error| Error {
                code: Code::BadRequest,
                ..error
            })?;
            return Ok(Disk {
                path: wanted.into(),
                format: info.format,
                size: info.size,
                base: None,
                owned: false,
            });
        }
        let image = self.image(wanted)?.ok_or_else(|| {
            Error::not_found(
                format!("there is no image {wanted} on {}", self.name()),
                format!(
                    "add it: supercloud image add FILE --name {wanted}; or give the path of a disk"
                ),
            )
        })?;
        if image.format == ImageFormat::File {
            return Err(Error::new(
                Code::BadRequest,
                format!("{wanted} is no disk"),
                "",
            ));
        }
        Ok(Disk {
            path: self.own_disk(vm, index, "qcow2"),
            format: "qcow2".into(),
            size: image.size,
            base: Some(image.hash),
            owned: true,
        })
    }

    pub(crate) fn own_disk(&self, vm: &str, index: usize, format: &str) -> String {
        let path = self.config.vm(vm).join(format!("disk{index}.{format}"));
        path.display().to_string()
    }

    /// A disk for `blanket`.
    pub(crate) fn option(&self, disk: &Disk) -> String {
        self.option_at(disk, &disk.path)
    }

    fn option_at(&self, disk: &Disk, path: &str) -> String {
        let images = self.config.images();
        let base = disk.base.as_deref().map(|hash| (images.as_path(), hash));
        disk_option(path, &disk.format, base)
    }

    /// Makes the disks of a VM that are the agent's own, as far as they are not there yet, and fills
    /// those of one that did not run when its snapshot was taken.
    pub(crate) async fn have_disks(&self, vm: &VmRecord) -> Result<(), Error> {
        if let Some(from) = &vm.restore
            && from.kind == SnapshotKind::Stopped
        {
            return self.fill_disks(vm, &from.saved).await;
        }
        for disk in &vm.disks {
            if disk.owned && !Path::new(&disk.path).exists() {
                self.make_disk(disk).await?;
            }
        }
        Ok(())
    }

    /// Writes what is in the disks of a VM that does not run to a new file, and notes how large they
    /// are.
    pub(crate) async fn save_disks(&self, vm: &mut VmRecord, to: &Path) -> Result<(), Error> {
        // It was never started; of one that was, a disk that is not there is an error.
        if vm.fresh || vm.restore.is_some() {
            self.have_disks(vm).await?;
            vm.restore = None;
        }
        let options: Vec<String> = vm.disks.iter().map(|disk| self.option(disk)).collect();
        let sizes = self.blanket.disk_save(to, &options).await?;
        for (disk, size) in vm.disks.iter_mut().zip(sizes) {
            disk.size = size;
        }
        Ok(())
    }

    /// Disks get their names when all is in them, and on stable storage: until it is noted that they
    /// are filled, they are made anew.
    async fn fill_disks(&self, vm: &VmRecord, saved: &str) -> Result<(), Error> {
        let directory = self.config.vm(&vm.name);
        let filling = directory.join("filling");
        match fs::remove_dir_all(&filling) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(io(&filling, &error));
            }
            // Of an agent that was killed, or nothing.
            _ => {}
        }
        fs::create_dir_all(&filling).map_err(|error| io(&filling, &error))?;
        let mut parts = Vec::new();
        let mut options = Vec::new();
        for disk in &vm.disks {
            let path = Path::new(&disk.path);
            let name = path.file_name().ok_or_else(|| {
                let text = format!("{} names no file", path.display());
                Error::new(Code::Failed, text, "")
            })?;
            let part = filling.join(name);
            self.create_disk(disk, &part).await?;
            options.push(self.option_at(disk, &part.display().to_string()));
            parts.push((part, path));
        }
        let saved = self.image_path(saved);
        let filled = self.blanket.disk_restore(&saved, &options).await;
        // What `blanket` proposes to do with them is done.
        filled.map_err(|error| Error {
            hint: String::new(),
            ..error
        })?;
        fail::point("disks.filled");
        for (part, path) in parts {
            fs::rename(&part, path).map_err(|error| io(path, &error))?;
        }
        fs::remove_dir(&filling).map_err(|error| io(&filling, &error))?;
        for directory in directory.ancestors().take(2) {
            let synced = File::open(directory).and_then(|it| it.sync_all());
            synced.map_err(|error| io(directory, &error))?;
        }
        fail::point("disks.named");
        self.change_vm(&vm.name, |vm| vm.restore = None)
    }

    async fn make_disk(&self, disk: &Disk) -> Result<(), Error> {
        let path = Path::new(&disk.path);
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        let part = PathBuf::from(part);
        if part.exists() {
            // Of an agent that was killed.
            fs::remove_file(&part).map_err(|error| io(&part, &error))?;
        }
        self.create_disk(disk, &part).await?;
        fs::rename(&part, path).map_err(|error| io(path, &error))
    }

    /// Makes a disk that is like another one, and empty.
    async fn create_disk(&self, disk: &Disk, at: &Path) -> Result<(), Error> {
        let base = match &disk.base {
            None => None,
            Some(hash) => {
                let image: Option<Image> = self.image(hash)?;
                let image =
                    image.ok_or_else(|| Error::failed(format!("the image {hash} is gone")))?;
                let format = match image.format {
                    ImageFormat::Qcow2 => "qcow2",
                    ImageFormat::Raw | ImageFormat::File => "raw",
                };
                Some((self.image_path(hash), format))
            }
        };
        let backing = base
            .as_ref()
            .map(|(path, format)| (path.as_path(), *format));
        self.blanket
            .disk_create(at, &disk.format, disk.size, backing)
            .await
    }
}
