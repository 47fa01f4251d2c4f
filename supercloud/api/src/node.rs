//! Nodes, and who belongs to them.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What a node says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeStatus {
    /// Its name.
    pub name: String,
    /// Where other nodes reach it.
    pub address: String,
    /// The version of its `supercloud`.
    pub release: String,
    /// The version of what it says to other nodes.
    pub version: u32,
    /// Whether it has the key of the cluster's CA, and so lets nodes in.
    pub has_ca: bool,
    /// The version of the list of members that it knows.
    pub members_version: u64,
    /// The version of the list of virtual networks that it knows.
    #[serde(default)]
    pub nets_version: u64,
    /// Its clock, milliseconds since 1970.
    pub now_ms: u64,
    /// Bytes of memory.
    pub memory: u64,
    /// Bytes of memory that are available.
    pub memory_available: u64,
    /// CPUs.
    pub cpus: u32,
    /// VMs that run.
    pub vms: u32,
}

/// A node, as another one sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Where it is reached.
    pub address: String,
    /// Whether it is the one that was asked.
    pub here: bool,
    /// Whether it answers.
    pub reachable: bool,
    /// What it says of itself, if it answers.
    pub status: Option<NodeStatus>,
    /// Its clock is so much ahead, milliseconds; negative if it is behind.
    pub clock_ahead_ms: Option<i64>,
    /// Why it does not answer.
    pub error: Option<String>,
}

/// A node that belongs to the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Where it is reached: an address and a port.
    pub address: String,
    /// SHA-256 of its certificate, hexadecimal.
    pub certificate: String,
    /// Whether it has the CA's key.
    pub has_ca: bool,
}

/// Who belongs to the cluster. Only the node with the CA's key changes the list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Members {
    /// Grows with each change.
    pub version: u64,
    /// They.
    pub members: Vec<Member>,
    /// SHA-256 of certificates that are not accepted any more.
    pub removed: Vec<String>,
}

/// A token is wanted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NewToken {
    /// How many nodes may come with it.
    pub uses: u32,
    /// For how many seconds.
    pub seconds: u64,
}

/// A token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TokenText {
    /// What `supercloud node join` takes.
    pub token: String,
    /// Until when, milliseconds since 1970.
    pub until_ms: u64,
}

/// This node is to join the cluster of a token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JoinCluster {
    /// The token.
    pub token: String,
}

/// A node wants to come in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JoinRequest {
    /// What nodes say to each other.
    pub version: u32,
    /// The token's secret.
    pub secret: String,
    /// The name that it wants.
    pub name: String,
    /// Where it is reached.
    pub address: String,
    /// A certificate signing request (PKCS #10), PEM.
    pub request: String,
}

/// It may.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JoinAnswer {
    /// Its certificate, PEM.
    pub certificate: String,
    /// The CA's, PEM.
    pub ca: String,
    /// Who belongs to the cluster.
    pub members: Members,
}

/// A node is to be removed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Remove {
    /// Although it has VMs, or cannot be asked.
    #[serde(default)]
    pub force: bool,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// It is as it should be.
    Ok,
    /// VMs run, and something is worth knowing.
    Warn,
    /// Something does not work.
    Fail,
}

/// What VMs find in a node's CPU (`blanket cpu --json`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeCpu {
    /// What they run on: `module` or `kvm`.
    pub host: String,
    /// The CPU's vendor.
    pub vendor: String,
    /// What it has of what guests may have, by Linux' names.
    pub features: BTreeSet<String>,
    /// All of it can be taken away from a VM.
    pub hides_all: bool,
    /// What can be in any case, with what goes with it.
    pub components: BTreeMap<String, BTreeSet<String>>,
}

/// One check of `doctor`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Finding {
    /// What was looked at.
    pub check: String,
    /// How it is.
    pub level: Level,
    /// In words.
    pub text: String,
    /// The command that mends it.
    pub mend: Option<String>,
}
