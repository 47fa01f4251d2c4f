//! What the kernel of one node is to have.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::key::PublicKey;
use crate::names;
use crate::state::{BridgePort, Detour, FLOOD, Kind, Link, Peer, State, WireGuard, detour_table};
use crate::wanted::{Network, Wanted};

/// All of it; `key` is the node's own.
pub fn target(wanted: &Wanted, key: PublicKey) -> State {
    let mut state = State {
        wireguard: WireGuard {
            key: Some(key),
            port: wanted.listen_port,
            peers: Default::default(),
        },
        ..State::default()
    };
    state.links.insert(
        names::WIREGUARD.into(),
        Link {
            kind: Kind::WireGuard,
            mac: None,
            mtu: wanted.fabric_mtu().into(),
            port: None,
            up: true,
        },
    );
    let own = wanted.fabric_address(wanted.node);
    let prefix = wanted.fabric.prefix_len();
    state
        .addresses
        .insert((names::WIREGUARD.into(), Ipv4Net::new_assert(own, prefix)));
    for peer in &wanted.peers {
        let address = wanted.fabric_address(peer.node);
        state.wireguard.peers.insert(
            peer.public_key,
            Peer {
                endpoint: peer.endpoint,
                allowed: [alone(address)].into(),
            },
        );
    }
    state
        .settings
        .insert("ipv6/conf/scwg0/disable_ipv6".into(), "1".into());
    for network in &wanted.networks {
        if network.is_on(wanted.node) {
            add(&mut state, wanted, network);
        }
    }
    if wanted
        .networks
        .iter()
        .any(|network| network.is_on(wanted.node))
    {
        state.settings.insert("ipv4/ip_forward".into(), "1".into());
    }
    state
}

fn alone(address: Ipv4Addr) -> Ipv4Net {
    Ipv4Net::new_assert(address, 32)
}

fn add(state: &mut State, wanted: &Wanted, network: &Network) {
    let vni = network.vni;
    let (bridge, vxlan) = (names::bridge(vni), names::vxlan(vni));
    let (router, router_port) = (names::router(vni), names::router_port(vni));
    let mtu = wanted.guest_mtu().into();
    let port = |suppress| {
        Some(BridgePort {
            bridge: bridge.clone(),
            learning: false,
            flood: false,
            suppress,
        })
    };
    let mut link = |name: &str, kind, mac, port| {
        let link = Link {
            kind,
            mac,
            mtu,
            port,
            up: true,
        };
        state.links.insert(name.into(), link);
    };
    link(&bridge, Kind::Bridge, Some(names::GATEWAY), None);
    let over = Kind::Vxlan {
        vni: vni.get(),
        local: wanted.fabric_address(wanted.node),
        port: names::VXLAN_PORT,
    };
    link(&vxlan, over, None, port(true));
    let pair = |peer: &str| Kind::Veth { peer: peer.into() };
    let own_mac = names::router_mac(wanted.node);
    link(&router, pair(&router_port), Some(own_mac), None);
    link(&router_port, pair(&router), None, port(false));
    for vm in network.ports.iter().filter(|vm| vm.has_tap(wanted.node)) {
        link(&names::tap(vm.mac), Kind::Tap, None, port(false));
    }

    let gateway = Ipv4Net::new_assert(network.gateway(), network.subnet.prefix_len());
    state.addresses.insert((bridge.clone(), gateway));
    let mut set = |path: String, value: &str| {
        state.settings.insert(path, value.into());
    };
    // Networks are of IPv4, and their ports have no addresses at all.
    let taps = network.ports.iter().filter(|vm| vm.has_tap(wanted.node));
    let devices = [&bridge, &vxlan, &router, &router_port].map(Clone::clone);
    for device in devices.into_iter().chain(taps.map(|vm| names::tap(vm.mac))) {
        set(format!("ipv6/conf/{device}/disable_ipv6"), "1");
    }
    // The bridge answers for the gateway only: the node's own address is behind another MAC.
    set(format!("ipv4/conf/{bridge}/arp_ignore"), "1");
    // What comes to the node's own end comes from addresses that are reached by the bridge.
    set(format!("ipv4/conf/{router}/rp_filter"), "2");

    for node in wanted.nodes().filter(|node| network.is_on(*node)) {
        let Some(address) = network.router(node) else {
            continue; // Checked.
        };
        let mac = names::router_mac(node);
        state.neighbours.insert((bridge.clone(), address), mac);
        if node == wanted.node {
            state.addresses.insert((router.clone(), alone(address)));
            state
                .forwards
                .insert((bridge.clone(), mac), router_port.clone());
            continue;
        }
        let there = wanted.fabric_address(node);
        state.tunnels.insert((vxlan.clone(), FLOOD, there));
        state.tunnels.insert((vxlan.clone(), mac, there));
        state.forwards.insert((bridge.clone(), mac), vxlan.clone());
        let table = detour_table(vni, node);
        let detour = Detour {
            device: bridge.clone(),
            via: address,
        };
        state.detours.insert(table, detour);
        for device in [&bridge, &router] {
            state.rules.insert((table, device.clone()));
        }
    }
    for vm in &network.ports {
        let at = match vm.node == wanted.node {
            true => names::tap(vm.mac),
            false => {
                let there = wanted.fabric_address(vm.node);
                state.tunnels.insert((vxlan.clone(), vm.mac, there));
                vxlan.clone()
            }
        };
        state.forwards.insert((bridge.clone(), vm.mac), at);
        state
            .neighbours
            .insert((bridge.clone(), vm.address), vm.mac);
    }
}
