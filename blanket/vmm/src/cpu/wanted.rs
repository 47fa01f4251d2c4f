//! The CPU that a user wants a VM to have: its host's, or less.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use blanket_abi::cpuid::names;

use super::{Cpu, Names, Profile, listed};

/// What each level of x86-64 adds to the one before, by Linux' names (System V psABI for AMD64,
/// 3.1.1, table 3.1; LZCNT is `abm`, OSXSAVE is `xsave`).
const LEVELS: &[(&str, &[&str])] = &[
    (
        "x86-64-v2",
        &[
            "cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3",
        ],
    ),
    (
        "x86-64-v3",
        &[
            "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave",
        ],
    ),
    (
        "x86-64-v4",
        &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"],
    ),
];

/// What every 64-bit kernel, or the hypervisor, goes by; all CPUs have it.
const KEPT: &[&str] = &[
    "fpu", "de", "tsc", "msr", "pae", "cx8", "apic", "cmov", "pat", "clflush", "mmx", "fxsr",
    "sse", "sse2", "ss", "syscall", "nx", "lm",
];

/// What else goes with a feature, beside what XSAVE's components decide
/// (`arch/x86/kernel/cpu/cpuid-deps.c`).
const BUILT_ON: &[(&str, &[&str])] = &[
    ("avx2", &["avx512f"]),
    (
        "avx512vl",
        &[
            "avx512_vbmi2",
            "avx512_vnni",
            "avx512_bitalg",
            "avx512_bf16",
        ],
    ),
    ("avx512bw", &["avx512_fp16"]),
    ("3dnow", &["3dnowext"]),
];

/// The CPU that a VM is to have: `host`, or a level of x86-64, and features that are taken away,
/// such as `host,-avx,-aes`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Index in [`LEVELS`].
    level: Option<usize>,
    without: BTreeSet<&'static str>,
}

/// Why a text names no CPU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// It begins with something else.
    #[error(
        "{0:?} is no CPU: say host, x86-64-v2, x86-64-v3 or x86-64-v4, with ,-FEATURE for each that is taken away"
    )]
    Base(String),
    /// Behind it comes something else.
    #[error("{0:?}: a feature that is taken away is said as -avx")]
    Item(String),
    /// There is no such feature.
    #[error("{0:?} is no feature that guests have; they have {all}", all = names().collect::<Vec<_>>().join(" "))]
    Unknown(String),
    /// It is not to be done without.
    #[error("{0} cannot be taken away: every 64-bit kernel needs it")]
    Kept(&'static str),
}

/// Why a VM is not given a CPU.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WantedError {
    /// The host has less than the level.
    #[error(
        "{level} has {}, which the CPU of this host has not: take a lower level, or host",
        listed(missing)
    )]
    Lacks {
        /// The level.
        level: &'static str,
        /// What is missing.
        missing: Names,
    },
    /// The host cannot hide it.
    #[error("{} cannot be taken away here: {HIDES}; {mend}", listed(bare))]
    Bare {
        /// What programs would find.
        bare: Names,
        /// What to do.
        mend: String,
    },
}

/// Why a host without a mask of CPUID cannot hide something.
pub(crate) const HIDES: &str = "under the module, on a CPU whose CPUID cannot be made to fault, \
    programs find in it whatever needs no component of XSAVE";

impl FromStr for Wanted {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let mut items = text.split(',');
        let base = items.next().unwrap_or_default();
        let level = LEVELS.iter().position(|(name, _)| *name == base);
        if level.is_none() && base != "host" {
            return Err(ParseError::Base(base.to_owned()));
        }
        let mut without = BTreeSet::new();
        for item in items {
            let name = item.strip_prefix('-');
            let name = name.ok_or_else(|| ParseError::Item(item.to_owned()))?;
            let known = names().find(|known| *known == name);
            let known = known.ok_or_else(|| ParseError::Unknown(name.to_owned()))?;
            if KEPT.contains(&known) {
                return Err(ParseError::Kept(known));
            }
            without.insert(known);
        }
        Ok(Self { level, without })
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let level = self.level.and_then(|level| LEVELS.get(level));
        f.write_str(level.map_or("host", |(name, _)| name))?;
        self.without
            .iter()
            .try_for_each(|name| write!(f, ",-{name}"))
    }
}

impl Wanted {
    /// What is left of a host's CPU, by name; `None` if it is all that it has, also of hosts that
    /// it goes to.
    ///
    /// # Errors
    /// The level has something that the host has not.
    pub(crate) fn of(&self, host: &Cpu) -> Result<Option<Names>, WantedError> {
        let mut left = match self.level {
            None if self.without.is_empty() => return Ok(None),
            None => host.features.clone(),
            Some(level) => {
                let levels = LEVELS.iter().take(level + 1);
                let added = levels.flat_map(|(_, added)| *added);
                let of_it: Names = added.map(|name| (*name).to_owned()).collect();
                let missing: Names = of_it.difference(&host.features).cloned().collect();
                if !missing.is_empty() {
                    let level = LEVELS.get(level).map_or("host", |(name, _)| name);
                    return Err(WantedError::Lacks { level, missing });
                }
                let kept = KEPT.iter().filter(|name| host.features.contains(**name));
                kept.map(|name| (*name).to_owned()).chain(of_it).collect()
            }
        };
        let mut gone: Vec<&str> = self.without.iter().copied().collect();
        while let Some(name) = gone.pop() {
            left.remove(name);
            let built = BUILT_ON.iter().filter(|(on, _)| *on == name);
            gone.extend(built.flat_map(|(_, built)| *built));
        }
        Ok(Some(left))
    }

