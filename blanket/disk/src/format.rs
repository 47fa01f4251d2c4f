//! Which format an image has. Nothing is guessed from bytes alone: see `docs/images.md`.

use std::ffi::OsStr;
use std::fmt;
use std::path::Path;
use std::str::FromStr;

/// Bytes at the beginning of a file that tell formats from each other.
pub(crate) const HEAD: usize = 512;

/// How an image keeps the guest's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// As they are: a file or a block device.
    Raw,
    /// QEMU's format, versions 2 and 3.
    Qcow2,
    /// VMware's format; read only.
    Vmdk,
    /// Virtual PC's format, fixed and dynamic; read only.
    Vhd,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 4] = [Self::Raw, Self::Qcow2, Self::Vmdk, Self::Vhd];

    /// Its name in options and messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhd => "vhd",
        }
    }

    /// Its name in qcow2 headers, where QEMU reads it too.
    pub(crate) const fn qemu_name(self) -> &'static str {
        match self {
            Self::Vhd => "vpc",
            other => other.name(),
        }
    }

    /// Whether images can be written.
    #[must_use]
    pub const fn writable(self) -> bool {
        matches!(self, Self::Raw | Self::Qcow2)
    }

    /// What the name of a file says.
    pub(crate) fn of_name(path: &Path) -> Option<Self> {
        let extension = path.extension().and_then(OsStr::to_str)?;
        match extension.to_ascii_lowercase().as_str() {
            "raw" | "img" | "iso" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            "vmdk" => Some(Self::Vmdk),
            "vhd" | "vpc" => Some(Self::Vhd),
            _ => None,
        }
    }

    /// What the first bytes of a file look like. [`Format::Raw`] looks like nothing.
    pub(crate) fn of_head(head: &[u8]) -> Option<Self> {
        const DESCRIPTOR: &[u8] = b"# disk descriptorfile";
        let descriptor = head.get(..DESCRIPTOR.len());
        if head.starts_with(b"QFI\xfb") {
            Some(Self::Qcow2)
        } else if head.starts_with(b"KDMV")
            || head.starts_with(b"COWD")
            || descriptor.is_some_and(|start| start.eq_ignore_ascii_case(DESCRIPTOR))
        {
            Some(Self::Vmdk)
        } else if head.starts_with(b"conectix") {
            Some(Self::Vhd)
        } else {
            None
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// No such format.
#[derive(Debug, thiserror::Error)]
#[error("there is no image format `{0}`: choose raw, qcow2, vmdk or vhd")]
pub struct UnknownFormat(String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        match name {
            // QEMU's names for two of them.
            "vpc" => Ok(Self::Vhd),
            "file" => Ok(Self::Raw),
            name => Self::ALL
                .into_iter()
                .find(|format| format.name() == name)
                .ok_or_else(|| UnknownFormat(name.into())),
        }
    }
}

/// Why the format of an image is not known.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Doubt {
    /// Neither its name nor its kind says it; the content may look like one.
    Unnamed(Option<Format>),
    /// The name says the first, the content looks like the second, or like none.
    Differs(Format, Option<Format>),
}

/// The format of an image that nobody gave: its name and its content must agree. A guest can
/// give its disk any content, but no name.
pub(crate) fn agreed(named: Option<Format>, seen: Option<Format>) -> Result<Format, Doubt> {
    match (named, seen) {
        (None, seen) => Err(Doubt::Unnamed(seen)),
        (Some(Format::Raw), None) => Ok(Format::Raw),
        // A fixed one has its only header at its end.
        (Some(Format::Vhd), None) => Ok(Format::Vhd),
        (Some(named), Some(seen)) if named == seen => Ok(named),
        (Some(named), seen) => Err(Doubt::Differs(named, seen)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_cannot_turn_its_raw_disk_into_another_format() {
        let raw = Format::of_name(Path::new("disk.IMG"));
        assert_eq!(raw, Some(Format::Raw));
        assert_eq!(agreed(raw, None), Ok(Format::Raw));
        for head in [
            &b"QFI\xfb\0\0\0\x03"[..],
            b"KDMV",
            b"conectix",
            b"# Disk DescriptorFile\n",
        ] {
            let seen = Format::of_head(head);
            assert!(seen.is_some());
            assert_eq!(agreed(raw, seen), Err(Doubt::Differs(Format::Raw, seen)));
            assert_eq!(agreed(None, seen), Err(Doubt::Unnamed(seen)));
        }
        assert_eq!(agreed(None, None), Err(Doubt::Unnamed(None)));
    }

    #[test]
    fn names_of_formats() {
        for format in Format::ALL {
            assert_eq!(format.name().parse::<Format>().unwrap(), format);
            assert_eq!(format.qemu_name().parse::<Format>().unwrap(), format);
        }
        assert!("vdi".parse::<Format>().is_err());
    }
}
