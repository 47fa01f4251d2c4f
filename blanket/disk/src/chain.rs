//! Opening a file and the files that it stands on, as far as they may be.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;

use crate::error::Error;
use crate::format::{Doubt, Format, HEAD, agreed};
use crate::layer::Layer;
use crate::lock::{self, ImageFile, Use};
use crate::open::{Body, Options};
use crate::raw::Raw;
use crate::reader::{Source, length};
use crate::{Cache, qcow2, vhd, vmdk};

/// Most images that stand on each other.
pub(crate) const DEEPEST: usize = 32;

/// Opens one image and what is below it.
pub(crate) struct Opener<'a> {
    top: &'a Path,
    options: &'a Options,
    /// Device and inode of what is open already: a circle would never end.
    seen: Vec<(u64, u64)>,
}

/// A file that was opened, and what is known of it.
struct Opened {
    file: ImageFile,
    path: PathBuf,
    format: Format,
    length: u64,
}

impl<'a> Opener<'a> {
    pub(crate) fn new(top: &'a Path, options: &'a Options) -> Self {
        Self {
            top,
            options,
            seen: Vec::new(),
        }
    }

    /// The image itself.
    pub(crate) fn top(&mut self) -> Result<(Format, Body), Error> {
        let format = self.options.format;
        let opened = self.file(self.top, format, self.options.read_only)?;
        let format = opened.format;
        let cache = self.options.cache;
        Ok((format, self.body(opened, self.options.read_only, cache)?))
    }

    /// Opens one file, says its format, and locks it.
    fn file(
        &mut self,
        path: &Path,
        format: Option<Format>,
        read_only: bool,
    ) -> Result<Opened, Error> {
        let (file, metadata) = open_file(path, read_only)?;
        let mut file = ImageFile::new(file);
        let failed = |source| Error::Open {
            path: path.into(),
            source,
        };
        let identity = (metadata.dev(), metadata.ino());
        if self.seen.contains(&identity) || self.seen.len() > DEEPEST {
            return Err(Error::TooDeep {
                path: self.top.into(),
                most: DEEPEST,
            });
        }
        self.seen.push(identity);
        let length = length(&file).map_err(failed)?;
        let device = metadata.file_type().is_block_device();
        let format = match format {
            Some(format) => format,
            None => agreed_format(path, &file, length, device)?,
        };
        if !read_only && !format.writable() {
            return Err(Error::FormatReadOnly {
                path: path.into(),
                format,
            });
        }
        if self.options.lock {
            lock(path, &mut file, read_only)?;
        }
        Ok(Opened {
            file,
            path: path.into(),
            format,
            length,
        })
    }

    /// Gives a file to the driver of its format.
    fn body(
        &mut self,
        opened: Opened,
        read_only: bool,
        cache: Option<Cache>,
    ) -> Result<Body, Error> {
        let Opened {
            file,
            path,
            format,
            length,
        } = opened;
        let content = |source| Error::Content {
            path: path.clone(),
            format,
            source,
        };
        let layer: Arc<dyn Layer> = match format {
            Format::Raw => {
                let data_path = self.options.data_path;
                let raw = Raw::new(file, &path, read_only, data_path, cache);
                return Ok(Body::Raw(Arc::new(raw.map_err(content)?)));
            }
            Format::Qcow2 => {
                let header = qcow2::Header::read(&file, length).map_err(content)?;
                let backing = match &header.backing {
                    Some(name) => {
                        let format = header.backing_format.as_deref();
                        Some(self.below(&path, name, format)?)
                    }
                    None => None,
                };
                let image = qcow2::Image::open(file, &header, backing, read_only);
                Arc::new(image.map_err(content)?)
            }
            Format::Vhd => Arc::new(vhd::Image::open(file, length).map_err(content)?),
            Format::Vmdk => {
                let plan = vmdk::Plan::read(&file, length).map_err(content)?;
                let mut extents = Vec::new();
                for name in plan.files() {
                    let found = self.permitted(&path, name)?;
                    let opened = self.file(&found, Some(Format::Raw), true)?;
                    extents.push(Arc::new(opened.file));
                }
                Arc::new(vmdk::Image::open(file, plan, extents).map_err(content)?)
            }
        };
        Ok(Body::Layer(layer))
    }

