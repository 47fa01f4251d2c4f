//! The CPUID policy on recorded CPUs and on arbitrary ones.

use blanket_abi::xen::cpuid::BASE;
use blanket_core::cpuid::{Hidden, Policy, Regs, allow, features, needs_hardware};
use proptest::prelude::*;
use std::collections::HashMap;

type Dump = HashMap<(u32, u32), Regs>;

/// CPUs of QEMU 7.2 (TCG), recorded by `cpuid_dumps/dump.S`.
const DUMPS: [(&str, &str); 5] = [
    ("EPYC", include_str!("cpuid_dumps/EPYC.txt")),
    (
        "Skylake-Server",
        include_str!("cpuid_dumps/Skylake-Server.txt"),
    ),
    ("Nehalem", include_str!("cpuid_dumps/Nehalem.txt")),
    (
        "Haswell-noTSX",
        include_str!("cpuid_dumps/Haswell-noTSX.txt"),
    ),
    ("max", include_str!("cpuid_dumps/max.txt")),
];

fn parse(text: &str) -> Dump {
    text.lines()
        .map(|line| {
            let v: Vec<u32> = line
                .split(' ')
                .map(|w| u32::from_str_radix(w, 16).unwrap())
                .collect();
            ((v[0], v[1]), [v[2], v[3], v[4], v[5]])
        })
        .collect()
}

/// The policy that the core would make on that CPU.
fn policy(dump: &Dump) -> Policy {
    let has_xsave = dump[&(1, 0)][2] >> 26 & 1 != 0;
    let xcr0_mask = if has_xsave {
        u64::from(dump[&(0xd, 0)][0]) & 0xe7
    } else {
        0
    };
    let mut p = Policy {
        vcpu_id: 3,
        xcr0_mask,
        osxsave: true,
        tsc_aux: true,
        stable_tsc: true,
        tsc_khz: 2_000_000,
        tsc_mul: 0x8000_0000,
        tsc_shift: -1,
        ..Policy::default()
    };
    p.xcr0 = p.xstates();
    p
}

fn each(mut check: impl FnMut(&str, &Dump, &Policy)) {
    for (name, text) in DUMPS {
        let dump = parse(text);
        assert_eq!(dump.len(), 95, "{name}");
        check(name, &dump, &policy(&dump));
    }
}

fn ask(p: &Policy, dump: &Dump, leaf: u32, subleaf: u32) -> Regs {
    p.leaf(leaf, subleaf, dump[&(leaf, subleaf)])
}

const EDX_NEEDED: [(u32, &str); 13] = [
    (0, "fpu"),
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
];

#[test]
fn recorded_cpus_keep_what_a_kernel_needs() {
    each(|name, dump, p| {
        let one = ask(p, dump, 1, 0);
        let found: Vec<&str> = features(p, |leaf, subleaf| dump[&(leaf, subleaf)]).collect();
        for (bit, feature) in EDX_NEEDED {
            assert_eq!(one[3] >> bit & 1, 1, "{name}: {feature}");
            assert!(found.contains(&feature), "{name}: {feature} by its name");
        }
        assert_eq!(one[2] >> 13 & 1, 1, "{name}: cx16");
        assert_eq!(one[2] >> 31, 1, "{name}: hypervisor");
        assert_eq!(one[0], dump[&(1, 0)][0], "{name}: family, model, stepping");
        assert_eq!(one[1] >> 24, 3, "{name}: APIC id");
        let ext = ask(p, dump, 0x8000_0001, 0);
        for (bit, feature) in [(11, "syscall"), (20, "nx"), (29, "lm")] {
            assert_eq!(ext[3] >> bit & 1, 1, "{name}: {feature}");
            assert!(found.contains(&feature), "{name}: {feature} by its name");
        }
        assert_eq!(
            ask(p, dump, 0, 0)[1..],
            dump[&(0, 0)][1..],
            "{name}: vendor"
        );
        assert_eq!(
            ask(p, dump, 0x8000_0002, 0),
            dump[&(0x8000_0002, 0)],
            "{name}: brand"
        );
        assert_eq!(
            ask(p, dump, 0x8000_0008, 0)[0] >> 8,
            48,
            "{name}: linear bits"
        );
        let phys = ask(p, dump, 0x8000_0008, 0)[0] & 0xff;
        assert!((36..=44).contains(&phys), "{name}: {phys} physical bits");
    });
}

