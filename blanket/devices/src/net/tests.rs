//! The backend with a frontend of its own, over a link whose other end is the test.

pub(super) mod namespace;
pub(super) mod packets;
pub(super) mod tcp;

use std::time::Duration;

use packets::{Build, checksum_is_right, pattern, plain};
use proptest::prelude::*;

use super::link::pair::{Peer, pair};
use super::offload::{Blank, Undone};
use super::protocol::{Gso, GsoKind, rx_flag, tx_flag};
use super::*;
use crate::bus::{Bus, State};
use crate::testing::{FakeGuest, Features, Netfront, tx_slot};

const SOON: Duration = Duration::from_secs(20);
const OURS: Mac = Mac::new([0x00, 0x16, 0x3e, 0, 0, 2]);
const CUT4: Gso = Gso {
    kind: GsoKind::TcpV4,
    size: 1448,
};

/// A guest with a device on a pair.
pub(super) struct Setup {
    pub guest: Arc<FakeGuest>,
    pub bus: Bus,
    pub vif: Arc<Vif>,
}

impl Setup {
    pub fn new(link: Box<dyn Link>, config: Config, vcpus: u32) -> Self {
        let guest = FakeGuest::new(vcpus);
        let bus = Bus::new(Arc::clone(&guest) as _).expect("a bus");
        guest.set_bus(bus.changed());
        let vif = Arc::new(Vif::new(link, config, vcpus));
        bus.attach(Arc::clone(&vif) as _).expect("attached");
        Self { guest, bus, vif }
    }

    fn with(config: Config, takes: Offloads, vcpus: u32) -> (Self, Peer) {
        let (link, peer) = pair(vcpus, takes).expect("sockets");
        (Self::new(Box::new(link), config, vcpus), peer)
    }

    fn plain() -> (Self, Peer) {
        Self::with(Config::new(0, OURS), Offloads::ALL, 1)
    }

    /// The counters, from the guest and to it: packets, dropped, errors.
    fn counts(&self) -> ([u64; 3], [u64; 3]) {
        let of = |direction: &Direction| {
            [&direction.packets, &direction.dropped, &direction.errors]
                .map(|counter| counter.load(Ordering::Relaxed))
        };
        let counters = self.vif.counters();
        (of(&counters.from_guest), of(&counters.to_guest))
    }
}

#[test]
fn nodes_say_what_there_is() {
    let config = Config {
        mtu: Some(1400),
        ..Config::new(3, OURS)
    };
    let (setup, peer) = Setup::with(config, Offloads::ALL, 2);
    let front = Netfront::connect(&setup.guest, 3, Features::LINUX);
    let get = |name: &str| setup.guest.get(&format!("{}/{name}", front.backend()));
    for (name, value) in [
        ("mac", "00:16:3e:00:00:02"),
        ("handle", "3"),
        ("feature-rx-copy", "1"),
        ("feature-sg", "1"),
        ("feature-gso-tcpv4", "1"),
        ("feature-gso-tcpv6", "1"),
        ("feature-ipv6-csum-offload", "1"),
        ("feature-split-event-channels", "1"),
        ("feature-multicast-control", "1"),
        ("multi-queue-max-queues", "2"),
    ] {
        assert_eq!(get(name).as_deref(), Some(value), "{name}");
    }
    let own = |name: &str| setup.guest.get(&format!("device/vif/3/{name}"));
    assert_eq!(own("mac").as_deref(), Some("00:16:3e:00:00:02"));
    assert_eq!(own("mtu").as_deref(), Some("1400"));
    assert_eq!(peer.offloads(), Offloads::ALL);
    front.close();
}

#[test]
fn frontends_that_say_nonsense_are_not_connected() {
    for (node, value) in [
        ("request-rx-copy", 0),
        ("feature-rx-notify", 0),
        ("multi-queue-num-queues", 9),
        ("tx-ring-ref", 5000),
    ] {
        let (setup, _peer) = Setup::plain();
        // Its state is not written before the nonsense is.
        let front = Netfront::prepare(&setup.guest, 0, Features::LINUX);
        front.put(node, value);
        front.put("state", 4);
        let state = format!("{}/state", front.backend());
        setup.guest.wait_for(&state, Some("5"));
        let fault = setup.bus.report(CLASS, 0).and_then(|report| report.fault);
        let expected = if node == "tx-ring-ref" { "5000" } else { node };
        assert!(
            fault.is_some_and(|fault| fault.contains(expected)),
            "{node}"
        );
        front.put("state", 6);
        setup.guest.wait_for(&state, Some("6"));
        front.assert_unused();
    }
}

