use proptest::prelude::*;

use super::*;
use crate::testing::tx_slot;

fn decode(slots: &[[u8; TX_SLOT]]) -> (Chain, Result<Result<Ask, Bad>, Broken>) {
    let mut chain = Chain::new(256);
    let mut seen = 0;
    let waiting = u32::try_from(slots.len()).expect("few");
    let result = chain.decode(waiting, |ahead| {
        assert_eq!(ahead, seen, "each slot once, in order");
        seen += 1;
        slots[ahead as usize]
    });
    (chain, result)
}

fn extra(kind: u8, more: bool, data: [u8; 6]) -> [u8; TX_SLOT] {
    let mut slot = [0; TX_SLOT];
    slot[0] = kind;
    slot[1] = u8::from(more);
    slot[2..8].copy_from_slice(&data);
    slot
}

#[test]
fn a_packet_with_an_extra_and_three_pieces() {
    let more = tx_flag::MORE_DATA;
    let first = more | tx_flag::EXTRA_INFO | tx_flag::CSUM_BLANK;
    let slots = [
        tx_slot(11, 100, first, 1, 10_000),
        extra(extra_type::HASH, true, [1; 6]),
        extra(extra_type::GSO, false, [0xa8, 5, 1, 0, 0, 0]),
        tx_slot(12, 0, more, 2, 4096),
        tx_slot(13, 4095, 0, 3, 1),
        tx_slot(14, 0, 0, 4, 60),
    ];
    // What the others leave to the first is more than a page.
    let (_, result) = decode(&slots);
    assert!(matches!(result, Ok(Err(Bad::CrossesPage { .. }))));
    let mut slots = slots;
    slots[0] = tx_slot(11, 100, first, 1, 4096 + 1 + 3996);
    let (chain, result) = decode(&slots);
    assert_eq!(result, Ok(Ok(Ask::Send)));
    assert!(chain.csum_blank);
    let gso = Gso {
        kind: GsoKind::TcpV4,
        size: 1448,
    };
    assert_eq!(chain.gso, Some(gso));
    let pieces: Vec<_> = chain.pieces.iter().map(|p| (p.gref, p.length)).collect();
    assert_eq!(pieces, [(11, 3996), (12, 4096), (13, 1)]);
    let answers: Vec<_> = chain.responses(Status::Error).collect();
    let (error, null) = ([0xff, 0xff], [1, 0]);
    assert_eq!(chain.slots(), 5);
    for (answer, (id, status)) in
        answers
            .iter()
            .zip([(1, error), (0, null), (0, null), (2, error), (3, error)])
    {
        assert_eq!(*answer, [id, 0, status[0], status[1]]);
    }
}

#[test]
fn what_is_wrong_is_said() {
    let gso = |size: u16, kind| {
        let [a, b] = size.to_le_bytes();
        extra(extra_type::GSO, false, [a, b, kind, 0, 0, 0])
    };
    let with = tx_flag::EXTRA_INFO;
    let more = tx_flag::MORE_DATA;
    for (slots, bad) in [
        (vec![tx_slot(1, 0, 0, 1, 13)], Bad::Short(13)),
        (
            vec![tx_slot(1, 4090, 0, 1, 14)],
            Bad::CrossesPage {
                offset: 4090,
                length: 14,
            },
        ),
        (
            vec![tx_slot(1, 0xffff, 0, 1, 0xffff)],
            Bad::CrossesPage {
                offset: 0xffff,
                length: 0xffff,
            },
        ),
        (
            vec![tx_slot(1, 0, more, 1, 100), tx_slot(1, 0, 0, 2, 101)],
            Bad::Sizes(100, 101),
        ),
        (vec![tx_slot(1, 0, with, 1, 60), gso(0, 1)], Bad::Extra(1)),
        (vec![tx_slot(1, 0, with, 1, 60), gso(9, 3)], Bad::Extra(1)),
        (
            vec![tx_slot(1, 0, with, 1, 60), extra(0, false, [0; 6])],
            Bad::Extra(0),
        ),
        (
            vec![
                tx_slot(1, 0, with, 1, 60),
                extra(extra_type::XDP, false, [0; 6]),
            ],
            Bad::Extra(5),
        ),
        // No group.
        (
            vec![
                tx_slot(1, 0, with, 1, 60),
                extra(extra_type::MCAST_ADD, false, [2; 6]),
            ],
            Bad::Extra(2),
        ),
    ] {
        let (chain, result) = decode(&slots);
        assert_eq!(result, Ok(Err(bad)));
        assert_eq!(chain.slots() as usize, slots.len(), "all are answered");
    }
    let long: Vec<_> = (0..40)
        .map(|n| {
            tx_slot(
                1,
                0,
                if n < 39 { more } else { 0 },
                n,
                if n == 0 { 4000 } else { 100 },
            )
        })
        .collect();
    assert_eq!(decode(&long).1, Ok(Err(Bad::Pieces)));
    assert_eq!(decode(&long[..39]).1, Err(Broken::Cut(39)));
    assert_eq!(decode(&[tx_slot(1, 0, with, 1, 60)]).1, Err(Broken::Cut(1)));
}

