//! Two small x86-64 decoders for the instructions that a deprivileged guest
//! kernel makes the core emulate: writes to page tables ([`decode_pt_write`])
//! and privileged operations ([`decode_priv`]).
//!
//! Both take the bytes at the guest's instruction pointer, decode 64-bit mode
//! only, and accept less than a CPU does: what they do not know is `None`, and
//! the caller hands the fault to the guest. Encodings are those of the Intel SDM,
//! volume 2, and the AMD APM, volume 3.

mod privileged;
mod pt_write;

pub use privileged::{Port, PrivOp, decode_priv};
pub use pt_write::{AluOp, BitOp, PtOp, PtWrite, Reg, Src, decode_pt_write, flags};

/// Longest instruction that a CPU executes, bytes.
pub const MAX_LEN: usize = 15;

/// Prefixes in front of an opcode.
#[derive(Clone, Copy, Default)]
struct Prefixes {
    /// Operand size override, 66.
    opsize: bool,
    /// Address size override, 67.
    addr32: bool,
    /// LOCK, f0.
    lock: bool,
    /// The last of f2 and f3, or 0.
    rep: u8,
    /// The last FS or GS override byte (64, 65), or 0.
    segment: u8,
    /// REX prefix, or 0.
    rex: u8,
}

impl Prefixes {
    #[inline]
    fn w(self) -> bool {
        self.rex & 8 != 0
    }
    /// REX.R as bit 3 of a register number.
    #[inline]
    fn r(self) -> u8 {
        (self.rex & 4) << 1
    }
    /// REX.B as bit 3 of a register number.
    #[inline]
    fn b(self) -> u8 {
        (self.rex & 1) << 3
    }
    /// Size of a 16-, 32- or 64-bit operand, bytes.
    #[inline]
    fn size(self) -> u8 {
        if self.w() {
            8
        } else if self.opsize {
            2
        } else {
            4
        }
    }
}

/// A cursor over the instruction's bytes.
struct Bytes<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Bytes<'a> {
    #[inline]
    fn new(bytes: &'a [u8]) -> Self {
        let bytes = if bytes.len() > MAX_LEN {
            &bytes[..MAX_LEN]
        } else {
            bytes
        };
        Self { bytes, at: 0 }
    }

    #[inline]
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    #[inline]
    fn next(&mut self) -> Option<u8> {
        let byte = self.peek()?;
        self.at += 1;
        Some(byte)
    }

    /// Passes over `n` bytes that must be there.
    #[inline]
    fn skip(&mut self, n: usize) -> Option<()> {
        let at = self.at + n;
        if at > self.bytes.len() {
            return None;
        }
        self.at = at;
        Some(())
    }

    /// Bytes consumed.
    #[inline]
    fn len(&self) -> u8 {
        // At most MAX_LEN.
        #[allow(clippy::cast_possible_truncation, reason = "at most 15")]
        {
            self.at as u8
        }
    }

    /// Prefixes and the first opcode byte. A REX prefix counts only directly in
    /// front of the opcode; two of them are not accepted.
    #[inline]
    fn prefixes(&mut self) -> Option<(Prefixes, u8)> {
        let mut p = Prefixes::default();
        loop {
            let byte = self.next()?;
            match byte {
                0x40..=0x4f => {
                    if p.rex != 0 {
                        return None;
                    }
                    p.rex = byte;
                    continue;
                }
                0x66 => p.opsize = true,
                0x67 => p.addr32 = true,
                0xf0 => p.lock = true,
                0xf2 | 0xf3 => p.rep = byte,
                // ES, CS, SS and DS overrides are ignored in 64-bit mode.
                0x26 | 0x2e | 0x36 | 0x3e => {}
                0x64 | 0x65 => p.segment = byte,
                _ => return Some((p, byte)),
            }
            p.rex = 0;
        }
    }

    /// A ModRM byte with a memory operand and all that belongs to its address.
    /// Returns the `reg` field (0 to 7).
    #[inline]
    fn modrm_memory(&mut self) -> Option<u8> {
        let modrm = self.next()?;
        let (mode, rm) = (modrm >> 6, modrm & 7);
        if mode == 3 {
            return None;
        }
        let mut disp = match mode {
            1 => 1,
            2 => 4,
            _ if rm == 5 => 4, // RIP-relative
            _ => 0,
        };
        if rm == 4 {
            let sib = self.next()?;
            if mode == 0 && sib & 7 == 5 {
                disp = 4;
            }
        }
        self.skip(disp)?;
        Some(modrm >> 3 & 7)
    }

    /// A sign-extended immediate of 1, 2 or 4 bytes.
    #[inline]
    fn imm(&mut self, size: u8) -> Option<u64> {
        let at = self.at;
        self.skip(usize::from(size))?;
        let b = self.bytes.get(at..self.at)?;
        let value = match *b {
            [a] => i64::from(i8::from_le_bytes([a])),
            [a, b] => i64::from(i16::from_le_bytes([a, b])),
            [a, b, c, d] => i64::from(i32::from_le_bytes([a, b, c, d])),
            _ => return None,
        };
        Some(value.cast_unsigned())
    }
}
