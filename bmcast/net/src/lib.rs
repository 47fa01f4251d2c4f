//! The VMM's network: a [`Card`] of its own, TCP/IP (smoltcp) and HTTP range requests ([`Client`]).
//!
//! There are no interrupts and no threads: everything goes on in [`Client::poll`].
#![no_std]

extern crate alloc;

mod card;
mod client;
mod connection;
mod response;
mod virtio;

pub use card::Card;
pub use client::{Client, FetchError, Nameless, Options, Ticket};
pub use virtio::{Configuration, VIRTIO_NET, VirtioError, VirtioNet};
