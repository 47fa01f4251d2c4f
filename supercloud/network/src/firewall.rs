//! What may pass, and what is translated: two tables of nftables of ours, replaced in one step.

use std::fmt::Write as _;
use std::process::Stdio;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::error::Error;
use crate::names;
use crate::state::detour_table;
use crate::wanted::{Network, Port, Wanted};

/// The tables' name, in the families `inet` and `bridge`.
pub const TABLE: &str = "supercloud";

/// Addresses that VMs have no business with: the provider's metadata service, which gives the
/// instance's credentials to whoever asks from it, among them.
const NOT_FOR_VMS: &str = "{ 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/3 }";

/// Most connections of one VM through its node at a time: the node's table of them is everybody's.
const CONNECTIONS: u32 = 8192;
/// Most frames to all of one VM in a second: each is sent to every node of the network.
const TO_ALL: u32 = 100;

/// What nft is to read. `router_before` says whether this machine forwarded packets before we made it;
/// if it did not, it goes on to forward none but those of networks.
pub fn rules(wanted: &Wanted, router_before: bool) -> String {
    let here: Vec<&Network> = wanted
        .networks
        .iter()
        .filter(|network| network.is_on(wanted.node))
        .collect();
    let mut text = String::new();
    for family in ["inet", "bridge"] {
        // Adding one that is there is none; removing one that is not is an error.
        let _ = writeln!(
            text,
            "add table {family} {TABLE}\ndelete table {family} {TABLE}"
        );
    }
    inet(&mut text, wanted, &here, router_before);
    bridge(&mut text, wanted, &here);
    text
}

/// Removes all of it.
pub fn nothing() -> String {
    ["inet", "bridge"]
        .map(|family| format!("add table {family} {TABLE}\ndelete table {family} {TABLE}\n"))
        .concat()
}

fn set(names: impl Iterator<Item = String>) -> String {
    let names: Vec<String> = names.map(|name| format!("{name:?}")).collect();
    match names.is_empty() {
        // A name that no device can have: too long.
        true => "\"scnone\"".into(),
        false => format!("{{ {} }}", names.join(", ")),
    }
}

fn inet(text: &mut String, wanted: &Wanted, here: &[&Network], router_before: bool) {
    let wg = names::WIREGUARD;
    let fabric = wanted.fabric;
    let own = wanted.fabric_address(wanted.node);
    let port = names::VXLAN_PORT;
    let bridges = set(here.iter().map(|network| names::bridge(network.vni)));
    let routers = set(here.iter().map(|network| names::router(network.vni)));
    let both = set(here
        .iter()
        .flat_map(|network| [names::bridge(network.vni), names::router(network.vni)]));
    // Where somebody has br_netfilter, frames that are only bridged come by here; as part of a
    // connection that is translated they would end it (`nf_nat_oif_changed`).
    let gateway = names::GATEWAY;
    let mss = wanted.guest_mtu().saturating_sub(40);
    let strangers = match router_before {
        true => String::new(),
        false => format!("\n    iifname != {both} oifname != {both} drop"),
    };
    let _ = write!(
        text,
        "table inet {TABLE} {{
  set connections {{
    type ipv4_addr
    size 65535
    flags dynamic
  }}
  chain raw {{
    type filter hook prerouting priority raw; policy accept;
    iifname {bridges} ether daddr != {gateway} notrack
  }}
  chain input {{
    type filter hook input priority filter; policy accept;
    iifname \"{wg}\" jump fabric
    udp dport {port} drop
    iifname {bridges} jump guest
    iifname {routers} ct state established,related accept
    iifname {routers} drop
  }}
  chain fabric {{
    ip saddr {fabric} ip daddr {own} udp dport {port} accept
    ip saddr {fabric} icmp type {{ echo-request, echo-reply, destination-unreachable, time-exceeded }} accept
    ct state established,related accept
    drop
  }}
  chain guest {{
    ct state established,related accept
    udp dport {{ 53, 67 }} accept
    tcp dport 53 accept
    icmp type echo-request accept
    drop
  }}
  chain output {{
    type filter hook output priority filter; policy accept;
    oifname {both} icmp type redirect drop
  }}
  chain forward {{
    type filter hook forward priority filter; policy accept;
    iifname \"{wg}\" drop
    oifname \"{wg}\" drop{strangers}
    iifname {both} jump from_network
    oifname {both} jump to_network
  }}
  chain from_network {{
    tcp flags syn tcp option maxseg size > {mss} tcp option maxseg size set {mss}
    ct state established,related accept
    ct state new add @connections {{ ip saddr ct count over {CONNECTIONS} }} drop
    ct status dnat accept
"
    );
    for network in here {
        // Around a corner: to another node's own end.
        let (bridge, router) = (names::bridge(network.vni), names::router(network.vni));
        let _ = writeln!(
            text,
            "    iifname {{ \"{bridge}\", \"{router}\" }} oifname \"{bridge}\" accept"
        );
    }
    let _ = write!(
        text,
        "    oifname {both} drop
    ip daddr {NOT_FOR_VMS} drop
    ip daddr {fabric} drop
    iifname {routers} drop
    accept
  }}
  chain to_network {{
    tcp flags syn tcp option maxseg size > {mss} tcp option maxseg size set {mss}
    ct state established,related accept
    ct status dnat accept
    drop
  }}
"
    );
    detours(text, wanted, here);
    translation(text, wanted, here, &both);
    text.push_str("}\n");
}

