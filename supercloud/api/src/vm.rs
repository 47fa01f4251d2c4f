//! VMs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Error;

/// What a user wants a VM to be. Two that are equal are the same VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmSpec {
    /// The first disk: the name of an image, or a path on the node.
    #[serde(default)]
    pub image: Option<String>,
    /// Further disks, likewise.
    #[serde(default)]
    pub disks: Vec<String>,
    /// A kernel of the user's instead of the image's: a path on the node.
    #[serde(default)]
    pub kernel: Option<String>,
    /// Its initial RAM disk.
    #[serde(default)]
    pub initrd: Option<String>,
    /// Kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// Bytes of memory.
    pub memory: u64,
    /// vCPUs.
    pub cpus: u32,
    /// Its CPU, as `blanket run --cpu` takes it: `host`, or less, such as `host,-avx`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// What its guest's cloud-init is told, as `blanket run --cloud-init` takes it: files on the node.
    #[serde(default)]
    pub cloud_init: Option<String>,
    /// Networks: the name of a virtual one, or what `blanket run --net` takes.
    #[serde(default)]
    pub nets: Vec<String>,
    /// Ports of all nodes that lead to it in its first virtual network, as `8080:80` or `53/udp`.
    #[serde(default)]
    pub publish: Vec<String>,
    /// What it runs on: `auto`, `module` or `kvm`, on each node anew.
    #[serde(default)]
    pub host: Option<String>,
}

/// A kernel, an initrd or a seed, kept by the node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Bootfile {
    /// BLAKE3 of the file.
    pub hash: String,
}

/// One of a VM's disks on its node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Disk {
    /// The file.
    pub path: String,
    /// `raw` or `qcow2`, or what `blanket disk` knows else.
    pub format: String,
    /// Bytes that the guest sees.
    pub size: u64,
    /// The image that it stands on, by its hash.
    pub base: Option<String>,
    /// Whether it is the agent's own, and goes with the VM.
    pub owned: bool,
}

/// A VM's port in a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetPort {
    /// The network, as the user said it.
    pub net: String,
    /// The VM's address there, which it keeps.
    pub mac: String,
}

/// What becomes of a VM by its user's will.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Life {
    /// It is to be started.
    Starting,
    /// It runs, until its guest ends itself.
    Running,
    /// It is to be stopped.
    Stopping,
    /// It does not run.
    Stopped,
    /// It is to be removed, with its disks.
    Removing,
}

/// Whose a VM is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum Place {
    /// This node's.
    Here,
    /// This node's until another has it.
    Leaving {
        /// By this operation.
        operation: String,
        /// To this node.
        to: String,
    },
    /// Another node's until it has come.
    Coming {
        /// By this operation.
        operation: String,
        /// From this node.
        from: String,
    },
}

/// What was seen of its process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Seen {
    /// `starting`, `waiting`, `receiving`, `received`, `running`, `sending`, `standing`,
    /// `doubt`, `serving`, `cut`, `pulling`, `lost`, `ended`; `none` if there is no process.
    pub phase: String,
    /// The process.
    pub pid: Option<u32>,
    /// What it runs on.
    pub host: Option<String>,
    /// For how many seconds.
    pub uptime_seconds: Option<u64>,
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// Its identity, for good.
    pub uuid: String,
    /// The node that says this.
    pub node: String,
    /// What it is to be.
    pub spec: VmSpec,
    /// Its kernel.
    pub kernel: Option<Bootfile>,
    /// Its initrd.
    pub initrd: Option<Bootfile>,
    /// The disk that its guest's cloud-init reads.
    #[serde(default)]
    pub seed: Option<Bootfile>,
    /// Its disks here.
    pub disks: Vec<Disk>,
    /// Its ports.
    pub ports: Vec<NetPort>,
    /// What becomes of it.
    pub life: Life,
    /// Whose it is.
    pub place: Place,
    /// What was seen of its process.
    pub seen: Seen,
    /// Why it does not run although it was to.
    pub trouble: Option<String>,
}

/// A VM is to stop.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Stop {
    /// At once, as by pulling the plug.
    #[serde(default)]
    pub now: bool,
    /// Seconds that the guest has.
    #[serde(default)]
    pub seconds: Option<u64>,
}

/// By its user's word, a VM whose place is in doubt is at the node that is asked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Keep {}

/// A VM wants to come: make ready for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Prepare {
    /// The operation that moves it.
    pub operation: String,
    /// The node that has it.
    pub from: String,
    /// The VM, as it is there.
    pub vm: Vm,
    /// The images that it needs.
    pub images: Vec<crate::Image>,
}

/// A place is ready.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Prepared {
    /// Where `blanket` waits for it.
    pub address: String,
    /// What it wants to hear.
    pub token: String,
}

/// What became of a VM that was to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ArrivalState {
    /// Nobody knows of such an operation here.
    Unknown,
    /// Nothing has come yet, or not all.
    Waiting,
    /// All of it is here; its source has not given it.
    Received,
    /// It is here.
    Here,
    /// It runs here, and a part of its memory is still at its source.
    Following,
    /// It was here, and its process has ended since.
    Ended,
    /// It was here, and was ended because a part of its memory was lost with its source.
    Bereft,
    /// It never ran here, and never will.
    Refused,
    /// Its process is gone, and nobody knows what it did last.
    Lost,
}

/// The same, as it is said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Arrival {
    /// The operation.
    pub operation: String,
    /// What became of it.
    pub state: ArrivalState,
    /// In words.
    pub error: Option<Error>,
}
