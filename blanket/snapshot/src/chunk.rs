//! Chunks, one behind the other.
//!
//! ```text
//! "BLANKETV"  version u32  0 u32
//! chunk: kind [u8; 4]  length u32  sum [u8; 32]  bytes
//! ...
//! chunk of kind "END ": number of chunks before it, u64
//! ```
//!
//! All numbers are little-endian. A sum is BLAKE3 over the chunk's place (u64, from 0),
//! kind, length and bytes, keyed by the place so that no chunk passes for another.

use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::Error;
use crate::base::{self, Base};
use crate::pages::{self, Run};
use crate::pieces::{self, Piece};

const MAGIC: &[u8; 8] = b"BLANKETV";

/// Version of the container and of all that is in it.
pub const VERSION: u32 = 5;

/// Most bytes of a chunk.
pub const MAX_CHUNK: usize = 64 << 20;

/// Kinds of chunks, in the order in which they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What the VM is made of, as JSON. The first one.
    Machine,
    /// Which disks there are, as JSON: the first one where there is no VM beside them.
    Disks,
    /// Pages of its memory. As many as there are.
    Pages,
    /// Pages that are blocks of what a disk stands on, which whoever reads has too. Among the
    /// pages of a VM that moves.
    Base,
    /// A piece of a disk. As many as there are, among the pages.
    Disk,
    /// All before it is to be acknowledged. Among the pages of a VM that moves.
    Mark,
    /// Which pages follow a VM that moves, once it runs: a set, packed. Behind all pages.
    Missing,
    /// What its core and its backends know, as JSON. The last one before the end.
    State,
    /// The end.
    End,
}

impl Kind {
    const fn tag(self) -> [u8; 4] {
        *match self {
            Self::Machine => b"VM  ",
            Self::Disks => b"DSKS",
            Self::Pages => b"PAGE",
            Self::Base => b"BASE",
            Self::Disk => b"DISK",
            Self::Mark => b"MARK",
            Self::Missing => b"MISS",
            Self::State => b"STAT",
            Self::End => b"END ",
        }
    }

    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Machine => "machine",
            Self::Disks => "disks",
            Self::Pages => "pages",
            Self::Base => "base",
            Self::Disk => "disk",
            Self::Mark => "mark",
            Self::Missing => "missing",
            Self::State => "state",
            Self::End => "end",
        }
    }

    fn of(tag: [u8; 4]) -> Option<Self> {
        let all = [
            Self::Machine,
            Self::Disks,
            Self::Pages,
            Self::Base,
            Self::Disk,
            Self::Mark,
            Self::Missing,
            Self::State,
            Self::End,
        ];
        all.into_iter().find(|kind| kind.tag() == tag)
    }
}

fn sum(place: u64, tag: [u8; 4], length: u32, bytes: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&place.to_le_bytes());
    hasher.update(&tag);
    hasher.update(&length.to_le_bytes());
    hasher.update(bytes);
    *hasher.finalize().as_bytes()
}

/// Why a chunk's bytes are not there.
fn unread(place: u64) -> impl Fn(io::Error) -> Error {
    move |error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Error::Truncated(place),
        _ => Error::Read(error),
    }
}

/// Writes a saved VM.
pub struct Writer<W: Write> {
    to: W,
    place: u64,
    written: u64,
}

