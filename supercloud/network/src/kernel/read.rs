//! What the kernel has of ours.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::pin::pin;

use futures_util::{Stream, StreamExt as _};
use ipnet::Ipv4Net;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{
    InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoVxlan, LinkAttribute,
    LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};
use rtnetlink::{Handle, IpVersion, RouteMessageBuilder};

use crate::error::Error;
use crate::names;
use crate::state::{BridgePort, Detour, Kind, Link, State, is_detour};
use crate::wanted::Mac;

/// What there is of ours, without settings and WireGuard's keys; and the numbers of all devices.
pub async fn read(handle: &Handle) -> Result<(State, BTreeMap<String, u32>), Error> {
    let links = all("devices", handle.link().get().execute()).await?;
    let names: BTreeMap<u32, String> = links
        .iter()
        .filter_map(|link| Some((link.header.index, name_of(link)?)))
        .collect();
    let mut state = State::default();
    for link in &links {
        let ours = names
            .get(&link.header.index)
            .filter(|name| names::is_ours(name));
        if let Some(name) = ours {
            state.links.insert(name.clone(), self::link(link, &names));
        }
    }
    let ours = |index: u32| {
        names
            .get(&index)
            .filter(|name| names::is_ours(name))
            .cloned()
    };

    for address in all("addresses", handle.address().get().execute()).await? {
        let local = address
            .attributes
            .iter()
            .find_map(|attribute| match attribute {
                AddressAttribute::Local(std::net::IpAddr::V4(local)) => Some(*local),
                _ => None,
            });
        let net = local.and_then(|at| Ipv4Net::new(at, address.header.prefix_len).ok());
        if let (Some(name), Some(net)) = (ours(address.header.index), net) {
            state.addresses.insert((name, net));
        }
    }
    let get = handle.neighbours().get();
    let bridged = get.set_address_family(AddressFamily::Bridge);
    for entry in all("forwarding entries", bridged.execute()).await? {
        forwarding(&mut state, &entry, &ours);
    }
    let get = handle.neighbours().get();
    let known = get.set_address_family(AddressFamily::Inet);
    for entry in all("neighbours", known.execute()).await? {
        if entry.header.state == NeighbourState::Permanent
            && let (Some(name), Some(mac), Some(ip)) = (
                ours(entry.header.ifindex),
                mac_of(&entry),
                destination(&entry),
            )
        {
            state.neighbours.insert((name, ip), mac);
        }
    }
    let any = RouteMessageBuilder::<Ipv4Addr>::new().build();
    for route in all("routes", handle.route().get(any).execute()).await? {
        if let Some((table, detour)) = detour(&route, &names) {
            state.detours.insert(table, detour);
        }
    }
    for rule in all(
        "rules of routing",
        handle.rule().get(IpVersion::V4).execute(),
    )
    .await?
    {
        if let Some(rule) = our_rule(&rule) {
            state.rules.insert(rule);
        }
    }
    let indices = names.into_iter().map(|(index, name)| (name, index));
    Ok((state, indices.collect()))
}

async fn all<T>(
    what: &'static str,
    items: impl Stream<Item = Result<T, rtnetlink::Error>>,
) -> Result<Vec<T>, Error> {
    let mut items = pin!(items);
    let mut found = Vec::new();
    while let Some(item) = items.next().await {
        found.push(item.map_err(|error| Error::Read {
            what,
            why: super::into_io(error).to_string(),
        })?);
    }
    Ok(found)
}

fn name_of(link: &LinkMessage) -> Option<String> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        })
}

fn link(message: &LinkMessage, names: &BTreeMap<u32, String>) -> Link {
    let mut link = Link {
        kind: Kind::Other("nothing known".into()),
        mac: None,
        mtu: 0,
        port: None,
        up: message.header.flags.contains(LinkFlags::Up),
    };
    let (mut peer, mut elsewhere) = (None, false);
    let (mut bridge, mut infos) = (None, [].as_slice());
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().ok().map(Mac),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Link(index) => peer = names.get(index),
            // Then the peer's number is one of another namespace's.
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            LinkAttribute::Controller(index) => bridge = names.get(index),
            LinkAttribute::LinkInfo(all) => infos = all,
            _ => {}
        }
    }
    let kind = infos.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    });
    let data = infos.iter().find_map(|info| match info {
        LinkInfo::Data(data) => Some(data),
        _ => None,
    });
    link.kind = match (kind, data) {
        (Some(InfoKind::Wireguard), _) => Kind::WireGuard,
        (Some(InfoKind::Bridge), Some(InfoData::Bridge(infos)))
            if !infos.contains(&InfoBridge::MulticastSnooping(true)) =>
        {
            Kind::Bridge
        }
        (Some(InfoKind::Veth), _) => match peer.filter(|_| !elsewhere) {
            Some(peer) => Kind::Veth { peer: peer.clone() },
            None => Kind::Other("veth whose peer is elsewhere".into()),
        },
        (Some(InfoKind::Vxlan), Some(InfoData::Vxlan(infos))) => vxlan(infos),
        (Some(InfoKind::Tun), Some(data)) => tap(data),
        (kind, _) => Kind::Other(format!("{kind:?}")),
    };
    let flags = infos.iter().find_map(|info| match info {
        LinkInfo::PortData(InfoPortData::BridgePort(flags)) => Some(flags),
        _ => None,
    });
    link.port = bridge.map(|bridge| {
        let has = |flag| flags.is_some_and(|flags| flags.contains(&flag));
        BridgePort {
            bridge: bridge.clone(),
            learning: has(InfoBridgePort::Learning(true)),
            flood: has(InfoBridgePort::UnicastFlood(true)),
            suppress: has(InfoBridgePort::NeighSupress(true)),
        }
    });
    link
}

