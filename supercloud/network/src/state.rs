//! What the kernel has of ours, or is to have; and the steps from one to the other. Knows no kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};

use ipnet::Ipv4Net;

use crate::key::PublicKey;

use crate::wanted::Mac;

/// All that is ours in a kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Devices by name.
    pub links: BTreeMap<String, Link>,
    /// Addresses of devices.
    pub addresses: BTreeSet<(String, Ipv4Net)>,
    /// Where VXLAN devices send frames for a MAC; those for no MAC in particular to all of [`FLOOD`].
    pub tunnels: BTreeSet<(String, Mac, Ipv4Addr)>,
    /// Which port of a bridge leads to a MAC.
    pub forwards: BTreeMap<(String, Mac), String>,
    /// MACs of addresses, by the device that they are behind.
    pub neighbours: BTreeMap<(String, Ipv4Addr), Mac>,
    /// Routing tables of ours, each with one default route.
    pub detours: BTreeMap<u32, Detour>,
    /// Which table is for packets with its number as mark that come in by a device.
    pub rules: BTreeSet<(u32, String)>,
    /// Files under `/proc/sys/net`.
    pub settings: BTreeMap<String, String>,
    /// The keys and peers of the WireGuard device.
    pub wireguard: WireGuard,
}

/// The MAC of the VXLAN entry for what is sent to all (`vxlan_snoop`, `all_zeros_mac` in
/// `drivers/net/vxlan/vxlan_core.c`).
pub const FLOOD: Mac = Mac([0; 6]);

/// A device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// What it is; not changed while it lives.
    pub kind: Kind,
    /// Its own address. `None`: any.
    pub mac: Option<Mac>,
    /// Bytes.
    pub mtu: u32,
    /// The bridge that it is a port of, and how.
    pub port: Option<BridgePort>,
    /// Whether it is up.
    pub up: bool,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// WireGuard.
    WireGuard,
    /// A bridge that does not look into multicast subscriptions.
    Bridge,
    /// One end of a pair.
    Veth {
        /// The other end.
        peer: String,
    },
    /// A VXLAN device without learning.
    Vxlan {
        /// Number of the network.
        vni: u16,
        /// Its node's address.
        local: Ipv4Addr,
        /// UDP port.
        port: u16,
    },
    /// A tap with several queues, which stays when nobody has it open.
    Tap,
    /// Something that is not as we make it.
    Other(String),
}

/// A port of a bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BridgePort {
    /// The bridge.
    pub bridge: String,
    /// Whether the bridge notes whom it hears here.
    pub learning: bool,
    /// Whether it sends here what it knows no port for.
    pub flood: bool,
    /// Whether it answers for those behind this port.
    pub suppress: bool,
}

/// Where a routing table leads: to another node's own end in the network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detour {
    /// By which device.
    pub device: String,
    /// To whom.
    pub via: Ipv4Addr,
}

/// What WireGuard knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WireGuard {
    /// This node's key.
    pub key: Option<PublicKey>,
    /// UDP port.
    pub port: u16,
    /// Whom it talks to.
    pub peers: BTreeMap<PublicKey, Peer>,
}

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Where; `None` as wanted is any.
    pub endpoint: Option<SocketAddr>,
    /// Its addresses inside.
    pub allowed: BTreeSet<Ipv4Net>,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Removes a device, and with it the other end of a pair, and all that is about it.
    Delete(String),
    /// Makes a device, down, with nothing but its kind and MAC.
    Create(String, Kind, Option<Mac>),
    /// Sets a device's own MAC.
    Mac(String, Mac),
    /// Sets its MTU.
    Mtu(String, u32),
    /// Makes it a port of a bridge, or of none.
    Join(String, Option<String>),
    /// Sets what its bridge does with it.
    PortFlags(String, BridgePort),
    /// Writes a file under `/proc/sys/net`.
    Set(String, String),
    /// Puts a device up, or down.
    Up(String, bool),
    /// Sets WireGuard's key and port.
    Keys(PublicKey, u16),
    /// Sets one peer.
    Peer(PublicKey, Peer),
    /// Forgets one.
    NoPeer(PublicKey),
    /// Gives a device an address.
    Address(String, Ipv4Net),
    /// Takes one.
    NoAddress(String, Ipv4Net),
    /// Frames for a MAC go to a node; [`FLOOD`] adds one of those that get what is for all.
    Tunnel(String, Mac, Ipv4Addr),
    /// They go there no more.
    NoTunnel(String, Mac, Ipv4Addr),
    /// A bridge finds a MAC at a port.
    Forward(String, Mac, String),
    /// It finds it nowhere.
    NoForward(String, Mac, String),
    /// An address is a MAC's.
    Neighbour(String, Ipv4Addr, Mac),
    /// It is not.
    NoNeighbour(String, Ipv4Addr),
    /// A routing table leads there.
    Detour(u32, Detour),
    /// It is emptied.
    NoDetour(u32, Detour),
    /// Packets with this mark, from this device, use the table of that number.
    Rule(u32, String),
    /// They do not.
    NoRule(u32, String),
}

