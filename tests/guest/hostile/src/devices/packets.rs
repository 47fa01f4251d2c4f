//! Packets that are wrong: sizes, pieces, extra slots, segmentation, grants, chains that
//! do not end.

use blanket_abi::xen::domid;
use blanket_abi::xen::grant::flag as grant;

use super::guest::{FREE_GREFS, PATIENCE, claim, set_grant, share};
use super::netfront::{Netfront, SLOTS, TX_PAGES, TX_SLOT, flag, tx_slot};
use super::xenstore::Store;
use crate::kernel::Kernel;
use crate::rng::Rng;

/// `netif_extra_info`.
fn extra(kind: u8, flags: u8, bytes: [u8; 6]) -> [u8; TX_SLOT] {
    let mut slot = [0; TX_SLOT];
    slot[0] = kind;
    slot[1] = flags;
    slot[2..8].copy_from_slice(&bytes);
    slot
}

/// One packet that is wrong, and must not be sent.
fn wrong(k: &Kernel, net: &mut Netfront, rng: &mut Rng) {
    // The last page is for packets that nothing is wrong with but what is in it: others,
    // shown together with them, do not change it.
    let page = net.tx_page(rng.below(TX_PAGES as u64 - 1) as usize);
    net.question(page, net.mac);
    let gref = share(page, true);
    let id = rng.below(60_000) as u16;
    let mut put = |slot: [u8; TX_SLOT]| net.put(&slot);
    match rng.below(13) {
        // Too short.
        0 => put(tx_slot(gref, 0, 0, id, rng.below(14) as u16)),
        // Over the end of its page.
        1 => {
            let offset = 4096 - rng.below(60) as u16;
            put(tx_slot(gref, offset, 0, id, 60));
        }
        2 => {
            let offset = rng.pick(&[4096, 4097, 0x7fff, 0xffff]);
            put(tx_slot(gref, offset, 0, id, rng.pick(&[60, 0xffff])));
        }
        // Pieces longer than their packet.
        3 => {
            put(tx_slot(gref, 0, flag::MORE_DATA, id, 60));
            put(tx_slot(gref, 0, 0, id, 61 + rng.below(4000) as u16));
        }
        // So long that what is left for the first piece is more than a page.
        4 => {
            put(tx_slot(gref, 0, flag::MORE_DATA, id, 0xffff));
            put(tx_slot(gref, 0, 0, id, 100));
        }
        // More pieces than a packet may have.
        5 => {
            let pieces = 33 + rng.below(100);
            put(tx_slot(gref, 0, flag::MORE_DATA, id, 4000));
            for n in 0..pieces {
                let more = if n + 1 < pieces { flag::MORE_DATA } else { 0 };
                put(tx_slot(gref, 100, more, id, 10));
            }
        }
        // Segmentation of kinds and sizes that are none, or that the packet is not.
        6 => {
            let kind = rng.pick(&[0, 3, 4, 255]);
            put(tx_slot(gref, 0, flag::EXTRA_INFO, id, 60));
            put(extra(1, 0, [200, 5, kind, 0, 0, 0]));
        }
        7 => {
            put(tx_slot(gref, 0, flag::EXTRA_INFO, id, 60));
            put(extra(1, 0, [0, 0, 1, 0, 0, 0]));
        }
        8 => {
            let blank = rng.pick(&[0, flag::CSUM_BLANK]);
            put(tx_slot(gref, 0, flag::EXTRA_INFO | blank, id, 60));
            put(extra(1, 0, [200, 5, rng.pick(&[1, 2]), 0, 0, 0]));
        }
        // Extra slots that are none, many of them, with garbage.
        9 => {
            put(tx_slot(gref, 0, flag::EXTRA_INFO, id, 60));
            let count = 1 + rng.below(12);
            for n in 0..count {
                let more = u8::from(n + 1 < count);
                let kind = if n == 0 {
                    rng.pick(&[0, 5, 6, 200, 255])
                } else {
                    rng.next() as u8
                };
                put(extra(
                    kind,
                    more | rng.next() as u8 & 0xfe,
                    [rng.next() as u8; 6],
                ));
            }
        }
        // A multicast address that is none.
        10 => {
            put(tx_slot(0, 0, flag::EXTRA_INFO, id, 0));
            put(extra(rng.pick(&[2, 3]), 0, [0xfe, 1, 2, 3, 4, 5]));
        }
        // Grants that are none.
        11 => {
            let gref = FREE_GREFS + 110;
            let frame = rng.pick(&[k.shared_info, k.nr_pages + 3, 0xffff_ffff]);
            set_grant(gref, grant::PERMIT_ACCESS, domid::BACKEND, frame);
            let gref = rng.pick(&[gref, 450, 5000, u32::MAX, 1 << 20]);
            put(tx_slot(gref, 0, 0, id, 60));
        }
        // Somebody else's address: the device has a filter.
        _ => {
            let page = net.tx_page(TX_PAGES - 1);
            net.question(page, [0, 0x16, 0x3e, 9, 9, rng.next() as u8]);
            let gref = share(page, true);
            net.put(&tx_slot(gref, 0, 0, id, 60));
        }
    }
}

