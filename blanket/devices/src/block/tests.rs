use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use proptest::prelude::*;

use super::protocol::{Status, op};
use super::*;
use crate::bus::{Bus, State};
use crate::testing::{Blkfront, FakeGuest, MemoryDisk, Shared};

const SIZE: usize = 1 << 20;

struct World {
    guest: Arc<FakeGuest>,
    bus: Bus,
    disk: Arc<MemoryDisk>,
    vbd: Arc<Vbd>,
}

fn world(disk: Arc<MemoryDisk>, config: Config) -> World {
    let guest = FakeGuest::new(2);
    let bus = Bus::new(Arc::clone(&guest) as _).expect("a bus");
    guest.set_bus(bus.changed());
    let vbd = Arc::new(Vbd::new(Arc::new(Shared(Arc::clone(&disk))), config, 2));
    bus.attach(Arc::clone(&vbd) as _).expect("attached");
    World {
        guest,
        bus,
        disk,
        vbd,
    }
}

fn plain() -> World {
    world(MemoryDisk::new(SIZE), Config::default())
}

/// A page of one byte.
fn filled(guest: &FakeGuest, byte: u8) -> u64 {
    let frame = guest.frame();
    guest.write(frame << 12, &[byte; 4096]);
    frame
}

#[test]
fn numbers_and_names_are_those_of_linux() {
    assert_eq!(device_number(0), 51712);
    assert_eq!(device_number(1), 51728);
    assert_eq!(device_number(16), (1 << 28) + (16 << 8));
    for (index, name) in [(0, "xvda"), (25, "xvdz"), (26, "xvdaa"), (701, "xvdzz")] {
        assert_eq!(device_name(index), name);
    }
}

#[test]
fn written_and_read_again() {
    let w = plain();
    let mut front = Blkfront::connect(&w.guest, 0, 0);
    let backend = front.backend();
    assert_eq!(
        w.guest.get(&format!("{backend}/sectors")).as_deref(),
        Some("2048")
    );
    let out = w.guest.grant(filled(&w.guest, 0xab), true);
    let write = front.request(op::WRITE, 8, &[(out, 0, 7)]);
    front.push();
    assert_eq!(front.answer(write), (op::WRITE, 0));
    assert_eq!(&w.disk.bytes()[4096..8192], &[0xab; 4096]);
    let frame = filled(&w.guest, 0);
    let into = w.guest.grant(frame, false);
    // The middle of the page only.
    let read = front.request(op::READ, 8, &[(into, 2, 3)]);
    front.push();
    assert_eq!(front.answer(read), (op::READ, 0));
    let page: [u8; 4096] = w.guest.read(frame << 12);
    assert!(page[..1024].iter().chain(&page[2048..]).all(|b| *b == 0));
    assert!(page[1024..2048].iter().all(|b| *b == 0xab));
    assert!(
        w.guest.revoke(out) && w.guest.revoke(into),
        "nothing stays granted"
    );
    let flush = front.request(op::FLUSH, 0, &[]);
    front.push();
    assert_eq!(front.answer(flush), (op::FLUSH, 0));
    assert_eq!(w.disk.flushes.load(Relaxed), 1);
    assert_eq!(w.vbd.counters().written_bytes.load(Relaxed), 4096);
}

