//! Any records, and any kernel before: after the plan the kernel is as wanted, and each step was possible.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

use super::{moved, plan};
use crate::key::PublicKey;
use crate::names;
use crate::state::{BridgePort, Detour, FLOOD, Kind, Link, Peer, State, Step, detour_table};
use crate::target::target;
use crate::wanted::{Mac, Network, NodeNumber, NodePeer, Port, Protocol, Published, Wanted};

fn node(number: u16) -> NodeNumber {
    number.try_into().unwrap()
}

prop_compose! {
    /// VM `index` of network `network`, on any of the first four nodes.
    fn port(network: u8, index: u8)(
        on in 1u16..5,
        arriving in proptest::option::of(1u16..5),
        left in proptest::option::of(1u16..5),
        published in proptest::option::of(1u16..100),
    ) -> Port {
        let publish = published.map(|to| Published {
            protocol: Protocol::Tcp,
            port: 1000 + u16::from(network) * 100 + u16::from(index),
            to,
        });
        Port {
            name: format!("vm{index}"),
            mac: Mac([2, 0, 0, 0, network, index]),
            address: Ipv4Addr::new(10, network, 0, 10 + index),
            node: node(on),
            arriving: arriving.map(node),
            left: left.map(node),
            publish: publish.into_iter().collect(),
        }
    }
}

fn network(number: u8) -> impl Strategy<Value = Network> {
    let ports: Vec<_> = (0..4).map(|index| port(number, index)).collect();
    (ports, 0usize..5).prop_map(move |(mut ports, keep)| {
        ports.truncate(keep);
        Network {
            name: format!("net{number}"),
            vni: (u16::from(number) + 1).try_into().unwrap(),
            subnet: Ipv4Net::new_assert(Ipv4Addr::new(10, number, 0, 0), 24),
            ports,
        }
    })
}

/// Records of one of four nodes.
fn wanted() -> impl Strategy<Value = Wanted> {
    let networks: Vec<_> = (0..3).map(network).collect();
    (1u16..5, networks, 0usize..4, 1u8..3, 1300u16..1600).prop_map(
        |(own, mut networks, keep, keys, mtu)| {
            networks.truncate(keep);
            let mut wanted = Wanted::new(node(own));
            wanted.underlay_mtu = mtu;
            wanted.networks = networks;
            wanted.peers = (1..5)
                .filter(|number| *number != own)
                .map(|number| NodePeer {
                    node: node(number),
                    public_key: PublicKey([number.to_be_bytes()[1] * keys; 32]),
                    endpoint: (number % 2 == 0)
                        .then(|| (Ipv4Addr::new(192, 0, 2, 1), 51820 + number).into()),
                })
                .collect();
            wanted
        },
    )
}

/// What somebody has done to a kernel that was in order.
#[derive(Clone, Debug)]
enum Damage {
    Delete(prop::sample::Index),
    Down(prop::sample::Index),
    Leave(prop::sample::Index),
    Flags(prop::sample::Index),
    Mtu(prop::sample::Index),
    OtherKind(prop::sample::Index),
    NoTunnel(prop::sample::Index),
    NoForward(prop::sample::Index),
    Strange(prop::sample::Index),
    Settings,
    Peers,
    Routes,
}

fn damage() -> impl Strategy<Value = Damage> {
    let any = any::<prop::sample::Index>;
    prop_oneof![
        any().prop_map(Damage::Delete),
        any().prop_map(Damage::Down),
        any().prop_map(Damage::Leave),
        any().prop_map(Damage::Flags),
        any().prop_map(Damage::Mtu),
        any().prop_map(Damage::OtherKind),
        any().prop_map(Damage::NoTunnel),
        any().prop_map(Damage::NoForward),
        any().prop_map(Damage::Strange),
        Just(Damage::Settings),
        Just(Damage::Peers),
        Just(Damage::Routes),
    ]
}

