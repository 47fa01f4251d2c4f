use proptest::prelude::*;

use super::*;
use crate::net::headers::HEAD;
use crate::net::tests::packets::{Build, checksum_is_right};

const MOST: u32 = 160_000;
const SCALE: &[u8] = &[1, 3, 3, 7];

/// A packet with a window.
fn packet(build: Build, flags: u8, options: &'static [u8], window: u16, payload: &[u8]) -> Vec<u8> {
    let build = Build {
        flags,
        options,
        ..build
    };
    let mut packet = build.blank(payload);
    let found = Transport::find(&packet, packet.len()).expect("TCP");
    packet[found.start + WINDOW..found.start + WINDOW + 2].copy_from_slice(&window.to_be_bytes());
    let mut sum = Sum::default();
    sum.add(&packet[found.start..]);
    let at = found.checksum_at();
    packet[at..at + 2].copy_from_slice(&sum.checksum().to_be_bytes());
    assert!(checksum_is_right(&packet));
    packet
}

/// The window of a packet after it was limited.
fn limited(streams: &mut Streams, packet: &[u8]) -> u16 {
    let mut packet = packet.to_vec();
    let found = Transport::find(&packet, packet.len()).expect("TCP");
    let segment = Streams::segment(&packet, &found).expect("TCP");
    streams.limit(segment, &mut packet, &found, true);
    assert!(checksum_is_right(&packet));
    let at = found.start + WINDOW;
    u16::from_be_bytes([packet[at], packet[at + 1]])
}

#[test]
fn a_window_is_made_as_small_as_the_room() {
    for v6 in [false, true] {
        let build = Build {
            v6,
            ..Build::tcp4()
        };
        let mut streams = Streams::new(MOST);
        let ack = |window| packet(build, 0x10, &[], window, &[9; 333]);
        assert_eq!(limited(&mut streams, &ack(50_000)), 50_000, "not known");
        let syn = packet(build, SYN, SCALE, 64_240, &[]);
        assert_eq!(limited(&mut streams, &syn), 64_240, "not scaled");
        assert_eq!(limited(&mut streams, &ack(50_000)), 1250);
        assert_eq!(limited(&mut streams, &ack(1250)), 1250);
        assert_eq!(limited(&mut streams, &ack(0)), 0);
        // Another stream between the same machines.
        let mut other = build;
        other.source.1 += 1;
        let other = packet(other, 0x10, &[], 50_000, &[]);
        assert_eq!(limited(&mut streams, &other), 50_000);
        // The ports are used again, without scaling.
        let syn = packet(build, SYN | 0x10, &[2, 4, 5, 0xb4], 64_240, &[]);
        assert_eq!(limited(&mut streams, &syn), 64_240);
        assert_eq!(limited(&mut streams, &ack(64_000)), 64_000);
        let mut streams = Streams::new(10_000);
        assert_eq!(limited(&mut streams, &syn), 10_000);
        assert_eq!(limited(&mut streams, &ack(64_000)), 10_000);
    }
}

/// What passt does with the packets that it finds in its socket, as far as it matters here: it
/// takes them all at once, and those of a stream together. `None`: it counts below zero.
struct Passt {
    state: State,
    /// It ends itself with the answer to the guest's last packet.
    closed: bool,
}

impl Passt {
    fn takes(&mut self, batch: &[u8]) -> Option<()> {
        let mut left = batch.len();
        while left > 0 {
            // It looks at the first one each time.
            let first = batch[0];
            let done = match self.state {
                _ if first & SYN != 0 => {
                    self.state = State::Begins;
                    1
                }
                State::Ends if !self.closed => {
                    self.closed = true;
                    1
                }
                State::Begins if batch.len() == 1 => 1,
                _ => batch.len(),
            };
            if first & SYN == 0 && self.state == State::Begins {
                self.state = State::Open;
            }
            if batch.iter().any(|flags| flags & (FIN | RST) != 0) {
                self.state = State::Ends;
            }
            left = left.checked_sub(done)?;
        }
        Some(())
    }
}

