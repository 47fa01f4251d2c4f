//! A network frontend for tests.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use super::{FakeGuest, PATIENCE};
use crate::net::CLASS;
use crate::net::protocol::{
    EXTRA_MORE, Gso, GsoKind, RX_SLOT, RxRequest, TX_SLOT, extra_type, rx_flag, tx_flag,
};

/// Slots of each ring.
const SLOTS: u32 = 256;
const PAGE: usize = 4096;

/// What a frontend says that it can.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// Queues.
    pub queues: u32,
    /// An event channel for each direction.
    pub split: bool,
    /// Packets of several pages.
    pub sg: bool,
    /// TCP over IPv4 that is to be cut, or was not.
    pub gso4: bool,
    /// And over IPv6.
    pub gso6: bool,
    /// It wants all checksums over IPv4.
    pub no_csum: bool,
    /// Blank checksums over IPv6.
    pub csum6: bool,
    /// Multicast that it subscribes to only.
    pub multicast: bool,
}

impl Features {
    /// Those of Linux.
    pub const LINUX: Self = Self {
        queues: 1,
        split: true,
        sg: true,
        gso4: true,
        gso6: true,
        no_csum: false,
        csum6: true,
        multicast: false,
    };

    /// None.
    pub const NONE: Self = Self {
        queues: 1,
        split: false,
        sg: false,
        gso4: false,
        gso6: false,
        no_csum: true,
        csum6: false,
        multicast: false,
    };
}

/// `xen-netfront`.
pub struct Netfront {
    guest: Arc<FakeGuest>,
    directory: String,
    /// Its queues.
    pub queues: Vec<NetQueue>,
}

/// A queue of a [`Netfront`].
pub struct NetQueue {
    guest: Arc<FakeGuest>,
    tx_ring: u64,
    rx_ring: u64,
    ring_grefs: [u32; 2],
    /// Event channel of the direction from the guest.
    pub tx_port: u32,
    /// And to it.
    pub rx_port: u32,
    tx_prod: u32,
    tx_cons: u32,
    rx_prod: u32,
    rx_cons: u32,
    /// A frame and a grant for each id.
    tx_pages: Vec<(u64, u32)>,
    rx_pages: Vec<(u64, u32)>,
    /// Ids that are in no packet.
    free: Vec<u16>,
    answers: BTreeMap<u16, i16>,
}

/// A packet that a guest got.
#[derive(Debug, PartialEq, Eq)]
pub struct Got {
    /// It.
    pub bytes: Vec<u8>,
    /// Flags of its first response.
    pub flags: u16,
    /// It is to be cut, or was not.
    pub gso: Option<Gso>,
}

impl Netfront {
    /// Connects to device `index`, and posts all pages.
    ///
    /// # Panics
    /// The backend does not connect.
    pub fn connect(guest: &Arc<FakeGuest>, index: u32, features: Features) -> Self {
        let mut front = Self::offer(guest, index, features);
        front.wait_connected();
        for queue in &mut front.queues {
            queue.post(SLOTS);
        }
        front
    }

    /// As [`Netfront::connect`], without waiting for the backend or posting.
    pub fn offer(guest: &Arc<FakeGuest>, index: u32, features: Features) -> Self {
        let front = Self::prepare(guest, index, features);
        front.put("state", 4);
        front
    }

    /// As [`Netfront::offer`], but the backend is not told yet.
    pub fn prepare(guest: &Arc<FakeGuest>, index: u32, features: Features) -> Self {
        let directory = format!("device/{CLASS}/{index}");
        let front = Self {
            queues: (0..features.queues)
                .map(|_| NetQueue::new(guest, features.split))
                .collect(),
            guest: Arc::clone(guest),
            directory,
        };
        guest.wait_for(&format!("{}/state", front.backend()), Some("2"));
        if features.queues > 1 {
            front.put("multi-queue-num-queues", features.queues);
        }
        for (n, queue) in front.queues.iter().enumerate() {
            let prefix = match features.queues {
                1 => String::new(),
                _ => format!("queue-{n}/"),
            };
            front.put(&format!("{prefix}tx-ring-ref"), queue.ring_grefs[0]);
            front.put(&format!("{prefix}rx-ring-ref"), queue.ring_grefs[1]);
            if features.split {
                front.put(&format!("{prefix}event-channel-tx"), queue.tx_port);
                front.put(&format!("{prefix}event-channel-rx"), queue.rx_port);
            } else {
                front.put(&format!("{prefix}event-channel"), queue.tx_port);
            }
        }
        for (name, on) in [
            ("request-rx-copy", true),
            ("feature-rx-notify", true),
            ("feature-sg", features.sg),
            ("feature-gso-tcpv4", features.gso4),
            ("feature-gso-tcpv6", features.gso6),
            ("feature-no-csum-offload", features.no_csum),
            ("feature-ipv6-csum-offload", features.csum6),
            ("request-multicast-control", features.multicast),
        ] {
            front.put(name, u32::from(on));
        }
        front
    }

