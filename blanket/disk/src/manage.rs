//! Images that no VM uses: making, growing, examining them, and overlays on them.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::chain::{DEEPEST, Opener, agreed_format, named_format, open_file};
use crate::error::Error;
use crate::format::Format;
use crate::open::{Options, open};
use crate::reader::length;
use crate::{Disk as _, SECTOR, lock, qcow2};

/// What a new image stands on.
#[derive(Clone, Copy, Debug)]
pub struct Backing<'a> {
    /// The file. If it is in the directory of the new image or below, the image gets the way
    /// from there, so that the directory can be moved; else the whole path.
    pub path: &'a Path,
    /// Its format; if nobody says it, its name and content must agree.
    pub format: Option<Format>,
}

/// Makes an image of `size` bytes; one with a backing image may have none given, and gets that
/// one's size. The file takes no space but for its tables.
///
/// # Errors
/// The file is there, the format is only read or has no backing images, or the host cannot.
/// Nothing is left behind then.
pub fn create(
    path: impl AsRef<Path>,
    format: Format,
    size: Option<u64>,
    backing: Option<Backing<'_>>,
) -> Result<(), Error> {
    let path = path.as_ref();
    let failed = |source| Error::Create {
        path: path.into(),
        source,
    };
    if !format.writable() {
        return Err(Error::FormatReadOnly {
            path: path.into(),
            format,
        });
    }
    if backing.is_some() && format != Format::Qcow2 {
        let text = "only qcow2 images can stand on another";
        return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, text)));
    }
    let base = match backing {
        Some(backing) => Some(Base::look(path, backing)?),
        None => None,
    };
    let size = size.or(base.as_ref().map(|base| base.size)).unwrap_or(0);
    if size == 0 || !size.is_multiple_of(SECTOR) {
        return Err(Error::Size {
            path: path.into(),
            size,
        });
    }
    let mut options = File::options();
    let file = options
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(|source| {
            if source.kind() == io::ErrorKind::AlreadyExists {
                Error::Exists { path: path.into() }
            } else {
                failed(source)
            }
        })?;
    let base = base.as_ref();
    let made = match format {
        Format::Qcow2 => qcow2::create(
            &file,
            size,
            base.map(|base| (base.name.as_str(), base.format.qemu_name())),
        ),
        _ => file.set_len(size).and_then(|()| file.sync_all()),
    };
    made.map_err(|source| {
        // It was made by us a moment ago, and nobody else has a use for it.
        let _ = fs::remove_file(path);
        failed(source)
    })
}

/// Makes a qcow2 image `overlay` that begins with what is in the image at `path`, and takes all
/// writes from then on; the image itself must not be written any more. The image may not be in
/// use by a writer meanwhile.
///
/// # Errors
/// See [`create`].
pub fn snapshot(
    path: impl AsRef<Path>,
    format: Option<Format>,
    overlay: impl AsRef<Path>,
) -> Result<(), Error> {
    let path = path.as_ref();
    let backing = Backing { path, format };
    create(overlay, Format::Qcow2, None, Some(backing))
}

/// An image on which another is to stand.
struct Base {
    name: String,
    format: Format,
    size: u64,
}

impl Base {
    fn look(overlay: &Path, backing: Backing<'_>) -> Result<Self, Error> {
        // Whoever makes an overlay trusts what it names, however that is made up.
        let options = Options {
            format: backing.format,
            backing: vec!["/".into()],
            ..Options::read_only()
        };
        let image = open(backing.path, &options)?;
        let name = way(overlay, backing.path).map_err(|source| Error::Open {
            path: backing.path.into(),
            source,
        })?;
        let name = name.into_os_string().into_string().map_err(|name| {
            let text = format!("the name {} is not UTF-8", name.display());
            Error::Create {
                path: overlay.into(),
                source: io::Error::new(io::ErrorKind::InvalidInput, text),
            }
        })?;
        Ok(Self {
            name,
            format: image.format(),
            size: image.size(),
        })
    }
}

/// How one gets from an image to what it stands on, see [`Backing::path`].
fn way(image: &Path, backing: &Path) -> io::Result<PathBuf> {
    let parent = match image.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    let home = fs::canonicalize(parent)?;
    let backing = fs::canonicalize(backing)?;
    Ok(match backing.strip_prefix(&home) {
        Ok(below) => below.into(),
        Err(_) => backing,
    })
}

/// Gives the image at `path` a larger size.
///
/// # Errors
/// It is in use, the size is smaller than now, or the format cannot.
pub fn resize(path: impl AsRef<Path>, options: &Options, size: u64) -> Result<(), Error> {
    let path = path.as_ref();
    let image = open(path, options)?;
    image.resize(size).map_err(|source| Error::Resize {
        path: path.into(),
        size,
        source,
    })
}

/// What is known of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Bytes that a guest sees.
    pub size: u64,
    /// Bytes that the file takes of its file system.
    pub allocated: u64,
    /// Snapshots inside a qcow2 image. They are kept, but cannot be used.
    pub internal_snapshots: u32,
    /// Whether somebody has it open for writing.
    pub in_use: bool,
    /// The name of what it stands on, as it is written in it.
    pub backing: Option<String>,
}

/// What is known of the image at `path`, and of those below it, which follow in order. It may
/// be in use: then what is said of it may be old already.
///
/// # Errors
/// An image cannot be opened, see [`Error`].
pub fn info(path: impl AsRef<Path>, options: &Options) -> Result<Vec<Info>, Error> {
    let options = Options {
        read_only: true,
        lock: false,
        ..options.clone()
    };
    let mut all: Vec<Info> = Vec::new();
    let mut next = Some((path.as_ref().to_path_buf(), options.format));
    while let Some((path, format)) = next.take() {
        if all.len() > DEEPEST {
            return Err(Error::TooDeep {
                path: path.clone(),
                most: DEEPEST,
            });
        }
        let (one, below) = examine(&path, format, &options)?;
        all.push(one);
        next = below;
    }
    Ok(all)
}

type Below = Option<(PathBuf, Option<Format>)>;

fn examine(path: &Path, format: Option<Format>, options: &Options) -> Result<(Info, Below), Error> {
    let (file, metadata) = open_file(path, true)?;
    let length = length(&file).map_err(|source| Error::Open {
        path: path.into(),
        source,
    })?;
    let format = match format {
        Some(format) => format,
        None => agreed_format(path, &file, length, !metadata.is_file())?,
    };
    let mut info = Info {
        path: path.into(),
        format,
        size: length,
        allocated: metadata.blocks() * 512,
        internal_snapshots: 0,
        in_use: lock::written(path),
        backing: None,
    };
    match format {
        Format::Raw => {}
        Format::Qcow2 => {
            let header = qcow2::Header::read(&file, length).map_err(|source| Error::Content {
                path: path.into(),
                format,
                source,
            })?;
            info.size = header.size;
            info.internal_snapshots = header.snapshots;
            if let Some(name) = header.backing {
                let opener = Opener::new(path, options);
                let format = named_format(path, header.backing_format.as_deref())?;
                let below = opener.permitted(path, &name)?;
                info.backing = Some(name);
                return Ok((info, Some((below, format))));
            }
        }
        Format::Vmdk | Format::Vhd => {
            let options = Options {
                format: Some(format),
                ..options.clone()
            };
            info.size = open(path, &options)?.size();
        }
    }
    Ok((info, None))
}
