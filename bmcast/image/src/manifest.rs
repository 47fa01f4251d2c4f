//! The manifest of an image: how long it is, and the sum of each chunk.

use alloc::vec::Vec;

use crate::{Hash, SECTOR, Sectors};

const MAGIC: &[u8; 8] = b"BMCASTIM";
const VERSION: u32 = 1;
/// Magic, version, bytes of a chunk, bytes of the image.
const HEAD: usize = 24;

/// Bytes of a chunk if nobody says it.
pub const DEFAULT_CHUNK: u32 = 64 << 10;
/// Fewest bytes of a chunk.
pub const MIN_CHUNK: u32 = 16 << 10;
/// Most bytes of a chunk.
pub const MAX_CHUNK: u32 = 1 << 20;
/// Most chunks of an image: the VMM holds all sums in memory.
pub const MAX_CHUNKS: u32 = 1 << 22;
/// Most bytes of a manifest.
pub const MAX_MANIFEST: usize = HEAD + MAX_CHUNKS as usize * 36 + 4 + 32;

/// Why bytes are no manifest, or an image can have none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Something else.
    #[error("this is no manifest of a BMcast image (`bmcast manifest IMAGE` makes one)")]
    Magic,
    /// A version that is not known.
    #[error("the manifest has version {0}; this program knows version {VERSION}")]
    Version(u32),
    /// Not all of it, or more.
    #[error("the manifest has {is} bytes and should have {should}: it was cut, or it is damaged")]
    Length {
        /// Bytes that there are.
        is: usize,
        /// Bytes that there should be.
        should: usize,
    },
    /// A byte has changed.
    #[error("the manifest is damaged: its sum is wrong")]
    Sum,
    /// No such chunks.
    #[error(
        "chunks of {0} bytes: their size is a power of two from {MIN_CHUNK} to {MAX_CHUNK} bytes"
    )]
    Chunk(u32),
    /// No such image.
    #[error(
        "an image of {image} bytes in chunks of {chunk}: it has whole sectors of {SECTOR} bytes, and \
         1 to {MAX_CHUNKS} chunks"
    )]
    Image {
        /// Bytes of it.
        image: u64,
        /// Bytes of a chunk.
        chunk: u32,
    },
    /// A profile with a chunk that is not there, or is there twice.
    #[error(
        "entry {entry} of the profile: chunk {chunk} of {chunks} is not there, or is named twice"
    )]
    Profile {
        /// Which.
        entry: usize,
        /// What it says.
        chunk: u32,
        /// Chunks of the image.
        chunks: u32,
    },
    /// Another number of chunks was pushed than the image has.
    #[error("the image has {should} chunks, and {is} were summed")]
    Chunks {
        /// How many were.
        is: u32,
        /// How many there are.
        should: u32,
    },
}

/// How an image is cut into chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunks {
    image: u64,
    chunk: u32,
    count: u32,
}

impl Chunks {
    /// An image of `image` bytes in chunks of `chunk` bytes.
    ///
    /// # Errors
    /// There is no such image.
    pub fn new(image: u64, chunk: u32) -> Result<Self, ManifestError> {
        if !chunk.is_power_of_two() || !(MIN_CHUNK..=MAX_CHUNK).contains(&chunk) {
            return Err(ManifestError::Chunk(chunk));
        }
        let count = image.div_ceil(u64::from(chunk));
        match u32::try_from(count) {
            Ok(count) if (1..=MAX_CHUNKS).contains(&count) && image.is_multiple_of(SECTOR) => {
                Ok(Self {
                    image,
                    chunk,
                    count,
                })
            }
            _ => Err(ManifestError::Image { image, chunk }),
        }
    }

    /// Bytes of the image.
    #[must_use]
    pub fn image_bytes(self) -> u64 {
        self.image
    }

    /// Sectors of the image.
    #[must_use]
    pub fn image_sectors(self) -> u64 {
        self.image / SECTOR
    }

    /// Bytes of each chunk but the last.
    #[must_use]
    pub fn chunk_bytes(self) -> u32 {
        self.chunk
    }

    /// How many.
    #[must_use]
    pub fn count(self) -> u32 {
        self.count
    }

    /// First byte of a chunk.
    #[must_use]
    pub fn offset(self, chunk: u32) -> u64 {
        u64::from(chunk) * u64::from(self.chunk)
    }

    /// Bytes of a chunk: the last one may be shorter, those behind it have none.
    #[must_use]
    pub fn length(self, chunk: u32) -> u32 {
        let left = self.image.saturating_sub(self.offset(chunk));
        u32::try_from(left).map_or(self.chunk, |left| left.min(self.chunk))
    }

    /// Sectors of a chunk.
    #[must_use]
    pub fn sectors(self, chunk: u32) -> Sectors {
        Sectors {
            start: self.offset(chunk) / SECTOR,
            count: u64::from(self.length(chunk)) / SECTOR,
        }
    }

