//! PCI configuration: by ports 0xCF8 and 0xCFC (PCI Local Bus 3.0, 3.2.2.3.2), and where the firmware's tables say by
//! memory (PCI Firmware 3.0, 4.1.2).

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
/// In it: memory, bus master, no INTx.
const MEMORY: u32 = 1 << 1;
const MASTER: u32 = 1 << 2;
const NO_INTX: u32 = 1 << 10;
/// First base address register.
const BAR0: u8 = 0x10;

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

    /// Vendor in the lower half, device in the upper.
    pub fn id(self) -> u32 {
        self.read(0)
    }

    /// Class, subclass and programming interface in the lower three bytes.
    pub fn class(self) -> u32 {
        self.read(8) >> 8
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

    /// Lets it answer to memory and reach memory, without interrupts of the old kind.
    pub fn enable(self) {
        let command = self.read(COMMAND) & 0xffff;
        self.write(COMMAND, command | MEMORY | MASTER | NO_INTX);
    }

    /// Where its registers are by base address register `number`; none if it is a port, has no address, or does not
    /// answer there now.
    pub fn bar(self, number: u8) -> Option<u64> {
        bar(number, |register| self.read(register))
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
