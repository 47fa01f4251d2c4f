//! What can be wrong.

use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use ipnet::Ipv4Net;

use crate::wanted::{Mac, NodeNumber, Published, Vni};

/// Why something was not done. What was done before it stays; applying again goes on from there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What is wanted cannot be.
    #[error("the wanted networks: {0}")]
    Invalid(#[from] Invalid),
    /// Netlink does not work.
    #[error("cannot talk to the kernel about {what}: {source}")]
    Connect {
        /// About what.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The kernel could not be asked.
    #[error("cannot read the {what} of this machine: {why}")]
    Read {
        /// What was asked for.
        what: &'static str,
        /// Why.
        why: String,
    },
    /// The kernel refused.
    #[error("cannot {what}: {why}{hint}")]
    Kernel {
        /// What was tried.
        what: String,
        /// Why.
        why: String,
        /// What to do.
        hint: &'static str,
    },
    /// A setting of the kernel's.
    #[error("cannot set {path}: {source}", path = path.display())]
    Setting {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of ours.
    #[error("cannot {what} {path}: {source}", path = path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A program that is not there.
    #[error("cannot start {program}: {source}; install Debian's package {package}")]
    Program {
        /// Which.
        program: &'static str,
        /// Which package has it.
        package: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A program that failed.
    #[error("{program} failed ({status}) {what}: {said}")]
    Failed {
        /// Which.
        program: &'static str,
        /// On what.
        what: String,
        /// How it ended.
        status: String,
        /// What it wrote.
        said: String,
    },
    /// A VM that is in none of the networks.
    #[error("no network has a VM with the MAC {0}")]
    UnknownMac(Mac),
}

/// What is wrong with records.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Invalid {
    /// Not a MAC.
    #[error("{0:?} is no MAC; one looks like 02:00:00:00:00:01")]
    Mac(String),
    /// Not a key.
    #[error("{0:?} is no WireGuard key (32 bytes in base64)")]
    PublicKey(String),
    /// Not a secret.
    #[error("the private key is no WireGuard key (32 bytes in base64)")]
    PrivateKey,
    /// A number that no node has.
    #[error("{0} is no node's number; they are from 1 to {max}", max = NodeNumber::MAX)]
    Node(u16),
    /// A number that no network has.
    #[error("0 is no network's number")]
    Vni,
    /// Not a published port.
    #[error("{0:?} is no published port; one looks like 8080:80 or 5353:53/udp")]
    Publish(String),
    /// A name that cannot be part of a domain name.
    #[error("{0:?} is no name; use a to z, 0 to 9 and -, at most 63 of them, and no - at the ends")]
    Name(String),
    /// Two that may be only once.
    #[error("{what} is there twice")]
    Twice {
        /// What.
        what: String,
    },
    /// This node among its peers.
    #[error("node {0} is its own peer")]
    OwnPeer(NodeNumber),
    /// A range that is too small or is not written as one.
    #[error(
        "the fabric {fabric} has no address for node {node}; it must be a range, as 100.127.64.0/18"
    )]
    Fabric {
        /// The range.
        fabric: Ipv4Net,
        /// Whom it has none for.
        node: NodeNumber,
    },
    /// A subnet that is none.
    #[error(
        "{0} is no subnet for a network: use a private one of /8 to /26, written by its first address"
    )]
    Subnet(Ipv4Net),
    /// Two that overlap.
    #[error("{0} and {1} overlap")]
    Overlap(Ipv4Net, Ipv4Net),
    /// A subnet with too few addresses.
    #[error(
        "{subnet} has no address for node {node}; use a larger subnet for the network {network}"
    )]
    NoRouter {
        /// The subnet.
        subnet: Ipv4Net,
        /// The node.
        node: NodeNumber,
        /// Its network.
        network: String,
    },
    /// An address that no VM can have.
    #[error(
        "{address} of the VM {vm} is not for VMs in {subnet}: not its first two, not its last quarter"
    )]
    Address {
        /// The VM.
        vm: String,
        /// Its address.
        address: Ipv4Addr,
        /// The network's.
        subnet: Ipv4Net,
    },
    /// A MAC that no VM can have.
    #[error("{mac} of the VM {vm} is a group's address, or one that nodes have; use another")]
    VmMac {
        /// The VM.
        vm: String,
        /// Its MAC.
        mac: Mac,
    },
    /// A node that nobody knows.
    #[error("the VM {vm} is on node {node}, which is not known")]
    UnknownNode {
        /// The VM.
        vm: String,
        /// The node.
        node: NodeNumber,
    },
    /// A port that is ours.
    #[error("{0} cannot be published: it is the nodes' own")]
    OwnPort(Published),
    /// More than one machine can have.
    #[error("{what}: {is} are more than {limit}")]
    TooMany {
        /// What.
        what: &'static str,
        /// How many there are.
        is: usize,
        /// How many there may be.
        limit: usize,
    },
    /// An MTU with which nothing works.
    #[error("an MTU of {is} between nodes is too small; at least {least}", least = crate::names::UNDERLAY_MTU_MIN)]
    Mtu {
        /// What it is.
        is: u16,
    },
    /// A port of 0.
    #[error("WireGuard needs a port that is not 0")]
    ListenPort,
    /// A network number of this is in the way of another.
    #[error("networks {0} and {1} have the number {2}")]
    SameVni(String, String, Vni),
}
