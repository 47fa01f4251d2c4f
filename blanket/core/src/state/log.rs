//! The dirty log, as the VMM asks for it (`blanket_abi::device::pause::LOG`).

use crate::context::Context;
use crate::machine::Machine;
use crate::mmu::LOG_STEP;
use blanket_abi::Gfn;
use blanket_abi::state::{LOG_PER_FRAME, log_at};
use core::sync::atomic::Ordering::{Relaxed, SeqCst};

/// Steps of [`LOG_STEP`] frames that are taken under one hold of the lock.
const STEPS: usize = 8;

impl<M: Machine> Context<'_, M> {
    /// Writes down which frames of RAM were written since the last time. The first time it
    /// begins to note it.
    pub(super) fn write_log(&mut self) -> Result<(), i64> {
        self.lock_mmu().log_begin();
        self.vm.logging.store(true, SeqCst);
        let ram = self.vm.boot.ram_frames;
        let first = log_at(self.vm.nr_vcpus, ram);
        for frame in 0..ram.div_ceil(LOG_PER_FRAME) {
            let mut words = [0; 512];
            let mut gfn = frame * LOG_PER_FRAME;
            for part in words.chunks_mut(STEPS) {
                if gfn >= ram {
                    break;
                }
                self.breathe(64);
                let mut mmu = self.lock_mmu();
                for word in part {
                    if gfn < ram {
                        *word = mmu.log_take(gfn);
                        gfn += LOG_STEP;
                    }
                }
            }
            self.log_standing(frame, &mut words);
            self.put_words(first + frame, &words)?;
        }
        self.protect_leaves();
        Ok(())
    }

    /// Notes a write that went past the leaves, for the dirty log.
    pub(crate) fn note_written(&mut self, gfn: Gfn) {
        if self.vm.logging.load(Relaxed) {
            self.lock_mmu().written(gfn);
        }
    }

    /// Adds what the core writes at any moment, to the words of frame `frame` of the log.
    /// It will have written it before it is asked again, also if it no longer stands then.
    fn log_standing(&mut self, frame: u64, words: &mut [u64; 512]) {
        let mut mmu = self.lock_mmu();
        let vcpus = self.vm.nr_vcpus as usize;
        let areas = self.vm.areas.iter().take(vcpus).flatten();
        let areas = areas.filter_map(|area| area.load(SeqCst).checked_sub(1));
        for gfn in self.standing_frames().chain(areas.map(Gfn)) {
            let bit = gfn.0 % LOG_PER_FRAME;
            if gfn.0 / LOG_PER_FRAME == frame
                && gfn.0 < self.vm.boot.ram_frames
                && let Some(word) = words.get_mut(crate::idx(bit / 64))
            {
                *word |= 1 << (bit % 64);
                mmu.written(gfn);
            }
        }
    }

    /// No leaf allows writes any more.
    fn protect_leaves(&mut self) {
        let mut page = 1;
        loop {
            self.breathe(64);
            if !self.lock_mmu().log_protect(self.m, &self.vm.epochs, page) {
                return;
            }
            page += 1;
        }
    }

    /// Ceases to note what is written.
    pub(super) fn end_log(&mut self) {
        self.vm.logging.store(false, SeqCst);
        self.lock_mmu().log_end();
    }
}
