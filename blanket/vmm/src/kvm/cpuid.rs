//! CPUID of a KVM VM: one profile for the guest's kernel and its programs.
//!
//! KVM answers the programs' CPUID with the table that it was given. That table is
//! made by the same policy that answers the kernel (`blanket_abi::cpuid`), from what
//! this KVM supports, plus the few bits that KVM must see for the core's own sake.

use blanket_abi::cpuid::{MAX_BASIC, MAX_EXTENDED, MAX_XEN, Policy, Regs, needs_hardware};
use blanket_abi::device::{CPUID_ANY, CPUID_MAX, CpuidEntry, quirk};
use blanket_abi::kvm::feature;
use blanket_abi::xen::cpuid::BASE;
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};

use super::{Error, refused};
use crate::cpu::{Names, Profile};

/// KVM's feature leaf.
const KVM_FEATURES: u32 = 0x4000_0001;
/// Leaf 1 ecx: x2APIC and TSC deadline, without which KVM would not let the core
/// use them.
const L1_ECX_CORE: u32 = 1 << 21 | 1 << 24;
/// Leaf 7 ebx: SMEP.
const L7_EBX_SMEP: u32 = 1 << 7;
/// Leaf 7 ebx: SMAP.
const L7_EBX_SMAP: u32 = 1 << 20;
/// Features that the core has a use for.
const FEATURES: u32 = feature::CLOCK | feature::STEAL_TIME | feature::PV_EOI | feature::TLB_FLUSH;

/// What is wrong with the virtualization of the CPU that this program runs on.
///
/// QEMU's emulator names itself in the hypervisor leaf (`target/i386/cpu.c`); its SVM
/// delivers interrupts twice (see `docs/kvm-host.md`).
pub fn quirks() -> u32 {
    let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
    if [leaf.ebx, leaf.ecx, leaf.edx]
        .map(u32::to_le_bytes)
        .as_flattened()
        == b"TCGTCGTCGTCG"
    {
        quirk::INTERRUPTS_TWICE
    } else {
        0
    }
}

/// What KVM supports on this machine.
#[derive(Clone, Debug)]
pub struct Cpuid {
    supported: Vec<kvm_cpuid_entry2>,
    policy: Policy,
    /// XCR0 components that a VM may use.
    pub xcr0_mask: u32,
    /// KVM's features that the core may use.
    pub features: u32,
    /// Bits of a physical address.
    pub physical_bits: u32,
    /// SMEP protects the core.
    pub smep: bool,
    /// SMAP too.
    pub smap: bool,
}

