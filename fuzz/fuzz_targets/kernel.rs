//! Kernel files: broken, packed in every way, with headers and notes that lie.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| blanket_vmm::testing::bytes::kernel(data));