impl<W: Write> Writer<W> {
    /// Begins.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn new(mut to: W) -> Result<Self, Error> {
        let mut head = MAGIC.to_vec();
        head.extend(VERSION.to_le_bytes());
        head.extend([0; 4]);
        to.write_all(&head).map_err(Error::Write)?;
        Ok(Self {
            to,
            place: 0,
            written: head.len() as u64,
        })
    }

    /// A chunk of any bytes.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn chunk(&mut self, kind: Kind, bytes: &[u8]) -> Result<(), Error> {
        let length = u32::try_from(bytes.len())
            .ok()
            .filter(|_| bytes.len() <= MAX_CHUNK)
            .ok_or_else(|| Error::Write(io::ErrorKind::FileTooLarge.into()))?;
        let tag = kind.tag();
        let mut head = tag.to_vec();
        head.extend(length.to_le_bytes());
        head.extend(sum(self.place, tag, length, bytes));
        self.to.write_all(&head).map_err(Error::Write)?;
        self.to.write_all(bytes).map_err(Error::Write)?;
        self.place += 1;
        self.written += (head.len() + bytes.len()) as u64;
        Ok(())
    }

    /// A chunk of JSON.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn text<T: Serialize>(&mut self, kind: Kind, what: &T) -> Result<(), Error> {
        let bytes = serde_json::to_vec(what).map_err(|e| Error::Write(e.into()))?;
        self.chunk(kind, &bytes)
    }

    /// A run of pages, compressed.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn pages(&mut self, first: u64, bytes: &[u8]) -> Result<(), Error> {
        let packed = pages::pack(first, bytes).map_err(Error::Write)?;
        self.chunk(Kind::Pages, &packed)
    }

    /// A run of pages that need not be sent: from `block` on they are blocks of what a disk
    /// stands on. Only the hash of their `bytes` goes.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn base(&mut self, number: u32, first: u64, block: u64, bytes: &[u8]) -> Result<(), Error> {
        let packed = base::pack(number, first, block, bytes).map_err(Error::Write)?;
        self.chunk(Kind::Base, &packed)
    }

    /// A piece of a disk, compressed.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn disk(&mut self, number: u32, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        let packed = pieces::pack(number, offset, bytes).map_err(Error::Write)?;
        self.chunk(Kind::Disk, &packed)
    }

    /// A mark, and all before it is on its way.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn mark(&mut self) -> Result<&mut W, Error> {
        self.chunk(Kind::Mark, &[])?;
        self.to.flush().map_err(Error::Write)?;
        Ok(&mut self.to)
    }

    /// Ends, and gives the stream back with the number of bytes.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn finish(mut self) -> Result<(W, u64), Error> {
        let count = self.place;
        self.chunk(Kind::End, &count.to_le_bytes())?;
        self.to.flush().map_err(Error::Write)?;
        Ok((self.to, self.written))
    }
}

/// What memory and disks come in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Pages of memory.
    Pages(Run),
    /// Pages of memory that are blocks of what a disk stands on.
    Base(Base),
    /// A piece of a disk.
    Disk(Piece),
    /// Whoever writes waits for the word that all before this is here.
    Mark,
    /// A set of pages that follow.
    Missing(Vec<u8>),
}

/// Where a run of pages is in a file, that has been found to be what was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Of the chunk's bytes in the file.
    offset: u64,
    length: u32,
    sum: [u8; 32],
    /// Among the chunks.
    place: u64,
    /// The first page.
    pub first: u64,
    /// How many pages.
    pub count: u64,
}

impl Place {
    /// Reads it again.
    ///
    /// # Errors
    /// It is not any more what it was.
    pub fn read(&self, file: &impl FileExt) -> Result<Run, Error> {
        let mut bytes = vec![0; self.length as usize];
        file.read_exact_at(&mut bytes, self.offset)
            .map_err(unread(self.place))?;
        if sum(self.place, Kind::Pages.tag(), self.length, &bytes) != self.sum {
            return Err(Error::Damaged(self.place));
        }
        pages::unpack(&bytes)
            .filter(|run| self.is_of(run))
            .ok_or(Error::Pages(self.place))
    }

    fn is_of(&self, run: &Run) -> bool {
        run.first == self.first && run.bytes.len() as u64 == self.count * pages::PAGE as u64
    }
}

/// What memory and disks come in, of which pages may stay where they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// Pages of memory, which were not unpacked.
    Pages(Place),
    /// Anything else.
    Part(Part),
}

/// A chunk that was read.
struct Chunk {
    kind: Kind,
    bytes: Vec<u8>,
    sum: [u8; 32],
}

/// Reads a saved VM.
pub struct Reader<R: Read> {
    from: R,
    place: u64,
    /// Bytes that were read.
    at: u64,
    next: Option<Chunk>,
}

