//! What the caller wants: plain records, to be stored and sent as they are.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use crate::error::Invalid;
use crate::key::PublicKey;

/// All that one node has to know. Every node has the same peers (but itself) and the same networks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// The node that this is for.
    pub node: NodeNumber,
    /// UDP port of its WireGuard.
    #[serde(default = "listen_port")]
    pub listen_port: u16,
    /// What fits into a packet between nodes, in bytes, the IP header included.
    #[serde(default = "underlay_mtu")]
    pub underlay_mtu: u16,
    /// Addresses of the nodes among themselves: node `n` has the `n`th.
    #[serde(default = "fabric")]
    pub fabric: Ipv4Net,
    /// The other nodes.
    #[serde(default)]
    pub peers: Vec<NodePeer>,
    /// All networks, whether this node has to do with them or not.
    #[serde(default)]
    pub networks: Vec<Network>,
}

fn listen_port() -> u16 {
    51820
}

fn underlay_mtu() -> u16 {
    1500
}

fn fabric() -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(100, 127, 64, 0), 18)
}

impl Wanted {
    /// A node alone, without networks, with the usual port, MTU and range.
    #[must_use]
    pub fn new(node: NodeNumber) -> Self {
        Self {
            node,
            listen_port: listen_port(),
            underlay_mtu: underlay_mtu(),
            fabric: fabric(),
            peers: Vec::new(),
            networks: Vec::new(),
        }
    }

    /// Writes down that the VM with this MAC is on its way to `to`, which gets a tap for it; `None`: it
    /// is not. Whether there is one.
    pub fn arriving(&mut self, mac: Mac, to: Option<NodeNumber>) -> bool {
        let ports = self
            .networks
            .iter_mut()
            .flat_map(|network| &mut network.ports);
        let mut found = false;
        for port in ports.filter(|port| port.mac == mac) {
            found = true;
            port.arriving = to;
        }
        found
    }

    /// Writes down that the VM with this MAC runs on `to` now. Whether there is one.
    pub fn moved(&mut self, mac: Mac, to: NodeNumber) -> bool {
        let ports = self
            .networks
            .iter_mut()
            .flat_map(|network| &mut network.ports);
        let mut found = false;
        for port in ports.filter(|port| port.mac == mac) {
            found = true;
            if port.node != to {
                port.left = Some(port.node);
                port.node = to;
            }
            if port.arriving == Some(to) {
                port.arriving = None;
            }
        }
        found
    }
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodePeer {
    /// Its number.
    pub node: NodeNumber,
    /// Its WireGuard key.
    pub public_key: PublicKey,
    /// Where its WireGuard can be reached; a node without one must reach us.
    #[serde(default)]
    pub endpoint: Option<SocketAddr>,
}

/// A network of VMs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// A label of a domain name; VMs are called `NAME.NETWORK.internal`.
    pub name: String,
    /// Its number on the wire, the same on every node.
    pub vni: Vni,
    /// Its addresses. The first is the gateway, on every node; [`Network::routers`] says which
    /// others are not for VMs.
    pub subnet: Ipv4Net,
    /// Its VMs.
    #[serde(default)]
    pub ports: Vec<Port>,
}

/// A VM in a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// The VM's name, a label of a domain name.
    pub name: String,
    /// Its MAC.
    pub mac: Mac,
    /// Its address, which DHCP gives it.
    pub address: Ipv4Addr,
    /// The node that it runs on.
    pub node: NodeNumber,
    /// The node that it is on its way to: that has a tap for it already.
    #[serde(default)]
    pub arriving: Option<NodeNumber>,
    /// The node that it was on before: connections to the outside that began there go on through it.
    #[serde(default)]
    pub left: Option<NodeNumber>,
    /// Ports of every node that lead to it.
    #[serde(default)]
    pub publish: Vec<Published>,
}

/// A port of the nodes that leads to a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    /// TCP or UDP.
    #[serde(default)]
    pub protocol: Protocol,
    /// Of the nodes.
    pub port: u16,
    /// Of the VM.
    pub to: u16,
}

impl FromStr for Published {
    type Err = Invalid;

    /// `8080:80`, `80`, `53:53/udp`.
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let wrong = || Invalid::Publish(text.to_owned());
        let (ports, protocol) = match text.split_once('/') {
            None | Some((_, "tcp")) => (text.trim_end_matches("/tcp"), Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some(_) => return Err(wrong()),
        };
        let (port, to) = ports.split_once(':').unwrap_or((ports, ports));
        let number = |text: &str| text.parse().ok().filter(|port| *port != 0);
        Ok(Self {
            protocol,
            port: number(port).ok_or_else(wrong)?,
            to: number(to).ok_or_else(wrong)?,
        })
    }
}

impl fmt::Display for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.port, self.to, self.protocol)
    }
}

/// What is published.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// Number of a node, from 1 to 16382.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct NodeNumber(u16);

impl NodeNumber {
    /// The largest.
    pub const MAX: u16 = 16382;
    /// The first.
    pub const FIRST: Self = Self(1);

    /// The number.
    #[must_use]
    pub fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u16> for NodeNumber {
    type Error = Invalid;

    fn try_from(number: u16) -> Result<Self, Invalid> {
        match number {
            1..=Self::MAX => Ok(Self(number)),
            _ => Err(Invalid::Node(number)),
        }
    }
}

impl From<NodeNumber> for u16 {
    fn from(node: NodeNumber) -> u16 {
        node.0
    }
}

impl fmt::Display for NodeNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for NodeNumber {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        text.parse::<u16>().unwrap_or(0).try_into()
    }
}

/// Number of a network on the wire, not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct Vni(u16);

impl Vni {
    /// The number.
    #[must_use]
    pub fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u16> for Vni {
    type Error = Invalid;

    fn try_from(number: u16) -> Result<Self, Invalid> {
        match number {
            0 => Err(Invalid::Vni),
            _ => Ok(Self(number)),
        }
    }
}

impl From<Vni> for u16 {
    fn from(vni: Vni) -> u16 {
        vni.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let wrong = || Invalid::Mac(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts
                .next()
                .filter(|part| part.len() == 2)
                .ok_or_else(wrong)?;
            // `from_str_radix` takes a sign.
            if !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        match parts.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(wrong()),
        }
    }
}

impl TryFrom<String> for Mac {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> String {
        mac.to_string()
    }
}
