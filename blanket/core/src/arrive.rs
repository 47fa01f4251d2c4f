//! Back from the host: what the host took back meanwhile.
//!
//! The host takes frames back only while no vCPU is in the core world. So a frame
//! that the core has seen present stays until it leaves, and what remains to be
//! done is done here, between the host's answer and the first load of a root: the
//! leaves of what was taken are removed, and the *standing frames* are asked for
//! again. These are the few that the core reaches for at any moment, where it could
//! not ask: shared info, the vcpu_infos, and this vCPU's time and run-state areas.

use crate::context::{Context, SPINS};
use crate::machine::Machine;
use crate::vcpu::Place;
use blanket_abi::Gfn;
use blanket_abi::device::{crash, exit};
use blanket_abi::xen::errno;
use core::sync::atomic::Ordering::{Acquire, SeqCst};

/// Translations that one copy from or to the guest may miss.
const COPY_ROUNDS: u32 = 16;

/// Rounds of a copy from or to the guest. Each fills one missing translation, and a
/// copy spans few pages; but what the host takes back meanwhile is filled again.
pub(crate) struct Rounds {
    left: u32,
    revocations: u64,
}

impl Rounds {
    pub(crate) const fn new(revocations: u64) -> Self {
        Self {
            left: COPY_ROUNDS,
            revocations,
        }
    }

    pub(crate) fn next(&mut self, revocations: u64) -> Result<(), i64> {
        if revocations != self.revocations {
            *self = Self::new(revocations);
        }
        self.left = self.left.checked_sub(1).ok_or(errno::EFAULT)?;
        Ok(())
    }
}

impl<M: Machine> Context<'_, M> {
    /// Brings this vCPU up to date with what the host took back. Called wherever the
    /// core world was entered, before a root is loaded.
    #[inline]
    pub fn arrive(&mut self) {
        if self.m.vm_page().revocations.load(Acquire) != self.v.revocations {
            self.catch_up();
        }
    }

    /// Exits from here go to the host directly: no root is loaded, and each may lose
    /// frames again, which the next round finds.
    #[cold]
    fn catch_up(&mut self) {
        loop {
            self.v.revocations = self.m.vm_page().revocations.load(SeqCst);
            if !self.remove_revoked() {
                continue;
            }
            let Some(gfn) = self.missing_frame() else {
                return;
            };
            let ret = self.m.exit(exit::FRAME, [gfn.0, 0, 0, 0]);
            if ret < 0 && self.m.frame(gfn).is_none() {
                self.crash(
                    crash::MEMORY,
                    format_args!("the host has no memory for {gfn:?} (error {ret})"),
                );
            }
        }
    }

    /// False: the host had the CPU in between.
    fn remove_revoked(&mut self) -> bool {
        for _ in 0..SPINS {
            if let Some(mut mmu) = self.vm.mmu.try_lock() {
                let done = mmu.revoke_noted(self.m, &self.vm.epochs);
                drop(mmu);
                if !done {
                    self.m.exit(exit::BREATH, [0; 4]);
                }
                return done;
            }
            core::hint::spin_loop();
        }
        self.m.exit(exit::YIELD, [0; 4]);
        false
    }

    /// Standing frames: those that the core reaches for at any moment.
    pub(crate) fn standing_frames(&self) -> impl Iterator<Item = Gfn> {
        let place = |p: Place| p.gfn;
        let infos = self.vm.infos.iter().take(self.vm.nr_vcpus as usize);
        let infos = infos.map(|p| p.load(SeqCst)).filter(|&p| p != 0);
        let runstate = self.v.runstate_area.map(|(first, last)| [first.gfn, last]);
        core::iter::once(Gfn(self.vm.boot.shared_info))
            .chain(infos.map(Gfn::containing))
            .chain(self.v.info.map(place))
            .chain(self.v.time_area.map(place))
            .chain(runstate.into_iter().flatten())
    }

    /// A standing frame that is absent.
    fn missing_frame(&self) -> Option<Gfn> {
        self.standing_frames()
            .find(|gfn| gfn.0 < self.vm.nr_frames && self.m.frame(*gfn).is_none())
    }

    /// Whether a frame is a standing one of any vCPU.
    pub(crate) fn stands(&self, gfn: Gfn) -> bool {
        let vcpus = self.vm.nr_vcpus as usize;
        let areas = self.vm.areas.iter().take(vcpus).flatten();
        areas.map(|a| a.load(SeqCst)).any(|a| a == gfn.0 + 1)
            || self.standing_frames().any(|standing| standing == gfn)
    }

    /// Asks for standing frames that are absent, after one was added.
    pub(crate) fn stand(&mut self) {
        while let Some(gfn) = self.missing_frame() {
            // It is one of the VM's.
            if self.need_frame(gfn).is_err() {
                return;
            }
        }
    }
}
