//! What the two sides of a migration say to each other: any bytes as each kind of it, and what
//! source and destination make of it.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| blanket_migration::testing::link(data));
