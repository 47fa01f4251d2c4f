//! Each thing that cannot be, and texts of any kind.

use proptest::prelude::*;

use super::*;
use crate::key::PublicKey;
use crate::names;
use crate::wanted::{NodePeer, Published};

fn node(number: u16) -> NodeNumber {
    number.try_into().unwrap()
}

fn vm(name: &str, last: u8) -> Port {
    Port {
        name: name.into(),
        mac: Mac([2, 0, 0, 0, 0, last]),
        address: Ipv4Addr::new(10, 5, 0, last),
        node: node(1),
        arriving: None,
        left: None,
        publish: vec!["8080:80".parse().unwrap()],
    }
}

fn network(name: &str, vni: u16, subnet: &str) -> Network {
    Network {
        name: name.into(),
        vni: vni.try_into().unwrap(),
        subnet: subnet.parse().unwrap(),
        ports: vec![],
    }
}

fn good() -> Wanted {
    let mut wanted = Wanted::new(node(1));
    wanted.peers = vec![NodePeer {
        node: node(2),
        public_key: PublicKey([1; 32]),
        endpoint: Some("[2001:db8::1]:51820".parse().unwrap()),
    }];
    wanted.networks = vec![
        network("demo", 5, "10.5.0.0/16"),
        network("a-2", 6, "10.6.0.0/24"),
    ];
    wanted.networks[0].ports = vec![vm("web", 10)];
    wanted
}

#[track_caller]
fn wrong(change: impl FnOnce(&mut Wanted), says: &str) {
    let mut wanted = good();
    wanted.check().unwrap();
    change(&mut wanted);
    let error = wanted.check().expect_err(says).to_string();
    assert!(error.contains(says), "{error:?} does not say {says:?}");
}

#[test]
fn what_cannot_be_is_refused_in_words() {
    let port =
        |wanted: &mut Wanted, change: fn(&mut Port)| change(&mut wanted.networks[0].ports[0]);
    for name in [
        "",
        "Web",
        "-web",
        "web-",
        "a.b",
        "a b",
        "a\nb",
        &"a".repeat(64),
        "é",
    ] {
        wrong(|w| w.networks[0].name = name.into(), "is no name");
        wrong(|w| w.networks[0].ports[0].name = name.into(), "is no name");
    }
    wrong(
        |w| w.networks[1].name = "demo".into(),
        "demo is there twice",
    );
    wrong(
        |w| w.networks[1].vni = w.networks[0].vni,
        "have the number 5",
    );
    wrong(
        |w| w.networks[1].subnet = "10.5.7.0/24".parse().unwrap(),
        "overlap",
    );
    wrong(|w| w.fabric = "10.5.0.0/18".parse().unwrap(), "overlap");
    wrong(
        |w| w.fabric = "100.127.64.1/18".parse().unwrap(),
        "has no address",
    );
    wrong(
        |w| w.fabric = "100.127.64.0/31".parse().unwrap(),
        "has no address",
    );
    for subnet in [
        "10.5.0.1/16",
        "8.8.0.0/16",
        "10.5.0.0/27",
        "0.0.0.0/8",
        "172.0.0.0/8",
    ] {
        wrong(
            |w| w.networks[0].subnet = subnet.parse().unwrap(),
            "is no subnet",
        );
    }
    wrong(
        |w| {
            w.networks[1].subnet = "10.6.0.0/26".parse().unwrap();
            w.peers[0].node = node(16);
        },
        "no address for node 16",
    );
    for address in [
        "10.5.0.0",
        "10.5.0.1",
        "10.5.255.254",
        "10.5.192.1",
        "10.4.0.9",
        "10.6.0.9",
    ] {
        wrong(
            |w| w.networks[0].ports[0].address = address.parse().unwrap(),
            "is not for VMs",
        );
    }
    for mac in [
        "00:00:00:00:00:00",
        "ff:ff:ff:ff:ff:ff",
        "03:00:00:00:00:01",
        "02:53:43:00:00:00",
        "02:53:43:00:00:07",
    ] {
        wrong(
            |w| w.networks[0].ports[0].mac = mac.parse().unwrap(),
            "use another",
        );
    }
    wrong(
        |w| port(w, |vm| vm.node = node(3)),
        "node 3, which is not known",
    );
    wrong(
        |w| port(w, |vm| vm.arriving = Some(node(9))),
        "node 9, which is not known",
    );
    wrong(
        |w| w.networks[0].ports.push(vm("web", 11)),
        "web.demo is there twice",
    );
    wrong(
        |w| {
            let mut other = vm("db", 10);
            other.address = Ipv4Addr::new(10, 5, 0, 12);
            w.networks[0].ports.push(other);
        },
        "the MAC 02:00:00:00:00:0a is there twice",
    );
    wrong(
        |w| w.networks[0].ports.push(vm("db", 11)),
        "published port 8080/tcp is there twice",
    );
    wrong(
        |w| port(w, |vm| vm.publish = vec!["51820".parse().unwrap()]),
        "nodes' own",
    );
    wrong(|w| w.peers[0].node = node(1), "its own peer");
    wrong(
        |w| {
            let mut twice = w.peers[0].clone();
            twice.public_key = PublicKey([2; 32]);
            w.peers.push(twice);
        },
        "node 2 is there twice",
    );
    wrong(|w| w.underlay_mtu = 576, "too small");
    wrong(|w| w.listen_port = 0, "not 0");
    wrong(
        |w| w.networks[0].ports = vec![vm("web", 10); PORTS + 1],
        "are more than",
    );
}

