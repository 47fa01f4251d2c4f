//! Faults of the core on purpose, so that a test can see what becomes of them. Only
//! in VMs whose maker asked for it (`boot_flags::INJECT`): under the module that takes
//! root, who must have loaded it with `inject=1`; inside KVM the core is its maker's own.

use crate::context::{Context, Hyper};
use crate::machine::Machine;
use blanket_abi::device::{boot_flags, exit, inject};
use blanket_abi::xen::errno;
use core::sync::atomic::Ordering::Relaxed;

impl<M: Machine> Context<'_, M> {
    /// The hypercall [`inject::CALL`].
    #[cold]
    pub(crate) fn inject_fault(&mut self, kind: u64) -> Hyper {
        if self.vm.boot.flags & boot_flags::INJECT == 0 {
            return Err(errno::ENOSYS);
        }
        match kind {
            inject::PANIC => panic!("injected"),
            // The pool never has a page of this number, so nothing is mapped there.
            inject::FAULT => {
                let page = u32::try_from(self.m.vm_page().pool_limit).unwrap_or(u32::MAX);
                let word = self.m.pool(page)[0].load(Relaxed);
                Ok(word.cast_signed())
            }
            // With the lock that other vCPUs will want.
            inject::LOOP => {
                let _mmu = self.vm.mmu.lock();
                loop {
                    core::hint::spin_loop();
                }
            }
            inject::OPEN_LOOP => loop {
                self.exit(exit::BREATH, [0; 4]);
            },
            _ => Err(errno::EINVAL),
        }
    }
}