    /// The chunk that a sector of the image is in.
    #[must_use]
    pub fn of_sector(self, sector: u64) -> u32 {
        let chunk = sector / (u64::from(self.chunk) / SECTOR);
        u32::try_from(chunk).map_or(self.count - 1, |chunk| chunk.min(self.count - 1))
    }
}

/// The manifest of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    chunks: Chunks,
    /// As it is stored: the sums are long, and are not wanted twice in a VMM's memory.
    bytes: Vec<u8>,
    id: Hash,
    zeros: Hash,
    zeros_of_last: Hash,
    profile: Vec<u32>,
}

impl Manifest {
    /// Reads one.
    ///
    /// # Errors
    /// It is none, or damaged, or of another version.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, ManifestError> {
        if bytes.get(..8) != Some(&MAGIC[..]) {
            return Err(ManifestError::Magic);
        }
        let too_short = |should| ManifestError::Length {
            is: bytes.len(),
            should,
        };
        let version = u32_at(&bytes, 8).ok_or(too_short(HEAD))?;
        if version != VERSION {
            return Err(ManifestError::Version(version));
        }
        let chunk = u32_at(&bytes, 12).ok_or(too_short(HEAD))?;
        let image = u64_at(&bytes, 16).ok_or(too_short(HEAD))?;
        let chunks = Chunks::new(image, chunk)?;
        let sums = sums_end(chunks);
        let entries = u32_at(&bytes, sums).ok_or(too_short(sums + 4))?;
        let in_profile = usize::try_from(entries.min(chunks.count())).unwrap_or(0);
        let end = sums + 4 + in_profile * 4;
        if bytes.len() != end + 32 || entries > chunks.count() {
            return Err(too_short(end + 32));
        }
        if Hash::of(&bytes[..end]).0 != bytes[end..] {
            return Err(ManifestError::Sum);
        }
        let profile: Vec<u32> = bytes[sums + 4..end]
            .chunks_exact(4)
            .map(|entry| u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]))
            .collect();
        check_profile(chunks, &profile)?;
        Ok(Self::of_parts(chunks, bytes, profile))
    }

    /// Makes one from the sums of all chunks.
    ///
    /// # Errors
    /// The number of sums is another than that of chunks, or the profile is wrong.
    pub fn new(chunks: Chunks, sums: &[Hash], profile: Vec<u32>) -> Result<Self, ManifestError> {
        if usize::try_from(chunks.count()) != Ok(sums.len()) {
            return Err(ManifestError::Chunks {
                is: u32::try_from(sums.len()).unwrap_or(u32::MAX),
                should: chunks.count(),
            });
        }
        check_profile(chunks, &profile)?;
        let mut bytes = Vec::with_capacity(sums_end(chunks) + 4 + profile.len() * 4 + 32);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&chunks.chunk.to_le_bytes());
        bytes.extend_from_slice(&chunks.image.to_le_bytes());
        for sum in sums {
            bytes.extend_from_slice(&sum.0);
        }
        let entries = u32::try_from(profile.len()).unwrap_or(u32::MAX);
        bytes.extend_from_slice(&entries.to_le_bytes());
        for entry in &profile {
            bytes.extend_from_slice(&entry.to_le_bytes());
        }
        let sum = Hash::of(&bytes);
        bytes.extend_from_slice(&sum.0);
        Ok(Self::of_parts(chunks, bytes, profile))
    }

    /// The same image with another profile, and so with the same [`Manifest::id`].
    ///
    /// # Errors
    /// The profile is wrong.
    pub fn with_profile(&self, profile: Vec<u32>) -> Result<Self, ManifestError> {
        let sums: Vec<Hash> = (0..self.chunks.count()).map(|n| self.sum(n)).collect();
        Self::new(self.chunks, &sums, profile)
    }

    fn of_parts(chunks: Chunks, bytes: Vec<u8>, profile: Vec<u32>) -> Self {
        let last = chunks.length(chunks.count() - 1);
        Self {
            chunks,
            id: Hash::of(&bytes[..sums_end(chunks)]),
            bytes,
            zeros: Hash::of_zeros(u64::from(chunks.chunk)),
            zeros_of_last: Hash::of_zeros(u64::from(last)),
            profile,
        }
    }

    /// As it is stored and sent.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What names the content: the sum of all but the profile. Whoever knows it knows each byte
    /// of the image.
    #[must_use]
    pub fn id(&self) -> Hash {
        self.id
    }

    /// How the image is cut.
    #[must_use]
    pub fn chunks(&self) -> Chunks {
        self.chunks
    }

    /// The sum of a chunk; of one that is not there, zeros.
    #[must_use]
    pub fn sum(&self, chunk: u32) -> Hash {
        let mut sum = [0; 32];
        if chunk < self.chunks.count() {
            let at = HEAD + usize::try_from(chunk).unwrap_or(0) * 32;
            sum.copy_from_slice(&self.bytes[at..at + 32]);
        }
        Hash(sum)
    }

    /// Whether all of a chunk is zero, so that it need not be fetched.
    #[must_use]
    pub fn is_zero(&self, chunk: u32) -> bool {
        let zeros = match chunk + 1 == self.chunks.count() {
            true => self.zeros_of_last,
            false => self.zeros,
        };
        self.sum(chunk) == zeros
    }

    /// Whether these are the bytes of a chunk.
    #[must_use]
    pub fn verify(&self, chunk: u32, data: &[u8]) -> bool {
        chunk < self.chunks.count()
            && usize::try_from(self.chunks.length(chunk)) == Ok(data.len())
            && Hash::of(data) == self.sum(chunk)
    }

    /// Chunks in the order in which an earlier boot wanted them.
    #[must_use]
    pub fn profile(&self) -> &[u32] {
        &self.profile
    }
}