#[test]
fn whole_pages_that_were_read_are_remembered_by_their_block() {
    let config = |origins, persistent| Config {
        origins,
        persistent,
        ..Config::default()
    };
    let w = world(MemoryDisk::new(SIZE), config(true, false));
    let mut front = Blkfront::connect(&w.guest, 0, 0);
    let origins = Arc::clone(w.vbd.origins().expect("it remembers"));
    let frames: Vec<u64> = (0..5).map(|n| filled(&w.guest, n)).collect();
    let grants: Vec<u32> = frames.iter().map(|it| w.guest.grant(*it, false)).collect();
    let of = |n: usize| origins.of(frames[n], 1)[0];
    let mut does = |op, sector, segments: &[(u32, u8, u8)]| {
        let id = front.request(op, sector, segments);
        front.push();
        front.answer(id).1
    };
    let whole = |n: usize| (grants[n], 0, 7);
    assert_eq!(does(op::READ, 40, &[whole(0), whole(1)]), 0);
    // A part, one that is no block, one behind a part, and what was written.
    assert_eq!(does(op::READ, 80, &[(grants[2], 0, 6)]), 0);
    assert_eq!(does(op::READ, 81, &[whole(2)]), 0);
    assert_eq!(does(op::READ, 80, &[(grants[4], 7, 7), whole(2)]), 0);
    assert_eq!(does(op::WRITE, 80, &[whole(3)]), 0);
    assert_eq!(
        [0, 1, 2, 3, 4].map(of),
        [Some(5), Some(6), None, None, None]
    );
    // As the disk is read now, and not by one that fails.
    assert_eq!(does(op::READ, 47, &[(grants[4], 7, 7), whole(3)]), 0);
    assert_eq!(does(op::READ, 8, &[whole(1)]), 0);
    assert_eq!(does(op::READ, SIZE as u64 / 512, &[whole(0)]), -1);
    assert_eq!([0, 1, 3, 4].map(of), [Some(5), Some(1), Some(6), None]);

    let w = world(MemoryDisk::new(SIZE), config(true, true));
    let node = format!("device/{CLASS}/{}/feature-persistent", device_number(0));
    w.guest.put(&node, "1");
    let mut front = Blkfront::connect(&w.guest, 0, 0);
    let frame = w.guest.frame();
    let id = front.request(op::READ, 0, &[(w.guest.grant(frame, false), 0, 7)]);
    front.push();
    assert_eq!(front.answer(id), (op::READ, 0));
    let origins = w.vbd.origins().expect("it remembers");
    assert_eq!(
        origins.of(frame, 1),
        [None],
        "the guest copies it elsewhere"
    );
    assert!(plain().vbd.origins().is_none());
}

#[test]
fn a_turn_ends_however_fast_the_guest_asks() {
    let guest = FakeGuest::new(1);
    let frame = filled(&guest, 0);
    for slot in 0..32 {
        // No operation, which is answered at once.
        guest.write((frame << 12) + 64 + slot * SLOT as u64, &[99]);
    }
    let page = guest.grants().map(guest.grant(frame, false), true);
    let ring = Ring::new(vec![page.expect("granted")]).expect("a ring");
    let disk = Shared(MemoryDisk::new(SIZE)).queue(32).expect("a queue");
    let setup = queue::Setup {
        written: Arc::default(),
        origins: None,
        name: "xvda".into(),
        persistent: false,
        read_only: false,
        when_full: WhenFull::Wait,
    };
    let mut queue = queue::Queue::new(guest.clone(), ring, disk, setup, Arc::default());
    let mut asked = 0u32;
    let mut ask = || {
        asked += 1;
        guest.write(frame << 12, &asked.to_le_bytes());
        asked
    };
    ask();
    let accepted = queue.accept(|_| {
        // One more for each that is looked at.
        assert!(ask() < 1000, "the guest has the thread for ever");
        Ok(())
    });
    assert_eq!(accepted, Ok(None));
    assert_eq!(asked, 33);
}

#[test]
fn a_flush_with_data_flushes_first() {
    let w = plain();
    let mut front = Blkfront::connect(&w.guest, 0, 0);
    let out = w.guest.grant(filled(&w.guest, 7), true);
    let both = front.request(op::FLUSH, 0, &[(out, 0, 0)]);
    front.push();
    assert_eq!(front.answer(both), (op::FLUSH, 0));
    assert_eq!(w.disk.flushes.load(Relaxed), 1);
    assert_eq!(w.disk.bytes()[..512], [7; 512]);
}

#[test]
fn large_requests_and_large_rings() {
    let w = plain();
    let mut front = Blkfront::connect(&w.guest, 0, 3);
    assert_eq!(front.slots(), 256);
    let grants: Vec<u32> = (0..64u8)
        .map(|n| w.guest.grant(filled(&w.guest, n), true))
        .collect();
    let segments: Vec<_> = grants.iter().map(|gref| (*gref, 0, 7)).collect();
    let mut last = 0;
    for _ in 0..300 {
        last = front.indirect(op::WRITE, 0, &segments);
        front.push();
        assert_eq!(
            front.answer(last),
            (op::WRITE, 0),
            "with the operation inside"
        );
        if w.vbd.counters().writes.load(Relaxed) == 300 {
            break;
        }
    }
    assert!(last > 0);
    let bytes = w.disk.bytes();
    for n in 0..64u8 {
        assert!(
            bytes[usize::from(n) * 4096..][..4096]
                .iter()
                .all(|b| *b == n)
        );
    }
}

