//! A copy of this application at another address.
//!
//! PE/COFF as the firmware has loaded it: headers, sections and base relocations are in memory (Microsoft's "PE Format",
//! sections "Optional Header" and "The .reloc Section").

use core::{ptr, slice};

/// The image cannot be copied: `0` says what of it is not as it must be.
#[derive(Clone, Copy, Debug)]
pub struct Malformed(pub &'static str);

/// A directory entry's number of base relocations.
const BASE_RELOCATIONS: usize = 5;
/// A relocation of a 64-bit address.
const DIR64: u16 = 10;

/// Copies the image of `size` bytes at `from` to `to`, and has its addresses right there.
///
/// # Safety
///
/// `from` must be this application as the firmware has loaded it, `to` memory of as many bytes that is nobody's.
pub unsafe fn copy(from: *const u8, size: usize, to: *mut u8) -> Result<(), Malformed> {
    // SAFETY: as the caller says.
    let image = unsafe {
        ptr::copy_nonoverlapping(from, to, size);
        slice::from_raw_parts_mut(to, size)
    };
    let delta = to.addr().wrapping_sub(from.addr());
    let header = usize::try_from(dword(image, 0x3c)?).map_err(|_| Malformed("header"))?;
    if dword(image, header)? != 0x4550 {
        return Err(Malformed("signature"));
    }
    let optional = header + 24;
    if word(image, optional)? != 0x20b {
        return Err(Malformed("optional header"));
    }
    let directory = optional + 112 + BASE_RELOCATIONS * 8;
    let mut at = usize::try_from(dword(image, directory)?).map_err(|_| Malformed("directory"))?;
    let bytes =
        usize::try_from(dword(image, directory + 4)?).map_err(|_| Malformed("directory"))?;
    let end = at.checked_add(bytes).ok_or(Malformed("directory"))?;
    while at + 8 <= end {
        let page = usize::try_from(dword(image, at)?).map_err(|_| Malformed("block"))?;
        let block = usize::try_from(dword(image, at + 4)?).map_err(|_| Malformed("block"))?;
        if block < 8 {
            return Err(Malformed("block"));
        }
        for entry in (at + 8..at + block).step_by(2) {
            let entry = word(image, entry)?;
            if entry >> 12 == DIR64 {
                let place = page + usize::from(entry & 0xfff);
                let bytes = image
                    .get_mut(place..place + 8)
                    .and_then(|bytes| <&mut [u8; 8]>::try_from(bytes).ok())
                    .ok_or(Malformed("relocation"))?;
                *bytes = usize::from_le_bytes(*bytes)
                    .wrapping_add(delta)
                    .to_le_bytes();
            }
        }
        at += block;
    }
    Ok(())
}

fn word(image: &[u8], at: usize) -> Result<u16, Malformed> {
    let bytes = image
        .get(at..at + 2)
        .and_then(|bytes| bytes.try_into().ok());
    bytes.map(u16::from_le_bytes).ok_or(Malformed("size"))
}

fn dword(image: &[u8], at: usize) -> Result<u32, Malformed> {
    let bytes = image
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok());
    bytes.map(u32::from_le_bytes).ok_or(Malformed("size"))
}