impl State {
    /// What there is after a step.
    pub fn after(&mut self, step: &Step) {
        match step.clone() {
            Step::Delete(name) => self.delete(&name),
            Step::Create(name, kind, mac) => {
                if let Kind::Veth { peer } = &kind {
                    let back = Kind::Veth { peer: name.clone() };
                    self.links.insert(peer.clone(), Link::fresh(back, None));
                }
                self.links.insert(name, Link::fresh(kind, mac));
            }
            Step::Mac(name, mac) => self.link(&name, |link| link.mac = Some(mac)),
            Step::Mtu(name, mtu) => self.link(&name, |link| link.mtu = mtu),
            Step::Join(name, bridge) => {
                // The bridge forgets whom it found at a port that leaves.
                self.forwards.retain(|_, port| *port != name);
                self.link(&name, |link| link.port = bridge.map(BridgePort::fresh));
            }
            Step::PortFlags(name, flags) => self.link(&name, |link| link.port = Some(flags)),
            Step::Set(path, value) => {
                self.settings.insert(path, value);
            }
            Step::Up(name, up) => self.link(&name, |link| link.up = up),
            Step::Keys(key, port) => {
                self.wireguard.key = Some(key);
                self.wireguard.port = port;
            }
            Step::Peer(key, peer) => {
                self.wireguard.peers.insert(key, peer);
            }
            Step::NoPeer(key) => {
                self.wireguard.peers.remove(&key);
            }
            Step::Address(name, net) => {
                self.addresses.insert((name, net));
            }
            Step::NoAddress(name, net) => {
                self.addresses.remove(&(name, net));
            }
            Step::Tunnel(name, mac, to) => {
                if mac != FLOOD {
                    self.tunnels
                        .retain(|(at, other, _)| (at, *other) != (&name, mac));
                }
                self.tunnels.insert((name, mac, to));
            }
            Step::NoTunnel(name, mac, to) => {
                self.tunnels.remove(&(name, mac, to));
            }
            Step::Forward(bridge, mac, port) => {
                self.forwards.insert((bridge, mac), port);
            }
            Step::NoForward(bridge, mac, _) => {
                self.forwards.remove(&(bridge, mac));
            }
            Step::Neighbour(name, ip, mac) => {
                self.neighbours.insert((name, ip), mac);
            }
            Step::NoNeighbour(name, ip) => {
                self.neighbours.remove(&(name, ip));
            }
            Step::Detour(table, detour) => {
                self.detours.insert(table, detour);
            }
            Step::NoDetour(table, _) => {
                self.detours.remove(&table);
            }
            Step::Rule(mark, name) => {
                self.rules.insert((mark, name));
            }
            Step::NoRule(mark, name) => {
                self.rules.remove(&(mark, name));
            }
        }
    }

    fn link(&mut self, name: &str, change: impl FnOnce(&mut Link)) {
        if let Some(link) = self.links.get_mut(name) {
            change(link);
        }
    }

