//! The smallest program that still starts a C library: it returns at once.
//!
//! `micro` executes it to time fork and exec. Rust's start-up code, and with
//! `-C panic=abort` its whole standard library, are left out, so that the
//! figure is that of the kernel and of libc alone.

#![no_main]
#![cfg_attr(panic = "abort", no_std)]

// Without std nobody else names the C library to the linker.
#[cfg(panic = "abort")]
#[link(name = "c")]
#[link(name = "gcc_eh")]
#[link(name = "gcc")]
unsafe extern "C" {
    fn _exit(code: i32) -> !;
}

/// Entry point that the C library calls; returns success.
#[unsafe(no_mangle)]
pub extern "C" fn main() -> i32 {
    0
}

/// Nothing here panics; the language wants the handler when std is left out.
#[cfg(panic = "abort")]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // SAFETY: ends the process.
    unsafe { _exit(101) }
}
