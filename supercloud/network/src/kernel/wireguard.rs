//! WireGuard's keys and peers (`linux/wireguard.h`), over generic netlink.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::pin::pin;

use futures_util::StreamExt as _;
use genetlink::GenetlinkHandle;
use ipnet::Ipv4Net;
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_generic::GenlMessage;
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute,
    WireguardCmd, WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use tokio::task::JoinHandle;

use crate::error::Error;
use crate::key::{PrivateKey, PublicKey};
use crate::state::{Peer, WireGuard};

/// Seconds after which something is sent to a peer in any case, so that translators of addresses on
/// the way keep their entries (what the WireGuard manual recommends).
const KEEPALIVE: u16 = 25;

pub struct Control(GenetlinkHandle);

impl Control {
    pub fn connect() -> Result<(Self, JoinHandle<()>), Error> {
        let (connection, handle, _) =
            genetlink::new_connection().map_err(|source| Error::Connect {
                what: "WireGuard",
                source,
            })?;
        Ok((Self(handle), tokio::spawn(connection)))
    }

    pub async fn read(&mut self, device: &str) -> Result<WireGuard, Error> {
        let name = WireguardAttribute::IfName(device.to_owned());
        let answers = self
            .ask(WireguardCmd::GetDevice, vec![name], NLM_F_DUMP)
            .await;
        let answers = answers.map_err(|error| Error::Read {
            what: "peers of WireGuard",
            why: error.to_string(),
        })?;
        let mut state = WireGuard::default();
        // A peer with many addresses comes in more than one message.
        for attribute in answers.into_iter().flatten() {
            match attribute {
                WireguardAttribute::PublicKey(key) if key != [0; 32] => {
                    state.key = Some(PublicKey(key));
                }
                WireguardAttribute::ListenPort(port) => state.port = port,
                WireguardAttribute::Peers(peers) => {
                    for (key, peer) in peers.iter().filter_map(peer) {
                        let known = state.peers.entry(key).or_insert(Peer {
                            endpoint: peer.endpoint,
                            allowed: BTreeSet::new(),
                        });
                        known.allowed.extend(peer.allowed);
                    }
                }
                _ => {}
            }
        }
        Ok(state)
    }

    pub async fn keys(&mut self, device: &str, key: &PrivateKey, port: u16) -> io::Result<()> {
        let attributes = vec![
            WireguardAttribute::IfName(device.to_owned()),
            WireguardAttribute::PrivateKey(key.to_bytes()),
            WireguardAttribute::ListenPort(port),
        ];
        self.ask(WireguardCmd::SetDevice, attributes, NLM_F_ACK)
            .await?;
        Ok(())
    }

    pub async fn peer(&mut self, device: &str, key: PublicKey, peer: &Peer) -> io::Result<()> {
        let allowed = peer.allowed.iter().map(|net| {
            WireguardAllowedIp(vec![
                WireguardAllowedIpAttr::Family(WireguardAddressFamily::Ipv4),
                WireguardAllowedIpAttr::IpAddr(IpAddr::V4(net.addr())),
                WireguardAllowedIpAttr::Cidr(net.prefix_len()),
            ])
        });
        let mut attributes = vec![
            WireguardPeerAttribute::PublicKey(key.0),
            WireguardPeerAttribute::Flags(WireguardPeerFlags::ReplaceAllowedIps),
            WireguardPeerAttribute::PersistentKeepalive(KEEPALIVE),
            WireguardPeerAttribute::AllowedIps(allowed.collect()),
        ];
        attributes.extend(peer.endpoint.map(WireguardPeerAttribute::Endpoint));
        self.set_peer(device, attributes).await
    }

    pub async fn no_peer(&mut self, device: &str, key: PublicKey) -> io::Result<()> {
        let attributes = vec![
            WireguardPeerAttribute::PublicKey(key.0),
            WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe),
        ];
        self.set_peer(device, attributes).await
    }

    async fn set_peer(
        &mut self,
        device: &str,
        attributes: Vec<WireguardPeerAttribute>,
    ) -> io::Result<()> {
        let attributes = vec![
            WireguardAttribute::IfName(device.to_owned()),
            WireguardAttribute::Peers(vec![WireguardPeer(attributes)]),
        ];
        self.ask(WireguardCmd::SetDevice, attributes, NLM_F_ACK)
            .await?;
        Ok(())
    }

    async fn ask(
        &mut self,
        cmd: WireguardCmd,
        attributes: Vec<WireguardAttribute>,
        flags: u16,
    ) -> io::Result<Vec<Vec<WireguardAttribute>>> {
        let message = GenlMessage::from_payload(WireguardMessage { cmd, attributes });
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | flags;
        let answers = self.0.request(message).await.map_err(io::Error::other)?;
        let mut answers = pin!(answers);
        let mut found = Vec::new();
        while let Some(answer) = answers.next().await {
            match answer.map_err(io::Error::other)?.payload {
                NetlinkPayload::InnerMessage(message) => found.push(message.payload.attributes),
                NetlinkPayload::Error(error) if error.raw_code() != 0 => return Err(error.to_io()),
                _ => {}
            }
        }
        Ok(found)
    }
}

fn peer(peer: &WireguardPeer) -> Option<(PublicKey, Peer)> {
    let (mut key, mut endpoint, mut allowed) = (None, None, BTreeSet::new());
    for attribute in &peer.0 {
        match attribute {
            WireguardPeerAttribute::PublicKey(bytes) => key = Some(PublicKey(*bytes)),
            WireguardPeerAttribute::Endpoint(address) => endpoint = Some(*address),
            WireguardPeerAttribute::AllowedIps(nets) => {
                allowed.extend(nets.iter().filter_map(allowed_net));
            }
            _ => {}
        }
    }
    Some((key?, Peer { endpoint, allowed }))
}

fn allowed_net(net: &WireguardAllowedIp) -> Option<Ipv4Net> {
    let (mut address, mut prefix) = (None, None);
    for attribute in &net.0 {
        match attribute {
            WireguardAllowedIpAttr::IpAddr(IpAddr::V4(ip)) => address = Some(*ip),
            WireguardAllowedIpAttr::Cidr(len) => prefix = Some(*len),
            _ => {}
        }
    }
    Ipv4Net::new(address?, prefix?).ok()
}
