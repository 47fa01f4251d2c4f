//! A byte ring that the guest writes as it likes: console and xenstore have such.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| blanket_vmm::testing::bytes::ring(data));
