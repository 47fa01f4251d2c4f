//! What a guest puts into the rings of a network device, and packets from both sides: any
//! bytes are understood or refused, and what is accepted lies in its pages.
#![no_main]

use blanket_devices::net::headers::{HEAD, Sum, Transport};
use blanket_devices::net::offload::{HEADER, Offloads, ToGuest, Undone};
use blanket_devices::net::protocol::{
    Ask, Chain, MAX_LENGTH, MAX_PIECES, MIN_LENGTH, RX_SLOT, RxRequest, Status, TX_SLOT,
};
use libfuzzer_sys::{arbitrary::Arbitrary, fuzz_target};

#[derive(Arbitrary, Debug)]
struct Input {
    slots: Vec<[u8; TX_SLOT]>,
    posted: [u8; RX_SLOT],
    header: [u8; HEADER],
    packet: Vec<u8>,
    /// Length of the packet beyond its first bytes.
    more: u16,
    offloads: [bool; 4],
}

fuzz_target!(|input: Input| {
    rings(&input);
    let mut packet = input.packet;
    packet.resize(packet.len().max(MIN_LENGTH), 0);
    let length = packet.len() + usize::from(input.more);
    let head = packet.len().min(HEAD);
    let head = &mut packet[..head];
    if let Some(found) = Transport::find(head, length) {
        assert!(found.start < found.payload && found.payload <= found.end);
        assert!(found.payload <= head.len() && found.end <= length);
        assert!(found.checksum_at() + 2 <= found.payload);
        let _ = found.pseudo(head);
    }
    let [csum4, csum6, tso4, tso6] = input.offloads;
    let offloads = Offloads {
        csum4,
        csum6,
        tso4,
        tso6,
    };
    if let Some(undone) = Undone::decode(&input.header) {
        let again = Undone::decode(&undone.encode()).expect("its own header");
        assert_eq!((again.blank, again.cut), (undone.blank, undone.cut));
        match undone.to_guest(head, length, offloads) {
            ToGuest::Pass { gso: Some(_), .. } => assert!(tso4 || tso6),
            ToGuest::Sum(_) => assert!(undone.blank.is_some()),
            _ => {}
        }
        let gso = undone.cut.map(|(gso, _)| gso);
        let blank = undone.blank.is_some();
        if let Ok((undone, found)) = Undone::from_guest(head, length, blank, gso) {
            assert_eq!(undone.blank.is_some(), blank || gso.is_some());
            assert_eq!(found.is_some(), undone.blank.is_some());
        }
    }
    let mut sum = Sum::default();
    sum.add(head);
    assert_ne!(sum.checksum(), 0);
});

fn rings(input: &Input) {
    let _ = RxRequest::decode(&input.posted);
    let slots = &input.slots[..input.slots.len().min(256)];
    let mut chain = Chain::new(256);
    let mut at = 0;
    while at < slots.len() {
        let waiting = u32::try_from(slots.len() - at).expect("at most 256");
        let Ok(asked) = chain.decode(waiting, |ahead| slots[at + ahead as usize]) else {
            return;
        };
        let taken = chain.slots();
        assert!((1..=waiting).contains(&taken));
        assert_eq!(chain.responses(Status::Okay).count(), taken as usize);
        if asked == Ok(Ask::Send) {
            assert!((MIN_LENGTH..=MAX_LENGTH).contains(&chain.length));
            assert!(chain.pieces.len() <= MAX_PIECES);
            let whole: usize = chain.pieces.iter().map(|piece| piece.length).sum();
            assert_eq!(whole, chain.length);
            for piece in &chain.pieces {
                assert!(piece.length > 0 && piece.offset + piece.length <= 4096);
            }
        }
        at += taken as usize;
    }
}