#[test]
fn recorded_cpus_lose_what_a_pv_guest_cannot_have() {
    // Leaf, subleaf, register, bit: from the design, not from the masks.
    let hidden: [(u32, u32, usize, &[u32]); 8] = [
        // VME PSE MCE SEP MTRR PGE MCA PSE36 DS ACPI HT TM
        (1, 0, 3, &[1, 3, 7, 11, 12, 13, 14, 17, 21, 22, 28, 29]),
        // MONITOR VMX PCID X2APIC TSC_DEADLINE
        (1, 0, 2, &[3, 5, 17, 21, 24]),
        // FSGSBASE TSC_ADJUST SMEP INVPCID MPX SMAP PT
        (7, 0, 1, &[0, 1, 7, 10, 14, 20, 25]),
        // UMIP PKU OSPKE WAITPKG CET LA57
        (7, 0, 2, &[2, 3, 4, 5, 7, 16]),
        // CET_IBT AMX SPEC_CTRL STIBP ARCH_CAPABILITIES SSBD
        (7, 0, 3, &[20, 22, 24, 25, 26, 27, 29, 31]),
        (0xd, 1, 0, &[3]),
        // CMP_LEGACY SVM TOPOEXT BPEXT
        (0x8000_0001, 0, 2, &[1, 2, 22, 26]),
        // PSE PGE PAGE1GB
        (0x8000_0001, 0, 3, &[3, 13, 26]),
    ];
    each(|name, dump, p| {
        for (leaf, subleaf, reg, bits) in hidden {
            let answer = ask(p, dump, leaf, subleaf)[reg];
            let ones = p.leaf(leaf, subleaf, [u32::MAX; 4])[reg];
            for bit in bits {
                assert_eq!(
                    answer >> bit & 1,
                    0,
                    "{name}: leaf {leaf:#x} register {reg} bit {bit}"
                );
                assert_eq!(
                    ones >> bit & 1,
                    0,
                    "leaf {leaf:#x} register {reg} bit {bit}"
                );
            }
        }
        for leaf in [
            5,
            6,
            0xa,
            0xb,
            0xf,
            0x14,
            0x1f,
            0x8000_0007,
            0x8000_000a,
            0x8000_001e,
        ] {
            assert_eq!(ask(p, dump, leaf, 0), [0; 4], "{name}: leaf {leaf:#x}");
        }
        assert!(ask(p, dump, 0, 0)[0] <= 0xd, "{name}");
        assert!(ask(p, dump, 0x8000_0000, 0)[0] <= 0x8000_0021, "{name}");
    });
}

#[test]
fn xsave_is_shown_with_sizes_that_agree() {
    each(|name, dump, p| {
        let one = ask(p, dump, 1, 0)[2];
        let [eax, ebx, ecx, edx] = ask(p, dump, 0xd, 0);
        if name == "Nehalem" {
            assert_eq!(one & (1 << 26 | 1 << 27 | 1 << 28), 0);
            assert_eq!([eax, ebx, ecx, edx], [0; 4]);
            return;
        }
        assert_eq!(one >> 26 & 7, 7, "{name}: XSAVE, OSXSAVE, AVX");
        assert_eq!((u64::from(eax), edx), (p.xstates(), 0), "{name}");
        // What the components say is what the totals say: Linux checks this.
        let mut end = 576;
        let mut compact = 576;
        for i in 2..10 {
            let [size, offset, flags, _] = ask(p, dump, 0xd, i);
            assert_eq!(
                size != 0,
                p.xstates() >> i & 1 != 0,
                "{name}: component {i}"
            );
            assert_eq!(flags & !2, 0, "{name}: component {i}");
            if size != 0 {
                end = end.max(offset + size);
                compact += size;
            }
        }
        assert_eq!((ebx, ecx), (end, end), "{name}");
        let [features, size, _, _] = ask(p, dump, 0xd, 1);
        assert_eq!(features & !7, 0, "{name}");
        assert_eq!(size, if features & 2 != 0 { compact } else { 0 }, "{name}");
        // Before the guest sets CR4.OSXSAVE.
        let before = Policy {
            osxsave: false,
            ..*p
        };
        assert_eq!(ask(&before, dump, 1, 0)[2] >> 26 & 3, 1, "{name}");
    });
}

