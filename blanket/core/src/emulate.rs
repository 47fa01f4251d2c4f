//! Instructions that a PV kernel executes and the CPU refuses at CPL 3
//! (`xen/arch/x86/pv/emul-priv-op.c`, `emul-inv-op.c`, `ro-page-fault.c`).

use crate::context::Context;
use crate::insn::{self, PrivOp, PtOp, PtWrite, Reg, decode_priv, decode_pt_write};
use crate::machine::Machine;
use crate::trap::vector;
use blanket_abi::device::{counter, crash};
use blanket_abi::layout::sel;
use blanket_abi::{Gfn, Va};

/// Model-specific registers that guests touch.
mod msr {
    pub const TSC: u32 = 0x10;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const APIC_BASE: u32 = 0x1b;
    pub const UCODE_REV: u32 = 0x8b;
    pub const PLATFORM_INFO: u32 = 0xce;
    pub const MISC_FEATURES_ENABLES: u32 = 0x140;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const PAT: u32 = 0x277;
    pub const PERF_CAPABILITIES: u32 = 0x345;
    pub const EFER: u32 = 0xc000_0080;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
    pub const HWCR: u32 = 0xc001_0015;
    pub const DE_CFG: u32 = 0xc001_1029;
}

/// EFER of a 64-bit PV guest: SCE, LME, LMA, NXE.
const EFER: u64 = 1 | 1 << 8 | 1 << 10 | 1 << 11;
/// Xen's PAT layout: WB, WT, UC-, UC, WC, WP (`xen/arch/x86/include/asm/msr.h`).
const PAT: u64 = 0x0501_0007_0406;

/// CR0 as a PV guest sees it: PG, AM, WP, NE, ET, MP, PE.
const CR0: u64 = 0x8005_0033;
/// Bits of CR4 that the guest may change (xen-pv-abi, 4.1).
pub const CR4_GUEST: u64 = 1 << 2 | 1 << 3 | 1 << 18;
/// CR4 that the guest reads whatever it wrote: PAE, OSFXSR, OSXMMEXCPT.
pub const CR4_FIXED: u64 = 1 << 5 | 1 << 9 | 1 << 10;

/// What an emulated instruction did.
enum Done {
    /// Go on behind it.
    Next,
    /// It faults: #GP(0).
    Refuse,
}

