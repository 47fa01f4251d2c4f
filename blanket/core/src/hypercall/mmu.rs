//! Page tables: mmu_update, update_va_mapping, mmuext_op (`public/xen.h`).

use super::super::context::{Context, Hyper};
use crate::machine::Machine;
use crate::mmu::Need;
use crate::pte;
use blanket_abi::xen::hypercall::{mmu, mmuext, uvmf};
use blanket_abi::xen::{domid, errno};
use blanket_abi::{Gfn, Va};
use core::sync::atomic::Ordering::Relaxed;

/// The top bit of a count is Xen's own (`MMU_UPDATE_PREEMPTED`).
const COUNT_MASK: u64 = 0x7fff_ffff;

impl<M: Machine> Context<'_, M> {
    /// Frames up to here have an M2P entry; the identity is the only one.
    fn check_domid(dom: u64) -> Result<(), i64> {
        let dom = dom & 0xffff;
        if dom == u64::from(domid::SELF) || dom == u64::from(domid::GUEST) {
            Ok(())
        } else {
            Err(errno::ESRCH)
        }
    }

    /// `mmu_update(requests, count, *done, domid)`.
    pub(super) fn mmu_update(&mut self, list: u64, count: u64, done: u64, dom: u64) -> Hyper {
        Self::check_domid(dom)?;
        let count = count & COUNT_MASK;
        let mut n = 0;
        let mut result = Ok(0);
        while n < count {
            self.breathe(1);
            let at = list.wrapping_add(n * 16);
            let one = match self.read_words::<2>(at) {
                Ok([ptr, val]) => self.mmu_update_one(ptr, val),
                Err(e) => Err(e),
            };
            if let Err(e) = one {
                result = Err(e);
                break;
            }
            n += 1;
        }
        if done != 0 {
            #[allow(clippy::cast_possible_truncation, reason = "count has 31 bits")]
            self.write_u32(done, n as u32)?;
        }
        result
    }

    #[inline]
    fn mmu_update_one(&mut self, ptr: u64, val: u64) -> Result<(), i64> {
        let gfn = Gfn::containing(ptr);
        if gfn.0 >= self.vm.nr_frames {
            return Err(errno::EINVAL);
        }
        let index = ((ptr & 0xff8) >> 3) as usize;
        match ptr & 3 {
            mmu::NORMAL => self
                .with_frame(gfn, |mmu, m, ep| {
                    mmu.write_entry(m, ep, gfn, index, |_| val)
                })
                .map(drop),
            mmu::PRESERVE_AD => {
                let keep = |old| val | old & (pte::A | pte::D);
                self.with_frame(gfn, |mmu, m, ep| mmu.write_entry(m, ep, gfn, index, keep))
                    .map(drop)
            }
            // The M2P is the identity, for ever.
            mmu::MACHPHYS if val == gfn.0 => Ok(()),
            mmu::MACHPHYS => Err(errno::EINVAL),
            _ => Err(errno::ENOSYS),
        }
    }

    /// `update_va_mapping(va, entry, flags)`.
    pub(super) fn update_va_mapping(&mut self, va: u64, val: u64, flags: u64) -> Hyper {
        let va = Va(va);
        if !va.is_guest() {
            return Err(errno::EINVAL);
        }
        let root = self.v.kernel_root;
        let found = self.mmu(|mmu, m, ep| {
            let Some(table) = mmu.leaf_table(m, mmu.root_gfn(root), va)? else {
                return Ok(false);
            };
            mmu.write_entry(m, ep, table, va.index(1), |_| val)?;
            Ok(true)
        });
        if !found {
            return Err(errno::EINVAL);
        }
        if flags & uvmf::FLUSHTYPE_MASK != uvmf::NONE {
            let me = 1u64 << self.v.id;
            let mask = if flags & uvmf::ALL != 0 {
                u64::MAX
            } else {
                match flags & !(uvmf::FLUSHTYPE_MASK | uvmf::ALL) {
                    0 => me,
                    list => self.vcpu_mask(list)?,
                }
            };
            self.flush(
                mask,
                (flags & uvmf::FLUSHTYPE_MASK == uvmf::INVLPG).then_some(va),
            );
        }
        Ok(0)
    }

    /// Reads a vCPU bitmap; it has only as many words as the guest has vCPUs.
    fn vcpu_mask(&mut self, va: u64) -> Result<u64, i64> {
        Ok(self.read_words::<1>(va)?[0])
    }

    /// Flushes one address or everything on a set of vCPUs.
    fn flush(&mut self, mask: u64, va: Option<Va>) {
        let me = 1u64 << self.v.id;
        if let (Some(va), 0) = (va, mask & !me) {
            if mask & me != 0 && va.is_canonical() {
                self.m.invlpg(va);
            }
            return;
        }
        self.flush_vcpus(mask);
    }

    /// `mmuext_op(ops, count, *done, domid)`.
    pub(super) fn mmuext_op(&mut self, list: u64, count: u64, done: u64, dom: u64) -> Hyper {
        Self::check_domid(dom)?;
        let count = count & COUNT_MASK;
        let mut n = 0;
        let mut result = Ok(0);
        while n < count {
            self.breathe(1);
            let op = match self.read_words::<3>(list.wrapping_add(n * 24)) {
                Ok(op) => op,
                Err(e) => {
                    result = Err(e);
                    break;
                }
            };
            if let Err(e) = self.mmuext_one(op[0] & 0xffff_ffff, op[1], op[2]) {
                result = Err(e);
                break;
            }
            n += 1;
        }
        if done != 0 {
            #[allow(clippy::cast_possible_truncation, reason = "count has 31 bits")]
            self.write_u32(done, n as u32)?;
        }
        result
    }

    fn check_gfn(&self, mfn: u64) -> Result<Gfn, i64> {
        (mfn < self.vm.nr_frames)
            .then_some(Gfn(mfn))
            .ok_or(errno::EINVAL)
    }

    #[allow(
        clippy::cast_possible_truncation,
        reason = "masked to 32 bits by the caller"
    )]
    fn mmuext_one(&mut self, cmd: u64, arg1: u64, arg2: u64) -> Result<(), i64> {
        let me = 1u64 << self.v.id;
        match cmd as u32 {
            cmd @ mmuext::PIN_L1..=mmuext::PIN_L4 => {
                let gfn = self.check_gfn(arg1)?;
                let level = (cmd - mmuext::PIN_L1) as u8 + 1;
                self.with_frame(gfn, |mmu, m, ep| mmu.mark_tree(m, ep, gfn, level))?;
            }
            // Marks go when the frames become writable, which follows.
            mmuext::UNPIN => {
                self.check_gfn(arg1)?;
            }
            mmuext::NEW_BASEPTR => {
                let gfn = self.check_gfn(arg1)?;
                self.set_kernel_root(gfn)?;
            }
            mmuext::NEW_USER_BASEPTR => {
                let gfn = self.check_gfn(arg1)?;
                self.set_user_root((gfn.0 != 0).then_some(gfn))?;
            }
            mmuext::TLB_FLUSH_LOCAL => self.flush(me, None),
            mmuext::INVLPG_LOCAL => self.flush(me, Some(Va(arg1))),
            mmuext::TLB_FLUSH_MULTI => {
                let mask = self.vcpu_mask(arg2)?;
                self.flush(mask, None);
            }
            mmuext::INVLPG_MULTI => {
                let mask = self.vcpu_mask(arg2)?;
                self.flush(mask, Some(Va(arg1)));
            }
            mmuext::TLB_FLUSH_ALL => self.flush(u64::MAX, None),
            mmuext::INVLPG_ALL => self.flush(u64::MAX, Some(Va(arg1))),
            // Guests own no device memory: caches are coherent.
            mmuext::FLUSH_CACHE | mmuext::FLUSH_CACHE_GLOBAL => {}
            // The count has 32 bits; the guest leaves the rest undefined.
            mmuext::SET_LDT => self.set_ldt(arg1, arg2 & 0xffff_ffff)?,
            mmuext::CLEAR_PAGE => self.page_op(arg1, None)?,
            mmuext::COPY_PAGE => self.page_op(arg1, Some(arg2))?,
            _ => return Err(errno::ENOSYS),
        }
        Ok(())
    }

    /// CLEAR_PAGE and COPY_PAGE: only on plain frames, entry by entry, so that a
    /// page table in disguise stays coherent.
    fn page_op(&mut self, to: u64, from: Option<u64>) -> Result<(), i64> {
        let to = self.check_gfn(to)?;
        let from = from.map(|g| self.check_gfn(g)).transpose()?;
        for i in 0..512 {
            self.breathe(1);
            self.with_frame(to, |mmu, m, ep| {
                let val = match from {
                    Some(g) if !mmu.has(g) => return Ok(Err(errno::EINVAL)),
                    Some(g) => m.frame(g).ok_or(Need::Frame(g))?[i].load(Relaxed),
                    None => 0,
                };
                mmu.write_entry(m, ep, to, i, |_| val).map(Ok)
            })??;
        }
        Ok(())
    }

    /// Makes `gfn` the kernel root and loads it.
    ///
    /// # Errors
    /// EINVAL for a frame that the guest has given up; the root is the old one.
    pub(crate) fn set_kernel_root(&mut self, gfn: Gfn) -> Result<(), i64> {
        let old = self.v.kernel_root;
        let (page, cr3) = self.with_frame(gfn, |mmu, m, ep| {
            let page = mmu.root_get(m, ep, gfn, false)?;
            Ok((page, mmu.root_cr3(m, page)))
        })?;
        self.v.kernel_root = page;
        self.v.root_gfns[0] = gfn;
        self.fast.kernel_cr3 = cr3;
        self.load_root();
        self.mmu(|mmu, m, ep| {
            mmu.root_put(m, ep, old);
            Ok(())
        });
        Ok(())
    }

    /// Makes `gfn` the user root; it is loaded at the next return to user mode.
    ///
    /// # Errors
    /// EINVAL for a frame that the guest has given up; the root is the old one.
    pub(crate) fn set_user_root(&mut self, gfn: Option<Gfn>) -> Result<(), i64> {
        let old = self.v.user_root;
        let (page, cr3) = match gfn {
            None => (0, 0),
            Some(gfn) => self.with_frame(gfn, |mmu, m, ep| {
                let page = mmu.root_get(m, ep, gfn, true)?;
                Ok((page, mmu.root_cr3(m, page)))
            })?,
        };
        self.v.user_root = page;
        self.v.root_gfns[1] = gfn.unwrap_or(Gfn(u64::MAX));
        self.fast.user_cr3 = cr3;
        self.mmu(|mmu, m, ep| {
            mmu.root_put(m, ep, old);
            Ok(())
        });
        Ok(())
    }
}