#[test]
fn packets_of_every_length_go_both_ways() {
    for features in [
        Features::LINUX,
        Features {
            gso4: false,
            gso6: false,
            split: false,
            ..Features::LINUX
        },
    ] {
        let (setup, peer) = Setup::plain();
        let mut front = Netfront::connect(&setup.guest, 0, features);
        let queue = &mut front.queues[0];
        let lengths = [
            14, 60, 255, 256, 257, 1514, 4095, 4096, 4097, 8192, 8193, 20_000, 65_535,
        ];
        for (seed, length) in (1..).zip(lengths) {
            let packet = plain(length, seed);
            let ids = queue.send(&packet, 0, None);
            let (undone, arrived) = peer.receive(0, SOON).expect("a packet");
            assert_eq!(undone, Undone::default());
            assert!(arrived == packet, "{length} bytes from the guest");
            assert!(queue.answers(&ids).iter().all(|status| *status == 0));

            let packet = plain(length, seed + 100);
            peer.send(0, &Undone::default(), &packet).expect("sent");
            let got = queue.receive();
            assert!(got.bytes == packet, "{length} bytes to the guest");
            assert_eq!((got.flags & !rx_flag::MORE_DATA, got.gso), (0, None));
        }
        let (from, to) = setup.counts();
        assert_eq!(from, [lengths.len() as u64, 0, 0]);
        assert_eq!(to, [lengths.len() as u64, 0, 0]);
        front.close();
    }
}

#[test]
fn checksums_and_segmentation_are_left_to_who_can() {
    let (setup, peer) = Setup::plain();
    let mut front = Netfront::connect(&setup.guest, 0, Features::LINUX);
    let queue = &mut front.queues[0];
    let packet = Build::tcp4().blank(&pattern(40_000, 5));
    let ids = queue.send(&packet, tx_flag::CSUM_BLANK, Some(CUT4));
    let (undone, arrived) = peer.receive(0, SOON).expect("a packet");
    assert!(arrived == packet);
    let blank = Blank {
        start: 34,
        offset: 16,
    };
    let long = Undone {
        blank: Some(blank),
        validated: false,
        cut: Some((CUT4, 54)),
    };
    assert_eq!(undone, long);
    assert!(queue.answers(&ids).iter().all(|status| *status == 0));

    peer.send(0, &long, &packet).expect("sent");
    let got = queue.receive();
    assert!(got.bytes == packet);
    assert_eq!(got.gso, Some(CUT4));
    let checks = rx_flag::CSUM_BLANK | rx_flag::DATA_VALIDATED;
    assert_eq!(got.flags & checks, checks);
    front.close();
}

#[test]
fn who_cannot_has_it_made() {
    let config = || Config::new(0, OURS);
    let takes = Offloads {
        csum4: false,
        csum6: false,
        ..Offloads::ALL
    };
    let (setup, peer) = Setup::with(config(), takes, 1);
    let features = Features {
        sg: true,
        ..Features::NONE
    };
    let mut front = Netfront::connect(&setup.guest, 0, features);
    let queue = &mut front.queues[0];
    assert_eq!(peer.offloads(), Offloads::default());
    for (seed, length) in (1..).zip([0, 1, 200, 201, 1400, 4000, 30_001]) {
        for build in [
            Build::tcp4(),
            Build::udp4(),
            Build {
                v6: true,
                ..Build::tcp4()
            },
        ] {
            let mut packet = build.blank(&pattern(length, seed));
            queue.send(&packet, tx_flag::CSUM_BLANK, None);
            let (undone, arrived) = peer.receive(0, SOON).expect("a packet");
            assert_eq!(undone, Undone::default());
            assert!(checksum_is_right(&arrived));

            let at = if build.v6 { 54 } else { 34 };
            let blank = Blank {
                start: at,
                offset: if build.udp { 6 } else { 16 },
            };
            let undone = Undone {
                blank: Some(blank),
                ..Undone::default()
            };
            peer.send(0, &undone, &packet).expect("sent");
            let got = queue.receive();
            assert!(checksum_is_right(&got.bytes));
            assert_eq!(got.flags & !rx_flag::MORE_DATA, rx_flag::DATA_VALIDATED);
            packet.clear();
        }
    }
    // Not even a long segment has a blank one afterwards.
    let packet = Build::tcp4().blank(&pattern(20_000, 5));
    queue.send(&packet, tx_flag::CSUM_BLANK, Some(CUT4));
    let (undone, arrived) = peer.receive(0, SOON).expect("a packet");
    assert_eq!(undone, Undone::default());
    assert!(checksum_is_right(&arrived));
    front.close();
}

