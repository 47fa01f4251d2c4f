//! Images, by what is in them: files that nobody changes any more. Disks of VMs stand on
//! them, kernels and initrds are some.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use http_body_util::BodyExt as _;
use hyper::Method;
use supercloud_api::{Code, Error, Image, ImageFormat, Snapshot};
use tokio::time::timeout;

use crate::agent::{Agent, random};
use crate::client;
use crate::fail;
use crate::record::{IMAGES, SNAPSHOTS, VMS, VmRecord};
use crate::store::Change;

/// Bytes that are copied at once.
const PIECE: usize = 1 << 20;

fn failed(path: &Path, error: &std::io::Error) -> Error {
    Error::failed(format!("{}: {error}", path.display()))
}

/// Whether a text is a BLAKE3 hash: it becomes a file name.
pub(crate) fn is_hash(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// A file that has not its name yet; removed unless it gets one.
pub(crate) struct Part {
    file: File,
    path: PathBuf,
    sum: blake3::Hasher,
    bytes: u64,
}

impl Part {
    pub(crate) fn new(directory: &Path) -> Result<Self, Error> {
        fs::create_dir_all(directory).map_err(|error| failed(directory, &error))?;
        let id = supercloud_api::new_id(random()?);
        let path = directory.join(format!("part-{id}"));
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|error| failed(&path, &error))?;
        Ok(Self {
            file,
            path,
            sum: blake3::Hasher::new(),
            bytes: 0,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.sum.update(bytes);
        self.bytes += bytes.len() as u64;
        let written = self.file.write_all(bytes);
        written.map_err(|error| failed(&self.path, &error))
    }

    /// Writes all that there is to read.
    pub(crate) fn fill(&mut self, from: &mut dyn Read) -> Result<(), Error> {
        let mut bytes = vec![0; PIECE];
        loop {
            let read = from.read(&mut bytes);
            let read = read.map_err(|error| failed(&self.path, &error))?;
            match bytes.get(..read) {
                Some(piece) if read > 0 => self.write(piece)?,
                _ => return Ok(()),
            }
        }
    }

    /// The hash of what was written.
    pub(crate) fn hash(&self) -> String {
        self.sum.finalize().to_hex().to_string()
    }

    /// Gives it its hash for a name, on stable storage.
    pub(crate) fn name(&self, directory: &Path) -> Result<(String, u64), Error> {
        let hash = self.hash();
        give_name(&self.file, &self.path, &directory.join(&hash))?;
        Ok((hash, self.bytes))
    }
}

/// Gives a file, which nobody changes from now on, another name in its directory, on stable storage.
fn give_name(file: &File, from: &Path, to: &Path) -> Result<(), Error> {
    let named = || {
        file.set_permissions(fs::Permissions::from_mode(0o400))?;
        file.sync_all()?;
        fs::rename(from, to)?;
        let directory = to.parent().map(File::open).transpose()?;
        directory.map_or(Ok(()), |it| it.sync_all())
    };
    named().map_err(|error| failed(to, &error))
}

impl Drop for Part {
    fn drop(&mut self) {
        // It has another name, if all went well.
        let _ = fs::remove_file(&self.path);
    }
}

/// A path for another program to write a file to, which is removed unless it gets its name.
pub(crate) struct NewPart(PathBuf);

impl NewPart {
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for NewPart {
    fn drop(&mut self) {
        let mut unfinished = self.0.clone().into_os_string();
        // As `blanket` calls what it has not written to its end.
        unfinished.push(".part");
        for path in [self.0.as_os_str(), &unfinished] {
            let _ = fs::remove_file(path);
        }
    }
}

fn copy(from: &Path, directory: &Path) -> Result<(String, u64), Error> {
    let mut source = File::open(from).map_err(|error| {
        Error::new(
            Code::BadRequest,
            format!("{}: {error}", from.display()),
            "give the path of a file on the node that is to have it",
        )
    })?;
    let mut part = Part::new(directory)?;
    part.fill(&mut source)?;
    part.name(directory)
}

/// What needs an image, and the command that removes that.
fn who_needs(change: &Change, hash: &str) -> Result<Option<(String, String)>, Error> {
    let vms: Vec<VmRecord> = change.all(VMS)?;
    if let Some(vm) = vms.iter().find(|vm| vm.images().contains(&hash)) {
        return Ok(Some((
            format!("the VM {}", vm.name),
            format!("vm rm {}", vm.name),
        )));
    }
    let snapshots: Vec<Snapshot> = change.all(SNAPSHOTS)?;
    let needs = |it: &&Snapshot| it.files().any(|file| file.hash == hash);
    Ok(snapshots.iter().find(needs).map(|it| {
        (
            format!("the snapshot {}", it.name),
            format!("snapshot rm {}", it.name),
        )
    }))
}

impl Agent {
    /// Removes what is left of files that an agent had not finished, or not noted, when it was killed, and
    /// images without a name that nothing needs. Nobody makes any meanwhile.
    ///
    /// # Errors
    /// The store.
    pub(crate) fn clear_strays(&self) -> Result<(), Error> {
        let known = self.store.all(IMAGES)?;
        // One that remembers none at all may have lost its memory, and VMs stand on them.
        let remembers = !known.is_empty();
        let directory = self.config.images();
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let stray = name.starts_with("part-")
                || remembers && is_hash(&name) && known.iter().all(|image| image.hash != name);
            if stray && let Err(error) = fs::remove_file(entry.path()) {
                tracing::warn!("{}: {error}", entry.path().display());
            }
        }
        // What was fetched or written for something that was not to be.
        let unnamed = known.iter().filter(|image| image.names.is_empty());
        let unnamed: Vec<&str> = unnamed.map(|image| image.hash.as_str()).collect();
        if let Err(error) = self.drop_unneeded(&unnamed) {
            tracing::warn!("{error}");
        }
        Ok(())
    }

    /// A path in the images' directory for another program to write a file to.
    pub(crate) fn new_part(&self) -> Result<NewPart, Error> {
        let directory = self.config.images();
        fs::create_dir_all(&directory).map_err(|error| failed(&directory, &error))?;
        let name = format!("part-{}", supercloud_api::new_id(random()?));
        Ok(NewPart(directory.join(name)))
    }

    /// Makes the disk that a VM's cloud-init reads; [`Agent::images`] is read meanwhile.
    pub(crate) async fn made_seed(&self, vm: &str, cloud_init: &str) -> Result<Image, Error> {
        let part = self.new_part()?;
        self.blanket
            .seed(part.path(), vm, cloud_init)
            .await
            .map_err(|error| Error {
                code: Code::BadRequest,
                ..error
            })?;
        let (hash, bytes) = self.named_by_hash(part).await?;
        let image = Image {
            hash,
            names: Vec::new(),
            format: ImageFormat::File,
            bytes,
            size: bytes,
        };
        self.keep(&image, None)
    }

    /// Gives a file that another program has written into the images' directory its hash for a
    /// name. The hash and its bytes.
    pub(crate) async fn named_by_hash(&self, part: NewPart) -> Result<(String, u64), Error> {
        let directory = self.config.images();
        let named = move || {
            let io = |error: std::io::Error| failed(part.path(), &error);
            let mut sum = blake3::Hasher::new();
            let mut file = File::open(part.path()).map_err(io)?;
            std::io::copy(&mut file, &mut sum).map_err(io)?;
            let hash = sum.finalize().to_hex().to_string();
            let bytes = file.metadata().map_err(io)?.len();
            give_name(&file, part.path(), &directory.join(&hash))?;
            Ok((hash, bytes))
        };
        let named = tokio::task::spawn_blocking(named).await;
        named.unwrap_or_else(|error| Err(Error::failed(error.to_string())))
    }

    /// Where an image is.
    pub(crate) fn image_path(&self, hash: &str) -> PathBuf {
        self.config.images().join(hash)
    }

    /// An image by its name or its hash.
    ///
    /// # Errors
    /// The disk.
    pub fn image(&self, name: &str) -> Result<Option<Image>, Error> {
        let all = self.store.all(IMAGES)?;
        let is = |image: &Image| image.hash == name || image.names.iter().any(|it| it == name);
        Ok(all.into_iter().find(is))
    }

    /// Keeps a disk image of the node for VMs to stand on. Twice is as once.
    ///
    /// # Errors
    /// The file, or another image of that name.
    pub async fn add_base(&self, path: &str, name: &str) -> Result<Image, Error> {
        let _stays = self.images.read().await;
        self.add_image(path, Some(name), true).await
    }

    /// Keeps a file of the node as an image; [`Agent::images`] is read meanwhile.
    pub(crate) async fn add_image(
        &self,
        path: &str,
        name: Option<&str>,
        disk: bool,
    ) -> Result<Image, Error> {
        if let Some(name) = name {
            supercloud_api::name("an image", name)?;
        }
        let path = PathBuf::from(path);
        if !path.is_absolute() {
            return Err(Error::new(
                Code::BadRequest,
                format!("{} is not an absolute path", path.display()),
                "",
            ));
        }
        let info = if disk {
            Some(
                self.blanket
                    .disk_info(&path, None)
                    .await
                    .map_err(|error| Error {
                        code: Code::BadRequest,
                        ..error
                    })?,
            )
        } else {
            None
        };
        let directory = self.config.images();
        let copied = tokio::task::spawn_blocking(move || copy(&path, &directory));
        let copied = copied
            .await
            .map_err(|error| Error::failed(error.to_string()))?;
        let (hash, bytes) = copied?;
        fail::point("image.copied");
        let (format, size) = match &info {
            None => (ImageFormat::File, bytes),
            Some(info) if info.format == "raw" => (ImageFormat::Raw, info.size),
            Some(info) if info.format == "qcow2" => (ImageFormat::Qcow2, info.size),
            Some(info) => {
                return Err(Error::new(
                    Code::BadRequest,
                    format!("an image of format {} cannot be a base", info.format),
                    "qemu-img convert makes a qcow2 one of it",
                ));
            }
        };
        self.keep(
            &Image {
                hash,
                names: Vec::new(),
                format,
                bytes,
                size,
            },
            name,
        )
    }

    /// Writes an image down whose file is there.
    fn keep(&self, image: &Image, name: Option<&str>) -> Result<Image, Error> {
        self.store.change(|change| {
            if let Some(name) = name {
                let all: Vec<Image> = change.all(IMAGES)?;
                if let Some(other) = all
                    .iter()
                    .find(|it| it.hash != image.hash && it.names.iter().any(|other| other == name))
                {
                    return Err(Error::new(
                        Code::Conflict,
                        format!("{name} is another image, {}", other.hash),
                        format!("choose another name, or: supercloud image rm {name}"),
                    ));
                }
            }
            let mut kept = change
                .get(IMAGES, &image.hash)?
                .unwrap_or_else(|| image.clone());
            if let Some(name) = name
                && !kept.names.iter().any(|it| it == name)
            {
                kept.names.push(name.into());
            }
            change.put(IMAGES, &kept.hash, &kept)?;
            Ok(kept)
        })
    }

    /// Forgets a name of an image; the image goes with its last name, unless a VM needs it.
    ///
    /// # Errors
    /// There is none, or it is needed.
    pub async fn remove_image(&self, name: &str) -> Result<(), Error> {
        let _alone = self.images.write().await;
        let Some(image) = self.image(name)? else {
            return Ok(());
        };
        let gone = self.store.change(|change| {
            let Some(mut image): Option<Image> = change.get(IMAGES, &image.hash)? else {
                return Ok(false);
            };
            image.names.retain(|it| it != name);
            if !image.names.is_empty() {
                change.put(IMAGES, &image.hash, &image)?;
                return Ok(false);
            }
            if let Some((what, command)) = who_needs(change, &image.hash)? {
                return Err(Error::new(
                    Code::Conflict,
                    format!("{name}: {what} stands on it"),
                    format!("remove that first: supercloud {command}"),
                ));
            }
            change.remove(IMAGES, &image.hash)?;
            Ok(true)
        })?;
        if gone {
            let path = self.image_path(&image.hash);
            fs::remove_file(&path).map_err(|error| failed(&path, &error))?;
        }
        Ok(())
    }

    /// Removes images that have no name and that no VM needs any more, of those that a VM
    /// needed that was removed. If somebody just needs one, they stay for now.
    pub(crate) fn drop_unneeded(&self, hashes: &[&str]) -> Result<(), Error> {
        let Ok(_alone) = self.images.try_write() else {
            return Ok(());
        };
        for hash in hashes {
            let gone = self.store.change(|change| {
                let image: Option<Image> = change.get(IMAGES, hash)?;
                let needed = who_needs(change, hash)?.is_some();
                let gone = image.is_some_and(|image| image.names.is_empty()) && !needed;
                if gone {
                    change.remove(IMAGES, hash)?;
                }
                Ok(gone)
            })?;
            if gone {
                let path = self.image_path(hash);
                fs::remove_file(&path).map_err(|error| failed(&path, &error))?;
            }
        }
        Ok(())
    }

    /// Has an image that another node has. One that is here is not fetched again.
    ///
    /// # Errors
    /// The other node, or what it sends is another file.
    pub(crate) async fn fetch_image(
        self: &Arc<Self>,
        from: &str,
        image: &Image,
    ) -> Result<(), Error> {
        let hash = &image.hash;
        if !is_hash(hash) {
            return Err(Error::new(
                Code::BadRequest,
                format!("{hash:?} is no hash"),
                "",
            ));
        }
        let _alone = self.alone_with(&format!("image/{hash}")).await;
        if self.store.get(IMAGES, hash)?.is_some() && self.image_path(hash).exists() {
            return Ok(());
        }
        let mut agent = self.connect(from).await?;
        let path = format!("/v1/blobs/{hash}");
        let asked = client::request(Method::GET, &path, None::<&()>)?;
        let response = agent.send(asked, client::ANSWER).await?;
        let status = response.status();
        if !status.is_success() {
            let bytes = client::read(response).await.map_err(Error::failed)?;
            return client::understood::<()>(from, status, &bytes);
        }
        let directory = self.config.images();
        let mut part = Part::new(&directory)?;
        let mut body = response.into_body();
        // A source that is cut off never ends its answer.
        while let Some(frame) = timeout(client::ANSWER, body.frame())
            .await
            .map_err(|_| Error::new(Code::Unreachable, format!("{from} sends no more"), ""))?
        {
            let frame = frame
                .map_err(|error| Error::new(Code::Unreachable, format!("{from}: {error}"), ""))?;
            if let Some(bytes) = frame.data_ref() {
                if part.bytes + bytes.len() as u64 > image.bytes {
                    return Err(Error::failed(format!(
                        "{from} sends more than the image {hash}"
                    )));
                }
                part.write(bytes)?;
            }
        }
        if part.hash() != *hash {
            return Err(Error::failed(format!(
                "what {from} sends is not the image {hash}"
            )));
        }
        part.name(&directory)?;
        fail::point("image.fetched");
        let unnamed = Image {
            names: Vec::new(),
            ..image.clone()
        };
        self.keep(&unnamed, None)?;
        self.say(
            "image.fetched",
            hash,
            format!("{} MiB from {from}", image.bytes.div_ceil(1 << 20)),
        );
        Ok(())
    }
}