    /// Opens what an image stands on.
    fn below(
        &mut self,
        image: &Path,
        name: &str,
        format: Option<&str>,
    ) -> Result<Arc<dyn Source>, Error> {
        let format = named_format(image, format)?;
        let path = self.permitted(image, name)?;
        let opened = self.file(&path, format, true)?;
        // Formats' drivers read any bytes, and read some of them often.
        let cache = Some(Cache::Writeback);
        Ok(self.body(opened, true, cache)?.source())
    }

    /// Where a name in an image leads to, if it may lead there. The image may come from anybody,
    /// and would show its guest any file of the host.
    pub(crate) fn permitted(&self, image: &Path, name: &str) -> Result<PathBuf, Error> {
        let missing = |source| Error::BackingMissing {
            path: image.into(),
            name: name.into(),
            source,
        };
        let home = fs::canonicalize(image)
            .map(|whole| whole.parent().unwrap_or(Path::new("/")).to_path_buf())
            .map_err(missing)?;
        let path = fs::canonicalize(home.join(name)).map_err(missing)?;
        let allowed =
            |place: &PathBuf| fs::canonicalize(place).is_ok_and(|place| path.starts_with(place));
        if path.starts_with(&home) || self.options.backing.iter().any(allowed) {
            return Ok(path);
        }
        Err(Error::BackingOutside {
            path: image.into(),
            name: name.into(),
            directory: path.parent().unwrap_or(Path::new("/")).into(),
        })
    }
}

/// Opens a file or block device, and nothing else: a pipe would wait for ever.
pub(crate) fn open_file(path: &Path, read_only: bool) -> Result<(File, fs::Metadata), Error> {
    let failed = |source| Error::Open {
        path: path.into(),
        source,
    };
    let file = File::options()
        .read(true)
        .write(!read_only)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::Kind { path: path.into() });
    }
    // On files that do not wait io_uring may answer EAGAIN again and again.
    rustix::fs::fcntl_setfl(&file, OFlags::empty()).map_err(|error| failed(error.into()))?;
    Ok((file, metadata))
}

/// The format of a file for which nobody gave one.
pub(crate) fn agreed_format(
    path: &Path,
    file: &File,
    length: u64,
    device: bool,
) -> Result<Format, Error> {
    let mut head = [0; HEAD];
    let there = head.len().min(usize::try_from(length).unwrap_or(HEAD));
    file.read_exact_at(&mut head[..there], 0)
        .map_err(|source| Error::Open {
            path: path.into(),
            source,
        })?;
    let named = if device {
        Some(Format::Raw)
    } else {
        Format::of_name(path)
    };
    agreed(named, Format::of_head(&head[..there])).map_err(|doubt| match doubt {
        Doubt::Unnamed(seen) => Error::FormatUnknown {
            path: path.into(),
            hint: seen.map_or_else(String::new, |seen| format!(" (it begins like {seen})")),
        },
        Doubt::Differs(named, seen) => Error::FormatDiffers {
            path: path.into(),
            named,
            content: seen.map_or_else(
                || "does not begin like one".into(),
                |seen| format!("begins like {seen}"),
            ),
        },
    })
}

/// The format that a qcow2 image says its backing image has.
pub(crate) fn named_format(image: &Path, name: Option<&str>) -> Result<Option<Format>, Error> {
    let format = name.map(str::parse::<Format>).transpose();
    format.map_err(|error| Error::Content {
        path: image.into(),
        format: Format::Qcow2,
        source: io::Error::new(io::ErrorKind::InvalidData, error),
    })
}

fn lock(path: &Path, file: &mut ImageFile, read_only: bool) -> Result<(), Error> {
    let (wanted, how) = if read_only {
        (Use::Read, "for reading")
    } else {
        (Use::Write, "for writing")
    };
    match file.lock(wanted) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::Locked {
            path: path.into(),
            how,
            holders: lock::holders(file),
        }),
        Err(source) => Err(Error::NoLocks {
            path: path.into(),
            source,
        }),
    }
}
