//! Virtual networks of VMs.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A network is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NewNet {
    /// Its addresses, such as `10.5.0.0/16`; the first free one of 10.64.0.0/16 and so on if
    /// there are none.
    #[serde(default)]
    pub subnet: Option<String>,
}

/// A virtual network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Net {
    /// Its name.
    pub name: String,
    /// Its number on the wire.
    pub vni: u16,
    /// Its addresses.
    pub subnet: String,
    /// Its VMs.
    pub ports: Vec<NetAddress>,
}

/// A VM in a virtual network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetAddress {
    /// The VM.
    pub vm: String,
    /// Its MAC.
    pub mac: String,
    /// Its address.
    pub address: String,
    /// Ports of all nodes that lead to it, as `8080:80` or `53/udp`.
    pub publish: Vec<String>,
    /// The node that it is on.
    pub node: String,
    /// The node that it was on before.
    pub left: Option<String>,
    /// How often it has moved. Of two that say where it is, the larger is right.
    pub moves: u64,
}

/// A VM wants an address, or has moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NewNetAddress {
    /// The VM.
    pub vm: String,
    /// The node that it is on.
    pub node: String,
    /// How often it has moved.
    pub moves: u64,
    /// Ports of all nodes that are to lead to it.
    pub publish: Vec<String>,
}

/// A node as others' WireGuard knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetNode {
    /// The node.
    pub node: String,
    /// Its number; 0 as it is asked for.
    pub number: u16,
    /// Its key.
    pub public_key: String,
}

/// All of it. Only the node with the CA's key changes it; a node takes one with a higher number
/// from any member.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Nets {
    /// Grows with each change.
    pub version: u64,
    /// The networks.
    pub nets: Vec<Net>,
    /// The nodes that have to do with them.
    pub nodes: Vec<NetNode>,
}

/// VMs run on a node now that were on another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetMoved {
    /// The node.
    pub node: String,
    /// The MAC.
    pub mac: String,
    /// How often it has moved, this time included.
    pub moves: u64,
}
