//! The header of a core image.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| blanket_vmm::testing::bytes::image(data));
