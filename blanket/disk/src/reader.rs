//! Reading an image from the host's side, one call at a time.

use std::fmt::Debug;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// Bytes that can be read from anywhere, by several threads at once.
pub(crate) trait Source: Send + Sync + Debug {
    /// Bytes.
    fn size(&self) -> u64;

    /// Fills `into` from `offset` on. The range lies within [`Source::size`].
    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// What it stands on, if it does: all that is below its own file.
    fn below(&self) -> Option<&Arc<dyn Source>> {
        None
    }

    /// Whether any byte of a range, which lies within [`Source::size`], is its own and not of
    /// what it stands on.
    fn is_own(&self, _offset: u64, _length: u64) -> io::Result<bool> {
        Ok(true)
    }
}

/// What a guest would see in an image, for tools of the host: finding a kernel, copying.
///
/// It waits for the medium, and sees writes that are under way in any order. It keeps the image
/// open.
#[derive(Clone, Debug)]
pub struct Reader {
    source: Arc<dyn Source>,
}

impl Reader {
    pub(crate) fn new(source: Arc<dyn Source>) -> Self {
        Self { source }
    }

    /// Reads a file or block device as it is, without any format and without a lock.
    ///
    /// # Errors
    /// Its size cannot be found out.
    pub fn from_file(file: File) -> io::Result<Self> {
        Ok(Self::new(Arc::new(Plain::new(file)?)))
    }

    /// Bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.source.size()
    }

    /// Fills `into` with what is at `offset`, bytes.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if that is beyond the end; else the host's own.
    pub fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(into.len() as u64);
        if end.is_none_or(|end| end > self.size()) {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!(
                    "{} bytes at {offset} are beyond the end ({} bytes)",
                    into.len(),
                    self.size()
                ),
            ));
        }
        self.source.read_at(offset, into)
    }

    /// Whether the image stands on another one, and has of its own only what differs.
    #[must_use]
    pub fn has_backing(&self) -> bool {
        self.source.below().is_some()
    }

    /// Reads what the image stands on, and nothing of its own: what never changes, whatever its
    /// guest writes. Its size may be another one.
    #[must_use]
    pub fn below(&self) -> Option<Self> {
        self.source
            .below()
            .map(|below| Self::new(Arc::clone(below)))
    }

    /// Whether any byte of a range is the image's own, and not of what it stands on. Bytes
    /// beyond the end are nobody's; an image that stands on none owns all.
    ///
    /// # Errors
    /// The image is damaged, or the host's own.
    pub fn is_own(&self, offset: u64, length: u64) -> io::Result<bool> {
        let length = length.min(self.size().saturating_sub(offset));
        if length == 0 {
            return Ok(false);
        }
        self.source.is_own(offset, length)
    }
}

/// A file as it is.
#[derive(Debug)]
pub(crate) struct Plain {
    file: File,
    size: u64,
}

impl Plain {
    pub(crate) fn new(file: File) -> io::Result<Self> {
        let size = length(&file)?;
        Ok(Self { file, size })
    }
}

impl Source for Plain {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(into, offset)
    }
}

/// Bytes of a file or a block device; the metadata of the latter say 0.
pub(crate) fn length(mut file: &File) -> io::Result<u64> {
    file.seek(SeekFrom::End(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn reads_within_the_end_only() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let reader = Reader::from_file(file).unwrap();
        let mut three = [0; 3];
        reader.read_exact_at(7, &mut three).unwrap();
        assert_eq!(&three, b"789");
        for offset in [8, u64::MAX] {
            let error = reader.read_exact_at(offset, &mut three).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        }
    }
}