#[test]
fn groups_are_subscribed_to() {
    let first = tx_slot(0, 0, tx_flag::EXTRA_INFO, 9, 0);
    let group = [1, 0, 0x5e, 0, 0, 1];
    let (chain, result) = decode(&[first, extra(extra_type::MCAST_ADD, false, group)]);
    assert_eq!(result, Ok(Ok(Ask::Subscribe(Mac::new(group)))));
    assert!(chain.pieces.is_empty());
    let (_, result) = decode(&[first, extra(extra_type::MCAST_DEL, false, group)]);
    assert_eq!(result, Ok(Ok(Ask::Unsubscribe(Mac::new(group)))));
}

proptest! {
    /// Whatever is in the ring: no panic, no more slots than there are, and a packet that
    /// is accepted lies in its pages.
    #[test]
    fn any_slots(
        slots in prop::collection::vec(any::<[u8; TX_SLOT]>(), 1..60), tame in any::<bool>(),
    ) {
        let slots: Vec<_> = slots.into_iter().map(|mut slot| {
            if tame {
                // Small sizes and few flags, so that most are nearly right.
                slot[5] &= 0x0f;
                slot[6] &= 0x0d;
                slot[7] = 0;
                slot[11] &= 0x03;
            }
            slot
        }).collect();
        let (chain, result) = decode(&slots);
        prop_assert!(chain.slots() as usize <= slots.len());
        if let Ok(Ok(Ask::Send)) = result {
            prop_assert!((MIN_LENGTH..=MAX_LENGTH).contains(&chain.length));
            let sum: usize = chain.pieces.iter().map(|piece| piece.length).sum();
            prop_assert_eq!(sum, chain.length);
            prop_assert!(chain.pieces.len() <= MAX_PIECES);
            for piece in &chain.pieces {
                prop_assert!(piece.length > 0 && piece.offset + piece.length <= PAGE);
            }
        }
        if result.is_ok() {
            prop_assert_eq!(chain.responses(Status::Okay).count(), chain.slots() as usize);
        }
    }

    /// What a frontend says of a packet is what the backend takes.
    #[test]
    fn packets_are_understood(
        sizes in prop::collection::vec(1usize..=4096, 1..16), offset in 0usize..4096, blank in any::<bool>(),
    ) {
        let length: usize = sizes.iter().sum();
        prop_assume!((MIN_LENGTH..=MAX_LENGTH).contains(&length));
        let last = sizes.len() - 1;
        let slots: Vec<_> = sizes.iter().enumerate().map(|(n, size)| {
            let mut flags = if n < last { tx_flag::MORE_DATA } else { 0 };
            if n == 0 && blank {
                flags |= tx_flag::CSUM_BLANK;
            }
            let offset = offset.min(PAGE - size);
            let id = u16::try_from(n).expect("few");
            tx_slot(7 + u32::from(id), offset, flags, id, if n == 0 { length } else { *size })
        }).collect();
        let (chain, result) = decode(&slots);
        prop_assert_eq!(result, Ok(Ok(Ask::Send)));
        prop_assert_eq!(chain.csum_blank, blank);
        prop_assert_eq!(chain.pieces.iter().map(|p| p.length).collect::<Vec<_>>(), sizes);
    }

    #[test]
    fn responses_to_posted_pages(id in any::<u16>(), flags in any::<u16>(), length in 0u16..=4096) {
        let bytes = RxResponse { id, flags, length: Some(length) }.encode();
        prop_assert_eq!(u16::from_le_bytes([bytes[0], bytes[1]]), id);
        prop_assert_eq!(u16::from_le_bytes([bytes[4], bytes[5]]), flags);
        prop_assert_eq!(i16::from_le_bytes([bytes[6], bytes[7]]), length.cast_signed());
        let bytes = RxResponse { id, flags, length: None }.encode();
        prop_assert_eq!(i16::from_le_bytes([bytes[6], bytes[7]]), -1);
    }
}
