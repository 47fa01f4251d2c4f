//! The CPU that a host gives to its VMs: what a guest that has seen it must find wherever it
//! goes.

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::collections::BTreeSet;

use blanket_abi::cpuid::{Policy, Regs, features, needs_hardware};
use serde::{Deserialize, Serialize};

/// Names in a sentence; the others are counted.
const NAMED: usize = 6;

/// A CPU, as far as guests go by it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// Who made it, as leaf 0 has it: `GenuineIntel`, `AuthenticAMD`.
    pub vendor: String,
    /// What it has of what guests may have, by Linux' names.
    pub features: BTreeSet<String>,
}

impl Cpu {
    /// What guests with this policy find on hardware that gives these answers.
    pub(crate) fn new(policy: &Policy, mut hardware: impl FnMut(u32, u32) -> Regs) -> Self {
        let [_, b, c, d] = hardware(0, 0);
        let vendor = [b, d, c].map(u32::to_le_bytes);
        Self {
            vendor: String::from_utf8_lossy(vendor.as_flattened()).into_owned(),
            features: features(policy, hardware).map(str::to_owned).collect(),
        }
    }

    /// What guests find that run right on the CPU of this program, with these components of
    /// XCR0.
    pub(crate) fn of_this(xcr0_mask: u64) -> Self {
        let policy = Policy {
            xcr0_mask,
            ..Policy::default()
        };
        Self::new(&policy, |leaf, subleaf| {
            let most = __cpuid(leaf & 0x8000_0000).eax;
            // Beyond its last leaf a CPU answers with that one's (Intel SDM vol. 2A, CPUID).
            if !needs_hardware(leaf) || leaf > most {
                return [0; 4];
            }
            let found = __cpuid_count(leaf, subleaf);
            [found.eax, found.ebx, found.ecx, found.edx]
        })
    }

    /// Why a guest that runs on `other` cannot go on here.
    pub(crate) fn lacks(&self, other: &Self) -> Option<String> {
        if self.vendor != other.vendor {
            return Some(format!(
                "its guest runs on a CPU of {}, and the one here is of {}",
                other.vendor, self.vendor
            ));
        }
        let missing: Vec<&str> = other
            .features
            .difference(&self.features)
            .map(String::as_str)
            .collect();
        let (named, more) = missing.split_at(missing.len().min(NAMED));
        let more = match more.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        (!named.is_empty()).then(|| {
            format!(
                "its guest has found {}{more} in its CPU, which the one here has not",
                named.join(", ")
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpu(vendor: &str, features: &[&str]) -> Cpu {
        Cpu {
            vendor: vendor.into(),
            features: features.iter().map(|&name| name.to_owned()).collect(),
        }
    }

    #[test]
    fn a_guest_goes_where_all_is_that_it_has_found() {
        let (small, large) = (cpu("A", &["sse"]), cpu("A", &["sse", "avx"]));
        assert_eq!(large.lacks(&small), None);
        assert_eq!(large.lacks(&large), None);
        let why = small.lacks(&large).expect("avx is missing");
        assert!(why.contains("avx") && !why.contains("sse"), "{why}");
        let why = cpu("B", &["sse", "avx"]).lacks(&large);
        assert!(why.is_some_and(|why| why.contains("of A")));
        let many = cpu("A", &["a", "b", "c", "d", "e", "f", "g", "h"]);
        let why = cpu("A", &[]).lacks(&many).expect("all are missing");
        assert!(why.contains("f and 2 more"), "{why}");
    }

    #[test]
    fn this_cpu_is_a_64_bit_one() {
        let here = Cpu::of_this(3);
        assert!(here.features.contains("lm") && here.features.contains("sse2"));
        assert!(!here.features.contains("avx"), "XCR0 has none");
        assert!(!here.vendor.is_empty());
    }
}
