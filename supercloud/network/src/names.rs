//! Names, addresses and sizes that follow from numbers, so that no node has to be asked for them.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::wanted::{Mac, Network, NodeNumber, Port, Vni, Wanted};

/// The WireGuard device.
pub const WIREGUARD: &str = "scwg0";
/// UDP port of our VXLAN; not the usual 4789, which may be somebody else's.
pub const VXLAN_PORT: u16 = 51899;
/// The gateway's MAC, the same on every node and in every network.
pub const GATEWAY: Mac = Mac([0x02, 0x53, 0x43, 0, 0, 0]);

/// WireGuard's header, its authenticator, UDP's and IPv6's headers (`noise_protocol` section of the
/// WireGuard paper: 16 + 16; 8; 40).
const WIREGUARD_OVERHEAD: u16 = 80;
/// VXLAN's header, the inner Ethernet header, UDP's and IPv4's headers (RFC 7348: 8 + 14 + 8 + 20).
const VXLAN_OVERHEAD: u16 = 50;

/// The least `underlay_mtu`: IPv6's 1280 on the fabric's inner side is not promised, IPv4's 576 is.
pub const UNDERLAY_MTU_MIN: u16 = 576 + WIREGUARD_OVERHEAD + VXLAN_OVERHEAD;

/// The bridge of a network.
#[must_use]
pub fn bridge(vni: Vni) -> String {
    format!("scb{vni}")
}

/// The VXLAN device of a network.
#[must_use]
pub fn vxlan(vni: Vni) -> String {
    format!("scv{vni}")
}

/// This node's own end in a network.
#[must_use]
pub fn router(vni: Vni) -> String {
    format!("scr{vni}")
}

/// Where [`router`] is plugged into the bridge.
#[must_use]
pub fn router_port(vni: Vni) -> String {
    format!("scp{vni}")
}

/// The tap of a VM.
#[must_use]
pub fn tap(mac: Mac) -> String {
    let [a, b, c, d, e, f] = mac.0;
    format!("sct{a:02x}{b:02x}{c:02x}{d:02x}{e:02x}{f:02x}")
}

/// Whether a device of this name is ours: made, changed and removed at will.
#[must_use]
pub fn is_ours(name: &str) -> bool {
    let Some(rest) = name.strip_prefix("sc") else {
        return false;
    };
    if name == WIREGUARD {
        return true;
    }
    let Some(kind) = rest.chars().next() else {
        return false;
    };
    let tail = &rest[kind.len_utf8()..];
    match kind {
        'b' | 'v' | 'r' | 'p' => tail
            .parse::<u16>()
            .is_ok_and(|vni| vni != 0 && tail == vni.to_string()),
        't' => {
            tail.len() == 12
                && tail
                    .bytes()
                    .all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
        }
        _ => false,
    }
}

/// MAC of a node's own end in every network.
#[must_use]
pub fn router_mac(node: NodeNumber) -> Mac {
    let [high, low] = node.get().to_be_bytes();
    Mac([0x02, 0x53, 0x43, 0, high, low])
}

/// The `n`th address of a range.
fn nth(range: Ipv4Net, n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(range.network()).wrapping_add(n))
}

impl Wanted {
    /// The address of a node among the nodes.
    #[must_use]
    pub fn fabric_address(&self, node: NodeNumber) -> Ipv4Addr {
        nth(self.fabric, node.get().into())
    }

    /// MTU of the WireGuard device. IPv6 is reckoned with whatever the endpoints are, so that a
    /// node that comes later changes nothing.
    #[must_use]
    pub fn fabric_mtu(&self) -> u16 {
        self.underlay_mtu.saturating_sub(WIREGUARD_OVERHEAD)
    }

    /// MTU of the networks, which VMs are told by DHCP: with it nothing is cut in pieces on its way.
    #[must_use]
    pub fn guest_mtu(&self) -> u16 {
        self.fabric_mtu().saturating_sub(VXLAN_OVERHEAD)
    }
}

impl Network {
    /// The gateway's address, the same on every node.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        nth(self.subnet, 1)
    }

    /// How many addresses there are from the network's own to the broadcast address.
    fn span(&self) -> u32 {
        u32::from(self.subnet.broadcast()).wrapping_sub(u32::from(self.subnet.network()))
    }

    /// How many addresses at the end are the nodes' own: a quarter.
    #[must_use]
    pub fn routers(&self) -> u32 {
        (self.span() / 4).min(NodeNumber::MAX.into())
    }

    /// A node's own address in the network, counted from the end; none if there are fewer for nodes.
    #[must_use]
    pub fn router(&self, node: NodeNumber) -> Option<Ipv4Addr> {
        let back = u32::from(node.get());
        (back <= self.routers()).then(|| nth(self.subnet, self.span() - back))
    }

    /// Whether a VM may have the address.
    #[must_use]
    pub fn is_for_vms(&self, address: Ipv4Addr) -> bool {
        let at = u32::from(address).wrapping_sub(u32::from(self.subnet.network()));
        (2..self.span().saturating_sub(self.routers())).contains(&at)
    }

    /// Addresses that no VM has, in their order.
    pub fn free(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        (2..self.span().saturating_sub(self.routers()))
            .map(|n| nth(self.subnet, n))
            .filter(|address| self.ports.iter().all(|port| port.address != *address))
    }

    /// Whether a node has to do with it: has a VM, gets one, had one, or has ports that lead to one.
    #[must_use]
    pub fn is_on(&self, node: NodeNumber) -> bool {
        self.ports
            .iter()
            .any(|port| port.has_tap(node) || port.left == Some(node) || !port.publish.is_empty())
    }

    /// What its VMs' names end with.
    #[must_use]
    pub fn domain(&self) -> String {
        format!("{}.internal", self.name)
    }
}

impl Port {
    /// Whether a node has a tap for it.
    #[must_use]
    pub fn has_tap(&self, node: NodeNumber) -> bool {
        self.node == node || self.arriving == Some(node)
    }
}
