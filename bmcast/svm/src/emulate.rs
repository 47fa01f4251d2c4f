//! One instruction that accesses a device's register.

use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

use crate::Registers;

/// The register of a device that an instruction accesses: its one operand in memory.
pub trait Bus {
    /// Reads `width` (1, 2, 4 or 8) bytes.
    fn load(&mut self, width: u8) -> u64;
    /// Writes them.
    fn store(&mut self, width: u8, value: u64);
}

/// An instruction that is not done here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Cannot {
    /// No instruction, or not all of it.
    #[error("no whole instruction")]
    Decode,
    /// None that drivers use on registers of devices.
    #[error("{0:?} on a device's register is not emulated")]
    Unknown(Mnemonic),
}

const CARRY: u64 = 1;
const PARITY: u64 = 1 << 2;
const ADJUST: u64 = 1 << 4;
const ZERO: u64 = 1 << 6;
const SIGN: u64 = 1 << 7;
const OVERFLOW: u64 = 1 << 11;

/// Executes the instruction in `bytes` (of code of `bits` bits: 16, 32 or 64), whose memory operand is `bus`; its
/// length. Nothing is changed when it cannot.
pub fn emulate(
    bytes: &[u8],
    bits: u32,
    registers: &mut Registers,
    rflags: &mut u64,
    bus: &mut impl Bus,
) -> Result<u8, Cannot> {
    let mut decoder = Decoder::new(bits, bytes, DecoderOptions::NONE);
    let instruction = decoder.decode();
    if instruction.is_invalid() {
        return Err(Cannot::Decode);
    }
    let unknown = Cannot::Unknown(instruction.mnemonic());
    if instruction.op_count() != 2 || instruction.has_rep_prefix() || instruction.has_repne_prefix()
    {
        return Err(unknown);
    }
    let memory_first = instruction.op0_kind() == OpKind::Memory;
    if !memory_first && instruction.op1_kind() != OpKind::Memory {
        return Err(unknown);
    }
    let width = u8::try_from(instruction.memory_size().size()).map_err(|_| unknown)?;
    if !matches!(width, 1 | 2 | 4 | 8) {
        return Err(unknown);
    }
    let other = if memory_first { 1 } else { 0 };
    if other_register(&instruction, other).is_some_and(|register| !register.is_gpr()) {
        return Err(unknown);
    }
    match instruction.mnemonic() {
        Mnemonic::Mov | Mnemonic::Movnti if memory_first => {
            bus.store(width, operand(&instruction, other, registers));
        }
        Mnemonic::Mov | Mnemonic::Movzx => {
            let value = bus.load(width);
            assign(registers, instruction.op0_register(), value);
        }
        Mnemonic::Movsx | Mnemonic::Movsxd => {
            let shift = 64 - u32::from(width) * 8;
            let signed = (bus.load(width) << shift).cast_signed() >> shift;
            assign(
                registers,
                instruction.op0_register(),
                signed.cast_unsigned(),
            );
        }
        Mnemonic::Xchg => {
            let register = other_register(&instruction, other).ok_or(unknown)?;
            let new = value_of(registers, register);
            let old = bus.load(width);
            bus.store(width, new);
            assign(registers, register, old);
        }
        mnemonic @ (Mnemonic::And
        | Mnemonic::Or
        | Mnemonic::Xor
        | Mnemonic::Add
        | Mnemonic::Sub
        | Mnemonic::Cmp
        | Mnemonic::Test) => {
            let memory = bus.load(width);
            let other_value = operand(&instruction, other, registers);
            let (left, right) = if memory_first {
                (memory, other_value)
            } else {
                (other_value, memory)
            };
            let result = arithmetic(mnemonic, left, right, width, rflags);
            if !matches!(mnemonic, Mnemonic::Cmp | Mnemonic::Test) {
                if memory_first {
                    bus.store(width, result);
                } else {
                    assign(registers, instruction.op0_register(), result);
                }
            }
        }
        _ => return Err(unknown),
    }
    u8::try_from(instruction.len()).map_err(|_| unknown)
}

