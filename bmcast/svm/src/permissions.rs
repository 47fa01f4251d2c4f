//! Permission maps of ports and MSRs (APM 15.10.1 and 15.11).

/// Pages of the I/O permission map.
pub const IO_PAGES: usize = 3;

/// Pages of the MSR permission map.
pub const MSR_PAGES: usize = 2;

/// Has accesses to a port exit.
pub fn trap_port(map: &mut [u8], port: u16) {
    if let Some(byte) = map.get_mut(usize::from(port / 8)) {
        *byte |= 1 << (port % 8);
    }
}

/// Where an MSR's two bits are: byte, and the lower bit (reads; the next one is writes).
fn place(msr: u32) -> Option<(usize, u32)> {
    let (vector, index) = match msr {
        0..=0x1fff => (0, msr),
        0xc000_0000..=0xc000_1fff => (0x800, msr - 0xc000_0000),
        0xc001_0000..=0xc001_1fff => (0x1000, msr - 0xc001_0000),
        _ => return None,
    };
    Some((usize::try_from(vector + index / 4).ok()?, index % 4 * 2))
}

/// Has reads and writes of an MSR exit.
pub fn trap_msr(map: &mut [u8], msr: u32, reads: bool, writes: bool) {
    if let Some((byte, shift)) = place(msr)
        && let Some(byte) = map.get_mut(byte)
    {
        *byte |= (u8::from(reads) | u8::from(writes) << 1) << shift;
    }
}

/// Lets an MSR be read and written again.
pub fn allow_msr(map: &mut [u8], msr: u32) {
    if let Some((byte, shift)) = place(msr)
        && let Some(byte) = map.get_mut(byte)
    {
        *byte &= !(3 << shift);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_msr_has_its_bits() {
        let mut map = [0; MSR_PAGES * 4096];
        trap_msr(&mut map, 0xc000_0080, true, true);
        assert_eq!(map[0x800 + 0x20], 3);
        trap_msr(&mut map, 0xc001_0117, true, false);
        assert_eq!(map[0x1000 + 0x45], 1 << 6);
        trap_msr(&mut map, 0x830, false, true);
        assert_eq!(map[0x20c], 2);
        allow_msr(&mut map, 0xc000_0080);
        assert_eq!(map[0x800 + 0x20], 0);
        trap_msr(&mut map, 0x4000_0000, true, true);
    }

    #[test]
    fn each_port_has_its_bit() {
        let mut map = [0; IO_PAGES * 4096];
        trap_port(&mut map, 0xcf9);
        assert_eq!(map[0x19f], 2);
    }
}
