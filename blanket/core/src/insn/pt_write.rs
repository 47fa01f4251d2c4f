//! Instructions that write an aligned word of a page table.

use super::Bytes;

/// Bits of RFLAGS that the instructions here read or write.
pub mod flags {
    /// Carry.
    pub const CF: u64 = 1 << 0;
    /// Parity of the low byte.
    pub const PF: u64 = 1 << 2;
    /// Carry out of bit 3.
    pub const AF: u64 = 1 << 4;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// Sign.
    pub const SF: u64 = 1 << 7;
    /// Signed overflow.
    pub const OF: u64 = 1 << 11;
    /// All of them.
    pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
}
use flags::{AF, ARITHMETIC, CF, OF, PF, SF, ZF};

/// A general register operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reg {
    /// Index into the register array: rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 to r15.
    pub num: u8,
    /// Bits 8 to 15 of the register (ah, ch, dh, bh).
    pub high: bool,
}

/// A source operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Src {
    /// A register.
    Reg(Reg),
    /// An immediate, sign-extended to 64 bits.
    Imm(u64),
}

/// Arithmetic and logic with two operands; the values are the opcode's bits 3 to 5.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "mnemonics")]
pub enum AluOp {
    Add = 0,
    Or = 1,
    Adc = 2,
    Sbb = 3,
    And = 4,
    Sub = 5,
    Xor = 6,
}

impl AluOp {
    /// `cmp` (7) does not write.
    #[inline]
    fn from_bits(bits: u8) -> Option<Self> {
        Some(match bits {
            0 => Self::Add,
            1 => Self::Or,
            2 => Self::Adc,
            3 => Self::Sbb,
            4 => Self::And,
            5 => Self::Sub,
            6 => Self::Xor,
            _ => return None,
        })
    }
}

/// What is done to the selected bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitOp {
    /// bts
    Set,
    /// btr
    Reset,
    /// btc
    Complement,
}

/// The operation on the memory word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PtOp {
    /// mov, movnti
    Mov(Src),
    /// xchg
    Xchg(Reg),
    /// cmpxchg with rax
    Cmpxchg(Reg),
    /// xadd
    Xadd(Reg),
    /// add, or, adc, sbb, and, sub, xor
    Alu(AluOp, Src),
    /// bts, btr, btc
    Bit(BitOp, Src),
    /// inc
    Inc,
    /// dec
    Dec,
    /// not
    Not,
    /// neg
    Neg,
}

/// A decoded write to one word of memory. Which word it is, the fault says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PtWrite {
    /// Length of the instruction, bytes.
    pub len: u8,
    /// Size of the memory operand: 1, 2, 4 or 8 bytes.
    pub size: u8,
    /// The operation.
    pub op: PtOp,
}