#[test]
fn without_avx_state_nothing_of_avx_is_shown() {
    each(|name, dump, p| {
        for mask in [0, 3] {
            let p = Policy {
                xcr0_mask: mask,
                ..*p
            };
            let ones = |leaf, subleaf| p.leaf(leaf, subleaf, [u32::MAX; 4]);
            assert_eq!(ask(&p, dump, 1, 0)[2] >> 28 & 3, 0, "{name}");
            assert_eq!(ones(1, 0)[2] >> 12 & 1, 0);
            assert_eq!(ones(7, 0)[1] & (1 << 5 | 1 << 16 | 1 << 31), 0);
            assert_eq!(ones(7, 0)[2] & (3 << 9 | 1 << 11), 0);
            assert_eq!(ones(7, 1)[0] & (1 << 4 | 1 << 5), 0);
            assert_eq!(ones(0x8000_0001, 0)[2] & (1 << 11 | 1 << 16), 0);
            assert_eq!(
                ask(&p, dump, 1, 0)[2] >> 26 & 1,
                u32::from(mask != 0 && name != "Nehalem")
            );
        }
    });
}

#[test]
fn caches_are_private_and_topology_is_flat() {
    let skylake = parse(DUMPS[1].1);
    let p = policy(&skylake);
    let mut levels = 0;
    for i in 0..4 {
        let hw = skylake[&(4, i)];
        let [a, b, c, d] = ask(&p, &skylake, 4, i);
        assert_eq!(a, hw[0] & 0x3fff);
        assert_eq!((b, c), (hw[1], hw[2]), "line, ways and sets as they are");
        assert_eq!(d & !7, 0);
        levels += u32::from(a & 0x1f != 0);
    }
    assert!(levels >= 3, "the caches are there");
}

#[test]
fn xen_leaves() {
    let p = policy(&parse(DUMPS[0].1));
    let x = |leaf, sub| p.leaf(leaf, sub, [0xdead_beef; 4]);
    let [max, b, c, d] = x(BASE, 0);
    assert_eq!(max, BASE + 5);
    let mut text = Vec::new();
    for w in [b, c, d] {
        text.extend(w.to_le_bytes());
    }
    assert_eq!(text, b"XenVMMXenVMM");
    assert_eq!(x(BASE + 1, 0), [4 << 16 | 17, 0, 0, 0]);
    assert_eq!(x(BASE + 2, 0), [1, 0x4000_0000, 1, 0]);
    assert_eq!(x(BASE + 3, 0), [6, 0, 2_000_000, 0]);
    assert_eq!(x(BASE + 3, 1), [0, 0, 0x8000_0000, u32::MAX]);
    assert_eq!(x(BASE + 3, 2), [2_000_000, 0, 0, 0]);
    assert_eq!(x(BASE + 4, 0), [0; 4]);
    assert_eq!(x(BASE + 5, 0), [0, 44, 0, 0]);
    assert_eq!(x(BASE + 5, 1), [0; 4]);
    // Where Linux looks for other hypervisors.
    for base in (BASE + 0x100..BASE + 0x1_0000).step_by(0x100) {
        assert_eq!(x(base, 0), [0; 4]);
        assert_eq!(x(base + 1, 0), [0; 4]);
    }
}

#[test]
fn masks_stay_within_xens() {
    // What Xen lets a 64-bit PV guest see, `public/arch-x86/cpufeatureset.h`.
    let upper = [
        (allow::L1_EDX, 0x1fc9_cbf5),
        (
            allow::L1_ECX | allow::L1_ECX_AVX | allow::L1_ECX_XSAVE | allow::L1_ECX_HYPERVISOR,
            0xf6d8_3203,
        ),
        (allow::E1_EDX | allow::E1_EDX_TSC_AUX, 0xea50_0800),
        (allow::E1_ECX | allow::E1_ECX_AVX, 0x4421_09e3),
        (allow::LD_1_EAX, 7),
        (
            allow::L7_EBX | allow::L7_EBX_AVX | allow::L7_EBX_AVX512,
            0xf1af_0b28,
        ),
        (
            allow::L7_ECX | allow::L7_ECX_AVX | allow::L7_ECX_AVX512 | allow::L7_ECX_TSC_AUX,
            0x0240_5f43,
        ),
        (allow::L7_EDX | allow::L7_EDX_AVX512, 0xac80_4410),
        (
            allow::L7_1_EAX | allow::L7_1_EAX_AVX | allow::L7_1_EAX_AVX512,
            0x0080_1c37,
        ),
        (allow::L7_1_EDX | allow::L7_1_EDX_AVX, 0x0000_4430),
        (allow::L7_2_EDX, 0x21),
        (allow::E8_EBX, 0x6400_1005),
        (allow::E21_EAX, 0x781c_0c65),
    ];
    for (i, (ours, xen)) in upper.into_iter().enumerate() {
        assert_eq!(ours & !xen, 0, "mask {i}: {:#x}", ours & !xen);
    }
}

