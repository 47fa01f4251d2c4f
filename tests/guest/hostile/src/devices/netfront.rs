//! An honest network frontend with one queue, of which attacks use the parts. What proves
//! that the network works is the instance's answer to a question for its address (ARP).

use core::sync::atomic::{Ordering::SeqCst, fence};

use super::guest::{
    PATIENCE, Page, Text, claim, close_port, new_port, notify, revoke, share, wait_for,
};
use super::xenstore::Store;
use crate::text;

/// Slots of each ring (`public/io/netif.h`).
pub const SLOTS: u32 = 256;
pub const TX_SLOT: usize = 12;
pub const RX_SLOT: usize = 8;
/// `XEN_NETTXF_*`.
pub mod flag {
    pub const CSUM_BLANK: u16 = 1;
    pub const MORE_DATA: u16 = 4;
    pub const EXTRA_INFO: u16 = 8;
}
/// Pages for packets from the guest, and to it.
pub const TX_PAGES: usize = 8;
pub const RX_PAGES: usize = 16;
/// The instance's address, and the one that this guest says to have.
const HOST: [u8; 4] = [192, 168, 77, 1];
const OWN: [u8; 4] = [192, 168, 77, 2];
/// Bytes of a packet that asks.
const ASKING: usize = 60;
/// How often it is sent, if nobody answers.
const QUESTIONS: u64 = 5;

/// `netif_tx_request`.
pub fn tx_slot(gref: u32, offset: u16, flags: u16, id: u16, size: u16) -> [u8; TX_SLOT] {
    let mut slot = [0; TX_SLOT];
    slot[..4].copy_from_slice(&gref.to_le_bytes());
    for (n, word) in [offset, flags, id, size].iter().enumerate() {
        slot[4 + n * 2..6 + n * 2].copy_from_slice(&word.to_le_bytes());
    }
    slot
}

pub struct Netfront {
    pub directory: Text,
    pub backend: Text,
    pub mac: [u8; 6],
    first: usize,
    pub port: u32,
    pub tx_prod: u32,
    pub tx_cons: u32,
    pub rx_prod: u32,
    pub rx_cons: u32,
    /// Requests made.
    pub requests: u64,
}

impl Netfront {
    /// Network 0, with pages from `first` on; not connected.
    pub fn new(store: &mut Store, first: usize) -> Self {
        let mut node = |name: &str| {
            let value = store.read(text!("device/vif/0/{name}").str());
            Text::of(value.unwrap_or(b""))
        };
        let (backend, mac) = (node("backend"), node("mac"));
        claim(!backend.bytes().is_empty(), "the VM has a network");
        let mut address = [0; 6];
        for (byte, text) in address.iter_mut().zip(mac.str().split(':')) {
            *byte = u8::from_str_radix(text, 16).unwrap_or(0);
        }
        Self {
            directory: text!("device/vif/0"),
            backend,
            mac: address,
            first,
            port: 0,
            tx_prod: 0,
            tx_cons: 0,
            rx_prod: 0,
            rx_cons: 0,
            requests: 0,
        }
    }

    pub fn node(&self, name: &str) -> Text {
        text!("{}/{name}", self.directory.str())
    }
    pub fn backend_node(&self, name: &str) -> Text {
        text!("{}/{name}", self.backend.str())
    }
    pub fn tx_ring(&self) -> Page {
        Page(self.first)
    }
    pub fn rx_ring(&self) -> Page {
        Page(self.first + 1)
    }
    pub fn tx_page(&self, n: usize) -> Page {
        Page(self.first + 2 + n % TX_PAGES)
    }
    pub fn rx_page(&self, n: usize) -> Page {
        Page(self.first + 2 + TX_PAGES + n % RX_PAGES)
    }

