//! Bytes that both ends know.

use std::io::{Read, Write};

use crate::{Result, failed};

/// A sequence of bytes that does not repeat itself (Marsaglia's xorshift).
pub struct Pattern(u64);

impl Pattern {
    /// One of many.
    pub fn new(seed: u64) -> Self {
        // Seeds beside each other must not begin alike; zero would stay.
        Self((seed ^ 0x5851_f42d_4c95_7f2d).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next bytes. What follows does not depend on how it is cut only if all but the last
    /// have a multiple of 8 bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Bytes that are made and compared at once.
const CHUNK: usize = 1 << 16;

/// Writes so many bytes of a pattern, `piece` at once at most.
pub fn give(mut to: impl Write, seed: u64, mut count: usize, piece: usize) -> Result<()> {
    let mut pattern = Pattern::new(seed);
    let mut bytes = vec![0; CHUNK];
    while count > 0 {
        let now = &mut bytes[..count.min(CHUNK)];
        pattern.fill(now);
        for piece in now.chunks(piece.max(1)) {
            to.write_all(piece).map_err(failed("send"))?;
        }
        count -= now.len();
    }
    Ok(())
}

/// Reads so many bytes, which must be those of a pattern.
pub fn take(mut from: impl Read, seed: u64, count: usize) -> Result<()> {
    let mut pattern = Pattern::new(seed);
    let (mut bytes, mut right) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut done = 0;
    while done < count {
        let now = (count - done).min(CHUNK);
        let mut filled = 0;
        while filled < now {
            match from.read(&mut bytes[filled..now]) {
                Ok(0) => return Err(format!("it ended after {} of {count}", done + filled)),
                Ok(more) => filled += more,
                Err(error) => {
                    return Err(format!(
                        "receive, after {} of {count}: {error}",
                        done + filled
                    ));
                }
            }
        }
        pattern.fill(&mut right[..now]);
        let differs = bytes[..now].iter().zip(&right).position(|(a, b)| a != b);
        if let Some(at) = differs {
            return Err(format!("byte {} of {count} is wrong", done + at));
        }
        done += now;
    }
    Ok(())
}
