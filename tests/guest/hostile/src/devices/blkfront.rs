//! An honest block frontend with one queue, of which attacks use the parts.

use core::sync::atomic::{Ordering::SeqCst, fence};

use super::guest::{
    PAGE, PATIENCE, Page, Text, claim, close_port, new_port, notify, revoke, share, wait_for,
};
use super::xenstore::Store;
use crate::text;

/// Bytes of a slot (`public/io/blkif.h`, 64-bit layout).
pub const SLOT: usize = 112;
/// `BLKIF_OP_*`.
pub mod op {
    pub const READ: u8 = 0;
    pub const WRITE: u8 = 1;
    pub const BARRIER: u8 = 2;
    pub const FLUSH: u8 = 3;
    pub const DISCARD: u8 = 5;
    pub const INDIRECT: u8 = 6;
}
/// Most pages of a ring that is used here.
const MOST_PAGES: usize = 4;
/// Pages for data.
pub const DATA: usize = 32;
/// Sectors from the start that this guest writes. It reads and writes no others by a
/// request that is right.
pub const WINDOW: u64 = 4096;

/// A request's segment.
pub fn segment(gref: u32, first: u8, last: u8) -> [u8; 8] {
    let [a, b, c, d] = gref.to_le_bytes();
    [a, b, c, d, first, last, 0, 0]
}

/// A request.
pub fn request(op: u8, count: u8, id: u64, sector: u64, segments: &[[u8; 8]]) -> [u8; SLOT] {
    let mut slot = [0; SLOT];
    slot[0] = op;
    slot[1] = count;
    slot[8..16].copy_from_slice(&id.to_le_bytes());
    slot[16..24].copy_from_slice(&sector.to_le_bytes());
    for (n, segment) in segments.iter().enumerate() {
        slot[24 + n * 8..32 + n * 8].copy_from_slice(segment);
    }
    slot
}

/// A request with segments in pages of their own.
pub fn indirect(op: u8, count: u16, id: u64, sector: u64, grefs: &[u32]) -> [u8; SLOT] {
    let mut slot = [0; SLOT];
    slot[0] = op::INDIRECT;
    slot[1] = op;
    slot[2..4].copy_from_slice(&count.to_le_bytes());
    slot[8..16].copy_from_slice(&id.to_le_bytes());
    slot[16..24].copy_from_slice(&sector.to_le_bytes());
    for (n, gref) in grefs.iter().enumerate() {
        slot[28 + n * 4..32 + n * 4].copy_from_slice(&gref.to_le_bytes());
    }
    slot
}

/// What a response was.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    pub id: u64,
    pub status: i16,
}

pub struct Blkfront {
    /// Its directory.
    pub directory: Text,
    /// The backend's.
    pub backend: Text,
    /// Its first page; ring, then data.
    first: usize,
    /// Pages of the ring.
    pages: usize,
    slots: u32,
    pub port: u32,
    pub req_prod: u32,
    pub rsp_cons: u32,
    /// Sectors of the disk.
    pub sectors: u64,
    next_id: u64,
    /// Requests made.
    pub requests: u64,
}

impl Blkfront {
    /// Disk `index`, with pages from `first` on; not connected.
    pub fn new(store: &mut Store, index: u32, first: usize) -> Self {
        let directory = text!("device/vbd/{}", 202 << 8 | index << 4);
        let backend = Text::of(
            store
                .read(text!("{}/backend", directory.str()).str())
                .unwrap_or(b""),
        );
        claim(!backend.bytes().is_empty(), "the VM has a disk");
        Self {
            directory,
            backend,
            first,
            pages: 1,
            slots: 32,
            port: 0,
            req_prod: 0,
            rsp_cons: 0,
            sectors: 0,
            next_id: 0,
            requests: 0,
        }
    }

