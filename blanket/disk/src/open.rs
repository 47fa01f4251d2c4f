//! Opening an image.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chain::Opener;
use crate::error::Error;
use crate::format::Format;
use crate::layer::{Layer, LayerEngine};
use crate::raw::Raw;
use crate::reader::{Reader, Source};
use crate::workers::WorkerQueue;
use crate::{Disk, Queue, SECTOR};

/// How requests reach a raw image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DataPath {
    /// io_uring where the host permits it, threads elsewhere.
    #[default]
    Auto,
    /// io_uring, or an error.
    IoUring,
    /// Threads.
    Threads,
}

/// What of the data of a raw image the host keeps in its page cache. The names are QEMU's. A
/// flush means the same with both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Nothing: the device itself reads and writes the guest's memory (`O_DIRECT`).
    None,
    /// All: it reads ahead, gathers writes, and is shared by all that have the image open.
    Writeback,
}

impl Cache {
    /// As users say it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Writeback => "writeback",
        }
    }
}

/// How to open an image.
#[derive(Clone, Debug)]
pub struct Options {
    /// What it is. If nobody says it, its name and its content must agree (`docs/images.md`).
    pub format: Option<Format>,
    /// Refuse writes, and let others read it too.
    pub read_only: bool,
    /// Files that it may stand on, and directories of such files, beside those in its own
    /// directory and below.
    pub backing: Vec<PathBuf>,
    /// How requests reach it if it is raw.
    pub data_path: DataPath,
    /// Through the host's page cache or not, if it is raw. If nobody says it, a block device is
    /// read and written past it, and a file through it. Where the host cannot do without, it goes
    /// through it, with a warning.
    pub cache: Option<Cache>,
    /// Keep other VMs and programs away from it. Without it, two that write destroy it.
    pub lock: bool,
}

impl Default for Options {
    /// To be written, locked, of the format that its name says.
    fn default() -> Self {
        Self {
            format: None,
            read_only: false,
            backing: Vec::new(),
            data_path: DataPath::Auto,
            cache: None,
            lock: true,
        }
    }
}

impl Options {
    /// To be read only; else as by default.
    #[must_use]
    pub fn read_only() -> Self {
        Self {
            read_only: true,
            ..Self::default()
        }
    }
}

/// What reads and writes an open image.
#[derive(Clone, Debug)]
pub(crate) enum Body {
    Raw(Arc<Raw>),
    Layer(Arc<dyn Layer>),
}

impl Body {
    pub(crate) fn source(&self) -> Arc<dyn Source> {
        match self {
            Self::Raw(raw) => Arc::clone(raw) as Arc<dyn Source>,
            Self::Layer(layer) => Arc::clone(layer) as Arc<dyn Source>,
        }
    }
}

/// An open image of any format.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    format: Format,
    body: Body,
}

/// Opens the image at `path`, and all that it stands on.
///
/// # Errors
/// See [`Error`]: each says what to do.
pub fn open(path: impl AsRef<Path>, options: &Options) -> Result<Image, Error> {
    let path = path.as_ref();
    let mut opener = Opener::new(path, options);
    let (format, body) = opener.top()?;
    let size = body.source().size();
    if !size.is_multiple_of(SECTOR) || size == 0 {
        let text = if size == 0 {
            "it is empty".into()
        } else {
            format!(
                "its size, {size} bytes, is not a multiple of {SECTOR}: `truncate -s %{SECTOR}` \
                 appends zeroes to it"
            )
        };
        return Err(Error::Content {
            path: path.into(),
            format,
            source: io::Error::new(io::ErrorKind::InvalidData, text),
        });
    }
    tracing::debug!(path = %path.display(), %format, size, read_only = options.read_only, "image opened");
    Ok(Image {
        path: path.into(),
        format,
        body,
    })
}

impl Image {
    /// Its file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its format.
    #[must_use]
    pub const fn format(&self) -> Format {
        self.format
    }

    /// Reads what a guest would see; keeps the image open and locked.
    #[must_use]
    pub fn reader(&self) -> Reader {
        Reader::new(self.body.source())
    }
}

impl Disk for Image {
    fn size(&self) -> u64 {
        match &self.body {
            Body::Raw(raw) => raw.size(),
            Body::Layer(layer) => layer.size(),
        }
    }

    fn read_only(&self) -> bool {
        match &self.body {
            Body::Raw(raw) => raw.read_only(),
            Body::Layer(layer) => layer.read_only(),
        }
    }

    fn cache(&self) -> Cache {
        match &self.body {
            Body::Raw(raw) => raw.cache(),
            Body::Layer(_) => Cache::Writeback,
        }
    }

    fn discard_granularity(&self) -> u32 {
        match &self.body {
            Body::Raw(raw) => raw.discard_granularity(),
            Body::Layer(layer) => layer.discard_granularity(),
        }
    }

    fn queue(&self, depth: u32) -> io::Result<Box<dyn Queue>> {
        match &self.body {
            Body::Raw(raw) => raw.queue(depth),
            Body::Layer(layer) => {
                let engine = Arc::new(LayerEngine(Arc::clone(layer)));
                Ok(Box::new(WorkerQueue::new(engine, depth)?))
            }
        }
    }

    fn resize(&self, size: u64) -> io::Result<()> {
        let now = self.size();
        if size == now {
            return Ok(());
        }
        if self.read_only() {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        if size < now || !size.is_multiple_of(SECTOR) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{size} bytes are less than {now}, or not a multiple of {SECTOR}"),
            ));
        }
        match &self.body {
            Body::Raw(raw) => raw.resize(size),
            Body::Layer(layer) => layer.grow(size),
        }
    }
}
