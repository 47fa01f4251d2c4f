//! PCI configuration: by ports 0xCF8 and 0xCFC (PCI Local Bus 3.0, 3.2.2.3.2), and where the firmware's tables say by
//! memory (PCI Firmware 3.0, 4.1.2).

use alloc::vec::Vec;

use spin::Mutex;

use super::cpu;

/// The address port.
pub const ADDRESS: u16 = 0xcf8;
/// The first of four data ports.
pub const DATA: u16 = 0xcfc;

/// A function of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Function {
    /// Bus.
    pub bus: u8,
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

/// Command register.
const COMMAND: u8 = 4;
/// In it: ports, memory.
const PORTS: u32 = 1 << 0;
const MEMORY: u32 = 1 << 1;
/// First base address register.
const BAR0: u8 = 0x10;

/// What a function answers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// Physical addresses.
    Memory {
        /// The first.
        from: u64,
        /// Bytes.
        length: u64,
    },
    /// Ports.
    Ports {
        /// The first.
        from: u16,
        /// How many.
        length: u16,
    },
}

static LOCK: Mutex<()> = Mutex::new(());

/// As [`Function::bar`], of a configuration that `read` reads.
pub fn bar(number: u8, read: impl Fn(u8) -> u32) -> Option<u64> {
    if read(COMMAND) & MEMORY == 0 {
        return None;
    }
    let register = BAR0 + number * 4;
    let low = read(register);
    if low & 1 != 0 {
        return None;
    }
    let high = if low & 6 == 4 { read(register + 4) } else { 0 };
    let base = u64::from(high) << 32 | u64::from(low & !0xf);
    (base != 0 && low & !0xf != 0xffff_fff0).then_some(base)
}

impl Function {
    /// All functions that are there, by buses.
    pub fn all() -> impl Iterator<Item = Self> {
        (0..=255u8)
            .flat_map(|bus| (0..32u8).map(move |device| (bus, device)))
            .flat_map(|(bus, device)| {
                let first = Self {
                    bus,
                    device,
                    function: 0,
                };
                let there = first.read(0) != u32::MAX;
                let more = there && first.read(0xc) & 0x80_0000 != 0;
                let functions = if !there {
                    0
                } else if more {
                    8
                } else {
                    1
                };
                (0..functions).map(move |function| Self { function, ..first })
            })
            .filter(|function| function.read(0) != u32::MAX)
    }

    /// The one with these numbers.
    pub fn of((bus, device, function): (u8, u8, u8)) -> Self {
        Self {
            bus,
            device,
            function,
        }
    }

    fn address(self, register: u8) -> u32 {
        1 << 31
            | u32::from(self.bus) << 16
            | u32::from(self.device & 31) << 11
            | u32::from(self.function & 7) << 8
            | u32::from(register & !3)
    }

    /// Four bytes at `register`. Not while the guest uses the ports.
    pub fn read(self, register: u8) -> u32 {
        let _lock = LOCK.lock();
        // SAFETY: the firmware, which uses these ports too, does not run; its address is put back.
        unsafe {
            let old = cpu::port_in(ADDRESS, 4);
            cpu::port_out(ADDRESS, 4, self.address(register));
            let value = cpu::port_in(DATA, 4);
            cpu::port_out(ADDRESS, 4, old);
            value
        }
    }

    /// Writes four bytes at `register`. Not while the guest uses the ports.
    pub fn write(self, register: u8, value: u32) {
        let _lock = LOCK.lock();
        // SAFETY: as in `read`.
        unsafe {
            let old = cpu::port_in(ADDRESS, 4);
            cpu::port_out(ADDRESS, 4, self.address(register));
            cpu::port_out(DATA, 4, value);
            cpu::port_out(ADDRESS, 4, old);
        }
    }

    /// Where its registers are by base address register `number`; none if it is a port, has no address, or does not
    /// answer there now.
    pub fn bar(self, number: u8) -> Option<u64> {
        bar(number, |register| self.read(register))
    }

    /// What it answers to: its base address registers are asked how much they decode (PCI Local Bus 3.0, 6.2.5.1) while it
    /// answers to nothing.
    pub fn regions(self) -> Vec<Region> {
        let command = self.read(COMMAND) & 0xffff;
        self.write(COMMAND, command & !(MEMORY | PORTS));
        let mut regions = Vec::new();
        let mut number = 0;
        while number < 6 {
            let register = BAR0 + number * 4;
            let low = self.read(register);
            let size = |register: u8, value: u32| {
                self.write(register, u32::MAX);
                let ones = self.read(register);
                self.write(register, value);
                ones
            };
            let ones = size(register, low);
            number += 1;
            if ones == 0 {
                continue;
            }
            if low & 1 != 0 {
                let length = (!(ones & !3)).wrapping_add(1) & 0xffff;
                if let (Ok(from), Ok(length)) = (u16::try_from(low & !3), u16::try_from(length)) {
                    regions.push(Region::Ports { from, length });
                }
                continue;
            }
            let (mut base, mut mask) = (
                u64::from(low & !0xf),
                u64::from(ones & !0xf) | 0xffff_ffff << 32,
            );
            if low & 6 == 4 {
                let high = self.read(register + 4);
                base |= u64::from(high) << 32;
                mask = mask & 0xffff_ffff | u64::from(size(register + 4, high)) << 32;
                number += 1;
            }
            let length = (!mask).wrapping_add(1);
            if base != 0 && length != 0 {
                regions.push(Region::Memory { from: base, length });
            }
        }
        self.write(COMMAND, command);
        regions
    }

    /// Whether an address that was written to the address port names it.
    pub fn is_named(self, address: u32) -> bool {
        address & 0xffff_ff00 == self.address(0)
    }

    /// Its page of configuration in memory, if `base` is where that of the first bus is.
    pub fn page(self, base: u64) -> u64 {
        base + (u64::from(self.bus) << 20
            | u64::from(self.device & 31) << 15
            | u64::from(self.function & 7) << 12)
    }
}