fn other_register(instruction: &Instruction, operand: u32) -> Option<Register> {
    (instruction.op_kind(operand) == OpKind::Register).then(|| instruction.op_register(operand))
}

/// A register's or an immediate's value.
fn operand(instruction: &Instruction, operand: u32, registers: &Registers) -> u64 {
    match other_register(instruction, operand) {
        Some(register) => value_of(registers, register),
        None => instruction.immediate(operand),
    }
}

/// Its number, and by how many bits its value is shifted there.
fn place(register: Register) -> (usize, u32) {
    let shift = match register {
        Register::AH | Register::BH | Register::CH | Register::DH => 8,
        _ => 0,
    };
    (register.full_register().number() & 15, shift)
}

fn mask(width: u64) -> u64 {
    if width >= 8 {
        u64::MAX
    } else {
        (1 << (width * 8)) - 1
    }
}

fn size_of(register: Register) -> u64 {
    u64::try_from(register.size()).unwrap_or(8)
}

fn value_of(registers: &Registers, register: Register) -> u64 {
    let (number, shift) = place(register);
    registers[number] >> shift & mask(size_of(register))
}

/// Writes a register as an instruction does: 32 bits clear the upper half, 8 and 16 leave the rest.
fn assign(registers: &mut Registers, register: Register, value: u64) {
    let (number, shift) = place(register);
    let mask = mask(size_of(register));
    registers[number] = match register.size() {
        4 | 8 => value & mask,
        _ => registers[number] & !(mask << shift) | (value & mask) << shift,
    };
}

