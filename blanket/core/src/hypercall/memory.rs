//! memory_op (`public/memory.h`).

use super::super::context::{Context, Hyper};
use crate::idx;
use crate::machine::Machine;
use blanket_abi::device::{Boot, RUN_DATA, exit};
use blanket_abi::layout::{M2P, added_later};
use blanket_abi::xen::errno;
use blanket_abi::xen::hypercall::memory;
use blanket_abi::{Gfn, Va};
use core::ops::Range;
use core::sync::atomic::Ordering::Relaxed;

/// E820 type of RAM.
const E820_RAM: u32 = 1;
/// E820 type of what is to be left alone. Linux notes it where it looks for room for
/// memory that it adds; what is only reserved it does not note in a guest without PCI.
const E820_UNUSABLE: u32 = 5;

/// Frames that the host is told of at once: what the data of an exit has room for, and
/// as many as Linux gives up in one call.
const BATCH: usize = RUN_DATA / 4;

#[allow(
    clippy::cast_possible_truncation,
    reason = "a frame of the VM, whose numbers have 32 bits"
)]
const fn low32(gfn: u64) -> u32 {
    gfn as u32
}

/// The guest's memory map: frames, and what they are.
///
/// RAM is one block from 0: the guest has nothing to remap. What of it lies above its start
/// info's `nr_pages` it takes for memory that it may get later (Linux,
/// `arch/x86/xen/setup.c`, `xen_memory_setup`). Beyond, what is no entry is room for memory
/// that it adds, and it adds it at the first place that is large enough
/// (`drivers/xen/balloon.c`, `additional_memory_resource`): where its frames are.
fn memory_map(boot: &Boot) -> [Option<(Range<u64>, u32)>; 3] {
    let most = boot.most();
    let mut map = [Some((0..most, E820_RAM)), None, None];
    let (first, end) = added_later(boot.start_frames, most);
    if boot.start_frames != 0 && most < end && end == boot.ram_frames {
        map[1] = (most < first).then_some((most..first, E820_UNUSABLE));
        map[2] = Some((end..end + 1, E820_UNUSABLE));
    }
    map
}

