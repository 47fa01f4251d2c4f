//! Packets to the guest.
//!
//! Pages that the guest posts are mapped ahead, so that the host can write a packet into
//! them at once, whatever its length turns out to be. What does not fit is put into memory
//! of this process and copied when the guest posts more.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use blanket_disk::Buffer;

use super::headers::{HEAD, Sum};
use super::link::Port;
use super::offload::{Blank, Offloads, ToGuest, Undone};
use super::protocol::{Gso, RX_SLOT, RxRequest, RxResponse, rx_flag};
use super::scratch::Scratch;
use super::tx::{BUDGET, Progress};
use super::{Groups, Mac, Shared, count};
use crate::Guest;
use crate::grant::Mapping;
use crate::page::SIZE as PAGE;
use crate::ring::{Overrun, Ring};
use crate::sync::lock;

/// Most pages of a packet to the guest: Linux takes 18 (`XEN_NETIF_NR_SLOTS_MIN`), and the
/// longest that a tap gives is of 17.
const MAX_PAGES: usize = 17;
/// Slots that are mapped ahead: those of the longest packet, with an extra.
const AHEAD: usize = MAX_PAGES + 1;
/// Bytes beside the guest's pages; more than any packet has.
const SPILL: usize = 1 << 17;
const CHUNK: usize = 1024;

/// A page that the guest posted.
struct Posted {
    id: u16,
    /// `None` if its grant cannot be used.
    page: Option<Mapping>,
}

/// A packet that was received, and that the guest does not have yet.
struct Held {
    length: usize,
    undone: Option<Undone>,
    /// Pages that it was read into; the rest is in the spill.
    pages: usize,
    /// What is to be done with it was found out, and the limits have counted it.
    ready: Option<Ready>,
}

#[derive(Clone, Copy)]
struct Ready {
    flags: u16,
    gso: Option<Gso>,
    counted: bool,
}

/// What became of a packet.
enum Fate {
    Gone,
    Later(Progress),
}

/// The direction to the guest, of one queue.
pub(super) struct Rx {
    guest: Arc<dyn Guest>,
    ring: Ring<RX_SLOT>,
    shared: Arc<Shared>,
    groups: Arc<Groups>,
    offloads: Offloads,
    /// The guest takes packets of several pages.
    scattered: bool,
    posted: VecDeque<Posted>,
    held: Option<Held>,
    spill: Scratch,
    parts: Vec<Buffer>,
}

impl Rx {
    pub(super) fn new(
        guest: Arc<dyn Guest>,
        ring: Ring<RX_SLOT>,
        shared: Arc<Shared>,
        groups: Arc<Groups>,
        offloads: Offloads,
        scattered: bool,
    ) -> Self {
        Self {
            guest,
            ring,
            shared,
            groups,
            offloads,
            scattered,
            posted: VecDeque::with_capacity(AHEAD),
            held: None,
            spill: Scratch::new(SPILL),
            parts: Vec::with_capacity(AHEAD + 1),
        }
    }

    /// Gives the guest what has come, up to a budget. Also whether it wants to be notified.
    /// The link is asked only if it may have `packets`.
    pub(super) fn run(
        &mut self,
        port: &mut dyn Port,
        now: Instant,
        packets: bool,
    ) -> Result<(Progress, bool), Overrun> {
        let mut progress = Progress::More;
        for _ in 0..BUDGET {
            self.fetch()?;
            if self.held.is_none() {
                if self.usable() == 0 {
                    progress = Progress::Starved;
                    break;
                }
                if !packets || !self.receive(port) {
                    progress = Progress::Idle;
                    break;
                }
            }
            if let Fate::Later(why) = self.deliver(now) {
                progress = why;
                break;
            }
        }
        let notify = self.ring.publish();
        if notify {
            count(&self.shared.counters.notifications, 1);
        }
        Ok((progress, notify))
    }

    /// Asks the guest to notify when it posts pages. Whether some came meanwhile.
    pub(super) fn sleep(&mut self) -> Result<bool, Overrun> {
        self.ring.sleep()
    }