/// Decodes the instruction that faulted writing a word of a page table.
///
/// `bytes` are those at the instruction pointer, as many as could be read. `None`
/// if they are not one of the forms that are emulated, if the operand is not in
/// memory, if the instruction would not execute (a LOCK prefix where none is
/// allowed), or if it is longer than `bytes`.
#[must_use]
#[inline]
pub fn decode_pt_write(bytes: &[u8]) -> Option<PtWrite> {
    let mut b = Bytes::new(bytes);
    let (p, opcode) = b.prefixes()?;
    if p.rep != 0 {
        return None;
    }
    // Whether the opcode has a full-size operand rather than a byte.
    let full = |opcode: u8| if opcode & 1 != 0 { p.size() } else { 1 };
    // The register in ModRM.reg as an operand of `size` bytes. Without a REX
    // prefix the byte registers 4 to 7 are ah to bh.
    let reg = |field: u8, size: u8| {
        if size == 1 && p.rex == 0 && field >= 4 {
            Reg {
                num: field & 3,
                high: true,
            }
        } else {
            Reg {
                num: field | p.r(),
                high: false,
            }
        }
    };
    let imm_size = |size: u8| if size == 8 { 4 } else { size };

    let (size, op, lockable) = match opcode {
        // add, or, adc, sbb, and, sub, xor: register to memory
        0x00..=0x3f if opcode & 6 == 0 => {
            let alu = AluOp::from_bits(opcode >> 3)?;
            let size = full(opcode);
            (
                size,
                PtOp::Alu(alu, Src::Reg(reg(b.modrm_memory()?, size))),
                true,
            )
        }
        // the same with an immediate
        0x80 | 0x81 | 0x83 => {
            let alu = AluOp::from_bits(b.modrm_memory()?)?;
            let size = full(opcode);
            let imm = b.imm(if opcode == 0x83 { 1 } else { imm_size(size) })?;
            (size, PtOp::Alu(alu, Src::Imm(imm)), true)
        }
        0x86 | 0x87 => {
            let size = full(opcode);
            (size, PtOp::Xchg(reg(b.modrm_memory()?, size)), true)
        }
        0x88 | 0x89 => {
            let size = full(opcode);
            (
                size,
                PtOp::Mov(Src::Reg(reg(b.modrm_memory()?, size))),
                false,
            )
        }
        0xc6 | 0xc7 => {
            if b.modrm_memory()? != 0 {
                return None;
            }
            let size = full(opcode);
            (size, PtOp::Mov(Src::Imm(b.imm(imm_size(size))?)), false)
        }
        0xf6 | 0xf7 => {
            let op = match b.modrm_memory()? {
                2 => PtOp::Not,
                3 => PtOp::Neg,
                _ => return None,
            };
            (full(opcode), op, true)
        }
        0xfe | 0xff => {
            let op = match b.modrm_memory()? {
                0 => PtOp::Inc,
                1 => PtOp::Dec,
                _ => return None,
            };
            (full(opcode), op, true)
        }
        0x0f => match b.next()? {
            op @ (0xab | 0xb3 | 0xbb) => {
                let size = p.size();
                let src = Src::Reg(reg(b.modrm_memory()?, size));
                let bit = match op {
                    0xab => BitOp::Set,
                    0xb3 => BitOp::Reset,
                    _ => BitOp::Complement,
                };
                (size, PtOp::Bit(bit, src), true)
            }
            0xba => {
                let bit = match b.modrm_memory()? {
                    5 => BitOp::Set,
                    6 => BitOp::Reset,
                    7 => BitOp::Complement,
                    _ => return None,
                };
                (p.size(), PtOp::Bit(bit, Src::Imm(b.imm(1)?)), true)
            }
            op @ (0xb0 | 0xb1) => {
                let size = full(op);
                (size, PtOp::Cmpxchg(reg(b.modrm_memory()?, size)), true)
            }
            op @ (0xc0 | 0xc1) => {
                let size = full(op);
                (size, PtOp::Xadd(reg(b.modrm_memory()?, size)), true)
            }
            // movnti has no 16-bit form
            0xc3 if !p.opsize => {
                let size = p.size();
                (
                    size,
                    PtOp::Mov(Src::Reg(reg(b.modrm_memory()?, size))),
                    false,
                )
            }
            _ => return None,
        },
        _ => return None,
    };
    if p.lock && !lockable {
        return None;
    }
    Some(PtWrite {
        len: b.len(),
        size,
        op,
    })
}

/// `size` bytes as a mask.
#[inline]
fn mask(size: u8) -> u64 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

#[inline]
fn read(regs: &[u64; 16], reg: Reg, size: u8) -> u64 {
    let value = regs[usize::from(reg.num & 15)];
    if reg.high {
        value >> 8 & 0xff
    } else {
        value & mask(size)
    }
}

/// Writes a register as the CPU does: 32-bit results clear the upper half,
/// smaller ones keep the rest.
#[inline]
fn write(regs: &mut [u64; 16], reg: Reg, size: u8, value: u64) {
    let slot = &mut regs[usize::from(reg.num & 15)];
    *slot = match size {
        8 => value,
        4 => value & mask(4),
        1 if reg.high => *slot & !0xff00 | (value & 0xff) << 8,
        _ => *slot & !mask(size) | value & mask(size),
    };
}

/// ZF, SF and PF of a result of `size` bytes.
#[inline]
fn result_flags(result: u64, size: u8) -> u64 {
    let result = result & mask(size);
    let mut f = 0;
    if result == 0 {
        f |= ZF;
    }
    if result >> (u32::from(size) * 8 - 1) & 1 != 0 {
        f |= SF;
    }
    if (result & 0xff).count_ones() & 1 == 0 {
        f |= PF;
    }
    f
}

/// AF, CF and OF of an addition with the carries `carry` out of each bit.
#[inline]
fn carry_flags(carry: u64, size: u8) -> u64 {
    let top = u32::from(size) * 8 - 1;
    let out = carry >> top & 1;
    let into = carry >> (top - 1) & 1;
    let mut f = carry << 1 & AF;
    if out != 0 {
        f |= CF;
    }
    if out != into {
        f |= OF;
    }
    f
}

