//! What CPUID shows to a guest kernel.
//!
//! A PV kernel asks through Xen's forced-emulation prefix and gets [`Policy::leaf`]:
//! hardware's answer ANDed with a list of what a 64-bit PV guest may have. A bit or
//! leaf that is not in the list is 0, so a feature that a later CPU brings, or a
//! leaf of the hypervisor below, stays hidden until somebody adds it here. User
//! programs get the same answers inside KVM and on CPUs whose CPUID can be made to
//! fault at CPL 3; elsewhere they execute it natively and see the instance's CPU.
//!
//! The lists start from Xen's (`xen/arch/x86/cpu-policy.c` and the annotations of
//! `public/arch-x86/cpufeatureset.h`) and take away what needs an MSR or a
//! CR4 bit that Blanket does not give: machine check, SEP, FSGSBASE, speculation
//! control, breakpoint masks. Leaf layouts: Intel SDM volume 2A (CPUID), AMD APM
//! volume 3 appendix E.

mod names;

pub use names::{HIDDEN_WORDS, Hidden, features, names};

use crate::xen::cpuid::{BASE, SIGNATURE, VERSION};

/// Last basic leaf that is answered.
pub const MAX_BASIC: u32 = 0xd;
/// Last extended leaf that is answered.
pub const MAX_EXTENDED: u32 = 0x8000_0021;
/// Last Xen leaf.
pub const MAX_XEN: u32 = BASE + 5;
/// MSR through which the guest may ask for a hypercall page (leaf 2 of Xen).
pub const HYPERCALL_MSR: u32 = 0x4000_0000;

/// Widest physical address that a guest is told. With 44 bits every frame number
/// fits the 32 bits of a version 1 grant entry.
pub const PHYS_BITS: u32 = 44;
/// Virtual address bits: guests always have 4-level tables.
pub const LINEAR_BITS: u32 = 48;

/// XCR0 components that a guest may have: x87, SSE, AVX and the three of AVX-512.
/// PKRU needs CR4.PKE and AMX needs MSRs, MPX is gone.
pub const XCR0_ALLOWED: u64 = 0xe7;

/// Feature words that may be shown, all as masks on hardware's answer.
pub mod allow {
    const fn bits(list: &[u32]) -> u32 {
        let mut mask = 0;
        let mut i = 0;
        while i < list.len() {
            mask |= 1 << list[i];
            i += 1;
        }
        mask
    }

    /// Leaf 1 ecx without XSAVE (26), OSXSAVE (27) and HYPERVISOR (31): SSE3,
    /// PCLMULQDQ, SSSE3, CX16, SSE4.1, SSE4.2, MOVBE, POPCNT, AESNI, RDRAND.
    pub const L1_ECX: u32 = bits(&[0, 1, 9, 13, 19, 20, 22, 23, 25, 30]);
    /// Leaf 1 ecx with AVX state: FMA, AVX, F16C.
    pub const L1_ECX_AVX: u32 = bits(&[12, 28, 29]);
    /// Leaf 1 ecx with any XSAVE state: XSAVE.
    pub const L1_ECX_XSAVE: u32 = bits(&[26]);
    /// Leaf 1 ecx, shown when CR4.OSXSAVE is set: OSXSAVE.
    pub const L1_ECX_OSXSAVE: u32 = bits(&[27]);
    /// Leaf 1 ecx, always shown: HYPERVISOR.
    pub const L1_ECX_HYPERVISOR: u32 = bits(&[31]);
    /// Leaf 1 edx: FPU, DE, TSC, MSR, PAE, CX8, APIC, CMOV, PAT, CLFSH, MMX, FXSR,
    /// SSE, SSE2, SS.
    pub const L1_EDX: u32 = bits(&[0, 2, 4, 5, 6, 8, 9, 15, 16, 19, 23, 24, 25, 26, 27]);

