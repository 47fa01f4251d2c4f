//! What Identify says (5.15.2).

use bmcast_image::SECTOR;

/// Bytes of what it says.
pub const IDENTITY: usize = 4096;

/// CNS: a namespace, the controller, a namespace that need not be attached.
pub const NAMESPACE: u32 = 0x00;
/// The controller.
pub const CONTROLLER: u32 = 0x01;
/// A namespace that need not be attached.
pub const ALLOCATED: u32 = 0x11;

/// Hides what the mediator refuses (figure 247): of OACS security, format, firmware, namespace management, NVMe-MI,
/// virtualization and shadow doorbells; fused commands, reservations, copies, sanitizing, write protection.
pub fn hide(controller: &mut [u8]) {
    let mut clear = |at: usize, bits: u8| {
        if let Some(byte) = controller.get_mut(at) {
            *byte &= !bits;
        }
    };
    clear(256, 0b1100_1111);
    clear(257, 0b0000_0001);
    clear(520, 1 << 5);
    clear(521, 1 << 0);
    clear(522, !0);
    clear(523, !0);
    for at in 328..332 {
        clear(at, !0);
    }
    clear(531, !0);
}

/// Most bytes of a command: pages of 4 KiB times a power of 2; 0 is no limit.
pub fn most_data(controller: &[u8]) -> Option<usize> {
    let power = u32::from(*controller.get(77)?);
    if power == 0 {
        return Some(usize::MAX);
    }
    Some(4096usize.checked_shl(power).unwrap_or(usize::MAX))
}

/// Sectors of a logical block (figures 245 and 246); none if a block has metadata, or is not of 512 to 4,096 bytes.
pub fn ratio(namespace: &[u8]) -> Option<u64> {
    let format = usize::from(*namespace.get(26)? & 0xf);
    let entry = namespace.get(128 + format * 4..128 + format * 4 + 4)?;
    if entry[0] != 0 || entry[1] != 0 {
        return None;
    }
    let bytes = 1u64.checked_shl(entry[2].into())?;
    (SECTOR..=4096).contains(&bytes).then_some(bytes / SECTOR)
}

/// Has a namespace end where the visible sectors do.
pub fn shrink(namespace: &mut [u8], visible: u64, ratio: u64) {
    let blocks = visible / ratio.max(1);
    let mut lower = |at: usize, to: u64| {
        if let Some(field) = namespace.get_mut(at..at + 8)
            && let Ok(bytes) = <[u8; 8]>::try_from(&*field)
        {
            let value = u64::from_le_bytes(bytes).min(to);
            field.copy_from_slice(&value.to_le_bytes());
        }
    };
    // Size, capacity, utilization; bytes of NVM.
    for at in [0, 8, 16] {
        lower(at, blocks);
    }
    lower(48, blocks.saturating_mul(ratio * SECTOR));
    // Reservations.
    if let Some(reservations) = namespace.get_mut(31) {
        *reservations = 0;
    }
}
