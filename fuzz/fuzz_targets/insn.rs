//! Both decoders on arbitrary bytes, with iced-x86 as the oracle, and the execution
//! of what they accept on arbitrary operands.
#![no_main]

#[path = "../../blanket/core/tests/insn_support/mod.rs"]
mod insn_support;

use blanket_core::insn::{MAX_LEN, decode_pt_write, flags};
use libfuzzer_sys::{arbitrary::Arbitrary, fuzz_target};

#[derive(Arbitrary, Debug)]
struct Input {
    code: [u8; 16],
    length: u8,
    old: u64,
    regs: [u64; 16],
    rflags: u64,
}

fuzz_target!(|input: Input| {
    let code = &input.code[..usize::from(input.length) % 17];
    insn_support::check_pt_write(code);
    insn_support::check_priv(code);
    let Some(write) = decode_pt_write(code) else {
        return;
    };
    assert!(usize::from(write.len) <= code.len().min(MAX_LEN));
    let run = || {
        let (mut regs, mut rflags) = (input.regs, input.rflags);
        let new = write.apply(input.old, &mut regs, &mut rflags);
        (new, regs, rflags)
    };
    let (new, regs, rflags) = run();
    assert_eq!(run(), (new, regs, rflags), "the same again");
    let mask = u64::MAX >> (64 - 8 * u32::from(write.size));
    assert_eq!(new.unwrap_or(0) & !mask, 0, "within the operand");
    assert_eq!(
        (rflags ^ input.rflags) & !flags::ARITHMETIC,
        0,
        "other flags are kept"
    );
    let changed = (0..16).filter(|&i| regs[i] != input.regs[i]).count();
    assert!(changed <= 1, "at most one destination register");
});
