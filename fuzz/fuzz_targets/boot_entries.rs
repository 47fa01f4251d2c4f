//! What a disk image would boot: partition tables, file systems, configurations, initrds.
#![no_main]

use blanket_boot::testing;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((kind, rest)) = data.split_first() else {
        return;
    };
    match kind % 3 {
        0 => testing::disk(rest),
        1 => testing::texts(&String::from_utf8_lossy(rest)),
        _ => testing::initrd(rest),
    }
});
