//! The features that a guest may have, by Linux' names for them
//! (`arch/x86/include/asm/cpufeatures.h`; those that Linux has no name for, by the manuals').
//! What a guest has found once it goes by for as long as it runs.

use super::{Policy, Regs};

/// A register of CPUID's, and what its bits are called.
struct Word {
    /// Leaf.
    leaf: u32,
    /// Subleaf.
    subleaf: u32,
    /// Place in [`Regs`].
    register: usize,
    /// Bits and their names.
    bits: &'static [(u32, &'static str)],
}

const fn word(
    leaf: u32,
    subleaf: u32,
    register: usize,
    bits: &'static [(u32, &'static str)],
) -> Word {
    Word {
        leaf,
        subleaf,
        register,
        bits,
    }
}

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// What [`Policy::leaf`] may let through from hardware and a guest or its programs go by. Not
/// OSXSAVE, which is the guest's own; and not what is only said of a CPU, such as that it has
/// not some hole: no instruction depends on it, and KVM adds what Linux knows by the model.
const WORDS: &[Word] = &[
    word(
        1,
        0,
        ECX,
        &[
            (0, "pni"),
            (1, "pclmulqdq"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (22, "movbe"),
            (23, "popcnt"),
            (25, "aes"),
            (26, "xsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
    ),
    word(
        1,
        0,
        EDX,
        &[
            (0, "fpu"),
            (2, "de"),
            (4, "tsc"),
            (5, "msr"),
            (6, "pae"),
            (8, "cx8"),
            (9, "apic"),
            (15, "cmov"),
            (16, "pat"),
            (19, "clflush"),
            (23, "mmx"),
            (24, "fxsr"),
            (25, "sse"),
            (26, "sse2"),
            (27, "ss"),
        ],
    ),
    word(
        7,
        0,
        EBX,
        &[
            (3, "bmi1"),
            (5, "avx2"),
            (8, "bmi2"),
            (9, "erms"),
            (11, "rtm"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (21, "avx512ifma"),
            (23, "clflushopt"),
            (24, "clwb"),
            (28, "avx512cd"),
            (29, "sha_ni"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    ),
    word(
        7,
        0,
        ECX,
        &[
            (0, "prefetchwt1"),
            (1, "avx512vbmi"),
            (6, "avx512_vbmi2"),
            (8, "gfni"),
            (9, "vaes"),
            (10, "vpclmulqdq"),
            (11, "avx512_vnni"),
            (12, "avx512_bitalg"),
            (14, "avx512_vpopcntdq"),
            (22, "rdpid"),
            (25, "cldemote"),
        ],
    ),
    word(
        7,
        0,
        EDX,
        &[(4, "fsrm"), (14, "serialize"), (23, "avx512_fp16")],
    ),
    word(
        7,
        1,
        EAX,
        &[
            (0, "sha512"),
            (1, "sm3"),
            (2, "sm4"),
            (4, "avx_vnni"),
            (5, "avx512_bf16"),
            (10, "fzrm"),
            (11, "fsrs"),
            (12, "fsrc"),
            (23, "avx_ifma"),
        ],
    ),
    word(
        7,
        1,
        EDX,
        &[
            (4, "avx_vnni_int8"),
            (5, "avx_ne_convert"),
            (10, "avx_vnni_int16"),
            (14, "prefetchi"),
        ],
    ),
    word(
        0xd,
        1,
        EAX,
        &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1")],
    ),
    word(
        0x8000_0001,
        0,
        ECX,
        &[
            (0, "lahf_lm"),
            (5, "abm"),
            (6, "sse4a"),
            (7, "misalignsse"),
            (8, "3dnowprefetch"),
            (11, "xop"),
            (16, "fma4"),
            (21, "tbm"),
        ],
    ),
    word(
        0x8000_0001,
        0,
        EDX,
        &[
            (11, "syscall"),
            (20, "nx"),
            (22, "mmxext"),
            (25, "fxsr_opt"),
            (27, "rdtscp"),
            (29, "lm"),
            (30, "3dnowext"),
            (31, "3dnow"),
        ],
    ),
    word(0x8000_0008, 0, EBX, &[(0, "clzero"), (2, "xsaveerptr")]),
];

/// Words of a [`Hidden`]: more than there are registers with features.
pub const HIDDEN_WORDS: usize = 16;

const _: () = assert!(WORDS.len() <= HIDDEN_WORDS);

/// Features that a VM does not have although its host has them: masks of bits to take away, for
/// registers of CPUID's in an order that programs of one release agree on.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hidden(pub [u32; HIDDEN_WORDS]);

impl Hidden {
    /// Takes the feature of this name away; false if none has it.
    pub fn insert(&mut self, name: &str) -> bool {
        let mut known = false;
        for (word, mask) in WORDS.iter().zip(&mut self.0) {
            for (bit, of_it) in word.bits {
                if *of_it == name {
                    *mask |= 1 << bit;
                    known = true;
                }
            }
        }
        known
    }

    /// What is left of an answer of CPUID's.
    pub(super) fn left_of(&self, leaf: u32, subleaf: u32, mut regs: Regs) -> Regs {
        // Other leaves do not look at the subleaf (Intel SDM vol. 2A, CPUID).
        let indexed = matches!(leaf, 7 | 0xd);
        for (word, mask) in WORDS.iter().zip(&self.0) {
            if word.leaf == leaf
                && (word.subleaf == subleaf || !indexed)
                && let Some(register) = regs.get_mut(word.register)
            {
                *register &= !mask;
            }
        }
        regs
    }
}

/// The names of all features that guests may have.
pub fn names() -> impl Iterator<Item = &'static str> {
    WORDS
        .iter()
        .flat_map(|word| word.bits.iter().map(|(_, name)| *name))
}

/// What guests with this policy find on hardware that gives these answers.
pub fn features(
    policy: &Policy,
    mut hardware: impl FnMut(u32, u32) -> Regs,
) -> impl Iterator<Item = &'static str> {
    WORDS.iter().flat_map(move |word| {
        let raw = hardware(word.leaf, word.subleaf);
        let found = policy.leaf(word.leaf, word.subleaf, raw)[word.register];
        word.bits
            .iter()
            .filter(move |(bit, _)| found >> bit & 1 != 0)
            .map(|(_, name)| *name)
    })
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::collections::BTreeSet;
    use std::vec::Vec;

    use super::super::{allow, needs_hardware};
    use super::*;

    /// What is only said of the CPU: see [`WORDS`].
    const SAID: &[(u32, u32, usize, u32)] = &[
        (7, 0, EDX, 1 << 10),
        (7, 2, EDX, allow::L7_2_EDX),
        (0x8000_0008, 0, EBX, 1 << 26 | 1 << 29),
        (0x8000_0021, 0, EAX, allow::E21_EAX),
        (0x8000_0021, 0, ECX, allow::E21_ECX),
    ];

    /// All registers in which policy lets bits through as they are.
    #[test]
    fn every_feature_that_guests_may_have_has_a_name() {
        let all = Policy {
            xcr0_mask: u64::MAX,
            tsc_aux: true,
            ..Policy::default()
        };
        let named = |leaf, subleaf, register| {
            let of = |word: &&Word| {
                (word.leaf, word.subleaf, word.register) == (leaf, subleaf, register)
            };
            let word = WORDS.iter().find(of);
            word.map_or(0, |word| {
                word.bits.iter().fold(0, |sum, (bit, _)| sum | 1 << bit)
            })
        };
        let places = [
            (1, 0, ECX),
            (1, 0, EDX),
            (0xd, 1, EAX),
            (0x8000_0008, 0, EBX),
        ];
        let whole = [(7, 0), (7, 1), (7, 2), (0x8000_0001, 0), (0x8000_0021, 0)]
            .into_iter()
            .flat_map(|(leaf, subleaf)| (0..4).map(move |register| (leaf, subleaf, register)));
        for (leaf, subleaf, register) in places.into_iter().chain(whole) {
            assert!(needs_hardware(leaf));
            // The highest subleaf, and the CPU's model.
            if matches!(
                (leaf, subleaf, register),
                (7, 0, EAX) | (0x8000_0001, 0, EAX)
            ) {
                continue;
            }
            let osxsave = (1, 0, ECX, allow::L1_ECX_OSXSAVE);
            let unnamed = SAID.iter().chain([&osxsave]);
            let unnamed = unnamed
                .filter(|said| (said.0, said.1, said.2) == (leaf, subleaf, register))
                .fold(0, |sum, said| sum | said.3);
            let with = all.leaf(leaf, subleaf, [u32::MAX; 4])[register];
            let without = all.leaf(leaf, subleaf, [0; 4])[register];
            assert_eq!(
                named(leaf, subleaf, register),
                with & !without & !unnamed,
                "{leaf:#x}.{subleaf} register {register}"
            );
        }
    }

    #[test]
    fn names_are_each_of_one_feature() {
        let names: Vec<&str> = names().collect();
        let set: BTreeSet<&str> = names.iter().copied().collect();
        assert_eq!(set.len(), names.len());
    }

    #[test]
    fn what_policy_hides_is_not_found() {
        let found = |xcr0_mask| -> BTreeSet<&str> {
            let policy = Policy {
                xcr0_mask,
                ..Policy::default()
            };
            features(&policy, |_, _| [u32::MAX; 4]).collect()
        };
        assert!(found(7).contains("avx2") && !found(7).contains("avx512f"));
        assert!(!found(0).contains("xsave") && found(0).contains("sse4_2"));
        assert!(!found(0xe7).contains("rdtscp"));
        let none: BTreeSet<&str> = features(&Policy::default(), |_, _| [0; 4]).collect();
        assert!(none.is_empty());
    }

    #[test]
    fn what_is_hidden_is_gone_and_nothing_else_is() {
        let all = Policy {
            xcr0_mask: u64::MAX,
            osxsave: true,
            tsc_aux: true,
            ..Policy::default()
        };
        let leaves = (0..=super::super::MAX_BASIC).chain(0x8000_0000..=0x8000_0021);
        for name in names() {
            let mut hidden = Hidden::default();
            assert!(hidden.insert(name));
            let less = Policy { hidden, ..all };
            let found: BTreeSet<&str> = features(&less, |_, _| [u32::MAX; 4]).collect();
            assert!(!found.contains(name), "{name}");
            assert_eq!(found.len(), names().count() - 1, "{name}");
            let mut lost = 0;
            // Where the subleaf means nothing, the answer is the same with any.
            for (leaf, subleaf) in leaves
                .clone()
                .flat_map(|leaf| [0, 1, 2, 0x1234_5678].map(|subleaf| (leaf, subleaf)))
            {
                let [with, without] =
                    [all, less].map(|policy| policy.leaf(leaf, subleaf, [u32::MAX; 4]));
                let changed = with.iter().zip(without).map(|(a, b)| a ^ b);
                lost += changed.map(u32::count_ones).sum::<u32>();
            }
            let indexed = WORDS.iter().any(|word| {
                matches!(word.leaf, 7 | 0xd) && word.bits.iter().any(|(_, it)| *it == name)
            });
            assert_eq!(lost, if indexed { 1 } else { 4 }, "{name}");
        }
        assert!(!Hidden::default().insert("osxsave"));
    }
}