const ACK: u8 = 0x10;

proptest! {
    /// Whatever a guest sends and repeats, and whenever it is taken.
    #[test]
    fn what_begins_and_ends_a_stream_is_taken_apart(
        packets in prop::collection::vec((0usize..7, 0u8..4), 1..60),
    ) {
        const KINDS: [u8; 7] = [SYN, SYN | ACK, ACK, ACK, FIN | ACK, RST, RST | ACK];
        let mut streams = Streams::new(MOST);
        let mut passt = Passt { state: State::Open, closed: false };
        let mut queue: Vec<u8> = Vec::new();
        let mut known = false;
        for (kind, when) in packets {
            let flags = KINDS[kind];
            // It is another stream until it begins.
            known |= flags & SYN != 0;
            if !known {
                continue;
            }
            if flags & SYN != 0 && passt.state == State::Ends {
                passt.closed = false;
            }
            let segment = Segment { place: 7, flags };
            if when == 0 || streams.waits(segment, || queue.is_empty()) {
                prop_assert!(passt.takes(&queue).is_some(), "{queue:x?}");
                queue.clear();
            }
            prop_assert!(!streams.waits(segment, || queue.is_empty()));
            queue.push(flags);
            streams.sent(segment);
        }
        prop_assert!(passt.takes(&queue).is_some(), "{queue:x?}");
    }
}

#[test]
fn only_what_may_hang_it_waits() {
    let mut streams = Streams::new(MOST);
    let mut goes = |place, flags, taken| {
        let segment = Segment { place, flags };
        let waits = streams.waits(segment, || taken);
        if !waits {
            streams.sent(segment);
        }
        !waits
    };
    assert!(goes(1, SYN, false), "the first of all");
    assert!(!goes(1, SYN, false), "once more");
    assert!(!goes(1, RST, false));
    assert!(goes(2, SYN, false), "another stream");
    assert!(goes(1, ACK, false));
    for _ in 0..3 {
        assert!(goes(1, ACK, false), "data");
    }
    assert!(goes(1, FIN | ACK, false));
    assert!(!goes(1, ACK, false), "what follows the last");
    assert!(goes(1, ACK, true));
    assert!(!goes(1, ACK, false));
    assert!(goes(2, ACK, false) && goes(2, RST, false), "an open one");
    assert!(!goes(2, RST, false));
}

#[test]
fn scales_are_found() {
    for (options, expected) in [
        (&[][..], 0),
        (&[2, 4, 5, 0xb4, 1, 3, 3, 9], 9),
        (&[1, 1, 3, 3, 200], MAX_SCALE),
        (&[0, 3, 3, 9], 0),
        (&[5, 0, 5, 0, 3, 3, 9], 9),
        (&[5, 255, 3, 3, 9], 0),
        (&[3, 3], 0),
        (&[3], 0),
    ] {
        assert_eq!(scale(options), expected, "{options:?}");
    }
}

proptest! {
    #[test]
    fn any_options(bytes in prop::collection::vec(any::<u8>(), 0..44)) {
        prop_assert!(scale(&bytes) <= MAX_SCALE);
    }

    #[test]
    fn any_headers(mut bytes in prop::collection::vec(any::<u8>(), 54..HEAD), length in 54usize..70_000) {
        bytes[12..15].copy_from_slice(&[8, 0, 0x45]);
        bytes[20..22].copy_from_slice(&[0, 0]);
        bytes[23] = 6;
        if let Some(found) = Transport::find(&bytes, length) {
            let before = bytes.clone();
            if let Some(segment) = Streams::segment(&bytes, &found) {
                Streams::new(MOST).limit(segment, &mut bytes, &found, true);
            }
            let at = found.start + WINDOW;
            prop_assert!(bytes[..at] == before[..at] && bytes[at + 4..] == before[at + 4..]);
        }
    }
}
