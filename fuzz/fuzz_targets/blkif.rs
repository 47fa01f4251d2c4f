//! Any bytes in the ring of a block device: each request is answered once, no grant stays
//! in use, and an honest request afterwards is carried out.
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use blanket_devices::block::protocol::{SLOT, op};
use blanket_devices::block::{Config, Vbd, device_number};
use blanket_devices::bus::Bus;
use blanket_devices::testing::{Blkfront, FakeGuest, MemoryDisk, Shared};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Slot {
    bytes: [u8; SLOT],
    /// Its first segments are of a page that is granted.
    granted: u8,
}

#[derive(Arbitrary, Debug)]
struct Input {
    slots: Vec<Slot>,
    /// What is in a page that is granted, and may be named as one of segments.
    page: [u8; 64],
    persistent: bool,
}

fuzz_target!(|input: Input| {
    let guest = FakeGuest::new(1);
    let bus = Bus::new(Arc::clone(&guest) as _).expect("a bus");
    guest.set_bus(bus.changed());
    let disk = MemoryDisk::new(1 << 20);
    let config = Config {
        persistent: input.persistent,
        origins: true,
        ..Config::default()
    };
    let vbd = Vbd::new(Arc::new(Shared(disk)), config, 1);
    bus.attach(Arc::new(vbd)).expect("attached");
    if input.persistent {
        let node = format!("device/vbd/{}/feature-persistent", device_number(0));
        guest.put(&node, "1");
    }
    let mut front = Blkfront::connect(&guest, 0, 0);
    let frame = guest.frame();
    guest.write(frame << 12, &input.page);
    let page = guest.grant(frame, false);
    let mut ids = Vec::new();
    for (n, slot) in input.slots.iter().take(32).enumerate() {
        let mut bytes = slot.bytes;
        let id = n as u64;
        bytes[8..16].copy_from_slice(&id.to_le_bytes());
        for segment in 0..usize::from(slot.granted % 12) {
            bytes[24 + segment * 8..][..4].copy_from_slice(&page.to_le_bytes());
        }
        front.slot(&bytes);
        ids.push(id);
    }
    front.push();
    for id in ids {
        let (_, status) = front.answer(id);
        assert!((-2..=0).contains(&status));
    }
    if !input.persistent {
        assert!(guest.revoke(page), "nothing is held");
    }
    // What stays mapped is mapped for writing.
    let page = guest.grant(frame, !input.persistent);
    let id = front.request(op::WRITE, 0, &[(page, 0, 0)]);
    front.push();
    assert_eq!(front.answer(id), (op::WRITE, 0));
});
