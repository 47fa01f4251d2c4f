//! Base images, by what is in them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ImageFormat {
    /// A disk, as it is.
    Raw,
    /// A disk image of QEMU's.
    Qcow2,
    /// A kernel, an initrd: no disk.
    File,
}

/// An image that a node has. It is never changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// BLAKE3 of the file, hexadecimal.
    pub hash: String,
    /// Its names; none if only VMs have it.
    pub names: Vec<String>,
    /// What it is.
    pub format: ImageFormat,
    /// Bytes of the file.
    pub bytes: u64,
    /// Bytes of the disk that it is.
    pub size: u64,
}

/// A file of the node is to become an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct AddImage {
    /// Where it is on the node; absolute.
    pub path: String,
}
