//! iced-x86 as the oracle of the decoders, for tests and fuzzing.

use blanket_core::insn::{
    AluOp, BitOp, Port, PrivOp, PtOp, PtWrite, Reg, Src, decode_priv, decode_pt_write,
};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

/// What iced makes of the bytes, in 64-bit mode.
pub fn iced(bytes: &[u8]) -> Instruction {
    Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE).decode()
}

fn reg(r: Register) -> Reg {
    match r {
        Register::AH => Reg { num: 0, high: true },
        Register::CH => Reg { num: 1, high: true },
        Register::DH => Reg { num: 2, high: true },
        Register::BH => Reg { num: 3, high: true },
        r => Reg {
            num: u8::try_from(r.full_register().number()).unwrap(),
            high: false,
        },
    }
}

/// The second operand of a two-operand instruction.
fn source(i: &Instruction) -> Src {
    match i.op1_kind() {
        OpKind::Register => Src::Reg(reg(i.op1_register())),
        _ => Src::Imm(i.immediate(1)),
    }
}

fn second_reg(i: &Instruction) -> Reg {
    match source(i) {
        Src::Reg(r) => r,
        Src::Imm(_) => panic!("register expected: {i}"),
    }
}

/// What iced makes of a page-table write, in our words; `None` if it is none.
fn expected_pt_write(i: &Instruction) -> Option<PtWrite> {
    if i.is_invalid() || i.op0_kind() != OpKind::Memory {
        return None;
    }
    let op = match i.mnemonic() {
        Mnemonic::Mov | Mnemonic::Movnti => PtOp::Mov(source(i)),
        Mnemonic::Xchg => PtOp::Xchg(second_reg(i)),
        Mnemonic::Cmpxchg => PtOp::Cmpxchg(second_reg(i)),
        Mnemonic::Xadd => PtOp::Xadd(second_reg(i)),
        Mnemonic::Add => PtOp::Alu(AluOp::Add, source(i)),
        Mnemonic::Or => PtOp::Alu(AluOp::Or, source(i)),
        Mnemonic::Adc => PtOp::Alu(AluOp::Adc, source(i)),
        Mnemonic::Sbb => PtOp::Alu(AluOp::Sbb, source(i)),
        Mnemonic::And => PtOp::Alu(AluOp::And, source(i)),
        Mnemonic::Sub => PtOp::Alu(AluOp::Sub, source(i)),
        Mnemonic::Xor => PtOp::Alu(AluOp::Xor, source(i)),
        Mnemonic::Bts => PtOp::Bit(BitOp::Set, source(i)),
        Mnemonic::Btr => PtOp::Bit(BitOp::Reset, source(i)),
        Mnemonic::Btc => PtOp::Bit(BitOp::Complement, source(i)),
        Mnemonic::Inc => PtOp::Inc,
        Mnemonic::Dec => PtOp::Dec,
        Mnemonic::Not => PtOp::Not,
        Mnemonic::Neg => PtOp::Neg,
        _ => return None,
    };
    Some(PtWrite {
        len: u8::try_from(i.len()).unwrap(),
        size: u8::try_from(i.memory_size().size()).unwrap(),
        op,
    })
}

/// Immediates of our decoder are sign-extended to 64 bits, iced's to the operand;
/// only the operand's bits count.
fn normal(mut w: PtWrite) -> PtWrite {
    let bits = if let PtOp::Bit(..) = w.op {
        8
    } else {
        u32::from(w.size) * 8
    };
    let mask = u64::MAX >> (64 - bits);
    if let PtOp::Mov(Src::Imm(imm)) | PtOp::Alu(_, Src::Imm(imm)) | PtOp::Bit(_, Src::Imm(imm)) =
        &mut w.op
    {
        *imm &= mask;
    }
    w
}

/// What [`decode_pt_write`] accepts, iced decodes to the same.
pub fn check_pt_write(bytes: &[u8]) {
    let Some(ours) = decode_pt_write(bytes) else {
        return;
    };
    let i = iced(bytes);
    let theirs =
        expected_pt_write(&i).unwrap_or_else(|| panic!("{bytes:02x?}: {ours:?}, iced {i}"));
    assert_eq!(normal(ours), normal(theirs), "{bytes:02x?}: {i}");
}

