//! Why a file cannot be started as a guest kernel.

use std::io;
use std::path::PathBuf;

/// A kernel that cannot be used: the file and the reason.
#[derive(Debug, thiserror::Error)]
#[error("kernel {}: {kind}", path.display())]
pub struct Error {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub kind: ErrorKind,
}

/// What is wrong with a kernel image.
#[derive(Debug, thiserror::Error)]
pub enum ErrorKind {
    /// The file does not exist.
    #[error("the file does not exist; give the path of a vmlinuz or vmlinux with --kernel")]
    Missing,
    /// The file cannot be read.
    #[error("cannot be read: {0}")]
    Read(#[source] io::Error),
    /// The image, or what it unpacks to, is larger than any kernel.
    #[error("is larger than {limit} MiB once unpacked, which no kernel is")]
    TooLarge {
        /// The limit in MiB.
        limit: usize,
    },
    /// Neither a bzImage nor an ELF file.
    #[error("is not a Linux kernel: {0}; give the vmlinuz of a distribution, or an ELF vmlinux")]
    NotAKernel(&'static str),
    /// It was a kernel once, but its contents contradict each other.
    #[error("is corrupt: {0}; fetch the file again")]
    Corrupt(String),
    /// The compression is not one that this program unpacks.
    #[error(
        "is compressed with {0}, which is not supported; \
         gzip, bzip2, lzma, xz, lz4 and zstd are"
    )]
    Compression(&'static str),
    /// A kernel without the Xen PV entry.
    #[error(
        "has no Xen PV entry (it was built without CONFIG_XEN_PV){}; \
         use a kernel of Debian, Ubuntu, Fedora, Arch or SUSE, or build one with CONFIG_XEN_PV=y",
        if *pvh { ", only the PVH one, which needs hardware virtualization" } else { "" }
    )]
    NoXenPv {
        /// Whether it has the PVH entry.
        pvh: bool,
    },
    /// The kernel asks for something that Blanket does not give.
    #[error("cannot run here: {0}")]
    Unsupported(String),
}

impl ErrorKind {
    pub(super) fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt(what.into())
    }
}