    /// Leaf 7.0 ebx: BMI1, BMI2, ERMS, RTM, RDSEED, ADX, CLFLUSHOPT, CLWB, SHA.
    pub const L7_EBX: u32 = bits(&[3, 8, 9, 11, 18, 19, 23, 24, 29]);
    /// Leaf 7.0 ebx with AVX state: AVX2.
    pub const L7_EBX_AVX: u32 = bits(&[5]);
    /// Leaf 7.0 ebx with AVX-512 state: F, DQ, IFMA, CD, BW, VL.
    pub const L7_EBX_AVX512: u32 = bits(&[16, 17, 21, 28, 30, 31]);
    /// Leaf 7.0 ecx: PREFETCHWT1, GFNI, CLDEMOTE.
    pub const L7_ECX: u32 = bits(&[0, 8, 25]);
    /// Leaf 7.0 ecx with AVX state: VAES, VPCLMULQDQ.
    pub const L7_ECX_AVX: u32 = bits(&[9, 10]);
    /// Leaf 7.0 ecx with AVX-512 state: VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ.
    pub const L7_ECX_AVX512: u32 = bits(&[1, 6, 11, 12, 14]);
    /// Leaf 7.0 ecx with TSC_AUX: RDPID.
    pub const L7_ECX_TSC_AUX: u32 = bits(&[22]);
    /// Leaf 7.0 edx: FSRM, MD_CLEAR, SERIALIZE.
    pub const L7_EDX: u32 = bits(&[4, 10, 14]);
    /// Leaf 7.0 edx with AVX-512 state: FP16.
    pub const L7_EDX_AVX512: u32 = bits(&[23]);
    /// Leaf 7.1 eax: FZRM, FSRS, FSRCS.
    pub const L7_1_EAX: u32 = bits(&[10, 11, 12]);
    /// Leaf 7.1 eax with AVX state: SHA512, SM3, SM4, AVX-VNNI, AVX-IFMA.
    pub const L7_1_EAX_AVX: u32 = bits(&[0, 1, 2, 4, 23]);
    /// Leaf 7.1 eax with AVX-512 state: BF16.
    pub const L7_1_EAX_AVX512: u32 = bits(&[5]);
    /// Leaf 7.1 edx: PREFETCHI.
    pub const L7_1_EDX: u32 = bits(&[14]);
    /// Leaf 7.1 edx with AVX state: AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16.
    pub const L7_1_EDX_AVX: u32 = bits(&[4, 5, 10]);
    /// Leaf 7.2 edx: MCDT_NO.
    pub const L7_2_EDX: u32 = bits(&[5]);

    /// Leaf 0xd.1 eax: XSAVEOPT, XSAVEC, XGETBV with ecx = 1; not XSAVES.
    pub const LD_1_EAX: u32 = bits(&[0, 1, 2]);

    /// Leaf 0x80000001 ecx: LAHF, LZCNT, SSE4A, MISALIGNSSE, PREFETCHW, TBM.
    pub const E1_ECX: u32 = bits(&[0, 5, 6, 7, 8, 21]);
    /// Leaf 0x80000001 ecx with AVX state: XOP, FMA4.
    pub const E1_ECX_AVX: u32 = bits(&[11, 16]);
    /// Leaf 0x80000001 edx: SYSCALL, NX, MMXEXT, FFXSR, LM, 3DNOWEXT, 3DNOW.
    pub const E1_EDX: u32 = bits(&[11, 20, 22, 25, 29, 30, 31]);
    /// Leaf 0x80000001 edx with TSC_AUX: RDTSCP.
    pub const E1_EDX_TSC_AUX: u32 = bits(&[27]);
    /// Leaf 0x80000008 ebx: CLZERO, RSTR_FP_ERR_PTRS, SSB_NO, BTC_NO.
    pub const E8_EBX: u32 = bits(&[0, 2, 26, 29]);
    /// Leaf 0x80000021 eax: NO_NEST_BP, LFENCE serializes, VERW_CLEAR, null
    /// selectors clear the base, FSRS, FSRC, EPSF, fast rep scasb, PREFETCHI,
    /// SRSO_NO, SRSO_US_NO.
    pub const E21_EAX: u32 = bits(&[0, 2, 5, 6, 10, 11, 18, 19, 20, 29, 30]);
    /// Leaf 0x80000021 ecx: TSA_SQ_NO, TSA_L1_NO.
    pub const E21_ECX: u32 = bits(&[1, 2]);
}

/// What distinguishes one vCPU's CPUID from another's, and one VM's.
#[derive(Clone, Copy, Debug, Default)]
pub struct Policy {
    /// The vCPU's id; shown as its APIC id, which is how Linux from 6.9 on numbers
    /// the CPUs of a PV guest (`xen_pv_smp_config`).
    pub vcpu_id: u32,
    /// XCR0 components that the VM may use; 0 hides XSAVE. Bits outside
    /// [`XCR0_ALLOWED`], and components without those they build on, are dropped.
    pub xcr0_mask: u64,
    /// The guest's XCR0 now. It must be the one that is loaded while leaf 0xd is read
    /// from hardware.
    pub xcr0: u64,
    /// The guest's CR4.OSXSAVE.
    pub osxsave: bool,
    /// Features that the VM does not have although its host has them. What needs a
    /// component of XCR0 goes by [`Policy::xcr0_mask`].
    pub hidden: Hidden,
    /// TSC_AUX is switched with the VM: RDTSCP and RDPID may be shown.
    pub tsc_aux: bool,
    /// The instance's TSC is stable and the same on all its CPUs.
    pub stable_tsc: bool,
    /// Frequency of the guest's TSC, kHz.
    pub tsc_khz: u32,
    /// pvclock multiplier.
    pub tsc_mul: u32,
    /// pvclock shift.
    pub tsc_shift: i8,
}

