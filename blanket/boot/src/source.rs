//! Where bytes come from: a disk, a part of one, and a limit on reading either.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A disk or a part of one, read at offsets.
pub trait Source: Send + Sync {
    /// Its length in bytes.
    fn size(&self) -> u64;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// The medium's own, or [`io::ErrorKind::UnexpectedEof`] when the range goes past
    /// [`Source::size`].
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
}

impl Source for [u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..start.checked_add(buffer.len())?))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}

impl Source for Vec<u8> {
    fn size(&self) -> u64 {
        self.as_slice().size()
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.as_slice().read_exact_at(buffer, offset)
    }
}

/// A raw image. The length is taken when it is made: it must not shrink.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    size: u64,
}

impl RawFile {
    /// Takes an open file or block device.
    ///
    /// # Errors
    /// The length cannot be told.
    pub fn new(mut file: File) -> io::Result<Self> {
        // A block device's metadata has no length.
        let size = io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
        Ok(Self { file, size })
    }
}

impl Source for RawFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }
}

/// How much work one image may cause. Every read of it is charged, so a file system that
/// leads a reader in a circle ends in an error.
#[derive(Debug)]
struct Budget {
    left: AtomicU64,
}

/// What a read costs beside its bytes.
const READ_COST: u64 = 512;

/// A range of a disk; offsets are its own. Cheap to clone.
#[derive(Clone)]
pub struct Window {
    source: Arc<dyn Source>,
    start: u64,
    size: u64,
    budget: Arc<Budget>,
}

impl Window {
    /// The whole of `source`, of which at most `budget` bytes will be read, counting
    /// everything that is read again.
    pub fn new(source: Arc<dyn Source>, budget: u64) -> Self {
        let size = source.size();
        Self {
            source,
            start: 0,
            size,
            budget: Arc::new(Budget {
                left: AtomicU64::new(budget),
            }),
        }
    }

    /// A part of it, cut where this ends.
    #[must_use]
    pub fn part(&self, start: u64, size: u64) -> Self {
        let start = start.min(self.size);
        Self {
            source: Arc::clone(&self.source),
            start: self.start + start,
            size: size.min(self.size - start),
            budget: Arc::clone(&self.budget),
        }
    }

    /// Its length in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buffer` from `offset`.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let length = buffer.len() as u64;
        if offset.checked_add(length).is_none_or(|end| end > self.size) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let cost = length + READ_COST;
        self.budget
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(cost)
            })
            .map_err(|_| {
                io::Error::other(
                    "more was read than any boot needs: the file system is damaged or goes in circles",
                )
            })?;
        self.source.read_exact_at(buffer, self.start + offset)
    }
}

impl std::fmt::Debug for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}+{}", self.start, self.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_stay_within() {
        let all = Window::new(Arc::new((0..=255).collect::<Vec<u8>>()), 1 << 20);
        let part = all.part(10, 20).part(5, 1000);
        assert_eq!(part.size(), 15);
        let mut two = [0; 2];
        part.read_at(1, &mut two).unwrap();
        assert_eq!(two, [16, 17]);
        assert!(part.read_at(14, &mut two).is_err());
        assert!(part.read_at(u64::MAX, &mut two).is_err());
        assert_eq!(all.part(u64::MAX, u64::MAX).size(), 0);
    }

    #[test]
    fn reading_without_end_ends() {
        let all = Window::new(Arc::new(vec![0; 512]), 4096);
        let mut sector = [0; 512];
        let reads = (0..100)
            .filter(|_| all.read_at(0, &mut sector).is_ok())
            .count();
        assert_eq!(reads, 4);
    }
}
