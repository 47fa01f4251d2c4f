//! The VMM's network: a card of its own, TCP/IP (smoltcp) and HTTP range requests.
#![no_std]

extern crate alloc;