/// Register order of every answer: eax, ebx, ecx, edx.
pub type Regs = [u32; 4];

const ZERO: Regs = [0; 4];

/// Whether the answer for `leaf` needs hardware's. CPUID makes most providers'
/// hypervisors exit, so the caller should not execute it for nothing.
#[must_use]
#[inline]
pub const fn needs_hardware(leaf: u32) -> bool {
    matches!(
        leaf,
        0..=2 | 4 | 7 | 0xd
            | 0x8000_0000..=0x8000_0006
            | 0x8000_0008
            | 0x8000_001d
            | 0x8000_0021
    )
}

impl Policy {
    /// The XCR0 components that the VM really has: a consistent subset of
    /// [`Policy::xcr0_mask`], or 0.
    #[must_use]
    #[inline]
    pub const fn xstates(&self) -> u64 {
        let mut m = self.xcr0_mask & XCR0_ALLOWED;
        if m & 3 != 3 {
            return 0;
        }
        if m & 4 == 0 || m & 0xe0 != 0xe0 {
            m &= 7;
        }
        m
    }

    /// Whether the guest may set XCR0 to `value` (Intel SDM volume 1, 13.3: x87
    /// always, AVX needs SSE, AVX-512 all three parts and AVX).
    #[must_use]
    #[inline]
    pub const fn xcr0_valid(&self, value: u64) -> bool {
        let avx512 = value & 0xe0;
        value & !self.xstates() == 0
            && value & 1 != 0
            && (value & 4 == 0 || value & 2 != 0)
            && (avx512 == 0 || avx512 == 0xe0 && value & 4 != 0)
    }

    /// The guest's answer to CPUID `leaf`, `subleaf` as eax, ebx, ecx, edx, given
    /// hardware's answer to the same question in `hw` (ignored unless
    /// [`needs_hardware`]).
    #[must_use]
    pub fn leaf(&self, leaf: u32, subleaf: u32, hw: Regs) -> Regs {
        let found = match leaf {
            0..=MAX_BASIC => self.basic(leaf, subleaf, hw),
            0x8000_0000..=MAX_EXTENDED => self.extended(leaf, hw),
            BASE..=MAX_XEN => self.xen(leaf, subleaf),
            _ => ZERO,
        };
        self.hidden.left_of(leaf, subleaf, found)
    }

    #[inline]
    fn avx(&self, mask: u32) -> u32 {
        if self.xstates() & 4 != 0 { mask } else { 0 }
    }

    #[inline]
    fn avx512(&self, mask: u32) -> u32 {
        if self.xstates() & 0xe0 != 0 { mask } else { 0 }
    }

    #[inline]
    fn tsc_aux(&self, mask: u32) -> u32 {
        if self.tsc_aux { mask } else { 0 }
    }

    fn basic(&self, leaf: u32, subleaf: u32, [a, b, c, d]: Regs) -> Regs {
        match leaf {
            // Highest leaf and vendor.
            0 => [a.min(MAX_BASIC), b, c, d],
            1 => {
                let mut ecx = allow::L1_ECX | self.avx(allow::L1_ECX_AVX);
                let mut set = allow::L1_ECX_HYPERVISOR;
                if self.xstates() != 0 {
                    ecx |= allow::L1_ECX_XSAVE;
                    // OSXSAVE shows the guest's CR4, not the core's.
                    if self.osxsave {
                        set |= c << 1 & allow::L1_ECX_OSXSAVE;
                    }
                }
                // ebx: CLFLUSH line size and APIC id. One logical CPU in a package.
                [
                    a,
                    b & 0xff00 | self.vcpu_id << 24,
                    c & ecx | set,
                    d & allow::L1_EDX,
                ]
            }
            // Cache and TLB descriptors.
            2 => [a, b, c, d],
            4 => cache(a, b, c, d),
            7 => match subleaf {
                0 => [
                    a.min(2),
                    b & (allow::L7_EBX
                        | self.avx(allow::L7_EBX_AVX)
                        | self.avx512(allow::L7_EBX_AVX512)),
                    c & (allow::L7_ECX
                        | self.avx(allow::L7_ECX_AVX)
                        | self.avx512(allow::L7_ECX_AVX512)
                        | self.tsc_aux(allow::L7_ECX_TSC_AUX)),
                    d & (allow::L7_EDX | self.avx512(allow::L7_EDX_AVX512)),
                ],
                1 => [
                    a & (allow::L7_1_EAX
                        | self.avx(allow::L7_1_EAX_AVX)
                        | self.avx512(allow::L7_1_EAX_AVX512)),
                    0,
                    0,
                    d & (allow::L7_1_EDX | self.avx(allow::L7_1_EDX_AVX)),
                ],
                2 => [0, 0, 0, d & allow::L7_2_EDX],
                _ => ZERO,
            },
            0xd => self.xsave(subleaf, [a, b, c, d]),
            // 5 and 6: MONITOR, thermal. 0xa: counters. 0xb: topology.
            _ => ZERO,
        }
    }