/// Every bit that may ever be set in an answer, whatever hardware says.
fn may_be_set(leaf: u32, subleaf: u32) -> Regs {
    match (leaf, subleaf) {
        (0, _) => [0xf, !0, !0, !0],
        (1, _) => [!0, 0xff00_ff00, 0xf6d8_3203 | 1 << 27, 0x0f89_8375],
        (2, _) => [!0; 4],
        (4, _) | (0x8000_001d, _) => [0x3fff, !0, !0, 7],
        (7, 0) => [3, 0xf1af_0b28, 0x0240_5f43, 0x0080_4410],
        (7, 1) => [0x0080_1c37, 0, 0, 0x4430],
        (7, 2) => [0, 0, 0, 0x20],
        (0xd, 0) => [0xe7, !0, !0, 0],
        (0xd, 1) => [7, 0xfff, 0, 0],
        (0xd, 2 | 5..=7) => [!0, !0, 2, 0],
        (0x8000_0000, _) => [0x8000_003f, !0, !0, !0],
        (0x8000_0001, _) => [!0, 0, 0x0021_09e1, 0xea50_0800],
        (0x8000_0002..=0x8000_0006, _) => [!0; 4],
        (0x8000_0008, _) => [0x303f, 0x2400_0005, 0, 0],
        (0x8000_0021, _) => [0x601c_0c65, 0, 6, 0],
        (0x4000_0000..=0x4000_0005, _) => [!0; 4], // not from hardware, see below
        _ => [0; 4],
    }
}

fn leaves() -> impl Strategy<Value = u32> {
    prop_oneof![
        0u32..0x30,
        0x4000_0000u32..0x4000_0400,
        0x8000_0000u32..0x8000_0040,
        prop::sample::select(vec![0x8086_0000u32, 0xc000_0000, 0xc000_0001, 0x4001_0000]),
        any::<u32>(),
    ]
}

fn policies() -> impl Strategy<Value = Policy> {
    (
        any::<[bool; 3]>(),
        any::<u64>(),
        any::<u64>(),
        0u32..64,
        any::<(u32, u32, i8)>(),
        any::<[u32; 16]>(),
    )
        .prop_map(
            |(
                [osxsave, tsc_aux, stable_tsc],
                xcr0_mask,
                xcr0,
                vcpu_id,
                (khz, mul, shift),
                hidden,
            )| {
                Policy {
                    hidden: Hidden(hidden),
                    vcpu_id,
                    xcr0_mask,
                    xcr0,
                    osxsave,
                    tsc_aux,
                    stable_tsc,
                    tsc_khz: khz,
                    tsc_mul: mul,
                    tsc_shift: shift,
                }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 30_000, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn only_listed_bits_ever_appear(
        p in policies(),
        leaf in leaves(),
        subleaf in prop_oneof![0u32..40, any::<u32>()],
        hw in any::<Regs>(),
        other in any::<Regs>(),
    ) {
        let answer = p.leaf(leaf, subleaf, hw);
        let limit = may_be_set(leaf, subleaf);
        for r in 0..4 {
            prop_assert_eq!(answer[r] & !limit[r], 0, "leaf {:#x}.{} register {}", leaf, subleaf, r);
        }
        // What is hidden is only taken away.
        let whole = Policy { hidden: Hidden::default(), ..p };
        let whole = whole.leaf(leaf, subleaf, hw);
        for r in 0..4 {
            prop_assert_eq!(answer[r] & !whole[r], 0);
        }
        // Leaves that are ours do not depend on hardware at all, and hardware is
        // asked for nothing else.
        if !needs_hardware(leaf) {
            prop_assert_eq!(answer, p.leaf(leaf, subleaf, other));
        }
        if leaf >> 28 == 4 {
            prop_assert!(!needs_hardware(leaf));
        }
    }

    #[test]
    fn xcr0_rules(p in policies(), value in any::<u64>()) {
        let s = p.xstates();
        prop_assert_eq!(s & !0xe7, 0);
        prop_assert_eq!(s & !p.xcr0_mask, 0);
        prop_assert!(s == 0 || p.xcr0_valid(s));
        for v in [value, value & 0xff, value & s, s & 7] {
            if p.xcr0_valid(v) {
                prop_assert!(v & 1 == 1 && v & !s == 0);
                prop_assert!(v & 4 == 0 || v & 2 == 2);
                prop_assert!(v & 0xe0 == 0 || v & 0xe7 == 0xe7);
            }
        }
    }
}
