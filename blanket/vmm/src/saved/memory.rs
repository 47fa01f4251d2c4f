//! A saved VM's memory: all frames below those of its state that are not zero.

use std::io::{Read, Write};

use blanket_abi::PAGE_SIZE;
use blanket_migration::pages::Pages;
use blanket_migration::pull::Piece;
use blanket_snapshot::{Base, Error, Found, MAX_BLOCKS, PAGE, Part, Reader, Run, Writer};
use rustix::fs::SeekFrom;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::{Moving, ResumeError, Stored};
use crate::balloon;
use crate::builder::{Domain, GuestMemory};
use crate::migration::{Bases, Dirty};

/// Pages that are looked at together.
const RUN: u64 = 256;
const _: () = assert!(RUN <= MAX_BLOCKS as u64);

fn is_zero(page: &[u8; PAGE]) -> bool {
    page.iter().all(|byte| *byte == 0)
}

/// Where the next frame is, from `frame` on, that the host has ever given: what it has
/// not is zero, and to read it would make it take memory for it.
fn next_given(memory: &GuestMemory, frame: u64) -> Option<u64> {
    let region = memory.iter().next()?;
    let Some(file) = region.file_offset() else {
        // Private memory: what was never written is the host's own page of zeros.
        return Some(frame);
    };
    let at = file.start() + frame * PAGE_SIZE;
    match rustix::fs::seek(file.file(), SeekFrom::Data(at)) {
        Ok(found) => Some((found - file.start()) / PAGE_SIZE),
        Err(rustix::io::Errno::NXIO) => None,
        // A file system that does not know.
        Err(_) => Some(frame),
    }
}

/// Writes them; how many were sent, and not found in the `bases`.
pub(crate) fn write<W: Write>(
    writer: &mut Writer<W>,
    domain: &Domain,
    bases: &Bases,
) -> Result<u64, super::SaveError> {
    let end = domain.boot.state_base;
    let mut bytes = vec![0; usize::try_from(RUN).unwrap_or(1) * PAGE];
    let (mut frame, mut written) = (0, 0);
    while let Some(first) = next_given(&domain.memory, frame).filter(|first| *first < end) {
        let count = RUN.min(end - first);
        let here = usize::try_from(count).unwrap_or(1) * PAGE;
        let bytes = &mut bytes[..here];
        domain
            .memory
            .read_slice(bytes, GuestAddress(first * PAGE_SIZE))?;
        let (pages, _) = bytes.as_chunks::<PAGE>();
        let mut at = 0;
        // Runs without a page of zeros.
        for run in pages.split(is_zero) {
            if !run.is_empty() {
                written += bases.write(writer, first + at, run)?;
            }
            at += run.len() as u64 + 1;
        }
        frame = first + count;
    }
    Ok(written)
}

/// Writes those that `dirty` has a bit for, zero or not; how many were sent, and not found in the
/// `bases`.
pub(crate) fn write_dirty<W: Write>(
    writer: &mut Writer<W>,
    domain: &Domain,
    dirty: &Dirty,
    bases: &Bases,
) -> Result<u64, super::SaveError> {
    let mut bytes = vec![0; usize::try_from(RUN).unwrap_or(1) * PAGE];
    let mut written = 0;
    for (first, count) in dirty.runs(RUN) {
        let bytes = &mut bytes[..usize::try_from(count).unwrap_or(1) * PAGE];
        domain
            .memory
            .read_slice(bytes, GuestAddress(first * PAGE_SIZE))?;
        let (pages, _) = bytes.as_chunks::<PAGE>();
        written += bases.write(writer, first, pages)?;
    }
    Ok(written)
}

