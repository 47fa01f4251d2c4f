//! What goes wrong with an instance, in words.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use blanket_devices::bus;
use blanket_xenstore::Errno;
use vm_memory::GuestMemoryError;

use super::LEAST_MEMORY;
use crate::builder;
use crate::device;
use crate::kernel;
use crate::saved;
use crate::vm;

/// Why a VM could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// The initrd.
    #[error("initrd {}: {source}", path.display())]
    Initrd {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// What the first disk says.
    #[error("{}: {source}", path.display())]
    Boot {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        source: blanket_boot::Error,
    },
    /// Neither a kernel nor a disk.
    #[error("there is nothing to boot: give a disk image, or a kernel with --kernel")]
    NothingToBoot,
    /// The domain.
    #[error(transparent)]
    Build(#[from] builder::Error),
    /// The hypervisor.
    #[error(transparent)]
    Device(#[from] device::Error),
    /// The most is less than the start.
    #[error(
        "the VM starts with {} MiB of memory (--memory), which is more than the {} MiB that it \
         can have at most (--max-memory)",
        memory >> 20, most >> 20
    )]
    MaxMemory {
        /// At the start, bytes.
        memory: u64,
        /// At most, bytes.
        most: u64,
    },
    /// Its CPU.
    #[error(transparent)]
    Cpu(#[from] crate::cpu::WantedError),
    /// What the guest is to have of its memory.
    #[error(transparent)]
    Balloon(#[from] BalloonError),
    /// The vCPUs.
    #[error(transparent)]
    Start(#[from] vm::Failure),
    /// The grant table.
    #[error("the VM's grant table cannot be reached: {0}")]
    Grants(GuestMemoryError),
    /// The bus of its devices.
    #[error("cannot start the thread of the VM's devices: {0}")]
    Bus(io::Error),
    /// A device.
    #[error(transparent)]
    Attach(#[from] bus::Error),
    /// It was to come from another host.
    #[error(transparent)]
    Receive(#[from] crate::migration::ReceiveError),
    /// Another host keeps it.
    #[error(transparent)]
    NotGiven(#[from] crate::migration::NotGiven),
    /// What it should go on from.
    #[error(transparent)]
    Resume(#[from] saved::ResumeError),
    /// The first nodes of the store.
    #[error("cannot describe the VM in its xenstore: {0}")]
    Xenstore(Errno),
    /// The host gave no random bytes for the UUID or the generation id.
    #[error("cannot make the VM's UUID and generation id: the host gave no random bytes: {0}")]
    Identity(io::Error),
    /// What was to be done before a VM that has come may run.
    #[error("the VM was given, and what comes before it runs failed: {0}")]
    WhenGiven(io::Error),
}

/// Why a guest was not stopped.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// There is nothing to stop.
    #[error("the VM has ended already")]
    Ended,
    /// There is nothing to stop yet.
    #[error("the VM is only just being started")]
    NotStarted,
    /// The guest did not do it.
    #[error(
        "the guest did not shut down within {} seconds{}",
        timeout.as_secs(),
        if *listening { "" } else { "; it does not listen for the request (still booting, or hung)" }
    )]
    Timeout {
        /// How long it had.
        timeout: Duration,
        /// Whether it had announced that it powers off on request.
        listening: bool,
    },
    /// The request could not be written.
    #[error("cannot ask the guest: {0}")]
    Xenstore(Errno),
}

/// Why a guest's memory was not changed.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// There is nothing to change.
    #[error("the VM does not run")]
    NotRunning,
    /// More than there is.
    #[error(
        "the VM can have {} MiB of memory at most, and not {} MiB: start it with a larger --max-memory",
        most >> 20, wanted >> 20
    )]
    TooMuch {
        /// Asked for, bytes.
        wanted: u64,
        /// The VM's, bytes.
        most: u64,
    },
    /// No guest could go on.
    #[error(
        "no guest lives in less than {} MiB; give it more",
        LEAST_MEMORY >> 20
    )]
    TooLittle,
    /// The host.
    #[error(transparent)]
    Device(#[from] device::Error),
    /// The request could not be written.
    #[error("cannot ask the guest: {0}")]
    Xenstore(Errno),
}
