//! zstd. Its tables are made once for each thread: pages are packed a few at a time, and it would take
//! longer to make them than to pack a page.

use std::cell::RefCell;
use std::io;

use zstd::bulk::{Compressor, Decompressor};
use zstd::zstd_safe::compress_bound;

/// How hard to compress: memory changes hands once, and the CPU is the guest's, too.
const LEVEL: i32 = 1;

thread_local! {
    static PACKER: RefCell<Option<Compressor<'static>>> = const { RefCell::new(None) };
    static UNPACKER: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

/// Does something with what is made at its first use.
fn with<T, R>(
    kept: &RefCell<Option<T>>,
    make: impl FnOnce() -> io::Result<T>,
    does: impl FnOnce(&mut T) -> io::Result<R>,
) -> io::Result<R> {
    let mut kept = kept.borrow_mut();
    let it = match &mut *kept {
        Some(it) => it,
        none => none.insert(make()?),
    };
    does(it)
}

/// Adds bytes to `packed`, compressed.
pub(crate) fn pack(packed: &mut Vec<u8>, bytes: &[u8]) -> io::Result<()> {
    let at = packed.len();
    packed.resize(at + compress_bound(bytes.len()), 0);
    let count = PACKER.with(|packer| {
        let make = || Compressor::new(LEVEL);
        with(packer, make, |it| {
            it.compress_to_buffer(bytes, &mut packed[at..])
        })
    })?;
    packed.truncate(at + count);
    Ok(())
}

/// Bytes, exactly so many; `None` if they are others.
pub(crate) fn unpack(packed: &[u8], length: usize) -> Option<Vec<u8>> {
    let bytes = UNPACKER.with(|unpacker| {
        with(unpacker, Decompressor::new, |it| {
            it.decompress(packed, length)
        })
    });
    bytes.ok().filter(|bytes| bytes.len() == length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_broken_leaves_nothing_behind() {
        let bytes = [b"page".repeat(500), vec![0; 3000]].concat();
        let mut packed = b"before".to_vec();
        pack(&mut packed, &bytes).expect("packed");
        let packed = packed.strip_prefix(b"before").expect("as it was");
        let is_whole = || unpack(packed, bytes.len()) == Some(bytes.clone());
        assert!(is_whole());
        let mut broken = packed.to_vec();
        for at in 0..packed.len() {
            broken[at] ^= 0x55;
            let _ = unpack(&broken, bytes.len());
            broken[at] ^= 0x55;
            assert_eq!(unpack(&packed[..at], bytes.len()), None);
            assert!(is_whole(), "after {at}");
        }
        assert_eq!(unpack(packed, bytes.len() - 1), None);
        assert_eq!(unpack(packed, bytes.len() + 1), None);
    }
}
