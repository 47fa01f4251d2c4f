//! A guest behind BMcast's AHCI mediator that keeps to nothing: any access to any register, any bytes in its lists and
//! tables; and then a guest that has reset everything, for which all is as it should be.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[allow(dead_code)]
#[path = "../../bmcast/mediator/tests/common/mod.rs"]
mod common;

fuzz_target!(|bytes: &[u8]| common::hostile::run(bytes));
