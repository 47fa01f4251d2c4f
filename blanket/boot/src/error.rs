//! What goes wrong, in words for the person who brought the image.

use std::io;

/// Why an image gives nothing to boot.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The image itself cannot be read.
    #[error("cannot read the disk image: {0}")]
    Read(#[source] io::Error),
    /// No partition has a file system that can be read.
    #[error(
        "the disk has no file system that can be read here ({found}); readable are ext2/3/4, xfs, \
         btrfs and FAT. Pass --kernel and --initrd"
    )]
    NoFileSystem {
        /// What is there instead, one clause for each partition.
        found: String,
    },
    /// File systems are there, but no boot configuration.
    #[error(
        "no boot configuration on the disk: looked for grub.cfg, loader/entries and extlinux.conf on \
         {looked}. If this is no boot disk, pass --kernel and --initrd; else write one in the \
         image, with update-grub, grub2-mkconfig or kernel-install"
    )]
    NoConfiguration {
        /// Where was looked.
        looked: String,
    },
    /// The configuration has no entry that starts Linux.
    #[error("{config} starts no Linux{why}; pass --kernel and --initrd")]
    NoEntries {
        /// The configuration's place.
        config: String,
        /// What it has instead, beginning with a colon, or nothing.
        why: String,
    },
    /// The user named an entry that is not there.
    #[error("the image has no boot entry {wanted:?}. It has: {known}")]
    NoSuchEntry {
        /// What was asked for.
        wanted: String,
        /// Ids and titles that exist.
        known: String,
    },
    /// An entry cannot be used as it is.
    #[error("boot entry {entry:?} of {config}: {problem}")]
    Entry {
        /// Its title.
        entry: String,
        /// The configuration's place.
        config: String,
        /// What is wrong, and what to do.
        problem: String,
    },
    /// A file that the configuration names.
    #[error("{volume}: {path}: {problem}")]
    File {
        /// Partition and file system.
        volume: String,
        /// Path in it.
        path: String,
        /// What is wrong.
        problem: String,
    },
}

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;
