//! `PtWrite::apply` against the CPU that runs the test: every operation is
//! executed for real on the same operands, then memory, registers and flags are
//! compared. The bytes that are decoded are the ones that were executed.

#![cfg(target_arch = "x86_64")]

use blanket_core::insn::{AluOp, PtOp, decode_pt_write, flags};
use std::arch::asm;

/// Inputs and outputs of one instruction. Its memory operand is `[rdi]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    mem: u64,
    rax: u64,
    rdx: u64,
    flags: u64,
}

/// Executes the instruction and returns its bytes.
type Real = fn(&mut State) -> &'static [u8];

macro_rules! real {
    ($($insn:expr),* $(,)?) => {
        [$(($insn, {
            fn run(s: &mut State) -> &'static [u8] {
                let (start, end): (*const u8, *const u8);
                let mut flags: u64;
                // SAFETY: the instruction writes at most the eight bytes of `mem`, and
                // rax, rdx and the flags, all declared; `flags` has only arithmetic bits,
                // and the direction flag is clear.
                unsafe {
                    asm!(
                        "push {flags}",
                        "popfq",
                        "2:",
                        $insn,
                        "3:",
                        "pushfq",
                        "pop {flags}",
                        "lea {start}, [rip + 2b]",
                        "lea {end}, [rip + 3b]",
                        flags = inout(reg) s.flags => flags,
                        start = out(reg) start,
                        end = out(reg) end,
                        inout("rax") s.rax,
                        inout("rdx") s.rdx,
                        in("rdi") &raw mut s.mem,
                    );
                }
                s.flags = flags & flags::ARITHMETIC;
                // SAFETY: both labels are in this function's code, which is readable and
                // lives as long as the program.
                unsafe { std::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
            }
            run as Real
        })),*]
    };
}

/// All sizes of a two-operand instruction with a register source, dh included.
macro_rules! sized {
    ($op:literal) => {
        real![
            concat!($op, " byte ptr [rdi], dl"),
            concat!($op, " byte ptr [rdi], dh"),
            concat!($op, " word ptr [rdi], dx"),
            concat!($op, " dword ptr [rdi], edx"),
            concat!($op, " qword ptr [rdi], rdx"),
        ]
    };
}
macro_rules! wide {
    ($op:literal) => {
        real![
            concat!($op, " word ptr [rdi], dx"),
            concat!($op, " dword ptr [rdi], edx"),
            concat!($op, " qword ptr [rdi], rdx"),
            concat!($op, " word ptr [rdi], 11"),
            concat!($op, " dword ptr [rdi], 29"),
            concat!($op, " qword ptr [rdi], 0x3f"),
            concat!($op, " qword ptr [rdi], 0x85"),
        ]
    };
}
macro_rules! immediates {
    ($op:literal) => {
        real![
            concat!($op, " byte ptr [rdi], 0x85"),
            concat!($op, " word ptr [rdi], 0x1234"),
            concat!($op, " word ptr [rdi], -3"),
            concat!($op, " dword ptr [rdi], 0x7654321"),
            concat!($op, " dword ptr [rdi], -1"),
            concat!($op, " qword ptr [rdi], 0x7f"),
            concat!($op, " qword ptr [rdi], -0x12345678"),
        ]
    };
}
macro_rules! unary {
    ($op:literal) => {
        real![
            concat!($op, " byte ptr [rdi]"),
            concat!($op, " word ptr [rdi]"),
            concat!($op, " dword ptr [rdi]"),
            concat!($op, " qword ptr [rdi]"),
        ]
    };
}

fn instructions() -> Vec<(&'static str, Real)> {
    let mut all = Vec::new();
    all.extend(sized!("mov"));
    all.extend(immediates!("mov"));
    all.extend(real![
        "movnti dword ptr [rdi], edx",
        "movnti qword ptr [rdi], rdx"
    ]);
    all.extend(sized!("xchg"));
    all.extend(sized!("lock cmpxchg"));
    all.extend(sized!("cmpxchg"));
    all.extend(sized!("lock xadd"));
    all.extend(sized!("add"));
    all.extend(sized!("or"));
    all.extend(sized!("adc"));
    all.extend(sized!("sbb"));
    all.extend(sized!("lock and"));
    all.extend(sized!("sub"));
    all.extend(sized!("xor"));
    all.extend(immediates!("add"));
    all.extend(immediates!("or"));
    all.extend(immediates!("adc"));
    all.extend(immediates!("sbb"));
    all.extend(immediates!("lock and"));
    all.extend(immediates!("sub"));
    all.extend(immediates!("xor"));
    all.extend(wide!("lock bts"));
    all.extend(wide!("btr"));
    all.extend(wide!("btc"));
    all.extend(unary!("inc"));
    all.extend(unary!("lock dec"));
    all.extend(unary!("not"));
    all.extend(unary!("neg"));
    all
}