    pub fn node(&self, name: &str) -> Text {
        text!("{}/{name}", self.directory.str())
    }
    pub fn backend_node(&self, name: &str) -> Text {
        text!("{}/{name}", self.backend.str())
    }
    pub fn ring(&self, n: usize) -> Page {
        Page(self.first + n)
    }
    pub fn data(&self, n: usize) -> Page {
        Page(self.first + MOST_PAGES + n % DATA)
    }

    /// Connects by a ring of `1 << order` pages; the backend waits for it.
    pub fn connect(&mut self, store: &mut Store, order: u32) {
        let state = self.backend_node("state");
        claim(
            store.wait(state.str(), b"2", PATIENCE),
            "a disk's backend waits",
        );
        self.offer(store, order);
        claim(
            store.wait(state.str(), b"4", PATIENCE),
            "a disk's backend connects",
        );
        store.put(self.node("state").str(), b"4");
        let sectors = store
            .read(self.backend_node("sectors").str())
            .unwrap_or(b"");
        self.sectors = sectors
            .iter()
            .fold(0, |n, digit| n * 10 + u64::from(digit - b'0'));
        claim(self.sectors > 2 * WINDOW - 1, "a disk of twice the window");
    }

    /// Says where a fresh ring is.
    pub fn offer(&mut self, store: &mut Store, order: u32) {
        self.pages = (1 << order).min(MOST_PAGES);
        self.slots = 1 << ((self.pages * PAGE - 64) / SLOT).ilog2();
        (self.req_prod, self.rsp_cons) = (0, 0);
        for n in 0..self.pages {
            self.ring(n).fill(|_| 0);
            share(self.ring(n), false);
        }
        self.ring(0).word(4).store(1, SeqCst);
        self.ring(0).word(12).store(1, SeqCst);
        for n in 0..DATA {
            share(self.data(n), false);
        }
        self.port = new_port();
        for name in [
            "multi-queue-num-queues",
            "ring-page-order",
            "feature-persistent",
        ] {
            // Mostly it is not there.
            let _ = store.ask(
                super::xenstore::kind::RM,
                0,
                &[self.node(name).bytes(), b"\0"],
            );
        }
        if order == 0 {
            store.put_number(self.node("ring-ref").str(), self.ring(0).gref());
        } else {
            store.put_number(self.node("ring-page-order").str(), order);
            for n in 0..self.pages {
                let name = self.node(text!("ring-ref{n}").str());
                store.put_number(name.str(), self.ring(n).gref());
            }
        }
        store.put_number(self.node("event-channel").str(), self.port);
        store.put(self.node("protocol").str(), b"x86_64-abi");
        store.put(self.node("state").str(), b"3");
    }

    /// Closes whatever there is, sees that nothing is in use then, and begins anew.
    pub fn begin_anew(&mut self, store: &mut Store) {
        store.put(self.node("state").str(), b"6");
        claim(
            store.wait(self.backend_node("state").str(), b"6", PATIENCE),
            "a disk's backend closes",
        );
        for n in 0..MOST_PAGES {
            claim(
                revoke(self.ring(n).gref()),
                "no ring of a closed disk is in use",
            );
        }
        for n in 0..DATA {
            claim(
                revoke(self.data(n).gref()),
                "no page of a closed disk is in use",
            );
        }
        if self.port != 0 {
            close_port(self.port);
        }
        store.put(self.node("state").str(), b"1");
    }

    /// Begins anew and connects.
    pub fn reconnect(&mut self, store: &mut Store, order: u32) {
        self.begin_anew(store);
        self.connect(store, order);
    }

    pub fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Place of a slot: its page and its offset there.
    fn place(&self, index: u32, at: usize) -> (Page, usize) {
        let at = 64 + (index % self.slots) as usize * SLOT + at;
        (self.ring(at / PAGE), at % PAGE)
    }

    /// Writes a request's bytes from `at` on, also of one that is under way.
    pub fn poke(&self, index: u32, at: usize, bytes: &[u8]) {
        for (n, word) in bytes.chunks(4).enumerate() {
            let (page, at) = self.place(index, at + n * 4);
            page.put(at, word);
        }
    }

