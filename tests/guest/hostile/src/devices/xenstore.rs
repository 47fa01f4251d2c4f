//! An honest client of the xenstore (`public/io/xs_wire.h`), one request at a time; what
//! dishonest ones do with its parts is in [`super::store`].

use core::sync::atomic::{AtomicU8, AtomicU32, Ordering::SeqCst};

use blanket_abi::xen::io::xenstore as page;

use super::guest::{PATIENCE, claim, notify, sleep, wait_for};
use crate::kernel::{VIRT_BASE, system_time};
use crate::text;

/// `enum xsd_sockmsg_type`.
pub mod kind {
    pub const DIRECTORY: u32 = 1;
    pub const READ: u32 = 2;
    pub const WATCH: u32 = 4;
    pub const TRANSACTION_START: u32 = 6;
    pub const TRANSACTION_END: u32 = 7;
    pub const WRITE: u32 = 11;
    pub const MKDIR: u32 = 12;
    pub const RM: u32 = 13;
    pub const SET_PERMS: u32 = 14;
    pub const WATCH_EVENT: u32 = 15;
    pub const ERROR: u32 = 16;
    pub const RESET_WATCHES: u32 = 21;
}

/// Bytes of a message's header.
pub const HEADER: usize = 16;

/// Why a request was not granted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The store said so; its word is the reply.
    Error,
    /// It says nothing any more.
    Silent,
}

pub struct Store {
    base: u64,
    /// The store's event channel.
    pub port: u32,
    reply: [u8; page::PAYLOAD_MAX],
    length: usize,
    next: u32,
    /// Requests made.
    pub asked: u64,
}

impl Store {
    pub fn new(gfn: u64, port: u32) -> Self {
        Self {
            base: VIRT_BASE + (gfn << 12),
            port,
            reply: [0; page::PAYLOAD_MAX],
            length: 0,
            next: 1,
            asked: 0,
        }
    }

    /// One of the ring's indices.
    pub fn index(&self, at: usize) -> &'static AtomicU32 {
        // SAFETY: the ring page, which the builder mapped for good; the offset is one of
        // the ABI's.
        unsafe { AtomicU32::from_ptr((self.base as usize + at) as *mut u32) }
    }

    fn byte(&self, ring: usize, index: u32) -> &'static AtomicU8 {
        let at = ring + (index % page::RING_SIZE) as usize;
        // SAFETY: as above, within one of its rings.
        unsafe { AtomicU8::from_ptr((self.base as usize + at) as *mut u8) }
    }

    /// Puts bytes into the ring; whether the store took all.
    pub fn send(&mut self, bytes: &[u8]) -> bool {
        let until = system_time() + PATIENCE;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (prod, cons) = (self.index(page::REQ_PROD), self.index(page::REQ_CONS));
            let at = prod.load(SeqCst);
            let room = page::RING_SIZE - at.wrapping_sub(cons.load(SeqCst)).min(page::RING_SIZE);
            let (now, later) = rest.split_at(rest.len().min(room as usize));
            for (n, byte) in now.iter().enumerate() {
                self.byte(page::REQ, at.wrapping_add(n as u32))
                    .store(*byte, SeqCst);
            }
            prod.store(at.wrapping_add(now.len() as u32), SeqCst);
            notify(self.port);
            rest = later;
            if !rest.is_empty() {
                if system_time() > until {
                    return false;
                }
                // Replies that nobody reads stop the store.
                self.drop_replies(now.is_empty());
                sleep(self.port, 1);
            }
        }
        true
    }

    /// Throws away what is in the ring of replies.
    pub fn drop_replies(&mut self, really: bool) {
        if really {
            let prod = self.index(page::RSP_PROD).load(SeqCst);
            self.index(page::RSP_CONS).store(prod, SeqCst);
            notify(self.port);
        }
    }

    /// Takes bytes out of the ring; whether so many came in time.
    fn receive(&mut self, to: &mut [u8], patience: u64) -> bool {
        let until = system_time() + patience;
        let mut done = 0;
        while done < to.len() {
            let (prod, cons) = (self.index(page::RSP_PROD), self.index(page::RSP_CONS));
            let at = cons.load(SeqCst);
            let there = prod.load(SeqCst).wrapping_sub(at).min(page::RING_SIZE) as usize;
            let now = there.min(to.len() - done);
            for byte in &mut to[done..done + now] {
                let index = cons.load(SeqCst);
                *byte = self.byte(page::RSP, index).load(SeqCst);
                cons.store(index.wrapping_add(1), SeqCst);
            }
            done += now;
            if there == page::RING_SIZE as usize {
                notify(self.port);
            }
            if now == 0 {
                if system_time() > until {
                    return false;
                }
                sleep(self.port, 5);
            }
        }
        true
    }

    /// A header, with the number of the next request.
    pub fn header(&mut self, kind: u32, transaction: u32, length: u32) -> [u8; HEADER] {
        self.next = self.next.wrapping_add(1);
        let mut bytes = [0; HEADER];
        for (at, word) in [kind, self.next, transaction, length].iter().enumerate() {
            bytes[at * 4..at * 4 + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Waits for the reply to the last request.
    pub fn answer(&mut self, patience: u64) -> Result<(), Refused> {
        loop {
            let mut header = [0; HEADER];
            if !self.receive(&mut header, patience) {
                return Err(Refused::Silent);
            }
            let word = |n: usize| {
                u32::from_le_bytes([header[n], header[n + 1], header[n + 2], header[n + 3]])
            };
            let (kind, request, length) = (word(0), word(4), word(12) as usize);
            claim(length <= page::PAYLOAD_MAX, "a reply of at most 4096 bytes");
            let mut reply = self.reply;
            if !self.receive(&mut reply[..length], patience) {
                return Err(Refused::Silent);
            }
            self.reply = reply;
            self.length = length;
            match kind {
                kind::WATCH_EVENT => {}
                // To something that was given up.
                _ if request != self.next => {}
                kind::ERROR => return Err(Refused::Error),
                _ => return Ok(()),
            }
        }
    }

    /// A request and its reply.
    pub fn ask(&mut self, kind: u32, transaction: u32, parts: &[&[u8]]) -> Result<(), Refused> {
        self.asked += 1;
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let header = self.header(kind, transaction, length as u32);
        let sent = self.send(&header) && parts.iter().all(|part| self.send(part));
        if !sent {
            return Err(Refused::Silent);
        }
        self.answer(PATIENCE)
    }

    /// The last reply, or the word of the error.
    pub fn reply(&self) -> &[u8] {
        &self.reply[..self.length]
    }

    pub fn read(&mut self, path: &str) -> Result<&[u8], Refused> {
        self.ask(kind::READ, 0, &[path.as_bytes(), b"\0"])?;
        Ok(self.reply())
    }

    pub fn write(&mut self, path: &str, value: &[u8]) -> Result<(), Refused> {
        self.ask(kind::WRITE, 0, &[path.as_bytes(), b"\0", value])
    }

    /// Writes a node that must be writable.
    pub fn put(&mut self, path: &str, value: &[u8]) {
        let done = self.write(path, value);
        assert!(
            done.is_ok(),
            "does not hold: {path} can be written: {done:?}"
        );
    }

    pub fn put_number(&mut self, path: &str, value: u32) {
        self.put(path, text!("{value}").bytes());
    }

    /// Waits until a node has this value.
    pub fn wait(&mut self, path: &str, value: &[u8], patience: u64) -> bool {
        let port = self.port;
        wait_for(port, patience, || self.read(path) == Ok(value))
    }
}