#[test]
fn a_frontend_of_one_page_gets_no_more() {
    let (setup, peer) = Setup::plain();
    let mut front = Netfront::connect(&setup.guest, 0, Features::NONE);
    let (long, short) = (plain(4097, 1), plain(4096, 2));
    for packet in [&long, &short] {
        peer.send(0, &Undone::default(), packet).expect("sent");
    }
    assert!(front.queues[0].receive().bytes == short);
    assert_eq!(setup.counts().1, [1, 1, 0]);
    front.close();
}

#[test]
fn packets_wait_for_pages() {
    let (setup, peer) = Setup::plain();
    let front = Netfront::offer(&setup.guest, 0, Features::LINUX);
    front.wait_connected();
    let mut front = front;
    let queue = &mut front.queues[0];
    let long = Undone {
        blank: Some(Blank {
            start: 34,
            offset: 16,
        }),
        validated: false,
        cut: Some((CUT4, 54)),
    };
    for (seed, undone) in [(1, long), (2, Undone::default())] {
        let packet = Build::tcp4().blank(&pattern(30_000, seed));
        peer.send(0, &undone, &packet).expect("sent");
        // One by one: what does not fit waits.
        for _ in 0..8 {
            let seen = setup
                .vif
                .counters()
                .to_guest
                .packets
                .load(Ordering::Relaxed);
            assert_eq!(seen, u64::from(seed) - 1);
            queue.post(1);
        }
        if undone == long {
            queue.post(1);
        }
        let got = queue.receive_only();
        assert!(got.bytes == packet);
        assert_eq!(got.gso.is_some(), undone == long);
    }
    front.close();
}

#[test]
fn pages_that_are_not_granted_are_refused_in_order() {
    let (setup, peer) = Setup::plain();
    let front = Netfront::offer(&setup.guest, 0, Features::LINUX);
    front.wait_connected();
    let mut front = front;
    let queue = &mut front.queues[0];
    queue.post_raw(2040);
    queue.post(1);
    queue.post_raw(2041);
    queue.post(30);
    let packet = plain(6000, 1);
    peer.send(0, &Undone::default(), &packet).expect("sent");
    // The first; the second, which the packet has begun in, and the third.
    for _ in 0..3 {
        queue.receive_error();
    }
    // The packet is gone, and what comes next is not.
    peer.send(0, &Undone::default(), &packet).expect("sent");
    assert!(queue.receive().bytes == packet);
    assert_eq!(setup.counts().1, [1, 1, 2]);
    front.close();
}

#[test]
fn bad_packets_get_errors_and_good_ones_pass() {
    let (setup, peer) = Setup::plain();
    let mut front = Netfront::connect(&setup.guest, 0, Features::LINUX);
    let queue = &mut front.queues[0];
    for round in 0..4 {
        let (id, gref) = queue.take_id();
        let slot = match round {
            0 => tx_slot(gref, 4090, 0, id, 60),
            1 => tx_slot(gref, 0, 0, id, 9),
            2 => tx_slot(5000, 0, 0, id, 60),
            // Nothing that has a checksum.
            _ => tx_slot(gref, 0, tx_flag::CSUM_BLANK, id, 60),
        };
        queue.slot(&slot);
        let packet = plain(2000, round + 1);
        let good = queue.send(&packet, 0, None);
        assert_eq!(queue.answer(id), -1, "round {round}");
        assert_eq!(queue.answers(&good), [0]);
        let (_, arrived) = peer.receive(0, SOON).expect("a packet");
        assert!(arrived == packet);
    }
    assert_eq!(setup.counts().0, [4, 0, 4]);
    front.close();
}

#[test]
fn a_broken_ring_closes_the_device_and_a_new_frontend_may_come() {
    for broken in 0..3 {
        let (setup, peer) = Setup::plain();
        let mut front = Netfront::connect(&setup.guest, 0, Features::LINUX);
        let queue = &mut front.queues[0];
        match broken {
            0 => queue.set_tx_producer(257),
            1 => queue.set_rx_producer(600),
            _ => {
                let (id, gref) = queue.take_id();
                queue.slot(&tx_slot(gref, 0, tx_flag::MORE_DATA, id, 60));
                queue.push();
            }
        }
        if broken == 1 {
            // It looks when it has something for the guest.
            peer.send(0, &Undone::default(), &plain(60, 1))
                .expect("sent");
        }
        let state = format!("{}/state", front.backend());
        setup.guest.wait_for(&state, Some("5"));
        let report = setup.bus.report(CLASS, 0).expect("a device");
        assert!(report.fault.is_some());
        front.close();
        setup.guest.put("device/vif/0/state", "1");
        let mut front = Netfront::connect(&setup.guest, 0, Features::LINUX);
        let packet = plain(100, 2);
        front.queues[0].send(&packet, 0, None);
        while peer.receive(0, SOON).expect("a packet").1 != packet {}
        assert_eq!(
            setup.bus.report(CLASS, 0).map(|r| r.backend),
            Some(State::Connected)
        );
        front.close();
    }
}

