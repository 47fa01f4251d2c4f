//! The disks of a VM that moves: copied while it runs, to images that the destination has.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

use blanket_devices::block::{BLOCK, Vbd};
use blanket_devices::bus::Device as _;
use blanket_disk::{Disk, Failure, Reader, Writer as DiskWriter};
use blanket_snapshot::{MAX_PIECE, Piece, Writer};

use super::Bases;
use crate::devices::{AnyDevice, Devices, DiskFile};
use crate::saved::{ResumeError, SaveError};

/// Bytes of a page: what is dirty of disks counts with what is of memory.
const PAGE: u64 = 4096;

/// Bytes after which an image is flushed: the source waits for the link while it is, and not for ever.
const UNFLUSHED: usize = 64 << 20;

/// The disks that are copied: those that the guest can write. It is noted what it writes
/// until this is dropped.
pub(crate) struct Moving {
    disks: Vec<(Arc<Vbd>, DiskFile)>,
    /// In which pages are looked for.
    bases: Bases,
}

/// Blocks of each of them.
pub(crate) struct Blocks(Vec<Vec<u64>>);

impl Drop for Moving {
    fn drop(&mut self) {
        for (disk, _) in &self.disks {
            disk.log(false);
        }
    }
}

impl Moving {
    /// The numbers of those that it would be.
    pub(crate) fn writable(devices: &Devices) -> Vec<u32> {
        let number = |device: &AnyDevice| match device {
            AnyDevice::Disk(disk, _) if !disk.disk().read_only() => Some(disk.number()),
            _ => None,
        };
        devices.iter().filter_map(number).collect()
    }

    /// None of them.
    pub(crate) fn none() -> Self {
        Self {
            disks: Vec::new(),
            bases: Bases::default(),
        }
    }

    pub(crate) fn begin(devices: &Devices) -> Self {
        let disks = devices.iter().filter_map(|device| match device {
            AnyDevice::Disk(disk, file) if !disk.disk().read_only() => {
                disk.log(true);
                Some((Arc::clone(disk), file.clone()))
            }
            _ => None,
        });
        Self {
            disks: disks.collect(),
            bases: Bases::default(),
        }
    }

    /// Whoever gets them has what they stand on, too: pages that are in it need not be sent.
    pub(crate) fn finding(mut self, devices: &Devices) -> Self {
        self.bases = Bases::of(devices);
        self
    }

    /// What pages are looked for in.
    pub(crate) fn bases(&self) -> &Bases {
        &self.bases
    }

    /// All blocks, but for those that the destination finds in what its disk stands on.
    pub(super) fn all(&self) -> Result<Blocks, SaveError> {
        let blocks = |(disk, file): &(Arc<Vbd>, DiskFile)| {
            blocks(&file.reader, disk.disk().size(), file.base.is_some())
                .map_err(|error| SaveError::Disk(disk.number(), error))
        };
        Ok(Blocks(
            self.disks.iter().map(blocks).collect::<Result<_, _>>()?,
        ))
    }

    /// Those that were written since this was asked last.
    pub(super) fn take_log(&self) -> Blocks {
        Blocks(self.disks.iter().map(|(disk, _)| disk.take_log()).collect())
    }

    /// Sends blocks.
    pub(super) fn write<W: Write>(
        &self,
        writer: &mut Writer<W>,
        blocks: &Blocks,
    ) -> Result<(), SaveError> {
        for ((disk, file), blocks) in self.disks.iter().zip(&blocks.0) {
            write(
                writer,
                disk.number(),
                &file.reader,
                disk.disk().size(),
                blocks,
            )?;
        }
        Ok(())
    }
}

/// Blocks of an image of `size` bytes: all, or only its own if what it stands on is there, too.
pub(crate) fn blocks(reader: &Reader, size: u64, own: bool) -> std::io::Result<Vec<u64>> {
    let all = 0..size.div_ceil(BLOCK);
    if !own {
        return Ok(all.collect());
    }
    let own = |block: &u64| reader.is_own(block * BLOCK, BLOCK);
    let own = all.map(|block| own(&block).map(|own| own.then_some(block)));
    own.filter_map(Result::transpose).collect()
}

