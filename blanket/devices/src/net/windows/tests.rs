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
fn limited(windows: &mut Windows, packet: &[u8]) -> u16 {
    let mut packet = packet.to_vec();
    let found = Transport::find(&packet, packet.len()).expect("TCP");
    windows.limit(&mut packet, &found, true);
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
        let mut windows = Windows::new(MOST);
        let ack = |window| packet(build, 0x10, &[], window, &[9; 333]);
        assert_eq!(limited(&mut windows, &ack(50_000)), 50_000, "not known");
        let syn = packet(build, SYN, SCALE, 64_240, &[]);
        assert_eq!(limited(&mut windows, &syn), 64_240, "not scaled");
        assert_eq!(limited(&mut windows, &ack(50_000)), 1250);
        assert_eq!(limited(&mut windows, &ack(1250)), 1250);
        assert_eq!(limited(&mut windows, &ack(0)), 0);
        // Another stream between the same machines.
        let mut other = build;
        other.source.1 += 1;
        let other = packet(other, 0x10, &[], 50_000, &[]);
        assert_eq!(limited(&mut windows, &other), 50_000);
        // The ports are used again, without scaling.
        let syn = packet(build, SYN | 0x10, &[2, 4, 5, 0xb4], 64_240, &[]);
        assert_eq!(limited(&mut windows, &syn), 64_240);
        assert_eq!(limited(&mut windows, &ack(64_000)), 64_000);
        let mut windows = Windows::new(10_000);
        assert_eq!(limited(&mut windows, &syn), 10_000);
        assert_eq!(limited(&mut windows, &ack(64_000)), 10_000);
    }
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
            Windows::new(MOST).limit(&mut bytes, &found, true);
            let at = found.start + WINDOW;
            prop_assert!(bytes[..at] == before[..at] && bytes[at + 4..] == before[at + 4..]);
        }
    }
}
