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
            || !(header.text_end..=header.rodata_end).contains(&header.isolate)
            || !(header.isolate..=header.rodata_end).contains(&header.isolate_end)
        {
            return Err(Error::BadImage("its sections are out of order"));
        }
        Ok(Self { bytes, header })
    }
}

/// A NOP of five bytes, which the image has where a jump may come.
const LONG_NOP: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];

/// A NOP of three bytes, which the image has where STAC or CLAC may come.
const NOP: [u8; 3] = [0x0f, 0x1f, 0x00];
const STAC: [u8; 3] = [0x0f, 0x01, 0xcb];
const CLAC: [u8; 3] = [0x0f, 0x01, 0xca];

impl Image {
    /// The file's bytes for a core that runs with SMAP, or on a root of its own.
    ///
    /// # Errors
    /// A place that is named has no NOP.
    pub fn prepared(&self, smap: bool, isolate: bool) -> Result<Vec<u8>, Error> {
        let mut bytes = self.bytes.to_vec();
        if smap {
            self.put_smap(&mut bytes)?;
        }
        if isolate {
            self.put_jumps(&mut bytes)?;
        }
        Ok(bytes)
    }

    /// The jumps of a core on a root of its own, all inside of the entry section.
    fn put_jumps(&self, bytes: &mut [u8]) -> Result<(), Error> {
        let bad = || Error::BadImage("its jumps are not where it says");
        let header = &self.header;
        let range = usize::try_from(header.isolate).map_err(|_| bad())?
            ..usize::try_from(header.isolate_end).map_err(|_| bad())?;
        let entry = header.entry_start..header.entry_end;
        for pair in self.bytes.get(range).ok_or_else(bad)?.chunks_exact(16) {
            let half = |at: usize| pair[at..at + 8].try_into().map(u64::from_le_bytes);
            let (site, to) = (half(0).map_err(|_| bad())?, half(8).map_err(|_| bad())?);
            let next = site.saturating_add(LONG_NOP.len() as u64);
            if !entry.contains(&site) || next > entry.end || !entry.contains(&to) {
                return Err(bad());
            }
            let distance = i32::try_from(to.cast_signed() - next.cast_signed());
            let at = usize::try_from(site).map_err(|_| bad())?;
            let place = &mut bytes[at..at + LONG_NOP.len()];
            if *place != LONG_NOP {
                return Err(bad());
            }
            place[0] = 0xe9;
            place[1..].copy_from_slice(&distance.map_err(|_| bad())?.to_le_bytes());
        }
        Ok(())
    }

    fn put_smap(&self, bytes: &mut [u8]) -> Result<(), Error> {
        let bad = || Error::BadImage("its SMAP sites are not where it says");
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
        Ok(())
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
        isolate: word(104)?,
        isolate_end: word(112)?,
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
            (104, 0x9000),
            (112, 0x3000),
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
    fn jumps_are_put_where_the_image_says_and_nowhere_else() {
        let good = super::super::space::tests::image();
        let bytes = good.prepared(false, true).expect("good sites");
        // From behind 0x1105 back to 0x1080.
        assert_eq!(bytes[0x1100..0x1105], [0xe9, 0x7b, 0xff, 0xff, 0xff]);
        let changed = (0..bytes.len()).filter(|&at| bytes[at] != good.bytes[at]);
        assert_eq!(changed.count(), 5);
        for (site, to) in [(0x1101u64, 0x1080u64), (0x1ffe, 0x1080), (0x1100, 0x2000)] {
            let mut bytes = good.bytes.to_vec();
            bytes[0x3010..0x3018].copy_from_slice(&site.to_le_bytes());
            bytes[0x3018..0x3020].copy_from_slice(&to.to_le_bytes());
            let image = Image::parse(bytes.leak()).expect("the header is good");
            let refused = image.prepared(false, true);
            assert!(
                matches!(refused, Err(Error::BadImage(_))),
                "{site:#x} {to:#x}"
            );
        }
    }

    #[test]
    fn a_smap_site_without_its_nop_is_refused() {
        let good = super::super::space::tests::image();
        let mut bytes = good.bytes.to_vec();
        bytes[0x2100] = 0x90;
        let image = Image::parse(bytes.leak()).expect("the header is good");
        assert!(matches!(
            image.prepared(true, false),
            Err(Error::BadImage(_))
        ));
    }
}
