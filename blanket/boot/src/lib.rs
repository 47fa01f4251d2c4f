//! What a disk image would boot: its kernel, initrd and command line, as its own boot
//! configuration says.
//!
//! ```no_run
//! # use std::{fs::File, sync::Arc};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use blanket_boot::{Image, RawFile};
//! let disk = RawFile::new(File::open("disk.raw")?)?;
//! let mut image = Image::open(Arc::new(disk))?;
//! let menu = image.menu()?;
//! let entry = menu.pick(None)?;
//! let boot = image.load(entry)?;
//! blanket_boot::initrd::driver(&boot.initrd, blanket_boot::initrd::BLOCK_DRIVER)?;
//! # Ok(())
//! # }
//! ```
//!
//! An image is a stranger's: everything that is read of it is bounded, and what it names is
//! looked for on the disk itself only.

#![forbid(unsafe_code)]

mod bls;
mod error;
mod extlinux;
mod fs;
mod grub;
mod image;
pub mod initrd;
mod partitions;
mod source;
#[cfg(feature = "testing")]
pub mod testing;
mod version;
mod volumes;

pub use error::{Error, Result};
pub use image::{Entry, Image, Loaded, Loader, Menu};
pub use source::{RawFile, Source};