#[test]
fn what_is_wrong_is_answered_with_an_error() {
    let w = plain();
    let mut front = Blkfront::connect(&w.guest, 0, 0);
    let ro = w.guest.grant(filled(&w.guest, 1), true);
    let rw = w.guest.grant(filled(&w.guest, 2), false);
    let before = w.disk.bytes();
    for (op, sector, segments, status) in [
        (op::READ, 0, vec![(ro, 0, 7)], -1),          // cannot be written
        (op::READ, 0, vec![(1 << 20, 0, 7)], -1),     // no such grant
        (op::WRITE, 2048, vec![(rw, 0, 0)], -1),      // behind the end
        (op::WRITE, u64::MAX, vec![(rw, 0, 0)], -1),  // no sector at all
        (op::WRITE, 0, vec![(rw, 5, 4)], -1),         // backwards
        (op::WRITE, 0, vec![(rw, 0, 8)], -1),         // not in the page
        (op::WRITE, 0, vec![], -1),                   // nothing
        (op::WRITE, 0, vec![(rw, 0, 0); 12], -1),     // more than fit
        (op::WRITE_BARRIER, 0, vec![(rw, 0, 0)], -2), // not offered
        (77, 0, vec![], -2),                          // not known
    ] {
        // Twelve segments do not fit into a slot: the count alone is wrong.
        let count = segments.len();
        let fitting = &segments[..count.min(11)];
        let id = front.request(op, sector, fitting);
        if count > 11 {
            let mut slot = [0; SLOT];
            slot[0] = op;
            slot[1] = 12;
            slot[8..16].copy_from_slice(&(id + 1000).to_le_bytes());
            front.slot(&slot);
            front.push();
            assert_eq!(front.answer(id), (op, 0));
            assert_eq!(front.answer(id + 1000), (op, status));
            continue;
        }
        front.push();
        assert_eq!(front.answer(id), (op, status), "{op} {sector} {segments:?}");
    }
    let mut after = w.disk.bytes();
    let own = 11 * 512;
    after[..own].copy_from_slice(&before[..own]);
    assert!(after == before, "nothing else was written");
    assert!(w.guest.revoke(ro) && w.guest.revoke(rw), "no grant is held");
    assert_eq!(w.vbd.counters().errors.load(Relaxed), 10);
}

#[test]
fn a_broken_disk_and_a_read_only_one() {
    let w = plain();
    let mut front = Blkfront::connect(&w.guest, 0, 0);
    let page = w.guest.grant(filled(&w.guest, 1), false);
    w.disk.broken.store(true, Relaxed);
    let id = front.request(op::READ, 0, &[(page, 0, 0)]);
    front.push();
    assert_eq!(front.answer(id), (op::READ, -1));

    let disk = MemoryDisk::new(SIZE);
    disk.read_only.store(true, Relaxed);
    let w = world(disk, Config::default());
    let mut front = Blkfront::connect(&w.guest, 0, 0);
    assert_eq!(
        w.guest.get(&format!("{}/info", front.backend())).as_deref(),
        Some("4")
    );
    let page = w.guest.grant(filled(&w.guest, 1), false);
    let id = front.request(op::WRITE, 0, &[(page, 0, 0)]);
    front.push();
    assert_eq!(front.answer(id), (op::WRITE, -1));
}

#[test]
fn a_full_host_delays_writes_until_there_is_space() {
    let w = plain();
    let mut front = Blkfront::connect(&w.guest, 0, 0);
    let page = w.guest.grant(filled(&w.guest, 9), true);
    w.disk.full.store(true, Relaxed);
    let write = front.request(op::WRITE, 0, &[(page, 0, 7)]);
    // A read behind it is not held up.
    let into = w.guest.grant(w.guest.frame(), false);
    let read = front.request(op::READ, 0, &[(into, 0, 7)]);
    front.push();
    assert_eq!(front.answer(read), (op::READ, 0));
    assert!(!front.answered(write));
    assert_eq!(w.vbd.counters().waiting_for_space.load(Relaxed), 1);
    w.disk.full.store(false, Relaxed);
    assert_eq!(front.answer(write), (op::WRITE, 0));
    assert_eq!(w.disk.bytes()[..4096], [9; 4096]);
    assert_eq!(w.vbd.counters().waiting_for_space.load(Relaxed), 0);

    let config = Config {
        when_full: WhenFull::Fail,
        ..Config::default()
    };
    let w = world(MemoryDisk::new(SIZE), config);
    let mut front = Blkfront::connect(&w.guest, 0, 0);
    w.disk.full.store(true, Relaxed);
    let page = w.guest.grant(filled(&w.guest, 9), true);
    let write = front.request(op::WRITE, 0, &[(page, 0, 7)]);
    front.push();
    assert_eq!(front.answer(write), (op::WRITE, -1));
}

