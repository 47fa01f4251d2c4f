//! Random bytes of the host.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// Random bytes, by getrandom(2): as many as it always gives at once.
///
/// # Errors
/// The host gave none, or too few.
pub fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    const { assert!(N <= 256) };
    let mut bytes = [0; N];
    if getrandom(&mut bytes, GetRandomFlags::empty())? == N {
        Ok(bytes)
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}