    /// What a host gives a VM that is to have this: the features, and nothing else whatever a host has
    /// that it goes to later. `None` for all that there is. `profile` is what the host can give.
    ///
    /// # Errors
    /// The host has less than that, or cannot hide the rest.
    pub(crate) fn from(
        &self,
        profile: impl Fn(Option<&Names>) -> Profile,
    ) -> Result<Option<Names>, WantedError> {
        let Some(only) = self.of(&profile(None).cpu)? else {
            return Ok(None);
        };
        let given = profile(Some(&only));
        if given.bare.is_empty() {
            return Ok(Some(given.cpu.features));
        }
        // The least that would hide them all.
        let hides = |name: &&&str| {
            let mut less = only.clone();
            less.remove(**name);
            profile(Some(&less)).bare.is_empty()
        };
        let mend = match ["avx512f", "avx", "xsave"].iter().find(hides) {
            Some(name) => {
                format!("take {name} away too, on which it is built, or let the VM run inside KVM")
            }
            None if self.level.is_some() => {
                "say host and what else is to go, or let the VM run inside KVM".to_owned()
            }
            None => "leave them in, or let the VM run inside KVM".to_owned(),
        };
        Err(WantedError::Bare {
            bare: given.bare,
            mend,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(text: &str) -> Wanted {
        text.parse().expect("a CPU")
    }

    fn rich(binds: bool) -> impl Fn(Option<&Names>) -> Profile {
        move |only| Profile::new(0xe7, binds, only, |_, _| [u32::MAX; 4])
    }

    #[test]
    fn said_and_read() {
        for text in ["host", "host,-avx", "x86-64-v3", "x86-64-v2,-pni,-popcnt"] {
            assert_eq!(wanted(text).to_string(), text);
        }
        let no = |text: &str| text.parse::<Wanted>().expect_err(text).to_string();
        assert!(no("").contains("is no CPU"));
        assert!(no("EPYC").contains("say host"));
        assert!(no("x86-64").contains("x86-64-v2"));
        assert!(no("host,avx").contains("-avx"));
        assert!(no("host,").contains("-avx"));
        assert!(no("host,-mpx").contains("avx512f"), "all that there are");
        assert!(no("host,-sse2").contains("cannot be taken away"));
    }

    #[test]
    fn names_that_are_there() {
        let all: BTreeSet<&str> = names().collect();
        let levels = LEVELS.iter().flat_map(|(_, added)| *added);
        let built = BUILT_ON
            .iter()
            .flat_map(|(on, built)| built.iter().chain([on]));
        for name in levels.chain(KEPT).chain(built) {
            assert!(all.contains(name), "{name}");
        }
    }

    #[test]
    fn the_host_s_own_is_no_mask() {
        assert_eq!(wanted("host").from(rich(false)), Ok(None));
    }

    #[test]
    fn what_is_taken_away_is_gone_with_what_is_built_on_it() {
        let given = |text| wanted(text).from(rich(true)).expect("it binds");
        let of = |text| given(text).expect("a mask");
        let all = rich(true)(None).cpu.features;
        assert!(!of("host,-avx2").contains("avx512bw"));
        assert!(of("host,-avx2").contains("avx"));
        assert!(!of("host,-xsave").contains("fma"));
        assert_eq!(of("host,-aes").len(), all.len() - 1);
        let v2 = of("x86-64-v2");
        assert_eq!(v2.len(), KEPT.len() + 7);
        assert!(of("x86-64-v3").is_superset(&v2) && !of("x86-64-v3").contains("aes"));
        assert!(of("x86-64-v4").is_superset(&of("x86-64-v3")));
        assert!(!of("x86-64-v3,-fma").contains("fma"));
    }

    #[test]
    fn a_level_that_the_host_has_not() {
        let old = |only: Option<&Names>| {
            Profile::new(7, true, only, |leaf, _| match leaf {
                7 => [0; 4],
                _ => [u32::MAX; 4],
            })
        };
        let why = wanted("x86-64-v3").from(old).expect_err("no AVX2");
        let text = why.to_string();
        assert!(
            text.contains("x86-64-v3 has avx2, bmi1, bmi2, which"),
            "{text}"
        );
        assert!(wanted("x86-64-v2").from(old).is_ok());
        // It need not be there to be taken away for good.
        let none = wanted("host,-bmi2").from(old).expect("a mask");
        assert!(none.is_some_and(|only| !only.contains("bmi2")));
    }

    #[test]
    fn where_programs_see_the_hardware_s_it_is_refused_in_words() {
        let no = |text: &str| wanted(text).from(rich(false)).expect_err(text).to_string();
        assert!(wanted("host,-avx").from(rich(false)).is_ok());
        assert!(wanted("host,-xsave").from(rich(false)).is_ok());
        let text = no("host,-avx2");
        assert!(text.starts_with("avx2 cannot be taken away here"), "{text}");
        assert!(text.contains("take avx away too"), "{text}");
        let text = no("host,-bmi1,-aes");
        assert!(text.starts_with("aes, bmi1 cannot"), "{text}");
        assert!(
            text.contains("leave them in, or let the VM run inside KVM"),
            "{text}"
        );
        assert!(no("x86-64-v2").contains(" more cannot be taken away here"));
    }
}
