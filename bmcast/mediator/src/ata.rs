//! What an ATA command asks of the disk (ACS-4).

use bmcast_image::Sectors;

/// A register FIS, host to device (Serial ATA 3.x, 10.5.5): its 20 bytes.
pub type Fis = [u8; 20];

/// What a command does, as far as a mediator is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Reads sectors, or has the device look at them.
    Read(Sectors),
    /// Writes sectors; `true`: past the device's cache.
    Write(Sectors, bool),
    /// Has the cache written.
    Flush,
    /// Says that sectors are not needed, in a list of so many blocks of 512 bytes.
    Trim(u16),
    /// Asks for the identity, which has the capacity.
    Identify,
    /// No command: the device control register is set, and the device is reset by `true` until `false`.
    Control(bool),
    /// Touches no sector.
    Other,
    /// Would change the disk past the mediator, or is not known: the device is not to see it.
    Refused,
}

/// IDENTIFY DEVICE.
pub const IDENTIFY: u8 = 0xec;
/// READ FPDMA QUEUED.
pub const READ_QUEUED: u8 = 0x60;
/// WRITE DMA EXT.
pub const WRITE_DMA_EXT: u8 = 0x35;
/// FLUSH CACHE EXT.
pub const FLUSH_CACHE_EXT: u8 = 0xea;
/// A code that ACS reserves: devices abort it.
pub const ABORTED: u8 = 0x7f;

/// In the device register: sectors are counted, not cylinders and heads.
const LBA: u8 = 1 << 6;
/// In the device register of queued writes: past the cache.
const FUA: u8 = 1 << 7;
/// A FIS of the host's to the device's registers.
const TO_DEVICE: u8 = 0x27;
/// In its second byte: it has a command.
const HAS_COMMAND: u8 = 1 << 7;
/// In the device control register: software reset.
const SOFT_RESET: u8 = 1 << 2;
/// In DATA SET MANAGEMENT's features.
const TRIM: u8 = 1;

/// Blocks of 512 bytes that a TRIM may list: as many as fit one page, which is what Linux sends at most.
pub const MOST_TRIM: u16 = 8;

fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Decodes a command.
pub fn decode(fis: &Fis) -> Command {
    let [
        kind,
        flags,
        code,
        features,
        lba0,
        lba1,
        lba2,
        device,
        lba3,
        lba4,
        lba5,
        features_high,
        count,
        count_high,
        _,
        control,
        ..,
    ] = *fis;
    if kind != TO_DEVICE {
        return Command::Refused;
    }
    if flags & HAS_COMMAND == 0 {
        return Command::Control(control & SOFT_RESET != 0);
    }
    let long = || {
        let lba = number(&[lba0, lba1, lba2, lba3, lba4, lba5]);
        let count = match number(&[count, count_high]) {
            0 => 65536,
            count => count,
        };
        (device & LBA != 0).then(|| Sectors::new(lba, count))?
    };
    let short = || {
        let lba = number(&[lba0, lba1, lba2, device & 0xf]);
        let count = if count == 0 { 256 } else { u64::from(count) };
        (device & LBA != 0).then(|| Sectors::new(lba, count))?
    };
    let queued = || {
        let lba = number(&[lba0, lba1, lba2, lba3, lba4, lba5]);
        let count = match number(&[features, features_high]) {
            0 => 65536,
            count => count,
        };
        (device & LBA != 0).then(|| Sectors::new(lba, count))?
    };
    let read = |sectors: Option<Sectors>| sectors.map_or(Command::Refused, Command::Read);
    let write = |sectors: Option<Sectors>, fua| {
        sectors.map_or(Command::Refused, |sectors| Command::Write(sectors, fua))
    };
    match code {
        // READ SECTOR(S), READ MULTIPLE, READ DMA, READ VERIFY.
        0x20 | 0x21 | 0xc4 | 0xc8 | 0x40 | 0x41 => read(short()),
        // The same of 48 bits, and READ STREAM.
        0x24 | 0x25 | 0x29 | 0x2a | 0x2b | 0x42 => read(long()),
        READ_QUEUED => read(queued()),
        // WRITE SECTOR(S), WRITE MULTIPLE, WRITE DMA.
        0x30 | 0x31 | 0xc5 | 0xca => write(short(), false),
        // The same of 48 bits, and WRITE STREAM.
        0x34 | 0x35 | 0x39 | 0x3a | 0x3b => write(long(), false),
        // WRITE DMA FUA EXT, WRITE MULTIPLE FUA EXT.
        0x3d | 0xce => write(long(), true),
        // WRITE FPDMA QUEUED.
        0x61 => write(queued(), device & FUA != 0),
        // FLUSH CACHE.
        0xe7 | FLUSH_CACHE_EXT => Command::Flush,
        0x06 if features & TRIM != 0 => Command::Trim(u16::from_le_bytes([count, count_high])),
        IDENTIFY => Command::Identify,
        // NCQ NON-DATA: to abort, deadlines, SET FEATURES; others of its kind write zeros (7.22).
        0x63 if matches!(features & 0xf, 0 | 1 | 5) => Command::Other,
        // READ NATIVE MAX ADDRESS (EXT): how large the disk is without a protected area, as `shrink` says there is one.
        // What would change that, SET MAX, is refused.
        0xf8 | 0x27 => Command::Other,
        // NOP, RECALIBRATE, READ LOG, INITIALIZE, RECEIVE FPDMA, DIAGNOSTIC, IDENTIFY PACKET, SMART, SET MULTIPLE,
        // power management, SET FEATURES. Not SLEEP: the VMM's commands would have no answer.
        0x00
        | 0x10
        | 0x2f
        | 0x47
        | 0x65
        | 0x90
        | 0x91
        | 0xa1
        | 0xb0
        | 0xc6
        | 0xe0..=0xe3
        | 0xe5
        | 0xef => Command::Other,
        _ => Command::Refused,
    }
}