/// xorshift64*: repeatable operands.
struct Rng(u64);
impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// Values near the corners of each operand size, and others.
    fn operand(&mut self) -> u64 {
        const CORNERS: [u64; 12] = [
            0,
            1,
            0x7f,
            0x80,
            0xff,
            0x7fff,
            0x8000,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            1 << 63,
            u64::MAX,
        ];
        let r = self.next();
        let corner = CORNERS[usize::try_from(r % 12).unwrap()];
        match r >> 60 {
            0..4 => corner,
            4..8 => corner ^ (self.next() & !0xffff_ffff),
            8..10 => corner.wrapping_add(self.next() % 5).wrapping_sub(2),
            _ => self.next(),
        }
    }
}

#[test]
fn apply_does_what_the_cpu_does() {
    let mut rng = Rng(0x9e37_79b9_7f4a_7c15);
    let all = instructions();
    assert!(all.len() > 140);
    for (text, run) in all {
        for _ in 0..4000 {
            let mut before = State {
                mem: rng.operand(),
                rax: rng.operand(),
                rdx: rng.operand(),
                flags: rng.next() & flags::ARITHMETIC,
            };
            if text.contains("cmpxchg") && rng.next() & 1 == 0 {
                // Let it match, at least in the low bits.
                before.rax = before.rax & !0xffff_ffff | before.mem & 0xffff_ffff;
                if rng.next() & 1 == 0 {
                    before.rax = before.mem;
                }
            }
            let decoding = {
                let mut scratch = before;
                // A register bit offset also moves the address: keep it in the word.
                if text.contains("bt") && text.ends_with('x') {
                    before.rdx &= if text.contains("word ptr [rdi], dx") {
                        15
                    } else {
                        31
                    };
                    scratch.rdx = before.rdx;
                }
                decode_pt_write(run(&mut scratch))
            };
            let w = decoding.unwrap_or_else(|| panic!("{text}: not decoded"));
            let mut real = before;
            let bytes = run(&mut real);
            assert_eq!(usize::from(w.len), bytes.len(), "{text}");

            let mut regs = [0u64; 16];
            for (i, r) in regs.iter_mut().enumerate() {
                *r = 0x1111_1111_1111_1111 * i as u64;
            }
            let fill = regs;
            regs[0] = before.rax;
            regs[2] = before.rdx;
            let mut rflags = before.flags | 0x202;
            let new = w.apply(before.mem, &mut regs, &mut rflags);
            let mask = u64::MAX >> (64 - 8 * u32::from(w.size));
            let ours = State {
                mem: new.map_or(before.mem, |n| {
                    assert_eq!(n & !mask, 0, "{text}");
                    before.mem & !mask | n
                }),
                rax: regs[0],
                rdx: regs[2],
                flags: rflags & flags::ARITHMETIC,
            };
            assert_eq!(rflags & !flags::ARITHMETIC, 0x202, "{text}");
            for (i, r) in regs.iter().enumerate() {
                assert!(i == 0 || i == 2 || *r == fill[i], "{text}: register {i}");
            }
            // Undefined by the manuals: only CF counts after bit operations, and AF
            // does not after logic.
            let defined = match w.op {
                PtOp::Bit(..) => flags::CF,
                PtOp::Alu(AluOp::And | AluOp::Or | AluOp::Xor, _) => flags::ARITHMETIC & !flags::AF,
                _ => flags::ARITHMETIC,
            };
            let cut = |s: State| State {
                flags: s.flags & defined,
                ..s
            };
            assert_eq!(cut(ours), cut(real), "{text}: {before:x?}");
        }
    }
}

#[test]
fn register_bit_offsets_count_within_the_word() {
    // bts %rdx,(%r8) with bit 64 + 3 faults on the next word: bit 3 of that.
    let w = decode_pt_write(&[0x49, 0x0f, 0xab, 0x10]).unwrap();
    let mut regs = [0; 16];
    regs[2] = 67;
    let mut rflags = 2;
    assert_eq!(w.apply(0, &mut regs, &mut rflags), Some(8));
}