fn harm(state: &mut State, damage: &Damage) {
    let link = |state: &State, index: &prop::sample::Index| {
        let names: Vec<String> = state.links.keys().cloned().collect();
        (!names.is_empty()).then(|| index.get(&names).clone())
    };
    let change = |state: &mut State, index, change: fn(&mut Link)| {
        if let Some(name) = link(state, index) {
            change(state.links.get_mut(&name).unwrap());
        }
    };
    match damage {
        Damage::Delete(index) => {
            if let Some(name) = link(state, index) {
                state.after(&Step::Delete(name));
            }
        }
        Damage::Leave(index) => {
            if let Some(name) = link(state, index) {
                state.after(&Step::Join(name, None));
            }
        }
        Damage::Down(index) => change(state, index, |link| link.up = false),
        Damage::Mtu(index) => change(state, index, |link| link.mtu = 99),
        Damage::Flags(index) => change(state, index, |link| {
            if let Some(port) = &mut link.port {
                port.learning = true;
            }
        }),
        Damage::OtherKind(index) => change(state, index, |link| {
            // A pair stays one: its other end would be somebody else's.
            if !matches!(link.kind, Kind::Veth { .. }) {
                link.kind = Kind::Other("x".into());
            }
        }),
        Damage::NoTunnel(index) => {
            let all: Vec<_> = state.tunnels.iter().cloned().collect();
            if !all.is_empty() {
                state.tunnels.remove(index.get(&all));
            }
        }
        Damage::NoForward(index) => {
            let all: Vec<_> = state.forwards.keys().cloned().collect();
            if !all.is_empty() {
                state.forwards.remove(index.get(&all));
            }
        }
        Damage::Strange(index) => {
            let Some(name) = link(state, index) else {
                return;
            };
            let strange = Mac([2, 9, 9, 9, 9, 9]);
            let ip = Ipv4Addr::new(10, 99, 0, 1);
            state
                .addresses
                .insert((name.clone(), Ipv4Net::new_assert(ip, 24)));
            state.neighbours.insert((name.clone(), ip), strange);
            match state.links[&name].kind {
                Kind::Vxlan { .. } => {
                    state.tunnels.insert((name.clone(), strange, ip));
                    state.tunnels.insert((name, FLOOD, ip));
                }
                Kind::Bridge => {
                    let port =
                        |link: &Link| link.port.as_ref().is_some_and(|port| port.bridge == name);
                    let at = state.links.iter().find(|(_, link)| port(link));
                    if let Some(at) = at.map(|(at, _)| at.clone()) {
                        state.forwards.insert((name, strange), at);
                    }
                }
                _ => {}
            }
        }
        Damage::Settings => state.settings.clear(),
        Damage::Peers => {
            let stranger = Peer {
                endpoint: None,
                allowed: Default::default(),
            };
            state.wireguard.peers.insert(PublicKey([77; 32]), stranger);
            state.wireguard.port = 1;
        }
        Damage::Routes => {
            let table = detour_table(9.try_into().unwrap(), node(9));
            let detour = Detour {
                device: names::WIREGUARD.into(),
                via: Ipv4Addr::LOCALHOST,
            };
            if state.links.contains_key(names::WIREGUARD) {
                state.detours.insert(table, detour);
            }
            state.rules.insert((table, "scb9".into()));
        }
    }
}

/// What a kernel would refuse.
fn possible(is: &State, step: &Step) -> bool {
    let there = |name: &String| is.links.contains_key(name);
    let port_of = |name: &String, bridge: &String| {
        let port = is.links.get(name).and_then(|link| link.port.as_ref());
        port.is_some_and(|port| port.bridge == *bridge)
    };
    let vxlan = |name: &String| {
        matches!(
            is.links.get(name).map(|link| &link.kind),
            Some(Kind::Vxlan { .. })
        )
    };
    match step {
        Step::Create(name, kind, _) => {
            let peer = match kind {
                Kind::Veth { peer } => is.links.contains_key(peer),
                Kind::Other(_) => true,
                _ => false,
            };
            !there(name) && !peer
        }
        Step::Delete(name)
        | Step::Mac(name, _)
        | Step::Mtu(name, _)
        | Step::Up(name, _)
        | Step::Join(name, None)
        | Step::Address(name, _)
        | Step::Neighbour(name, ..) => there(name),
        Step::Join(name, Some(bridge)) => {
            let kind = is.links.get(bridge).map(|link| &link.kind);
            there(name) && kind == Some(&Kind::Bridge)
        }
        Step::PortFlags(name, BridgePort { bridge, .. }) => port_of(name, bridge),
        Step::Set(path, _) => match path.split('/').nth(2) {
            Some(name) => there(&name.to_owned()),
            None => true,
        },
        Step::Keys(..) | Step::Peer(..) => there(&names::WIREGUARD.to_owned()),
        Step::NoPeer(key) => is.wireguard.peers.contains_key(key),
        Step::NoAddress(name, net) => is.addresses.contains(&(name.clone(), *net)),
        Step::Tunnel(name, mac, to) => {
            let twice = *mac == FLOOD && is.tunnels.contains(&(name.clone(), *mac, *to));
            vxlan(name) && !twice
        }
        Step::NoTunnel(name, mac, to) => is.tunnels.contains(&(name.clone(), *mac, *to)),
        Step::Forward(bridge, _, port) => port_of(port, bridge),
        Step::NoForward(bridge, mac, _) => is.forwards.contains_key(&(bridge.clone(), *mac)),
        Step::NoNeighbour(name, ip) => is.neighbours.contains_key(&(name.clone(), *ip)),
        Step::Detour(table, detour) => there(&detour.device) && !is.detours.contains_key(table),
        Step::NoDetour(table, _) => is.detours.contains_key(table),
        Step::Rule(mark, name) => !is.rules.contains(&(*mark, name.clone())),
        Step::NoRule(mark, name) => is.rules.contains(&(*mark, name.clone())),
    }
}