fn sums_end(chunks: Chunks) -> usize {
    HEAD + usize::try_from(chunks.count()).unwrap_or(0) * 32
}

fn check_profile(chunks: Chunks, profile: &[u32]) -> Result<(), ManifestError> {
    let count = usize::try_from(chunks.count()).unwrap_or(0);
    let mut seen = alloc::vec![false; count];
    for (entry, chunk) in profile.iter().enumerate() {
        let seen = usize::try_from(*chunk).ok().and_then(|n| seen.get_mut(n));
        match seen {
            Some(seen) if !*seen => *seen = true,
            _ => {
                return Err(ManifestError::Profile {
                    entry,
                    chunk: *chunk,
                    chunks: chunks.count(),
                });
            }
        }
    }
    Ok(())
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use proptest::prelude::*;

    use super::*;

    fn small() -> Manifest {
        let chunks = Chunks::new(3 * 16384 - 512, 16384).unwrap();
        let sums = [
            Hash::of(&[1; 16384]),
            Hash::of_zeros(16384),
            Hash::of_zeros(16384 - 512),
        ];
        Manifest::new(chunks, &sums, vec![2, 0]).unwrap()
    }

    #[test]
    fn written_and_read() {
        let manifest = small();
        let again = Manifest::parse(manifest.as_bytes().to_vec()).unwrap();
        assert_eq!(again, manifest);
        assert_eq!(again.profile(), [2, 0]);
        assert!(again.verify(0, &[1; 16384]));
        assert!(!again.verify(0, &[2; 16384]));
        assert!(!again.verify(0, &[1; 512]) && !again.verify(3, &[]));
        assert_eq!(
            [0, 1, 2, 3].map(|n| again.is_zero(n)),
            [false, true, true, false]
        );
        let chunks = again.chunks();
        assert_eq!(
            chunks.sectors(2),
            Sectors {
                start: 64,
                count: 31
            }
        );
        assert_eq!(chunks.sectors(3).count, 0);
        assert_eq!((chunks.of_sector(63), chunks.of_sector(64)), (1, 2));
    }

    #[test]
    fn the_profile_is_not_in_the_id() {
        let manifest = small();
        let other = manifest.with_profile(vec![1]).unwrap();
        assert_eq!(other.id(), manifest.id());
        assert_ne!(other.as_bytes(), manifest.as_bytes());
        for wrong in [vec![3], vec![1, 1]] {
            let error = manifest.with_profile(wrong).unwrap_err();
            assert!(matches!(error, ManifestError::Profile { .. }));
        }
    }

    #[test]
    fn images_that_cannot_be() {
        for (image, chunk) in [(0, 65536), (100, 65536), (u64::MAX - 511, 1 << 20)] {
            let error = Chunks::new(image, chunk).unwrap_err();
            assert_eq!(error, ManifestError::Image { image, chunk });
        }
        for chunk in [0, 512, 3 << 14, 2 << 20] {
            assert_eq!(Chunks::new(512, chunk), Err(ManifestError::Chunk(chunk)));
        }
    }

    #[test]
    fn another_version_is_refused() {
        let mut bytes = small().as_bytes().to_vec();
        bytes[8] = 2;
        assert_eq!(Manifest::parse(bytes), Err(ManifestError::Version(2)));
        assert_eq!(Manifest::parse(vec![0; 100]), Err(ManifestError::Magic));
    }

    proptest! {
        #[test]
        fn any_change_is_seen(at in 0..200usize, flip in 1u8.., cut in 0..200usize) {
            let bytes = small().as_bytes().to_vec();
            let mut changed = bytes.clone();
            let at = at % changed.len();
            changed[at] ^= flip;
            prop_assert!(Manifest::parse(changed).is_err());
            let cut = cut % bytes.len();
            prop_assert!(Manifest::parse(bytes[..cut].to_vec()).is_err());
            let mut longer = bytes;
            longer.push(0);
            prop_assert!(Manifest::parse(longer).is_err());
        }

        #[test]
        fn any_bytes(mut bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Manifest::parse(bytes.clone());
            let head = small().as_bytes()[..HEAD].to_vec();
            let n = bytes.len().min(HEAD - 8);
            bytes[..n].copy_from_slice(&head[..n]);
            prop_assert!(Manifest::parse(bytes).is_err());
        }
    }
}
