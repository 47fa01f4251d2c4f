//! Requests of a disk that are wrong in themselves: none of them is carried out, and each
//! is answered.

use super::blkfront::{Blkfront, SLOT, WINDOW, indirect, op, request, segment};
use super::guest::{PAGE, claim, share};
use crate::rng::Rng;

/// Indirect descriptors' pages among a disk's data.
const DESCRIPTORS: usize = 8;

/// A sector from which `length` sectors are not all on the disk.
fn off_the_end(disk: &Blkfront, rng: &mut Rng, length: u64) -> u64 {
    match rng.below(7) {
        0 => disk.sectors - rng.below(length),
        1 => disk.sectors,
        2 => disk.sectors + rng.below(1 << 20),
        // In bytes beyond 2^64, to a place on the disk.
        3 => (1 << 55) + rng.below(WINDOW),
        4 => (1 << 63) | rng.below(WINDOW),
        5 => u64::MAX - rng.below(length + 8),
        _ => disk.sectors | rng.next(),
    }
}

/// A request that is wrong, of an operation that reads or writes.
fn wrong(disk: &mut Blkfront, rng: &mut Rng) -> [u8; SLOT] {
    let id = disk.id();
    let kind = rng.pick(&[op::READ, op::WRITE]);
    let sector = rng.below(WINDOW / 2);
    let good = |disk: &Blkfront, n: u64| segment(disk.data(n as usize).gref(), 0, 7);
    match rng.below(10) {
        0 => {
            let op = rng.pick(&[op::BARRIER, 4, 7, 8, 100, 255]);
            request(op, 1, id, sector, &[good(disk, 4)])
        }
        1 => {
            let count = rng.pick(&[0, 12, 13, 128, 255]);
            request(kind, count, id, sector, &[good(disk, 4)])
        }
        2 => {
            let (first, last) = rng.pick(&[(1, 0), (7, 0), (0, 8), (8, 8), (0, 255), (255, 255)]);
            let bad = segment(disk.data(4).gref(), first, last);
            // Not the first one at times: all or nothing.
            let segments = [good(disk, 5), good(disk, 6), bad];
            let skip = rng.below(3) as usize;
            request(kind, 3 - skip as u8, id, sector, &segments[skip..])
        }
        3..6 => {
            let count = 1 + rng.below(11);
            let mut segments = [[0; 8]; 11];
            for (n, one) in segments.iter_mut().enumerate() {
                *one = good(disk, 4 + n as u64);
            }
            let sector = off_the_end(disk, rng, count * 8);
            request(kind, count as u8, id, sector, &segments[..count as usize])
        }
        6 => {
            let mut slot = request(op::DISCARD, 0, id, 0, &[]);
            let (sector, count) = match rng.below(4) {
                0 => (off_the_end(disk, rng, 8), 8),
                1 => (sector, u64::MAX - rng.below(8)),
                2 => (sector, 1 << 55),
                _ => (sector + 1, disk.sectors),
            };
            slot[16..24].copy_from_slice(&sector.to_le_bytes());
            slot[24..32].copy_from_slice(&count.to_le_bytes());
            slot
        }
        7 => {
            // A flush with data, which goes behind the end.
            let sector = off_the_end(disk, rng, 8);
            request(op::FLUSH, 1, id, sector, &[good(disk, 4)])
        }
        _ => wrong_indirect(disk, rng, kind, id, sector),
    }
}