#[test]
fn a_ring_that_overruns_has_its_device_closed_and_can_begin_anew() {
    let w = plain();
    let front = Blkfront::connect(&w.guest, 0, 0);
    front.set_producer(33);
    w.guest.notify(front.port);
    let state = format!("{}/state", front.backend());
    w.guest.wait_for(&state, Some("5"));
    let report = w.bus.report(CLASS, device_number(0)).expect("there");
    assert!(report.fault.expect("a fault").contains("33 requests"));
    assert!(front.revoke_ring(), "the backend has let go");
    front.state(6);
    w.guest.wait_for(&state, Some("6"));
    front.state(1);
    let mut front = Blkfront::connect(&w.guest, 0, 0);
    let id = front.request(op::FLUSH, 0, &[]);
    front.push();
    assert_eq!(front.answer(id), (op::FLUSH, 0));
}

#[test]
fn what_a_frontend_says_wrong_closes_it() {
    for (node, value) in [
        ("ring-ref", "9999999"),
        ("ring-ref", "x"),
        ("event-channel", ""),
        ("protocol", "x86_32-abi"),
        ("multi-queue-num-queues", "0"),
        ("multi-queue-num-queues", "77"),
        ("ring-page-order", "5"),
    ] {
        let w = plain();
        let directory = format!("device/{CLASS}/{}", device_number(0));
        let backend = w.guest.get(&format!("{directory}/backend")).expect("it");
        w.guest.wait_for(&format!("{backend}/state"), Some("2"));
        let gref = w.guest.grant(w.guest.frame(), false);
        w.guest
            .put(&format!("{directory}/ring-ref"), &gref.to_string());
        w.guest.put(&format!("{directory}/event-channel"), "9");
        w.guest.put(&format!("{directory}/{node}"), value);
        w.guest.put(&format!("{directory}/state"), "3");
        w.guest.wait_for(&format!("{backend}/state"), Some("5"));
        let report = w.bus.report(CLASS, device_number(0)).expect("there");
        assert!(report.fault.is_some(), "{node} {value}");
    }
}

#[test]
fn attach_twice_detach_and_resize() {
    let w = plain();
    let again = w.bus.attach(Arc::clone(&w.vbd) as _);
    assert!(again.expect_err("once").to_string().contains("already"));
    let mut front = Blkfront::connect(&w.guest, 0, 0);
    w.vbd.disk().resize(2 << 20).expect("larger");
    w.bus
        .refresh(CLASS, device_number(0), &w.vbd.size_nodes())
        .expect("there");
    let sectors = format!("{}/sectors", front.backend());
    assert_eq!(w.guest.get(&sectors).as_deref(), Some("4096"));
    let page = w.guest.grant(filled(&w.guest, 3), true);
    let id = front.request(op::WRITE, 4095, &[(page, 0, 0)]);
    front.push();
    assert_eq!(front.answer(id), (op::WRITE, 0));

    // The guest does not let go.
    let busy = w
        .bus
        .detach(CLASS, device_number(0), Duration::from_millis(20));
    assert!(busy.expect_err("busy").to_string().contains("still in use"));
    let backend = front.backend();
    w.guest.wait_for(&format!("{backend}/state"), Some("5"));
    assert_eq!(
        w.guest.get(&format!("{backend}/online")).as_deref(),
        Some("0")
    );
    // It still works meanwhile.
    let id = front.request(op::FLUSH, 0, &[]);
    front.push();
    assert_eq!(front.answer(id), (op::FLUSH, 0));
    // Then it does.
    front.state(5);
    front.state(6);
    w.guest.wait_for(&format!("{backend}/state"), None);
    assert_eq!(w.bus.report(CLASS, device_number(0)), None);
    assert!(front.revoke_ring());
    let gone = w.bus.detach(CLASS, device_number(0), Duration::ZERO);
    assert!(gone.expect_err("gone").to_string().contains("no device"));
}

#[test]
fn a_device_that_no_driver_took_is_detached_at_once() {
    let w = plain();
    w.bus
        .detach(CLASS, device_number(0), Duration::from_secs(10))
        .expect("nobody uses it");
}