    /// Maps posted pages ahead.
    fn fetch(&mut self) -> Result<(), Overrun> {
        let room = AHEAD - self.posted.len();
        if room > 0 {
            let waiting = self.ring.waiting()? as usize;
            for _ in 0..waiting.min(room) {
                let RxRequest { id, gref } = RxRequest::decode(&self.ring.peek(0));
                self.ring.take(1);
                let page = match self.guest.grants().map(gref, true) {
                    Ok(page) => Some(page),
                    Err(error) => {
                        tracing::debug!("a posted page is refused: {error}");
                        count(&self.shared.counters.to_guest.errors, 1);
                        None
                    }
                };
                self.posted.push_back(Posted { id, page });
            }
        }
        while self.posted.front().is_some_and(|it| it.page.is_none()) {
            self.refuse_first();
        }
        Ok(())
    }

    /// Answers the first posted page with an error.
    fn refuse_first(&mut self) {
        if let Some(Posted { id, page }) = self.posted.pop_front() {
            drop(page);
            let response = RxResponse {
                id,
                flags: 0,
                length: None,
            };
            self.ring.respond(&response.encode());
        }
    }

    /// Posted pages before the first that cannot be used.
    fn usable(&self) -> usize {
        self.posted
            .iter()
            .take_while(|posted| posted.page.is_some())
            .count()
    }

    /// The place among the posted pages of a packet's page `index`: while it may turn out
    /// that the packet needs an extra, the second place is left for that.
    fn place(&self, index: usize) -> usize {
        index + usize::from(index > 0 && self.offloads.long())
    }

    /// Receives a packet, if one is there, with at least one usable page.
    fn receive(&mut self, port: &mut dyn Port) -> bool {
        let usable = self.usable();
        let pages = match (self.scattered, self.offloads.long()) {
            (false, _) => 1,
            (true, true) => usable.saturating_sub(1).max(1),
            (true, false) => usable,
        };
        let mut parts = std::mem::take(&mut self.parts);
        parts.extend((0..pages).filter_map(|index| {
            let posted = self.posted.get(self.place(index))?;
            Some(posted.page.as_ref()?.page().buffer(0, PAGE))
        }));
        parts.push(self.spill.buffer(SPILL));
        let received = port.receive(&parts);
        parts.clear();
        self.parts = parts;
        self.held = received.map(|received| Held {
            length: received.length,
            undone: received.undone,
            pages,
            ready: None,
        });
        self.held.is_some()
    }

    /// Gives the held packet to the guest.
    fn deliver(&mut self, now: Instant) -> Fate {
        let Some(mut held) = self.held.take() else {
            return Fate::Gone;
        };
        let Some(mut ready) = held.ready.or_else(|| self.prepare(&held)) else {
            count(&self.shared.counters.to_guest.dropped, 1);
            return Fate::Gone;
        };
        let mut later = None;
        if !ready.counted
            && let Some(limiter) = &self.shared.to_guest
        {
            later = lock(limiter).take(now, held.length as u64).err();
        }
        ready.counted |= later.is_none();
        held.ready = Some(ready);
        if let Some(wait) = later {
            self.held = Some(held);
            return Fate::Later(Progress::Limited(wait));
        }

        let pages = held.length.div_ceil(PAGE);
        let slots = pages + usize::from(ready.gso.is_some());
        let usable = self.usable();
        if usable < slots {
            if usable == self.posted.len() {
                self.held = Some(held);
                return Fate::Later(Progress::Starved);
            }
            // A page among them cannot be used, and all are answered in order.
            for _ in 0..=usable {
                self.refuse_first();
            }
            count(&self.shared.counters.to_guest.dropped, 1);
            return Fate::Gone;
        }
        self.arrange(&held, pages, ready.gso.is_some());
        self.answer(held.length, slots, ready);
        let counters = &self.shared.counters.to_guest;
        count(&counters.packets, 1);
        count(&counters.bytes, held.length as u64);
        Fate::Gone
    }