impl<M: Machine> Context<'_, M> {
    /// Linear address of the instruction at RIP.
    fn linear_rip(&self) -> u64 {
        #[allow(clippy::cast_possible_truncation, reason = "selectors have 16 bits")]
        let cs = self.f.cs as u16;
        if cs == sel::GUEST_CS64 {
            return self.f.rip;
        }
        let desc = self.m.descriptor(cs);
        // Bit 53: a 64-bit segment, whose base is not used.
        if desc >> 53 & 1 != 0 {
            return self.f.rip;
        }
        let base = desc >> 16 & 0xff_ffff | desc >> 56 << 24;
        base.wrapping_add(self.f.rip) & 0xffff_ffff
    }

    /// Reads what can be read of the instruction at RIP.
    fn fetch(&mut self) -> ([u8; insn::MAX_LEN], usize) {
        let mut code = [0; insn::MAX_LEN];
        let rip = self.linear_rip();
        // Most instructions end on the page they begin on: do not fault in the next.
        let rest = crate::idx((4096 - (rip & 0xfff)).min(insn::MAX_LEN as u64));
        if self.copy_in(Va(rip), &mut code[..rest]).is_err() {
            return (code, 0);
        }
        let all = rest == insn::MAX_LEN
            || self
                .copy_in(Va(rip + rest as u64), &mut code[rest..])
                .is_ok();
        (code, if all { insn::MAX_LEN } else { rest })
    }

    /// #UD: Xen's forced-emulation prefix, or the guest's own business.
    pub fn invalid_opcode(&mut self) {
        let (code, n) = self.fetch();
        if let Some((PrivOp::ForcedCpuid, len)) = decode_priv(&code[..n]) {
            self.count(counter::PRIV_OP);
            self.emulate_cpuid();
            self.f.rip = self.f.rip.wrapping_add(u64::from(len));
        } else {
            self.inject(vector::UD, None);
        }
    }

    /// #GP: `int n`, a privileged instruction of the guest kernel, or the
    /// guest's own business.
    pub fn general_protection(&mut self) {
        let (code, n) = self.fetch();
        if let Some((op, len)) = decode_priv(&code[..n]) {
            if let PrivOp::Int(v) = op {
                if self.software_interrupt(v, len) {
                    return;
                }
                // The index in the error code is computed: emulators get it wrong.
                self.inject(vector::GP, Some(u64::from(v) << 3 | 2));
                return;
            }
            // A program's, on a CPU that lets nobody but us execute it.
            let program_cpuid = op == PrivOp::Cpuid && self.m.vm_page().cpuid_faults != 0;
            if self.kernel_mode() || program_cpuid {
                self.count(counter::PRIV_OP);
                if let Done::Next = self.privileged(op) {
                    self.f.rip = self.f.rip.wrapping_add(u64::from(len));
                    return;
                }
            }
        }
        self.inject(vector::GP, Some(self.f.error & 0xffff));
    }

    fn emulate_cpuid(&mut self) {
        let (leaf, subleaf) = (low(self.f.rax), low(self.f.rcx));
        let hw = if crate::cpuid::needs_hardware(leaf) {
            self.m.cpuid(leaf, subleaf)
        } else {
            [0; 4]
        };
        let [a, b, c, d] = self.cpuid_policy().leaf(leaf, subleaf, hw);
        self.f.rax = u64::from(a);
        self.f.rbx = u64::from(b);
        self.f.rcx = u64::from(c);
        self.f.rdx = u64::from(d);
    }

    fn privileged(&mut self, op: PrivOp) -> Done {
        match op {
            PrivOp::Rdmsr => match self.read_msr(low(self.f.rcx)) {
                Some(v) => {
                    self.f.rax = v & 0xffff_ffff;
                    self.f.rdx = v >> 32;
                    Done::Next
                }
                None => Done::Refuse,
            },
            PrivOp::Wrmsr => {
                let v = self.f.rax & 0xffff_ffff | self.f.rdx << 32;
                if self.write_msr(low(self.f.rcx), v) {
                    Done::Next
                } else {
                    Done::Refuse
                }
            }
            PrivOp::Cpuid => {
                self.emulate_cpuid();
                Done::Next
            }
            PrivOp::MovFromCr { cr, gpr } => {
                let val = match cr {
                    0 => CR0,
                    2 => self.guest_cr2(),
                    3 => {
                        let root = self.v.kernel_root;
                        self.mmu(|mmu, _, _| Ok(mmu.root_gfn(root))).base()
                    }
                    4 => {
                        // Linux drops XSAVE unless OSXSAVE is set already.
                        let osxsave = u64::from(self.m.vm_page().xcr0_mask != 0) << 18;
                        self.v.cr4 | CR4_FIXED | osxsave
                    }
                    _ => return Done::Refuse,
                };
                self.f.set_gpr(gpr, val);
                Done::Next
            }
            PrivOp::MovToCr { cr, gpr } => {
                let val = self.f.gpr(gpr);
                match cr {
                    // Only TS may change, and TS is never set for real.
                    0 if (val ^ CR0) & !8 == 0 => Done::Next,
                    2 => {
                        self.set_cr2(val);
                        Done::Next
                    }
                    4 => {
                        self.v.cr4 = val & CR4_GUEST;
                        Done::Next
                    }
                    _ => Done::Refuse,
                }
            }
            PrivOp::MovFromDr { dr, gpr } => {
                let val = match dr {
                    0..=3 => self.v.dr[usize::from(dr)],
                    4 | 6 => self.v.dr6,
                    _ => self.v.dr7,
                };
                self.f.set_gpr(gpr, val);
                Done::Next
            }
            PrivOp::MovToDr { dr, gpr } => {
                let val = self.f.gpr(gpr);
                if self.set_debugreg(u64::from(dr), val).is_ok() {
                    Done::Next
                } else {
                    Done::Refuse
                }
            }
            PrivOp::Clts | PrivOp::Wbinvd => Done::Next,
            // Honouring CLI would leave events masked for ever: the matching POPF
            // does not trap (world-switch, section 5).
            PrivOp::Cli | PrivOp::Sti if self.v.iopl >= 1 => Done::Next,
            PrivOp::In { size, .. } if self.v.iopl >= 1 => {
                // No device answers: all ones.
                self.f.rax = match size {
                    1 => self.f.rax | 0xff,
                    2 => self.f.rax | 0xffff,
                    _ => 0xffff_ffff,
                };
                Done::Next
            }
            PrivOp::Out { .. } if self.v.iopl >= 1 => Done::Next,
            PrivOp::Xsetbv => {
                let val = self.f.rax & 0xffff_ffff | self.f.rdx << 32;
                if low(self.f.rcx) == 0 && self.set_xcr0(val) {
                    Done::Next
                } else {
                    Done::Refuse
                }
            }
            PrivOp::Rdtsc => {
                let t = self.m.tsc();
                self.f.rax = t & 0xffff_ffff;
                self.f.rdx = t >> 32;
                Done::Next
            }
            _ => Done::Refuse,
        }
    }

    fn guest_cr2(&self) -> u64 {
        use blanket_abi::xen::shared::vcpu_info;
        self.v
            .info
            .and_then(|p| self.word(p.gfn, p.offset + vcpu_info::CR2))
            .map_or(0, |w| w.load(core::sync::atomic::Ordering::Relaxed))
    }

    fn read_msr(&mut self, nr: u32) -> Option<u64> {
        Some(match nr {
            msr::FS_BASE => self.m.fs_base(),
            msr::GS_BASE => self.m.gs_base(),
            msr::KERNEL_GS_BASE => self.m.inactive_gs_base(),
            msr::EFER => EFER,
            msr::APIC_BASE => 0xfee0_0000 | 1 << 11 | u64::from(self.v.id == 0) << 8,
            msr::PAT => PAT,
            msr::TSC => self.m.tsc(),
            msr::TSC_AUX => self.v.tsc_aux,
            msr::DE_CFG => 1 << 1,
            msr::PLATFORM_ID
            | msr::UCODE_REV
            | msr::PLATFORM_INFO
            | msr::MISC_FEATURES_ENABLES
            | msr::MISC_ENABLE
            | msr::PERF_CAPABILITIES
            | msr::HWCR
            | 0x179
            | 0x198
            | 0x199
            | 0x19c
            | 0x400..=0x47f
            | 0xc001_0061..=0xc001_0071 => 0,
            _ => return None,
        })
    }

    fn write_msr(&mut self, nr: u32, val: u64) -> bool {
        match nr {
            msr::FS_BASE | msr::GS_BASE | msr::KERNEL_GS_BASE => {
                if !Va(val).is_canonical() {
                    return false;
                }
                match nr {
                    msr::FS_BASE => self.m.set_fs_base(val),
                    msr::GS_BASE => self.m.set_gs_base(val),
                    _ => self.m.set_inactive_gs_base(val),
                }
                true
            }
            msr::EFER => val == EFER,
            msr::TSC_AUX => {
                self.v.tsc_aux = val & 0xffff_ffff;
                self.m.set_tsc_aux(self.v.tsc_aux);
                true
            }
            msr::TSC
            | msr::UCODE_REV
            | msr::MISC_ENABLE
            | msr::HWCR
            | msr::DE_CFG
            | 0x179..=0x17b
            | 0x198
            | 0x199
            | 0x19c
            | 0x400..=0x47f
            | 0xc001_0061..=0xc001_0071 => true,
            msr::MISC_FEATURES_ENABLES => val == 0,
            _ => false,
        }
    }

    /// Sets XCR0 if the guest may have `val`.
    pub fn set_xcr0(&mut self, val: u64) -> bool {
        let ok = self.cpuid_policy().xcr0_valid(val);
        if ok {
            self.v.xcr0 = val;
            self.m.set_xcr0(val);
        }
        ok
    }

    /// Writes a debug register for the guest.
    ///
    /// # Errors
    /// EPERM for an address in the hypervisor's range, EINVAL for bits that do
    /// not exist.
    pub fn set_debugreg(&mut self, reg: u64, val: u64) -> Result<(), i64> {
        use blanket_abi::xen::errno;
        match reg {
            0..=3 => {
                if !Va(val).is_guest() {
                    return Err(errno::EPERM);
                }
                self.v.dr[crate::idx(reg) & 3] = val;
                self.m.set_dr(reg.to_le_bytes()[0], val);
            }
            4 | 6 => {
                if val >> 32 != 0 {
                    return Err(errno::EINVAL);
                }
                self.v.dr6 = val & 0xffff_efff | 0xffff_0ff0;
            }
            5 | 7 => {
                if val >> 32 != 0 {
                    return Err(errno::EINVAL);
                }
                // No general detect, no I/O breakpoints; reserved bits as the CPU
                // has them (`xen/arch/x86/include/asm/debugreg.h`).
                let mut dr7 = val & 0xffff_0fff & !(0x2000 | 0xd800) | 0x400;
                for i in 0..4 {
                    if dr7 >> (16 + 4 * i) & 3 == 2 {
                        return Err(errno::EPERM);
                    }
                }
                if dr7 & 0xff == 0 {
                    dr7 = 0x400;
                }
                self.v.dr7 = dr7;
                self.m.set_dr(7, dr7);
            }
            _ => return Err(errno::EINVAL),
        }
        Ok(())
    }

    /// A write of the guest kernel to a page table that it maps read-only. False
    /// if the instruction is not one that is emulated.
    pub fn emulate_table_write(&mut self, gfn: Gfn, va: Va) -> bool {
        let Some(write) = self.decode_table_write() else {
            return false;
        };
        let shift = u32::from((va.0 & 7) as u8) * 8;
        if shift / 8 + u32::from(write.size) > 8 {
            return false;
        }
        self.count(counter::PT_WRITE);
        let index = ((va.0 & 0xfff) >> 3) as usize;
        if let PtWrite {
            size: 8,
            op: PtOp::Xchg(Reg { num, high: false }),
            ..
        } = write
        {
            // Nearly all of them: clearing an entry and learning what it was.
            let new = self.f.gpr(num);
            let done = self.with_frame(gfn, |mmu, m, ep| {
                mmu.write_entry(m, ep, gfn, index, |_| new)
            });
            // Another vCPU has given the frame up since the fault: it faults again.
            let Ok((old, _)) = done else { return true };
            self.f.set_gpr(num, old);
        } else {
            let mask = if write.size >= 8 {
                u64::MAX
            } else {
                (1 << (8 * write.size)) - 1
            };
            let before = (self.f.gprs(), self.f.rflags);
            let mut after = before;
            let done = self.with_frame(gfn, |mmu, m, ep| {
                mmu.write_entry(m, ep, gfn, index, |old| {
                    after = before;
                    match write.apply(old >> shift & mask, &mut after.0, &mut after.1) {
                        Some(new) => old & !(mask << shift) | (new & mask) << shift,
                        None => old,
                    }
                })
            });
            if done.is_err() {
                return true;
            }
            self.f.set_gprs(&after.0);
            self.f.rflags = after.1;
        }
        self.f.rip = self.f.rip.wrapping_add(u64::from(write.len));
        true
    }

    /// Decodes the write at RIP. A kernel has two or three places that write page
    /// tables, so the last decodings are remembered, by the code bytes themselves:
    /// code that is patched can never meet an old decoding.
    fn decode_table_write(&mut self) -> Option<PtWrite> {
        let rip = self.f.rip;
        let code = if rip & 0xfff <= 4096 - 8 {
            self.read_words::<1>(rip).ok()?[0]
        } else {
            0
        };
        // The operand size prefix or LOCK tells the usual two apart.
        let slot = usize::from(code & 0xff == 0xf0);
        if let Some((known, write)) = self.v.decoded[slot]
            && known == code
            && code != 0
        {
            return Some(write);
        }
        let (bytes, n) = self.fetch();
        let write = decode_pt_write(&bytes[..n])?;
        if write.len <= 8 && code != 0 {
            self.v.decoded[slot] = Some((code, write));
        }
        Some(write)
    }

    /// A hole in our own logic: ends the VM, names the place.
    #[cold]
    #[track_caller]
    pub fn core_bug(&mut self, what: &str) -> ! {
        let at = core::panic::Location::caller();
        self.crash(crash::CORE, format_args!("{what} at {at}"))
    }
}

#[allow(
    clippy::cast_possible_truncation,
    reason = "the low half is what the instruction reads"
)]
const fn low(v: u64) -> u32 {
    v as u32
}
