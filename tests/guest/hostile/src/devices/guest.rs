//! What an honest frontend needs: pages of its own, grants, event channels, a clock.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use blanket_abi::xen::domid;
use blanket_abi::xen::event::op as event;
use blanket_abi::xen::grant::{flag, op as grant};
use blanket_abi::xen::hypercall::{self as nr, sched};

use crate::kernel::{Kernel, VIRT_BASE, clear_pending, hypercall, system_time};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Pages that can be granted.
const PAGES: usize = 104;
/// How long a backend may take, ns. Only an instance that stands still needs as much.
pub const PATIENCE: u64 = 120_000_000_000;

#[repr(C, align(4096))]
struct Pool([[AtomicU32; PAGE / 4]; PAGES]);
static POOL: Pool = Pool([const { [const { AtomicU32::new(0) }; PAGE / 4] }; PAGES]);
/// Where the grant table's first frame is mapped.
#[repr(C, align(4096))]
struct Table([AtomicU64; PAGE / 8]);
static TABLE: Table = Table([const { AtomicU64::new(0) }; PAGE / 8]);

/// A page that can be granted, by its number.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Page(pub usize);

impl Page {
    /// Its frame.
    pub fn gfn(self) -> u64 {
        ((&raw const POOL.0[self.0]) as u64 - VIRT_BASE) >> 12
    }
    /// The word at an offset in bytes.
    pub fn word(self, at: usize) -> &'static AtomicU32 {
        &POOL.0[self.0][at / 4 % (PAGE / 4)]
    }
    /// Writes whole words.
    pub fn put(self, at: usize, bytes: &[u8]) {
        for (n, word) in bytes.as_chunks::<4>().0.iter().enumerate() {
            self.word(at + n * 4)
                .store(u32::from_le_bytes(*word), SeqCst);
        }
    }
    /// Reads whole words.
    pub fn get<const N: usize>(self, at: usize) -> [u8; N] {
        let mut bytes = [0; N];
        for (n, word) in bytes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            *word = self.word(at + n * 4).load(SeqCst).to_le_bytes();
        }
        bytes
    }
    /// Sets every word.
    pub fn fill(self, f: impl Fn(usize) -> u32) {
        for n in 0..PAGE / 4 {
            self.word(n * 4).store(f(n), SeqCst);
        }
    }
    /// The grant that [`share`] makes of it: the first ones are the console's and the
    /// store's.
    pub fn gref(self) -> u32 {
        8 + self.0 as u32
    }
}

/// The first grant that no page has.
pub const FREE_GREFS: u32 = 8 + PAGES as u32;

/// Maps the grant table.
pub fn map_grants(k: &Kernel) {
    let mut frame = 0u64;
    // `struct gnttab_setup_table`: domain, frames, status, list.
    let setup = [u64::from(domid::SELF) | 1 << 32, 0, (&raw mut frame) as u64];
    let done = hypercall(
        nr::GRANT_TABLE_OP,
        [grant::SETUP_TABLE, setup.as_ptr() as u64, 1, 0, 0],
    );
    // SAFETY: the hypervisor has just written it.
    let frame = unsafe { (&raw const frame).read_volatile() };
    claim(done == 0 && frame > k.shared_info, "the grant table");
    let at = (&raw const TABLE) as u64;
    let entry = frame << 12 | 0x67;
    let mapped = hypercall(nr::UPDATE_VA_MAPPING, [at, entry, 2, 0, 0]);
    claim(mapped == 0, "mapping the grant table");
}

/// Makes an entry of the grant table (`struct grant_entry_v1`).
pub fn set_grant(gref: u32, flags: u16, domain: u16, frame: u64) {
    let entry = u64::from(flags) | u64::from(domain) << 16 | frame << 32;
    TABLE.0[gref as usize % (PAGE / 8)].store(entry, SeqCst);
}

/// Grants a page to the backend.
pub fn share(page: Page, read_only: bool) -> u32 {
    let flags = flag::PERMIT_ACCESS | if read_only { flag::READONLY } else { 0 };
    set_grant(page.gref(), flags, domid::BACKEND, page.gfn());
    page.gref()
}

/// Takes a grant back, unless the backend uses it.
pub fn revoke(gref: u32) -> bool {
    let entry = &TABLE.0[gref as usize % (PAGE / 8)];
    let used = u64::from(flag::READING | flag::WRITING);
    entry
        .try_update(SeqCst, SeqCst, |now| (now & used == 0).then_some(0))
        .is_ok()
}

/// A port that the backend can be told of.
pub fn new_port() -> u32 {
    let mut args = u64::from(domid::SELF) | u64::from(domid::BACKEND) << 16;
    let at = (&raw mut args) as u64;
    let done = hypercall(nr::EVENT_CHANNEL_OP, [event::ALLOC_UNBOUND, at, 0, 0, 0]);
    claim(done == 0, "a port");
    // SAFETY: the hypervisor has just written it.
    (unsafe { (&raw const args).read_volatile() } >> 32) as u32
}

fn port_op(op: u64, port: u32) {
    let arg = u64::from(port);
    hypercall(nr::EVENT_CHANNEL_OP, [op, (&raw const arg) as u64, 0, 0, 0]);
}

/// Gives a port back.
pub fn close_port(port: u32) {
    port_op(event::CLOSE, port);
}

/// Tells the other end of a port.
pub fn notify(port: u32) {
    port_op(event::SEND, port);
}

/// Sleeps until a port is told of something, at most some ms.
pub fn sleep(port: u32, ms: u64) {
    // `struct sched_poll`: ports, how many, until when.
    let list = u64::from(port);
    let until = system_time() + ms * 1_000_000;
    let args = [(&raw const list) as u64, 1, until];
    hypercall(nr::SCHED_OP, [sched::POLL, args.as_ptr() as u64, 0, 0, 0]);
    clear_pending(port);
}

/// Waits until something is so. Whether it came to be.
pub fn wait_for(port: u32, patience: u64, mut done: impl FnMut() -> bool) -> bool {
    let until = system_time() + patience;
    loop {
        if done() {
            return true;
        }
        if system_time() > until {
            return false;
        }
        sleep(port, 5);
    }
}

/// Ends the VM as crashed if something is not so.
pub fn claim(holds: bool, what: &str) {
    assert!(holds, "does not hold: {what}");
}

/// A short text.
#[derive(Clone, Copy)]
pub struct Text {
    bytes: [u8; 96],
    len: usize,
}

impl Text {
    /// Writes it.
    pub fn new(args: fmt::Arguments<'_>) -> Self {
        let mut text = Self {
            bytes: [0; 96],
            len: 0,
        };
        claim(text.write_fmt(args).is_ok(), "a short text");
        text
    }
    /// A copy of bytes.
    pub fn of(from: &[u8]) -> Self {
        let mut bytes = [0; 96];
        bytes[..from.len()].copy_from_slice(from);
        Self {
            bytes,
            len: from.len(),
        }
    }
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
    pub fn str(&self) -> &str {
        core::str::from_utf8(self.bytes()).unwrap_or("?")
    }
}

impl Write for Text {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let to = self.bytes.get_mut(self.len..self.len + s.len());
        to.ok_or(fmt::Error)?.copy_from_slice(s.as_bytes());
        self.len += s.len();
        Ok(())
    }
}

/// A [`Text`], as `format!` makes one.
#[macro_export]
macro_rules! text {
    ($($arg:tt)*) => { $crate::devices::guest::Text::new(format_args!($($arg)*)) };
}