#[test]
fn persistent_grants_stay_until_the_end() {
    let config = Config {
        persistent: true,
        ..Config::default()
    };
    let w = world(MemoryDisk::new(SIZE), config);
    let node = format!("device/{CLASS}/{}/feature-persistent", device_number(0));
    w.guest.put(&node, "1");
    let mut front = Blkfront::connect(&w.guest, 0, 0);
    let page = w.guest.grant(filled(&w.guest, 5), false);
    for op in [op::WRITE, op::READ, op::WRITE] {
        let id = front.request(op, 0, &[(page, 0, 7)]);
        front.push();
        assert_eq!(front.answer(id), (op, 0));
    }
    assert!(!w.guest.revoke(page), "kept");
    // What may be kept is mapped for writing, so a grant for reading is of no use.
    let readonly = w.guest.grant(filled(&w.guest, 5), true);
    let id = front.request(op::WRITE, 0, &[(readonly, 0, 7)]);
    front.push();
    assert_eq!(front.answer(id), (op::WRITE, Status::Error as i16));
    assert!(w.guest.revoke(readonly), "not kept");
    front.state(5);
    w.guest
        .wait_for(&format!("{}/state", front.backend()), Some("5"));
    assert!(
        w.guest.revoke(page) && front.revoke_ring(),
        "all given back"
    );
    assert_eq!(
        w.bus.report(CLASS, device_number(0)).map(|r| r.backend),
        Some(State::Closing)
    );
}

#[test]
fn the_end_of_the_bus_answers_what_was_begun() {
    let w = plain();
    let mut front = Blkfront::connect(&w.guest, 0, 0);
    let page = w.guest.grant(filled(&w.guest, 5), true);
    let ids: Vec<u64> = (0..30)
        .map(|n| front.request(op::WRITE, n * 8, &[(page, 0, 7)]))
        .collect();
    front.push();
    w.bus.end();
    // Begun or not begun, but nothing in between: no grant is held.
    for id in ids {
        if front.answered(id) {
            assert_eq!(front.answer(id), (op::WRITE, 0));
        }
    }
    assert!(w.guest.revoke(page) && front.revoke_ring());
}

#[test]
fn limits_slow_it_down() {
    let config = Config {
        limits: crate::Limits {
            bytes: Some(1 << 20),
            operations: None,
        },
        ..Config::default()
    };
    let w = world(MemoryDisk::new(SIZE), config);
    let mut front = Blkfront::connect(&w.guest, 0, 0);
    let page = w.guest.grant(filled(&w.guest, 5), true);
    let begun = std::time::Instant::now();
    for _ in 0..100 {
        let id = front.request(op::WRITE, 0, &[(page, 0, 7)]);
        front.push();
        front.answer(id);
    }
    // 400 KiB at 1 MiB in a second, of which a tenth comes for free.
    assert!(begun.elapsed() >= Duration::from_millis(250));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Any bytes in the ring: each request is answered once, nothing is held, and an
    /// honest request afterwards is carried out.
    #[test]
    fn any_bytes_are_answered(
        slots in proptest::collection::vec((any::<[u8; 32]>(), 0u8..8, any::<bool>()), 1..32),
    ) {
        let config = Config {
            origins: true,
            ..Config::default()
        };
        let w = world(MemoryDisk::new(SIZE), config);
        let mut front = Blkfront::connect(&w.guest, 0, 0);
        let page = w.guest.grant(filled(&w.guest, 5), false);
        let mut ids = Vec::new();
        for (n, (bytes, op, real)) in slots.iter().enumerate() {
            let mut slot = [0; SLOT];
            for (at, byte) in slot.iter_mut().enumerate() {
                *byte = bytes[at % 32];
            }
            slot[0] = *op;
            let id = n as u64;
            slot[8..16].copy_from_slice(&id.to_le_bytes());
            if *real {
                slot[1] %= 12;
                slot[16..24].copy_from_slice(&(u64::from(bytes[3]) * 16).to_le_bytes());
                for segment in 0..11 {
                    slot[24 + segment * 8..][..4].copy_from_slice(&page.to_le_bytes());
                    slot[28 + segment * 8] %= 8;
                    slot[29 + segment * 8] %= 8;
                }
            }
            front.slot(&slot);
            ids.push(id);
        }
        front.push();
        for id in ids {
            let (_, status) = front.answer(id);
            prop_assert!((-2..=0).contains(&status));
        }
        prop_assert!(w.guest.revoke(page), "nothing is held");
        let page = w.guest.grant(filled(&w.guest, 6), true);
        let id = front.request(op::WRITE, 0, &[(page, 0, 0)]);
        front.push();
        prop_assert_eq!(front.answer(id), (op::WRITE, 0));
    }
}