    fn delete(&mut self, name: &str) {
        let Some(link) = self.links.remove(name) else {
            return;
        };
        self.addresses.retain(|(device, _)| device != name);
        self.tunnels.retain(|(device, ..)| device != name);
        self.forwards
            .retain(|(bridge, _), port| bridge != name && port != name);
        self.neighbours.retain(|(device, _), _| device != name);
        self.detours.retain(|_, detour| detour.device != name);
        let about = format!("/conf/{name}/");
        self.settings.retain(|path, _| !path.contains(&about));
        for other in self.links.values_mut() {
            if other.port.as_ref().is_some_and(|port| port.bridge == name) {
                other.port = None;
            }
        }
        match link.kind {
            Kind::WireGuard => self.wireguard = WireGuard::default(),
            Kind::Veth { peer } => self.delete(&peer),
            _ => {}
        }
    }
}

impl Link {
    /// One that was just made.
    fn fresh(kind: Kind, mac: Option<Mac>) -> Self {
        Self {
            kind,
            mac,
            mtu: 0,
            port: None,
            up: false,
        }
    }
}

impl BridgePort {
    /// One that has just joined: the kernel's defaults.
    fn fresh(bridge: String) -> Self {
        Self {
            bridge,
            learning: true,
            flood: true,
            suppress: false,
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Delete(name) => write!(f, "remove the device {name}"),
            Self::Create(name, ..) => write!(f, "make the device {name}"),
            Self::Mac(name, mac) => write!(f, "give {name} the MAC {mac}"),
            Self::Mtu(name, mtu) => write!(f, "give {name} the MTU {mtu}"),
            Self::Join(name, Some(bridge)) => write!(f, "make {name} a port of {bridge}"),
            Self::Join(name, None) => write!(f, "take {name} out of its bridge"),
            Self::PortFlags(name, _) => write!(f, "set what its bridge does with {name}"),
            Self::Set(path, value) => write!(f, "set net/{path} to {value}"),
            Self::Up(name, true) => write!(f, "put {name} up"),
            Self::Up(name, false) => write!(f, "put {name} down"),
            Self::Keys(key, port) => write!(f, "give WireGuard the key {key} and port {port}"),
            Self::Peer(key, _) => write!(f, "tell WireGuard of the peer {key}"),
            Self::NoPeer(key) => write!(f, "have WireGuard forget the peer {key}"),
            Self::Address(name, net) => write!(f, "give {name} the address {net}"),
            Self::NoAddress(name, net) => write!(f, "take the address {net} from {name}"),
            Self::Tunnel(name, mac, to) => write!(f, "send frames for {mac} by {name} to {to}"),
            Self::NoTunnel(name, mac, to) => {
                write!(f, "send no frames for {mac} by {name} to {to}")
            }
            Self::Forward(bridge, mac, port) => write!(f, "have {bridge} find {mac} at {port}"),
            Self::NoForward(bridge, mac, port) => {
                write!(f, "have {bridge} not find {mac} at {port}")
            }
            Self::Neighbour(name, ip, mac) => write!(f, "have {name} know {ip} as {mac}"),
            Self::NoNeighbour(name, ip) => write!(f, "have {name} forget {ip}"),
            Self::Detour(table, detour) => {
                write!(
                    f,
                    "route table {table} by {} to {}",
                    detour.device, detour.via
                )
            }
            Self::NoDetour(table, _) => write!(f, "empty the table {table}"),
            Self::Rule(mark, name) => write!(f, "use table {mark} for its mark from {name}"),
            Self::NoRule(mark, name) => write!(f, "use no table {mark} for {name}"),
        }
    }
}

/// The number of a table for what must go through another node's own end in a network; also the
/// mark of its packets. Its first bits are 01, then 16 of the network and 14 of the node.
#[must_use]
pub fn detour_table(vni: crate::wanted::Vni, node: crate::wanted::NodeNumber) -> u32 {
    DETOURS | u32::from(vni.get()) << 14 | u32::from(node.get())
}

/// The first bits of [`detour_table`].
const DETOURS: u32 = 0b01 << 30;

/// Whether a table is ours.
#[must_use]
pub fn is_detour(table: u32) -> bool {
    table >> 30 == 0b01 && table != DETOURS
}
