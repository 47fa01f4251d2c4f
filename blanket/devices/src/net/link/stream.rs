//! An end of a link that is a stream of packets, each behind its length in 32 bits, big
//! endian (QEMU's stream sockets, `net/stream.c`; passt).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use blanket_disk::Buffer;

use super::{Health, NotSent, Port, Received, vectors};
use crate::net::offload::Undone;
use crate::net::protocol::{MAX_LENGTH, MIN_LENGTH};

/// Bytes before a packet.
const PREFIX: usize = 4;
/// Longest packet: Ethernet around the longest IP packet, with room for tags.
const LONGEST: usize = MAX_LENGTH + 64;
/// Bytes that are read ahead.
const INBOX: usize = 4 * (LONGEST + PREFIX);

/// Such an end. Packets have nothing undone.
#[derive(Debug)]
pub(super) struct Stream {
    fd: OwnedFd,
    name: String,
    health: Health,
    /// What was read, from `next` to `filled`.
    inbox: Box<[u8]>,
    next: usize,
    filled: usize,
    /// The rest of a packet that did not fit into the socket, from `sent` on.
    outbox: Vec<u8>,
    sent: usize,
}

impl Stream {
    /// Of a socket that does not block.
    pub(super) fn new(fd: OwnedFd, name: String, health: Health) -> Self {
        Self {
            fd,
            name,
            health,
            inbox: vec![0; INBOX].into_boxed_slice(),
            next: 0,
            filled: 0,
            outbox: Vec::with_capacity(LONGEST),
            sent: 0,
        }
    }

    fn gone(&self, why: &dyn std::fmt::Display) {
        if self.health.down(why) {
            tracing::error!("{}: {why}", self.name);
        }
    }

    /// The next packet that was read as a whole. `Err` if what was read is no stream of
    /// packets.
    fn parse(&self) -> Result<Option<std::ops::Range<usize>>, usize> {
        let unread = &self.inbox[self.next..self.filled];
        let Some((prefix, rest)) = unread.split_first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*prefix) as usize;
        if !(MIN_LENGTH..=LONGEST).contains(&length) {
            return Err(length);
        }
        let start = self.next + PREFIX;
        Ok((rest.len() >= length).then_some(start..start + length))
    }

    /// Reads ahead. Whether something came.
    fn fill(&mut self) -> bool {
        self.inbox.copy_within(self.next..self.filled, 0);
        self.filled -= self.next;
        self.next = 0;
        loop {
            match rustix::io::read(&self.fd, &mut self.inbox[self.filled..]) {
                Ok(0) => {
                    self.gone(&"the connection was closed");
                    return false;
                }
                Ok(count) => {
                    self.filled += count;
                    return true;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return false,
                Err(error) => {
                    self.gone(&format!("the connection is broken: {error}"));
                    return false;
                }
            }
        }
    }
}

impl Port for Stream {
    fn send(&mut self, _undone: &Undone, parts: &[Buffer]) -> Result<(), NotSent> {
        if !self.health.is_up() {
            return Err(NotSent::Down);
        }
        if self.flush() {
            return Err(NotSent::Full);
        }
        let length: usize = parts.iter().map(Buffer::length).sum();
        let Ok(prefix) = u32::try_from(length) else {
            return Err(NotSent::Refused(io::ErrorKind::InvalidInput.into()));
        };
        let prefix = prefix.to_be_bytes();
        loop {
            match vectors::send(self.fd.as_fd(), &prefix, parts) {
                Ok(sent) if sent < PREFIX + length => {
                    // The packet has begun and must be ended, also when the guest's pages
                    // are no longer there.
                    self.outbox.clear();
                    self.sent = 0;
                    self.outbox.extend(prefix.get(sent..).unwrap_or(&[]));
                    vectors::copy_out(parts, sent.saturating_sub(PREFIX), &mut self.outbox);
                    return Ok(());
                }
                Ok(_) => return Ok(()),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => return Err(NotSent::Full),
                    _ => {
                        self.gone(&format!("the connection is broken: {error}"));
                        return Err(NotSent::Down);
                    }
                },
            }
        }
    }

    fn flush(&mut self) -> bool {
        while self.health.is_up() && self.sent < self.outbox.len() {
            match vectors::send(self.fd.as_fd(), &self.outbox[self.sent..], &[]) {
                Ok(count) => self.sent += count,
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::WouldBlock => return true,
                    _ => self.gone(&format!("the connection is broken: {error}")),
                },
            }
        }
        self.outbox.clear();
        self.sent = 0;
        false
    }

    fn has_taken_all(&self) -> bool {
        // A kernel that does not say is not asked for ever.
        self.sent == self.outbox.len() && vectors::unread(self.fd.as_fd()).unwrap_or(0) == 0
    }

    fn receive(&mut self, parts: &[Buffer]) -> Option<Received> {
        loop {
            match self.parse() {
                Ok(Some(packet)) => {
                    self.next = packet.end;
                    let packet = &self.inbox[packet];
                    vectors::copy_in(packet, parts);
                    return Some(Received {
                        length: packet.len(),
                        undone: Some(Undone::default()),
                    });
                }
                Ok(None) => {
                    if !self.health.is_up() || !self.fill() {
                        return None;
                    }
                }
                Err(length) => {
                    self.gone(&format!("it sent a packet of {length} bytes"));
                    self.next = self.filled;
                    return None;
                }
            }
        }
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        self.health.is_up().then(|| self.fd.as_fd())
    }
}

#[cfg(test)]
mod tests;
