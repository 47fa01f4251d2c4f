//! The core image: the same bytes that `blanket.ko` carries.

use blanket_abi::PAGE_SIZE;
use blanket_abi::device::{API_VERSION, IMAGE_MAGIC, ImageHeader, SMAP_CLAC, Switch};
use blanket_abi::layout::{IMAGE_MAX, vcpu};

use super::Error;
use crate::core_image::BYTES;

/// A core image whose header was checked.
#[derive(Clone, Copy, Debug)]
pub struct Image {
    /// The file.
    pub bytes: &'static [u8],
    /// Its header.
    pub header: ImageHeader,
}

impl Image {
    /// The image inside of this program.
    ///
    /// # Errors
    /// The program was built without one, or with another version's.
    pub fn built_in() -> Result<Self, Error> {
        if BYTES.is_empty() {
            return Err(Error::NoImage);
        }
        Self::parse(BYTES)
    }

    /// Checks an image as the module checks its own.
    ///
    /// # Errors
    /// What does not fit.
    pub fn parse(bytes: &'static [u8]) -> Result<Self, Error> {
        let header = header(bytes).ok_or(Error::BadImage("it is shorter than its header"))?;
        let ordered = [
            header.entry_start,
            header.entry_end,
            header.text_end,
            header.rodata_end,
            header.data_end,
        ];
        if header.magic != IMAGE_MAGIC {
            return Err(Error::BadImage("it does not begin with the magic number"));
        }
        if header.api != API_VERSION || header.switch_size as usize != size_of::<Switch>() {
            return Err(Error::BadImage("it is of another version"));
        }
        if !ordered.is_sorted()
            || ordered.iter().any(|at| !at.is_multiple_of(PAGE_SIZE))
            || header.data_end > IMAGE_MAX
            || header.entry_end - header.entry_start > vcpu::ENTRY_MAX
            || header.file_end > bytes.len() as u64
            || header.file_end > header.data_end
            || !(header.rodata_end..header.data_end).contains(&header.idt)
            || !(header.text_end..=header.rodata_end).contains(&header.smap)
            || !(header.smap..=header.rodata_end).contains(&header.smap_end)
        {
            return Err(Error::BadImage("its sections are out of order"));
        }
        Ok(Self { bytes, header })
    }
}

/// A NOP of three bytes, which the image has where STAC or CLAC may come.
const NOP: [u8; 3] = [0x0f, 0x1f, 0x00];
const STAC: [u8; 3] = [0x0f, 0x01, 0xcb];
const CLAC: [u8; 3] = [0x0f, 0x01, 0xca];

impl Image {
    /// The file's bytes for a core that runs with SMAP.
    ///
    /// # Errors
    /// A place that is named has no NOP.
    pub fn with_smap(&self) -> Result<Vec<u8>, Error> {
        let bad = || Error::BadImage("its SMAP sites are not where it says");
        let mut bytes = self.bytes.to_vec();
        let range = usize::try_from(self.header.smap).map_err(|_| bad())?
            ..usize::try_from(self.header.smap_end).map_err(|_| bad())?;
        for site in self.bytes.get(range).ok_or_else(bad)?.chunks_exact(8) {
            let site = u64::from_le_bytes(site.try_into().map_err(|_| bad())?);
            let at = usize::try_from(site & !SMAP_CLAC).map_err(|_| bad())?;
            let place = bytes.get_mut(at..at.saturating_add(3)).ok_or_else(bad)?;
            if place != NOP {
                return Err(bad());
            }
            place.copy_from_slice(if site & SMAP_CLAC != 0 { &CLAC } else { &STAC });
        }
        Ok(bytes)
    }
}

fn header(bytes: &[u8]) -> Option<ImageHeader> {
    let word = |at: usize| {
        let bytes = bytes.get(at..at + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    };
    let versions = word(8)?.to_le_bytes();
    let half = |at: usize| {
        let [a, b, c, d] = [at, at + 1, at + 2, at + 3].map(|i| versions[i]);
        u32::from_le_bytes([a, b, c, d])
    };
    Some(ImageHeader {
        magic: word(0)?,
        api: half(0),
        switch_size: half(4),
        entry_start: word(16)?,
        entry_end: word(24)?,
        text_end: word(32)?,
        rodata_end: word(40)?,
        data_end: word(48)?,
        file_end: word(56)?,
        start: word(64)?,
        idt: word(72)?,
        stubs: word(80)?,
        smap: word(88)?,
        smap_end: word(96)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every word of a header that contradicts the rest is found.
    #[test]
    fn bad_headers_are_refused() {
        let good = super::super::space::tests::image();
        for (at, value) in [
            (0, 1),
            (8, 1),
            (16, 0x1800),
            (24, 0x9000),
            (32, 0x7000),
            (40, u64::MAX),
            (48, 1 << 40),
            (56, 0x9000),
            (72, 0x1000),
            (88, 0x9000),
            (96, 0x2000),
        ] {
            let mut bytes = good.bytes.to_vec();
            bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(value));
            assert!(Image::parse(bytes.leak()).is_err(), "word at {at}");
        }
        assert!(matches!(
            Image::parse(&good.bytes[..50]),
            Err(Error::BadImage(_))
        ));
    }

    #[test]
    fn a_smap_site_without_its_nop_is_refused() {
        let good = super::super::space::tests::image();
        let mut bytes = good.bytes.to_vec();
        bytes[0x2100] = 0x90;
        let image = Image::parse(bytes.leak()).expect("the header is good");
        assert!(matches!(image.with_smap(), Err(Error::BadImage(_))));
    }
}
