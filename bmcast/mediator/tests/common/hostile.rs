//! A guest that keeps to nothing: any access to any register, any bytes in its lists and tables.

use super::World;
use super::hba::*;

const REGISTERS: [u32; 14] = [
    CLB, CLBU, FB, FBU, IS, IE, CMD, TFD, SCTL, SERR, SACT, CI, 0x40, 0x7c,
];

/// Takes numbers off the front; zeros when there are none left.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> u8 {
        self.0.split_off_first().copied().unwrap_or(0)
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes([self.byte(), self.byte(), self.byte(), self.byte()])
    }
}

/// A guest that does what the bytes say. Nothing panics, nothing is written outside the guest's memory, and the
/// VMM's commands write no sector that is not to be written: the rest is what the guest deserves.
pub fn run(bytes: &[u8]) {
    let mut bytes = Bytes(bytes);
    let mut world = World::new(bytes.byte() % 2);
    world.hba.eager = 3;
    world.hba.strict = false;
    world.start(bytes.byte() % 2 == 0);
    while !bytes.0.is_empty() {
        let what = bytes.byte();
        let port = world.port;
        match what % 16 {
            0..=3 => {
                // A command, almost as it should be.
                let slot = u32::from(bytes.byte() % 32);
                let codes = [
                    0x60, 0x61, 0xc8, 0xca, 0x25, 0x35, 0xea, 6, 0xec, 0xe5, 0x2f,
                ];
                let mut fis = [0; 20];
                fis[..2].copy_from_slice(&[0x27, 0x80]);
                fis[2] = codes[usize::from(what >> 4) % codes.len()];
                fis[3] = bytes.byte() % 32;
                fis[4] = bytes.byte();
                fis[7] = 0x40;
                let is_queued = fis[2] & !1 == 0x60;
                fis[12] = if is_queued {
                    u8::try_from(slot << 3).unwrap_or(0)
                } else {
                    fis[3] % 9
                };
                world.build(slot, fis, u32::from(bytes.byte()) * 64, 0);
                if is_queued {
                    world.write(SACT, 1 << slot);
                }
                world.write(CI, 1 << slot);
            }
            4 => {
                // Anything in a header or table.
                let at = if what & 0x80 == 0 { 0x1000 } else { 0x1_0000 };
                let at = at + (bytes.word() & 0xfff);
                let value = bytes.word();
                world.put(at, &value.to_le_bytes());
            }
            5 | 6 => {
                let register = REGISTERS[usize::from(what >> 4) % REGISTERS.len()];
                let value = bytes.word();
                world.write(register, value);
            }
            7 => {
                let value = bytes.word();
                let width = [1, 2, 4, 8][usize::from(what >> 4) % 4];
                let offset = if what & 0x80 == 0 {
                    port + u32::from(bytes.byte() & 0x7f)
                } else {
                    bytes.word() & 0xffff
                };
                world.write_width(offset, width, u64::from(value) << 16 | u64::from(value));
            }
            8 => {
                let width = [1, 2, 4, 8][usize::from(what >> 4) % 4];
                let offset = if what & 0x80 == 0 {
                    port + u32::from(bytes.byte() & 0x7f)
                } else {
                    bytes.word()
                };
                let value = world.read_width(offset, width);
                assert!(width == 8 || value >> (8 * u32::from(width)) == 0);
            }
            9 => world.write(CI, bytes.word()),
            10 => {
                world.hba.step(bytes.byte().into(), what & 0x80 != 0);
            }
            11 => world.blocks.fetched(),
            12 => world.hba.pass(u64::from(bytes.word()) & 0xf_ffff),
            13 => world.start(what & 0x80 != 0),
            14 => world.hba.plug(what & 0x80 != 0),
            _ => world.poll(),
        }
    }
    // By a reset of everything it is as if nothing had been.
    if world.hba.get(SSTS) == 0 {
        world.hba.plug(true);
    }
    world.write_global(GHC, 1);
    world.start(true);
    world.hba.pass(2_000_000);
    for n in 0..40_000 {
        if world.blocks.complete() && world.transparent() {
            return;
        }
        if world.hba.line() {
            world.handler();
        }
        world.world(n % 5);
        world.hba.pass(10_000);
    }
    panic!("never installed");
}
