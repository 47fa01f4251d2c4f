//! The CPU that a host gives to its VMs: what a guest that has seen it must find wherever it
//! goes.

mod wanted;

use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::collections::{BTreeMap, BTreeSet};

use blanket_abi::cpuid::{Hidden, Policy, Regs, features, names, needs_hardware};
use serde::{Deserialize, Serialize};

pub(crate) use wanted::HIDES;
pub use wanted::{ParseError, Wanted, WantedError};

/// Names in a sentence; the others are counted.
const NAMED: usize = 6;

/// Features by Linux' names for them.
pub type Names = BTreeSet<String>;

/// A CPU, as far as guests go by it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// Who made it, as leaf 0 has it: `GenuineIntel`, `AuthenticAMD`.
    pub vendor: String,
    /// What it has of what guests may have, by Linux' names.
    pub features: Names,
}

/// What a host gives a VM of its CPU: all that guests may have, or less.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Profile {
    /// What its guest finds.
    pub cpu: Cpu,
    /// The components of XCR0 that it may have; 0 without XSAVE.
    pub xcr0_mask: u64,
    /// What is hidden from it beside what needs other components.
    pub hidden: Hidden,
    /// What was to be hidden, and its programs find all the same.
    pub bare: Names,
}

/// Where a component of XSAVE is not enabled, these and what is built on them are not there for
/// anybody (Intel SDM vol. 1, 13.3 and 14.3): the component, and the feature that stands for it.
const COMPONENTS: &[(u64, &str)] = &[(3, "xsave"), (4, "avx"), (0xe0, "avx512f")];

impl Profile {
    /// What there is on hardware that gives these answers, where this is what XCR0 may have: all
    /// of it, or `only` these features. Unless the host `binds` programs to it, these find what
    /// is hidden only by CPUID.
    pub(crate) fn new(
        xcr0_mask: u64,
        binds: bool,
        only: Option<&Names>,
        mut hardware: impl FnMut(u32, u32) -> Regs,
    ) -> Self {
        let states = COMPONENTS
            .iter()
            .take_while(|(_, name)| only.is_none_or(|only| only.contains(*name)))
            .fold(0, |sum, (states, _)| sum | states);
        let mut policy = Policy {
            xcr0_mask: xcr0_mask & states,
            ..Policy::default()
        };
        policy.xcr0_mask = policy.xstates();
        let all: Names = features(&policy, &mut hardware)
            .map(str::to_owned)
            .collect();
        let mut bare = Names::new();
        if let Some(only) = only {
            for name in names().filter(|name| !only.contains(*name)) {
                policy.hidden.insert(name);
            }
            if !binds {
                bare = all.difference(only).cloned().collect();
            }
        }
        Self {
            cpu: Cpu::new(&policy, hardware),
            xcr0_mask: policy.xcr0_mask,
            hidden: policy.hidden,
            bare,
        }
    }

    /// What there is for guests that run right on the CPU of this program, under the module.
    pub(crate) fn of_this(xcr0_mask: u64, binds: bool, only: Option<&Names>) -> Self {
        Self::new(xcr0_mask, binds, only, |leaf, subleaf| {
            let most = __cpuid(leaf & 0x8000_0000).eax;
            // Beyond its last leaf a CPU answers with that one's (Intel SDM vol. 2A, CPUID).
            if !needs_hardware(leaf) || leaf > most {
                return [0; 4];
            }
            let found = __cpuid_count(leaf, subleaf);
            [found.eax, found.ebx, found.ecx, found.edx]
        })
    }
}

/// What any host can take away, with what goes with it.
#[must_use]
pub fn components(profile: impl Fn(Option<&Names>) -> Profile) -> BTreeMap<String, Names> {
    let all = profile(None).cpu.features;
    let names = COMPONENTS.iter().map(|(_, name)| *name);
    let there = names.filter(|name| all.contains(*name));
    there
        .map(|name| {
            let mut less = all.clone();
            less.remove(name);
            let left = profile(Some(&less)).cpu.features;
            (name.to_owned(), all.difference(&left).cloned().collect())
        })
        .collect()
}

/// Names in a sentence.
pub(crate) fn listed<'a>(names: impl IntoIterator<Item = &'a String>) -> String {
    let names: Vec<&str> = names.into_iter().map(String::as_str).collect();
    let (named, more) = names.split_at(names.len().min(NAMED));
    match more.len() {
        0 => named.join(", "),
        more => format!("{} and {more} more", named.join(", ")),
    }
}

impl Cpu {
    /// What guests with this policy find on hardware that gives these answers.
    fn new(policy: &Policy, mut hardware: impl FnMut(u32, u32) -> Regs) -> Self {
        let [_, b, c, d] = hardware(0, 0);
        let vendor = [b, d, c].map(u32::to_le_bytes);
        Self {
            vendor: String::from_utf8_lossy(vendor.as_flattened()).into_owned(),
            features: features(policy, hardware).map(str::to_owned).collect(),
        }
    }

