//! The CPUID policy on arbitrary hardware: nothing unknown passes, nothing of a
//! hypervisor below.
#![no_main]

use blanket_core::cpuid::{MAX_BASIC, MAX_EXTENDED, Policy, Regs, needs_hardware};
use libfuzzer_sys::{arbitrary::Arbitrary, fuzz_target};

#[derive(Arbitrary, Debug)]
struct Input {
    leaf: u32,
    range: u8,
    subleaf: u32,
    hw: Regs,
    other: Regs,
    vcpu_id: u8,
    xcr0_mask: u64,
    xcr0: u64,
    flags: [bool; 3],
    time: (u32, u32, i8),
}

fuzz_target!(|i: Input| {
    // Mostly leaves near the start of a range.
    let leaf = match i.range % 5 {
        0 => i.leaf % 0x30,
        1 => 0x8000_0000 + i.leaf % 0x30,
        2 => 0x4000_0000 + i.leaf % 0x300,
        3 => 0xc000_0000 + i.leaf % 8,
        _ => i.leaf,
    };
    let subleaf = if i.range & 0x80 == 0 {
        i.subleaf % 40
    } else {
        i.subleaf
    };
    let p = Policy {
        vcpu_id: u32::from(i.vcpu_id),
        xcr0_mask: i.xcr0_mask,
        xcr0: i.xcr0,
        osxsave: i.flags[0],
        tsc_aux: i.flags[1],
        stable_tsc: i.flags[2],
        tsc_khz: i.time.0,
        tsc_mul: i.time.1,
        tsc_shift: i.time.2,
    };
    let answer = p.leaf(leaf, subleaf, i.hw);
    if !needs_hardware(leaf) {
        assert_eq!(answer, p.leaf(leaf, subleaf, i.other), "not hardware's");
    }
    // A feature word is a mask: what hardware does not have is not shown, except
    // the bit that says there is a hypervisor; and no hardware gets more shown than
    // one that has everything.
    if let 1 | 7 | 0x8000_0001 | 0x8000_0021 = leaf {
        let most = p.leaf(leaf, subleaf, [u32::MAX; 4]);
        for reg in 2..4 {
            assert_eq!(answer[reg] & !most[reg], 0);
            let own = if (leaf, reg) == (1, 2) {
                1 << 31 | 1 << 27
            } else {
                0
            };
            assert_eq!(answer[reg] & !i.hw[reg] & !own, 0);
        }
    }
    match leaf {
        0 => assert!(answer[0] <= MAX_BASIC),
        0x8000_0000 => assert!(answer[0] <= MAX_EXTENDED),
        0xd if subleaf == 0 => assert_eq!(u64::from(answer[0]) & !p.xstates(), 0),
        _ => {}
    }
    let s = p.xstates();
    assert!(s & !i.xcr0_mask == 0 && s & !0xe7 == 0 && (s == 0 || p.xcr0_valid(s)));
});