    /// Room for so many requests.
    pub fn room(&self) -> u32 {
        self.slots - self.req_prod.wrapping_sub(self.rsp_cons)
    }

    /// Places in the ring.
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Puts a request into the ring; where it is.
    pub fn put(&mut self, slot: &[u8; SLOT]) -> u32 {
        let index = self.req_prod;
        self.poke(index, 0, slot);
        self.req_prod = index.wrapping_add(1);
        self.requests += 1;
        index
    }

    /// Shows what was put.
    pub fn push(&self) {
        self.produce(self.req_prod);
    }

    /// Sets the index of requests to anything.
    pub fn produce(&self, index: u32) {
        self.ring(0).word(0).store(index, SeqCst);
        notify(self.port);
    }

    /// The next response, if there is one.
    pub fn take(&mut self) -> Option<Answer> {
        fence(SeqCst);
        let produced = self.ring(0).word(8).load(SeqCst);
        let there = produced.wrapping_sub(self.rsp_cons);
        claim(there <= self.slots, "no more responses than requests");
        if there == 0 {
            let next = self.rsp_cons.wrapping_add(1);
            self.ring(0).word(12).store(next, SeqCst);
            return None;
        }
        let mut bytes = [0; 12];
        for n in 0..3 {
            let (page, at) = self.place(self.rsp_cons, n * 4);
            bytes[n * 4..n * 4 + 4].copy_from_slice(&page.get::<4>(at));
        }
        self.rsp_cons = self.rsp_cons.wrapping_add(1);
        let mut id = [0; 8];
        id.copy_from_slice(&bytes[..8]);
        Some(Answer {
            id: u64::from_le_bytes(id),
            status: i16::from_le_bytes([bytes[10], bytes[11]]),
        })
    }

    /// Waits for the answers to all that was asked. Whether all came.
    pub fn answers(&mut self, mut each: impl FnMut(Answer)) -> bool {
        let port = self.port;
        wait_for(port, PATIENCE, || {
            while let Some(answer) = self.take() {
                each(answer);
            }
            self.rsp_cons == self.req_prod
        })
    }

    /// One request, and its status.
    pub fn ask(&mut self, slot: &[u8; SLOT]) -> i16 {
        let mut status = None;
        let index = self.put(slot);
        self.push();
        let mut id = [0; 8];
        id.copy_from_slice(&slot[8..16]);
        let id = u64::from_le_bytes(id);
        let all = self.answers(|answer| {
            claim(answer.id == id, "a response is to what was asked");
            status = Some(answer.status);
        });
        claim(all && index.wrapping_add(1) == self.rsp_cons, "an answer");
        status.unwrap_or(i16::MIN)
    }

    /// Writes a page of words made of `mark`, flushes, and reads it back.
    pub fn honest(&mut self, sector: u64, mark: u32) {
        let (out, back) = (self.data(0), self.data(1));
        out.fill(|n| mark.wrapping_add(n as u32));
        back.fill(|_| !mark);
        share(out, true);
        share(back, false);
        let of = |page: Page| [segment(page.gref(), 0, 7)];
        let id = self.id();
        let written = self.ask(&request(op::WRITE, 1, id, sector, &of(out)));
        claim(written == 0, "an honest write");
        let id = self.id();
        let flushed = self.ask(&request(op::FLUSH, 0, id, 0, &[]));
        claim(flushed == 0, "an honest flush");
        let id = self.id();
        let read = self.ask(&request(op::READ, 1, id, sector, &of(back)));
        claim(read == 0, "an honest read");
        for n in 0..PAGE / 4 {
            let want = mark.wrapping_add(n as u32);
            claim(
                back.word(n * 4).load(SeqCst) == want,
                "what was written is what is read",
            );
        }
        share(out, false);
    }
}