/// Connections that began at another node and are not known here go on through that node.
fn detours(text: &mut String, wanted: &Wanted, here: &[&Network]) {
    let _ = writeln!(
        text,
        "  chain detour {{\n    type filter hook prerouting priority mangle; policy accept;"
    );
    for network in here {
        let (bridge, router) = (names::bridge(network.vni), names::router(network.vni));
        let devices = format!("iifname {{ \"{bridge}\", \"{router}\" }}");
        for node in wanted
            .nodes()
            .filter(|node| *node != wanted.node && network.is_on(*node))
        {
            let mark = detour_table(network.vni, node);
            let _ = writeln!(
                text,
                "    {devices} ct direction original ct mark {mark:#x} meta mark set {mark:#x} accept"
            );
        }
        for vm in &network.ports {
            // One that is about to come has its connections where it still is: the rule is there
            // before its first segment from here.
            let arrives = vm.arriving == Some(wanted.node) && vm.node != wanted.node;
            let from = if arrives { Some(vm.node) } else { vm.left };
            let Some(left) = from
                .filter(|left| *left != wanted.node && wanted.nodes().any(|node| node == *left))
            else {
                continue;
            };
            let mark = detour_table(network.vni, left);
            let _ = writeln!(
                text,
                "    {devices} ip saddr {} fib daddr type != local ct state new,invalid \
                 tcp flags & (syn | ack | rst | fin) != syn ct mark set {mark:#x} \
                 meta mark set {mark:#x} accept",
                vm.address
            );
        }
    }
    text.push_str("  }\n");
}

fn translation(text: &mut String, wanted: &Wanted, here: &[&Network], both: &str) {
    let mut published = String::new();
    for network in here {
        for vm in &network.ports {
            publish(&mut published, vm);
        }
    }
    // What VMs ask their gateway is its own, whatever is published.
    let services = if here.is_empty() {
        String::new()
    } else {
        let bridges = here.iter().map(|network| names::bridge(network.vni));
        let bridges: Vec<String> = bridges.map(|bridge| format!("\"{bridge}\"")).collect();
        format!(
            "    iifname {{ {} }} meta l4proto {{ tcp, udp }} th dport {{ 53, 67 }} return\n",
            bridges.join(", ")
        )
    };
    let _ = write!(
        text,
        "  chain prerouting {{
    type nat hook prerouting priority dstnat; policy accept;
{services}    fib daddr type local jump published
  }}
  chain local {{
    type nat hook output priority -100; policy accept;
    ip daddr != 127.0.0.0/8 fib daddr type local jump published
  }}
  chain published {{
{published}  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
"
    );
    for network in here {
        let bridge = names::bridge(network.vni);
        if let Some(router) = network.router(wanted.node) {
            // The VM answers to this node, wherever it runs.
            let _ = writeln!(
                text,
                "    oifname \"{bridge}\" ct status dnat snat ip to {router}"
            );
        }
        let subnet = network.subnet;
        let _ = writeln!(text, "    ip saddr {subnet} oifname != {both} masquerade");
    }
    text.push_str("  }\n");
}

