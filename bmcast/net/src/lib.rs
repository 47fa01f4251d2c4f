//! The VMM's network: a card of its own, TCP/IP (smoltcp) and HTTP range requests.
//!
//! [`Card`] drives a card that the guest does not see (virtio-net, Intel 82574) by polling, with no
//! interrupt, and touches the machine by one trait, [`Machine`]. [`Client`] fetches ranges of an image
//! and small files from a list of servers over any [`smoltcp::phy::Device`], a [`Card`] or a test's.
//! Both do a bounded amount of work for each call and never wait, but for a card's reset.
//!
//! The servers and everything between are hostile: an answer that is not exactly what was
//! asked for is an error or is asked for again, never more memory than the request named.
#![no_std]

extern crate alloc;

mod card;
mod client;
mod connection;
mod e1000e;
mod http;
mod machine;
mod pci;
mod server;
mod virtio;

pub use card::{Card, CardError, DMA_BYTES, Model, probe};
pub use client::{Address, Client, Need, NetConfig, Status, Ticket};
pub use http::{Answer, Expect, FetchError, Outcome};
pub use machine::{Dma, Function, Machine};
pub use server::{Server, UrlError};
