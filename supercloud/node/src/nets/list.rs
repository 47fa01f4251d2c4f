//! The list of networks: what changes it, and what a node makes of it. Knows no machine.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};

use supercloud_api::{
    Code, Error, Net, NetAddress, NetMoved, NetNode, NetPort, Nets, NewNet, NewNetAddress,
};
use supercloud_network::{
    Invalid, Network, NodeNumber, NodePeer, Port, PublicKey, Published, Wanted,
};

use super::Entry;

fn wrong(error: &Invalid) -> Error {
    Error::new(Code::BadRequest, error.to_string(), "")
}

fn no_net(name: &str) -> Error {
    Error::not_found(
        format!("there is no network {name}"),
        format!("make it: supercloud net create {name}"),
    )
}

/// A network that has this address among its own: who is there could not be reached through it.
///
/// # Errors
/// The list is none.
pub fn covering(nets: &Nets, ip: IpAddr) -> Result<Option<&Net>, Error> {
    let IpAddr::V4(ip) = ip else {
        return Ok(None);
    };
    for net in &nets.nets {
        if network(net, &HashMap::new())?.subnet.contains(&ip) {
            return Ok(Some(net));
        }
    }
    Ok(None)
}

/// Makes a network, or finds the same one. It has no address that a node is `reached` at.
pub fn make(
    nets: &mut Nets,
    name: &str,
    wanted: &NewNet,
    reached: &HashMap<String, IpAddr>,
) -> Result<Net, Error> {
    if let Some(present) = nets.nets.iter().find(|net| net.name == name) {
        if wanted
            .subnet
            .as_ref()
            .is_none_or(|subnet| *subnet == present.subnet)
        {
            return Ok(present.clone());
        }
        return Err(Error::new(
            Code::Conflict,
            format!("there is a network {name} already, with {}", present.subnet),
            format!("choose another name, or remove it: supercloud net rm {name}"),
        ));
    }
    if matches!(name, "user" | "tap") {
        return Err(Error::new(
            Code::BadRequest,
            format!("{name} is what `vm run --net` has for other networks"),
            "choose another name",
        ));
    }
    let taken: BTreeSet<u16> = nets.nets.iter().map(|net| net.vni).collect();
    let vni = (1..u16::MAX).find(|vni| !taken.contains(vni));
    let vni = vni.ok_or_else(|| Error::failed("there are too many networks"))?;
    let tries: Vec<String> = match &wanted.subnet {
        Some(subnet) => vec![subnet.clone()],
        None => (64..128)
            .map(|second| format!("10.{second}.0.0/16"))
            .collect(),
    };
    let mut last = Error::failed("no addresses are free; give a --subnet");
    for subnet in tries {
        let mut then = nets.clone();
        then.nets.push(Net {
            name: name.into(),
            vni,
            subnet,
            ports: Vec::new(),
        });
        match check(&then).and_then(|()| apart(&then, reached)) {
            Ok(()) => {
                let made = then.nets.last().cloned();
                *nets = then;
                return made.ok_or(last);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn apart(nets: &Nets, reached: &HashMap<String, IpAddr>) -> Result<(), Error> {
    for (node, &ip) in reached {
        if let Some(net) = covering(nets, ip)? {
            return Err(Error::new(
                Code::BadRequest,
                format!("{} has the address {ip} of the node {node}", net.subnet),
                "choose another --subnet, apart from the network that the nodes are in",
            ));
        }
    }
    Ok(())
}

/// Removes a network that has no VMs.
pub fn remove(nets: &mut Nets, name: &str) -> Result<(), Error> {
    let vms = nets.nets.iter().filter(|net| net.name == name);
    let vms: Vec<&str> = vms
        .flat_map(|net| &net.ports)
        .map(|port| port.vm.as_str())
        .collect();
    if !vms.is_empty() {
        return Err(Error::new(
            Code::Conflict,
            format!("the network {name} has the VMs {}", vms.join(", ")),
            "remove them first: supercloud vm rm NAME",
        ));
    }
    nets.nets.retain(|net| net.name != name);
    Ok(())
}

/// Gives a VM an address, or notes where it is.
pub fn place(nets: &mut Nets, name: &str, mac: &str, wanted: &NewNetAddress) -> Result<Net, Error> {
    let mut then = nets.clone();
    let net = then.nets.iter_mut().find(|net| net.name == name);
    let net = net.ok_or_else(|| no_net(name))?;
    match net.ports.iter_mut().find(|port| port.mac == mac) {
        // What was heard late is not news.
        Some(port) if wanted.moves <= port.moves => {}
        Some(port) => {
            port.left = Some(std::mem::replace(&mut port.node, wanted.node.clone()));
            port.moves = wanted.moves;
        }
        None => {
            let network = network(net, &HashMap::new())?;
            let taken: BTreeSet<&str> = net.ports.iter().map(|it| it.address.as_str()).collect();
            let free = network
                .free()
                .map(|address| address.to_string())
                .find(|address| !taken.contains(address.as_str()));
            let address = free.ok_or_else(|| {
                Error::new(
                    Code::Conflict,
                    format!("the network {name} has no free address"),
                    "remove VMs, or make a larger network",
                )
            })?;
            net.ports.push(NetAddress {
                vm: wanted.vm.clone(),
                mac: mac.into(),
                address,
                publish: wanted.publish.clone(),
                node: wanted.node.clone(),
                left: None,
                moves: wanted.moves,
            });
        }
    }
    let placed = net.clone();
    check(&then)?;
    *nets = then;
    Ok(placed)
}

/// Takes a VM's address back.
pub fn release(nets: &mut Nets, name: &str, mac: &str) {
    for net in nets.nets.iter_mut().filter(|net| net.name == name) {
        net.ports.retain(|port| port.mac != mac);
    }
}

/// Gives a node a number, or notes its new key.
pub fn number(nets: &mut Nets, wanted: &NetNode) -> Result<(), Error> {
    wanted
        .public_key
        .parse::<PublicKey>()
        .map_err(|error| wrong(&error))?;
    supercloud_api::name("a node", &wanted.node)?;
    let other = nets
        .nodes
        .iter()
        .find(|node| node.public_key == wanted.public_key && node.node != wanted.node);
    if let Some(other) = other {
        return Err(Error::new(
            Code::Conflict,
            format!("{} has the WireGuard key of {}", wanted.node, other.node),
            "a node's data is for one node: do not copy it",
        ));
    }
    if let Some(node) = nets.nodes.iter_mut().find(|node| node.node == wanted.node) {
        node.public_key.clone_from(&wanted.public_key);
        return Ok(());
    }
    let taken: BTreeSet<u16> = nets.nodes.iter().map(|node| node.number).collect();
    let number = (1..=NodeNumber::MAX).find(|number| !taken.contains(number));
    let mut then = nets.clone();
    then.nodes.push(NetNode {
        number: number.ok_or_else(|| Error::failed("there are too many nodes"))?,
        ..wanted.clone()
    });
    check(&then)?;
    *nets = then;
    Ok(())
}

/// A VM's entry, with its network.
pub fn port<'a>(nets: &'a Nets, port: &NetPort) -> Option<Entry<'a>> {
    let name = port.net.split(',').next().unwrap_or_default();
    let net = nets.nets.iter().find(|net| net.name == name)?;
    let at = net.ports.iter().find(|at| at.mac == port.mac)?;
    Some((net, at))
}

/// Whether the list does not have it yet.
pub fn is_news(nets: &Nets, moved: &NetMoved) -> bool {
    let mut ports = nets.nets.iter().flat_map(|net| &net.ports);
    ports.any(|port| port.mac == moved.mac && port.moves < moved.moves)
}

/// The list with what was heard since.
pub fn overlay<'a>(nets: &mut Nets, heard: impl Iterator<Item = &'a NetMoved>) {
    for moved in heard {
        for port in nets.nets.iter_mut().flat_map(|net| &mut net.ports) {
            if port.mac == moved.mac && port.moves < moved.moves {
                port.left = Some(std::mem::replace(&mut port.node, moved.node.clone()));
                port.moves = moved.moves;
            }
        }
    }
}

/// Looks whether the list can be, as any node would find it.
fn check(nets: &Nets) -> Result<(), Error> {
    let mut all = nets.clone();
    // Nodes that are not numbered yet are when they first make a network.
    let named = all.nets.iter().flat_map(|net| &net.ports);
    let named: BTreeSet<String> = named.map(|port| port.node.clone()).collect();
    for name in named {
        if all.nodes.iter().all(|node| node.node != name) {
            let last = all.nodes.iter().map(|node| node.number).max();
            let mut public_key = [0; 32];
            public_key[..name.len().min(32)]
                .copy_from_slice(&name.as_bytes()[..name.len().min(32)]);
            all.nodes.push(NetNode {
                node: name,
                number: last.unwrap_or(0) + 1,
                public_key: PublicKey(public_key).to_string(),
            });
        }
    }
    let Some(first) = all.nodes.first().map(|node| node.node.clone()) else {
        let mut wanted = Wanted::new(NodeNumber::FIRST);
        wanted.networks = networks(&all, &HashMap::new())?;
        return wanted.check().map_err(|error| wrong(&error));
    };
    let reached = all
        .nodes
        .iter()
        .map(|node| (node.node.clone(), IpAddr::from([192, 0, 2, 1])))
        .collect();
    wanted(&all, &first, &reached, &[])?;
    Ok(())
}

/// What the node `own` is to have. `reached` is where members are; `coming` are MACs of VMs on their way to it.
pub fn wanted(
    nets: &Nets,
    own: &str,
    reached: &HashMap<String, IpAddr>,
    coming: &[&str],
) -> Result<Wanted, Error> {
    let mut numbers = HashMap::new();
    for node in &nets.nodes {
        let number = NodeNumber::try_from(node.number).map_err(|error| wrong(&error))?;
        // A node that was removed is none.
        if node.node == own || reached.contains_key(&node.node) {
            numbers.insert(node.node.as_str(), number);
        }
    }
    let number = numbers.get(own).copied();
    let number = number.ok_or_else(|| Error::failed("this node has no number in networks yet"))?;
    let mut wanted = Wanted::new(number);
    for node in nets.nodes.iter().filter(|node| node.node != own) {
        let (Some(number), Some(ip)) = (numbers.get(node.node.as_str()), reached.get(&node.node))
        else {
            continue;
        };
        wanted.peers.push(NodePeer {
            node: *number,
            public_key: node.public_key.parse().map_err(|error| wrong(&error))?,
            endpoint: Some(SocketAddr::new(*ip, wanted.listen_port)),
        });
    }
    wanted.networks = networks(nets, &numbers)?;
    for port in wanted
        .networks
        .iter_mut()
        .flat_map(|network| &mut network.ports)
    {
        if coming.contains(&port.mac.to_string().as_str()) && port.node != number {
            port.arriving = Some(number);
        }
    }
    wanted.check().map_err(|error| wrong(&error))?;
    Ok(wanted)
}

fn networks(nets: &Nets, numbers: &HashMap<&str, NodeNumber>) -> Result<Vec<Network>, Error> {
    nets.nets.iter().map(|net| network(net, numbers)).collect()
}

/// A network, with the VMs that are on nodes that are known.
fn network(net: &Net, numbers: &HashMap<&str, NodeNumber>) -> Result<Network, Error> {
    let mut ports = Vec::new();
    for port in &net.ports {
        let Some(node) = numbers.get(port.node.as_str()) else {
            continue;
        };
        let publish: Result<Vec<Published>, Invalid> =
            port.publish.iter().map(|text| text.parse()).collect();
        ports.push(Port {
            name: port.vm.clone(),
            mac: port.mac.parse().map_err(|error| wrong(&error))?,
            address: port.address.parse().map_err(|_| {
                Error::failed(format!("{} of {} is no address", port.address, port.vm))
            })?,
            node: *node,
            arriving: None,
            left: port
                .left
                .as_ref()
                .and_then(|left| numbers.get(left.as_str()).copied()),
            publish: publish.map_err(|error| wrong(&error))?,
        });
    }
    Ok(Network {
        name: net.name.clone(),
        vni: net.vni.try_into().map_err(|error: Invalid| wrong(&error))?,
        subnet: net.subnet.parse().map_err(|_| {
            Error::new(
                Code::BadRequest,
                format!("{:?} is no subnet", net.subnet),
                "one looks like 10.5.0.0/16",
            )
        })?,
        ports,
    })
}

#[cfg(test)]
mod tests;
