//! Copies for a core on a root of its own: there the guest's address space is not
//! loaded, and its tables are walked here, as the CPU would walk them.

use crate::arrive::Rounds;
use crate::context::Context;
use crate::idx;
use crate::machine::Machine;
use crate::pte;
use blanket_abi::{Gfn, PAGE_SIZE, Va};
use core::sync::atomic::Ordering::Relaxed;

impl<M: Machine> Context<'_, M> {
    /// The frame at `va` in the guest's present address space, if its tables allow the
    /// access and say that it was made. The guest may change them at any time: what
    /// comes out is a frame of this VM all the same.
    ///
    /// If the guest has not got all of its frames, it is one that it has: whoever gives up a frame
    /// waits until all vCPUs have flushed, so it still is when the copy is done. (Not
    /// waited for is a vCPU that KVM has off its CPU: its copy brings a zero page back.)
    fn translate(&mut self, va: Va, write: bool) -> Option<Gfn> {
        let given_up = self.vm.out.load(Relaxed) != 0;
        let mmu = given_up.then(|| self.lock_mmu());
        let has = |gfn: Gfn| match &mmu {
            Some(mmu) => mmu.has(gfn),
            None => gfn.0 < self.vm.nr_frames,
        };
        let mut gfn = self.v.root_gfns[usize::from(!self.kernel_mode())];
        for level in [4, 3, 2, 1] {
            if !has(gfn) {
                return None;
            }
            let entry = self.m.frame(gfn)?[va.index(level)].load(Relaxed);
            let mut want = pte::P;
            if write {
                want |= pte::RW;
            }
            if level == 1 {
                // `Mmu::fault` sets them.
                want |= if write { pte::A | pte::D } else { pte::A };
            } else if entry & pte::PS != 0 {
                return None;
            }
            if entry & want != want {
                return None;
            }
            gfn = Gfn(pte::frame(entry));
        }
        has(gfn).then_some(gfn)
    }

    /// Calls `copy` with each frame of the range, its offset there, and the part of the
    /// buffer, until it says that the frame was there.
    fn by_frame(
        &mut self,
        va: Va,
        len: usize,
        write: bool,
        mut copy: impl FnMut(&M, Gfn, usize, core::ops::Range<usize>) -> bool,
    ) -> Result<(), i64> {
        let mut done = 0;
        while done < len {
            let at = Va(va.0 + done as u64);
            let offset = idx(at.0 % PAGE_SIZE);
            let end = len.min(done + idx(PAGE_SIZE) - offset);
            let mut rounds = Rounds::new(self.v.revocations);
            let gfn = loop {
                if let Some(gfn) = self.translate(at, write)
                    && copy(self.m, gfn, offset, done..end)
                {
                    break gfn;
                }
                rounds.next(self.v.revocations)?;
                self.resolve(at, write)?;
            };
            if write {
                self.note_written(gfn);
            }
            done = end;
        }
        Ok(())
    }

    /// As [`Context::copy_in`], for a range that was checked.
    pub(crate) fn copy_in_by_frame(&mut self, va: Va, to: &mut [u8]) -> Result<(), i64> {
        self.by_frame(va, to.len(), false, |m, gfn, offset, part| {
            to.get_mut(part)
                .is_some_and(|to| m.copy_from_frame(gfn, offset, to))
        })
    }

    /// As [`Context::copy_out`], for a range that was checked.
    pub(crate) fn copy_out_by_frame(&mut self, va: Va, from: &[u8]) -> Result<(), i64> {
        self.by_frame(va, from.len(), true, |m, gfn, offset, part| {
            from.get(part)
                .is_some_and(|from| m.copy_to_frame(gfn, offset, from))
        })
    }
}
