//! The states of the bus, and the nodes beside them, as no frontend should write them.

use super::blkfront::Blkfront;
use super::guest::{FREE_GREFS, Text, claim, new_port, set_grant, share, sleep};
use super::netfront::Netfront;
use super::xenstore::{Refused, Store, kind};
use crate::rng::Rng;
use crate::text;

/// Nodes of both frontends that a backend reads.
const NODES: &[&str] = &[
    "ring-ref",
    "ring-ref0",
    "ring-ref1",
    "ring-ref15",
    "ring-page-order",
    "event-channel",
    "event-channel-tx",
    "event-channel-rx",
    "tx-ring-ref",
    "rx-ring-ref",
    "multi-queue-num-queues",
    "queue-0/ring-ref",
    "queue-0/event-channel",
    "protocol",
    "feature-persistent",
    "request-rx-copy",
    "feature-rx-notify",
    "feature-sg",
    "feature-gso-tcpv4",
    "feature-gso-tcpv6",
    "feature-no-csum-offload",
    "feature-ipv6-csum-offload",
    "request-multicast-control",
];

/// A value for any of them.
fn value(rng: &mut Rng, good: &[u32]) -> Text {
    match rng.below(8) {
        0 => text!("{}", rng.pick(good)),
        // The store's port and the console's, their grants, ours.
        1 => text!("{}", rng.below(16)),
        2 => text!("{}", rng.pick(&[4, 5, 31, 32, 63, 64, u32::MAX, 1 << 31])),
        3 => text!("{}", rng.next()),
        4 => text!("-{}", rng.below(100)),
        5 => text!("{}x", rng.below(100)),
        6 => Text::of(&rng.next().to_le_bytes()),
        _ => Text::of(b""),
    }
}

/// A state, or none.
fn state(rng: &mut Rng) -> Text {
    match rng.below(12) {
        0 => text!("{}", rng.next()),
        1 => Text::of(b""),
        2 => Text::of(&[0, b'4']),
        n => text!("{}", n % 9),
    }
}

/// Writes one node of a directory, or removes it.
fn scribble(store: &mut Store, directory: &Text, rng: &mut Rng, good: &[u32]) {
    let node = text!("{}/{}", directory.str(), rng.pick(NODES));
    let done = if rng.once_in(6) {
        store.ask(kind::RM, 0, &[node.bytes(), b"\0"])
    } else {
        store.write(node.str(), value(rng, good).bytes())
    };
    claim(done != Err(Refused::Silent), "a write is answered");
}

/// States and nodes at random; the backend follows or closes the device.
pub fn jumps(store: &mut Store, disk: &mut Blkfront, net: &mut Netfront, rng: &mut Rng) {
    let good = [
        disk.ring(0).gref(),
        disk.data(0).gref(),
        disk.port,
        net.port,
        net.tx_ring().gref(),
        net.rx_ring().gref(),
    ];
    for _ in 0..40 {
        let directory = rng.pick(&[disk.directory, net.directory]);
        for _ in 0..rng.below(3) {
            scribble(store, &directory, rng, &good);
        }
        let node = text!("{}/state", directory.str());
        let done = if rng.once_in(10) {
            store.ask(kind::RM, 0, &[node.bytes(), b"\0"])
        } else {
            store.write(node.str(), state(rng).bytes())
        };
        claim(done != Err(Refused::Silent), "a write is answered");
        if rng.once_in(3) {
            sleep(store.port, rng.below(10));
        }
    }
    // Nodes that only an attack makes are no part of what comes next.
    for directory in [disk.directory, net.directory] {
        for name in NODES {
            let node = text!("{}/{name}", directory.str());
            let _ = store.ask(kind::RM, 0, &[node.bytes(), b"\0"]);
        }
    }
}

/// A disk and a network that are said to be elsewhere while they are in use: nobody looks
/// before they begin anew.
pub fn moves(store: &mut Store, disk: &mut Blkfront, rng: &mut Rng) {
    let strange = new_port();
    for _ in 0..6 {
        let gref = rng.pick(&[disk.data(3).gref(), 1, 0, FREE_GREFS + 5]);
        store.put_number(disk.node("ring-ref").str(), gref);
        let port = rng.pick(&[strange, 1, 2, 0, u32::MAX]);
        store.put_number(disk.node("event-channel").str(), port);
        store.put(disk.node("state").str(), rng.pick(&[&b"3"[..], b"4"]));
        disk.honest(rng.below(64), rng.next() as u32);
    }
    super::guest::close_port(strange);
}

/// Rings that are offered and cannot be had; the device says so, and waits.
pub fn offers(store: &mut Store, disk: &mut Blkfront, rng: &mut Rng) {
    for _ in 0..6 {
        disk.begin_anew(store);
        let state = disk.backend_node("state");
        claim(
            store.wait(state.str(), b"2", super::guest::PATIENCE),
            "a disk's backend waits",
        );
        let node = |name: &str| text!("{}/{name}", disk.directory.str());
        store.put_number(
            node("event-channel").str(),
            rng.pick(&[disk.port, 1, u32::MAX]),
        );
        match rng.below(5) {
            0 => {
                let order = rng.pick(&[5, 12, 31, 32, 33, 64, u32::MAX]);
                store.put_number(node("ring-page-order").str(), order);
            }
            1 => {
                // As many pages as there may be, of which the last is missing.
                store.put_number(node("ring-page-order").str(), 4);
                for n in 0..15 {
                    let gref = share(disk.ring(n % 4), false);
                    store.put_number(node(text!("ring-ref{n}").str()).str(), gref);
                }
                let _ = store.ask(kind::RM, 0, &[node("ring-ref15").bytes(), b"\0"]);
            }
            2 => {
                let gref = share(disk.ring(0), true);
                store.put_number(node("ring-ref").str(), gref);
            }
            3 => {
                set_grant(disk.ring(0).gref(), 0, 0, 0);
                store.put_number(node("ring-ref").str(), disk.ring(0).gref());
            }
            _ => {
                let gref = rng.pick(&[512, 1 << 20, u32::MAX, 490]);
                store.put_number(node("ring-ref").str(), gref);
            }
        }
        if rng.once_in(3) {
            let queues = rng.pick(&[0, 2, 5, 1 << 20, u32::MAX]);
            store.put_number(node("multi-queue-num-queues").str(), queues);
        }
        store.put(node("state").str(), b"3");
        claim(
            store.wait(state.str(), b"5", super::guest::PATIENCE),
            "a ring that cannot be had closes the disk",
        );
        for name in NODES {
            let _ = store.ask(kind::RM, 0, &[node(name).bytes(), b"\0"]);
        }
        for n in 0..15 {
            let _ = store.ask(
                kind::RM,
                0,
                &[node(text!("ring-ref{n}").str()).bytes(), b"\0"],
            );
        }
    }
}

/// Connects and closes again and again, at times before the backend has come along.
pub fn storm(store: &mut Store, disk: &mut Blkfront, net: &mut Netfront, rng: &mut Rng) {
    for _ in 0..12 {
        match rng.below(4) {
            0 => disk.reconnect(store, rng.below(3) as u32),
            1 => net.reconnect(store),
            2 => {
                let node = disk.node("state");
                for _ in 0..rng.below(12) {
                    store.put(node.str(), rng.pick(&[&b"1"[..], b"3", b"5", b"6"]));
                }
                disk.reconnect(store, 0);
            }
            _ => {
                let node = net.node("state");
                for _ in 0..rng.below(12) {
                    store.put(node.str(), rng.pick(&[&b"1"[..], b"4", b"5", b"6"]));
                }
                net.reconnect(store);
            }
        }
    }
}
