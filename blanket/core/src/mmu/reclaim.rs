//! Free pages of the pool that the host gets back, and fills again when they are needed.
//!
//! A page that leaves is the caller's alone from [`Mmu::trim`] to [`Mmu::trimmed`], and
//! so is one that comes back from [`Mmu::refill`] to [`Mmu::refilled`]: no other vCPU
//! takes it while the host is at work on it, without the lock. Only pages whose epoch
//! all vCPUs have left behind go, so no CPU walks them; translations of the core's own
//! view of them are gone because the host brings all vCPUs out before it uses the
//! memory.

use super::{Epochs, FREE, GONE, Mmu, PoolInfo};

/// Free pages that stay: enough for a process or two.
const KEEP: u32 = 32;

/// Numbers of pages as they are given to the host.
pub type PageList = [[u8; 4]];

impl Mmu {
    /// A free page that can be used at once.
    pub(super) fn pop_free(&mut self, ep: &Epochs) -> Option<u32> {
        let mut page = self.ready_head;
        if page != 0 {
            self.ready_head = self.pool[page as usize].next;
        } else {
            page = self.free_head;
            if page == 0 || !ep.all_past(self.pool[page as usize].refs, self.nr_vcpus) {
                return None;
            }
            self.free_head = self.pool[page as usize].next;
            if self.free_head == 0 {
                self.free_tail = 0;
            }
        }
        self.free -= 1;
        Some(page)
    }

    /// Takes free pages that the host may have, and writes their numbers; how many.
    pub fn trim(&mut self, ep: &Epochs, list: &mut PageList) -> usize {
        let mut n = 0;
        for slot in list {
            if self.free <= KEEP {
                break;
            }
            let Some(page) = self.pop_free(ep) else { break };
            self.pool[page as usize] = PoolInfo {
                state: GONE,
                ..PoolInfo::default()
            };
            *slot = page.to_le_bytes();
            n += 1;
        }
        n
    }

    /// The host has the memory of pages that [`Self::trim`] gave.
    pub fn trimmed(&mut self, list: &PageList) {
        for page in list.iter().copied().map(u32::from_le_bytes) {
            self.pool[page as usize].next = self.gone_head;
            self.gone_head = page;
            self.gone += 1;
        }
    }

    /// Takes pages whose memory the host has, for it to fill them; how many.
    pub fn refill(&mut self, list: &mut PageList) -> usize {
        let mut n = 0;
        for slot in list {
            let page = self.gone_head;
            if page == 0 {
                break;
            }
            self.gone_head = self.pool[page as usize].next;
            self.gone -= 1;
            *slot = page.to_le_bytes();
            n += 1;
        }
        n
    }

    /// The host has filled the first `filled` pages of what [`Self::refill`] gave.
    pub fn refilled(&mut self, list: &PageList, filled: usize) {
        let (back, still_gone) = list.split_at(filled.min(list.len()));
        for page in back.iter().copied().map(u32::from_le_bytes) {
            self.pool[page as usize] = PoolInfo {
                state: FREE,
                next: self.ready_head,
                ..PoolInfo::default()
            };
            self.ready_head = page;
            self.free += 1;
        }
        self.trimmed(still_gone);
    }

    /// Pages whose memory the host has.
    #[must_use]
    pub fn gone(&self) -> u32 {
        self.gone
    }
}
