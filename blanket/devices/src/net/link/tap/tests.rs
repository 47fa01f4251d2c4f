use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::*;
use crate::net::offload::Undone;
use crate::net::protocol::{Gso, GsoKind, rx_flag};
use crate::net::tests::Setup;
use crate::net::tests::namespace::{ip, with_own_network};
use crate::net::tests::packets::{Build, pattern};
use crate::net::tests::tcp::Connection;
use crate::net::{Config, Mac};
use crate::testing::{Features, Netfront};

const OURS: Mac = Mac::new([0x00, 0x16, 0x3e, 0, 0, 2]);
const SOON: Duration = Duration::from_secs(20);

#[test]
fn errors_say_what_mends_them() {
    with_own_network(|| {
        ip("tuntap add single mode tap");
        let open = |name| Tap::open(name, 4).map(|tap| tap.max_queues());
        for (name, says) in [
            ("none", "ip tuntap add none mode tap"),
            ("lo", "lo is no tap"),
            ("", "cannot be the name"),
            ("a/b", "cannot be the name"),
            ("a-name-too-long-", "cannot be the name"),
        ] {
            let error = open(name).expect_err("no tap").to_string();
            assert!(error.contains(says), "{error}");
        }
        let held = Tap::open("single", 4).expect("a tap");
        assert_eq!(held.max_queues(), 1, "made without multi_queue");
        let error = open("single").expect_err("in use").to_string();
        assert!(error.contains("single is in use"), "{error}");
        drop(held);
        // A test beside this one may just start a process, which holds it until it is another program.
        let until = Instant::now() + SOON;
        let again = loop {
            match open("single") {
                Err(Error::Busy(_)) if Instant::now() < until => std::thread::yield_now(),
                opened => break opened,
            }
        };
        assert_eq!(again.expect("free again"), 1);
    });
}

#[test]
fn queues_are_attached_as_they_are_used() {
    with_own_network(|| {
        ip("tuntap add many mode tap multi_queue");
        ip("addr add 10.5.0.1/24 dev many");
        let tap = Tap::open("many", 3).expect("a tap");
        // Then it is up at once; else the host would see the carrier later.
        ip("link set many up");
        assert_eq!(tap.max_queues(), 3);
        for queues in [2, 1, 3, 3] {
            let ports = tap.open(queues, Offloads::ALL).expect("attached");
            assert_eq!(ports.len(), queues as usize);
            for port in &ports {
                let scratch = crate::net::scratch::Scratch::new(2048);
                let mut probe = crate::net::link::user::arp_probe(OURS);
                probe[38..42].copy_from_slice(&[10, 5, 0, 1]);
                scratch.write(0, &probe);
                let parts = [scratch.buffer(probe.len())];
                let mut port = crate::sync::lock(port);
                port.send(&Undone::default(), &parts).expect("sent");
            }
            // The host answers through whichever queue it likes.
            let mut answers = 0;
            while answers < queues {
                for port in &ports {
                    let scratch = crate::net::scratch::Scratch::new(2048);
                    let mut port = crate::sync::lock(port);
                    if port.receive(&[scratch.buffer(2048)]).is_some() {
                        let mut bytes = [0; 22];
                        scratch.read(0, &mut bytes);
                        answers += u32::from(bytes[12..14] == [8, 6] && bytes[21] == 2);
                    }
                }
            }
        }
    });
}

#[test]
fn it_announces_while_a_queue_is_served() {
    with_own_network(|| {
        ip("tuntap add served mode tap");
        let tap = Tap::open("served", 1).expect("a tap");
        ip("link set served up");
        let ports = tap.open(1, Offloads::ALL).expect("attached");
        let heard = || {
            let devices = std::fs::read_to_string("/proc/thread-self/net/dev").expect("counters");
            let line = devices
                .lines()
                .find_map(|line| line.trim().strip_prefix("served:"));
            let mut counters = line.expect("the tap's").split_whitespace();
            counters.nth(1).map(str::to_owned).expect("packets")
        };
        assert_eq!(heard(), "0");
        // As its thread does, for as long as it lives.
        let held = crate::sync::lock(&ports[0]);
        tap.announce(&OURS.announcement());
        assert_eq!(heard(), "1");
        drop(held);
    });
}