fn arithmetic(mnemonic: Mnemonic, left: u64, right: u64, width: u8, rflags: &mut u64) -> u64 {
    let mask = mask(u64::from(width));
    let sign = 1 << (u32::from(width) * 8 - 1);
    let (left, right) = (left & mask, right & mask);
    let (result, carry, overflow, adjust) = match mnemonic {
        Mnemonic::Add => {
            let sum = left.wrapping_add(right) & mask;
            let overflow = !(left ^ right) & (left ^ sum) & sign != 0;
            (sum, sum < left, overflow, (left ^ right ^ sum) & 16 != 0)
        }
        Mnemonic::Sub | Mnemonic::Cmp => {
            let difference = left.wrapping_sub(right) & mask;
            let overflow = (left ^ right) & (left ^ difference) & sign != 0;
            let adjust = (left ^ right ^ difference) & 16 != 0;
            (difference, left < right, overflow, adjust)
        }
        Mnemonic::And | Mnemonic::Test => (left & right, false, false, false),
        Mnemonic::Or => (left | right, false, false, false),
        _ => (left ^ right, false, false, false),
    };
    *rflags &= !(CARRY | PARITY | ADJUST | ZERO | SIGN | OVERFLOW);
    let even = (result & 0xff).count_ones() % 2 == 0;
    for (flag, set) in [
        (CARRY, carry),
        (PARITY, even),
        (ADJUST, adjust),
        (ZERO, result == 0),
        (SIGN, result & sign != 0),
        (OVERFLOW, overflow),
    ] {
        if set {
            *rflags |= flag;
        }
    }
    result
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    #[derive(Default)]
    struct Device {
        value: u64,
        loads: Vec<u8>,
        stores: Vec<(u8, u64)>,
    }

    impl Bus for Device {
        fn load(&mut self, width: u8) -> u64 {
            self.loads.push(width);
            self.value & mask(u64::from(width))
        }
        fn store(&mut self, width: u8, value: u64) {
            self.stores.push((width, value & mask(u64::from(width))));
        }
    }

    fn run(bytes: &[u8], value: u64) -> (Registers, u64, Device, Result<u8, Cannot>) {
        let mut registers = [0; 16];
        for (number, register) in (0..).zip(registers.iter_mut()) {
            *register = 0x1111_2222_3333_4400 + number;
        }
        let mut rflags = 2;
        let mut device = Device {
            value,
            ..Device::default()
        };
        let length = emulate(bytes, 64, &mut registers, &mut rflags, &mut device);
        (registers, rflags, device, length)
    }

    #[test]
    fn loads() {
        // mov (%rdi),%eax: the upper half is cleared.
        let (registers, _, device, length) = run(&[0x8b, 0x07], 0xffff_ffff_8765_4321);
        assert_eq!((registers[0], length), (0x8765_4321, Ok(2)));
        assert_eq!(device.loads, [4]);
        // movzbl 8(%rsi),%r9d; movsbq (%rdi),%rcx; mov (%rdi),%ah.
        assert_eq!(run(&[0x44, 0x0f, 0xb6, 0x4e, 8], 0xf0).0[9], 0xf0);
        assert_eq!(
            run(&[0x48, 0x0f, 0xbe, 0x0f], 0xf0).0[1],
            0xffff_ffff_ffff_fff0
        );
        assert_eq!(run(&[0x8a, 0x27], 0xab).0[0], 0x1111_2222_3333_ab00);
        // mov (%rdi),%ax leaves the rest.
        assert_eq!(run(&[0x66, 0x8b, 0x07], 0xabcd).0[0], 0x1111_2222_3333_abcd);
        // mov 0xfee00020,%eax by its absolute address.
        let absolute = [0xa1, 0x20, 0, 0xe0, 0xfe, 0, 0, 0, 0];
        assert_eq!(run(&absolute, 7).0[0], 7);
    }

    #[test]
    fn stores() {
        // mov %esi,(%rdi); movl $0x80,0x30(%rcx); mov %sil,(%rdi).
        assert_eq!(run(&[0x89, 0x37], 0).2.stores, [(4, 0x3333_4406)]);
        let immediate = run(&[0xc7, 0x41, 0x30, 0x80, 0, 0, 0], 0);
        assert_eq!(
            (immediate.2.stores, immediate.3),
            (std::vec![(4, 0x80)], Ok(7))
        );
        assert_eq!(run(&[0x40, 0x88, 0x37], 0).2.stores, [(1, 6)]);
    }

    #[test]
    fn read_modify_write() {
        // orl $2,(%rdi); testl $1,(%rdi); cmp %eax,(%rdi); xchg %eax,(%rdi).
        assert_eq!(run(&[0x83, 0x0f, 2], 0x10).2.stores, [(4, 0x12)]);
        let (_, rflags, device, _) = run(&[0xf7, 0x07, 1, 0, 0, 0], 2);
        assert!(rflags & ZERO != 0 && device.stores.is_empty());
        let (_, rflags, ..) = run(&[0x39, 0x07], 0x3333_4400);
        assert!(rflags & ZERO != 0);
        let (_, rflags, ..) = run(&[0x39, 0x07], 0);
        assert!(rflags & CARRY != 0);
        let (registers, _, device, _) = run(&[0x87, 0x07], 5);
        assert_eq!(
            (registers[0], device.stores),
            (5, std::vec![(4, 0x3333_4400)])
        );
    }

    #[test]
    fn what_it_cannot() {
        // rep stosl; movaps; nothing; half an instruction.
        assert!(matches!(run(&[0xf3, 0xab], 0).3, Err(Cannot::Unknown(_))));
        assert!(matches!(
            run(&[0x0f, 0x28, 0x07], 0).3,
            Err(Cannot::Unknown(_))
        ));
        assert_eq!(run(&[], 0).3, Err(Cannot::Decode));
        assert_eq!(run(&[0x48], 0).3, Err(Cannot::Decode));
    }

    proptest! {
        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..16), bits in prop::sample::select(&[16, 32, 64]), value: u64) {
            let mut registers = [7; 16];
            let mut rflags = 2;
            let mut device = Device { value, ..Device::default() };
            let result = emulate(&bytes, bits, &mut registers, &mut rflags, &mut device);
            if let Ok(length) = result {
                prop_assert!(usize::from(length) <= bytes.len());
                prop_assert!(device.loads.len() + device.stores.len() >= 1);
            } else {
                prop_assert_eq!(registers, [7; 16]);
                prop_assert!(device.loads.is_empty() && device.stores.is_empty());
            }
        }
    }
}
