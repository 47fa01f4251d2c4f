//! The backend's end of a ring of requests and responses (`public/io/ring.h`), in one or
//! more pages that the guest grants.
//!
//! Layout of the first page: `req_prod`, `req_event`, `rsp_prod`, `rsp_event`, 48 bytes
//! not used here, then the slots, which requests and responses share and which go on
//! through all pages. The guest may write anything anywhere: this side keeps its own
//! indices, believes only the guest's `req_prod` and `rsp_event`, and copies each request
//! once.

use std::sync::atomic::{Ordering, fence};

use crate::grant::Mapping;
use crate::page::SIZE as PAGE;

const REQ_PROD: usize = 0;
const REQ_EVENT: usize = 4;
const RSP_PROD: usize = 8;
const RSP_EVENT: usize = 12;
/// Bytes before the first slot.
const HEADER: usize = 64;

/// The guest's index cannot be: more requests than there are slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the guest has {0} requests in a ring of {1}")]
pub struct Overrun(pub u32, pub u32);

/// The backend's end of a ring with slots of `SLOT` bytes.
#[derive(Debug)]
pub struct Ring<const SLOT: usize> {
    pages: Vec<Mapping>,
    slots: u32,
    /// Requests taken.
    req_cons: u32,
    /// Responses made; the guest sees them after [`Ring::publish`].
    rsp_prod: u32,
    /// Responses that the guest can see.
    published: u32,
}

impl<const SLOT: usize> Ring<SLOT> {
    /// A ring in writable pages, a power of two of them, that continues where its indices
    /// say: a backend that connects again to a ring which the guest has used finds the
    /// requests that have no response yet. `None` if there is no page.
    #[must_use]
    pub fn new(pages: Vec<Mapping>) -> Option<Self> {
        let first = pages.first()?;
        let slots = (pages.len() * PAGE - HEADER) / SLOT;
        let slots = 1 << slots.checked_ilog2()?;
        let rsp_prod = first.page().load(RSP_PROD);
        Some(Self {
            pages,
            slots,
            req_cons: rsp_prod,
            rsp_prod,
            published: rsp_prod,
        })
    }

    /// Number of slots.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Requests that wait.
    ///
    /// # Errors
    /// [`Overrun`]: nothing in the ring can be believed any more.
    pub fn waiting(&self) -> Result<u32, Overrun> {
        let waiting = self.load(REQ_PROD).wrapping_sub(self.req_cons);
        // Requests that have no response yet hold their slots.
        let used = self.req_cons.wrapping_sub(self.rsp_prod);
        if waiting > self.slots.saturating_sub(used) {
            return Err(Overrun(waiting, self.slots));
        }
        Ok(waiting)
    }

    /// Copies the request out that is `ahead` places behind the next one. It need not be
    /// there: ask [`Ring::waiting`] first.
    #[must_use]
    pub fn peek(&self, ahead: u32) -> [u8; SLOT] {
        let mut request = [0; SLOT];
        self.copy(self.req_cons.wrapping_add(ahead), |page, at, range| {
            page.page().read(at, &mut request[range]);
        });
        request
    }

    /// Takes `count` requests that were copied out.
    pub fn take(&mut self, count: u32) {
        self.req_cons = self.req_cons.wrapping_add(count);
    }

    /// Puts a response into the next slot. No more than requests were taken.
    pub fn respond(&mut self, response: &[u8]) {
        let response = &response[..response.len().min(SLOT)];
        self.copy(self.rsp_prod, |page, at, range| {
            if let Some(part) = response.get(range.start..range.end.min(response.len())) {
                page.page().write(at, part);
            }
        });
        self.rsp_prod = self.rsp_prod.wrapping_add(1);
    }

    /// Responses that can still be made without a further request.
    #[must_use]
    pub fn owed(&self) -> u32 {
        self.req_cons.wrapping_sub(self.rsp_prod)
    }

    /// Shows the responses to the guest. Whether it wants to be notified.
    #[must_use = "the guest sleeps if it is not notified"]
    pub fn publish(&mut self) -> bool {
        let old = self.published;
        let new = self.rsp_prod;
        if old == new {
            return false;
        }
        self.store(RSP_PROD, new);
        self.published = new;
        // The guest must see the responses if we do not see that it waits for them.
        fence(Ordering::SeqCst);
        let event = self.load(RSP_EVENT);
        new.wrapping_sub(event) < new.wrapping_sub(old)
    }

    /// Asks the guest to notify of the next request. Whether some came meanwhile.
    ///
    /// # Errors
    /// As [`Ring::waiting`].
    pub fn sleep(&mut self) -> Result<bool, Overrun> {
        self.store(REQ_EVENT, self.req_cons.wrapping_add(1));
        // The guest must see that we wait if we do not see its request.
        fence(Ordering::SeqCst);
        Ok(self.waiting()? > 0)
    }

    /// Calls `part` for the one or two pages that slot `index` lies in, with the offset
    /// in the page and the range of the slot's bytes.
    fn copy(&self, index: u32, mut part: impl FnMut(&Mapping, usize, std::ops::Range<usize>)) {
        let at = HEADER + (index & (self.slots - 1)) as usize * SLOT;
        let offset = at % PAGE;
        let first = SLOT.min(PAGE - offset);
        if let Some(page) = self.pages.get(at / PAGE) {
            part(page, offset, 0..first);
        }
        if first < SLOT
            && let Some(page) = self.pages.get(at / PAGE + 1)
        {
            part(page, 0, first..SLOT);
        }
    }

    fn load(&self, offset: usize) -> u32 {
        self.pages
            .first()
            .map_or(0, |page| page.page().load(offset))
    }

    fn store(&self, offset: usize, value: u32) {
        if let Some(page) = self.pages.first() {
            page.page().store(offset, value);
        }
    }
}

#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    reason = "small numbers of the tests' own making"
)]
mod tests;
