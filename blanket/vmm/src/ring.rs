//! Byte rings in guest memory. The guest writes one index of each ring and may
//! write anything anywhere: this side keeps its own index and believes nothing
//! else than the other's, checked.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use blanket_abi::Gfn;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::builder::GuestMemory;

/// What is wrong with a ring.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// More bytes than the ring holds.
    #[error("the guest's ring index is {0} bytes away from ours")]
    Index(u32),
    /// The page is not in guest memory.
    #[error("the ring cannot be reached: {0}")]
    Memory(#[from] GuestMemoryError),
}

/// Where the parts of a ring are in its page.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Offset of the bytes.
    pub data: usize,
    /// Number of bytes, a power of two.
    pub size: u32,
    /// Offset of the producer index.
    pub producer: usize,
    /// Offset of the consumer index.
    pub consumer: usize,
}

/// This side of one direction of a ring page.
#[derive(Debug)]
pub struct Ring {
    memory: Arc<GuestMemory>,
    page: GuestAddress,
    place: Place,
    /// Our index; the copy in the page is for the guest only.
    index: u32,
}

impl Ring {
    /// A ring in which our index is `index`: 0 in a fresh page.
    #[must_use]
    pub fn new(memory: Arc<GuestMemory>, page: Gfn, place: Place, index: u32) -> Self {
        Self {
            memory,
            page: GuestAddress(page.base()),
            place,
            index,
        }
    }

    /// Our index.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Takes at most `max` bytes that the guest has produced, and tells the guest.
    ///
    /// # Errors
    /// An index that cannot be. The ring is then empty for us.
    pub fn consume(&mut self, max: usize) -> Result<Vec<u8>, RingError> {
        let producer = self.load(self.place.producer)?;
        let waiting = producer.wrapping_sub(self.index);
        if waiting > self.place.size {
            // Start again where the guest says it is.
            self.index = producer;
            self.store(self.place.consumer)?;
            return Err(RingError::Index(waiting));
        }
        let count = (waiting as usize).min(max);
        let mut bytes = vec![0; count];
        self.for_each_part(count, |at, range| {
            self.memory.read_slice(&mut bytes[range], at)
        })?;
        self.advance(count, self.place.consumer)?;
        Ok(bytes)
    }

    /// Gives the guest as many bytes as there is room for; returns how many.
    ///
    /// # Errors
    /// An index that cannot be; nothing is given.
    pub fn produce(&mut self, bytes: &[u8]) -> Result<usize, RingError> {
        let consumer = self.load(self.place.consumer)?;
        let unread = self.index.wrapping_sub(consumer);
        if unread > self.place.size {
            return Err(RingError::Index(unread));
        }
        let count = ((self.place.size - unread) as usize).min(bytes.len());
        self.for_each_part(count, |at, range| {
            self.memory.write_slice(&bytes[range], at)
        })?;
        self.advance(count, self.place.producer)?;
        Ok(count)
    }

    /// Calls `copy` for the one or two runs of the next `count` bytes.
    fn for_each_part(
        &self,
        count: usize,
        mut copy: impl FnMut(GuestAddress, std::ops::Range<usize>) -> Result<(), GuestMemoryError>,
    ) -> Result<(), GuestMemoryError> {
        let start = (self.index % self.place.size) as usize;
        let first = count.min(self.place.size as usize - start);
        let at = |offset: usize| GuestAddress(self.page.0 + (self.place.data + offset) as u64);
        if first > 0 {
            copy(at(start), 0..first)?;
        }
        if count > first {
            copy(at(0), first..count)?;
        }
        Ok(())
    }

    fn advance(&mut self, count: usize, offset: usize) -> Result<(), GuestMemoryError> {
        if count > 0 {
            // At most `size`, which is a u32.
            self.index = self.index.wrapping_add(u32::try_from(count).unwrap_or(0));
            self.store(offset)?;
        }
        Ok(())
    }

    fn load(&self, offset: usize) -> Result<u32, GuestMemoryError> {
        // Our last store must be seen before we decide that there is nothing to do:
        // the guest signals only if it believes us to be idle.
        fence(Ordering::SeqCst);
        self.memory
            .load(GuestAddress(self.page.0 + offset as u64), Ordering::Acquire)
    }

    fn store(&self, offset: usize) -> Result<(), GuestMemoryError> {
        self.memory.store(
            self.index,
            GuestAddress(self.page.0 + offset as u64),
            Ordering::Release,
        )
    }
}

#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "small numbers of the tests' own making"
)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    const PLACE: Place = Place {
        data: 64,
        size: 32,
        producer: 0,
        consumer: 4,
    };

    fn memory() -> Arc<GuestMemory> {
        Arc::new(GuestMemory::from_ranges(&[(GuestAddress(0), 8192)]).expect("memory"))
    }

    proptest! {
        #[test]
        fn bytes_come_out_as_they_went_in(steps in proptest::collection::vec((any::<bool>(), 0usize..50), 1..200)) {
            let memory = memory();
            // The same code plays the guest: producer here, consumer there.
            let mut producer = Ring::new(Arc::clone(&memory), Gfn(1), PLACE, 0);
            let mut consumer = Ring::new(memory, Gfn(1), PLACE, 0);
            let mut model: VecDeque<u8> = VecDeque::new();
            let mut next = 0u8;
            for (produce, count) in steps {
                if produce {
                    let bytes: Vec<u8> = (0..count).map(|n| next.wrapping_add(n as u8)).collect();
                    let taken = producer.produce(&bytes).expect("sane indices");
                    prop_assert_eq!(taken, count.min(32 - model.len()));
                    model.extend(&bytes[..taken]);
                    next = next.wrapping_add(taken as u8);
                } else {
                    let bytes = consumer.consume(count).expect("sane indices");
                    prop_assert_eq!(bytes.len(), count.min(model.len()));
                    prop_assert!(bytes.iter().copied().eq(model.drain(..bytes.len())));
                }
            }
        }

        #[test]
        fn hostile_indices_are_refused_and_never_overrun(
            indices in proptest::collection::vec((any::<u32>(), any::<u32>()), 1..50),
        ) {
            let memory = memory();
            let mut out = Ring::new(Arc::clone(&memory), Gfn(1), PLACE, 0);
            let mut ring_in = Ring::new(
                Arc::clone(&memory),
                Gfn(1),
                Place { data: 128, producer: 8, consumer: 12, ..PLACE },
                0,
            );
            for (a, b) in indices {
                memory.write_obj(a, GuestAddress(4096)).expect("inside");
                memory.write_obj(b, GuestAddress(4096 + 12)).expect("inside");
                if let Ok(bytes) = out.consume(1000) {
                    prop_assert!(bytes.len() <= 32);
                }
                if let Ok(count) = ring_in.produce(&[1; 100]) {
                    prop_assert!(count <= 32);
                }
                // After a refusal the ring is usable again.
                memory.write_obj(out.index.wrapping_add(3), GuestAddress(4096)).expect("inside");
                prop_assert_eq!(out.consume(10).expect("sane").len(), 3);
            }
            let mut beyond = [0u8; 32];
            memory.read_slice(&mut beyond, GuestAddress(4096 + 160)).expect("inside");
            prop_assert_eq!(beyond, [0; 32]);
        }
    }
}
