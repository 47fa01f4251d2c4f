//! The last part of what a guest wrote.

use std::collections::VecDeque;

/// Bytes that are kept.
const KEPT: usize = 64 << 10;

/// The last 64 KiB of output.
#[derive(Debug, Default)]
pub struct History(VecDeque<u8>);

impl History {
    /// Adds output, forgetting the oldest.
    pub fn add(&mut self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(KEPT)..];
        let excess = (self.0.len() + bytes.len()).saturating_sub(KEPT);
        self.0.drain(..excess);
        self.0.extend(bytes);
    }

    /// What is kept.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.0.iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_is_kept() {
        let mut history = History::default();
        history.add(b"begin");
        history.add(&vec![b'x'; KEPT - 2]);
        assert!(history.bytes().starts_with(b"inx"));
        assert_eq!(history.bytes().len(), KEPT);
        history.add(&vec![b'y'; 3 * KEPT]);
        assert_eq!(history.bytes(), vec![b'y'; KEPT]);
    }
}
