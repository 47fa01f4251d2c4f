//! Why an image cannot be opened or changed.

use std::io;
use std::path::PathBuf;

use crate::Format;

/// What is wrong with an image; each names the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host cannot open or examine the file.
    #[error("cannot open the image {path}: {source}")]
    Open {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// It is a directory, a pipe, ...
    #[error("{path} is neither a file nor a block device: it cannot be an image")]
    Kind {
        /// The file.
        path: PathBuf,
    },
    /// Nobody said which format it has, and its name does not.
    #[error(
        "the format of {path} is not known: say it with `format=raw`, `qcow2`, `vmdk` or `vhd`{hint}"
    )]
    FormatUnknown {
        /// The file.
        path: PathBuf,
        /// What it looks like, if like anything; begins with a space.
        hint: String,
    },
    /// The name says one format, the content another.
    #[error(
        "{path} is named like a {named} image, but {content}: say which it is with `format=`. A VM \
         that owns the disk may have written this; if it is a raw disk of a VM, it is `format=raw`"
    )]
    FormatDiffers {
        /// The file.
        path: PathBuf,
        /// By its name.
        named: Format,
        /// What its content is.
        content: String,
    },
    /// The content does not fit the format, or uses a feature that is not supported.
    #[error("{path} cannot be used as a {format} image: {source}")]
    Content {
        /// The file.
        path: PathBuf,
        /// As which it was read.
        format: Format,
        /// What is wrong.
        source: io::Error,
    },
    /// Images of the format are only read.
    #[error(
        "{path} is a {format} image, which can only be read: open it with `ro`, make a qcow2 \
         overlay on it, or convert it with `qemu-img convert -O qcow2`"
    )]
    FormatReadOnly {
        /// The file.
        path: PathBuf,
        /// Of the image.
        format: Format,
    },
    /// Another VM or program has it.
    #[error("the image {path} is in use, so it cannot be opened {how}: {holders}")]
    Locked {
        /// The file.
        path: PathBuf,
        /// For reading or for writing.
        how: &'static str,
        /// Who has it, as far as is known.
        holders: String,
    },
    /// The file system has no locks.
    #[error(
        "cannot lock the image {path}: {source}. If no other machine or program can use it, open \
         it with `lock=off`"
    )]
    NoLocks {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// An image refers to a file that it may not refer to.
    #[error(
        "the image {path} stands on {name}, which is outside its own directory. Whoever made the \
         image chose that name. If it is right, allow its directory with `backing={directory}`"
    )]
    BackingOutside {
        /// The image.
        path: PathBuf,
        /// As it stands in the image.
        name: String,
        /// Where it leads to.
        directory: PathBuf,
    },
    /// An image refers to a file that is not there.
    #[error("the image {path} stands on {name}, which cannot be found: {source}")]
    BackingMissing {
        /// The image.
        path: PathBuf,
        /// As it stands in the image.
        name: String,
        /// The host's answer.
        source: io::Error,
    },
    /// Images stand on each other, too many or in a circle.
    #[error("the image {path} stands on itself, or on more than {most} others")]
    TooDeep {
        /// The image at the top.
        path: PathBuf,
        /// The limit.
        most: usize,
    },
    /// Never overwritten.
    #[error("{path} is there already and is not overwritten: choose another name, or remove it")]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// An image cannot be made.
    #[error("cannot make the image {path}: {source}")]
    Create {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: io::Error,
    },
    /// Images have whole sectors, and some size.
    #[error("{path} cannot have {size} bytes: a disk has a multiple of 512 bytes, and not none")]
    Size {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        size: u64,
    },
    /// An image cannot get another size.
    #[error("cannot resize the image {path} to {size} bytes: {source}")]
    Resize {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        size: u64,
        /// What is wrong.
        source: io::Error,
    },
}