/// Segments in pages of their own, wrong.
fn wrong_indirect(
    disk: &mut Blkfront,
    rng: &mut Rng,
    kind: u8,
    id: u64,
    sector: u64,
) -> [u8; SLOT] {
    let page = disk.data(DESCRIPTORS);
    let gref = share(page, true);
    // Right ones, to begin with.
    for n in 0..PAGE / 8 {
        page.put(n * 8, &segment(disk.data(16 + n % 8).gref(), 0, 7));
    }
    match rng.below(7) {
        // Their number.
        0 => indirect(
            kind,
            rng.pick(&[0, 257, 512, 4096, u16::MAX]),
            id,
            sector,
            &[gref],
        ),
        // What is inside, or another one inside.
        1 => {
            let inner = rng.pick(&[op::FLUSH, op::DISCARD, op::INDIRECT, op::BARRIER, 200]);
            indirect(inner, 4, id, sector, &[gref])
        }
        // Their page.
        2 => indirect(
            kind,
            4,
            id,
            sector,
            &[rng.pick(&[0xffff_ffff, 400, 510, 1 << 20])],
        ),
        // Garbage in it, with at least one that cannot be.
        3 => {
            page.fill(|n| (n as u32).wrapping_mul(0x9e37_79b9) | 0xff);
            indirect(kind, 1 + rng.below(256) as u16, id, sector, &[gref])
        }
        // The ring itself: its header is no segment that can be.
        4 => {
            disk.ring(0)
                .word(20)
                .store(0x0000_00ff, core::sync::atomic::Ordering::SeqCst);
            indirect(kind, 8, id, sector, &[disk.ring(0).gref()])
        }
        // One of many.
        5 => {
            let count = 1 + rng.below(256);
            let at = rng.below(count) as usize * 8;
            page.put(at, &segment(disk.data(16).gref(), 3, 2));
            indirect(kind, count as u16, id, sector, &[gref])
        }
        _ => {
            let count = 1 + rng.below(256);
            let sector = off_the_end(disk, rng, count * 8);
            indirect(kind, count as u16, id, sector, &[gref])
        }
    }
}

/// Wrong requests beside right ones, as many as the ring has.
pub fn attack(disk: &mut Blkfront, rng: &mut Rng) {
    for _ in 0..6 {
        let mut right = [0u64; 64];
        let mut rights = 0;
        let one_page_of_descriptors = 1 + rng.below(u64::from(disk.room().min(24)));
        for _ in 0..one_page_of_descriptors {
            if rng.once_in(4) {
                let id = disk.id();
                let gref = disk.data(30).gref();
                disk.put(&request(
                    op::READ,
                    1,
                    id,
                    rng.below(WINDOW - 8),
                    &[segment(gref, 0, 7)],
                ));
                right[rights] = id;
                rights += 1;
                continue;
            }
            let slot = wrong(disk, rng);
            disk.put(&slot);
            // The page of descriptors is one: it is made for one request at a time.
            if slot[0] == op::INDIRECT {
                break;
            }
        }
        disk.push();
        let all = disk.answers(|answer| {
            let good = right[..rights].contains(&answer.id);
            assert!(
                good == (answer.status == 0),
                "does not hold: request {} is answered with {}, of {right:?}",
                answer.id,
                answer.status
            );
        });
        claim(all, "all requests are answered");
    }
}

/// Requests that change after they were shown. Whatever they are then, they are within
/// the window or none.
pub fn changing(disk: &mut Blkfront, rng: &mut Rng) {
    for _ in 0..12 {
        let page = disk.data(DESCRIPTORS);
        let gref = share(page, true);
        for n in 0..PAGE / 8 {
            page.put(n * 8, &segment(disk.data(16 + n % 8).gref(), 0, 7));
        }
        let id = disk.id();
        let kind = rng.pick(&[op::READ, op::WRITE]);
        let sector = rng.below(WINDOW / 2);
        let index = if rng.once_in(2) {
            disk.put(&indirect(kind, 256, id, sector, &[gref]))
        } else {
            let one = segment(disk.data(16).gref(), 0, 7);
            disk.put(&request(kind, 4, id, sector, &[one; 4]))
        };
        disk.push();
        for _ in 0..rng.below(400) {
            match rng.below(6) {
                // The sector's upper half: far beyond the end, and back.
                0 => disk.poke(
                    index,
                    20,
                    &rng.pick(&[0u32, 0x80_0000, u32::MAX]).to_le_bytes(),
                ),
                // Operation, number of segments.
                1 => {
                    let op = rng.pick(&[kind, 77, op::INDIRECT]);
                    disk.poke(index, 0, &[op, rng.pick(&[kind, 4, 0, 255]), 0, 1]);
                }
                // A segment in the slot, which is a grant of an indirect one.
                2 => disk.poke(index, 24, &rng.pick(&[0u32, 1 << 30, gref]).to_le_bytes()),
                3 => disk.poke(
                    index,
                    28,
                    &rng.pick(&[0u32, 0xffff, gref, 0x0007_0000]).to_le_bytes(),
                ),
                // One in the page.
                _ => {
                    let at = rng.below(512) as usize * 8;
                    let (first, last) = rng.pick(&[(0, 7), (7, 0), (0, 255)]);
                    page.put(at, &segment(disk.data(16).gref(), first, last));
                }
            }
        }
        // Answered once, by whatever id it had when it was taken: never more.
        claim(disk.answers(|_| {}), "a request that changes is answered");
    }
}
