//! VMs as they were at a moment.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::{Bootfile, Disk, Image, NetPort, VmSpec};

/// What the VM of a snapshot did, and so what is in that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SnapshotKind {
    /// It ran: its memory, its state and what was in its disks. It goes on from there.
    #[default]
    Running,
    /// It did not: what was in its disks. It boots from them.
    Stopped,
}

impl SnapshotKind {
    /// Its word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
        }
    }
}

/// A VM as it was at a moment. It is never changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// Its own name.
    pub name: String,
    /// The node that has it.
    pub node: String,
    /// What the VM did.
    #[serde(default)]
    pub kind: SnapshotKind,
    /// The VM.
    pub vm: String,
    /// Its identity.
    pub uuid: String,
    /// What it was to be.
    pub spec: VmSpec,
    /// Its kernel.
    pub kernel: Option<Bootfile>,
    /// Its initrd.
    pub initrd: Option<Bootfile>,
    /// The disk that its guest's cloud-init reads.
    pub seed: Option<Bootfile>,
    /// Its disks, where it was.
    pub disks: Vec<Disk>,
    /// Its ports.
    pub ports: Vec<NetPort>,
    /// What `blanket save` has written, of a VM that did not run `blanket disk save`, as an image.
    pub saved: Image,
    /// The images that it needs beside that.
    pub images: Vec<Image>,
    /// When it was taken, milliseconds since 1970.
    pub taken_ms: u64,
    /// How long the VM stood still for it, milliseconds; 0 if it did not run.
    pub stood_ms: u64,
}

impl Snapshot {
    /// All files that it consists of.
    pub fn files(&self) -> impl Iterator<Item = &Image> {
        std::iter::once(&self.saved).chain(&self.images)
    }
}

/// A snapshot is to be taken.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TakeSnapshot {
    /// Its name; one is made of the VM's and the time if there is none.
    #[serde(default)]
    pub name: Option<String>,
}

/// A VM is to go on from a snapshot, or to boot if it did not run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Restore {
    /// As another VM, of this name, with an identity and addresses of its own; as the same one if
    /// there is none.
    #[serde(default)]
    pub name: Option<String>,
    /// It goes on before its memory is unpacked: what it touches comes from the file at once, the
    /// rest in the background. Until all has come it can be neither saved nor moved. Refused of a
    /// VM that did not run.
    #[serde(default)]
    pub lazy: bool,
}

/// A copy of a VM is to be made, which goes on from the same moment, or boots if the VM does not run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CloneVm {
    /// The copy's name.
    pub name: String,
}

/// A snapshot is to be written to a file of the node, with all that it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExportTo {
    /// Where; absolute, and nothing is there.
    pub path: String,
}

/// A snapshot is to be read from a file of the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImportFrom {
    /// Where it is; absolute.
    pub path: String,
    /// Its name here; the one that it had if there is none.
    #[serde(default)]
    pub name: Option<String>,
}