/// Writes blocks of an image of `size` bytes down, in their order.
pub(crate) fn write<W: Write>(
    writer: &mut Writer<W>,
    number: u32,
    reader: &Reader,
    size: u64,
    blocks: &[u64],
) -> Result<(), SaveError> {
    if blocks.is_empty() {
        return Ok(());
    }
    let most = MAX_PIECE as u64 / BLOCK;
    let mut bytes = vec![0; MAX_PIECE];
    for run in blocks.chunk_by(|a, b| a + 1 == *b && b % most != 0) {
        let (Some(first), Some(last)) = (run.first(), run.last()) else {
            continue;
        };
        let offset = first * BLOCK;
        let end = size.min((last + 1) * BLOCK);
        let length = usize::try_from(end.saturating_sub(offset)).unwrap_or(0);
        let Some(bytes) = bytes.get_mut(..length).filter(|it| !it.is_empty()) else {
            continue;
        };
        reader
            .read_exact_at(offset, bytes)
            .map_err(|error| SaveError::Disk(number, error))?;
        writer.disk(number, offset, bytes)?;
    }
    Ok(())
}

impl Blocks {
    /// How much it is, in pages.
    pub(super) fn pages(&self) -> u64 {
        let blocks: usize = self.0.iter().map(Vec::len).sum();
        blocks as u64 * (BLOCK / PAGE)
    }
}

/// Images that disks are copied to.
pub(crate) struct Images(BTreeMap<u32, Image>);

struct Image {
    reader: Reader,
    writer: DiskWriter,
    /// Bytes that were written and may not be on stable storage.
    unflushed: usize,
}

impl Image {
    /// One that is to be filled: of what `stands` on a base, nothing may be its own yet.
    fn to_fill(
        number: u32,
        reader: Reader,
        disk: &dyn Disk,
        stands: bool,
    ) -> Result<Self, ResumeError> {
        let failed = |error: std::io::Error| ResumeError::Disk(number, error.to_string());
        if stands && reader.is_own(0, reader.size()).map_err(failed)? {
            let why = "it stands on its base, and has blocks of its own already: give a new one \
                       (blanket disk create --backing)";
            return Err(ResumeError::Disk(number, why.into()));
        }
        Self::of(reader, disk).map_err(failed)
    }

    fn of(reader: Reader, disk: &dyn Disk) -> std::io::Result<Self> {
        Ok(Self {
            reader,
            writer: DiskWriter::new(disk, MAX_PIECE)?,
            unflushed: 0,
        })
    }

    fn flush(&mut self) -> Result<(), Failure> {
        if self.unflushed > 0 {
            self.writer.flush()?;
            self.unflushed = 0;
        }
        Ok(())
    }
}

impl Images {
    /// Those of an instance that waits for a VM, of these numbers.
    pub(crate) fn of(devices: &Devices, wanted: impl Fn(u32) -> bool) -> Result<Self, ResumeError> {
        let mut all = BTreeMap::new();
        for device in devices.iter() {
            if let AnyDevice::Disk(disk, DiskFile { reader, base, .. }) = device
                && !disk.disk().read_only()
                && wanted(disk.number())
            {
                let number = disk.number();
                let stands = base.is_some();
                let image = Image::to_fill(number, reader.clone(), &**disk.disk(), stands)?;
                all.insert(number, image);
            }
        }
        Ok(Self(all))
    }

