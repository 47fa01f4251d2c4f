//! Configuration space (PCI Local Bus 3.0, chapter 6).

use crate::{CardError, Function, Machine};

const COMMAND: u16 = 0x04;
const MEMORY_SPACE: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;
const INTERRUPT_DISABLE: u16 = 1 << 10;
const CAPABILITIES_LIST: u32 = 1 << 4;
/// Capabilities are 4 bytes at least, in 192 bytes: more of them are a loop.
const MOST_CAPABILITIES: usize = 48;

/// Vendor and device.
pub(crate) fn ids(machine: &mut impl Machine, function: Function) -> (u16, u16) {
    let word = machine.config_read(function, 0);
    (low(word), low(word >> 16))
}

/// Turns memory accesses and bus mastering on and INTx off; what the command was before.
pub(crate) fn enable(machine: &mut impl Machine, function: Function) -> u16 {
    let before = low(machine.config_read(function, COMMAND));
    let command = before | MEMORY_SPACE | BUS_MASTER | INTERRUPT_DISABLE;
    // A 0 clears no bit of the status above it.
    machine.config_write(function, COMMAND, u32::from(command));
    before
}

/// Sets the command to what it was, without bus mastering.
pub(crate) fn disable(machine: &mut impl Machine, function: Function, before: u16) {
    machine.config_write(function, COMMAND, u32::from(before & !BUS_MASTER));
}

/// The address of a memory BAR, as the firmware has set it.
pub(crate) fn bar(
    machine: &mut impl Machine,
    function: Function,
    index: u8,
) -> Result<u64, CardError> {
    if index > 5 {
        return Err(CardError::Bar(index));
    }
    let at = 0x10 + 4 * u16::from(index);
    let first = machine.config_read(function, at);
    let address = match first & 7 {
        0 => u64::from(first & !0xf),
        4 if index < 5 => {
            u64::from(first & !0xf) | u64::from(machine.config_read(function, at + 4)) << 32
        }
        _ => return Err(CardError::Bar(index)),
    };
    if address == 0 || first == u32::MAX {
        return Err(CardError::Bar(index));
    }
    Ok(address)
}

/// Calls `f` with the offset and first word of each capability, up to the last one.
pub(crate) fn capabilities<M: Machine>(
    machine: &mut M,
    function: Function,
    mut f: impl FnMut(&mut M, u16, u32),
) {
    if (machine.config_read(function, COMMAND) >> 16) & CAPABILITIES_LIST == 0 {
        return;
    }
    let mut at = low(machine.config_read(function, 0x34)) & 0xfc;
    for _ in 0..MOST_CAPABILITIES {
        if at < 0x40 {
            return;
        }
        let word = machine.config_read(function, at);
        f(machine, at, word);
        at = low(word >> 8) & 0xfc;
    }
}

/// The low 16 bits.
#[expect(clippy::cast_possible_truncation)]
pub(crate) fn low(word: u32) -> u16 {
    word as u16
}
