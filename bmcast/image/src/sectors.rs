//! Ranges of sectors.

/// Bytes of a sector, the unit in which this project counts a disk whatever its own unit is.
pub const SECTOR: u64 = 512;

/// Consecutive sectors of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sectors {
    /// The first.
    pub start: u64,
    /// How many.
    pub count: u64,
}

impl Sectors {
    /// `count` sectors from `start` on; none if there are no such numbers.
    pub fn new(start: u64, count: u64) -> Option<Self> {
        start.checked_add(count)?;
        Some(Self { start, count })
    }

    /// The first sector behind it.
    pub fn end(self) -> u64 {
        self.start.saturating_add(self.count)
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.count == 0
    }

    /// What both have.
    pub fn and(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        Self {
            start,
            count: end.saturating_sub(start),
        }
    }

    /// Whether a sector is in both.
    pub fn meets(self, other: Self) -> bool {
        !self.and(other).is_empty()
    }
}
