//! What an agent remembers of VMs, moves and arrivals.

use serde::{Deserialize, Serialize};
use supercloud_api::{
    ArrivalState, Bootfile, Disk, Image, Life, Members, NetPort, Nets, Operation, Place, PostCopy,
    Prepared, Seen, Snapshot, SnapshotKind, Vm, VmSpec,
};

use crate::pki::Identity;
use crate::store::Table;

/// Who this node is: one record, [`OWN`].
pub const IDENTITY: Table<Identity> = Table::new("identity");
/// Who belongs to the cluster: one record, [`OWN`].
pub const MEMBERS: Table<Members> = Table::new("members");
/// What a node that joins has begun: one record, [`OWN`].
pub const JOINING: Table<Joining> = Table::new("joining");
/// Tokens, by the SHA-256 of their secrets.
pub const TOKENS: Table<Token> = Table::new("tokens");
/// VMs, by their names.
pub const VMS: Table<VmRecord> = Table::new("vms");
/// Operations, by their identities.
pub const OPERATIONS: Table<Move> = Table::new("operations");
/// VMs that were to come, by the identities of the operations that move them.
pub const ARRIVALS: Table<Coming> = Table::new("arrivals");
/// Images, by their hashes.
pub const IMAGES: Table<Image> = Table::new("images");
/// Snapshots, by their names.
pub const SNAPSHOTS: Table<Snapshot> = Table::new("snapshots");
/// Names of snapshots that are taken for a copy, and go away when that is made.
pub const COPYING: Table<String> = Table::new("copying");
/// Virtual networks: one record, [`OWN`].
pub const NETS: Table<Nets> = Table::new("nets");
/// Ports of VMs that were removed, whose addresses are to be given back, by their MACs.
pub const RELEASES: Table<NetPort> = Table::new("net-releases");
/// This node's WireGuard key: one record, [`OWN`].
pub const NET_KEY: Table<String> = Table::new("net-key");
/// The name of a record that is alone in its table.
pub const OWN: &str = "own";

/// A token by which nodes join.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// How many may still come.
    pub left: u32,
    /// Until when, milliseconds since 1970.
    pub until_ms: u64,
    /// Who has come: the names, and SHA-256 of their keys.
    pub used: Vec<(String, String)>,
}

/// A node that joins keeps its key, so that it is the same one when it asks again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joining {
    /// The token.
    pub token: String,
    /// Its key, PEM.
    pub key: String,
}

/// A VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub uuid: String,
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
    /// It was never started: if it cannot be, nothing of it stays.
    pub fresh: bool,
    /// Seconds that its guest has to stop; 0: none.
    pub stop_seconds: u64,
    /// Why it does not run although it was to.
    pub trouble: Option<String>,
    /// From what it goes on when it is started, instead of a boot; or what its disks are to be
    /// filled with before it boots.
    #[serde(default)]
    pub restore: Option<Restoring>,
}

/// From what a VM goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restoring {
    /// What `blanket save` or `blanket disk save` has written: an image.
    pub saved: String,
    /// What the VM did then.
    #[serde(default)]
    pub kind: SnapshotKind,
    /// As another VM, whose guest is to get addresses of its own.
    pub other: bool,
    /// Before its memory is unpacked.
    #[serde(default)]
    pub lazy: bool,
}

impl VmRecord {
    /// The same for others.
    #[must_use]
    pub fn shown(&self, node: &str, seen: Seen) -> Vm {
        Vm {
            name: self.name.clone(),
            uuid: self.uuid.clone(),
            node: node.into(),
            spec: self.spec.clone(),
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            seed: self.seed.clone(),
            disks: self.disks.clone(),
            ports: self.ports.clone(),
            life: self.life,
            place: self.place.clone(),
            seen,
            trouble: self.trouble.clone(),
        }
    }

    /// The images that it needs.
    #[must_use]
    pub fn images(&self) -> Vec<&str> {
        let disks = self.disks.iter().filter_map(|disk| disk.base.as_deref());
        let files = [&self.kernel, &self.initrd, &self.seed];
        let files = files.into_iter().flatten().map(|file| file.hash.as_str());
        let saved = self.restore.as_ref().map(|it| it.saved.as_str());
        disks.chain(files).chain(saved).collect()
    }
}

/// An operation, with what only its node needs to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Move {
    /// What others see of it.
    pub shown: Operation,
    /// The VM's identity.
    pub uuid: String,
    /// By its user's word the VM is here.
    pub kept: bool,
    /// How long the VM may stand still, milliseconds.
    pub max_downtime_ms: Option<u64>,
    /// Bytes for each second.
    pub bandwidth: Option<u64>,
    /// Connections at once.
    #[serde(default)]
    pub streams: Option<u8>,
    /// Whether a part of its memory may follow it.
    #[serde(default)]
    pub post_copy: PostCopy,
    /// Only ask.
    pub dry_run: bool,
    /// Where the destination waits.
    pub prepared: Option<Prepared>,
    /// `blanket migrate` was begun, or may have been.
    pub begun: bool,
    /// It is not to move after all.
    pub cancelled: bool,
    /// How many at once, of a drain.
    pub at_once: u32,
}

/// A VM that was to come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coming {
    /// The operation that moves it.
    pub operation: String,
    /// From where.
    pub from: String,
    /// The VM.
    pub vm: String,
    /// Its identity.
    pub uuid: String,
    /// What became of it.
    pub state: ArrivalState,
}
