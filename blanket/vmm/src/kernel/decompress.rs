//! Unpacking a kernel payload, whatever it was packed with.
//!
//! The kernel's build appends the unpacked size as four bytes to every format but
//! gzip (which ends with it anyway), so each decoder must stop at the end of its
//! stream and ignore what follows (`scripts/Makefile.lib`, `size_append`).

use std::io::Read;

use super::ErrorKind;

/// Dictionary memory that an xz or lzma stream may ask for, KiB.
const DICTIONARY_LIMIT_KIB: u32 = 256 << 10;
/// Uncompressed size of a block of the legacy LZ4 format.
const LZ4_BLOCK: usize = 8 << 20;

/// A compression that kernels use, recognised by its first bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// gzip.
    Gzip,
    /// bzip2.
    Bzip2,
    /// Raw lzma ("lzma alone").
    Lzma,
    /// xz, usually with the x86 branch filter.
    Xz,
    /// LZ4, legacy frame format.
    Lz4,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// Finds the format of a payload; `None` if it is an ELF file already.
    pub fn detect(payload: &[u8]) -> Result<Option<Self>, ErrorKind> {
        Ok(Some(match payload {
            [0x7f, b'E', b'L', b'F', ..] => return Ok(None),
            [0x1f, 0x8b, ..] => Self::Gzip,
            [b'B', b'Z', b'h', ..] => Self::Bzip2,
            [0xfd, b'7', b'z', b'X', b'Z', ..] => Self::Xz,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            [0x5d, 0x00, ..] => Self::Lzma,
            [0x02, 0x21, 0x4c, 0x18, ..] => Self::Lz4,
            [0x89, 0x4c, 0x5a, 0x4f, ..] => return Err(ErrorKind::Compression("LZO")),
            _ => return Err(ErrorKind::Compression("an unknown format")),
        }))
    }
}

/// Unpacks a payload; the result has at most `limit` bytes.
pub fn decompress(payload: &[u8], format: Compression, limit: usize) -> Result<Vec<u8>, ErrorKind> {
    let broken = |what: &dyn std::fmt::Display| {
        ErrorKind::corrupt(format!("the {format:?} payload cannot be unpacked: {what}"))
    };
    match format {
        Compression::Gzip => bounded(flate2::bufread::GzDecoder::new(payload), limit, &broken),
        Compression::Bzip2 => bounded(bzip2::bufread::BzDecoder::new(payload), limit, &broken),
        Compression::Xz => bounded(
            lzma_rust2::XzReader::new_mem_limit(payload, false, DICTIONARY_LIMIT_KIB),
            limit,
            &broken,
        ),
        Compression::Lzma => bounded(
            lzma_rust2::LzmaReader::new_mem_limit(payload, DICTIONARY_LIMIT_KIB, None)
                .map_err(|e| broken(&e))?,
            limit,
            &broken,
        ),
        Compression::Zstd => bounded(
            ruzstd::decoding::StreamingDecoder::new(payload).map_err(|e| broken(&e))?,
            limit,
            &broken,
        ),
        Compression::Lz4 => lz4_legacy(payload, limit, &broken),
    }
}

type Broken<'a> = dyn Fn(&dyn std::fmt::Display) -> ErrorKind + 'a;

fn bounded(reader: impl Read, limit: usize, broken: &Broken<'_>) -> Result<Vec<u8>, ErrorKind> {
    let mut out = Vec::new();
    reader
        .take(limit as u64 + 1)
        .read_to_end(&mut out)
        .map_err(|e| broken(&e))?;
    if out.len() > limit {
        return Err(ErrorKind::TooLarge { limit: limit >> 20 });
    }
    Ok(out)
}

/// The magic, then blocks of {compressed size u32, bytes}, then the size of all.
fn lz4_legacy(payload: &[u8], limit: usize, broken: &Broken<'_>) -> Result<Vec<u8>, ErrorKind> {
    let (body, size) = payload[4..]
        .split_last_chunk::<4>()
        .ok_or_else(|| broken(&"it ends before its first block"))?;
    let total = u32::from_le_bytes(*size) as usize;
    if total > limit {
        return Err(ErrorKind::TooLarge { limit: limit >> 20 });
    }
    let mut out = Vec::new();
    let mut block = vec![0; LZ4_BLOCK];
    let mut rest = body;
    while out.len() < total {
        let (size, tail) = rest
            .split_first_chunk::<4>()
            .ok_or_else(|| broken(&"a block is missing"))?;
        let size = u32::from_le_bytes(*size) as usize;
        if size > tail.len() {
            return Err(broken(&format_args!(
                "a block of {size} bytes has only {}",
                tail.len()
            )));
        }
        let (data, tail) = tail.split_at(size);
        let n = lz4_flex::block::decompress_into(data, &mut block).map_err(|e| broken(&e))?;
        if n == 0 || out.len() + n > total {
            return Err(broken(&"its blocks do not add up to its size"));
        }
        out.extend_from_slice(&block[..n]);
        rest = tail;
    }
    Ok(out)
}
