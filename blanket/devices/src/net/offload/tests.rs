use proptest::prelude::*;

use super::*;
use crate::net::tests::packets::Build;

const CUT: Gso = Gso {
    kind: GsoKind::TcpV4,
    size: 1448,
};

#[test]
fn what_a_guest_leaves_undone() {
    let mut packet = Build::tcp4().packet(&[3; 3000]);
    let length = packet.len();
    let ask = |head: &mut [u8], blank, gso| Undone::from_guest(head, length, blank, gso);
    let (undone, found) = ask(&mut packet[..HEAD], false, None).expect("anything");
    assert_eq!((undone, found), (Undone::default(), None));
    let (undone, _) = ask(&mut packet[..HEAD], true, Some(CUT)).expect("TCP");
    let blank = Blank {
        start: 34,
        offset: 16,
    };
    assert_eq!(undone.blank, Some(blank));
    assert_eq!(undone.cut, Some((CUT, 54)));
    let v6 = Gso {
        kind: GsoKind::TcpV6,
        ..CUT
    };
    assert_eq!(ask(&mut packet[..HEAD], true, Some(v6)), Err(Bad::Headers));
    // With a checksum that is whole: blanked.
    let before = packet[50..52].to_vec();
    ask(&mut packet[..HEAD], false, Some(CUT)).expect("TCP");
    assert_ne!(packet[50..52], before);
    let mut udp = Build {
        udp: true,
        ..Build::tcp4()
    }
    .packet(&[3; 3000]);
    let length = udp.len();
    assert!(Undone::from_guest(&mut udp[..HEAD], length, true, None).is_ok());
    assert_eq!(
        Undone::from_guest(&mut udp[..HEAD], length, true, Some(CUT)),
        Err(Bad::Headers)
    );
    assert_eq!(
        Undone::from_guest(&mut [0; 60], 60, true, None),
        Err(Bad::Headers),
        "nothing to make a checksum of"
    );
}

#[test]
fn what_a_guest_is_left_to_do() {
    let packet = Build::tcp4().packet(&[3; 3000]);
    let (head, length) = (&packet[..HEAD], packet.len());
    let blank = Blank {
        start: 34,
        offset: 16,
    };
    let undone = Undone {
        blank: Some(blank),
        ..Undone::default()
    };
    let both = rx_flag::CSUM_BLANK | rx_flag::DATA_VALIDATED;
    let pass = |flags, gso| ToGuest::Pass { flags, gso };
    assert_eq!(
        undone.to_guest(head, length, Offloads::ALL),
        pass(both, None)
    );
    let none = Offloads::default();
    let sum = ToGuest::Sum(blank);
    assert_eq!(undone.to_guest(head, length, none), sum);
    // A checksum inside: the guest would look for it in the outermost headers.
    let inner = Blank {
        start: 84,
        offset: 6,
    };
    let inside = Undone {
        blank: Some(inner),
        ..Undone::default()
    };
    assert_eq!(
        inside.to_guest(head, length, Offloads::ALL),
        ToGuest::Sum(inner)
    );
    let long = Undone {
        cut: Some((CUT, 54)),
        ..undone
    };
    assert_eq!(
        long.to_guest(head, length, Offloads::ALL),
        pass(both, Some(CUT))
    );
    assert_eq!(long.to_guest(head, length, none), ToGuest::Drop);
    let valid = Undone {
        validated: true,
        ..Undone::default()
    };
    assert_eq!(
        valid.to_guest(head, length, none),
        pass(rx_flag::DATA_VALIDATED, None)
    );
    assert_eq!(
        Undone::default().to_guest(head, length, none),
        pass(0, None)
    );
}

proptest! {
    #[test]
    fn the_header_and_back(start in any::<u16>(), offset in any::<u16>(), size in 1u16.., headers in any::<u16>(), v6 in any::<bool>(), parts in 0u8..4) {
        let kind = if v6 { GsoKind::TcpV6 } else { GsoKind::TcpV4 };
        let undone = Undone {
            blank: (parts & 1 != 0).then_some(Blank { start, offset }),
            validated: false,
            cut: (parts & 2 != 0).then_some((Gso { kind, size }, headers)),
        };
        prop_assert_eq!(Undone::decode(&undone.encode()), Some(undone));
    }

    #[test]
    fn any_header(bytes in any::<[u8; HEADER]>(), packet in prop::collection::vec(any::<u8>(), 14..HEAD)) {
        if let Some(undone) = Undone::decode(&bytes) {
            let _ = undone.to_guest(&packet, packet.len(), Offloads::ALL);
        }
    }
}