impl<M: Machine> Context<'_, M> {
    /// `memory_op(cmd, ptr)`.
    pub(super) fn memory_op(&mut self, cmd: u64, ptr: u64) -> Hyper {
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
                let mut count = 0;
                let map = memory_map(&self.vm.boot);
                for (range, kind) in map.into_iter().flatten().take(idx(room & 0xffff_ffff)) {
                    let mut entry = [0u8; 20];
                    entry[..8].copy_from_slice(&(range.start << 12).to_le_bytes());
                    let size = (range.end - range.start) << 12;
                    entry[8..16].copy_from_slice(&size.to_le_bytes());
                    entry[16..].copy_from_slice(&kind.to_le_bytes());
                    let at = buffer.wrapping_add(20 * u64::from(count));
                    self.copy_out(Va(at), &entry)?;
                    count += 1;
                }
                self.write_u32(ptr, count)?;
                Ok(0)
            }
            memory::CURRENT_RESERVATION => Ok(self.frames_in().cast_signed()),
            memory::MAXIMUM_RESERVATION => Ok(self.vm.boot.most().cast_signed()),
            memory::MAXIMUM_RAM_PAGE => Ok(self.vm.nr_frames.cast_signed() - 1),
            memory::DECREASE_RESERVATION => self.decrease_reservation(ptr),
            memory::POPULATE_PHYSMAP => self.populate_physmap(ptr),
            _ => Err(errno::ENOSYS),
        }
    }

    /// RAM that the guest has.
    fn frames_in(&self) -> u64 {
        let ram = self.vm.boot.ram_frames;
        ram.saturating_sub(self.vm.out.load(Relaxed))
    }

    /// `struct xen_memory_reservation`: the list and its length. Single frames only:
    /// larger extents are for who has contiguous machine memory to ask for.
    fn extents(&mut self, ptr: u64) -> Result<(u64, u64), i64> {
        let [list, n, order_flags, _dom] = self.read_words::<4>(ptr)?;
        if order_flags & 0xffff_ffff != 0 || n > self.vm.boot.ram_frames {
            return Err(errno::EINVAL);
        }
        Ok((list, n))
    }

    /// The guest gives frames up. As in Xen, the answer is how many: fewer than asked
    /// for when one cannot be read or is refused.
    fn decrease_reservation(&mut self, ptr: u64) -> Hyper {
        let (list, n) = self.extents(ptr)?;
        let mut done = 0;
        while done < n {
            let mut batch = [[0u8; 4]; BATCH];
            let want = (n - done).min(BATCH as u64);
            let mut given = 0;
            for slot in batch.iter_mut().take(idx(want)) {
                self.breathe(1);
                let at = list.wrapping_add(8 * (done + given));
                match self.read_words::<1>(at) {
                    Ok([gfn]) if self.give_up(Gfn(gfn)) => {
                        *slot = low32(gfn).to_le_bytes();
                        given += 1;
                    }
                    _ => break,
                }
            }
            if let Some(given) = batch.get(..idx(given))
                && !given.is_empty()
            {
                self.tell_balloon(given);
            }
            done += given;
            if given < want {
                break;
            }
        }
        Ok(done.cast_signed())
    }

    /// Takes one frame from the guest; false if it must keep it.
    fn give_up(&mut self, gfn: Gfn) -> bool {
        if gfn.0 >= self.vm.boot.ram_frames || self.stands(gfn) {
            return false;
        }
        self.mmu(|mmu, m, ep| {
            let given = mmu.give_up(m, ep, gfn)?;
            self.vm.out.store(mmu.out(), Relaxed);
            Ok(given)
        })
    }

    /// Has the host take the memory of frames that are out, after the last translation
    /// of them is gone.
    fn tell_balloon(&mut self, frames: &[[u8; 4]]) {
        if !frames.is_empty() {
            self.flush_vcpus(u64::MAX);
        }
        let len = self.m.set_data(frames.as_flattened());
        let args = [frames.len() as u64, self.frames_in(), 0, len as u64];
        self.exit(exit::BALLOON, args);
    }

    /// The guest gets frames that it has given up, or had not at the start, up to its
    /// target. The answer is how many; what is in them is zero, or what it was if the
    /// guest was so fast that the host had not taken them.
    fn populate_physmap(&mut self, ptr: u64) -> Hyper {
        let (list, n) = self.extents(ptr)?;
        let boot = &self.vm.boot;
        let most = match self.m.vm_page().target.load(Relaxed) {
            0 => boot.most(),
            target => target.min(boot.most()),
        };
        let floor = boot.ram_frames.saturating_sub(most);
        let mut done = 0;
        while done < n {
            self.breathe(1);
            let Ok([gfn]) = self.read_words::<1>(list.wrapping_add(8 * done)) else {
                break;
            };
            let back = self.mmu(|mmu, _, _| {
                let back = mmu.take_in(Gfn(gfn), floor);
                self.vm.out.store(mmu.out(), Relaxed);
                Ok(back)
            });
            if !back {
                break;
            }
            done += 1;
        }
        if done != 0 {
            self.tell_balloon(&[]);
        }
        Ok(done.cast_signed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn map(start: u64, most: u64, ram: u64) -> Vec<(Range<u64>, u32)> {
        let boot = Boot {
            ram_frames: ram,
            start_frames: start,
            most_frames: most,
            ..Boot::default()
        };
        memory_map(&boot).into_iter().flatten().collect()
    }

    #[test]
    fn the_map_leaves_room_only_where_frames_are() {
        const SECTION: u64 = 0x8000;
        let ram = |most| (0..most, E820_RAM);
        let closed = |from, to| (from..to, E820_UNUSABLE);
        let page = |at| closed(at, at + 1);
        // Nothing comes later.
        assert_eq!(map(0, 0, 512), [ram(512)]);
        assert_eq!(map(512, 512, 512), [ram(512)]);
        // Numbers that are none of those that Linux would add.
        assert_eq!(map(512, 1024, 1024), [ram(1024)]);
        // Whole sections: 256 MiB grow to 512.
        let (start, most, end) = (2 * SECTION, 4 * SECTION, 6 * SECTION);
        assert_eq!(map(start, most, end), [ram(most), page(end)]);
        // Linux starts at a section.
        let (most, first) = (3 * SECTION + 1, 4 * SECTION);
        let end = first + 2 * SECTION;
        let want = [ram(most), closed(most, first), page(end)];
        assert_eq!(map(start, most, end), want);
        // Not around what is below 4 GiB.
        let (most, high) = (20 * SECTION, 32 * SECTION);
        let end = high + 18 * SECTION;
        let want = [ram(most), closed(most, high), page(end)];
        assert_eq!(map(start, most, end), want);
    }
}
