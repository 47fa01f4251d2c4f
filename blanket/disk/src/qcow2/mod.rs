//! qcow2 images, through imago's driver.

mod header;
mod storage;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, DynStorage, FormatAccess, FormatCreateBuilder};
use imago::{FormatDriverBuilder, ShallowMapping, StorageOpenOptions};

use crate::SECTOR;
use crate::layer::Layer;
use crate::lock::ImageFile;
use crate::reader::Source;
pub(crate) use header::Header;
use storage::Below;

type Store = Box<dyn DynStorage>;

/// An open qcow2 image, with all that it stands on.
#[derive(Debug)]
pub(crate) struct Image {
    /// imago's driver is used by several threads at once, except for what moves data that
    /// another thread may be reading: discards, and a change of size.
    access: RwLock<Option<FormatAccess<Store>>>,
    /// The driver panicked: what it holds in memory is not to be written any more.
    broken: AtomicBool,
    // Dropped, and with it the lock, after the driver has written its tables.
    file: ImageFile,
    size: AtomicU64,
    read_only: bool,
    granularity: u32,
    below: Option<Arc<dyn Source>>,
}

impl Image {
    /// Opens an image whose header was checked. `backing` is what the header's name leads to.
    pub(crate) fn open(
        file: ImageFile,
        header: &Header,
        backing: Option<Arc<dyn Source>>,
        read_only: bool,
    ) -> io::Result<Self> {
        if file.metadata()?.file_type().is_block_device() && !read_only {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "a qcow2 image on a block device can only be read: it cannot grow",
            ));
        }
        if !header.size.is_multiple_of(SECTOR) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "its size, {} bytes, is not a multiple of {SECTOR}: use `qemu-img resize`",
                    header.size
                ),
            ));
        }
        let below = backing;
        let backing = match &below {
            Some(source) => {
                let below: Store = Box::new(Below::new(Arc::clone(source)));
                Some(FormatAccess::new(Raw::open_image(below, false)?))
            }
            None => None,
        };
        let driver = Qcow2::builder(store(&file, !read_only)?)
            .write(!read_only)
            .backing(backing)
            .data_file(None)
            .open(DenyImplicitOpenGate::default())?;
        // Version 2 knows no clusters that read as zeroes.
        let granularity = if read_only || header.version < 3 {
            0
        } else {
            u32::try_from(header.cluster).unwrap_or_default()
        };
        Ok(Self {
            access: RwLock::new(Some(FormatAccess::new(driver))),
            broken: AtomicBool::new(false),
            file,
            size: AtomicU64::new(header.size),
            read_only,
            granularity,
            below,
        })
    }

    /// Calls the driver beside other threads.
    fn shared<T>(&self, call: impl FnOnce(&FormatAccess<Store>) -> io::Result<T>) -> io::Result<T> {
        let guard = self.access.read().unwrap_or_else(PoisonError::into_inner);
        let _watch = Watch::new(&self.broken)?;
        call(guard.as_ref().ok_or_else(gave_up)?)
    }

    /// Calls the driver when no other thread does.
    fn alone<T>(
        &self,
        call: impl FnOnce(&mut FormatAccess<Store>) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut guard = self.access.write().unwrap_or_else(PoisonError::into_inner);
        let _watch = Watch::new(&self.broken)?;
        call(guard.as_mut().ok_or_else(gave_up)?)
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // imago writes its tables back when it is dropped.
        if self.broken.load(Ordering::Relaxed) {
            let access = self.access.get_mut();
            std::mem::forget(access.unwrap_or_else(PoisonError::into_inner).take());
        }
    }
}

/// Sees a panic of the driver go by.
struct Watch<'a>(&'a AtomicBool);

impl<'a> Watch<'a> {
    fn new(broken: &'a AtomicBool) -> io::Result<Self> {
        if broken.load(Ordering::Relaxed) {
            return Err(gave_up());
        }
        Ok(Self(broken))
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

fn gave_up() -> io::Error {
    io::Error::other("the driver of the image's format gave up before: the image is damaged")
}

/// Makes an image in a new and empty file. `backing` is a name and a format for the header.
pub(crate) fn create(file: &File, size: u64, backing: Option<(&str, &str)>) -> io::Result<()> {
    let mut builder = Qcow2::<Store>::create_builder(store(file, true)?).size(size);
    if let Some((name, format)) = backing {
        builder = builder.backing(name.into(), format.into());
    }
    builder.create()?;
    file.sync_all()
}

fn store(file: &File, writable: bool) -> io::Result<Store> {
    let options = StorageOpenOptions::new().write(writable);
    let file = imago::file::File::from_open_file(file.try_clone()?, options)?;
    Ok(Box::new(file))
}

impl Source for Image {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.shared(|driver| driver.read(into, offset))
    }

    fn below(&self) -> Option<&Arc<dyn Source>> {
        self.below.as_ref()
    }

    fn is_own(&self, offset: u64, length: u64) -> io::Result<bool> {
        if self.below.is_none() {
            return Ok(true);
        }
        let end = offset.saturating_add(length);
        let mut at = offset;
        while at < end {
            let (own, known) = self.shared(|driver| {
                let (mapping, known) = driver.get_shallow_mapping(at, end - at)?;
                let below = matches!(
                    mapping,
                    ShallowMapping::Indirect { .. }
                        | ShallowMapping::Zero {
                            explicit: false,
                            ..
                        }
                );
                Ok((!below, known))
            })?;
            if own || known == 0 {
                return Ok(own);
            }
            at = at.saturating_add(known);
        }
        Ok(false)
    }
}

impl Layer for Image {
    fn read_only(&self) -> bool {
        self.read_only
    }

    fn discard_granularity(&self) -> u32 {
        self.granularity
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.shared(|driver| driver.write(from, offset))
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        // First what the driver keeps of tables, then all that the kernel keeps.
        self.shared(FormatAccess::flush)?;
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.alone(|driver| driver.discard_to_any(offset, length))
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        self.alone(|driver| {
            driver.resize_grow(size, PreallocateMode::None)?;
            driver.flush()
        })?;
        self.file.sync_data()?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}
