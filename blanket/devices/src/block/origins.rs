//! From which block of a disk each page of its guest was read last: where to look for a page's
//! bytes in what the disk stands on. No more than a hint: the guest may have written to the page
//! since, or to the block.

use std::sync::Mutex;

use blanket_abi::PAGE_SIZE;

use crate::sync::lock;

/// Frames that are remembered together.
const PART: usize = 1024;

/// A word for each frame: the number of its block and one, or 0.
type Part = [u32; PART];

/// Blocks of a page's size, by frame. It takes memory for frames near which some were read, and four bytes
/// for each of these.
#[derive(Debug, Default)]
pub struct Origins(Mutex<Vec<Option<Box<Part>>>>);

fn place(gfn: u64) -> Option<(usize, usize)> {
    let gfn = usize::try_from(gfn).ok()?;
    Some((gfn / PART, gfn % PART))
}

impl Origins {
    /// Frames from `gfn` on were read from here on, bytes. Nothing is noted of what is no block, or has a
    /// number beyond those that are remembered. The frames are the guest's: there is an end to them.
    pub fn note(&self, gfn: u64, offset: u64, count: u64) {
        if !offset.is_multiple_of(PAGE_SIZE) {
            return;
        }
        let mut parts = lock(&self.0);
        for (gfn, block) in (gfn..gfn.saturating_add(count)).zip(offset / PAGE_SIZE..) {
            let word = u32::try_from(block).ok().and_then(|it| it.checked_add(1));
            let (Some((part, at)), Some(word)) = (place(gfn), word) else {
                return;
            };
            if parts.len() <= part {
                parts.resize(part + 1, None);
            }
            parts[part].get_or_insert_with(|| Box::new([0; PART]))[at] = word;
        }
    }

    /// The blocks of `count` frames from `gfn` on.
    #[must_use]
    pub fn of(&self, gfn: u64, count: usize) -> Vec<Option<u64>> {
        let parts = lock(&self.0);
        let block = |gfn| {
            let (part, at) = place(gfn)?;
            let word = parts.get(part)?.as_ref()?[at];
            word.checked_sub(1).map(u64::from)
        };
        (gfn..).take(count).map(block).collect()
    }

    /// A frame is not what this block was, unless it was read anew meanwhile.
    pub fn forget(&self, gfn: u64, block: u64) {
        if let Some((part, at)) = place(gfn)
            && let Some(Some(part)) = lock(&self.0).get_mut(part)
            && u64::from(part[at]) == block.saturating_add(1)
        {
            part[at] = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_remembered_until_they_are_known_to_be_wrong() {
        let origins = Origins::default();
        assert_eq!(origins.of(u64::MAX - 1, 1), [None]);
        origins.note(1022, 5 * PAGE_SIZE, 3);
        origins.note(7, 512, 1);
        assert_eq!(origins.of(7, 1), [None], "no block");
        assert_eq!(origins.of(1021, 5), [None, Some(5), Some(6), Some(7), None]);
        origins.note(1023, 0, 1);
        origins.forget(1023, 6);
        origins.forget(1024, 7);
        origins.forget(u64::MAX, 7);
        assert_eq!(origins.of(1022, 3), [Some(5), Some(0), None]);
        // What does not fit is not remembered as something else.
        let most = u64::from(u32::MAX);
        origins.note(50, (most - 1) * PAGE_SIZE, 3);
        origins.note(60, u64::MAX - 4095, 1);
        assert_eq!(origins.of(50, 3), [Some(most - 1), None, None]);
        assert_eq!(origins.of(60, 1), [None]);
    }
}
