//! Saved VMs: any file, and a real one that is damaged, with and without right sums; what is
//! taken is laid out as for a core, saved and taken up again.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| blanket_vmm::testing::bytes::saved(data));
