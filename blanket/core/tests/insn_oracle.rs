//! The decoders against iced-x86: what they accept, iced decodes to the same
//! instruction, and what a generator of valid encodings makes, they accept.

mod insn_support;

use blanket_core::insn::{AluOp, PrivOp, PtOp, Reg, Src, decode_priv, decode_pt_write};
use insn_support::{check_priv, check_pt_write, iced};
use proptest::prelude::*;

const PREFIXES: [u8; 10] = [0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x26, 0x2e, 0x36, 0x64, 0x65];

/// Opcodes whose bytes lead somewhere in either decoder.
const OPCODES: [&[u8]; 44] = [
    &[0x00],
    &[0x01],
    &[0x08],
    &[0x11],
    &[0x19],
    &[0x20],
    &[0x29],
    &[0x30],
    &[0x38],
    &[0x80],
    &[0x81],
    &[0x83],
    &[0x86],
    &[0x87],
    &[0x88],
    &[0x89],
    &[0xc6],
    &[0xc7],
    &[0xf6],
    &[0xf7],
    &[0xfe],
    &[0xff],
    &[0x0f, 0xab],
    &[0x0f, 0xb3],
    &[0x0f, 0xbb],
    &[0x0f, 0xba],
    &[0x0f, 0xb0],
    &[0x0f, 0xb1],
    &[0x0f, 0xc0],
    &[0x0f, 0xc1],
    &[0x0f, 0xc3],
    &[0x0f, 0x01],
    &[0x0f, 0x09],
    &[0x0f, 0x20],
    &[0x0f, 0x22],
    &[0x0f, 0x23],
    &[0x6d],
    &[0x6e],
    &[0xcd],
    &[0xe5],
    &[0xe6],
    &[0xed],
    &[0xcf],
    &[0x0f, 0x0b],
];

fn likely_bytes() -> impl Strategy<Value = Vec<u8>> {
    (
        prop::collection::vec(prop::sample::select(&PREFIXES[..]), 0..3),
        prop::option::of(0x40u8..0x50),
        prop::sample::select(&OPCODES[..]),
        prop::collection::vec(any::<u8>(), 0..12),
    )
        .prop_map(|(prefixes, rex, opcode, rest)| {
            let mut v = prefixes;
            v.extend(rex);
            v.extend(opcode);
            v.extend(rest);
            v
        })
}

/// A memory operand: ModRM (with `field` in reg), SIB, displacement.
fn memory_operand(field: u8) -> impl Strategy<Value = Vec<u8>> {
    (0u8..3, 0u8..8, any::<u8>(), any::<[u8; 4]>()).prop_map(move |(mode, rm, sib, disp)| {
        let mut v = vec![mode << 6 | field << 3 | rm];
        if rm == 4 {
            v.push(sib);
        }
        let n = match mode {
            1 => 1,
            2 => 4,
            _ if rm == 5 || rm == 4 && sib & 7 == 5 => 4,
            _ => 0,
        };
        v.extend(&disp[..n]);
        v
    })
}

/// Immediate bytes after a form's memory operand.
#[derive(Clone, Copy, Debug)]
enum Imm {
    None,
    Byte,
    Operand,
}

/// Opcode, fixed reg field, immediate, LOCK allowed, 16-bit allowed.
type Form = (Vec<u8>, Option<u8>, Imm, bool, bool);