/// Pages as they follow a VM: those that are zero are only named.
pub(crate) fn piece(
    domain: &Domain,
    first: u64,
    count: u64,
) -> Result<Vec<Piece>, super::SaveError> {
    let mut bytes = vec![0; usize::try_from(count).unwrap_or(0) * PAGE];
    domain
        .memory
        .read_slice(&mut bytes, GuestAddress(first * PAGE_SIZE))?;
    let (pages, _) = bytes.as_chunks::<PAGE>();
    let mut at = first;
    let mut pieces = Vec::new();
    for part in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        pieces.push(if is_zero(&part[0]) {
            let count = u32::try_from(part.len()).unwrap_or(0);
            Piece::Zero { first: at, count }
        } else {
            let packed = Run::pack(at, part.as_flattened()).map_err(Error::Write)?;
            Piece::Pages(packed)
        });
        at += part.len() as u64;
    }
    Ok(pieces)
}

/// Forgets what has come of pages that follow later, and have changed since.
fn forget(packed: &[u8], domain: &Domain, may_follow: bool) -> Result<Pages, ResumeError> {
    let impossible = |why: String| ResumeError::Impossible(why);
    let missing = Pages::unpack(packed, domain.boot.state_base)
        .ok_or_else(|| impossible("its missing pages are no set".into()))?;
    if !may_follow {
        return Err(impossible("its memory cannot follow it here".into()));
    }
    // Touched before anybody hears what is missing.
    let mut standing = Dirty::none(domain);
    standing.add_standing(domain);
    if standing.meets(&missing) {
        return Err(impossible("it lacks what its start needs".into()));
    }
    for (first, count) in missing.runs(u64::MAX) {
        balloon::give_back(&domain.memory, first, count)
            .map_err(|error| impossible(error.to_string()))?;
    }
    Ok(missing)
}

/// The next part, if it does not stay where it is.
fn next<R: Read>(
    reader: &mut Reader<R>,
    stays: &mut Option<&mut Stored>,
    frames: u64,
) -> Result<Option<Part>, Error> {
    let Some(stored) = stays else {
        return reader.part();
    };
    loop {
        match reader.found()? {
            Some(Found::Pages(place)) => stored.add(place, frames)?,
            Some(Found::Part(part)) => return Ok(Some(part)),
            None => return Ok(None),
        }
    }
}

/// Whether these are pages of the VM.
fn within(first: u64, count: u64, end: u64) -> Result<(), Error> {
    if first.saturating_add(count) > end {
        return Err(Error::Pages(first));
    }
    Ok(())
}

/// Pages that are named come with nobody who has what they are in.
fn names(named: &Base) -> ResumeError {
    let why = "a saved VM brings all of its pages, and these are said to be in what it stands on";
    ResumeError::Base(named.number, why.into())
}

/// Puts pages where they belong. Those that are zero cost the host nothing.
fn place(domain: &Domain, run: &Run) -> Result<(), ResumeError> {
    let impossible = |error: String| ResumeError::Impossible(error);
    let (pages, _) = run.bytes.as_chunks::<PAGE>();
    let mut first = run.first;
    for part in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
        let count = part.len() as u64;
        if is_zero(&part[0]) {
            balloon::give_back(&domain.memory, first, count)
                .map_err(|error| impossible(error.to_string()))?;
        } else {
            let at = GuestAddress(first * PAGE_SIZE);
            let written = domain.memory.write_slice(part.as_flattened(), at);
            written.map_err(|error| impossible(error.to_string()))?;
        }
        first += count;
    }
    Ok(())
}