pub fn attack(k: &Kernel, net: &mut Netfront, rng: &mut Rng) {
    for _ in 0..24 {
        wrong(k, net, rng);
        if rng.once_in(3) {
            net.push();
            let all = net.answers(|_, status| {
                assert!(status != 0, "does not hold: a wrong packet is not sent");
            });
            claim(all, "wrong packets are answered");
        } else if net.tx_prod.wrapping_sub(net.tx_cons) > SLOTS / 2 {
            net.push();
            claim(net.answers(|_, _| {}), "wrong packets are answered");
        }
    }
    net.push();
    claim(net.answers(|_, _| {}), "wrong packets are answered");
    subscribe(net, rng);
    posted(k, net, rng);
}

/// Multicast addresses until there may be no more.
fn subscribe(net: &mut Netfront, rng: &mut Rng) {
    let mut refused = 0;
    for n in 0..90u8 {
        net.put(&tx_slot(0, 0, flag::EXTRA_INFO, u16::from(n), 0));
        net.put(&extra(2, 0, [1, 0, 0x5e, rng.next() as u8, n, 1]));
        net.push();
        claim(
            net.answers(|_, status| refused += u32::from(status < 0)),
            "a subscription is answered",
        );
    }
    claim(refused > 0, "subscriptions have a limit");
}

/// Pages for packets to the guest that are none: what is to come in them does not, and
/// the next page is taken.
fn posted(k: &Kernel, net: &mut Netfront, rng: &mut Rng) {
    while net.receive().is_some() {}
    net.post();
    for n in 0..20 {
        let gref = FREE_GREFS + 111 + n;
        let frame = rng.pick(&[k.shared_info, k.nr_pages, 0xffff_ffff]);
        set_grant(gref, grant::PERMIT_ACCESS, domid::BACKEND, frame);
        net.post_page(rng.pick(&[gref, 480, 6000, u32::MAX, net.tx_page(1).gref()]));
    }
    net.produce_rx(net.rx_prod);
    // Packets come now: the answers to what is asked.
    for _ in 0..30 {
        let page = net.tx_page(1);
        net.question(page, net.mac);
        net.put(&tx_slot(share(page, true), 0, 0, 9, 60));
    }
    net.push();
    claim(net.answers(|_, _| {}), "packets are answered");
}

/// Packets that change after they were shown.
pub fn changing(net: &mut Netfront, rng: &mut Rng) {
    for _ in 0..12 {
        let page = net.tx_page(2);
        net.question(page, net.mac);
        let gref = share(page, true);
        let first = net.tx_prod;
        for n in 0..32u16 {
            net.put(&tx_slot(gref, 0, 0, n, 60));
        }
        net.push();
        for _ in 0..rng.below(400) {
            match rng.below(4) {
                0 => {
                    let index = first.wrapping_add(rng.below(31) as u32);
                    let size = rng.pick(&[0u16, 60, 5000, 0xffff]);
                    net.poke(index, &tx_slot(gref, rng.pick(&[0, 4090]), 0, 1, size));
                }
                1 => {
                    let word = 64 + 12 * rng.below(200) as usize;
                    net.tx_ring()
                        .put(word, &rng.pick(&[gref, 0, u32::MAX]).to_le_bytes());
                }
                // The source and the headers, between check and sending.
                2 => page.put(4, &(rng.next() as u32).to_le_bytes()),
                _ => page.put(12, &rng.pick(&[0x0608u32, 0x0008, 0xdd86]).to_le_bytes()),
            }
        }
        claim(net.answers(|_, _| {}), "packets that change are answered");
    }
}

/// A packet of which more is to follow, and nothing does: the device is closed.
pub fn endless(store: &mut Store, net: &mut Netfront, rng: &mut Rng) {
    let gref = share(net.tx_page(3), true);
    let length = rng.pick(&[1, 2, 20, 100, SLOTS]);
    let by_extra = rng.once_in(2);
    for n in 0..length {
        if by_extra && n == 0 {
            net.put(&tx_slot(gref, 0, flag::EXTRA_INFO, 1, 60));
        } else if by_extra {
            net.put(&extra(4, 1, [0; 6]));
        } else {
            net.put(&tx_slot(gref, 0, flag::MORE_DATA, 1, 60));
        }
    }
    net.push();
    claim(
        store.wait(net.backend_node("state").str(), b"5", PATIENCE),
        "a network with a packet that does not end is closed",
    );
}
