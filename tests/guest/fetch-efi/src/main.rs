//! A UEFI application that takes the network card from the firmware, fetches a file in ranges and
//! compares its BLAKE3 sum. What it is to do is in `\fetch.txt` beside it, `KEY=VALUE` in each line:
//!
//! - `server=URL`, once or more: where the files are;
//! - `image=PATH`: the file; the server's file `PATH.sum` has its length and its sum in hex;
//! - `exit=1`: leave the firmware's boot services first;
//! - `gap=MICROSECONDS`: from one poll to the next, as if a guest ran.
//!
//! Ends QEMU by its device `isa-debug-exit` at port 0xf4: with 33 if all was right, else 35.
#![cfg_attr(target_os = "uefi", no_std, no_main)]

#[cfg(target_os = "uefi")]
extern crate alloc;

#[cfg(target_os = "uefi")]
mod fetch;
#[cfg(target_os = "uefi")]
mod firmware;
#[cfg(target_os = "uefi")]
mod machine;

#[cfg(target_os = "uefi")]
#[uefi::entry]
fn main() -> uefi::Status {
    firmware::start_heap();
    let right = fetch::run();
    machine::end(right)
}

#[cfg(target_os = "uefi")]
#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    say!("FETCH panic: {info}");
    machine::end(false)
}

#[cfg(not(target_os = "uefi"))]
fn main() {}
