use proptest::prelude::*;

use super::*;
use crate::testing::FakeGuest;

const SLOT: usize = 112;

/// A ring of fresh pages, and where they are.
fn ring(guest: &std::sync::Arc<FakeGuest>, pages: usize) -> (Ring<SLOT>, Vec<u64>) {
    use crate::Guest as _;
    let frames: Vec<u64> = (0..pages).map(|_| guest.frame()).collect();
    let mapped = frames
        .iter()
        .map(|frame| {
            let gref = guest.grant(*frame, false);
            guest.grants().map(gref, true).expect("granted")
        })
        .collect();
    (Ring::new(mapped).expect("a ring"), frames)
}

fn put(guest: &FakeGuest, frames: &[u64], at: usize, bytes: &[u8]) {
    for (n, byte) in bytes.iter().enumerate() {
        let at = at + n;
        guest.write((frames[at / 4096] << 12) + (at % 4096) as u64, &[*byte]);
    }
}

fn word(guest: &FakeGuest, frames: &[u64], at: u64) -> u32 {
    u32::from_le_bytes(guest.read((frames[0] << 12) + at))
}

#[test]
fn slots_of_one_and_more_pages() {
    let guest = FakeGuest::new(1);
    for (pages, slots) in [(1, 32), (2, 64), (4, 128), (16, 512)] {
        assert_eq!(ring(&guest, pages).0.slots(), slots);
    }
    assert!(Ring::<SLOT>::new(Vec::new()).is_none());
}

#[test]
fn a_used_ring_goes_on_where_its_responses_end() {
    let guest = FakeGuest::new(1);
    let frame = guest.frame();
    let gref = guest.grant(frame, false);
    // 7 requests were answered, 9 were made.
    guest.write(frame << 12, &9u32.to_le_bytes());
    guest.write((frame << 12) + 8, &7u32.to_le_bytes());
    let page = {
        use crate::Guest as _;
        guest.grants().map(gref, true).expect("granted")
    };
    let ring = Ring::<SLOT>::new(vec![page]).expect("a ring");
    assert_eq!(ring.waiting(), Ok(2));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// An honest guest: requests come out as they went in, through all pages and around
    /// their end; each response is where its slot is; the guest is notified when the next
    /// response is the one it waits for, and not before.
    #[test]
    fn requests_and_responses_arrive(
        pages in 0usize..3, start in any::<u32>(), steps in proptest::collection::vec((0u32..40, 0u32..40, any::<bool>()), 1..60),
    ) {
        let guest = FakeGuest::new(1);
        let (mut ring, frames) = ring(&guest, 1 << pages);
        // As if it had run for long: the indices wrap.
        (ring.req_cons, ring.rsp_prod, ring.published) = (start, start, start);
        let (mut made, mut seen, mut taken) = (start, start, start);
        let slots = ring.slots();
        let place = |index: u32| HEADER + (index & (slots - 1)) as usize * SLOT;
        guest.write((frames[0] << 12) + 8, &start.to_le_bytes());
        let mut event = start.wrapping_add(1);
        guest.write((frames[0] << 12) + 12, &event.to_le_bytes());
        for (requests, responses, wait) in steps {
            let room = slots - made.wrapping_sub(seen);
            for _ in 0..requests.min(room) {
                put(&guest, &frames, place(made), &[made as u8; SLOT]);
                made = made.wrapping_add(1);
            }
            guest.write(frames[0] << 12, &made.to_le_bytes());
            let waiting = ring.waiting().expect("honest");
            prop_assert_eq!(waiting, made.wrapping_sub(taken));
            for ahead in 0..waiting {
                prop_assert_eq!(ring.peek(ahead), [taken.wrapping_add(ahead) as u8; SLOT]);
            }
            ring.take(waiting);
            taken = made;
            let count = responses.min(ring.owed());
            let first = ring.rsp_prod;
            for n in 0..count {
                ring.respond(&[!(first.wrapping_add(n) as u8); 16]);
            }
            let notify = ring.publish();
            let new = first.wrapping_add(count);
            prop_assert_eq!(word(&guest, &frames, 8), new);
            // The guest's event lies among the new responses.
            let wants = count > 0 && new.wrapping_sub(event) < count;
            prop_assert_eq!(notify, wants);
            while seen != new {
                let at = place(seen);
                let got: [u8; 1] = guest.read((frames[at / 4096] << 12) + (at % 4096) as u64);
                prop_assert_eq!(got, [!(seen as u8)]);
                seen = seen.wrapping_add(1);
            }
            if wait {
                event = seen.wrapping_add(1);
                guest.write((frames[0] << 12) + 12, &event.to_le_bytes());
            }
            prop_assert_eq!(ring.sleep(), Ok(false));
            prop_assert_eq!(word(&guest, &frames, 4), taken.wrapping_add(1));
        }
    }

    /// A hostile guest: whatever its index says, no more than the ring's slots are taken,
    /// and none that has no response yet is overwritten.
    #[test]
    fn an_index_that_cannot_be_is_refused(
        indices in proptest::collection::vec((any::<u32>(), 0u32..64), 1..60),
    ) {
        let guest = FakeGuest::new(1);
        let (mut ring, frames) = ring(&guest, 1);
        for (index, near) in indices {
            for index in [index, ring.req_cons.wrapping_add(near)] {
                guest.write(frames[0] << 12, &index.to_le_bytes());
                let waiting = index.wrapping_sub(ring.req_cons);
                match ring.waiting() {
                    Ok(found) => {
                        prop_assert_eq!(found, waiting);
                        prop_assert!(found + ring.owed() <= 32);
                        ring.take(found.min(3));
                    }
                    Err(Overrun(found, slots)) => {
                        prop_assert_eq!((found, slots), (waiting, 32));
                        prop_assert!(waiting > 32 - ring.owed());
                    }
                }
                if ring.owed() > 20 {
                    ring.respond(&[0; 16]);
                    let _ = ring.publish();
                }
            }
        }
    }
}
