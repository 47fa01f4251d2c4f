//! Formats of BMcast: the [`Manifest`] of an image, the [`Record`] of what is on a disk
//! already, the [`BootConfig`] of a machine. See `docs/formats.md`, "BMcast".
#![no_std]

extern crate alloc;

mod config;
mod hash;
mod manifest;
mod record;
mod sectors;
mod set;
mod status;

pub use config::{BootConfig, ConfigError, Disk, Network, Server, parse_rate};
pub use hash::{Hash, Key, NoHash};
pub use manifest::{
    Chunks, DEFAULT_CHUNK, MAX_CHUNK, MAX_CHUNKS, MAX_MANIFEST, MIN_CHUNK, Manifest, ManifestError,
};
pub use record::{Commit, Found, Header, Layout, Piece, Record, RecordError, TooSmall};
pub use sectors::{SECTOR, Sectors};
pub use set::SectorSet;
pub use status::{MachineState, MachineStatus, is_machine_name, machine_name_of_mac};
