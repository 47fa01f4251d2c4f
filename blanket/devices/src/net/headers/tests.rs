use proptest::prelude::*;

use super::*;
use crate::net::tests::packets::{Build, checksum_is_right};

#[test]
fn layer_4_is_found() {
    for tags in 0..=2 {
        for build in [
            Build {
                tags,
                ..Build::tcp4()
            },
            Build {
                tags,
                v6: true,
                ..Build::tcp4()
            },
            Build {
                tags,
                udp: true,
                ..Build::tcp4()
            },
            Build {
                tags,
                v6: true,
                udp: true,
                extensions: 2,
                ..Build::tcp4()
            },
        ] {
            let packet = build.packet(&[7; 100]);
            let found = Transport::find(&packet, packet.len()).expect("TCP or UDP");
            let family = if build.v6 { Family::V6 } else { Family::V4 };
            assert_eq!(found.family, family);
            assert_eq!(found.end, packet.len());
            assert_eq!(found.payload, packet.len() - 100);
            // A header that is cut anywhere is not found.
            for length in 0..found.payload {
                assert_eq!(Transport::find(&packet[..length], packet.len()), None);
            }
            assert_eq!(
                Transport::find(&packet, packet.len() - 1),
                None,
                "its end is missing"
            );
        }
    }
    let padded = {
        let mut packet = Build::tcp4().packet(&[]);
        packet.resize(60, 0xaa);
        packet
    };
    let found = Transport::find(&padded, 60).expect("TCP");
    assert_eq!(found.end, 54, "padding is not of the packet");
}

#[test]
fn fragments_and_others_are_not() {
    let mut packet = Build::tcp4().packet(&[1; 50]);
    packet[20] = 0x20;
    assert_eq!(
        Transport::find(&packet, packet.len()),
        None,
        "more fragments"
    );
    packet[20] = 0x40;
    assert!(
        Transport::find(&packet, packet.len()).is_some(),
        "do not fragment"
    );
    packet[23] = 1;
    assert_eq!(Transport::find(&packet, packet.len()), None, "ICMP");
}

#[test]
fn a_blank_checksum_and_the_rest_make_the_whole() {
    for (v6, udp) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut packet = Build {
            v6,
            udp,
            ..Build::tcp4()
        }
        .packet(&[0x5a; 333]);
        let found = Transport::find(&packet, packet.len()).expect("TCP or UDP");
        let pseudo = found.pseudo(&packet);
        let at = found.checksum_at();
        packet[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
        let mut sum = Sum::default();
        sum.add(&packet[found.start..found.end]);
        packet[at..at + 2].copy_from_slice(&sum.checksum().to_be_bytes());
        assert!(checksum_is_right(&packet));
    }
}

proptest! {
    /// The sum is that of RFC 1071, however the bytes are split.
    #[test]
    fn sums(bytes in prop::collection::vec(any::<u8>(), 0..300), cuts in prop::collection::vec(0usize..300, 0..6)) {
        let mut slow: u64 = 0;
        for pair in bytes.chunks(2) {
            slow += u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
        }
        while slow > 0xffff {
            slow = (slow & 0xffff) + (slow >> 16);
        }
        let mut cuts: Vec<_> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let mut sum = Sum::default();
        for cut in cuts.windows(2) {
            sum.add(&bytes[cut[0]..cut[1]]);
        }
        prop_assert_eq!(u64::from(sum.value()), slow);
    }

    #[test]
    fn any_bytes(mut bytes in prop::collection::vec(any::<u8>(), 0..HEAD), length in 0usize..70_000, likely in 0u8..4) {
        let kinds = [[8, 0, 0x45], [0x86, 0xdd, 0x60], [0x81, 0, 0]];
        if let (Some(kind), true) = (kinds.get(usize::from(likely)), bytes.len() > 30) {
            bytes[12..15].copy_from_slice(kind);
            bytes[23] = 6;
        }
        if let Some(found) = Transport::find(&bytes, length) {
            prop_assert!(found.start + 8 <= found.payload && found.payload <= found.end);
            prop_assert!(found.end <= length && found.payload <= bytes.len());
            let _ = found.pseudo(&bytes);
        }
    }
}
