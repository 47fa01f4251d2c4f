//! Which blocks of a disk its guest has written, while somebody wants to know: who copies
//! the disk to another host.

use std::sync::Mutex;

use crate::sync::lock;

/// Bytes of a block.
pub const BLOCK: u64 = 64 << 10;

/// A bit for each block; nothing while nobody wants to know.
#[derive(Debug, Default)]
pub(super) struct Blocks(Mutex<Option<Vec<u64>>>);

impl Blocks {
    /// Begins or ceases to note.
    pub(super) fn set(&self, on: bool) {
        *lock(&self.0) = on.then(Vec::new);
    }

    /// These bytes were written. To be called when they are, and before the guest knows.
    pub(super) fn note(&self, offset: u64, length: u64) {
        let mut words = lock(&self.0);
        let Some(words) = words.as_mut() else { return };
        let end = offset.saturating_add(length).div_ceil(BLOCK);
        for block in offset / BLOCK..end {
            let Ok(word) = usize::try_from(block / 64) else {
                return;
            };
            if words.len() <= word {
                words.resize(word + 1, 0);
            }
            words[word] |= 1 << (block % 64);
        }
    }

    /// The numbers of the blocks that were written since this was asked last.
    pub(super) fn take(&self) -> Vec<u64> {
        let mut taken = Vec::new();
        if let Some(words) = lock(&self.0).as_mut() {
            for (first, word) in (0..).step_by(64).zip(words.iter_mut()) {
                let bits = std::mem::take(word);
                taken.extend(
                    (0..64)
                        .filter(|bit| bits >> bit & 1 != 0)
                        .map(|bit| first + bit),
                );
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_noted_while_somebody_asks() {
        let blocks = Blocks::default();
        blocks.note(0, 512);
        assert!(blocks.take().is_empty());
        blocks.set(true);
        blocks.note(BLOCK - 512, 1024);
        blocks.note(70 * BLOCK, 0);
        blocks.note(200 * BLOCK, BLOCK);
        assert_eq!(blocks.take(), [0, 1, 200]);
        assert!(blocks.take().is_empty());
        blocks.note(5 * BLOCK, 1);
        blocks.set(false);
        assert!(blocks.take().is_empty());
    }
}
