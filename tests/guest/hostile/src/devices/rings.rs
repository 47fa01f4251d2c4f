//! Rings whose indices cannot be, and what is not the frontend's in them.

use core::sync::atomic::Ordering::SeqCst;

use super::blkfront::{Blkfront, op, request, segment};
use super::guest::{PATIENCE, claim, notify, wait_for};
use super::netfront::Netfront;
use super::xenstore::Store;
use crate::rng::Rng;

/// Places of the index of requests that are not: farther than the `room` that is left, back,
/// far off. `pending` requests may not have been taken yet: no further back than that, it would
/// only take them back, which a frontend may.
fn beyond(rng: &mut Rng, room: u32, pending: u32) -> u32 {
    match rng.below(5) {
        0 => room + 1,
        1 => room + 1 + rng.below(1000) as u32,
        2 => u32::MAX - pending - rng.below(u64::from(room.max(1))) as u32,
        3 => 1 << 31,
        _ => (rng.next() as u32).clamp(room + 1, u32::MAX - pending),
    }
}

/// A disk's index of requests jumps: the device is closed, and says so.
pub fn disk(store: &mut Store, disk: &mut Blkfront, rng: &mut Rng) {
    let room = disk.room();
    // Sometimes beside requests that are right.
    for _ in 0..rng.below(4) {
        let (id, page) = (disk.id(), disk.data(3));
        disk.put(&request(
            op::READ,
            1,
            id,
            rng.below(8),
            &[segment(page.gref(), 0, 7)],
        ));
    }
    if rng.once_in(2) {
        disk.push();
    }
    let jump = beyond(rng, room, disk.slots() - disk.room());
    disk.produce(disk.req_prod.wrapping_add(jump));
    claim(
        store.wait(disk.backend_node("state").str(), b"5", PATIENCE),
        "a disk with a ring that cannot be is closed",
    );
}

/// The same of a network, of either ring.
pub fn network(store: &mut Store, net: &mut Netfront, rng: &mut Rng) {
    let slots = super::netfront::SLOTS;
    if rng.once_in(2) {
        let jump = beyond(rng, slots, net.tx_prod.wrapping_sub(net.tx_cons));
        net.produce(net.tx_prod.wrapping_add(jump));
    } else {
        let jump = beyond(rng, slots, net.rx_prod.wrapping_sub(net.rx_cons));
        net.produce_rx(net.rx_prod.wrapping_add(jump));
        // It is looked at when there is a packet.
        let packet = net.tx_page(0);
        net.question(packet, net.mac);
        let gref = super::guest::share(packet, true);
        net.put(&super::netfront::tx_slot(gref, 0, 0, 1, 60));
        net.push();
    }
    claim(
        store.wait(net.backend_node("state").str(), b"5", PATIENCE),
        "a network with a ring that cannot be is closed",
    );
}

/// What the backend writes in a ring, written by the frontend; requests go on meanwhile.
pub fn header(disk: &mut Blkfront, rng: &mut Rng) {
    for _ in 0..8 {
        // The backend's event index and private words, and at times its index of
        // responses, which it has set right when it has answered.
        let word = rng.pick(&[4, 8, 16, 20, 40, 60]);
        disk.ring(0).word(word).store(rng.next() as u32, SeqCst);
        for _ in 0..6 {
            notify(disk.port);
        }
        let page = disk.data(4);
        let id = disk.id();
        let index = disk.put(&request(
            op::READ,
            1,
            id,
            rng.below(64),
            &[segment(page.gref(), 0, 7)],
        ));
        disk.push();
        let ring = disk.ring(0);
        // Nobody need wake a frontend that has made its own index of events nonsense, so
        // it looks from time to time.
        let done = wait_for(disk.port, PATIENCE, || {
            ring.word(8).load(SeqCst) == index.wrapping_add(1)
        });
        claim(done, "a ring is used by the backend's own indices");
        claim(
            disk.answers(|answer| claim(answer.id == id && answer.status == 0, "a read")),
            "its answer",
        );
    }
}