/// Every form that the core promises to emulate.
fn pt_forms() -> Vec<Form> {
    let mut v = Vec::new();
    for base in [0x00u8, 0x08, 0x10, 0x18, 0x20, 0x28, 0x30] {
        for byte in [base, base + 1] {
            v.push((vec![byte], None, Imm::None, true, true));
        }
    }
    for field in 0..7 {
        v.push((vec![0x80], Some(field), Imm::Byte, true, true));
        v.push((vec![0x81], Some(field), Imm::Operand, true, true));
        v.push((vec![0x83], Some(field), Imm::Byte, true, true));
    }
    for byte in [0x86, 0x87] {
        v.push((vec![byte], None, Imm::None, true, true));
    }
    for byte in [0x88, 0x89] {
        v.push((vec![byte], None, Imm::None, false, true));
    }
    v.push((vec![0xc6], Some(0), Imm::Byte, false, true));
    v.push((vec![0xc7], Some(0), Imm::Operand, false, true));
    for byte in [0xf6, 0xf7] {
        v.push((vec![byte], Some(2), Imm::None, true, true));
        v.push((vec![byte], Some(3), Imm::None, true, true));
    }
    for byte in [0xfe, 0xff] {
        v.push((vec![byte], Some(0), Imm::None, true, true));
        v.push((vec![byte], Some(1), Imm::None, true, true));
    }
    for byte in [0xab, 0xb3, 0xbb, 0xb0, 0xb1, 0xc0, 0xc1] {
        v.push((vec![0x0f, byte], None, Imm::None, true, true));
    }
    for field in 5..8 {
        v.push((vec![0x0f, 0xba], Some(field), Imm::Byte, true, true));
    }
    v.push((vec![0x0f, 0xc3], None, Imm::None, false, false));
    v
}

fn valid_pt_write() -> impl Strategy<Value = Vec<u8>> {
    (
        prop::sample::select(pt_forms()),
        0u8..8,
        any::<bool>(),
        any::<bool>(),
        prop::option::of(prop::sample::select(vec![
            0x26u8, 0x2e, 0x36, 0x3e, 0x64, 0x65,
        ])),
        prop::option::of(0x40u8..0x50),
        any::<[u8; 4]>(),
    )
        .prop_flat_map(
            |((opcode, fixed, imm, lockable, word), field, lock, small, seg, rex, i)| {
                memory_operand(fixed.unwrap_or(field)).prop_map(move |operand| {
                    let small = small && word;
                    let mut v = Vec::new();
                    if small {
                        v.push(0x66);
                    }
                    v.extend(seg);
                    if lock && lockable {
                        v.push(0xf0);
                    }
                    v.extend(rex);
                    v.extend(&opcode);
                    v.extend(&operand);
                    let n = match imm {
                        Imm::None => 0,
                        Imm::Byte => 1,
                        Imm::Operand if small && rex.is_none_or(|r| r & 8 == 0) => 2,
                        Imm::Operand => 4,
                    };
                    v.extend(&i[..n]);
                    v
                })
            },
        )
}

fn valid_priv() -> impl Strategy<Value = Vec<u8>> {
    let fixed: Vec<Vec<u8>> = [
        &[0x0f, 0x30][..],
        &[0x0f, 0x32],
        &[0x0f, 0x33],
        &[0x0f, 0x31],
        &[0x0f, 0x01, 0xf9],
        &[0x0f, 0xa2],
        &[0x0f, 0x06],
        &[0xf4],
        &[0x0f, 0x09],
        &[0xf3, 0x0f, 0x09],
        &[0x0f, 0x08],
        &[0xfa],
        &[0xfb],
        &[0xec],
        &[0xed],
        &[0x66, 0xed],
        &[0xee],
        &[0xef],
        &[0x66, 0xef],
        &[0x6c],
        &[0xf3, 0x6d],
        &[0x66, 0x6d],
        &[0x6e],
        &[0xf3, 0x6f],
        &[0x65, 0x6e],
        &[0x0f, 0x01, 0xd1],
        &[0x0f, 0x01, 0xf8],
        &[0x0f, 0x07],
        &[0x48, 0x0f, 0x07],
        &[0xcf],
        &[0x48, 0xcf],
        &[0x0f, 0x0b],
        &[0x0f, 0x01, 0x38],
        &[0x41, 0x0f, 0x01, 0x7d, 0x10],
        &[0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x0f, 0xa2],
    ]
    .iter()
    .map(|s| s.to_vec())
    .collect();
    prop_oneof![
        prop::sample::select(fixed),
        (
            prop::sample::select(vec![0xcdu8, 0xe4, 0xe5, 0xe6, 0xe7]),
            any::<u8>()
        )
            .prop_map(|(op, imm)| vec![op, imm]),
        (
            any::<bool>(),
            prop::sample::select(vec![0u8, 2, 3, 4, 8]),
            0u8..16
        )
            .prop_map(|(to, cr, gpr)| vec![
                0x40 | cr >> 3 << 2 | gpr >> 3,
                0x0f,
                if to { 0x22 } else { 0x20 },
                0xc0 | (cr & 7) << 3 | gpr & 7,
            ]),
        (any::<bool>(), 0u8..8, 0u8..16).prop_map(|(to, dr, gpr)| vec![
            0x40 | gpr >> 3,
            0x0f,
            if to { 0x23 } else { 0x21 },
            0xc0 | dr << 3 | gpr & 7,
        ]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..20)) {
        check_pt_write(&bytes);
        check_priv(&bytes);
    }

    #[test]
    fn likely(bytes in likely_bytes()) {
        check_pt_write(&bytes);
        check_priv(&bytes);
    }

    #[test]
    fn valid_page_table_writes_are_accepted(bytes in valid_pt_write()) {
        let i = iced(&bytes);
        prop_assert!(!i.is_invalid(), "{:02x?}", bytes);
        let ours = decode_pt_write(&bytes);
        prop_assert!(ours.is_some(), "{:02x?}: {}", bytes, i);
        check_pt_write(&bytes);
        // Every shorter prefix of it is cut off and must not be taken.
        for n in 0..bytes.len() {
            prop_assert_eq!(decode_pt_write(&bytes[..n]), None);
        }
    }

    #[test]
    fn valid_privileged_instructions_are_accepted(bytes in valid_priv()) {
        prop_assert!(decode_priv(&bytes).is_some(), "{:02x?}", bytes);
        check_priv(&bytes);
    }
}