fn key() -> PublicKey {
    PublicKey([200; 32])
}

/// Goes from one to the other, and looks at each step.
fn go(is: &mut State, wanted: &State) -> Vec<Step> {
    let steps = plan(is, wanted);
    for step in &steps {
        assert!(possible(is, step), "{step} is not possible in {is:?}");
        is.after(step);
    }
    steps
}

/// As wanted, but for what is left to be any.
fn same(is: &State, wanted: &State) {
    let fixed = |state: &State| {
        let mut state = state.clone();
        for (name, link) in &mut state.links {
            if wanted.links.get(name).is_none_or(|want| want.mac.is_none()) {
                link.mac = None;
            }
        }
        // Settings that nobody wants stay as they are.
        state
            .settings
            .retain(|path, _| wanted.settings.contains_key(path));
        for (key, peer) in &mut state.wireguard.peers {
            if wanted
                .wireguard
                .peers
                .get(key)
                .is_none_or(|want| want.endpoint.is_none())
            {
                peer.endpoint = None;
            }
        }
        state
    };
    assert_eq!(fixed(is), fixed(wanted));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn any_kernel_becomes_as_wanted(
        before in wanted(),
        damages in vec(damage(), 0..6),
        wanted in wanted(),
    ) {
        for record in [&before, &wanted] {
            prop_assert!(record.check().is_ok(), "{:?}", record.check());
        }
        let (before, wanted) = (target(&before, key()), target(&wanted, key()));
        let mut is = State::default();
        go(&mut is, &before);
        same(&is, &before);
        for damage in &damages {
            harm(&mut is, damage);
        }
        go(&mut is, &wanted);
        same(&is, &wanted);
        prop_assert_eq!(go(&mut is, &wanted), vec![]);
        go(&mut is, &State::default());
        prop_assert_eq!(&is.links, &Default::default());
        prop_assert!(is.rules.is_empty() && is.detours.is_empty() && is.forwards.is_empty());
    }

    /// The quick way leads where the long one does, as far as frames go.
    #[test]
    fn a_move_is_what_the_new_record_says(
        mut wanted in wanted(),
        network in any::<prop::sample::Index>(),
        vm in any::<prop::sample::Index>(),
        to in 1u16..5,
    ) {
        prop_assume!(wanted.networks.iter().any(|network| !network.ports.is_empty()));
        wanted.networks.retain(|network| !network.ports.is_empty());
        let network = network.index(wanted.networks.len());
        let ports = &mut wanted.networks[network].ports;
        let port = vm.get(ports).mac;
        // The destination has a tap first.
        for vm in ports.iter_mut().filter(|vm| vm.mac == port) {
            vm.arriving = Some(node(to));
        }
        let mut is = State::default();
        go(&mut is, &target(&wanted, key()));
        prop_assert!(wanted.moved(port, node(to)));
        for step in moved(&wanted, &wanted.networks[network], port) {
            prop_assert!(possible(&is, &step), "{step}");
            is.after(&step);
        }
        let then = target(&wanted, key());
        let mac = |entry: &(&(String, Mac), &String)| entry.0.1 == port;
        // A node that has nothing more to do with the network may keep an entry until the next `apply`.
        if wanted.networks[network].is_on(wanted.node) {
            prop_assert_eq!(
                is.forwards.iter().find(mac),
                then.forwards.iter().find(mac)
            );
        }
        let left: Vec<_> = plan(&is, &then);
        prop_assert!(!left.iter().any(|step| matches!(step, Step::Forward(_, mac, _) if *mac == port)));
    }

    /// Every node sends what is for all to every other that is in the network, and to no other.
    #[test]
    fn nodes_agree(wanted in wanted(), others in btree_set(1u16..5, 2)) {
        let mut numbers = others.into_iter().map(node);
        let (one, two) = (numbers.next().unwrap(), numbers.next().unwrap());
        let view = |own: NodeNumber| {
            let mut view = wanted.clone();
            view.node = own;
            view.peers = (1..5).filter(|number| *number != own.get()).map(|number| NodePeer {
                node: node(number),
                public_key: PublicKey([number.to_be_bytes()[1]; 32]),
                endpoint: None,
            }).collect();
            target(&view, key())
        };
        let (first, second) = (view(one), view(two));
        for network in &wanted.networks {
            let device = names::vxlan(network.vni);
            let floods = |state: &State, to| {
                state.tunnels.contains(&(device.clone(), FLOOD, wanted.fabric_address(to)))
            };
            let both = network.is_on(one) && network.is_on(two);
            prop_assert_eq!(floods(&first, two), both);
            prop_assert_eq!(floods(&second, one), both);
        }
    }
}
