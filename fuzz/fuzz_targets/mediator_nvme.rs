//! A guest behind BMcast's NVMe mediator that keeps to nothing: any access to any register, any bytes in its queues;
//! and then a guest that has reset everything, for which all is as it should be.
#![no_main]
#![allow(dead_code)]

use libfuzzer_sys::fuzz_target;

#[path = "../../bmcast/mediator/tests/common/blocks.rs"]
mod blocks;
#[path = "../../bmcast/mediator/tests/nvme/controller.rs"]
mod controller;
#[path = "../../bmcast/mediator/tests/nvme/hostile.rs"]
mod hostile;
#[path = "../../bmcast/mediator/tests/nvme/world.rs"]
mod world;

fuzz_target!(|bytes: &[u8]| hostile::run(bytes));
