//! A block frontend for tests.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{FakeGuest, PATIENCE};
use crate::block::protocol::{SLOT, op};
use crate::block::{CLASS, device_number};
use std::time::Instant;

/// `xen-blkfront` with one queue.
pub struct Blkfront {
    guest: Arc<FakeGuest>,
    directory: String,
    /// Its event channel.
    pub port: u32,
    frames: Vec<u64>,
    grefs: Vec<u32>,
    slots: u32,
    req_prod: u32,
    rsp_cons: u32,
    answers: BTreeMap<u64, (u8, i16)>,
    next_id: u64,
}

impl Blkfront {
    /// Connects to disk `index` by a ring of `1 << order` pages.
    ///
    /// # Panics
    /// The backend does not connect.
    pub fn connect(guest: &Arc<FakeGuest>, index: u32, order: u32) -> Self {
        let mut front = Self::offer(guest, index, order);
        front.wait_connected();
        front.slots = 1 << ((((4096usize << order) - 64) / SLOT).ilog2());
        front
    }

    /// As [`Blkfront::connect`], without waiting for the backend.
    pub fn offer(guest: &Arc<FakeGuest>, index: u32, order: u32) -> Self {
        let directory = format!("device/{CLASS}/{}", device_number(index));
        let backend = guest
            .get(&format!("{directory}/backend"))
            .expect("a device");
        guest.wait_for(&format!("{backend}/state"), Some("2"));
        let frames: Vec<u64> = (0..1 << order).map(|_| guest.frame()).collect();
        let grefs: Vec<u32> = frames.iter().map(|f| guest.grant(*f, false)).collect();
        for frame in &frames {
            guest.write(frame << 12, &[0; 4096]);
        }
        guest.write((frames[0] << 12) + 4, &1u32.to_le_bytes());
        guest.write((frames[0] << 12) + 12, &1u32.to_le_bytes());
        let port = guest.port();
        if order == 0 {
            guest.put(&format!("{directory}/ring-ref"), &grefs[0].to_string());
        } else {
            guest.put(&format!("{directory}/ring-page-order"), &order.to_string());
            for (n, gref) in grefs.iter().enumerate() {
                guest.put(&format!("{directory}/ring-ref{n}"), &gref.to_string());
            }
        }
        guest.put(&format!("{directory}/event-channel"), &port.to_string());
        guest.put(&format!("{directory}/protocol"), "x86_64-abi");
        guest.put(&format!("{directory}/state"), "3");
        Self {
            guest: Arc::clone(guest),
            directory,
            port,
            frames,
            grefs,
            slots: 32,
            req_prod: 0,
            rsp_cons: 0,
            answers: BTreeMap::new(),
            next_id: 100,
        }
    }

    fn wait_connected(&self) {
        let state = format!("{}/state", self.backend());
        self.guest.wait_for(&state, Some("4"));
        self.guest.put(&format!("{}/state", self.directory), "4");
    }

    /// The backend's directory.
    ///
    /// # Panics
    /// There is none.
    #[must_use]
    pub fn backend(&self) -> String {
        self.guest
            .get(&format!("{}/backend", self.directory))
            .expect("a device")
    }

    /// Sets the frontend's state.
    pub fn state(&self, state: u8) {
        self.guest
            .put(&format!("{}/state", self.directory), &state.to_string());
    }

    /// Takes the ring's grants back. Whether the backend uses none of them.
    #[must_use]
    pub fn revoke_ring(&self) -> bool {
        self.grefs.iter().all(|gref| self.guest.revoke(*gref))
    }

    /// Slots of the ring.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Writes raw bytes into the next slot. They are seen after [`Blkfront::push`].
    pub fn slot(&mut self, bytes: &[u8; SLOT]) {
        let at = 64 + (self.req_prod % self.slots) as usize * SLOT;
        for (n, byte) in bytes.iter().enumerate() {
            let at = at + n;
            self.guest.write(
                (self.frames[at / 4096] << 12) + (at % 4096) as u64,
                &[*byte],
            );
        }
        self.req_prod = self.req_prod.wrapping_add(1);
    }

