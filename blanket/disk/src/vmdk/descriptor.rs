//! The text that says which extents make a disk.

use std::io;

use super::{LARGEST, invalid};
use crate::SECTOR;

/// Most extents of an image, and most files.
const MOST: usize = 256;

/// What a descriptor says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Descriptor {
    /// In the order of the disk.
    pub(super) extents: Vec<Extent>,
    /// Names of files, each once.
    pub(super) files: Vec<String>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Extent {
    pub(super) sectors: u64,
    pub(super) kind: Kind,
}

/// Files are numbers of [`Descriptor::files`].
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Zero,
    /// A file, and the offset in it, bytes.
    Flat(usize, u64),
    /// A file.
    Sparse(usize),
}

impl Descriptor {
    /// Understands the text of a descriptor; zeroes at its end are no part of it.
    pub(super) fn parse(text: &[u8]) -> io::Result<Self> {
        let end = text
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(text.len());
        let mut descriptor = Self::default();
        // Names in other encodings are of no use to us, the rest is ASCII.
        for line in String::from_utf8_lossy(&text[..end]).lines() {
            let line = line.trim();
            let lower = line.to_ascii_lowercase();
            if let Some(("parentcid", parent)) = pair(&lower)
                && parent != "ffffffff"
            {
                let text = "it is the difference to another image, which is not supported";
                return Err(invalid(text));
            }
            let access = lower.split_whitespace().next().unwrap_or_default();
            if matches!(access, "rw" | "rdonly") {
                descriptor.extent(line)?;
            } else if access == "noaccess" {
                return Err(invalid("it has an extent that may not be read"));
            }
        }
        Ok(descriptor)
    }

    /// `RW 4192256 FLAT "disk-flat.vmdk" 0`
    fn extent(&mut self, line: &str) -> io::Result<()> {
        let bad = || {
            invalid(format!(
                "its descriptor has a line that makes no sense: {line}"
            ))
        };
        let (before, name, after) = match line.split_once('"') {
            Some((before, rest)) => {
                let (name, after) = rest.rsplit_once('"').ok_or_else(bad)?;
                (before, Some(name), after)
            }
            None => (line, None, ""),
        };
        let mut words = before.split_whitespace().skip(1);
        let sectors = words.next().and_then(|word| word.parse::<u64>().ok());
        let sectors = sectors
            .filter(|&sectors| sectors <= LARGEST / SECTOR)
            .ok_or_else(bad)?;
        let kind = words.next().ok_or_else(bad)?.to_ascii_uppercase();
        let kind = match (kind.as_str(), name) {
            ("ZERO", _) => Kind::Zero,
            ("FLAT" | "VMFS", Some(name)) => {
                let offset = match after.split_whitespace().next() {
                    Some(word) => word.parse::<u64>().map_err(|_| bad())?,
                    None => 0,
                };
                let offset = offset.checked_mul(SECTOR).ok_or_else(bad)?;
                Kind::Flat(self.file(name)?, offset)
            }
            ("SPARSE", Some(name)) => Kind::Sparse(self.file(name)?),
            (kind, _) => return Err(invalid(format!("extents of kind {kind} are not supported"))),
        };
        if self.extents.len() == MOST {
            return Err(invalid(format!("it has more than {MOST} extents")));
        }
        self.extents.push(Extent { sectors, kind });
        Ok(())
    }

    fn file(&mut self, name: &str) -> io::Result<usize> {
        if let Some(index) = self.files.iter().position(|known| known == name) {
            return Ok(index);
        }
        if self.files.len() == MOST {
            return Err(invalid(format!("it stands on more than {MOST} files")));
        }
        self.files.push(name.into());
        Ok(self.files.len() - 1)
    }
}

fn pair(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once('=')?;
    Some((key.trim(), value.trim().trim_matches('"')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_in_order_and_files_once() {
        let text = b"# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\n\
            RW 63 FLAT \"a b.vmdk\" 2\nRDONLY 10 ZERO\nRW 7 SPARSE \"s001.vmdk\"\n\
            RW 5 VMFS \"a b.vmdk\"\nddb.adapterType = \"ide\"\n\0\0garbage";
        let parsed = Descriptor::parse(text).unwrap();
        assert_eq!(parsed.files, ["a b.vmdk", "s001.vmdk"]);
        let kinds: Vec<_> = parsed
            .extents
            .iter()
            .map(|one| (one.sectors, &one.kind))
            .collect();
        assert_eq!(
            kinds,
            [
                (63, &Kind::Flat(0, 1024)),
                (10, &Kind::Zero),
                (7, &Kind::Sparse(1)),
                (5, &Kind::Flat(0, 0)),
            ]
        );
    }

    #[test]
    fn what_it_cannot_read_is_an_error() {
        for text in [
            "parentCID=12345678",
            "RW x FLAT \"a\" 0",
            "RW 1 FLAT",
            "RW 1 FLAT \"a",
            "RW 1 SESPARSE \"a\"",
            "RW 18446744073709551615 ZERO",
            "NOACCESS 1 ZERO",
        ] {
            assert!(Descriptor::parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
