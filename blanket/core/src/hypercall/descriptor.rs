//! Descriptors, segments, trap table and callbacks.

use super::super::context::{Context, Hyper};
use crate::machine::Machine;
use crate::vcpu::{Callback, rflags};
use blanket_abi::layout::sel;
use blanket_abi::xen::errno;
use blanket_abi::xen::hypercall::{callback, segbase, vgcf};
use blanket_abi::{Gfn, Va};
use core::sync::atomic::Ordering::Relaxed;

/// Guest entries end where Xen's page begins.
const GDT_ENTRIES_MAX: u64 = 14 * 512;
const LDT_ENTRIES_MAX: u64 = 8192;

/// A descriptor as the hardware table may have it: data and code only, at
/// privilege level 3 (`xen/arch/x86/pv/descriptor-tables.c`, check_descriptor).
/// Everything else becomes null. One that is not present stays, and raises #NP.
#[must_use]
pub fn sanitise(desc: u64) -> u64 {
    const SEGMENT: u64 = 1 << 44;
    const DPL: u64 = 3 << 45;
    if desc & SEGMENT != 0 { desc | DPL } else { 0 }
}

impl<M: Machine> Context<'_, M> {
    /// `set_gdt(frames, entries)`.
    pub(super) fn set_gdt(&mut self, list: u64, entries: u64) -> Hyper {
        if entries > GDT_ENTRIES_MAX {
            return Err(errno::EINVAL);
        }
        let frames = crate::idx(entries.div_ceil(512));
        let mut gdt = [Gfn(0); 14];
        for (i, slot) in gdt.iter_mut().enumerate().take(frames) {
            let [mfn] = self.read_words::<1>(list.wrapping_add(8 * i as u64))?;
            *slot = Gfn(mfn);
            self.need_frame(Gfn(mfn))?;
        }
        self.load_gdt(gdt, entries);
        Ok(0)
    }

    /// Copies the guest's GDT to the hardware's.
    pub(crate) fn load_gdt(&mut self, gdt: [Gfn; 14], entries: u64) {
        let before = self.v.gdt_entries;
        self.v.gdt = gdt;
        #[allow(
            clippy::cast_possible_truncation,
            reason = "checked against the maximum"
        )]
        let entries = entries as u32;
        self.v.gdt_entries = entries;
        for i in 0..entries.max(before) {
            self.breathe(1);
            let gfn = gdt[(i / 512) as usize % 14];
            // The host may have had the frame back since the last entry.
            if i < entries && self.word(gfn, 0).is_none() && self.need_frame(gfn).is_err() {
                return;
            }
            let raw = if i < entries {
                self.word(gfn, u64::from(i % 512) * 8)
                    .map_or(0, |w| w.load(Relaxed))
            } else {
                0
            };
            self.m.write_gdt(i, sanitise(raw));
        }
    }

    /// `update_descriptor(machine address, descriptor)`.
    pub(super) fn update_descriptor(&mut self, ma: u64, desc: u64) -> Hyper {
        let gfn = Gfn::containing(ma);
        if ma & 7 != 0 {
            return Err(errno::EINVAL);
        }
        let index = ((ma & 0xfff) >> 3) as usize;
        let is_table = self.with_frame(gfn, |mmu, m, ep| {
            if mmu.is_table(gfn) {
                return Ok(true);
            }
            mmu.write_entry(m, ep, gfn, index, |_| desc).map(|_| false)
        })?;
        if is_table {
            return Err(errno::EINVAL);
        }
        for (page, frame) in (0u32..).zip(self.v.gdt) {
            #[allow(clippy::cast_possible_truncation, reason = "an index below 512")]
            let entry = page * 512 + index as u32;
            if frame == gfn && entry < self.v.gdt_entries {
                self.m.write_gdt(entry, sanitise(desc));
            }
        }
        if self.v.ldt_entries != 0 {
            let (va, n) = (self.v.ldt, u64::from(self.v.ldt_entries));
            self.set_ldt(va, n)?;
        }
        Ok(0)
    }

    /// `MMUEXT_SET_LDT`: copies the table, so that the hardware never reads one
    /// that the guest can change.
    pub(crate) fn set_ldt(&mut self, va: u64, entries: u64) -> Result<(), i64> {
        if entries > LDT_ENTRIES_MAX || (entries != 0 && va & 0xfff != 0) {
            return Err(errno::EINVAL);
        }
        #[allow(
            clippy::cast_possible_truncation,
            reason = "checked against the maximum"
        )]
        let n = entries as u32;
        for i in 0..n {
            self.breathe(1);
            let [desc] = self.read_words::<1>(va.wrapping_add(u64::from(i) * 8))?;
            self.m.write_ldt(i, sanitise(desc));
        }
        self.v.ldt = va;
        self.v.ldt_entries = n;
        self.m.load_ldt(n);
        Ok(())
    }

    /// `stack_switch(ss, sp)`.
    pub(super) fn stack_switch(&mut self, ss: u64, sp: u64) -> Hyper {
        self.v.kernel_ss = ss;
        self.v.kernel_sp = sp;
        self.publish_entry();
        Ok(0)
    }

    /// Brings the fast paths up to date. The system call path looks only at
    /// `Fast::syscall`: it is set only when everything else is there.
    pub(crate) fn publish_entry(&mut self) {
        let sp = self.v.kernel_sp & !15;
        // The fast path stores up to 64 bytes below.
        let sp_ok = Va(sp).is_guest() && Va(sp.wrapping_sub(64)).is_guest();
        self.fast.kernel_sp = if sp_ok { sp } else { 0 };
        let handler = self.v.syscall.address;
        let fast = self.v.syscall.mask
            && handler != 0
            && Va(handler).is_guest()
            && self.fast.kernel_sp != 0
            && self.fast.vcpu_info != 0
            && self.fast.isolated == 0;
        self.fast.syscall = if fast { handler } else { 0 };
    }

    /// `set_segment_base(which, base)`.
    pub(super) fn set_segment_base(&mut self, which: u64, base: u64) -> Hyper {
        if which == segbase::GS_USER_SEL {
            // A bad selector becomes null; the result is 0 all the same.
            self.m.load_user_gs((base & 0xffff) as u16);
            return Ok(0);
        }
        if !Va(base).is_canonical() {
            return Err(errno::EINVAL);
        }
        match which {
            segbase::FS => self.m.set_fs_base(base),
            segbase::GS_USER => self.m.set_inactive_gs_base(base),
            segbase::GS_KERNEL => self.m.set_gs_base(base),
            _ => return Err(errno::EINVAL),
        }
        Ok(0)
    }

    /// `set_trap_table(entries)`: additive, ended by address 0; null clears all.
    pub(super) fn set_trap_table(&mut self, list: u64) -> Hyper {
        if list == 0 {
            self.v.traps = [crate::vcpu::Gate::default(); 256];
            return Ok(0);
        }
        for i in 0..257u64 {
            self.breathe(1);
            let [head, address] = self.read_words::<2>(list.wrapping_add(16 * i))?;
            if address == 0 {
                return Ok(0);
            }
            if !Va(address).is_guest() {
                return Err(errno::EINVAL);
            }
            let [vector, flags, ..] = head.to_le_bytes();
            self.v.traps[usize::from(vector)] = crate::vcpu::Gate { address, flags };
        }
        Err(errno::EINVAL)
    }

    /// `set_callbacks(event, failsafe, syscall)`, the old form.
    pub(super) fn set_callbacks(&mut self, event: u64, failsafe: u64, syscall: u64) -> Hyper {
        if ![event, failsafe, syscall].iter().all(|&a| Va(a).is_guest()) {
            return Err(errno::EINVAL);
        }
        self.v.event = Callback {
            address: event,
            mask: true,
        };
        self.v.failsafe = Callback {
            address: failsafe,
            mask: false,
        };
        self.v.syscall = Callback {
            address: syscall,
            mask: false,
        };
        self.publish_entry();
        Ok(0)
    }

    /// `callback_op(cmd, ptr)` (`public/callback.h`).
    pub(super) fn callback_op(&mut self, cmd: u64, ptr: u64) -> Hyper {
        let mut head = [0u8; 4];
        self.copy_in(Va(ptr), &mut head)?;
        let kind = u16::from_le_bytes([head[0], head[1]]);
        let mask = head[2] & 1 != 0;
        let address = match cmd {
            callback::REGISTER => {
                let [address] = self.read_words::<1>(ptr.wrapping_add(8))?;
                if !Va(address).is_guest() {
                    return Err(errno::EINVAL);
                }
                address
            }
            callback::UNREGISTER => match kind {
                // These cannot go (`xen/arch/x86/pv/callback.c`).
                callback::EVENT | callback::FAILSAFE | callback::SYSCALL => {
                    return Err(errno::EINVAL);
                }
                _ => 0,
            },
            _ => return Err(errno::ENOSYS),
        };
        let entry = Callback { address, mask };
        match kind {
            // Events always mask.
            callback::EVENT => {
                self.v.event = Callback {
                    address,
                    mask: true,
                }
            }
            callback::FAILSAFE => self.v.failsafe = entry,
            callback::SYSCALL => self.v.syscall = entry,
            callback::SYSCALL32 => self.v.syscall32 = entry,
            callback::SYSENTER => self.v.sysenter = entry,
            callback::NMI => {
                self.v.traps[2] = crate::vcpu::Gate {
                    address,
                    flags: u8::from(mask) << 2,
                };
            }
            _ => return Err(errno::ENOSYS),
        }
        self.publish_entry();
        Ok(0)
    }

    pub(super) fn get_debugreg(&self, reg: u64) -> i64 {
        match reg {
            0..=3 => self.v.dr[crate::idx(reg) & 3].cast_signed(),
            4 | 6 => self.v.dr6.cast_signed(),
            5 | 7 => self.v.dr7.cast_signed(),
            _ => errno::EINVAL,
        }
    }

    /// The iret hypercall: rax, r11, rcx, flags, rip, cs, rflags, rsp, ss on the
    /// guest's stack (`public/arch-x86/xen-x86_64.h`, struct iret_context).
    pub(super) fn iret(&mut self) {
        use blanket_abi::device::{counter, crash};
        self.count(counter::SLOW_IRET);
        let Ok([rax, r11, rcx, flags, rip, cs, rfl, rsp, ss]) = self.read_words::<9>(self.f.rsp)
        else {
            let sp = self.f.rsp;
            self.crash(crash::GUEST, format_args!("no iret frame at {sp:#x}"))
        };
        let to_user = cs & 3 == 3;
        if to_user && self.fast.user_cr3 == 0 {
            self.crash(
                crash::GUEST,
                format_args!("iret to user mode without a user root"),
            );
        }
        self.f.rax = rax;
        if flags & vgcf::IN_SYSCALL == 0 {
            self.f.r11 = r11;
            self.f.rcx = rcx;
        } else {
            self.f.r11 = rfl;
            self.f.rcx = rip;
        }
        self.f.rip = rip;
        self.f.cs = cs & 0xffff | 3;
        // A native kernel may run with a null SS; at CPL 3 the CPU refuses it.
        self.f.ss = if !to_user && ss & 0xfffc == 0 {
            u64::from(sel::GUEST_SS)
        } else {
            ss & 0xffff | 3
        };
        self.f.rsp = rsp;
        self.f.rflags = rfl & 0x3f_7fd5 & !rflags::HYPERVISOR | rflags::IF | rflags::ONE;
        self.set_events_masked(rfl & rflags::IF == 0);
        if self.v.nmi_blocked {
            self.v.nmi_blocked = false;
            self.fast.slow_iret &= !1;
        }
        if to_user {
            self.to_user_mode();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::sanitise;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn only_ring_3_code_and_data_reach_the_hardware(desc: u64) {
            let d = sanitise(desc);
            if d != 0 {
                prop_assert_eq!(d >> 44 & 7, 7, "DPL 3, not a system descriptor");
            }
        }
    }
}
