//! The xenstore's wire: arbitrary bytes, and messages that nearly fit.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| blanket_vmm::testing::bytes::xenstore(data));