    /// Those that no VM uses, by their place among them, and whether they stand on a base.
    pub(crate) fn at_rest<'a>(
        disks: impl Iterator<Item = (&'a blanket_disk::Image, bool)>,
    ) -> Result<Self, ResumeError> {
        let image = |(number, (disk, stands)): (u32, (&blanket_disk::Image, bool))| {
            let image = Image::to_fill(number, disk.reader(), disk, stands)?;
            Ok((number, image))
        };
        (0..)
            .zip(disks)
            .map(image)
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// A piece has come.
    pub(crate) fn write(&mut self, piece: &Piece) -> Result<(), ResumeError> {
        let number = piece.number;
        let bad = |error: String| ResumeError::Disk(number, error);
        let image = self
            .0
            .get_mut(&number)
            .ok_or_else(|| bad("it is not here, or cannot be written".into()))?;
        // What is zero and has never been written stays a hole.
        if piece.bytes.iter().all(|byte| *byte == 0) {
            let mut here = vec![0; piece.bytes.len()];
            let same = image.reader.read_exact_at(piece.offset, &mut here);
            if same.is_ok() && here == piece.bytes {
                return Ok(());
            }
        }
        let written = image.writer.write(piece.offset, &piece.bytes);
        image.unflushed += piece.bytes.len();
        let done = match written {
            Ok(()) if image.unflushed >= UNFLUSHED => image.flush(),
            done => done,
        };
        done.map_err(|error| bad(error.to_string()))
    }

    /// What has come is on stable storage afterwards.
    pub(crate) fn flush(&mut self) -> Result<(), ResumeError> {
        for (number, image) in &mut self.0 {
            let flushed = image.flush();
            flushed.map_err(|error| ResumeError::Disk(*number, error.to_string()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use blanket_disk::Options;
    use blanket_snapshot::Reader as Saved;

    use super::*;
    use crate::saved::testing::domain;
    use crate::saved::{Moving as Comes, memory};

    const NUMBER: u32 = 7;

    /// Bytes that are not flushed when it comes so.
    fn unflushed(write: impl FnOnce(&mut Writer<Vec<u8>>)) -> usize {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk.raw");
        std::fs::write(&path, vec![0; MAX_PIECE]).expect("written");
        let disk = blanket_disk::open(&path, &Options::default()).expect("it");
        let image = Image::of(disk.reader(), &disk).expect("a writer");
        let mut images = Images(BTreeMap::from([(NUMBER, image)]));
        let mut writer = Writer::new(Vec::new()).expect("memory");
        write(&mut writer);
        let stream = writer.finish().expect("memory").0;
        let mut moving = Some(Comes {
            images: &mut images,
            bases: None,
            answers: &mut |_: &mut &[u8]| Ok(()),
            may_follow: false,
            missing: &mut None,
        });
        let mut reader = Saved::new(&stream[..]).expect("ours");
        memory::read(&mut reader, &domain(), &mut moving, None).expect("read");
        let left = |images: &Images| images.0.values().map(|image| image.unflushed).sum();
        let unflushed = left(&images);
        images.flush().expect("flushed");
        assert_eq!(left(&images), 0);
        unflushed
    }

    #[test]
    fn a_disk_is_flushed_at_each_mark_and_not_when_the_vm_stands_still() {
        let piece = |writer: &mut Writer<Vec<u8>>| {
            let written = writer.disk(NUMBER, 8192, &[7; 4096]);
            written.expect("memory");
        };
        let mark = |writer: &mut Writer<Vec<u8>>| {
            writer.mark().expect("memory");
        };
        assert_eq!(unflushed(|_| {}), 0);
        assert_eq!(unflushed(piece), 4096);
        let marked = unflushed(|writer| {
            piece(writer);
            mark(writer);
            mark(writer);
        });
        assert_eq!(marked, 0);
        let after = unflushed(|writer| {
            mark(writer);
            piece(writer);
        });
        assert_eq!(after, 4096);
        let much = unflushed(|writer| {
            for _ in 0..UNFLUSHED / MAX_PIECE {
                let written = writer.disk(NUMBER, 0, &[7; MAX_PIECE]);
                written.expect("memory");
            }
            piece(writer);
        });
        assert_eq!(much, 4096);
    }
}