/// A guest with a device on a tap at 10.5.0.1.
fn tap_and_guest(features: Features) -> (Setup, Netfront) {
    ip("tuntap add tap0 mode tap");
    ip("addr add 10.5.0.1/24 dev tap0");
    let tap = Tap::open("tap0", 1).expect("a tap");
    // Then it is up at once; else the host would see the carrier later.
    ip("link set tap0 up");
    ip("neigh add 10.5.0.2 lladdr 00:16:3e:00:00:02 dev tap0");
    let setup = Setup::new(Box::new(tap), Config::new(0, OURS), 1);
    let front = Netfront::connect(&setup.guest, 0, features);
    (setup, front)
}

fn build() -> Build {
    Build {
        to: [0xff; 6],
        source: ([10, 5, 0, 2], 4000),
        target: ([10, 5, 0, 1], 80),
        ..Build::tcp4()
    }
}

fn talk(features: Features) {
    let (setup, mut front) = tap_and_guest(features);
    let listener = TcpListener::bind("10.5.0.1:80").expect("a listener");
    let to_host = pattern(20_000, 7);
    let to_guest = pattern(30_000, 9);
    let mut build = build();
    build.to = host_address(&mut front);
    let mut connection = Connection::open(&mut front.queues[0], build);
    let (mut socket, _) = listener.accept().expect("connected");
    let cut = Gso {
        kind: GsoKind::TcpV4,
        size: 536,
    };
    if features.gso4 {
        connection.send(&to_host, Some(cut));
    } else {
        for part in to_host.chunks(536) {
            connection.send(part, None);
        }
    }
    let mut arrived = vec![0; to_host.len()];
    socket.read_exact(&mut arrived).expect("all of it");
    assert!(arrived == to_host);
    socket.write_all(&to_guest).expect("all of it");
    connection.receive(to_guest.len());
    assert!(connection.received == to_guest);
    let long = connection
        .packets
        .iter()
        .filter(|(_, _, gso)| *gso == Some(cut));
    let blank = connection
        .packets
        .iter()
        .filter(|(_, flags, _)| flags & rx_flag::CSUM_BLANK != 0);
    let (long, blank) = (long.count(), blank.count());
    if features.gso4 {
        assert!(long > 0 && blank >= long, "the host left work to the guest");
    } else {
        assert_eq!((long, blank), (0, 0));
        assert!(
            connection
                .packets
                .iter()
                .all(|(length, ..)| *length <= 1514)
        );
    }
    let counters = setup.vif.counters();
    assert_eq!(counters.from_guest.errors.load(Ordering::Relaxed), 0);
    assert_eq!(counters.to_guest.errors.load(Ordering::Relaxed), 0);
    front.close();
}

/// Asks for the host's address.
fn host_address(front: &mut Netfront) -> [u8; 6] {
    let mut probe = crate::net::link::user::arp_probe(OURS);
    probe[28..32].copy_from_slice(&[10, 5, 0, 2]);
    probe[38..42].copy_from_slice(&[10, 5, 0, 1]);
    front.queues[0].send(&probe, 0, None);
    loop {
        let got = front.queues[0].receive().bytes;
        if got[12..14] == [8, 6] && got[21] == 2 {
            return got[6..12].try_into().expect("six bytes");
        }
    }
}

#[test]
fn a_guest_talks_with_the_host_in_long_packets() {
    with_own_network(|| talk(Features::LINUX));
}

#[test]
fn a_guest_that_can_nothing_talks_with_the_host() {
    with_own_network(|| talk(Features::NONE));
}

#[test]
fn a_tap_that_is_removed_is_down() {
    with_own_network(|| {
        let (setup, mut front) = tap_and_guest(Features::LINUX);
        assert_eq!(setup.vif.link().state(), LinkState::Up);
        ip("link set tap0 down");
        let packet = build().packet(&[]);
        let ids = front.queues[0].send(&packet, 0, None);
        assert_eq!(front.queues[0].answers(&ids), [-1], "not up");
        assert_eq!(
            setup.vif.link().state(),
            LinkState::Up,
            "it may come up again"
        );
        ip("link del tap0");
        let ids = front.queues[0].send(&packet, 0, None);
        assert_eq!(front.queues[0].answers(&ids), [-2], "gone");
        assert!(
            matches!(setup.vif.link().state(), LinkState::Down(why) if why.contains("removed"))
        );
        front.close();
    });
}
