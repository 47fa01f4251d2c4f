//! Everything that reads bytes of others, given any bytes: what must hold whatever they
//! are. Run by unit tests with bytes at random, and by the fuzz targets in `fuzz/`.

use std::sync::Arc;

use blanket_abi::device::Boot;
use blanket_abi::{Gfn, xen::domid};
use blanket_xenstore::{Connection, Quotas, Store};
use vm_memory::{Bytes as _, GuestAddress};

use super::{Synthetic, bzimage, bzip2, gzip, lz4_legacy, with_size, zstd};
use crate::builder::{self, GuestMemory};
use crate::kernel::Kernel;
use crate::ring::{Place, Ring};

pub use crate::saved::testing::saved;

/// Takes numbers from the front of some bytes; zeros when they are used up.
struct Take<'a>(&'a [u8]);

impl Take<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let count = N.min(self.0.len());
        let (head, rest) = self.0.split_at(count);
        out[..count].copy_from_slice(head);
        self.0 = rest;
        out
    }
    fn byte(&mut self) -> u8 {
        self.bytes::<1>()[0]
    }
    fn below(&mut self, n: usize) -> usize {
        usize::from(u16::from_le_bytes(self.bytes())) % n.max(1)
    }
}

/// A kernel file: the bytes as they are, or a good kernel, packed in one way or another,
/// with some of its bytes changed. What is accepted holds together, and can be built.
pub fn kernel(data: &[u8]) {
    let mut take = Take(data);
    let elf = Synthetic::default().elf();
    let mut image = match take.byte() % 8 {
        0 => take.0.to_vec(),
        1 => bzimage(&elf),
        2 => super::bzimage_raw(&gzip(&elf)),
        3 => super::bzimage_raw(&with_size(bzip2(&elf), &elf)),
        4 => super::bzimage_raw(&with_size(lz4_legacy(&elf), &elf)),
        5 => super::bzimage_raw(&with_size(zstd(&elf), &elf)),
        _ => elf,
    };
    for _ in 0..take.byte() % 16 {
        // Mostly where headers and notes are.
        let limit = if take.byte() % 2 == 0 {
            1024
        } else {
            image.len()
        };
        let at = take.below(limit.min(image.len()));
        let value = take.byte();
        if let Some(byte) = image.get_mut(at) {
            *byte = value;
        }
    }
    if take.byte().is_multiple_of(4) {
        image.truncate(take.below(image.len()));
    }
    let Ok(kernel) = Kernel::parse(image) else {
        return;
    };
    for segment in kernel.segments() {
        assert!(kernel.bytes(segment).len() as u64 <= segment.mem_size);
        assert!(segment.end() <= kernel.end());
    }
    let config = builder::Config {
        memory: 64 << 20,
        max_memory: u64::from(take.byte()) << 20,
        cmdline: String::new(),
        verbose: false,
        vcpus: 1,
        mergeable: false,
        inject: false,
    };
    if let Ok(domain) = builder::build(&kernel, None, &config) {
        let Boot {
            ram_frames,
            shared_info,
            grant_base,
            ..
        } = domain.boot;
        assert!(shared_info >= ram_frames && grant_base > shared_info);
        assert!(grant_base + domain.boot.grant_frames <= domain.frames);
    }
}

/// A ring in a page that the guest writes as it likes, while this side uses it: the
/// console's and the xenstore's are such.
pub fn ring(data: &[u8]) {
    const PAGE: u64 = 4096;
    let mut take = Take(data);
    let place = Place {
        data: 0,
        size: 1 << (take.byte() % 12),
        producer: 2048 + 4,
        consumer: 2048,
    };
    let Ok(memory) = GuestMemory::from_ranges(&[(GuestAddress(0), 3 * 4096)]) else {
        return;
    };
    let memory = Arc::new(memory);
    // Beyond the memory now and then: a page that is not there.
    let page = Gfn(u64::from(take.byte() % 4));
    let mut ring = Ring::new(Arc::clone(&memory), page, place, 0);
    while !take.0.is_empty() {
        match take.byte() % 4 {
            0 => {
                let at = PAGE * page.0 + 2048 + 4 * u64::from(take.byte() % 2);
                // Not there: then nothing is written.
                let _ = memory.write_obj(u32::from_le_bytes(take.bytes()), GuestAddress(at));
            }
            1 => {
                let at = PAGE * page.0 + 2048 + 4 * u64::from(take.byte() % 2);
                let near = take.byte();
                if let Ok(index) = memory.read_obj::<u32>(GuestAddress(at)) {
                    let index = index.wrapping_add(u32::from(near)).wrapping_sub(100);
                    let _ = memory.write_obj(index, GuestAddress(at));
                }
            }
            2 => {
                let max = take.below(5000);
                if let Ok(bytes) = ring.consume(max) {
                    assert!(bytes.len() <= max && bytes.len() <= place.size as usize);
                }
            }
            _ => {
                let bytes = vec![0x55; take.below(5000)];
                if let Ok(count) = ring.produce(&bytes) {
                    assert!(count <= bytes.len() && count <= place.size as usize);
                }
            }
        }
    }
}

/// Two guests' ends of the xenstore's wire: arbitrary bytes, and messages with a good
/// header. Every message that is taken is answered, and nothing grows without bound.
pub fn xenstore(data: &[u8]) {
    let mut take = Take(data);
    let mut store = Store::new(Quotas::default());
    let mut ends = [domid::GUEST, 0, 7].map(|domain| Connection::new(&mut store, domain));
    while !take.0.is_empty() {
        let end = &mut ends[usize::from(take.byte() % 3)];
        let mut message = Vec::new();
        if take.byte() % 8 != 0 {
            // Kind, request, transaction, length.
            let length = u32::from(take.byte() % 64);
            for field in [
                u32::from(take.byte() % 24),
                1,
                u32::from(take.byte() % 4),
                length,
            ] {
                message.extend_from_slice(&field.to_le_bytes());
            }
            for _ in 0..length {
                // Paths, numbers and ends of words more often than other bytes.
                let byte = take.byte();
                message.push(match byte % 4 {
                    0 => b"/\0a1@nlocalbw"[usize::from(byte / 4) % 13],
                    _ => byte,
                });
            }
        } else {
            let length = take.below(200).min(take.0.len());
            message.extend_from_slice(&take.0[..length]);
            take.0 = &take.0[length..];
        }
        let mut rest = &message[..];
        while !rest.is_empty() {
            match end.receive(&mut store, rest) {
                // Full: its client reads first.
                Ok(0) if end.ready() => panic!("nothing taken although it is ready"),
                Ok(taken) => rest = &rest[taken..],
                // Not to be mended: the VMM closes such a connection.
                Err(_) => return,
            }
            let waiting = end.output().len();
            end.sent(waiting.max(1));
        }
    }
}

/// A core image's header.
pub fn image(data: &[u8]) {
    // A leak for each input, as small as the input: images live for ever.
    let bytes: &'static [u8] = data.to_vec().leak();
    if let Ok(image) = crate::kvm::parse_image(bytes) {
        assert!(image <= data.len() as u64);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    fn any_bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(any::<u8>(), 0..most)
    }

    proptest! {
        #[test]
        fn kernels(data in any_bytes(200)) {
            super::kernel(&data);
        }

        #[test]
        fn rings(data in any_bytes(400)) {
            super::ring(&data);
        }

        #[test]
        fn xenstore_messages(data in any_bytes(4000)) {
            super::xenstore(&data);
        }

        #[test]
        fn image_headers(data in any_bytes(300)) {
            super::image(&data);
        }
    }
}