#[test]
fn records_are_read_as_they_are_written() {
    let wanted = good();
    let text = serde_json::to_string(&wanted).unwrap();
    assert_eq!(serde_json::from_str::<Wanted>(&text).unwrap(), wanted);
    // The shortest, and what nobody knows.
    let short: Wanted = serde_json::from_str(r#"{"node": 3}"#).unwrap();
    assert_eq!(short, Wanted::new(node(3)));
    for text in [
        r#"{"node": 0}"#,
        r#"{"node": 16383}"#,
        r#"{"node": 3, "colour": "red"}"#,
        r#"{"node": 3, "networks": [{"name": "a", "vni": 0, "subnet": "10.0.0.0/24"}]}"#,
    ] {
        assert!(serde_json::from_str::<Wanted>(text).is_err(), "{text}");
    }
}

#[test]
fn addresses_follow_from_numbers() {
    let wanted = good();
    assert_eq!(
        wanted.fabric_address(node(2)),
        Ipv4Addr::new(100, 127, 64, 2)
    );
    assert_eq!(wanted.guest_mtu(), 1370);
    let small = &wanted.networks[1];
    assert_eq!(small.router(node(1)), Some(Ipv4Addr::new(10, 6, 0, 254)));
    assert_eq!(small.router(node(63)), Some(Ipv4Addr::new(10, 6, 0, 192)));
    assert_eq!(small.router(node(64)), None);
    // Those of VMs, of nodes, the gateway, and the two ends: no more, no fewer.
    assert_eq!(small.free().count() + 63 + 3, 256);
    assert!(small.free().all(|address| small.is_for_vms(address)));
    assert_eq!(
        wanted.networks[0].free().nth(8),
        Some(Ipv4Addr::new(10, 5, 0, 11))
    );
    for number in [1, 5, 254, 255, 256, NodeNumber::MAX] {
        assert!(!may_be_a_vms(names::router_mac(node(number))));
        assert_ne!(names::router_mac(node(number)), names::GATEWAY);
    }
}

#[test]
fn only_names_of_our_making_are_ours() {
    let vni = 65535.try_into().unwrap();
    for name in [
        names::bridge(vni),
        names::vxlan(vni),
        names::router(vni),
        names::router_port(vni),
        names::tap(Mac([0xfe, 0xff, 0xff, 0xff, 0xff, 0xff])),
        names::WIREGUARD.into(),
    ] {
        assert!(names::is_ours(&name) && name.len() < 16, "{name}");
    }
    for name in [
        "",
        "sc",
        "scb",
        "scb0",
        "scb01",
        "scb65536",
        "scb-1",
        "scb+1",
        "scb5x",
        "sct",
        "sct5",
        "sct02000000000G",
        "sct02000000000A",
        "scx5",
        "scwg1",
        "br0",
        "scé",
    ] {
        assert!(!names::is_ours(name), "{name}");
    }
}

proptest! {
    #[test]
    fn texts_are_read_or_refused(text in "[0-9a-f:/tcpudx +-]{0,24}") {
        if let Ok(published) = text.parse::<Published>() {
            prop_assert!(published.port != 0 && published.to != 0);
            prop_assert_eq!(published.to_string().parse::<Published>(), Ok(published));
        }
        if let Ok(mac) = text.parse::<Mac>() {
            prop_assert_eq!(mac.to_string(), text.to_lowercase());
        }
        let _ = (text.parse::<NodeNumber>(), text.parse::<PublicKey>(), names::is_ours(&text));
    }

    #[test]
    fn any_mac_and_port_is_read_again(bytes in any::<[u8; 6]>(), port in 1u16.., to in 1u16.., udp: bool) {
        let mac = Mac(bytes);
        prop_assert_eq!(mac.to_string().parse::<Mac>(), Ok(mac));
        prop_assert!(names::is_ours(&names::tap(mac)));
        let text = format!("{port}:{to}{}", if udp { "/udp" } else { "" });
        let published: Published = text.parse().unwrap();
        prop_assert_eq!((published.port, published.to), (port, to));
    }
}