impl Cpuid {
    /// Asks KVM.
    pub fn of_host(kvm: &kvm_ioctls::Kvm, tsc_khz: u64) -> Result<Self, Error> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("tell its CPUID"))?;
        Self::new(supported.as_slice().to_vec(), tsc_khz)
    }

    fn new(supported: Vec<kvm_cpuid_entry2>, tsc_khz: u64) -> Result<Self, Error> {
        let mut this = Self {
            supported,
            policy: Policy::default(),
            xcr0_mask: 0,
            features: 0,
            physical_bits: 0,
            smep: false,
            smap: false,
        };
        let [_, _, c, d] = this.host(1, 0);
        let [.., long_mode] = this.host(0x8000_0001, 0);
        if d & 1 << 24 == 0 || long_mode & 1 << 29 == 0 {
            return Err(Error::Cpuid("no 64-bit CPU"));
        }
        this.features = this.host(KVM_FEATURES, 0)[0] & FEATURES;
        if this.features & feature::CLOCK == 0 {
            return Err(Error::Lacks("kvmclock"));
        }
        let [_, leaf7, ..] = this.host(7, 0);
        this.smep = leaf7 & L7_EBX_SMEP != 0;
        this.smap = leaf7 & L7_EBX_SMAP != 0;
        this.physical_bits = match this.host(0x8000_0008, 0)[0] & 0xff {
            0 => 36,
            bits => bits,
        };
        let (tsc_mul, tsc_shift) = scale(tsc_khz);
        let xsave = c & 1 << 26 != 0;
        this.policy = Policy {
            xcr0_mask: if xsave {
                this.host(0xd, 0)[0].into()
            } else {
                0
            },
            osxsave: xsave,
            tsc_khz: u32::try_from(tsc_khz).unwrap_or(u32::MAX),
            tsc_mul,
            tsc_shift,
            ..Policy::default()
        };
        this.policy.xcr0 = this.policy.xstates();
        // All allowed components are in the low half.
        this.xcr0_mask = u32::try_from(this.policy.xstates()).unwrap_or(0);
        Ok(this)
    }

    fn host(&self, leaf: u32, subleaf: u32) -> Regs {
        self.supported
            .iter()
            .find(|e| e.function == leaf && (!indexed(e) || e.index == subleaf))
            .map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
    }

    /// What the core answers the guest's kernel from.
    pub fn for_core(&self) -> Vec<CpuidEntry> {
        self.supported
            .iter()
            .filter(|e| needs_hardware(e.function))
            .map(|e| CpuidEntry {
                leaf: e.function,
                subleaf: if indexed(e) { e.index } else { CPUID_ANY },
                regs: [e.eax, e.ebx, e.ecx, e.edx],
            })
            .take(CPUID_MAX)
            .collect()
    }

    /// What KVM answers the programs of vCPU `id` from.
    pub fn for_vcpu(&self, id: u32) -> Result<CpuId, Error> {
        let policy = Policy {
            vcpu_id: id,
            ..self.policy
        };
        let mut entries = Vec::new();
        let leaves = (0..=MAX_BASIC)
            .chain(BASE..=MAX_XEN)
            .chain(0x8000_0000..=MAX_EXTENDED);
        for leaf in leaves {
            let subleaves = match leaf {
                4 | 0x8000_001d => 8,
                7 => 3,
                0xd => 32,
                _ if leaf == BASE + 3 => 3,
                _ => 1,
            };
            for subleaf in 0..subleaves {
                let [eax, ebx, mut ecx, edx] = policy.leaf(leaf, subleaf, self.host(leaf, subleaf));
                let mut ebx = ebx;
                match (leaf, subleaf) {
                    (1, _) => ecx |= L1_ECX_CORE,
                    (7, 0) => ebx |= self.host(7, 0)[1] & (L7_EBX_SMEP | L7_EBX_SMAP),
                    _ if subleaf > 0 && [eax, ebx, ecx, edx] == [0; 4] => continue,
                    _ => {}
                }
                entries.push(kvm_cpuid_entry2 {
                    function: leaf,
                    index: subleaf,
                    flags: if subleaves > 1 {
                        KVM_CPUID_FLAG_SIGNIFCANT_INDEX
                    } else {
                        0
                    },
                    eax,
                    ebx,
                    ecx,
                    edx,
                    ..Default::default()
                });
            }
        }
        CpuId::from_entries(&entries).map_err(|_| Error::Cpuid("it has too many leaves"))
    }

    /// What VMs find: all that there is, or `only` these features.
    pub fn profile(&self, only: Option<&Names>) -> Profile {
        Profile::new(self.xcr0_mask.into(), true, only, |leaf, subleaf| {
            self.host(leaf, subleaf)
        })
    }

    /// What a VM finds that is given this.
    pub fn given(&self, cpu: &Profile) -> Self {
        let mut this = self.clone();
        this.policy.xcr0_mask &= cpu.xcr0_mask;
        this.policy.osxsave = this.policy.xstates() != 0;
        this.policy.xcr0 = this.policy.xstates();
        this.policy.hidden = cpu.hidden;
        this.xcr0_mask = u32::try_from(this.policy.xstates()).unwrap_or(0);
        this.narrow(self.xcr0_mask);
        this
    }

    /// Has leaf 0xd tell of no more than the components that are left of `before`, and of the size
    /// of these (Intel SDM vol. 1, 13.2): legacy region and header, or the end of the last one.
    fn narrow(&mut self, before: u32) {
        if self.xcr0_mask == before {
            return;
        }
        let ends = (2..32)
            .filter(|index| self.xcr0_mask >> index & 1 != 0)
            .map(|index| self.host(0xd, index))
            .map(|[size, offset, ..]| offset.saturating_add(size));
        let size = ends.fold(576, u32::max);
        let first = |e: &&mut kvm_cpuid_entry2| e.function == 0xd && e.index == 0;
        if let Some(entry) = self.supported.iter_mut().find(first) {
            entry.eax &= self.xcr0_mask;
            entry.ebx = size;
            entry.ecx = size;
        }
    }

    /// Whether a VM has XSAVE.
    pub fn xsave(&self) -> bool {
        self.xcr0_mask != 0
    }
}

