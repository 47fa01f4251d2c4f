//! The kernel: what it has of ours, and one step at a time. Thin; what to do is worked out in `plan`.

mod read;
mod settings;
mod tap;
#[cfg(test)]
mod tests;
mod wireguard;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::pin::pin;

use futures_util::{Stream, StreamExt as _};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkMessage;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use rtnetlink::{
    Handle, LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan,
    RouteMessageBuilder,
};

use crate::error::Error;
use crate::key::PrivateKey;
use crate::names;
use crate::state::{FLOOD, Kind, State, Step};
use crate::wanted::Mac;

/// Connections to it, in the network namespace of the thread that made them.
pub struct Kernel {
    route: Handle,
    wireguard: wireguard::Control,
    /// The tasks that carry the messages.
    tasks: Vec<tokio::task::JoinHandle<()>>,
    /// Numbers of devices by name; those of ours are looked up again when they are not found.
    indices: BTreeMap<String, u32>,
}

impl Drop for Kernel {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Kernel {
    /// Connects. Must be called on a tokio runtime.
    pub fn connect() -> Result<Self, Error> {
        let (connection, route, _) =
            rtnetlink::new_connection().map_err(|source| Error::Connect {
                what: "devices and routes",
                source,
            })?;
        let route_task = tokio::spawn(connection);
        let (wireguard, wireguard_task) = wireguard::Control::connect()?;
        Ok(Self {
            route,
            wireguard,
            tasks: vec![route_task, wireguard_task],
            indices: BTreeMap::new(),
        })
    }

    /// What there is of ours, and of the settings those that `wanted` has.
    pub async fn read(&mut self, wanted: &State) -> Result<State, Error> {
        let (mut state, indices) = read::read(&self.route).await?;
        self.indices = indices;
        let link = state.links.get(names::WIREGUARD);
        if link.is_some_and(|link| link.kind == Kind::WireGuard) {
            state.wireguard = self.wireguard.read(names::WIREGUARD).await?;
        }
        state.settings = settings::read(wanted.settings.keys());
        Ok(state)
    }

    /// Does one step. `key` is the node's secret, which steps do not have.
    pub async fn step(&mut self, step: &Step, key: &PrivateKey) -> Result<(), Error> {
        match self.try_step(step, key).await {
            Ok(()) => Ok(()),
            Err(error) if goes_away(step) && is_gone(&error) => Ok(()),
            Err(error) => Err(Error::Kernel {
                what: step.to_string(),
                hint: hint(step, &error),
                why: error.to_string(),
            }),
        }
    }