#[test]
fn only_the_guests_own_address_passes_the_filter() {
    let config = Config {
        filter: true,
        ..Config::new(0, OURS)
    };
    let (setup, peer) = Setup::with(config, Offloads::ALL, 1);
    let mut front = Netfront::connect(&setup.guest, 0, Features::LINUX);
    let queue = &mut front.queues[0];
    let (own, mut other) = (plain(100, 1), plain(100, 2));
    other[11] ^= 1;
    let dropped = queue.send(&other, 0, None);
    let sent = queue.send(&own, 0, None);
    assert_eq!(queue.answers(&dropped), [-2]);
    assert_eq!(queue.answers(&sent), [0]);
    assert!(peer.receive(0, SOON).expect("a packet").1 == own);
    let filtered = &setup.vif.counters().from_guest.filtered;
    assert_eq!(filtered.load(Ordering::Relaxed), 1);
    front.close();
}

#[test]
fn groups_that_nobody_subscribed_to_are_dropped() {
    let (setup, peer) = Setup::plain();
    let features = Features {
        multicast: true,
        ..Features::LINUX
    };
    let mut front = Netfront::connect(&setup.guest, 0, features);
    let queue = &mut front.queues[0];
    let group = [1, 0, 0x5e, 0, 0, 9];
    let to = |to: [u8; 6], seed| {
        let mut packet = plain(100, seed);
        packet[..6].copy_from_slice(&to);
        packet
    };
    let (all, few) = (to([0xff; 6], 1), to(group, 2));
    let send = |packet: &[u8]| peer.send(0, &Undone::default(), packet).expect("sent");
    send(&few);
    send(&all);
    assert!(queue.receive().bytes == all);
    let id = queue.subscribe(group, true);
    assert_eq!(queue.answer(id), 0);
    send(&few);
    assert!(queue.receive().bytes == few);
    let id = queue.subscribe(group, false);
    assert_eq!(queue.answer(id), 0);
    send(&few);
    send(&all);
    assert!(queue.receive().bytes == all);
    for n in 0..64 {
        let id = queue.subscribe([1, 0, 0x5e, 1, 0, n], true);
        assert_eq!(queue.answer(id), 0);
    }
    let id = queue.subscribe(group, true);
    assert_eq!(queue.answer(id), -1, "no more than 64");
    assert_eq!(setup.counts().1[1], 2);
    front.close();
}

#[test]
fn limits_hold_packets_back() {
    let limits = Limits {
        bytes: None,
        operations: Some(100),
    };
    let config = Config {
        to_guest: limits,
        from_guest: limits,
        ..Config::new(0, OURS)
    };
    let (setup, peer) = Setup::with(config, Offloads::ALL, 1);
    let mut front = Netfront::connect(&setup.guest, 0, Features::LINUX);
    let queue = &mut front.queues[0];
    let begun = std::time::Instant::now();
    let mut ids = Vec::new();
    for seed in 0..30 {
        ids.extend(queue.send(&plain(60, seed), 0, None));
        peer.send(0, &Undone::default(), &plain(60, seed))
            .expect("sent");
    }
    for seed in 0..30 {
        assert!(queue.receive().bytes == plain(60, seed));
        assert!(peer.receive(0, SOON).expect("a packet").1 == plain(60, seed));
    }
    assert!(queue.answers(&ids).iter().all(|status| *status == 0));
    // 30 packets, of which 10 are free.
    assert!(
        begun.elapsed() > Duration::from_millis(150),
        "{:?}",
        begun.elapsed()
    );
    front.close();
}

#[test]
fn a_full_link_keeps_packets_in_their_ring() {
    let (setup, peer) = Setup::plain();
    let mut front = Netfront::connect(&setup.guest, 0, Features::LINUX);
    let queue = &mut front.queues[0];
    let mut ids = Vec::new();
    for seed in 1..=15 {
        ids.extend(queue.put(&plain(60_000, seed), 0, None));
    }
    queue.push();
    for seed in 1..=15 {
        let (_, arrived) = peer.receive(0, SOON).expect("a packet");
        assert!(arrived == plain(60_000, seed), "packet {seed}");
    }
    assert!(queue.answers(&ids).iter().all(|status| *status == 0));
    assert_eq!(setup.counts().0, [15, 0, 0]);
    front.close();
}