    pub fn connect(&mut self, store: &mut Store) {
        let state = self.backend_node("state");
        claim(
            store.wait(state.str(), b"2", PATIENCE),
            "a network's backend waits",
        );
        self.offer(store);
        claim(
            store.wait(state.str(), b"4", PATIENCE),
            "a network's backend connects",
        );
        self.post();
    }

    /// Says where fresh rings are.
    pub fn offer(&mut self, store: &mut Store) {
        (self.tx_prod, self.tx_cons, self.rx_prod, self.rx_cons) = (0, 0, 0, 0);
        for ring in [self.tx_ring(), self.rx_ring()] {
            ring.fill(|_| 0);
            ring.word(4).store(1, SeqCst);
            ring.word(12).store(1, SeqCst);
            share(ring, false);
        }
        for n in 0..TX_PAGES {
            share(self.tx_page(n), true);
        }
        self.port = new_port();
        for name in [
            "multi-queue-num-queues",
            "event-channel-tx",
            "event-channel-rx",
            "feature-gso-tcpv4",
            "request-multicast-control",
        ] {
            // Mostly it is not there.
            let _ = store.ask(
                super::xenstore::kind::RM,
                0,
                &[self.node(name).bytes(), b"\0"],
            );
        }
        for (name, value) in [
            ("tx-ring-ref", self.tx_ring().gref()),
            ("rx-ring-ref", self.rx_ring().gref()),
            ("event-channel", self.port),
            ("request-rx-copy", 1),
            ("feature-rx-notify", 1),
            ("feature-sg", 1),
            ("state", 4),
        ] {
            store.put_number(self.node(name).str(), value);
        }
    }

    /// Closes whatever there is, sees that nothing is in use then, and begins anew.
    pub fn begin_anew(&mut self, store: &mut Store) {
        store.put(self.node("state").str(), b"6");
        claim(
            store.wait(self.backend_node("state").str(), b"6", PATIENCE),
            "a network's backend closes",
        );
        for page in self.first..self.first + 2 + TX_PAGES + RX_PAGES {
            claim(
                revoke(Page(page).gref()),
                "no page of a closed network is in use",
            );
        }
        if self.port != 0 {
            close_port(self.port);
        }
        store.put(self.node("state").str(), b"1");
    }

    pub fn reconnect(&mut self, store: &mut Store) {
        self.begin_anew(store);
        self.connect(store);
    }

    /// Writes a slot of the ring from the guest.
    pub fn poke(&self, index: u32, slot: &[u8; TX_SLOT]) {
        self.tx_ring()
            .put(64 + (index % SLOTS) as usize * TX_SLOT, slot);
    }
    /// Puts a slot into it.
    pub fn put(&mut self, slot: &[u8; TX_SLOT]) {
        self.poke(self.tx_prod, slot);
        self.tx_prod = self.tx_prod.wrapping_add(1);
        self.requests += 1;
    }
    /// Shows what was put.
    pub fn push(&self) {
        self.produce(self.tx_prod);
    }
    pub fn produce(&self, index: u32) {
        self.tx_ring().word(0).store(index, SeqCst);
        notify(self.port);
    }

    /// The next response to what was sent: its id and status.
    pub fn take(&mut self) -> Option<(u16, i16)> {
        fence(SeqCst);
        let produced = self.tx_ring().word(8).load(SeqCst);
        let there = produced.wrapping_sub(self.tx_cons);
        claim(there <= SLOTS, "no more responses than packets");
        if there == 0 {
            let next = self.tx_cons.wrapping_add(1);
            self.tx_ring().word(12).store(next, SeqCst);
            return None;
        }
        let at = 64 + (self.tx_cons % SLOTS) as usize * TX_SLOT;
        let [i0, i1, s0, s1] = self.tx_ring().get::<4>(at);
        self.tx_cons = self.tx_cons.wrapping_add(1);
        Some((u16::from_le_bytes([i0, i1]), i16::from_le_bytes([s0, s1])))
    }