    /// Waits until the backend is connected.
    pub fn wait_connected(&self) {
        self.guest
            .wait_for(&format!("{}/state", self.backend()), Some("4"));
    }

    /// Writes one of the frontend's nodes.
    pub fn put(&self, name: &str, value: u32) {
        self.guest
            .put(&format!("{}/{name}", self.directory), &value.to_string());
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

    /// Closes the device, and takes everything back: nothing is in use then.
    ///
    /// # Panics
    /// Something is.
    pub fn close(self) {
        self.put("state", 6);
        self.guest
            .wait_for(&format!("{}/state", self.backend()), Some("6"));
        self.assert_unused();
    }

    /// # Panics
    /// The backend uses a grant.
    pub fn assert_unused(&self) {
        for queue in &self.queues {
            let pages = queue.tx_pages.iter().chain(&queue.rx_pages);
            let grefs = pages.map(|(_, gref)| *gref).chain(queue.ring_grefs);
            for gref in grefs {
                assert!(self.guest.revoke(gref), "grant {gref} is in use");
            }
        }
    }
}

impl NetQueue {
    fn new(guest: &Arc<FakeGuest>, split: bool) -> Self {
        let ring = || {
            let frame = guest.frame();
            guest.write(frame << 12, &[0; PAGE]);
            guest.write((frame << 12) + 4, &1u32.to_le_bytes());
            guest.write((frame << 12) + 12, &1u32.to_le_bytes());
            (frame << 12, guest.grant(frame, false))
        };
        let ((tx_ring, tx_gref), (rx_ring, rx_gref)) = (ring(), ring());
        let tx_port = guest.port();
        let pages = |readonly| {
            (0..SLOTS)
                .map(|_| {
                    let frame = guest.frame();
                    (frame, guest.grant(frame, readonly))
                })
                .collect()
        };
        Self {
            guest: Arc::clone(guest),
            tx_ring,
            rx_ring,
            ring_grefs: [tx_gref, rx_gref],
            tx_port,
            rx_port: if split { guest.port() } else { tx_port },
            tx_prod: 0,
            tx_cons: 0,
            rx_prod: 0,
            rx_cons: 0,
            tx_pages: pages(true),
            rx_pages: pages(false),
            free: (0..256).rev().collect(),
            answers: BTreeMap::new(),
        }
    }

    /// Sends a packet in pages of its own, from odd places in them. The ids to be answered.
    ///
    /// # Panics
    /// There is no room: collect answers first.
    pub fn send(&mut self, packet: &[u8], flags: u16, gso: Option<Gso>) -> Vec<u16> {
        let ids = self.put(packet, flags, gso);
        self.push();
        ids
    }

    /// As [`NetQueue::send`], but the backend does not see it yet.
    ///
    /// # Panics
    /// As [`NetQueue::send`].
    pub fn put(&mut self, packet: &[u8], flags: u16, gso: Option<Gso>) -> Vec<u16> {
        let mut pieces = Vec::new();
        let mut rest = packet;
        while !rest.is_empty() || pieces.is_empty() {
            let id = self.free.pop().expect("a free id");
            let (frame, gref) = self.tx_pages[usize::from(id)];
            self.guest.grant_as(gref, frame, true);
            let offset = usize::from(id) % 97;
            let (now, later) = rest.split_at(rest.len().min(PAGE - offset));
            self.guest.write((frame << 12) + offset as u64, now);
            pieces.push((id, gref, offset, now.len()));
            rest = later;
        }
        let last = pieces.len() - 1;
        for (n, (id, gref, offset, length)) in pieces.iter().enumerate() {
            let mut own = if n < last { tx_flag::MORE_DATA } else { 0 };
            let mut size = *length;
            if n == 0 {
                own |= flags;
                size = packet.len();
                if gso.is_some() {
                    own |= tx_flag::EXTRA_INFO;
                }
            }
            self.slot(&tx_slot(*gref, *offset, own, *id, size));
            if let (0, Some(gso)) = (n, gso) {
                let mut extra = [0; TX_SLOT];
                extra[..8].copy_from_slice(&gso.encode());
                self.slot(&extra);
            }
        }
        pieces.iter().map(|(id, ..)| *id).collect()
    }

