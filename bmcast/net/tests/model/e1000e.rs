//! Intel 82574 with legacy descriptors.

use std::collections::HashMap;

use super::{Config, Memory, Model};

/// Below 4 GiB, in a BAR of 32 bits.
const BAR: u32 = 0xc000_0000;

pub struct E1000e {
    pub config: Config,
    pub memory: Memory,
    pub registers: HashMap<u64, u32>,
    pub stuck: bool,
    /// Status, errors and length that the next frame is said to have.
    pub lie: Option<(u8, u8, u16)>,
    up: bool,
}

impl E1000e {
    pub fn new(memory: Memory) -> Self {
        let mut config = Config([0; 64]);
        config.0[0] = 0x10d3_8086;
        config.0[4] = BAR;
        Self {
            config,
            memory,
            registers: HashMap::new(),
            stuck: false,
            lie: None,
            up: true,
        }
    }

    pub fn register(&self, at: u64) -> u32 {
        self.registers.get(&at).copied().unwrap_or(0)
    }

    /// Descriptor number `register` (RDH or TDH) of the ring at `base`, if it is the card's.
    fn next(&mut self, base: u64) -> Option<u64> {
        let (head, tail) = (self.register(base + 0x10), self.register(base + 0x18));
        if head == tail || self.config.command() & 4 == 0 {
            return None;
        }
        let count = self.register(base + 8) / 16;
        assert!(head < count && tail < count);
        self.registers.insert(base + 0x10, (head + 1) % count);
        let ring = u64::from(self.register(base)) | u64::from(self.register(base + 4)) << 32;
        Some(ring + 16 * u64::from(head))
    }
}

impl Model for E1000e {
    fn config(&mut self) -> &mut Config {
        &mut self.config
    }

    fn bar(&self) -> u64 {
        BAR.into()
    }

    fn read(&mut self, offset: u64, width: u8) -> u32 {
        assert_eq!(width, 4);
        match offset {
            8 => u32::from(self.up) << 1 | u32::from(self.register(0) & 4 == 0) << 19,
            _ => self.register(offset),
        }
    }

    fn write(&mut self, offset: u64, width: u8, value: u32) {
        assert_eq!(width, 4);
        match offset {
            0 if value & 1 << 26 != 0 && !self.stuck => {
                assert_eq!(value & 4, 4, "nothing is under way");
                self.registers.clear();
                self.registers.insert(0x5400, 0x0700_0002);
                self.registers.insert(0x5404, 0x8000_0807);
            }
            0xd0 => panic!("an interrupt is turned on"),
            _ => {
                self.registers.insert(offset, value);
            }
        }
    }

    fn deliver(&mut self, frame: &[u8]) -> bool {
        if self.register(0x100) & 2 == 0 {
            return false;
        }
        let Some(at) = self.next(0x2800) else {
            return false;
        };
        assert_eq!(self.memory.get::<u64>(at + 8), 0, "it was given back clean");
        self.memory.copy(self.memory.get(at), frame);
        let len = u16::try_from(frame.len()).unwrap();
        let (status, errors, len) = self.lie.take().unwrap_or((3, 0, len));
        self.memory.set(at + 8, len);
        self.memory.set(at + 13, errors);
        self.memory.set(at + 12, status);
        true
    }

    fn sent(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        if self.register(0x400) & 2 == 0 {
            return frames;
        }
        while let Some(at) = self.next(0x3800) {
            assert_eq!(self.memory.get::<u8>(at + 11), 0b1011);
            let len: u16 = self.memory.get(at + 8);
            frames.push(self.memory.bytes(self.memory.get(at), len.into()));
            self.memory.set(at + 12, 1_u8);
        }
        frames
    }

    fn quiet(&self) -> bool {
        self.register(0x100) & 2 == 0
            && self.register(0x400) & 2 == 0
            && self.config.command() & 4 == 0
    }

    fn link(&mut self, up: bool) {
        self.up = up;
    }
}
