//! The bare machine: ports, registers, the clock.

use core::arch::asm;
use core::fmt;

use bmcast_net::{Function, Machine};

/// Prints a line on the first serial port.
#[macro_export]
macro_rules! say {
    ($($arguments:tt)*) => {{
        use core::fmt::Write as _;
        let _ = writeln!($crate::machine::Serial, $($arguments)*);
    }};
}

const SERIAL: u16 = 0x3f8;
const EXIT: u16 = 0xf4;

fn out8(port: u16, value: u8) {
    // SAFETY: ports of this test's machine; no memory is touched.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) }
    value
}

fn out32(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)) }
}

fn in32(port: u16) -> u32 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack)) }
    value
}

/// The first serial port.
pub struct Serial;

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // The transmitter is empty soon, or there is none.
            for _ in 0..100_000 {
                if in8(SERIAL + 5) & 0x20 != 0 {
                    break;
                }
            }
            out8(SERIAL, byte);
        }
        Ok(())
    }
}

/// Ends QEMU.
pub fn end(right: bool) -> ! {
    out32(EXIT, if right { 16 } else { 17 });
    loop {
        core::hint::spin_loop();
    }
}

pub fn ticks() -> u64 {
    // SAFETY: every x86-64 CPU has a time stamp counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The machine as the cards' drivers want it; memory and registers are where they are physically.
#[derive(Clone, Copy)]
pub struct Bare {
    /// Ticks of the time stamp counter in a microsecond.
    pub ticks: u64,
}

impl Bare {
    /// Milliseconds.
    pub fn now(&self) -> u64 {
        ticks() / self.ticks / 1000
    }
}

fn select(function: Function, offset: u16) {
    let place = u32::from(function.bus) << 16
        | u32::from(function.device) << 11
        | u32::from(function.function) << 8
        | u32::from(offset & 0xfc);
    out32(0xcf8, 1 << 31 | place);
}

impl Machine for Bare {
    fn config_read(&mut self, function: Function, offset: u16) -> u32 {
        select(function, offset);
        in32(0xcfc)
    }

    fn config_write(&mut self, function: Function, offset: u16, value: u32) {
        select(function, offset);
        out32(0xcfc, value);
    }

    fn mmio_read(&mut self, address: u64, width: u8) -> u32 {
        let place = address as *mut u8;
        // SAFETY: the drivers give places in the card's BARs, which are mapped where they are.
        unsafe {
            match width {
                1 => u32::from(place.read_volatile()),
                2 => u32::from(place.cast::<u16>().read_volatile()),
                _ => place.cast::<u32>().read_volatile(),
            }
        }
    }

    fn mmio_write(&mut self, address: u64, width: u8, value: u32) {
        let place = address as *mut u8;
        let [low, high, ..] = value.to_le_bytes();
        // SAFETY: as above.
        unsafe {
            match width {
                1 => place.write_volatile(low),
                2 => place
                    .cast::<u16>()
                    .write_volatile(u16::from_le_bytes([low, high])),
                _ => place.cast::<u32>().write_volatile(value),
            }
        }
    }

    fn wait(&mut self, micros: u32) {
        let end = ticks() + self.ticks * u64::from(micros);
        while ticks() < end {
            core::hint::spin_loop();
        }
    }
}