    /// Subscribes to a multicast address, or no longer; the id to be answered.
    ///
    /// # Panics
    /// There is no room.
    pub fn subscribe(&mut self, group: [u8; 6], on: bool) -> u16 {
        let id = self.free.pop().expect("a free id");
        self.slot(&tx_slot(0, 0, tx_flag::EXTRA_INFO, id, 0));
        let mut extra = [0; TX_SLOT];
        extra[0] = if on {
            extra_type::MCAST_ADD
        } else {
            extra_type::MCAST_DEL
        };
        extra[2..8].copy_from_slice(&group);
        self.slot(&extra);
        self.push();
        id
    }

    /// Writes raw bytes into the next slot from the guest.
    pub fn slot(&mut self, bytes: &[u8; TX_SLOT]) {
        let at = 64 + u64::from(self.tx_prod % SLOTS) * TX_SLOT as u64;
        self.guest.write(self.tx_ring + at, bytes);
        self.tx_prod = self.tx_prod.wrapping_add(1);
    }

    /// A free id with its grant, for raw slots.
    ///
    /// # Panics
    /// There is none.
    pub fn take_id(&mut self) -> (u16, u32) {
        let id = self.free.pop().expect("a free id");
        let (frame, gref) = self.tx_pages[usize::from(id)];
        self.guest.grant_as(gref, frame, true);
        (id, gref)
    }

    /// Shows what was put to the backend, and notifies it.
    pub fn push(&self) {
        self.set_tx_producer(self.tx_prod);
    }

    /// Sets the producer of the ring from the guest to anything.
    pub fn set_tx_producer(&self, value: u32) {
        self.guest.write(self.tx_ring, &value.to_le_bytes());
        self.guest.notify(self.tx_port);
    }

    /// Sets the producer of the ring to the guest to anything.
    pub fn set_rx_producer(&self, value: u32) {
        self.guest.write(self.rx_ring, &value.to_le_bytes());
        self.guest.notify(self.rx_port);
    }

    /// Writes a raw request of the ring to the guest, for a page of the given grant.
    pub fn post_raw(&mut self, gref: u32) {
        let id = u16::try_from(self.rx_prod % SLOTS).expect("below 256");
        let mut slot = [0; RX_SLOT];
        slot[..2].copy_from_slice(&id.to_le_bytes());
        slot[4..].copy_from_slice(&gref.to_le_bytes());
        assert_eq!(RxRequest::decode(&slot), RxRequest { id, gref });
        let at = 64 + u64::from(id) * RX_SLOT as u64;
        self.guest.write(self.rx_ring + at, &slot);
        self.rx_prod = self.rx_prod.wrapping_add(1);
    }

    /// The grant of page `index` for packets to the guest; of its rings behind those.
    #[must_use]
    pub fn gref(&self, index: usize) -> u32 {
        let [tx, rx] = self.ring_grefs;
        match self.rx_pages.get(index) {
            Some((_, gref)) => *gref,
            None if index.is_multiple_of(2) => tx,
            None => rx,
        }
    }

    /// Posts pages, as many as there is room for at most.
    pub fn post(&mut self, count: u32) {
        for _ in 0..count {
            if self.rx_prod.wrapping_sub(self.rx_cons) == SLOTS {
                break;
            }
            let (frame, gref) = self.rx_pages[(self.rx_prod % SLOTS) as usize];
            self.guest.grant_as(gref, frame, false);
            self.post_raw(gref);
        }
        fence(Ordering::SeqCst);
        self.set_rx_producer(self.rx_prod);
    }

    /// Waits for the answer to an id.
    ///
    /// # Panics
    /// It never comes, or the ring is wrong, or the grant is in use still.
    pub fn answer(&mut self, id: u16) -> i16 {
        let until = Instant::now() + PATIENCE;
        loop {
            let seen = self.guest.raised(self.tx_port);
            self.collect();
            if let Some(answer) = self.answers.remove(&id) {
                self.free.push(id);
                return answer;
            }
            assert!(Instant::now() < until, "no answer to {id}");
            self.guest.wait_raised(self.tx_port, seen);
        }
    }

    /// Waits for the answers to all.
    ///
    /// # Panics
    /// As [`NetQueue::answer`].
    pub fn answers(&mut self, ids: &[u16]) -> Vec<i16> {
        ids.iter().map(|id| self.answer(*id)).collect()
    }

    fn collect(&mut self) {
        loop {
            let produced = u32::from_le_bytes(self.guest.read(self.tx_ring + 8));
            assert!(produced.wrapping_sub(self.tx_cons) <= SLOTS);
            while self.tx_cons != produced {
                let at = 64 + u64::from(self.tx_cons % SLOTS) * TX_SLOT as u64;
                let [i0, i1, s0, s1] = self.guest.read(self.tx_ring + at);
                let (id, status) = (u16::from_le_bytes([i0, i1]), i16::from_le_bytes([s0, s1]));
                self.tx_cons = self.tx_cons.wrapping_add(1);
                if status == 1 {
                    continue;
                }
                let (_, gref) = self.tx_pages[usize::from(id)];
                assert!(self.guest.revoke(gref), "the grant of {id} is in use");
                let twice = self.answers.insert(id, status);
                assert_eq!(twice, None, "answered twice");
            }
            let event = self.tx_cons.wrapping_add(1);
            self.guest.write(self.tx_ring + 12, &event.to_le_bytes());
            fence(Ordering::SeqCst);
            if u32::from_le_bytes(self.guest.read(self.tx_ring + 8)) == self.tx_cons {
                return;
            }
        }
    }