    async fn try_step(&mut self, step: &Step, key: &PrivateKey) -> io::Result<()> {
        match step {
            Step::Delete(name) => {
                let index = self.index(name).await?;
                let link = LinkUnspec::new_with_index(index).build();
                self.ask(RouteNetlinkMessage::DelLink(link), 0).await?;
                // Others may have gone with it.
                self.indices.clear();
                Ok(())
            }
            Step::Create(name, kind, mac) => self.create(name, kind, *mac).await,
            Step::Mac(name, mac) => {
                let index = self.index(name).await?;
                self.change(
                    LinkUnspec::new_with_index(index)
                        .address(mac.0.to_vec())
                        .build(),
                )
                .await
            }
            Step::Mtu(name, mtu) => {
                let index = self.index(name).await?;
                self.change(LinkUnspec::new_with_index(index).mtu(*mtu).build())
                    .await
            }
            Step::Join(name, bridge) => {
                let index = self.index(name).await?;
                let bridge = match bridge {
                    Some(bridge) => self.index(bridge).await?,
                    None => 0,
                };
                self.change(LinkUnspec::new_with_index(index).controller(bridge).build())
                    .await
            }
            Step::PortFlags(name, port) => {
                let index = self.index(name).await?;
                let flags = LinkBridgePort::new(index)
                    .learning(port.learning)
                    .flood(port.flood)
                    .neigh_suppress(port.suppress)
                    .build();
                self.change(flags).await
            }
            Step::Set(path, value) => settings::write(path, value),
            Step::Up(name, up) => {
                let index = self.index(name).await?;
                let link = LinkUnspec::new_with_index(index);
                let link = if *up { link.up() } else { link.down() };
                self.change(link.build()).await
            }
            Step::Keys(_, port) => self.wireguard.keys(names::WIREGUARD, key, *port).await,
            Step::Peer(key, peer) => self.wireguard.peer(names::WIREGUARD, *key, peer).await,
            Step::NoPeer(key) => self.wireguard.no_peer(names::WIREGUARD, *key).await,
            Step::Address(name, net) => {
                let index = self.index(name).await?;
                let address = self
                    .route
                    .address()
                    .add(index, net.addr().into(), net.prefix_len());
                address.execute().await.map_err(into_io)
            }
            Step::NoAddress(name, net) => {
                let index = self.index(name).await?;
                let mut add = self
                    .route
                    .address()
                    .add(index, net.addr().into(), net.prefix_len());
                let message = add.message_mut().clone();
                self.ask(RouteNetlinkMessage::DelAddress(message), 0).await
            }
            Step::Tunnel(name, mac, to) => {
                let how = if *mac == FLOOD {
                    NLM_F_APPEND
                } else {
                    NLM_F_REPLACE
                };
                let message = self.tunnel(name, *mac, *to).await?;
                self.ask(
                    RouteNetlinkMessage::NewNeighbour(message),
                    NLM_F_CREATE | how,
                )
                .await
            }
            Step::NoTunnel(name, mac, to) => {
                let message = self.tunnel(name, *mac, *to).await?;
                self.ask(RouteNetlinkMessage::DelNeighbour(message), 0)
                    .await
            }
            Step::Forward(_, mac, port) => {
                let message = self.forward(*mac, port).await?;
                let how = NLM_F_CREATE | NLM_F_REPLACE;
                self.ask(RouteNetlinkMessage::NewNeighbour(message), how)
                    .await
            }
            Step::NoForward(_, mac, port) => {
                let message = self.forward(*mac, port).await?;
                self.ask(RouteNetlinkMessage::DelNeighbour(message), 0)
                    .await
            }
            Step::Neighbour(name, ip, mac) => {
                let index = self.index(name).await?;
                let add = self.route.neighbours().add(index, IpAddr::V4(*ip));
                let add = add.link_layer_address(&mac.0).replace();
                add.execute().await.map_err(into_io)
            }
            Step::NoNeighbour(name, ip) => {
                let index = self.index(name).await?;
                let mut add = self.route.neighbours().add(index, IpAddr::V4(*ip));
                let message = add.message_mut().clone();
                self.ask(RouteNetlinkMessage::DelNeighbour(message), 0)
                    .await
            }
            Step::Detour(table, detour) => {
                let route = self.route(*table, &detour.device, detour.via).await?;
                let how = NLM_F_CREATE | NLM_F_REPLACE;
                self.ask(RouteNetlinkMessage::NewRoute(route), how).await
            }
            Step::NoDetour(table, detour) => {
                let route = self.route(*table, &detour.device, detour.via).await?;
                self.ask(RouteNetlinkMessage::DelRoute(route), 0).await
            }
            Step::Rule(mark, name) => {
                self.ask(
                    RouteNetlinkMessage::NewRule(rule(*mark, name)),
                    NLM_F_CREATE,
                )
                .await
            }
            Step::NoRule(mark, name) => {
                self.ask(RouteNetlinkMessage::DelRule(rule(*mark, name)), 0)
                    .await
            }
        }
    }

    async fn create(&mut self, name: &str, kind: &Kind, mac: Option<Mac>) -> io::Result<()> {
        let link = match kind {
            Kind::WireGuard => rtnetlink::LinkWireguard::new(name).build(),
            Kind::Bridge => with_mac(LinkBridge::new(name).down().mcast_snooping(false), mac),
            Kind::Veth { peer } => with_mac(LinkVeth::new(name, peer), mac),
            Kind::Vxlan { vni, local, port } => LinkVxlan::new(name, (*vni).into())
                .local(*local)
                .port(*port)
                .learning(false)
                .build(),
            Kind::Tap => return tap::create(name),
            Kind::Other(kind) => {
                let why = format!("{kind} is no kind of device that is made here");
                return Err(io::Error::other(why));
            }
        };
        let how = netlink_packet_core::NLM_F_EXCL | NLM_F_CREATE;
        self.ask(RouteNetlinkMessage::NewLink(link), how).await
    }

    async fn change(&mut self, link: LinkMessage) -> io::Result<()> {
        self.ask(RouteNetlinkMessage::NewLink(link), 0).await
    }

    /// The entry of a VXLAN device.
    async fn tunnel(&mut self, name: &str, mac: Mac, to: Ipv4Addr) -> io::Result<NeighbourMessage> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = self.index(name).await?;
        message.header.state = NeighbourState::Permanent;
        message.header.flags = NeighbourFlags::Own;
        message.attributes = vec![
            NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
            NeighbourAttribute::Destination(NeighbourAddress::Inet(to)),
        ];
        Ok(message)
    }

