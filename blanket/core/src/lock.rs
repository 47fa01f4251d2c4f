//! The lock of the shadow MMU.
//!
//! What is counted without the feature `lock-stats` is counted by who waits: a lock
//! that nobody holds costs one exchange.

use crate::context::{Context, SPINS};
use crate::machine::Machine;
use crate::mmu::{Epochs, Mmu, Need};
use blanket_abi::addr::Gfn;
use blanket_abi::device::{counter, exit};
use blanket_abi::xen::errno;
use core::sync::atomic::Ordering::Relaxed;
use spin::MutexGuard;

impl<'a, M: Machine> Context<'a, M> {
    /// Takes the MMU lock.
    #[inline]
    pub(crate) fn lock_mmu(&mut self) -> MutexGuard<'a, Mmu> {
        let vm = self.vm;
        match vm.mmu.try_lock() {
            Some(mmu) => mmu,
            None => self.wait_for_mmu(),
        }
    }

    /// Under the module the holder is on its CPU, with interrupts off, and soon done.
    /// Inside KVM, where the host schedules CPL 0 as it likes, it may be off its CPU,
    /// and so may either be where the instance's own host shares CPUs out: a long
    /// spin asks the host to run others.
    #[cold]
    #[inline(never)]
    fn wait_for_mmu(&mut self) -> MutexGuard<'a, Mmu> {
        let vm = self.vm;
        self.count(counter::LOCK_CONTENDED);
        loop {
            let since = self.m.tsc();
            let mut mmu = None;
            for _ in 0..SPINS {
                // A look leaves the line where it is; an exchange would take it from
                // the holder, who needs it to let go.
                if !vm.mmu.is_locked() {
                    mmu = vm.mmu.try_lock();
                    if mmu.is_some() {
                        break;
                    }
                }
                // Others that wait for this one's flush need not wait for the lock too.
                self.answer_flush();
                core::hint::spin_loop();
            }
            let waited = self.m.tsc().wrapping_sub(since);
            count_by(self.m, counter::LOCK_WAITED, waited);
            if let Some(mmu) = mmu {
                return mmu;
            }
            self.count(counter::LOCK_YIELDED);
            #[cfg(feature = "lock-stats")]
            if self.m.preempted(vm.mmu_holder.load(Relaxed)) {
                self.count(counter::LOCK_PREEMPTED);
            }
            self.exit(exit::YIELD, [0; 4]);
        }
    }
}

impl<M: Machine> Context<'_, M> {
    /// Runs an MMU operation under the lock, mending what it needs, until it is done.
    pub fn mmu<T>(&mut self, mut op: impl FnMut(&mut Mmu, &M, &Epochs) -> Result<T, Need>) -> T {
        let mut pool_tries = 0;
        loop {
            let need = {
                let mut mmu = self.lock_mmu();
                #[cfg(feature = "lock-stats")]
                let _held = Held::new(self.m, self.vm, self.v.id);
                mmu.begin();
                match op(&mut mmu, self.m, &self.vm.epochs) {
                    Ok(done) => return done,
                    Err(need) => need,
                }
            };
            pool_tries += u32::from(need == Need::Pool);
            self.mend(need, pool_tries);
        }
    }

    /// As [`Self::mmu`], for an operation on a frame that the guest names.
    ///
    /// # Errors
    /// EINVAL for a frame that the VM does not have, or that the guest has given up.
    pub fn with_frame<T>(
        &mut self,
        gfn: Gfn,
        mut op: impl FnMut(&mut Mmu, &M, &Epochs) -> Result<T, Need>,
    ) -> Result<T, i64> {
        self.mmu(|mmu, m, ep| {
            if mmu.has(gfn) {
                op(mmu, m, ep).map(Ok)
            } else {
                Ok(Err(errno::EINVAL))
            }
        })
    }
}

/// Counts the lock as taken, and the cycles until this is dropped.
#[cfg(feature = "lock-stats")]
struct Held<'a, M: Machine> {
    m: &'a M,
    since: u64,
}

#[cfg(feature = "lock-stats")]
impl<'a, M: Machine> Held<'a, M> {
    fn new(m: &'a M, vm: &crate::vm::Vm, id: u32) -> Self {
        count_by(m, counter::LOCK_TAKEN, 1);
        vm.mmu_holder.store(id, Relaxed);
        Self { m, since: m.tsc() }
    }
}

#[cfg(feature = "lock-stats")]
impl<M: Machine> Drop for Held<'_, M> {
    fn drop(&mut self) {
        let held = self.m.tsc().wrapping_sub(self.since);
        count_by(self.m, counter::LOCK_HELD, held);
    }
}

/// Adds to a counter of the vCPU that runs on `m`.
fn count_by<M: Machine>(m: &M, what: usize, by: u64) {
    if let Some(c) = m.switch().counters.get(what) {
        c.store(c.load(Relaxed).wrapping_add(by), Relaxed);
    }
}