    /// Waits for the answers to all that was sent. Whether all came.
    pub fn answers(&mut self, mut each: impl FnMut(u16, i16)) -> bool {
        let port = self.port;
        wait_for(port, PATIENCE, || {
            while let Some((id, status)) = self.take() {
                each(id, status);
            }
            self.tx_cons == self.tx_prod
        })
    }

    /// Posts a page for a packet to the guest.
    pub fn post_page(&mut self, gref: u32) {
        let id = self.rx_prod % SLOTS;
        let mut slot = [0; RX_SLOT];
        slot[..2].copy_from_slice(&(id as u16).to_le_bytes());
        slot[4..].copy_from_slice(&gref.to_le_bytes());
        self.rx_ring().put(64 + id as usize * RX_SLOT, &slot);
        self.rx_prod = self.rx_prod.wrapping_add(1);
    }

    /// Posts all pages that are not.
    pub fn post(&mut self) {
        while self.rx_prod.wrapping_sub(self.rx_cons) < RX_PAGES as u32 {
            let gref = share(self.rx_page(self.rx_prod as usize), false);
            self.post_page(gref);
        }
        self.produce_rx(self.rx_prod);
    }

    pub fn produce_rx(&self, index: u32) {
        self.rx_ring().word(0).store(index, SeqCst);
        notify(self.port);
    }

    /// The next response of the ring to the guest: the page and what its status was.
    pub fn receive(&mut self) -> Option<(Page, i16)> {
        fence(SeqCst);
        let produced = self.rx_ring().word(8).load(SeqCst);
        let there = produced.wrapping_sub(self.rx_cons);
        claim(there <= SLOTS, "no more packets than pages");
        if there == 0 {
            let next = self.rx_cons.wrapping_add(1);
            self.rx_ring().word(12).store(next, SeqCst);
            return None;
        }
        let slot = self.rx_cons % SLOTS;
        let bytes = self.rx_ring().get::<RX_SLOT>(64 + slot as usize * RX_SLOT);
        self.rx_cons = self.rx_cons.wrapping_add(1);
        let status = i16::from_le_bytes([bytes[6], bytes[7]]);
        Some((self.rx_page(slot as usize), status))
    }

    /// The packet that asks who has the instance's address, in a page.
    pub fn question(&self, page: Page, from: [u8; 6]) {
        let mut packet = [0u8; ASKING];
        packet[..6].fill(0xff);
        packet[6..12].copy_from_slice(&from);
        // ARP for IPv4 over Ethernet, request (RFC 826).
        packet[12..22].copy_from_slice(&[8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        packet[22..28].copy_from_slice(&from);
        packet[28..32].copy_from_slice(&OWN);
        packet[38..42].copy_from_slice(&HOST);
        page.put(0, &packet);
    }

    /// Asks the instance, and waits for its answer. Networks lose packets, the more so
    /// after an attack that has left them without buffers: it asks again, as drivers do.
    pub fn honest(&mut self) {
        let answered = (0..QUESTIONS).any(|_| {
            self.ask();
            self.hears_answer()
        });
        claim(answered, "the instance answers");
        self.post();
    }

    fn ask(&mut self) {
        let page = self.tx_page(0);
        self.question(page, self.mac);
        self.post();
        self.put(&tx_slot(share(page, true), 0, 0, 77, ASKING as u16));
        self.push();
        let mut sent = None;
        let all = self.answers(|_, status| sent = Some(status));
        claim(all && sent == Some(0), "an honest packet is sent");
    }

    fn hears_answer(&mut self) -> bool {
        let port = self.port;
        wait_for(port, PATIENCE / QUESTIONS, || {
            while let Some((page, status)) = self.receive() {
                let packet = page.get::<44>(0);
                let reply = packet[12..14] == [8, 6] && packet[21] == 2;
                if status > 0 && reply && packet[28..32] == HOST && packet[..6] == self.mac {
                    return true;
                }
                self.post();
            }
            false
        })
    }
}
