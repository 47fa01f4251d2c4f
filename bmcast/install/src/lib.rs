//! What is on the disk, what is to be fetched, and what is to be written next.
#![no_std]

extern crate alloc;
