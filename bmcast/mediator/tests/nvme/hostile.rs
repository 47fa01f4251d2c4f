//! A guest that keeps to nothing: any access to any register, any bytes in its queues.

use super::controller::*;
use super::world::World;

const REGISTERS: [u32; 12] = [
    CC, CSTS, 0x20, AQA, ASQ, 0x2c, ACQ, 0x34, 0x38, CMBSZ, 0x50, 0x54,
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

/// A guest that does what the bytes say. Nothing panics, nothing is written outside the guest's memory, and what
/// passes is told once: the rest is what the guest deserves. After a reset all is as it should be.
pub fn run(bytes: &[u8]) {
    let mut bytes = Bytes(bytes);
    let mut world = World::new(1, 4);
    world.start((8, 8), 2, 8);
    world.device.is_strict = false;
    let mut tails = [0u32; 4];
    while !bytes.0.is_empty() {
        let what = bytes.byte();
        let queue = u32::from(what >> 4) % 4;
        match what % 16 {
            0..=5 => {
                // A command, almost as it should be.
                let codes: &[u8] = if queue == 0 {
                    &[0, 1, 4, 5, 6, 6, 8, 9, 10, 2, 12, 0x7c, 0x80]
                } else {
                    &[0, 1, 1, 2, 2, 5, 8, 9, 9, 0x0c, 0x7d]
                };
                let mut entry = [0; 64];
                entry[0] = codes[usize::from(bytes.byte()) % codes.len()];
                entry[2] = bytes.byte() % 16;
                entry[4] = bytes.byte() % 3;
                entry[25] = bytes.byte();
                entry[26] = bytes.byte() % 0x90;
                entry[34] = 5;
                entry[40] = bytes.byte();
                entry[41] = bytes.byte() % 2;
                entry[42] = bytes.byte() % 16;
                entry[44] = bytes.byte() % 8;
                entry[46] = bytes.byte() % 4;
                if queue != 0 {
                    entry[42] = 0;
                    entry[48] = entry[46] * 5;
                }
                let tail = &mut tails[usize::try_from(queue).unwrap()];
                let base = if queue == 0 {
                    0x1000
                } else {
                    0x1_0000 + queue * 0x8000
                };
                let at = usize::try_from(base + *tail * 64).unwrap();
                world.device.memory[at..at + 64].copy_from_slice(&entry);
                *tail = (*tail + 1) % 8;
                let tail = *tail;
                world.write(0x1000 + queue * 8, tail);
            }
            6 => {
                // Anything in a queue.
                let at = 0x1000 + usize::try_from(bytes.word() % 0x3_0000).unwrap();
                let value = bytes.word();
                world.device.memory[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
            7 => {
                let register = REGISTERS[usize::from(bytes.byte()) % REGISTERS.len()];
                let value = bytes.word();
                world.write(register, value);
            }
            8 => {
                let width = [1, 2, 4, 8][usize::from(what >> 4) % 4];
                let offset = bytes.word() & 0x1fff;
                let value = u64::from(bytes.word());
                world.write_width(offset, width, value << 32 | value);
            }
            9 => {
                let width = [1, 2, 4, 8][usize::from(what >> 4) % 4];
                let value = world.read_width(bytes.word() & 0x1fff, width);
                assert!(width == 8 || value >> (8 * u32::from(width)) == 0);
            }
            10 => {
                let head = u32::from(bytes.byte());
                world.write(0x1004 + queue * 8, head);
            }
            11 => {
                for _ in 0..4 {
                    world.device.step(bytes.byte().into(), false);
                }
            }
            12 => world.blocks.fetched(),
            13 => world.device.pass(u64::from(bytes.word() & 0xffff)),
            14 if what & 0x80 != 0 => {
                tails = [0; 4];
                world.write(CC, 0);
                for _ in 0..20 {
                    world.read(CSTS);
                }
                world.write(CC, 0x46_0001);
            }
            _ => world.poll(),
        }
    }
    world.disable();
    world.device.is_strict = true;
    world.device.guests.fill(false);
    world.start((32, 32), 2, 8);
    for n in 0..50_000 {
        if world.blocks.complete() && world.leave() {
            return;
        }
        world.device.pass(10_000);
        world.turn(n);
    }
    panic!("never installed");
}
