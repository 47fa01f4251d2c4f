//! A VM that stands still writes its state down, and a core takes it up again
//! (`blanket_abi::state`).
//!
//! The VMM sets [`VmPage::pause`] and kicks all vCPUs. Each finishes the hypercall that it
//! is in, or gives up its sleep in one, which guests take for a wake-up without a
//! reason; then, where it would return to its guest, it writes its own state down and
//! leaves with PAUSED. So there is no state of the core's own to keep: no lock is
//! held, no hypercall is half done, shadows are a cache. When all have left, vCPU 0
//! writes down what they share, and the vCPUs that never started.
//!
//! In the same way it writes down which frames were written since it did so last
//! (`log.rs`).
//!
//! A vCPU that is run again with `pause` at 0 goes on as if nothing had been. In another
//! VM, whose memory is a copy, the vCPUs begin by taking their states up: vCPU 0 what is
//! shared, then each its own. Whoever made that copy may have changed anything: all of
//! it is checked as a hypercall's arguments are.
//!
//! [`VmPage::pause`]: blanket_abi::device::VmPage::pause

mod log;
mod restore;
mod save;

use crate::context::Context;
use crate::machine::{FpuImage, Machine};
use blanket_abi::Gfn;
use blanket_abi::device::{Boot, exit, pause};
use blanket_abi::state;
use blanket_abi::xen::errno;
use blanket_abi::xen::shared::runstate;
use core::sync::atomic::Ordering::{Relaxed, SeqCst};

/// Whether a boot record has room for the VM's state, beside its RAM and inside of the VM.
#[must_use]
pub fn fits(boot: &Boot, nr_frames: u64, nr_vcpus: u32) -> bool {
    let end = boot.state_base.checked_add(boot.state_frames);
    boot.ram_frames <= nr_frames
        && boot.most() <= boot.ram_frames
        && boot.state_base >= boot.ram_frames
        && end.is_some_and(|end| end <= nr_frames)
        && boot.state_frames >= state::frames(nr_vcpus, boot.ram_frames)
}

impl<M: Machine> Context<'_, M> {
    /// Looks whether the VMM wants the VM to stand still.
    pub(crate) fn follow_pause(&mut self) {
        self.v.pause_asked = self.m.vm_page().pause.load(SeqCst) != pause::NONE;
    }

    /// Stands still for as long as the VMM wants.
    #[cold]
    pub(crate) fn pause(&mut self) {
        // It would like to run meanwhile, here or wherever it goes on.
        let stolen = self.v.runstate == runstate::RUNNING;
        if stolen {
            self.set_runstate(runstate::RUNNABLE);
        }
        let mut written = self.write_vcpu();
        loop {
            self.exit(exit::PAUSED, [errno_word(written), 0, 0, 0]);
            match self.m.vm_page().pause.load(SeqCst) {
                pause::NONE => break,
                pause::VM if self.v.id == 0 => written = self.write_vm(),
                pause::LOG if self.v.id == 0 => written = self.write_log(),
                pause::NO_LOG if self.v.id == 0 => self.end_log(),
                _ => {}
            }
        }
        // Where the exits were answered in place: leaves may have lost rights.
        if self.m.in_place(exit::PAUSED) {
            self.load_root();
        }
        if stolen {
            self.set_runstate(runstate::RUNNING);
        }
        self.v.pause_asked = false;
        self.v.check_timers = true;
    }

    /// Frame `index` of the state.
    fn state_frame(&self, index: u64) -> Gfn {
        Gfn(self.vm.boot.state_base.wrapping_add(index))
    }

    fn put_words(&mut self, index: u64, words: &[u64]) -> Result<(), i64> {
        let gfn = self.state_frame(index);
        self.need_frame(gfn)?;
        let frame = self.m.frame(gfn).ok_or(errno::ENOMEM)?;
        for (to, word) in frame.iter().zip(words) {
            to.store(*word, Relaxed);
        }
        Ok(())
    }

    fn get_words<const N: usize>(&mut self, index: u64) -> Result<[u64; N], i64> {
        let gfn = self.state_frame(index);
        self.need_frame(gfn)?;
        let frame = self.m.frame(gfn).ok_or(errno::ENOMEM)?;
        let mut words = [0; N];
        for (word, from) in words.iter_mut().zip(frame) {
            *word = from.load(Relaxed);
        }
        Ok(words)
    }

    fn put_fpu(&mut self, index: u64, image: &FpuImage) -> Result<(), i64> {
        let gfn = self.state_frame(index);
        self.need_frame(gfn)?;
        let whole = self.m.copy_to_frame(gfn, 0, &image.0);
        whole.then_some(()).ok_or(errno::ENOMEM)
    }

    fn get_fpu(&mut self, index: u64) -> Result<FpuImage, i64> {
        let gfn = self.state_frame(index);
        self.need_frame(gfn)?;
        let mut image = FpuImage::ZERO;
        let whole = self.m.copy_from_frame(gfn, 0, &mut image.0);
        whole.then_some(image).ok_or(errno::ENOMEM)
    }
}

/// A result as a word of an exit.
fn errno_word(result: Result<(), i64>) -> u64 {
    result.err().unwrap_or(0).cast_unsigned()
}