/// Whether a command is one of those that are queued, whose slot is its tag (Serial ATA 3.x, 13.6).
pub fn is_queued(fis: &Fis) -> bool {
    fis[1] & HAS_COMMAND != 0 && matches!(fis[2], 0x60 | 0x61 | 0x63..=0x65)
}

/// The tag of a queued command.
pub fn tag(fis: &Fis) -> usize {
    usize::from(fis[12] >> 3)
}

/// A queued read behind the end of any disk. The device says so, with the tag.
pub fn behind_the_end(tag: usize) -> Fis {
    let last = Sectors {
        start: (1 << 48) - 1,
        count: 0,
    };
    let mut fis = long(READ_QUEUED, last);
    fis[3] = 1;
    fis[12] = u8::try_from(tag).unwrap_or(0) << 3;
    fis
}

/// The FIS of a command that has nothing but its code.
pub fn bare(code: u8) -> Fis {
    let mut fis = [0; 20];
    fis[..3].copy_from_slice(&[TO_DEVICE, HAS_COMMAND, code]);
    fis[7] = LBA;
    fis
}

/// The FIS of a command on sectors in 48 bits.
pub fn long(code: u8, sectors: Sectors) -> Fis {
    let [a, b, c, d, e, f, ..] = sectors.start.to_le_bytes();
    let [low, high, ..] = sectors.count.to_le_bytes();
    let mut fis = bare(code);
    fis[4..7].copy_from_slice(&[a, b, c]);
    fis[8..11].copy_from_slice(&[d, e, f]);
    fis[12..14].copy_from_slice(&[low, high]);
    fis
}

