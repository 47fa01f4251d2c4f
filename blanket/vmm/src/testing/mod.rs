//! Test doubles: small kernels made on the spot, and a hypervisor whose guests are
//! closures. For tests only, here and in the crates above.

pub mod bytes;
mod hypervisor;
#[allow(
    clippy::cast_possible_truncation,
    reason = "small numbers of the tests' own making"
)]
mod kernel;

pub use hypervisor::{Fake, Guest, Program};
pub use kernel::{Synthetic, bzimage, bzimage_raw, bzip2, gzip, lz4_legacy, with_size, zstd};