    /// Leaf 0xd.
    fn xsave(&self, subleaf: u32, [a, b, c, _]: Regs) -> Regs {
        let states = self.xstates();
        if states == 0 {
            return ZERO;
        }
        // All allowed components are in the low half.
        #[allow(clippy::cast_possible_truncation, reason = "XCR0_ALLOWED has 8 bits")]
        let low = states as u32;
        match subleaf {
            // ebx is the size for the XCR0 that is loaded. ecx is that for all
            // that hardware has; where this is more than the guest may have, the
            // guest's own size is the one that its XCR0 gives.
            0 => [a & low, b, if a & !low == 0 { c } else { b }, 0],
            1 => {
                let eax = a & allow::LD_1_EAX;
                // The compact size counts the host's supervisor states too
                // (IA32_XSS), so it is computed, and only where XSAVEC exists.
                let ebx = if eax & 2 != 0 {
                    compact_size(self.xcr0 & states)
                } else {
                    0
                };
                [eax, ebx, 0, 0]
            }
            // Size, offset, and whether it is aligned in the compact form.
            2..=31 if low >> subleaf & 1 != 0 => [a, b, c & 2, 0],
            _ => ZERO,
        }
    }

    fn extended(&self, leaf: u32, [a, b, c, d]: Regs) -> Regs {
        match leaf {
            // A CPU without extended leaves answers with something below the range.
            0x8000_0000 if a < 0x8000_0000 => ZERO,
            0x8000_0000 => [a.min(MAX_EXTENDED), b, c, d],
            0x8000_0001 => [
                a,
                0,
                c & (allow::E1_ECX | self.avx(allow::E1_ECX_AVX)),
                d & (allow::E1_EDX | self.tsc_aux(allow::E1_EDX_TSC_AUX)),
            ],
            // Brand string, L1 caches and TLBs, L2 and L3 caches.
            0x8000_0002..=0x8000_0006 => [a, b, c, d],
            // 0x80000007 stays 0: an invariant TSC is a promise that a move to
            // another host breaks; time is pvclock's.
            0x8000_0008 => [
                (a & 0xff).min(PHYS_BITS) | LINEAR_BITS << 8,
                b & allow::E8_EBX,
                0,
                0,
            ],
            0x8000_001d => cache(a, b, c, d),
            0x8000_0021 => [a & allow::E21_EAX, 0, c & allow::E21_ECX, 0],
            // SVM, IBS, topology, encryption, ...
            _ => ZERO,
        }
    }

    /// `public/arch-x86/cpuid.h`.
    fn xen(&self, leaf: u32, subleaf: u32) -> Regs {
        let [b, c, d] = SIGNATURE;
        match (leaf - BASE, subleaf) {
            (0, _) => [MAX_XEN, b, c, d],
            (1, _) => [VERSION, 0, 0, 0],
            // One hypercall page; mmu_update can preserve accessed and dirty bits.
            (2, _) => [1, HYPERCALL_MSR, 1, 0],
            // Not emulated (bit 0), reliable (1), RDTSCP (2); mode 0 is the default
            // one; incarnation 0.
            (3, 0) => {
                let eax = u32::from(self.stable_tsc) << 1 | u32::from(self.tsc_aux) << 2;
                [eax, 0, self.tsc_khz, 0]
            }
            // Offset 0; the shift is a signed byte in a u32.
            (3, 1) => [
                0,
                0,
                self.tsc_mul,
                i32::from(self.tsc_shift).cast_unsigned(),
            ],
            (3, 2) => [self.tsc_khz, 0, 0, 0],
            // Machine address bits.
            (5, 0) => [0, PHYS_BITS, 0, 0],
            _ => ZERO,
        }
    }
}

/// A cache descriptor as in leaf 4 and 0x8000001d: shared with no other CPU
/// (eax 25:14) and in a package of one core (31:26), like the topology shown.
#[inline]
const fn cache(a: u32, b: u32, c: u32, d: u32) -> Regs {
    [a & 0x3fff, b, c, d & 7]
}

/// Bytes of a compact XSAVE area with the components of `xcr0`: legacy region and
/// header, then the components, whose sizes the SDM fixes (volume 1, 13.5).
#[inline]
const fn compact_size(xcr0: u64) -> u32 {
    let mut size = 512 + 64;
    if xcr0 & 1 << 2 != 0 {
        size += 256;
    }
    if xcr0 & 1 << 5 != 0 {
        size += 64;
    }
    if xcr0 & 1 << 6 != 0 {
        size += 512;
    }
    if xcr0 & 1 << 7 != 0 {
        size += 1024;
    }
    size
}