/// Reads them into memory that is all zero at first. Pages may come again: the last ones
/// count. Disks come if it is said so, marks and pages that are only named with a VM that moves
/// only. With `stays`, pages are only found.
pub(crate) fn read<R: Read>(
    reader: &mut Reader<R>,
    domain: &Domain,
    moving: &mut Option<Moving<'_, R>>,
    mut stays: Option<&mut Stored>,
) -> Result<(), ResumeError> {
    let end = domain.boot.state_base;
    while let Some(part) = next(reader, &mut stays, end)? {
        let run = match (part, &mut *moving) {
            (Part::Pages(run), Some(moving)) if moving.missing.is_none() => run,
            (Part::Pages(run), None) => run,
            (Part::Base(named), Some(moving)) if moving.missing.is_none() => {
                let Some(bases) = moving.bases else {
                    return Err(names(&named));
                };
                // Before what is asked for is read.
                within(named.first, named.count.into(), end)?;
                let (first, bytes) = (named.first, bases.read(&named)?);
                Run { first, bytes }
            }
            (Part::Base(named), None) => return Err(names(&named)),
            (Part::Missing(packed), Some(moving)) if moving.missing.is_none() => {
                *moving.missing = Some(forget(&packed, domain, moving.may_follow)?);
                continue;
            }
            (Part::Pages(_) | Part::Base(_) | Part::Missing(_), _) => {
                let why = "there are pages where there must be none".to_owned();
                return Err(ResumeError::Impossible(why));
            }
            (Part::Disk(piece), Some(moving)) => {
                moving.images.write(&piece)?;
                continue;
            }
            (Part::Mark, Some(moving)) => {
                // Else a whole disk would be, when the VM stands still.
                moving.images.flush()?;
                (moving.answers)(reader.from_mut()).map_err(Error::Read)?;
                continue;
            }
            (Part::Mark, None) => {
                let why = "a saved VM waits for no answers".to_owned();
                return Err(ResumeError::Impossible(why));
            }
            (Part::Disk(piece), None) => {
                let why = "a saved VM brings no disks".to_owned();
                return Err(ResumeError::Disk(piece.number, why));
            }
        };
        within(run.first, (run.bytes.len() / PAGE) as u64, end)?;
        place(domain, &run)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use blanket_snapshot::Kind;

    use super::*;
    use crate::devices::Devices;
    use crate::migration::Images;
    use crate::saved::testing::domain;

    /// What comes of a memory that is written so.
    fn come(
        may_follow: bool,
        write: impl FnOnce(&mut Writer<Vec<u8>>),
    ) -> Result<(Domain, Option<Pages>), ResumeError> {
        let mut writer = Writer::new(Vec::new()).expect("memory");
        write(&mut writer);
        let (file, _) = writer.finish().expect("memory");
        let domain = domain();
        let mut images = Images::of(&Devices::default(), |_| true).expect("none");
        let mut missing = None;
        let mut moving = Some(Moving {
            images: &mut images,
            bases: None,
            answers: &mut |_: &mut &[u8]| Ok(()),
            may_follow,
            missing: &mut missing,
        });
        read(&mut Reader::new(&file[..])?, &domain, &mut moving, None)?;
        Ok((domain, missing))
    }

    fn set(frames: u64, pages: &[u64]) -> Vec<u8> {
        let mut set = Pages::none(frames);
        pages.iter().for_each(|page| set.add(*page));
        set.pack().expect("memory")
    }

    #[test]
    fn what_follows_is_forgotten_first() {
        let frames = domain().boot.state_base;
        let pages = |writer: &mut Writer<Vec<u8>>| {
            writer.pages(3, &[7; 4 * PAGE]).expect("memory");
        };
        let misses = |writer: &mut Writer<Vec<u8>>| {
            let packed = set(frames, &[4, 5, 900]);
            writer.chunk(Kind::Missing, &packed).expect("memory");
        };
        let (domain, missing) = come(true, |writer| {
            pages(writer);
            misses(writer);
        })
        .expect("read");
        let missing = missing.expect("something follows");
        assert_eq!(missing.runs(9).collect::<Vec<_>>(), [(4, 2), (900, 1)]);
        for (page, wanted) in [(3, 7), (4, 0), (5, 0), (6, 7)] {
            let at = GuestAddress(page * PAGE_SIZE);
            let byte: u8 = domain.memory.read_obj(at).expect("inside");
            assert_eq!(byte, wanted, "page {page}");
        }
        for (what, refused) in [
            ("nothing may follow", come(false, misses)),
            (
                "twice",
                come(true, |writer| {
                    misses(writer);
                    misses(writer);
                }),
            ),
            (
                "pages behind it",
                come(true, |writer| {
                    misses(writer);
                    pages(writer);
                }),
            ),
            (
                "another number of pages",
                come(true, |writer| {
                    let packed = set(frames + 64, &[1]);
                    writer.chunk(Kind::Missing, &packed).expect("memory");
                }),
            ),
        ] {
            assert!(refused.is_err(), "{what}");
        }
    }
}
