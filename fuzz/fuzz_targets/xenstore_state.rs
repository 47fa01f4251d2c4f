//! The xenstore's saved state: any JSON, and real states that are damaged, restored and
//! then used.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| blanket_xenstore::testing::state(data));