fn port(kind: OpKind, i: &Instruction) -> Port {
    match kind {
        OpKind::Register => Port::Dx,
        _ => Port::Imm(i.immediate8()),
    }
}

fn number(r: Register) -> u8 {
    u8::try_from(r.number()).unwrap()
}

fn expected_priv(i: &Instruction) -> Option<PrivOp> {
    let rep = i.has_rep_prefix() || i.has_repne_prefix();
    let io_size = |op: u32| match i.op_kind(op) {
        OpKind::Register => u8::try_from(i.op_register(op).size()).unwrap(),
        _ => u8::try_from(i.memory_size().size()).unwrap(),
    };
    Some(match i.mnemonic() {
        Mnemonic::Wrmsr => PrivOp::Wrmsr,
        Mnemonic::Rdmsr => PrivOp::Rdmsr,
        Mnemonic::Rdpmc => PrivOp::Rdpmc,
        Mnemonic::Rdtsc => PrivOp::Rdtsc,
        Mnemonic::Rdtscp => PrivOp::Rdtscp,
        Mnemonic::Cpuid => PrivOp::Cpuid,
        Mnemonic::Clts => PrivOp::Clts,
        Mnemonic::Hlt => PrivOp::Hlt,
        Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => PrivOp::Wbinvd,
        Mnemonic::Invd => PrivOp::Invd,
        Mnemonic::Cli => PrivOp::Cli,
        Mnemonic::Sti => PrivOp::Sti,
        Mnemonic::In => PrivOp::In {
            port: port(i.op1_kind(), i),
            size: io_size(0),
        },
        Mnemonic::Out => PrivOp::Out {
            port: port(i.op0_kind(), i),
            size: io_size(1),
        },
        Mnemonic::Insb | Mnemonic::Insw | Mnemonic::Insd => PrivOp::Ins {
            size: io_size(0),
            rep,
            addr32: i.op0_kind() == OpKind::MemoryESEDI,
        },
        Mnemonic::Outsb | Mnemonic::Outsw | Mnemonic::Outsd => PrivOp::Outs {
            size: io_size(1),
            rep,
            addr32: i.op1_kind() == OpKind::MemorySegESI,
            segment: match i.segment_prefix() {
                Register::FS => 0x64,
                Register::GS => 0x65,
                _ => 0,
            },
        },
        Mnemonic::Xsetbv => PrivOp::Xsetbv,
        Mnemonic::Int => PrivOp::Int(i.immediate8()),
        Mnemonic::Invlpg => PrivOp::Invlpg,
        Mnemonic::Swapgs => PrivOp::Swapgs,
        Mnemonic::Sysret | Mnemonic::Sysretq => PrivOp::Sysret,
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => PrivOp::Iret,
        Mnemonic::Ud2 => PrivOp::Ud2,
        Mnemonic::Mov => match i.code() {
            Code::Mov_r64_cr => PrivOp::MovFromCr {
                cr: number(i.op1_register()),
                gpr: number(i.op0_register()),
            },
            Code::Mov_cr_r64 => PrivOp::MovToCr {
                cr: number(i.op0_register()),
                gpr: number(i.op1_register()),
            },
            Code::Mov_r64_dr => PrivOp::MovFromDr {
                dr: number(i.op1_register()),
                gpr: number(i.op0_register()),
            },
            Code::Mov_dr_r64 => PrivOp::MovToDr {
                dr: number(i.op0_register()),
                gpr: number(i.op1_register()),
            },
            _ => return None,
        },
        _ => return None,
    })
}

/// What [`decode_priv`] accepts, iced decodes to the same.
pub fn check_priv(bytes: &[u8]) {
    let Some((ours, len)) = decode_priv(bytes) else {
        return;
    };
    if ours == PrivOp::ForcedCpuid {
        assert_eq!(&bytes[..7], [0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x0f, 0xa2]);
        assert_eq!(len, 7);
        return;
    }
    let i = iced(bytes);
    assert!(!i.is_invalid(), "{bytes:02x?}: {ours:?}");
    assert_eq!(Some(ours), expected_priv(&i), "{bytes:02x?}: {i}");
    assert_eq!(usize::from(len), i.len(), "{bytes:02x?}: {i}");
}