fn vxlan(infos: &[InfoVxlan]) -> Kind {
    let (mut vni, mut local, mut port) = (0, None, 0);
    for info in infos {
        match info {
            InfoVxlan::Id(id) => vni = *id,
            InfoVxlan::Local(address) => local = Some(*address),
            InfoVxlan::Port(number) => port = *number,
            InfoVxlan::Learning(true) => return Kind::Other("VXLAN that learns".into()),
            _ => {}
        }
    }
    match (u16::try_from(vni), local) {
        (Ok(vni), Some(local)) => Kind::Vxlan { vni, local, port },
        _ => Kind::Other("another VXLAN".into()),
    }
}

/// `IFLA_TUN_*` of `linux/if_link.h`.
fn tap(data: &InfoData) -> Kind {
    use netlink_packet_core::{Emitable as _, NlasIterator};
    const TYPE: (u16, u8) = (3, 2); // IFF_TAP
    const PERSIST: (u16, u8) = (6, 1);
    const MULTI_QUEUE: (u16, u8) = (7, 1);
    let InfoData::Tun(infos) = data else {
        return Kind::Other("tun".into());
    };
    let mut bytes = vec![0; infos.as_slice().buffer_len()];
    infos.as_slice().emit(&mut bytes);
    let has = |(kind, value): (u16, u8)| {
        NlasIterator::new(bytes.as_slice())
            .flatten()
            .any(|nla| nla.kind() == kind && nla.value() == [value])
    };
    match [TYPE, PERSIST, MULTI_QUEUE].into_iter().all(has) {
        true => Kind::Tap,
        false => Kind::Other("another tap".into()),
    }
}

fn mac_of(entry: &NeighbourMessage) -> Option<Mac> {
    entry
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                bytes.as_slice().try_into().ok().map(Mac)
            }
            _ => None,
        })
}

fn destination(entry: &NeighbourMessage) -> Option<Ipv4Addr> {
    entry
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(*ip),
            // Of a bridge's entry: the message does not say what kind of address it is.
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                <[u8; 4]>::try_from(bytes.as_slice())
                    .ok()
                    .map(Ipv4Addr::from)
            }
            _ => None,
        })
}

fn forwarding(state: &mut State, entry: &NeighbourMessage, ours: &impl Fn(u32) -> Option<String>) {
    let (Some(name), Some(mac)) = (ours(entry.header.ifindex), mac_of(entry)) else {
        return;
    };
    let bridge = entry
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            NeighbourAttribute::Controller(index) => ours(*index),
            _ => None,
        });
    let kind = state.links.get(&name).map(|link| &link.kind);
    match bridge {
        // Those of its ports' own addresses are `Permanent`, and the bridge's business.
        Some(bridge) if entry.header.state != NeighbourState::Permanent => {
            state.forwards.insert((bridge, mac), name);
        }
        None if matches!(kind, Some(Kind::Vxlan { .. }))
            && entry.header.flags.contains(NeighbourFlags::Own) =>
        {
            if let Some(to) = destination(entry) {
                state.tunnels.insert((name, mac, to));
            }
        }
        _ => {}
    }
}

fn detour(route: &RouteMessage, names: &BTreeMap<u32, String>) -> Option<(u32, Detour)> {
    let (mut table, mut via, mut device) = (u32::from(route.header.table), None, None);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Gateway(RouteAddress::Inet(ip)) => via = Some(*ip),
            RouteAttribute::Oif(index) => device = names.get(index).cloned(),
            _ => {}
        }
    }
    let detour = Detour {
        device: device?,
        via: via?,
    };
    is_detour(table).then_some((table, detour))
}

fn our_rule(rule: &RuleMessage) -> Option<(u32, String)> {
    let (mut mark, mut name, mut table) = (None, None, None);
    for attribute in &rule.attributes {
        match attribute {
            RuleAttribute::FwMark(number) => mark = Some(*number),
            RuleAttribute::Iifname(device) => name = Some(device.clone()),
            RuleAttribute::Table(number) => table = Some(*number),
            _ => {}
        }
    }
    let (mark, name) = (mark?, name?);
    (table == Some(mark) && is_detour(mark) && names::is_ours(&name)).then_some((mark, name))
}