    /// Looks what the guest can do with a packet; `None` if it cannot have it.
    fn prepare(&self, held: &Held) -> Option<Ready> {
        let undone = held.undone?;
        let pages = held.length.div_ceil(PAGE);
        let most = if self.scattered { MAX_PAGES } else { 1 };
        if held.length < super::protocol::MIN_LENGTH || pages > most {
            return None;
        }
        let mut bytes = [0; HEAD];
        let head = &mut bytes[..held.length.min(HEAD)];
        let needed = if undone.blank.is_some() {
            head.len()
        } else {
            6
        };
        self.read(held, 0, &mut head[..needed]);
        if self.groups.unwanted(destination(head)) {
            return None;
        }
        let ready = |flags, gso| Ready {
            flags,
            gso,
            counted: false,
        };
        match undone.to_guest(head, held.length, self.offloads) {
            ToGuest::Pass { flags, gso } => Some(ready(flags, gso)),
            ToGuest::Sum(blank) => {
                self.sum_up(held, blank)?;
                Some(ready(rx_flag::DATA_VALIDATED, None))
            }
            ToGuest::Drop => None,
        }
    }

    /// Makes a checksum in place; `None` if its place is not in the packet.
    fn sum_up(&self, held: &Held, blank: Blank) -> Option<()> {
        let start = usize::from(blank.start);
        let at = start + usize::from(blank.offset);
        if at + 2 > held.length {
            return None;
        }
        let mut sum = Sum::default();
        let mut chunk = [0; CHUNK];
        let mut from = start;
        while from < held.length {
            let now = (held.length - from).min(CHUNK);
            self.read(held, from, &mut chunk[..now]);
            sum.add(&chunk[..now]);
            from += now;
        }
        for (at, byte) in (at..).zip(sum.checksum().to_be_bytes()) {
            match self.page_of(held, at / PAGE) {
                Some(page) => page.page().write(at % PAGE, &[byte]),
                None => self
                    .spill
                    .write(at.saturating_sub(held.pages * PAGE), &[byte]),
            }
        }
        Some(())
    }

    /// The page that the packet's page `index` was read into; `None` if it is in the spill.
    fn page_of(&self, held: &Held, index: usize) -> Option<&Mapping> {
        if index >= held.pages {
            return None;
        }
        self.posted.get(self.place(index))?.page.as_ref()
    }

    /// Copies bytes of a packet out, wherever they are.
    fn read(&self, held: &Held, mut from: usize, mut into: &mut [u8]) {
        while !into.is_empty() {
            let (index, offset) = (from / PAGE, from % PAGE);
            let now;
            match self.page_of(held, index) {
                Some(page) => {
                    now = into.len().min(PAGE - offset);
                    page.page().read(offset, &mut into[..now]);
                }
                None => {
                    now = into.len();
                    self.spill
                        .read(from.saturating_sub(held.pages * PAGE), into);
                }
            }
            from += now;
            into = &mut into[now..];
        }
    }

    /// Brings a packet's pages into the places in which the guest takes them.
    fn arrange(&self, held: &Held, pages: usize, extra: bool) {
        let mut whole = [0; PAGE];
        for index in 1..pages {
            let place = index + usize::from(extra);
            let in_page = index < held.pages;
            if in_page && place == self.place(index) {
                continue;
            }
            let length = (held.length - index * PAGE).min(PAGE);
            self.read(held, index * PAGE, &mut whole[..length]);
            if let Some(page) = self.posted.get(place).and_then(|it| it.page.as_ref()) {
                page.page().write(0, &whole[..length]);
            }
        }
    }

    /// Answers the first posted pages with a packet.
    fn answer(&mut self, length: usize, slots: usize, ready: Ready) {
        let mut left = length;
        for slot in 0..slots {
            let Some(Posted { id, page }) = self.posted.pop_front() else {
                return;
            };
            // Before the guest hears of it: it takes its grant back then.
            drop(page);
            if let (1, Some(gso)) = (slot, ready.gso) {
                self.ring.respond(&gso.encode());
                continue;
            }
            let now = left.min(PAGE);
            left -= now;
            let mut flags = if left > 0 { rx_flag::MORE_DATA } else { 0 };
            if slot == 0 {
                flags |= ready.flags;
                if ready.gso.is_some() {
                    flags |= rx_flag::EXTRA_INFO;
                }
            }
            let response = RxResponse {
                id,
                flags,
                // At most a page.
                length: u16::try_from(now).ok(),
            };
            self.ring.respond(&response.encode());
        }
    }
}

fn destination(head: &[u8]) -> Mac {
    // A packet has at least its Ethernet header.
    head.first_chunk::<6>()
        .map_or(Mac::BROADCAST, |bytes| Mac::new(*bytes))
}