fn publish(text: &mut String, vm: &Port) {
    for published in &vm.publish {
        let _ = writeln!(
            text,
            "    meta nfproto ipv4 {} dport {} dnat ip to {}:{}",
            published.protocol, published.port, vm.address, published.to
        );
    }
}

/// A VM sends with its own addresses only, and is nobody's DHCP server.
fn bridge(text: &mut String, wanted: &Wanted, here: &[&Network]) {
    let tunnels = set(here.iter().map(|network| names::vxlan(network.vni)));
    let _ = write!(
        text,
        "table bridge {TABLE} {{
  chain prerouting {{
    type filter hook prerouting priority -300; policy accept;
    iifname {tunnels} jump from_tunnel
"
    );
    let taps: Vec<&Port> = here
        .iter()
        .flat_map(|network| &network.ports)
        .filter(|vm| vm.has_tap(wanted.node))
        .collect();
    for vm in &taps {
        let tap = names::tap(vm.mac);
        let _ = writeln!(text, "    iifname \"{tap}\" jump from_{tap}");
    }
    let _ = write!(
        text,
        "  }}
  chain forward {{
    type filter hook forward priority -200; policy accept;
    oifname {tunnels} udp dport 67 drop
  }}
  chain from_tunnel {{
    ether type ip udp dport {{ 67, 68 }} drop
    ether type {{ ip, arp }} accept
    drop
  }}
"
    );
    for vm in &taps {
        let (tap, mac, ip) = (names::tap(vm.mac), vm.mac, vm.address);
        // 0x8035 is reverse ARP, by which its VMM announces it.
        let _ = write!(
            text,
            "  chain from_{tap} {{
    ether saddr != {mac} drop
    meta pkttype {{ broadcast, multicast }} limit rate over {TO_ALL}/second burst {TO_ALL} packets drop
    ether type 0x8035 accept
    ether type arp arp saddr ether {mac} arp saddr ip {{ 0.0.0.0, {ip} }} accept
    ip saddr {ip} udp sport 67 drop
    ip saddr {ip} accept
    ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept
    drop
  }}
"
        );
    }
    text.push_str("}\n");
}

/// Has nft load these rules, all or none.
pub async fn load(rules: &str) -> Result<(), Error> {
    nft(&["-f", "-"], rules, "the rules of the networks").await?;
    Ok(())
}

/// What the kernel has of our tables, in nft's words, without what it counts; empty if one is not there.
pub async fn listing() -> Result<String, Error> {
    let mut listing = String::new();
    for family in ["inet", "bridge"] {
        let words = ["-s", "-t", "list", "table", family, TABLE];
        match nft(&words, "", "the list of our rules").await {
            Ok(text) => listing.push_str(&text),
            Err(Error::Failed { .. }) => return Ok(String::new()),
            Err(error) => return Err(error),
        }
    }
    Ok(listing)
}

async fn nft(words: &[&str], input: &str, what: &str) -> Result<String, Error> {
    let program = |source| Error::Program {
        program: "nft",
        package: "nftables",
        source,
    };
    let mut nft = Command::new("nft")
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(program)?;
    if let Some(mut pipe) = nft.stdin.take() {
        // If it has ended already, its own words say why.
        let _ = pipe.write_all(input.as_bytes()).await;
    }
    let output = nft.wait_with_output().await.map_err(program)?;
    if !output.status.success() {
        return Err(Error::Failed {
            program: "nft",
            what: what.into(),
            status: output.status.to_string(),
            said: String::from_utf8_lossy(&output.stderr)
                .chars()
                .take(2000)
                .collect(),
        });
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