    /// Waits for a packet. Its pages are posted again.
    ///
    /// # Panics
    /// None comes, or what comes is not by the rules.
    pub fn receive(&mut self) -> Got {
        let got = self.receive_only();
        self.post(SLOTS);
        got
    }

    /// As [`NetQueue::receive`], without posting.
    ///
    /// # Panics
    /// As [`NetQueue::receive`].
    pub fn receive_only(&mut self) -> Got {
        let first = self.response();
        let mut got = Got {
            bytes: self.data(&first),
            flags: first.flags,
            gso: None,
        };
        let mut extra = first.flags & rx_flag::EXTRA_INFO != 0;
        while extra {
            let bytes = self.response().bytes;
            assert_eq!(bytes[0], extra_type::GSO);
            extra = bytes[1] & EXTRA_MORE != 0;
            let kind = match bytes[4] {
                1 => GsoKind::TcpV4,
                2 => GsoKind::TcpV6,
                other => panic!("segmentation of kind {other}"),
            };
            let size = u16::from_le_bytes([bytes[2], bytes[3]]);
            got.gso = Some(Gso { kind, size });
        }
        let mut more = first.flags & rx_flag::MORE_DATA != 0;
        let mut pages = 1;
        while more {
            let next = self.response();
            more = next.flags & rx_flag::MORE_DATA != 0;
            got.bytes.extend(self.data(&next));
            pages += 1;
        }
        assert!(pages <= 18, "Linux takes no more");
        got
    }

    /// Waits for a response that is an error.
    ///
    /// # Panics
    /// It is none.
    pub fn receive_error(&mut self) {
        let response = self.response();
        assert_eq!(response.status, -1);
    }

    fn data(&self, response: &Response) -> Vec<u8> {
        assert_eq!(response.id, response.slot, "answered in its slot");
        let length = usize::try_from(response.status).expect("no error");
        assert!(usize::from(response.offset) + length <= PAGE && length > 0);
        let (frame, _) = self.rx_pages[usize::from(response.id)];
        let page: [u8; PAGE] = self.guest.read(frame << 12);
        page[usize::from(response.offset)..][..length].to_vec()
    }

    fn response(&mut self) -> Response {
        let until = Instant::now() + PATIENCE;
        loop {
            let seen = self.guest.raised(self.rx_port);
            let event = self.rx_cons.wrapping_add(1);
            self.guest.write(self.rx_ring + 12, &event.to_le_bytes());
            fence(Ordering::SeqCst);
            let produced = u32::from_le_bytes(self.guest.read(self.rx_ring + 8));
            assert!(produced.wrapping_sub(self.rx_cons) <= SLOTS);
            if produced != self.rx_cons {
                break;
            }
            assert!(Instant::now() < until, "no packet");
            self.guest.wait_raised(self.rx_port, seen);
        }
        let slot = u16::try_from(self.rx_cons % SLOTS).expect("below 256");
        self.rx_cons = self.rx_cons.wrapping_add(1);
        let bytes: [u8; RX_SLOT] = self
            .guest
            .read(self.rx_ring + 64 + u64::from(slot) * RX_SLOT as u64);
        let (_, gref) = self.rx_pages[usize::from(slot)];
        assert!(self.guest.revoke(gref), "the page of {slot} is in use");
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Response {
            slot,
            id: word(0),
            offset: word(2),
            flags: word(4),
            status: i16::from_le_bytes([bytes[6], bytes[7]]),
            bytes,
        }
    }
}

struct Response {
    slot: u16,
    id: u16,
    offset: u16,
    flags: u16,
    status: i16,
    bytes: [u8; RX_SLOT],
}

/// A `netif_tx_request`.
#[must_use]
pub fn tx_slot(gref: u32, offset: usize, flags: u16, id: u16, size: usize) -> [u8; TX_SLOT] {
    let [a, b, c, d] = gref.to_le_bytes();
    let [o0, o1, ..] = offset.to_le_bytes();
    let [f0, f1] = flags.to_le_bytes();
    let [i0, i1] = id.to_le_bytes();
    let [s0, s1, ..] = size.to_le_bytes();
    [a, b, c, d, o0, o1, f0, f1, i0, i1, s0, s1]
}
