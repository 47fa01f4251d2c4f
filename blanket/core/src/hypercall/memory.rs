//! memory_op (`public/memory.h`).

use super::super::context::{Context, Hyper};
use crate::machine::Machine;
use blanket_abi::Va;
use blanket_abi::layout::M2P;
use blanket_abi::xen::errno;
use blanket_abi::xen::hypercall::memory;

/// E820 type of RAM.
const E820_RAM: u32 = 1;

impl<M: Machine> Context<'_, M> {
    /// `memory_op(cmd, ptr)`.
    pub(super) fn memory_op(&mut self, cmd: u64, ptr: u64) -> Hyper {
        let ram = self.vm.boot.ram_frames;
        match cmd {
            memory::MACHPHYS_MAPPING => {
                let frames = self.vm.nr_frames;
                self.write_words(ptr, [M2P, M2P + frames * 8, frames.saturating_sub(1)])?;
                Ok(0)
            }
            memory::MEMORY_MAP => {
                let [room, buffer] = self.read_words::<2>(ptr)?;
                if room & 0xffff_ffff == 0 {
                    return Err(errno::EINVAL);
                }
                // One block of RAM from 0: the guest has nothing to remap.
                let mut entry = [0u8; 20];
                entry[8..16].copy_from_slice(&(ram << 12).to_le_bytes());
                entry[16..].copy_from_slice(&E820_RAM.to_le_bytes());
                self.copy_out(Va(buffer), &entry)?;
                self.write_u32(ptr, 1)?;
                Ok(0)
            }
            memory::CURRENT_RESERVATION | memory::MAXIMUM_RESERVATION => Ok(ram.cast_signed()),
            memory::MAXIMUM_RAM_PAGE => Ok(self.vm.nr_frames.cast_signed() - 1),
            // Frames that the guest balloons out stay its own: taking them back
            // from the host is for the balloon to come, and the guest sees no
            // difference.
            memory::DECREASE_RESERVATION | memory::POPULATE_PHYSMAP => self.reservation(ptr),
            _ => Err(errno::ENOSYS),
        }
    }

    /// `struct xen_memory_reservation`: every extent must be the guest's RAM; the
    /// identity map makes both directions the same check.
    fn reservation(&mut self, ptr: u64) -> Hyper {
        let [list, n, order_flags, _dom] = self.read_words::<4>(ptr)?;
        let order = order_flags & 0xffff_ffff;
        if order != 0 || n > self.vm.boot.ram_frames {
            return Err(errno::EINVAL);
        }
        for i in 0..n {
            self.breathe(1);
            let [gfn] = self.read_words::<1>(list.wrapping_add(8 * i))?;
            if gfn >= self.vm.boot.ram_frames {
                return Ok(i.cast_signed());
            }
        }
        Ok(n.cast_signed())
    }
}
