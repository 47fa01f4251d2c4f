//! Whether the CPU lets CPL 3 read what only CPL 0 may (Meltdown, CVE-2017-5754, "rogue
//! data cache load").

use core::arch::x86_64::__cpuid;

use kvm_bindings::{Msrs, kvm_msr_entry};

use super::{Error, refused};

/// `IA32_ARCH_CAPABILITIES` (Intel SDM vol. 4). KVM tells its own value: it sets `RDCL_NO`
/// also where its kernel knows the CPU as not affected (`kvm_get_arch_capabilities`,
/// `arch/x86/kvm/x86.c`).
const ARCH_CAPABILITIES: u32 = 0x10a;
/// Not affected.
const RDCL_NO: u64 = 1;

/// Whether guests of this machine's KVM must be kept from their core.
pub fn affects(kvm: &kvm_ioctls::Kvm) -> Result<bool, Error> {
    let leaf = __cpuid(0);
    let vendor = [leaf.ebx, leaf.edx, leaf.ecx];
    let mut msrs = Msrs::from_entries(&[kvm_msr_entry {
        index: ARCH_CAPABILITIES,
        ..Default::default()
    }])
    .map_err(Error::memory)?;
    // A feature MSR that this KVM does not know is not read, which is no error.
    let read = kvm
        .get_msrs(&mut msrs)
        .map_err(refused("tell its feature MSRs"))?;
    let capabilities = msrs.as_slice().first().filter(|_| read == 1);
    Ok(affected(vendor, capabilities.map(|msr| msr.data)))
}

/// As Linux judges (`cpu_vuln_whitelist`, `arch/x86/kernel/cpu/common.c`), without its
/// list of old Intel CPUs that execute in order: those have no virtualization.
fn affected(vendor: [u32; 3], capabilities: Option<u64>) -> bool {
    let mut name = [0; 12];
    for (to, word) in name.chunks_exact_mut(4).zip(vendor) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    match &name {
        b"AuthenticAMD" | b"HygonGenuine" => false,
        _ => capabilities.is_none_or(|bits| bits & RDCL_NO == 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vendor(name: [u8; 12]) -> [u32; 3] {
        [0, 4, 8].map(|at| u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]]))
    }

    #[test]
    fn amd_is_not_and_intel_only_by_its_own_word() {
        for name in [*b"AuthenticAMD", *b"HygonGenuine"] {
            assert!(!affected(vendor(name), None) && !affected(vendor(name), Some(0)));
        }
        for name in [*b"GenuineIntel", *b"SomebodyElse"] {
            assert!(affected(vendor(name), None) && affected(vendor(name), Some(!RDCL_NO)));
            assert!(!affected(vendor(name), Some(RDCL_NO)));
        }
    }
}
