//! Reads and writes of a block device, past the cache.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};

use crate::client::{Meter, Row};
use crate::{Result, aio, failed};

/// The part of the device that is used.
const REGION: u64 = 16 << 20;
const LARGE: usize = 128 << 10;
const SMALL: usize = 4096;
/// Requests at once, where there are several.
const DEPTH: usize = 16;

/// Memory that begins at a page.
struct Pages(Vec<u8>);

impl Pages {
    fn new(length: usize) -> Self {
        // Not zero: memory that was never written is one page of zeros to a kernel.
        Self(vec![0x5a; length + SMALL])
    }

    fn bytes(&mut self) -> &mut [u8] {
        let begin = self.0.as_ptr().align_offset(SMALL);
        let end = self.0.len() - SMALL + begin;
        &mut self.0[begin..end]
    }
}

/// Places of small requests: each page of the region at most once in a repetition, in an
/// order that looks like none.
fn places(rep: usize, count: u64) -> Vec<u64> {
    let pages = REGION / SMALL as u64;
    let step = (2_654_435_761 % pages) | 1;
    (0..count)
        .map(|n| (n * step + 97 * rep as u64) % pages * SMALL as u64)
        .collect()
}

/// All rows of one device.
pub fn rows(meter: &Meter, name: &str, path: &str, rows: &mut Vec<Row>) -> Result<()> {
    if !meter.wants(name) {
        return Ok(());
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .map_err(failed(path))?;
    let mut pages = Pages::new(LARGE);
    let buffer = pages.bytes();
    let flush = |file: &File| file.sync_data().map_err(failed("flush"));
    let large = REGION / LARGE as u64;
    // So that an image has all its space.
    for n in 0..large {
        let at = n * LARGE as u64;
        file.write_all_at(buffer, at).map_err(failed("write"))?;
    }
    flush(&file)?;

    let count = meter.scaled(large).min(large);
    let bytes = count * LARGE as u64;
    rows.extend(meter.row(name, "read-128k", count, bytes, |_| {
        (0..count)
            .try_for_each(|n| file.read_exact_at(buffer, n * LARGE as u64))
            .map_err(failed("read"))
    })?);
    rows.extend(meter.row(name, "write-128k", count, bytes, |_| {
        (0..count)
            .try_for_each(|n| file.write_all_at(buffer, n * LARGE as u64))
            .map_err(failed("write"))?;
        flush(&file)
    })?);

    let buffer = &mut buffer[..SMALL];
    let count = meter.scaled(512);
    let bytes = count * SMALL as u64;
    rows.extend(meter.row(name, "read-4k", count, bytes, |rep| {
        places(rep, count)
            .into_iter()
            .try_for_each(|at| file.read_exact_at(buffer, at))
            .map_err(failed("read"))
    })?);
    rows.extend(meter.row(name, "write-4k", count, bytes, |rep| {
        places(rep, count)
            .into_iter()
            .try_for_each(|at| file.write_all_at(buffer, at))
            .map_err(failed("write"))?;
        flush(&file)
    })?);
    let flushed = meter.scaled(128);
    let bytes = flushed * SMALL as u64;
    rows.extend(meter.row(name, "write-4k-flush", flushed, bytes, |rep| {
        places(rep, flushed).into_iter().try_for_each(|at| {
            file.write_all_at(buffer, at).map_err(failed("write"))?;
            flush(&file)
        })
    })?);

    let mut pages: Vec<Pages> = (0..DEPTH).map(|_| Pages::new(SMALL)).collect();
    let mut buffers: Vec<&mut [u8]> = pages.iter_mut().map(Pages::bytes).collect();
    let count = meter.scaled(1024);
    let bytes = count * SMALL as u64;
    rows.extend(meter.row(name, "read-4k-16", count, bytes, |rep| {
        aio::transfer(&file, false, SMALL, &mut buffers, &places(rep, count))
    })?);
    rows.extend(meter.row(name, "write-4k-16", count, bytes, |rep| {
        aio::transfer(&file, true, SMALL, &mut buffers, &places(rep, count))?;
        flush(&file)
    })?);
    Ok(())
}
