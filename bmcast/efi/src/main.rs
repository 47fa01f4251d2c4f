//! BMcast's VMM as a UEFI application: see `docs/bmcast.md`.
//!
//! The firmware loads it where the OS will have its memory. So the first thing it does is to copy itself to reserved
//! memory ([`relocate`]); the copy sets everything up and takes the CPU into guest mode in place
//! ([`resident`]). What the firmware has loaded goes on as the guest, and starts the OS ([`boot`]).
#![cfg_attr(target_os = "uefi", no_std, no_main)]

#[cfg(target_os = "uefi")]
extern crate alloc;

#[cfg(target_os = "uefi")]
mod application {
    mod apic;
    mod boot;
    mod clock;
    mod cpu;
    mod exits;
    mod firmware;
    mod heap;
    mod host;
    mod leave;
    mod log;
    mod machine;
    mod memory;
    mod network;
    mod pci;
    mod relocate;
    mod resident;
    mod start;
    mod switch;
    mod vcpu;
    mod windows;
}

#[cfg(not(target_os = "uefi"))]
fn main() {
    eprintln!("bmcast-efi is a UEFI application; build it with `cargo xtask build metal`");
    std::process::exit(2);
}