    /// Why a guest that runs on `other` cannot go on here.
    pub(crate) fn lacks(&self, other: &Self) -> Option<String> {
        if self.vendor != other.vendor {
            return Some(format!(
                "its guest runs on a CPU of {}, and the one here is of {}",
                other.vendor, self.vendor
            ));
        }
        let mut missing = other.features.difference(&self.features).peekable();
        missing.peek()?;
        Some(format!(
            "its guest has found {} in its CPU, which the one here has not",
            listed(missing)
        ))
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
        let here = Profile::of_this(3, false, None);
        let here = here.cpu;
        assert!(here.features.contains("lm") && here.features.contains("sse2"));
        assert!(!here.features.contains("avx"), "XCR0 has none");
        assert!(!here.vendor.is_empty());
    }

    /// A CPU with all that guests may have.
    fn rich(binds: bool, only: Option<&Names>) -> Profile {
        Profile::new(0xe7, binds, only, |_, _| [u32::MAX; 4])
    }

    fn without(names: &[&str]) -> Names {
        let mut all = rich(true, None).cpu.features;
        all.retain(|name| !names.contains(&name.as_str()));
        all
    }

    #[test]
    fn a_guest_has_no_more_than_it_is_given() {
        let all = rich(false, None);
        assert_eq!((all.xcr0_mask, all.hidden), (0xe7, Hidden::default()));
        assert!(all.bare.is_empty());
        for name in &all.cpu.features {
            let only = without(&[name]);
            let less = rich(true, Some(&only));
            assert!(!less.cpu.features.contains(name), "{name}");
            assert!(less.cpu.features.is_subset(&only), "{name}");
            assert!(less.bare.is_empty(), "a host that binds hides everything");
            // Programs see what the hardware has, and less XSAVE.
            let seen = rich(false, Some(&only)).bare;
            let components = ["xsave", "avx", "avx512f"].contains(&name.as_str());
            assert_eq!(seen.contains(name), !components, "{name}");
        }
    }

    #[test]
    fn components_that_are_not_given_hide_what_is_built_on_them() {
        let of = |names: &[&str]| rich(false, Some(&without(names)));
        let avx = of(&["avx"]);
        assert_eq!((avx.xcr0_mask, avx.bare.len()), (3, 0));
        for gone in ["avx", "avx2", "fma", "f16c", "avx512f", "vaes", "xop"] {
            assert!(!avx.cpu.features.contains(gone), "{gone}");
        }
        assert!(avx.cpu.features.contains("xsave") && avx.cpu.features.contains("bmi1"));
        assert_eq!(of(&["avx512f"]).xcr0_mask, 7);
        let none = of(&["xsave"]);
        assert_eq!(none.xcr0_mask, 0);
        for gone in ["xsave", "xsavec", "avx"] {
            assert!(!none.cpu.features.contains(gone), "{gone}");
        }
        assert!(none.bare.is_empty());
        assert_eq!(of(&["avx2"]).bare, Names::from(["avx2".to_owned()]));
    }

    #[test]
    fn what_goes_with_a_component() {
        let of = components(|only| rich(false, only));
        assert_eq!(of.len(), 3);
        assert!(of["xsave"].is_superset(&of["avx"]) && of["avx"].is_superset(&of["avx512f"]));
        assert!(of["avx"].contains("fma") && !of["avx"].contains("xsavec"));
        assert!(of["avx512f"].contains("avx512bw") && !of["avx512f"].contains("avx2"));
        let old = components(|only| Profile::new(3, false, only, |_, _| [u32::MAX; 4]));
        assert_eq!(old.keys().collect::<Vec<_>>(), ["xsave"]);
    }

    #[test]
    fn a_lesser_cpu_is_the_same_on_a_richer_host() {
        let only = without(&["avx", "bmi2", "sha_ni"]);
        let given = rich(true, Some(&only));
        // As it is saved, and taken by a host that has less, and then by one that has more.
        let poor = Profile::new(7, true, Some(&given.cpu.features), |leaf, subleaf| {
            match (leaf, subleaf) {
                (7, 0) => [0, !(1 << 8 | 1 << 29), u32::MAX, u32::MAX],
                _ => [u32::MAX; 4],
            }
        });
        assert_eq!(poor.cpu, given.cpu);
        assert_eq!(poor.xcr0_mask, given.xcr0_mask);
        let back = rich(true, Some(&poor.cpu.features));
        assert_eq!(back.cpu, given.cpu);
        let bare = rich(false, Some(&given.cpu.features)).bare;
        assert!(bare.contains("bmi2") && bare.contains("sha_ni") && bare.len() == 2);
    }
}