    /// The entry of a bridge. `Permanent` would be an address of the bridge's own.
    async fn forward(&mut self, mac: Mac, port: &str) -> io::Result<NeighbourMessage> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = self.index(port).await?;
        message.header.state = NeighbourState::Noarp;
        message.header.flags = NeighbourFlags::Controller;
        message.attributes = vec![NeighbourAttribute::LinkLayerAddress(mac.0.to_vec())];
        Ok(message)
    }

    async fn route(&mut self, table: u32, name: &str, via: Ipv4Addr) -> io::Result<RouteMessage> {
        let index = self.index(name).await?;
        Ok(RouteMessageBuilder::<Ipv4Addr>::new()
            .table_id(table)
            .gateway(via)
            .output_interface(index)
            .build())
    }

    /// The number of a device.
    async fn index(&mut self, name: &str) -> io::Result<u32> {
        if let Some(index) = self.indices.get(name) {
            return Ok(*index);
        }
        let found = self
            .route
            .link()
            .get()
            .match_name(name.to_owned())
            .execute();
        let index = match pin!(found).next().await {
            Some(Ok(link)) => link.header.index,
            Some(Err(error)) => return Err(into_io(error)),
            None => return Err(io::Error::from_raw_os_error(libc::ENODEV)),
        };
        self.indices.insert(name.to_owned(), index);
        Ok(index)
    }

    /// Sends a request and waits for the kernel's word.
    async fn ask(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let answers = self.route.request(message).map_err(into_io)?;
        acknowledged(answers).await
    }
}

/// Waits for the kernel's word on a request.
async fn acknowledged<T>(answers: impl Stream<Item = NetlinkMessage<T>>) -> io::Result<()> {
    let mut answers = pin!(answers);
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.raw_code() != 0
        {
            return Err(error.to_io());
        }
    }
    Ok(())
}

fn with_mac<T>(link: LinkMessageBuilder<T>, mac: Option<Mac>) -> LinkMessage {
    match mac {
        Some(mac) => link.address(mac.0.to_vec()).build(),
        None => link.build(),
    }
}

fn rule(mark: u32, name: &str) -> RuleMessage {
    let mut rule = RuleMessage::default();
    rule.header.family = AddressFamily::Inet;
    rule.header.action = RuleAction::ToTable;
    rule.attributes = vec![
        RuleAttribute::Priority(RULE_PRIORITY),
        RuleAttribute::FwMark(mark),
        RuleAttribute::Iifname(name.to_owned()),
        RuleAttribute::Table(mark),
    ];
    rule
}

/// Before the main table (32766).
const RULE_PRIORITY: u32 = 20053;

/// The kernel's answer, if it is one.
fn into_io(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}

/// Whether it is a step after which something is not there.
fn goes_away(step: &Step) -> bool {
    matches!(
        step,
        Step::Delete(_)
            | Step::NoPeer(_)
            | Step::NoAddress(..)
            | Step::NoTunnel(..)
            | Step::NoForward(..)
            | Step::NoNeighbour(..)
            | Step::NoDetour(..)
            | Step::NoRule(..)
    )
}

/// Whether the kernel says that it is not there.
fn is_gone(error: &io::Error) -> bool {
    let gone = [libc::ENOENT, libc::ESRCH, libc::ENODEV, libc::EADDRNOTAVAIL];
    error
        .raw_os_error()
        .is_some_and(|code| gone.contains(&code))
}

fn hint(step: &Step, error: &io::Error) -> &'static str {
    match (step, error.raw_os_error()) {
        (_, Some(libc::EPERM | libc::EACCES)) => "; root may do that (CAP_NET_ADMIN)",
        (Step::Create(_, Kind::WireGuard, _), Some(libc::EOPNOTSUPP)) => {
            "; this kernel has no WireGuard: modprobe wireguard"
        }
        (Step::Create(_, Kind::Vxlan { .. }, _), Some(libc::EOPNOTSUPP)) => {
            "; this kernel has no VXLAN: modprobe vxlan"
        }
        (Step::Create(_, Kind::Bridge, _), Some(libc::EOPNOTSUPP)) => {
            "; this kernel has no bridges: modprobe bridge"
        }
        (Step::Create(_, Kind::Veth { .. }, _), Some(libc::EOPNOTSUPP)) => {
            "; this kernel has no pairs of devices: modprobe veth"
        }
        (Step::Create(_, Kind::Tap, _), Some(libc::ENOENT | libc::ENODEV)) => {
            "; this kernel has no taps: modprobe tun"
        }
        (Step::Up(..) | Step::Keys(..), Some(libc::EADDRINUSE)) => {
            "; another program has the UDP port of WireGuard or of our VXLAN"
        }
        _ => "",
    }
}
