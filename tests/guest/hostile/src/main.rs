//! A PV kernel that attacks the core it runs on: random and adversarial hypercalls,
//! page tables, descriptors, return frames, events, grants and instructions, from a
//! seed on its command line. One file for each family of attacks.
//!
//! What may come of it is an error, a fault, or the end of this VM by the core's own
//! decision (exit code 4 of `blanket run`). What may not: the core finding its own
//! state wrong (7), or anything at all happening to the host and to other VMs.
//!
//! Command line: `seed=N steps=N`; `deadly=1` lets it attack its own image and stack too,
//! `alone=1` leaves the second vCPU asleep. Last line of its console, if it gets there:
//! `HOSTILE seed=N steps=N hypercalls=N faults=N`.
//!
//! With `devices=1` it attacks what is behind the VM's devices instead, of which it needs
//! two disks of 4 MiB and a network: families of [`devices`], `steps` of them.
#![cfg_attr(target_os = "none", no_std, no_main)]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "random numbers are cut to what is wanted"
)]

#[cfg(target_os = "none")]
mod descriptors;
#[cfg(target_os = "none")]
mod devices;
#[cfg(target_os = "none")]
mod events;
#[cfg(target_os = "none")]
mod grants;
#[cfg(target_os = "none")]
mod hypercalls;
#[cfg(target_os = "none")]
mod instructions;
#[cfg(target_os = "none")]
mod kernel;
#[cfg(target_os = "none")]
mod memory;
#[cfg(target_os = "none")]
mod preemption;
#[cfg(target_os = "none")]
mod races;
#[cfg(target_os = "none")]
mod rng;
#[cfg(target_os = "none")]
mod shapes;
#[cfg(target_os = "none")]
mod storm;
#[cfg(target_os = "none")]
mod tables;
#[cfg(target_os = "none")]
mod user;

#[cfg(not(target_os = "none"))]
fn main() {
    eprintln!(
        "hostile is a kernel: `cargo xtask build` makes it, `./x test --only hostile` runs it"
    );
    std::process::exit(2);
}
