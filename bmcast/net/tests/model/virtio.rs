//! virtio-net over PCI (virtio 1.2).

use super::{Config, Memory, Model};

#[derive(Default, Clone, Copy)]
pub struct Queue {
    pub size: u16,
    pub enabled: bool,
    rings: [u64; 3],
    seen: u16,
}

pub struct Virtio {
    pub config: Config,
    pub memory: Memory,
    pub features: u64,
    pub taken: u64,
    pub queues: [Queue; 2],
    pub status: u32,
    pub stuck: bool,
    up: bool,
    select: [u32; 3],
    notified: u32,
}

/// Above 4 GiB.
const BAR: u64 = 0xe0_0000_0000;
const NOTIFY: u64 = 0x3000;
const DEVICE: u64 = 0x2000;

impl Virtio {
    pub fn new(memory: Memory) -> Self {
        let mut config = Config([0; 64]);
        config.0[0] = 0x1000_1af4;
        config.0[1] = 1 << 20;
        config.0[8] = u32::try_from(BAR & 0xffff_ffff).unwrap() | 0xc;
        config.0[9] = u32::try_from(BAR >> 32).unwrap();
        config.0[0x34 / 4] = 0x84;
        // MSI-X first, then notifications, the device's own, an alternative that is not the preferred one, and common.
        let mut capability = |at: usize, words: &[u32]| {
            config.0[at / 4..at / 4 + words.len()].copy_from_slice(words);
        };
        capability(0x84, &[0x0003_9011]);
        capability(0x90, &[0x0214_a409, 4, 0x3000, 0x1000, 4]);
        capability(0xa4, &[0x0410_b409, 4, 0x2000, 0x1000]);
        capability(0xb4, &[0x0110_c409, 4, 0, 0x1000]);
        capability(0xc4, &[0x0110_0009, 2, 0x77, 0x1000]);
        Self {
            config,
            memory,
            features: 1 << 32 | 1 << 33 | 1 << 28 | 1 << 29 | 1 << 16 | 1 << 15 | 1 << 5 | 3,
            taken: 0,
            queues: [Queue {
                size: 1024,
                ..Queue::default()
            }; 2],
            status: 0,
            stuck: false,
            up: true,
            select: [0; 3],
            notified: 0,
        }
    }

    /// The next descriptor that the driver has given: its number, place and length.
    fn given(&mut self, index: usize) -> Option<(u16, u64, u32)> {
        let queue = &mut self.queues[index];
        if self.status & 4 == 0 || !queue.enabled || self.config.command() & 4 == 0 {
            return None;
        }
        let [descriptors, available, _] = queue.rings;
        assert_eq!(self.memory.get::<u16>(available), 1, "no interrupts");
        if self.memory.get::<u16>(available + 2) == queue.seen {
            return None;
        }
        let slot = u64::from(queue.seen % queue.size);
        queue.seen = queue.seen.wrapping_add(1);
        let id: u16 = self.memory.get(available + 4 + 2 * slot);
        let at = descriptors + 16 * u64::from(id);
        let flags: u16 = self.memory.get(at + 12);
        assert_eq!(flags, if index == 0 { 2 } else { 0 });
        Some((id, self.memory.get(at), self.memory.get(at + 8)))
    }

    pub fn used(&mut self, index: usize, id: u32, len: u32) {
        let queue = &self.queues[index];
        let used = queue.rings[2];
        let count: u16 = self.memory.get(used + 2);
        let slot = used + 4 + 8 * u64::from(count % queue.size);
        self.memory.set(slot, id);
        self.memory.set(slot + 4, len);
        self.memory.set(used + 2, count.wrapping_add(1));
    }
}

impl Model for Virtio {
    fn config(&mut self) -> &mut Config {
        &mut self.config
    }

    fn bar(&self) -> u64 {
        BAR
    }

    fn read(&mut self, offset: u64, width: u8) -> u32 {
        let queue = &self.queues[self.select[2] as usize & 1];
        match (offset, width) {
            (0x04, 4) => {
                u32::try_from(self.features >> (32 * self.select[0]) & 0xffff_ffff).unwrap()
            }
            (0x14, 1) => self.status,
            (0x18, 2) => queue.size.into(),
            (0x1c, 2) => queue.enabled.into(),
            (0x1e, 2) => self.select[2] + 5,
            (DEVICE..0x2006, 1) => [2, 0, 0, 7, 7, 7][usize::try_from(offset - DEVICE).unwrap()],
            (0x2006, 2) => self.up.into(),
            _ => panic!("{width} bytes are read at {offset:#x}"),
        }
    }

    fn write(&mut self, offset: u64, width: u8, value: u32) {
        let queue = &mut self.queues[self.select[2] as usize & 1];
        match (offset, width) {
            (0x00, 4) => self.select[0] = value,
            (0x08, 4) => self.select[1] = value,
            (0x0c, 4) => self.taken |= u64::from(value) << (32 * self.select[1]),
            (0x10 | 0x1a, 2) => assert_eq!(value, 0xffff, "no vector"),
            (0x14, 1) if value == 0 => {
                if !self.stuck {
                    self.status = 0;
                    self.taken = 0;
                    for queue in &mut self.queues {
                        queue.enabled = false;
                        queue.seen = 0;
                    }
                }
            }
            (0x14, 1) => {
                assert_eq!(value & self.status, self.status, "bits are only added");
                assert_eq!(self.taken & !self.features, 0);
                self.status = value;
            }
            (0x16, 2) => self.select[2] = value,
            (0x18, 2) => queue.size = value.try_into().unwrap(),
            (0x1c, 2) => queue.enabled = value == 1,
            (0x20..0x38, 4) => {
                let ring = &mut queue.rings[usize::try_from((offset - 0x20) / 8).unwrap()];
                if offset.is_multiple_of(8) {
                    *ring = *ring & !0xffff_ffff | u64::from(value);
                } else {
                    *ring = *ring & 0xffff_ffff | u64::from(value) << 32;
                }
            }
            (NOTIFY.., 2) => {
                assert_eq!(offset, NOTIFY + 4 * (u64::from(value) + 5));
                self.notified += 1;
            }
            _ => panic!("{value:#x} is written to {offset:#x}, {width} bytes"),
        }
    }

    fn deliver(&mut self, frame: &[u8]) -> bool {
        let Some((id, at, len)) = self.given(0) else {
            return false;
        };
        assert!(frame.len() + 12 <= len as usize);
        self.memory.copy(at, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        self.memory.copy(at + 12, frame);
        self.used(0, id.into(), u32::try_from(frame.len() + 12).unwrap());
        true
    }

    fn sent(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while let Some((id, at, len)) = self.given(1) {
            assert!(self.notified > 0, "it was told");
            let frame = self.memory.bytes(at, len.into());
            assert_eq!(frame[..12], [0; 12]);
            frames.push(frame[12..].to_vec());
            self.used(1, id.into(), 0);
        }
        self.notified = 0;
        frames
    }

    fn quiet(&self) -> bool {
        self.status == 0 && self.config.command() & 4 == 0
    }

    fn link(&mut self, up: bool) {
        self.up = up;
    }
}
