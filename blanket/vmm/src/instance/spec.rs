//! What a VM is to be.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use crate::cpu::Wanted;
use crate::hypervisor::Isolation;

/// What a VM is made of.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its name, also in its xenstore.
    pub name: String,
    /// The kernel file; without one, the first disk says what is booted. Read again at
    /// each reboot, as the initrd.
    pub kernel: Option<PathBuf>,
    /// The initrd file.
    pub initrd: Option<PathBuf>,
    /// The two of them, open, for a process that may not come to their paths any more.
    pub opened: Opened,
    /// RAM at the start, bytes.
    pub memory: u64,
    /// RAM that the guest can be given at most, bytes; `None` = as much as at the start.
    pub max_memory: Option<u64>,
    /// What the guest is asked to have from the start; `None` = what it starts with.
    pub balloon: Option<u64>,
    /// vCPUs.
    pub vcpus: u32,
    /// Its CPU: its host's, or less.
    pub cpu: Wanted,
    /// Which of the first disk's boot entries, if not its default.
    pub boot_entry: Option<String>,
    /// Kernel command line; appended to the disk's, if that is what is booted.
    pub cmdline: String,
    /// What a reboot of the guest does.
    pub on_reboot: OnReboot,
    /// Have the core report every hypercall that it refuses.
    pub verbose: bool,
    /// The host may merge pages of the VM's memory with others'.
    pub mergeable: bool,
    /// The guest may break the core on purpose, for tests.
    pub inject: bool,
    /// Most pages of shadow memory; 0 = the module's default.
    pub pool_limit: u64,
    /// Whether the guest's roots hold the entry area only.
    pub isolation: Isolation,
    /// Trace it from the start.
    pub trace: bool,
    /// Its identity, if it has one already: one that goes on from a file keeps it.
    pub uuid: Option<String>,
}

impl Default for Spec {
    /// One vCPU, 256 MiB, started again when it reboots, nothing unusual; and nothing to
    /// boot but its first disk.
    fn default() -> Self {
        Self {
            name: String::new(),
            kernel: None,
            initrd: None,
            opened: Opened::default(),
            memory: 256 << 20,
            max_memory: None,
            balloon: None,
            vcpus: 1,
            cpu: Wanted::default(),
            boot_entry: None,
            cmdline: String::new(),
            on_reboot: OnReboot::Restart,
            verbose: false,
            mergeable: false,
            inject: false,
            pool_limit: 0,
            isolation: Isolation::Auto,
            trace: false,
            uuid: None,
        }
    }
}

/// Files that a VM is made of, open since the start. They are what is booted where their
/// paths are forbidden, also if there is another file now.
#[derive(Clone, Debug, Default)]
pub struct Opened {
    /// The kernel.
    pub kernel: Option<Arc<File>>,
    /// The initrd.
    pub initrd: Option<Arc<File>>,
}

impl Spec {
    /// RAM that the guest can be given at most, bytes.
    #[must_use]
    pub fn most_memory(&self) -> u64 {
        self.max_memory.unwrap_or(self.memory)
    }
}

/// What a reboot of the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnReboot {
    /// Builds the domain again and starts it.
    Restart,
    /// Ends the VM.
    Exit,
}
