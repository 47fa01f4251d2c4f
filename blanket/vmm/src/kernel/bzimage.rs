//! The x86 boot protocol's setup header, as far as it says where the payload is
//! (`Documentation/arch/x86/boot.rst`).

use super::ErrorKind;

/// `setup_sects`, u8: 512-byte sectors of real-mode code after the first; 0 means 4.
const SETUP_SECTS: usize = 0x1f1;
/// `boot_flag`, u16: always 0xaa55.
const BOOT_FLAG: usize = 0x1fe;
/// `header`: "HdrS".
const HEADER: usize = 0x202;
/// `version`, u16.
const VERSION: usize = 0x206;
/// `payload_offset`, u32: from the start of the protected-mode code.
const PAYLOAD_OFFSET: usize = 0x248;
/// `payload_length`, u32.
const PAYLOAD_LENGTH: usize = 0x24c;
/// First protocol version with the payload fields.
const VERSION_PAYLOAD: u16 = 0x0208;

/// Whether the bytes begin with a Linux setup header.
pub fn is_bzimage(image: &[u8]) -> bool {
    image.get(HEADER..HEADER + 4) == Some(b"HdrS") && u16_at(image, BOOT_FLAG) == Some(0xaa55)
}

/// The compressed kernel inside a bzImage.
pub fn payload(image: &[u8]) -> Result<&[u8], ErrorKind> {
    let short = || ErrorKind::corrupt("the setup header is cut off");
    let version = u16_at(image, VERSION).ok_or_else(short)?;
    if version < VERSION_PAYLOAD {
        return Err(ErrorKind::Unsupported(format!(
            "its boot protocol {}.{:02} is older than 2.08 (Linux 2.6.26)",
            version >> 8,
            version & 0xff
        )));
    }
    let sectors = match *image.get(SETUP_SECTS).ok_or_else(short)? {
        0 => 4,
        n => usize::from(n),
    };
    let offset = u32_at(image, PAYLOAD_OFFSET).ok_or_else(short)?;
    let length = u32_at(image, PAYLOAD_LENGTH).ok_or_else(short)?;
    let start = (sectors + 1) * 512 + offset;
    start
        .checked_add(length)
        .and_then(|end| image.get(start..end))
        .ok_or_else(|| {
            ErrorKind::corrupt(format!(
                "the payload should be bytes {start} to {} of the file, which has only {}",
                start.saturating_add(length),
                image.len()
            ))
        })
}

fn u16_at(image: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(image.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(image: &[u8], at: usize) -> Option<usize> {
    let value = u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?);
    usize::try_from(value).ok()
}