impl<R: Read> Reader<R> {
    /// Begins.
    ///
    /// # Errors
    /// It is none, or another version's; [`Error::Read`].
    pub fn new(mut from: R) -> Result<Self, Error> {
        let mut head = [0; 16];
        match from.read_exact(&mut head) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(Error::Foreign),
            Err(e) => return Err(Error::Read(e)),
        }
        let [magic @ .., v0, v1, v2, v3, r0, r1, r2, r3] = head;
        if magic != *MAGIC {
            return Err(Error::Foreign);
        }
        let version = u32::from_le_bytes([v0, v1, v2, v3]);
        if version != VERSION {
            return Err(Error::Version(version));
        }
        if [r0, r1, r2, r3] != [0; 4] {
            return Err(Error::Foreign);
        }
        Ok(Self {
            from,
            place: 0,
            at: head.len() as u64,
            next: None,
        })
    }

    fn exact(&mut self, to: &mut [u8]) -> Result<(), Error> {
        self.from.read_exact(to).map_err(unread(self.place))?;
        self.at += to.len() as u64;
        Ok(())
    }

    fn chunk(&mut self) -> Result<Chunk, Error> {
        if let Some(chunk) = self.next.take() {
            return Ok(chunk);
        }
        let (mut tag, mut length, mut wanted) = ([0; 4], [0; 4], [0; 32]);
        self.exact(&mut tag)?;
        self.exact(&mut length)?;
        self.exact(&mut wanted)?;
        let length = u32::from_le_bytes(length);
        if length as usize > MAX_CHUNK {
            return Err(Error::Damaged(self.place));
        }
        let mut bytes = vec![0; length as usize];
        self.exact(&mut bytes)?;
        if sum(self.place, tag, length, &bytes) != wanted {
            return Err(Error::Damaged(self.place));
        }
        let kind = Kind::of(tag).ok_or_else(|| Error::Unexpected {
            place: self.place,
            kind: String::from_utf8_lossy(&tag).trim().to_owned(),
            wanted: "a kind that this version knows",
        })?;
        self.place += 1;
        Ok(Chunk {
            kind,
            bytes,
            sum: wanted,
        })
    }

    fn unexpected(&self, kind: Kind, wanted: &'static str) -> Error {
        Error::Unexpected {
            place: self.place.saturating_sub(1),
            kind: kind.name().to_owned(),
            wanted,
        }
    }

    /// A chunk of JSON, of this kind.
    ///
    /// # Errors
    /// There is another one; it is damaged; a field is missing, or not known.
    pub fn text<T: DeserializeOwned>(&mut self, kind: Kind) -> Result<T, Error> {
        let found = self.chunk()?;
        if found.kind != kind {
            return Err(self.unexpected(found.kind, kind.name()));
        }
        serde_json::from_slice(&found.bytes).map_err(|source| Error::Text {
            place: self.place - 1,
            kind: kind.name(),
            source,
        })
    }

    /// What it is read from, to answer a mark.
    pub fn from_mut(&mut self) -> &mut R {
        &mut self.from
    }

    /// The next run of pages, sent or named, piece of a disk or mark; `None` when something else follows.
    ///
    /// # Errors
    /// It is damaged.
    pub fn part(&mut self) -> Result<Option<Part>, Error> {
        let chunk = self.chunk()?;
        self.part_of(chunk)
    }

    /// As [`Self::part`], of a file that is read from its beginning: pages are left there.
    ///
    /// # Errors
    /// As there.
    pub fn found(&mut self) -> Result<Option<Found>, Error> {
        let chunk = self.chunk()?;
        if chunk.kind != Kind::Pages {
            return Ok(self.part_of(chunk)?.map(Found::Part));
        }
        let place = self.place - 1;
        let (first, count) = pages::which(&chunk.bytes).ok_or(Error::Pages(place))?;
        let length = u32::try_from(chunk.bytes.len()).map_err(|_| Error::Damaged(place))?;
        Ok(Some(Found::Pages(Place {
            offset: self.at - u64::from(length),
            length,
            sum: chunk.sum,
            place,
            first,
            count,
        })))
    }

    /// The next piece of a disk; `None` at the end.
    ///
    /// # Errors
    /// It is damaged; there is something else than pieces.
    pub fn piece(&mut self) -> Result<Option<Piece>, Error> {
        let chunk = self.chunk()?;
        match chunk.kind {
            Kind::Disk => {
                let piece = pieces::unpack(&chunk.bytes);
                piece.map(Some).ok_or(Error::Pages(self.place - 1))
            }
            Kind::End => {
                self.next = Some(chunk);
                Ok(None)
            }
            kind => Err(self.unexpected(kind, Kind::Disk.name())),
        }
    }

    fn part_of(&mut self, chunk: Chunk) -> Result<Option<Part>, Error> {
        let bad = Error::Pages(self.place - 1);
        let bytes = &chunk.bytes;
        Ok(Some(match chunk.kind {
            Kind::Pages => Part::Pages(pages::unpack(bytes).ok_or(bad)?),
            Kind::Base => Part::Base(base::unpack(bytes).ok_or(bad)?),
            Kind::Disk => Part::Disk(pieces::unpack(bytes).ok_or(bad)?),
            Kind::Mark if bytes.is_empty() => Part::Mark,
            Kind::Missing => Part::Missing(chunk.bytes),
            Kind::Mark => return Err(Error::Damaged(self.place - 1)),
            _ => {
                self.next = Some(chunk);
                return Ok(None);
            }
        }))
    }

    /// The end.
    ///
    /// # Errors
    /// There is more, or less than was written.
    pub fn finish(mut self) -> Result<R, Error> {
        let end = self.chunk()?;
        if end.kind != Kind::End {
            return Err(self.unexpected(end.kind, Kind::End.name()));
        }
        let before = self.place - 1;
        if end.bytes != before.to_le_bytes() {
            return Err(Error::Damaged(before));
        }
        Ok(self.from)
    }
}