/// `a + b + c` and its arithmetic flags.
#[inline]
fn add(a: u64, b: u64, c: u64, size: u8) -> (u64, u64) {
    let r = a.wrapping_add(b).wrapping_add(c);
    let carry = a & b | (a | b) & !r;
    (r, carry_flags(carry, size) | result_flags(r, size))
}

/// `a - b - c` and its arithmetic flags.
#[inline]
fn sub(a: u64, b: u64, c: u64, size: u8) -> (u64, u64) {
    let r = a.wrapping_sub(b).wrapping_sub(c);
    let borrow = !a & b | (!a | b) & r;
    (r, carry_flags(borrow, size) | result_flags(r, size))
}

#[inline]
fn set_flags(rflags: &mut u64, which: u64, value: u64) {
    *rflags = *rflags & !which | value & which;
}

impl PtWrite {
    /// Executes the operation on the memory value `old` (only its low `size` bytes
    /// count). Returns the new memory value (low `size` bytes, the rest zero), or
    /// `None` if memory stays as it is (a cmpxchg that does not match). Destination
    /// registers and the arithmetic flags become what the CPU makes of them;
    /// flags that the manuals leave undefined are kept (bit operations) or cleared
    /// (AF after and, or, xor), as Intel and AMD CPUs do.
    ///
    /// The result depends on the arguments alone, so a caller that updates memory
    /// with compare-and-swap can call again on copies when it lost a race.
    ///
    /// A bit offset in a register selects the word as well as the bit. The word is
    /// known here (it is the one that faulted), so the offset counts modulo the
    /// word's bits.
    #[must_use]
    #[inline]
    pub fn apply(&self, old: u64, regs: &mut [u64; 16], rflags: &mut u64) -> Option<u64> {
        let size = self.size;
        let m = mask(size);
        let old = old & m;
        let value = |regs: &[u64; 16], src: Src| match src {
            Src::Reg(reg) => read(regs, reg, size),
            Src::Imm(imm) => imm & m,
        };
        let new = match self.op {
            PtOp::Mov(src) => value(regs, src),
            PtOp::Xchg(reg) => {
                let new = read(regs, reg, size);
                write(regs, reg, size, old);
                new
            }
            PtOp::Cmpxchg(reg) => {
                let rax = Reg {
                    num: 0,
                    high: false,
                };
                let expected = read(regs, rax, size);
                let (_, f) = sub(expected, old, 0, size);
                set_flags(rflags, ARITHMETIC, f);
                if expected != old {
                    write(regs, rax, size, old);
                    return None;
                }
                read(regs, reg, size)
            }
            PtOp::Xadd(reg) => {
                let (new, f) = add(old, read(regs, reg, size), 0, size);
                set_flags(rflags, ARITHMETIC, f);
                write(regs, reg, size, old);
                new
            }
            PtOp::Alu(op, src) => {
                let src = value(regs, src);
                let carry = *rflags & CF;
                let (new, f) = match op {
                    AluOp::Add => add(old, src, 0, size),
                    AluOp::Adc => add(old, src, carry, size),
                    AluOp::Sub => sub(old, src, 0, size),
                    AluOp::Sbb => sub(old, src, carry, size),
                    AluOp::Or => (old | src, result_flags(old | src, size)),
                    AluOp::And => (old & src, result_flags(old & src, size)),
                    AluOp::Xor => (old ^ src, result_flags(old ^ src, size)),
                };
                set_flags(rflags, ARITHMETIC, f);
                new
            }
            PtOp::Bit(op, src) => {
                let bits = u64::from(size) * 8;
                let bit = 1 << (value(regs, src) & (bits - 1));
                set_flags(rflags, CF, if old & bit != 0 { CF } else { 0 });
                match op {
                    BitOp::Set => old | bit,
                    BitOp::Reset => old & !bit,
                    BitOp::Complement => old ^ bit,
                }
            }
            PtOp::Inc => {
                let (new, f) = add(old, 1, 0, size);
                set_flags(rflags, ARITHMETIC & !CF, f);
                new
            }
            PtOp::Dec => {
                let (new, f) = sub(old, 1, 0, size);
                set_flags(rflags, ARITHMETIC & !CF, f);
                new
            }
            PtOp::Not => !old,
            PtOp::Neg => {
                let (new, f) = sub(0, old, 0, size);
                set_flags(rflags, ARITHMETIC, f);
                new
            }
        };
        Some(new & m)
    }
}
