//! Privileged and sensitive instructions that fault at CPL 3.

use super::Bytes;
use blanket_abi::xen::cpuid::EMULATE_PREFIX;

/// An I/O port operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    /// In the instruction.
    Imm(u8),
    /// In dx.
    Dx,
}

/// A decoded instruction. `gpr` counts rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8
/// to r15; `size` is in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "mnemonics and the operand names above")]
pub enum PrivOp {
    Wrmsr,
    Rdmsr,
    Rdpmc,
    Rdtsc,
    Rdtscp,
    /// Plain cpuid: faults only with CPUID faulting on.
    Cpuid,
    /// cpuid behind Xen's forced-emulation prefix.
    ForcedCpuid,
    /// mov gpr, crN
    MovFromCr {
        cr: u8,
        gpr: u8,
    },
    /// mov crN, gpr
    MovToCr {
        cr: u8,
        gpr: u8,
    },
    /// mov gpr, drN
    MovFromDr {
        dr: u8,
        gpr: u8,
    },
    /// mov drN, gpr
    MovToDr {
        dr: u8,
        gpr: u8,
    },
    Clts,
    Hlt,
    /// wbinvd and wbnoinvd.
    Wbinvd,
    Invd,
    Cli,
    Sti,
    In {
        port: Port,
        size: u8,
    },
    Out {
        port: Port,
        size: u8,
    },
    /// ins to \[rdi\]; with `addr32` to \[edi\].
    Ins {
        size: u8,
        rep: bool,
        addr32: bool,
    },
    /// outs from \[rsi\]; with `addr32` from \[esi\]; `segment` is the override
    /// byte (64 for FS, 65 for GS) or 0.
    Outs {
        size: u8,
        rep: bool,
        addr32: bool,
        segment: u8,
    },
    Xsetbv,
    /// int n, the two-byte form.
    Int(u8),
    Invlpg,
    Swapgs,
    /// sysretl and sysretq.
    Sysret,
    /// iretw, iretl and iretq.
    Iret,
    Ud2,
}

/// Decodes an instruction that raised #GP or #UD in the guest, and its length in
/// bytes. `None` for all that the core does not know by name.
#[must_use]
pub fn decode_priv(bytes: &[u8]) -> Option<(PrivOp, u8)> {
    let mut b = Bytes::new(bytes);
    let (p, opcode) = b.prefixes()?;
    if p.lock {
        return None;
    }
    // Size of an I/O operand: there is no 64-bit one, and REX.W beats 66.
    let io_size = |opcode: u8| match (opcode & 1 != 0, p.opsize && !p.w()) {
        (false, _) => 1,
        (true, true) => 2,
        (true, false) => 4,
    };
    let plain = p.rep == 0;
    let op = match opcode {
        0x6c | 0x6d => PrivOp::Ins {
            size: io_size(opcode),
            rep: p.rep != 0,
            addr32: p.addr32,
        },
        0x6e | 0x6f => PrivOp::Outs {
            size: io_size(opcode),
            rep: p.rep != 0,
            addr32: p.addr32,
            segment: if p.segment & 0xfe == 0x64 {
                p.segment
            } else {
                0
            },
        },
        0xcd if plain => PrivOp::Int(b.next()?),
        0xcf if plain => PrivOp::Iret,
        0xe4 | 0xe5 if plain => PrivOp::In {
            port: Port::Imm(b.next()?),
            size: io_size(opcode),
        },
        0xe6 | 0xe7 if plain => PrivOp::Out {
            port: Port::Imm(b.next()?),
            size: io_size(opcode),
        },
        0xec | 0xed if plain => PrivOp::In {
            port: Port::Dx,
            size: io_size(opcode),
        },
        0xee | 0xef if plain => PrivOp::Out {
            port: Port::Dx,
            size: io_size(opcode),
        },
        0xf4 if plain => PrivOp::Hlt,
        0xfa if plain => PrivOp::Cli,
        0xfb if plain => PrivOp::Sti,
        0x0f => {
            let second = b.next()?;
            // f3 0f 09 is wbnoinvd; otherwise 66, f2 and f3 select other
            // instructions or do nothing, and no kernel emits them.
            if p.opsize || !(plain || p.rep == 0xf3 && second == 0x09) {
                return None;
            }
            match second {
                0x01 => system(&mut b)?,
                0x06 => PrivOp::Clts,
                0x07 => PrivOp::Sysret,
                0x08 => PrivOp::Invd,
                0x09 => PrivOp::Wbinvd,
                0x0b => ud2(&mut b),
                0x20..=0x23 => {
                    // mod is ignored: the operand is a register whatever it says.
                    let modrm = b.next()?;
                    let special = modrm >> 3 & 7 | p.r();
                    let gpr = modrm & 7 | p.b();
                    let to = second & 2 != 0;
                    if second & 1 == 0 {
                        let cr = special;
                        if !matches!(cr, 0 | 2 | 3 | 4 | 8) {
                            return None;
                        }
                        if to {
                            PrivOp::MovToCr { cr, gpr }
                        } else {
                            PrivOp::MovFromCr { cr, gpr }
                        }
                    } else {
                        let dr = special;
                        if dr > 7 {
                            return None;
                        }
                        if to {
                            PrivOp::MovToDr { dr, gpr }
                        } else {
                            PrivOp::MovFromDr { dr, gpr }
                        }
                    }
                }
                0x30 => PrivOp::Wrmsr,
                0x31 => PrivOp::Rdtsc,
                0x32 => PrivOp::Rdmsr,
                0x33 => PrivOp::Rdpmc,
                0xa2 => PrivOp::Cpuid,
                _ => return None,
            }
        }
        _ => return None,
    };
    Some((op, b.len()))
}

/// The part of opcode 0f 01 that is known here.
#[inline]
fn system(b: &mut Bytes<'_>) -> Option<PrivOp> {
    Some(match b.peek()? {
        modrm if modrm >> 6 != 3 => {
            if b.modrm_memory()? != 7 {
                return None;
            }
            return Some(PrivOp::Invlpg);
        }
        0xd1 => {
            b.next()?;
            PrivOp::Xsetbv
        }
        0xf8 => {
            b.next()?;
            PrivOp::Swapgs
        }
        0xf9 => {
            b.next()?;
            PrivOp::Rdtscp
        }
        _ => return None,
    })
}

/// ud2, or the whole of Xen's emulation prefix with cpuid behind it. The prefix
/// is these exact bytes; a ud2 with prefixes of its own does not start it.
#[inline]
fn ud2(b: &mut Bytes<'_>) -> PrivOp {
    const FORCED: [u8; 7] = {
        let [a, b, c, d, e] = EMULATE_PREFIX;
        [a, b, c, d, e, 0x0f, 0xa2]
    };
    if b.at == 2 && b.bytes.starts_with(&FORCED) {
        b.at = FORCED.len();
        PrivOp::ForcedCpuid
    } else {
        PrivOp::Ud2
    }
}