    /// Shows the requests to the backend, and notifies it.
    pub fn push(&self) {
        self.set_producer(self.req_prod);
        self.guest.notify(self.port);
    }

    /// Sets the producer index to anything.
    pub fn set_producer(&self, value: u32) {
        self.guest.write(self.frames[0] << 12, &value.to_le_bytes());
    }

    /// Puts a request with its segments' grants into the ring; its id.
    pub fn request(&mut self, op: u8, sector: u64, segments: &[(u32, u8, u8)]) -> u64 {
        let id = self.id();
        let mut slot = [0; SLOT];
        slot[0] = op;
        slot[1] = u8::try_from(segments.len()).expect("few");
        slot[8..16].copy_from_slice(&id.to_le_bytes());
        slot[16..24].copy_from_slice(&sector.to_le_bytes());
        for (n, segment) in segments.iter().enumerate() {
            slot[24 + n * 8..32 + n * 8].copy_from_slice(&encode(*segment));
        }
        self.slot(&slot);
        id
    }

    /// As [`Blkfront::request`], with the segments in a page of their own.
    pub fn indirect(&mut self, op: u8, sector: u64, segments: &[(u32, u8, u8)]) -> u64 {
        let id = self.id();
        let mut slot = [0; SLOT];
        slot[0] = op::INDIRECT;
        slot[1] = op;
        let count = u16::try_from(segments.len()).expect("few");
        slot[2..4].copy_from_slice(&count.to_le_bytes());
        slot[8..16].copy_from_slice(&id.to_le_bytes());
        slot[16..24].copy_from_slice(&sector.to_le_bytes());
        let page = self.guest.frame();
        for (n, segment) in segments.iter().enumerate() {
            self.guest
                .write((page << 12) + n as u64 * 8, &encode(*segment));
        }
        slot[28..32].copy_from_slice(&self.guest.grant(page, true).to_le_bytes());
        self.slot(&slot);
        id
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    /// Waits for the answer to a request: the operation and the status in it.
    ///
    /// # Panics
    /// It never comes, or the ring is wrong.
    pub fn answer(&mut self, id: u64) -> (u8, i16) {
        let until = Instant::now() + PATIENCE;
        loop {
            self.collect();
            if let Some(answer) = self.answers.remove(&id) {
                return answer;
            }
            assert!(Instant::now() < until, "no answer to request {id}");
            let seen = self.guest.raised(self.port);
            self.collect();
            if !self.answers.contains_key(&id) {
                self.guest.wait_raised(self.port, seen);
            }
        }
    }

    /// Whether a request was answered by now.
    pub fn answered(&mut self, id: u64) -> bool {
        self.collect();
        self.answers.contains_key(&id)
    }

    fn collect(&mut self) {
        let ring = self.frames[0] << 12;
        loop {
            let produced = u32::from_le_bytes(self.guest.read(ring + 8));
            assert!(produced.wrapping_sub(self.rsp_cons) <= self.slots);
            while self.rsp_cons != produced {
                let at = 64 + (self.rsp_cons % self.slots) as usize * SLOT;
                let mut bytes = [0; 16];
                for (n, byte) in bytes.iter_mut().enumerate() {
                    let at = at + n;
                    [*byte] = self
                        .guest
                        .read((self.frames[at / 4096] << 12) + (at % 4096) as u64);
                }
                let (id, _) = bytes.split_first_chunk::<8>().expect("16 bytes");
                let status = i16::from_le_bytes([bytes[10], bytes[11]]);
                let twice = self
                    .answers
                    .insert(u64::from_le_bytes(*id), (bytes[8], status));
                assert_eq!(twice, None, "answered twice");
                self.rsp_cons = self.rsp_cons.wrapping_add(1);
            }
            // Wants to hear of the next one; looks again, as Linux does.
            self.guest
                .write(ring + 12, &self.rsp_cons.wrapping_add(1).to_le_bytes());
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            if u32::from_le_bytes(self.guest.read(ring + 8)) == self.rsp_cons {
                return;
            }
        }
    }
}

fn encode((gref, first, last): (u32, u8, u8)) -> [u8; 8] {
    let [a, b, c, d] = gref.to_le_bytes();
    [a, b, c, d, first, last, 0, 0]
}