#[test]
fn instructions_seen_in_kernels() {
    // xchg %rax,(%rdi); lock andb $0xfd,(%rdi): the two that a stock 6.1 kernel needs.
    let w = decode_pt_write(&[0x48, 0x87, 0x07]).unwrap();
    assert_eq!((w.len, w.size), (3, 8));
    assert_eq!(
        w.op,
        PtOp::Xchg(Reg {
            num: 0,
            high: false
        })
    );
    let w = decode_pt_write(&[0xf0, 0x80, 0x27, 0xfd]).unwrap();
    assert_eq!((w.len, w.size), (4, 1));
    assert_eq!(w.op, PtOp::Alu(AluOp::And, Src::Imm(0xffff_ffff_ffff_fffd)));
}

#[test]
fn what_cannot_execute_is_refused() {
    for bytes in [
        &[0xf0u8, 0x48, 0x89, 0x07][..], // lock mov
        &[0x48, 0x89, 0xc7],             // register operand
        &[0x48, 0x39, 0x07],             // cmp does not write
        &[0x66, 0x0f, 0xc3, 0x07],       // movnti, 16 bits
        &[0xf3, 0x48, 0xab],             // rep stos
        &[0xc6, 0xf8, 0x00],             // xabort
        &[0x48; 15],
        &[0x66; 40],
        &[],
    ] {
        assert_eq!(decode_pt_write(bytes), None, "{bytes:02x?}");
    }
    // Fifteen bytes are the most, prefixes included.
    let mut long = vec![0x2e; 12];
    long.extend([0x48, 0x89, 0x07]);
    assert_eq!(decode_pt_write(&long).unwrap().len, 15);
    long.insert(0, 0x2e);
    assert_eq!(decode_pt_write(&long), None);
}

#[test]
fn the_emulation_prefix_is_exact() {
    let forced = [0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x0f, 0xa2];
    assert_eq!(decode_priv(&forced), Some((PrivOp::ForcedCpuid, 7)));
    assert_eq!(decode_priv(&forced[..6]), Some((PrivOp::Ud2, 2)));
    let mut other = forced;
    other[6] = 0x31;
    assert_eq!(decode_priv(&other), Some((PrivOp::Ud2, 2)));
    let mut prefixed = vec![0x2e];
    prefixed.extend(forced);
    assert_eq!(decode_priv(&prefixed), Some((PrivOp::Ud2, 3)));
}
