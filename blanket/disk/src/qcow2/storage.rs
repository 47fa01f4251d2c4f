//! What a qcow2 image stands on, as imago sees it: bytes that are only read.

use std::fmt;
use std::io;
use std::sync::Arc;

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;

use crate::reader::Source;

/// An image of any format below a qcow2 image.
#[derive(Debug)]
pub(super) struct Below {
    source: Arc<dyn Source>,
    helper: CommonStorageHelper,
}

impl Below {
    pub(super) fn new(source: Arc<dyn Source>) -> Self {
        Self {
            source,
            helper: CommonStorageHelper::default(),
        }
    }
}

impl fmt::Display for Below {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("backing image")
    }
}

fn read_only() -> io::Error {
    io::ErrorKind::ReadOnlyFilesystem.into()
}

impl Storage for Below {
    fn size(&self) -> io::Result<u64> {
        Ok(self.source.size())
    }

    unsafe fn pure_readv(&self, into: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        for mut slice in into.into_inner() {
            let there = self.source.size().saturating_sub(offset);
            let there = usize::try_from(there).unwrap_or(usize::MAX);
            let there = there.min(slice.len());
            let (data, beyond) = slice.split_at_mut(there);
            if !data.is_empty() {
                self.source.read_at(offset, data)?;
            }
            beyond.fill(0);
            offset = offset.saturating_add(slice.len() as u64);
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, _from: IoVector<'_>, _offset: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }
}
