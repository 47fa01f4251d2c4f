//! What is wanted comes from other nodes and from users: all of it is looked at before any of it is done.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::error::Invalid;
use crate::names::{UNDERLAY_MTU_MIN, VXLAN_PORT};
use crate::wanted::{Mac, Network, NodeNumber, Port, Wanted};

/// Most nodes.
const NODES: usize = 1024;
/// Most networks.
const NETWORKS: usize = 256;
/// Most VMs in all networks.
const PORTS: usize = 16 * 1024;
/// Most published ports of one VM.
const PUBLISHED: usize = 256;

impl Wanted {
    /// Looks whether it can be.
    ///
    /// # Errors
    /// The first thing that cannot.
    pub fn check(&self) -> Result<(), Invalid> {
        let ports = self
            .networks
            .iter()
            .map(|network| network.ports.len())
            .sum();
        bounded("nodes", self.peers.len(), NODES)?;
        bounded("networks", self.networks.len(), NETWORKS)?;
        bounded("VMs", ports, PORTS)?;
        if self.underlay_mtu < UNDERLAY_MTU_MIN {
            return Err(Invalid::Mtu {
                is: self.underlay_mtu,
            });
        }
        if self.listen_port == 0 {
            return Err(Invalid::ListenPort);
        }
        self.check_nodes()?;
        let mut once = Once::default();
        for (index, network) in self.networks.iter().enumerate() {
            for other in &self.networks[..index] {
                if network.vni == other.vni {
                    let (one, two) = (other.name.clone(), network.name.clone());
                    return Err(Invalid::SameVni(one, two, network.vni));
                }
                apart(network.subnet, other.subnet)?;
            }
            once.see(format!("the network {}", network.name))?;
            self.check_network(network, &mut once)?;
        }
        Ok(())
    }

    fn check_nodes(&self) -> Result<(), Invalid> {
        let mut once = Once::default();
        if self.fabric.trunc() != self.fabric || self.fabric.prefix_len() < 8 {
            return Err(Invalid::Fabric {
                fabric: self.fabric,
                node: self.node,
            });
        }
        for node in self.nodes() {
            let address = self.fabric_address(node);
            if !self.fabric.contains(&address) || address == self.fabric.broadcast() {
                return Err(Invalid::Fabric {
                    fabric: self.fabric,
                    node,
                });
            }
        }
        for peer in &self.peers {
            if peer.node == self.node {
                return Err(Invalid::OwnPeer(peer.node));
            }
            once.see(format!("node {}", peer.node))?;
            once.see(format!("the key {}", peer.public_key))?;
        }
        Ok(())
    }

    fn check_network(&self, network: &Network, once: &mut Once) -> Result<(), Invalid> {
        label(&network.name)?;
        let subnet = network.subnet;
        let private = |at: Ipv4Addr| {
            at.is_private() || Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 10).contains(&at)
        };
        if subnet.trunc() != subnet
            || !(8..=26).contains(&subnet.prefix_len())
            || !private(subnet.network())
            || !private(subnet.broadcast())
        {
            return Err(Invalid::Subnet(subnet));
        }
        apart(subnet, self.fabric)?;
        for node in self.nodes() {
            if network.router(node).is_none() {
                return Err(Invalid::NoRouter {
                    subnet,
                    node,
                    network: network.name.clone(),
                });
            }
        }
        for port in &network.ports {
            self.check_port(network, port, once)?;
        }
        Ok(())
    }

    fn check_port(&self, network: &Network, port: &Port, once: &mut Once) -> Result<(), Invalid> {
        label(&port.name)?;
        let vm = || port.name.clone();
        if !may_be_a_vms(port.mac) {
            return Err(Invalid::VmMac {
                vm: vm(),
                mac: port.mac,
            });
        }
        if !network.is_for_vms(port.address) {
            return Err(Invalid::Address {
                vm: vm(),
                address: port.address,
                subnet: network.subnet,
            });
        }
        // A node that was left may be gone: then so are the connections through it.
        for node in [Some(port.node), port.arriving].into_iter().flatten() {
            if self.nodes().all(|known| known != node) {
                return Err(Invalid::UnknownNode { vm: vm(), node });
            }
        }
        once.see(format!("{}.{}", port.name, network.name))?;
        once.see(format!("the MAC {}", port.mac))?;
        once.see(format!("the address {}", port.address))?;
        bounded("published ports of one VM", port.publish.len(), PUBLISHED)?;
        for published in &port.publish {
            if [VXLAN_PORT, self.listen_port].contains(&published.port) {
                return Err(Invalid::OwnPort(*published));
            }
            once.see(format!(
                "the published port {}/{}",
                published.port, published.protocol
            ))?;
        }
        Ok(())
    }

    /// This node and its peers.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = NodeNumber> + '_ {
        std::iter::once(self.node).chain(self.peers.iter().map(|peer| peer.node))
    }
}

#[derive(Default)]
struct Once(BTreeSet<String>);

impl Once {
    fn see(&mut self, what: String) -> Result<(), Invalid> {
        match self.0.insert(what.clone()) {
            true => Ok(()),
            false => Err(Invalid::Twice { what }),
        }
    }
}

fn bounded(what: &'static str, is: usize, limit: usize) -> Result<(), Invalid> {
    if is > limit {
        return Err(Invalid::TooMany { what, is, limit });
    }
    Ok(())
}

fn apart(one: Ipv4Net, two: Ipv4Net) -> Result<(), Invalid> {
    if one.contains(&two) || two.contains(&one) {
        return Err(Invalid::Overlap(two, one));
    }
    Ok(())
}

/// A label of a domain name (RFC 1123, section 2.1), in small letters.
fn label(name: &str) -> Result<(), Invalid> {
    let good = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
    if (1..=63).contains(&name.len())
        && name.bytes().all(good)
        && !name.starts_with('-')
        && !name.ends_with('-')
    {
        return Ok(());
    }
    Err(Invalid::Name(name.chars().take(64).collect()))
}

/// One machine's own address, and none that nodes have.
fn may_be_a_vms(mac: Mac) -> bool {
    mac.0[0] & 1 == 0 && mac.0 != [0; 6] && mac.0[..4] != [0x02, 0x53, 0x43, 0]
}

#[cfg(test)]
mod tests;
