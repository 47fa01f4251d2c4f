//! Disk images: arbitrary bytes, and sound images with changed bytes, opened and read.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| blanket_disk::testing::image(data));