fn indexed(entry: &kvm_cpuid_entry2) -> bool {
    entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0
}

/// pvclock's multiplier and shift: ns = (ticks << shift) * mul >> 32, with the
/// multiplier in the upper half of its range.
fn scale(khz: u64) -> (u32, i8) {
    let scaled = |shift: i8| (1_000_000u128 << (32 - i32::from(shift))) / u128::from(khz.max(1));
    let shift = (-31..=31).find(|&shift| scaled(shift) <= u128::from(u32::MAX));
    let shift = shift.unwrap_or(0);
    (u32::try_from(scaled(shift)).unwrap_or(u32::MAX), shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: Option<u32>, [eax, ebx, ecx, edx]: Regs) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index: index.unwrap_or(0),
            flags: index.map_or(0, |_| KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    /// A CPU with everything, and components of XSAVE that guests do not get.
    fn host() -> Vec<kvm_cpuid_entry2> {
        let all = u32::MAX;
        vec![
            entry(0, None, [0x20, 1, 2, 3]),
            entry(1, None, [0x800f12, all, all, all]),
            entry(7, Some(0), [2, all, all, all]),
            entry(0xd, Some(0), [0x2e7, 2696, 2696, 0]),
            entry(0xd, Some(1), [0xf, 0, 0, 0]),
            entry(0xd, Some(2), [256, 576, 0, 0]),
            entry(0xd, Some(9), [8, 2688, 0, 0]),
            entry(KVM_FEATURES, None, [all, 0, 0, 0]),
            entry(0x8000_0000, None, [0x8000_0021, 1, 2, 3]),
            entry(0x8000_0001, None, [0x800f12, 0, all, all]),
            entry(0x8000_0008, None, [0x3030, all, all, all]),
        ]
    }

    fn find(table: &CpuId, leaf: u32, subleaf: u32) -> Regs {
        table
            .as_slice()
            .iter()
            .find(|e| e.function == leaf && (!indexed(e) || e.index == subleaf))
            .map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
    }

    #[test]
    fn programs_and_kernel_see_one_profile() {
        let cpuid = Cpuid::new(host(), 2_000_000).expect("a good CPU");
        assert!(cpuid.smep && cpuid.smap && cpuid.xsave());
        assert_eq!((cpuid.xcr0_mask, cpuid.physical_bits), (0xe7, 0x30));
        let table = cpuid.for_vcpu(3).expect("it fits");
        let policy = Policy {
            vcpu_id: 3,
            ..cpuid.policy
        };
        // The core answers from what KVM supports, by the same policy.
        let core = cpuid.for_core();
        let hardware = |leaf, subleaf| {
            core.iter()
                .find(|e| e.leaf == leaf && (e.subleaf == subleaf || e.subleaf == CPUID_ANY))
                .map_or([0; 4], |e| e.regs)
        };
        for (leaf, subleaf) in [
            (0, 0),
            (1, 0),
            (7, 0),
            (0xd, 0),
            (0xd, 2),
            (0xd, 9),
            (0x8000_0001, 0),
        ] {
            let mut kernel = policy.leaf(leaf, subleaf, hardware(leaf, subleaf));
            match leaf {
                1 => kernel[2] |= L1_ECX_CORE,
                7 => kernel[1] |= L7_EBX_SMEP | L7_EBX_SMAP,
                _ => {}
            }
            assert_eq!(
                find(&table, leaf, subleaf),
                kernel,
                "leaf {leaf:#x}.{subleaf}"
            );
        }
        let [_, b, c, d] = find(&table, BASE, 0);
        assert_eq!([b, c, d], blanket_abi::xen::cpuid::SIGNATURE);
        assert_eq!(find(&table, 1, 0)[1] >> 24, 3, "APIC id");
        assert_eq!(find(&table, 0xd, 9), [0; 4], "PKRU is not the guest's");
    }

    #[test]
    fn a_lesser_cpu_is_one_profile_too() {
        let cpuid = Cpuid::new(host(), 2_000_000).expect("a good CPU");
        let given = |gone: &[&str]| {
            let mut only = cpuid.profile(None).cpu.features;
            only.retain(|name| !gone.contains(&name.as_str()));
            cpuid.given(&cpuid.profile(Some(&only)))
        };
        assert_eq!(given(&[]).xcr0_mask, cpuid.xcr0_mask);
        let less = given(&["avx", "bmi1"]);
        assert!(less.xsave() && less.xcr0_mask == 3);
        let table = less.for_vcpu(0).expect("it fits");
        let [_, _, c, _] = find(&table, 1, 0);
        assert_eq!(c & (1 << 28 | 1 << 12), 0, "AVX, FMA");
        assert_eq!(c & L1_ECX_CORE, L1_ECX_CORE, "what the core needs");
        let [_, b, ..] = find(&table, 7, 0);
        assert_eq!(b & (1 << 3 | 1 << 5 | 1 << 16), 0, "BMI1, AVX2, AVX-512");
        assert_eq!(b & (1 << 8 | L7_EBX_SMEP), 1 << 8 | L7_EBX_SMEP);
        assert_eq!(find(&table, 0xd, 0), [3, 576, 576, 0]);
        assert_eq!(find(&table, 0xd, 2), [0; 4]);
        let entry = less.for_core();
        let entry = entry.iter().find(|e| (e.leaf, e.subleaf) == (0xd, 0));
        assert_eq!(entry.map(|e| e.regs), Some([3, 576, 576, 0]));

        let none = given(&["xsave"]);
        assert!(!none.xsave());
        let table = none.for_vcpu(0).expect("it fits");
        assert_eq!(find(&table, 1, 0)[2] & (3 << 26), 0, "XSAVE, OSXSAVE");
        assert_eq!(find(&table, 0xd, 0), [0; 4]);
    }

    #[test]
    fn what_the_core_needs_is_missed() {
        let without = |leaf| {
            let host = host().into_iter().filter(|e| e.function != leaf).collect();
            Cpuid::new(host, 1_000_000)
        };
        assert!(matches!(
            without(KVM_FEATURES),
            Err(Error::Lacks("kvmclock"))
        ));
        assert!(matches!(without(0x8000_0001), Err(Error::Cpuid(_))));
        let without_xsave = without(0xd).expect("works without XSAVE");
        assert!(!without_xsave.xsave());
    }

    #[test]
    fn pvclock_scale_is_right() {
        for khz in [1, 32_000, 1_000_000, 2_399_998, 4_294_967, 10_000_000] {
            let (mul, shift) = scale(khz);
            assert!(
                mul >= 1 << 31 || shift == 31 || shift == -31,
                "{khz}: {mul} {shift}"
            );
            let ticks = 1u128 << 40;
            let shifted = if shift >= 0 {
                ticks << shift
            } else {
                ticks >> -shift
            };
            let ns = (shifted * u128::from(mul)) >> 32;
            let exact = ticks * 1_000_000 / u128::from(khz);
            assert!(ns.abs_diff(exact) <= exact >> 28, "{khz}: {ns} {exact}");
        }
    }
}
