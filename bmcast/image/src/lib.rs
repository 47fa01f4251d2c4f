//! Formats of BMcast: the [`Manifest`] of an image, the [`Record`] of what is on a disk
//! already, the [`BootConfig`] of a machine. See `docs/formats.md`, "BMcast".
#![no_std]

extern crate alloc;

mod sectors;

pub use sectors::{SECTOR, Sectors};