/// Makes an identity that of a disk of `sectors` sectors, without what is [`Command::Refused`] anyway.
///
/// It is one whose other sectors are a host protected area (ATA8-ACS, 4.11): a driver may ask how large the disk is without
/// (READ NATIVE MAX ADDRESS), and takes it for the same disk if it finds it that large later. Without that Linux gives a disk up
/// that is larger when it is identified anew after an error (`ata_dev_revalidate` in `drivers/ata/libata-core.c`).
pub fn shrink(identity: &mut [u8; 512], sectors: u64) {
    let mut set = |word: usize, value: u16| {
        identity[word * 2..word * 2 + 2].copy_from_slice(&value.to_le_bytes());
    };
    let short = u32::try_from(sectors.min(0x0fff_ffff))
        .unwrap_or(0)
        .to_le_bytes();
    set(60, u16::from_le_bytes([short[0], short[1]]));
    set(61, u16::from_le_bytes([short[2], short[3]]));
    for (word, pair) in (100..104).zip(sectors.to_le_bytes().chunks_exact(2)) {
        set(word, u16::from_le_bytes([pair[0], pair[1]]));
    }
    let mut clear = |word: usize, bits: u16| {
        let at = word * 2;
        let value = u16::from_le_bytes([identity[at], identity[at + 1]]) & !bits;
        identity[at..at + 2].copy_from_slice(&value.to_le_bytes());
    };
    // Security; configuration overlay, microcode, sanitizing, security's state.
    for word in [82, 85] {
        clear(word, 1 << 1);
    }
    for word in [83, 86] {
        clear(word, 1 << 11 | 1);
    }
    clear(59, 0xfc00);
    clear(128, 0xffff);
    // Trusted computing; NCQ NON-DATA, which writes zeros too, and queued TRIM; writing of errors, microcode, the
    // accessible maximum.
    clear(48, 1);
    clear(77, 1 << 6 | 1 << 5);
    for word in [119, 120] {
        clear(word, 1 << 8 | 1 << 4 | 1 << 2);
    }
    // The host protected area is there, and on.
    for word in [82, 85] {
        let at = word * 2;
        let value = u16::from_le_bytes([identity[at], identity[at + 1]]) | 1 << 10;
        identity[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    // Blocks of a TRIM's list, at most.
    let blocks = u16::from_le_bytes([identity[210], identity[211]]).min(MOST_TRIM);
    identity[210..212].copy_from_slice(&blocks.to_le_bytes());
    // The sum of all bytes is 0, where the signature says that there is a sum (ACS-4, 7.13.6.80).
    if identity[510] == 0xa5 {
        let sum = identity[..511]
            .iter()
            .fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        identity[511] = sum.wrapping_neg();
    }
}

/// The sectors of one entry of a TRIM's list: 48 bits of address, 16 of count.
pub fn trimmed(entry: [u8; 8]) -> Option<Sectors> {
    Sectors::new(number(&entry[..6]), number(&entry[6..]))
}

#[cfg(test)]
mod tests {
    extern crate std;

    use proptest::prelude::*;

    use super::*;

    fn sectors(start: u64, count: u64) -> Sectors {
        Sectors { start, count }
    }

    #[test]
    fn what_linux_and_firmware_send() {
        let mut queued = long(0x60, sectors(0x12_3456_789a, 0));
        queued[3] = 8;
        assert_eq!(decode(&queued), Command::Read(sectors(0x12_3456_789a, 8)));
        queued[2] = 0x61;
        assert_eq!(
            decode(&queued),
            Command::Write(sectors(0x12_3456_789a, 8), false)
        );
        queued[7] |= FUA;
        assert_eq!(
            decode(&queued),
            Command::Write(sectors(0x12_3456_789a, 8), true)
        );
        let mut short = [0; 20];
        short[..13].copy_from_slice(&[0x27, 0x80, 0xc8, 0, 1, 2, 3, 0xe4, 0, 0, 0, 0, 0]);
        assert_eq!(decode(&short), Command::Read(sectors(0x0403_0201, 256)));
        short[7] = 0xa0;
        assert_eq!(decode(&short), Command::Refused);
        assert_eq!(
            decode(&long(WRITE_DMA_EXT, sectors(7, 0))),
            Command::Write(sectors(7, 65536), false)
        );
        assert_eq!(decode(&long(0xf9, sectors(7, 1))), Command::Refused);
    }

    #[test]
    fn what_is_no_command_or_refused() {
        let mut fis = bare(0x25);
        fis[1] = 0;
        assert_eq!(decode(&fis), Command::Control(false));
        fis[15] = SOFT_RESET;
        assert_eq!(decode(&fis), Command::Control(true));
        fis[0] = 0x46;
        assert_eq!(decode(&fis), Command::Refused);
        // NCQ NON-DATA that aborts, and that writes zeros; SLEEP; IDLE.
        let mut other = bare(0x63);
        assert_eq!(decode(&other), Command::Other);
        other[3] = 6;
        assert_eq!(decode(&other), Command::Refused);
        // READ NATIVE MAX ADDRESS and SET MAX ADDRESS.
        assert_eq!(decode(&bare(0xf8)), Command::Other);
        assert_eq!(decode(&bare(0xf9)), Command::Refused);
        assert_eq!(decode(&bare(0x27)), Command::Other);
        assert_eq!(decode(&bare(0x37)), Command::Refused);
        assert_eq!(decode(&bare(0xe6)), Command::Refused);
        assert_eq!(decode(&bare(0xe1)), Command::Other);
        let last = behind_the_end(31);
        let sectors = sectors((1 << 48) - 1, 1);
        assert_eq!(decode(&last), Command::Read(sectors));
        assert!(is_queued(&last) && tag(&last) == 31);
    }

    #[test]
    fn a_smaller_disk() {
        let mut identity = [0x5a; 512];
        identity[510] = 0xa5;
        shrink(&mut identity, 0x12_3456_7890);
        assert_eq!(identity[120..124], 0x0fff_ffffu32.to_le_bytes());
        assert_eq!(identity[200..208], 0x12_3456_7890u64.to_le_bytes());
        let sum = identity
            .iter()
            .fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0);
        let word = |n: usize| u16::from_le_bytes([identity[n * 2], identity[n * 2 + 1]]);
        assert_eq!((word(105), word(77) & 0x60, word(128)), (MOST_TRIM, 0, 0));
        assert_eq!(word(82) & 0x402, 0x400);
        assert_eq!(word(85) & 0x402, 0x400);
        // How many sectors PIO moves at once is the guest's to know.
        assert_eq!(word(59), 0x5a5a & 0x3ff);
    }

    proptest! {
        #[test]
        fn any_command(fis: [u8; 20]) {
            if let Command::Read(sectors) | Command::Write(sectors, _) = decode(&fis) {
                prop_assert!((1..=65536).contains(&sectors.count));
                prop_assert!(sectors.start < 1 << 48);
            }
        }
    }
}
