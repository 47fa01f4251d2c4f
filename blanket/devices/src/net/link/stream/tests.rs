use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;
use crate::net::link::LinkState;
use crate::net::scratch::Scratch;
use crate::net::tests::packets::plain;

fn stream() -> (Stream, OwnedFd, Health) {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .expect("sockets");
    let health = Health::default();
    let stream = Stream::new(ours, "the stream".into(), health.clone());
    (stream, theirs, health)
}

fn receive(stream: &mut Stream) -> Option<Vec<u8>> {
    let (one, two) = (Scratch::new(1000), Scratch::new(70_000));
    let received = stream.receive(&[one.buffer(1000), two.buffer(70_000)])?;
    let mut bytes = vec![0; received.length];
    let first = received.length.min(1000);
    one.read(0, &mut bytes[..first]);
    two.read(0, &mut bytes[first..]);
    Some(bytes)
}

#[test]
fn a_packet_that_does_not_fit_is_ended_later() {
    let (mut stream, theirs, _) = stream();
    let packets: Vec<_> = (1..100).map(|seed| plain(30_000, seed)).collect();
    let (mut sent, mut read, mut full) = (0, Vec::new(), 0);
    let expected: usize = packets.iter().map(|packet| packet.len() + PREFIX).sum();
    let mut bytes = vec![0; 50_000];
    while read.len() < expected {
        while let Some(packet) = packets.get(sent) {
            let scratch = Scratch::new(packet.len());
            scratch.write(0, packet);
            let half = scratch.buffer(packet.len() / 2);
            let rest = Scratch::new(packet.len() - half.length());
            rest.write(0, &packet[half.length()..]);
            let parts = [half, rest.buffer(packet.len())];
            match stream.send(&Undone::default(), &parts) {
                Ok(()) => sent += 1,
                Err(NotSent::Full) => {
                    full += 1;
                    break;
                }
                Err(error) => panic!("{error}"),
            }
        }
        while let Ok(count) = rustix::io::read(&theirs, &mut bytes[..]) {
            read.extend(&bytes[..count]);
            if sent < packets.len() {
                break;
            }
        }
        stream.flush();
    }
    assert!(full > 0, "the socket was full at times");
    let mut rest = &read[..];
    for packet in &packets {
        let (prefix, next) = rest.split_first_chunk::<PREFIX>().expect("a prefix");
        assert_eq!(u32::from_be_bytes(*prefix) as usize, packet.len());
        let (whole, next) = next.split_at(packet.len());
        assert!(whole == packet);
        rest = next;
    }
    assert!(rest.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 64, failure_persistence: None, ..ProptestConfig::default()
    })]

    /// Packets are found whole however the stream is cut.
    #[test]
    fn packets_come_whole(
        lengths in prop::collection::vec(14usize..LONGEST, 1..6),
        mut cuts in prop::collection::vec(prop_oneof![1usize..8, 1usize..40_000], 1..8),
    ) {
        cuts.push(20_000);
        let (mut stream, theirs, _) = stream();
        let packets: Vec<_> = (1..).zip(&lengths).map(|(seed, length)| plain(*length, seed)).collect();
        let mut wire = Vec::new();
        for packet in &packets {
            wire.extend(u32::try_from(packet.len()).expect("short").to_be_bytes());
            wire.extend(packet);
        }
        let (mut at, mut got) = (0, Vec::new());
        for cut in cuts.iter().cycle() {
            let end = (at + cut).min(wire.len());
            at += rustix::io::write(&theirs, &wire[at..end]).unwrap_or(0);
            while let Some(packet) = receive(&mut stream) {
                got.push(packet);
            }
            if at == wire.len() {
                break;
            }
        }
        prop_assert!(got == packets);
    }

    #[test]
    fn other_bytes_end_the_link(bytes in prop::collection::vec(any::<u8>(), 4..200)) {
        let (mut stream, theirs, health) = stream();
        rustix::io::write(&theirs, &bytes).expect("written");
        drop(theirs);
        while receive(&mut stream).is_some() {}
        prop_assert!(matches!(health.state(), LinkState::Down(_)));
        prop_assert!(stream.event().is_none());
    }
}