#[test]
fn a_link_that_goes_down_drops_packets() {
    let (setup, peer) = Setup::plain();
    let mut front = Netfront::connect(&setup.guest, 0, Features::LINUX);
    assert_eq!(setup.vif.link().state(), LinkState::Up);
    drop(peer);
    let queue = &mut front.queues[0];
    let ids = queue.send(&plain(60, 1), 0, None);
    assert_eq!(queue.answers(&ids), [-2]);
    assert!(matches!(setup.vif.link().state(), LinkState::Down(_)));
    front.close();
}

#[test]
fn queues_work_beside_each_other() {
    let (setup, peer) = Setup::with(Config::new(0, OURS), Offloads::ALL, 3);
    let features = Features {
        queues: 3,
        ..Features::LINUX
    };
    let mut front = Netfront::connect(&setup.guest, 0, features);
    for round in 0..20 {
        for n in 0..3 {
            let seed = u32::try_from(n).expect("small") * 100 + round;
            front.queues[n].send(&plain(3000, seed), 0, None);
            peer.send(n, &Undone::default(), &plain(200, seed))
                .expect("sent");
        }
        for n in 0..3 {
            let seed = u32::try_from(n).expect("small") * 100 + round;
            assert!(peer.receive(n, SOON).expect("a packet").1 == plain(3000, seed));
            assert!(front.queues[n].receive().bytes == plain(200, seed));
        }
    }
    front.close();
}

#[test]
fn ending_leaves_nothing_in_use() {
    let (setup, peer) = Setup::plain();
    let mut front = Netfront::connect(&setup.guest, 0, Features::LINUX);
    for seed in 0..10 {
        // Some of it is still on its way then.
        front.queues[0].send(&plain(30_000, seed), 0, None);
        peer.send(0, &Undone::default(), &plain(100, seed))
            .expect("sent");
        if seed == 5 {
            front.queues[0].receive();
        }
    }
    setup.bus.end();
    front.assert_unused();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    /// A frontend that writes anything into its rings: nothing panics or hangs, no grant
    /// stays in use, and an honest one beside it is served.
    #[test]
    fn hostile_frontends(
        slots in prop::collection::vec(any::<[u8; 12]>(), 1..120), tame in 0u8..3,
        producer in prop::option::of(any::<u32>()), posted in prop::collection::vec(any::<u32>(), 0..60),
    ) {
        let (setup, peer) = Setup::plain();
        let (link, other) = pair(1, Offloads::ALL).expect("sockets");
        let honest = Arc::new(Vif::new(Box::new(link), Config::new(1, OURS), 1));
        setup.bus.attach(honest).expect("attached");
        let mut good = Netfront::connect(&setup.guest, 1, Features::LINUX);
        let mut bad = Netfront::offer(&setup.guest, 0, Features::LINUX);
        bad.wait_connected();
        let queue = &mut bad.queues[0];
        for page in posted {
            // Its own pages, its very rings, and what is not granted at all.
            let gref = match page % 280 {
                page @ 0..270 => queue.gref(page as usize),
                other => 1800 + other,
            };
            queue.post_raw(gref);
        }
        queue.set_rx_producer(producer.unwrap_or(60) % 300);
        for mut slot in slots {
            if tame > 0 {
                // Grants of its own, and nearly right otherwise.
                let (_, gref) = queue.take_id();
                slot[..4].copy_from_slice(&gref.to_le_bytes());
                slot[5] &= 7;
                slot[6] &= if tame == 1 { 0x0d } else { 0x01 };
                slot[7] = 0;
                slot[11] &= 7;
            }
            queue.slot(&slot);
            let _ = peer.send(0, &Undone::default(), &plain(5000, 3));
        }
        queue.push();
        if let Some(producer) = producer {
            queue.set_tx_producer(producer);
        }
        for seed in 0..5 {
            good.queues[0].send(&plain(3000, seed), 0, None);
            prop_assert!(other.receive(0, SOON).expect("a packet").1 == plain(3000, seed));
            other.send(0, &Undone::default(), &plain(6000, seed)).expect("sent");
            prop_assert!(good.queues[0].receive().bytes == plain(6000, seed));
        }
        bad.put("state", 6);
        setup.guest.wait_for(&format!("{}/state", bad.backend()), Some("6"));
        bad.assert_unused();
        good.close();
    }
}
