//! Which frames backends have written, while somebody wants to know: their part of the
//! dirty log.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blanket_abi::Gfn;

/// A bit for each frame of RAM.
#[derive(Debug)]
pub(crate) struct Written {
    on: AtomicBool,
    words: Box<[AtomicU64]>,
}

impl Written {
    pub(crate) fn new(frames: u64) -> Self {
        let words = usize::try_from(frames.div_ceil(64)).unwrap_or(0);
        Self {
            on: AtomicBool::new(false),
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Begins or ceases to note.
    pub(crate) fn set(&self, on: bool) {
        self.on.store(on, Ordering::SeqCst);
    }

    /// A frame was written. The bit is set after the bytes: who takes it sees them.
    pub(crate) fn note(&self, gfn: Gfn) {
        if self.on.load(Ordering::SeqCst)
            && let Ok(word) = usize::try_from(gfn.0 / 64)
            && let Some(word) = self.words.get(word)
        {
            word.fetch_or(1 << (gfn.0 % 64), Ordering::SeqCst);
        }
    }

    /// Takes the notes: they are added to `to`, and forgotten.
    pub(crate) fn take(&self, to: &mut [u64]) {
        for (to, word) in to.iter_mut().zip(&self.words) {
            *to |= word.swap(0, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_taken_once() {
        let written = Written::new(130);
        written.note(Gfn(1));
        written.set(true);
        for gfn in [0, 63, 64, 129, 130, 192, u64::MAX] {
            written.note(Gfn(gfn));
        }
        let mut taken = [0; 3];
        written.take(&mut taken);
        assert_eq!(taken, [1 | 1 << 63, 1, 1 << 1 | 1 << 2]);
        let mut again = [0; 3];
        written.take(&mut again);
        assert_eq!(again, [0; 3]);
    }
}
