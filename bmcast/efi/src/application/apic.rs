//! The local APIC. Its page is trapped for as long as there is a VMM: a CPU that is started has to start in it. All
//! else goes to the APIC as it is (APM volume 2, chapter 16).

use super::cpu::{self, rdmsr, wrmsr};
use super::exits::{self, read_device, write_device};
use super::start;

/// Where APICs are after a reset.
pub const PAGE: u64 = 0xfee0_0000;
/// The interrupt command register in x2APIC mode.
pub const X2APIC_ICR: u32 = 0x830;

const ICR_LOW: u32 = 0x300;
const ICR_HIGH: u32 = 0x310;
/// The first of eight words of the interrupt request register.
const IRR: u32 = 0x200;
/// In the ICR: the mode of delivery.
const MODE: u32 = 7 << 8;
/// INIT.
const INIT: u32 = 5 << 8;
/// Start-up.
const START_UP: u32 = 6 << 8;

/// A register's offset in the APIC's page.
pub fn offset(address: u64) -> Option<u32> {
    u32::try_from(address.checked_sub(PAGE)?)
        .ok()
        .filter(|offset| *offset < 4096)
}

/// Reads a register of this CPU's.
pub fn read(offset: u32) -> u32 {
    let [value, _] = cpu::halves(read_device(PAGE + u64::from(offset), 4));
    value
}

/// Writes a register of this CPU's.
pub fn write(offset: u32, value: u32) {
    let value = if offset == ICR_LOW && value & MODE == START_UP {
        let [.., target] = read(ICR_HIGH).to_le_bytes();
        start::redirect(value, u32::from(target))
    } else {
        value
    };
    let send = || write_device(PAGE + u64::from(offset), 4, u64::from(value));
    if offset == ICR_LOW && value & MODE == INIT {
        exits::while_nobody_works(send);
    } else {
        send();
    }
}

/// The guest writes the ICR in x2APIC mode.
pub fn write_x2apic_icr(value: u64) {
    let [low, target] = cpu::halves(value);
    let low = if low & MODE == START_UP {
        start::redirect(low, target)
    } else {
        low
    };
    // SAFETY: the guest itself writes it.
    let send = || unsafe { wrmsr(X2APIC_ICR, u64::from(target) << 32 | u64::from(low)) };
    if low & MODE == INIT {
        exits::while_nobody_works(send);
    } else {
        send();
    }
}

/// Whether the guest may write this to APIC_BASE: the APIC stays where it is watched.
pub fn may_be(base: u64) -> bool {
    base & 0x000f_ffff_ffff_f000 == PAGE
}

/// Whether an interrupt waits for this CPU.
pub fn pending() -> bool {
    // SAFETY: every CPU with a local APIC has this MSR; the registers of x2APIC mode are there when it says so.
    unsafe {
        if rdmsr(cpu::APIC_BASE) & 1 << 10 != 0 {
            return (0x820..0x828).any(|word| rdmsr(word) != 0);
        }
    }
    (0..8).any(|word| read(IRR + word * 16) != 0)
}
