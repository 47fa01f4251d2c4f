//! A backend in small: memory, requests, and waiting for them.

// Each test program uses a part of this.
#![allow(dead_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::path::Path;
use std::process::Command;
use std::ptr::NonNull;
use std::sync::Arc;

use blanket_disk::{Buffer, Completion, Disk, Failure, Operation, Queue, Request};

pub const SECTOR: usize = 512;

/// Memory like a guest's: no reference of Rust's leads to it.
pub struct Memory {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: it is only used through raw pointers, by one side at a time.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn layout(length: usize) -> Layout {
        Layout::from_size_align(length.max(1), 4096).unwrap()
    }

    pub fn new(bytes: &[u8]) -> Arc<Self> {
        // SAFETY: the layout is not empty.
        let base = NonNull::new(unsafe { alloc_zeroed(Self::layout(bytes.len())) }).unwrap();
        // SAFETY: the allocation has as many bytes.
        unsafe { base.as_ptr().copy_from(bytes.as_ptr(), bytes.len()) };
        Arc::new(Self {
            base,
            length: bytes.len(),
        })
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length];
        // SAFETY: both have `length` bytes.
        unsafe { self.base.as_ptr().copy_to(bytes.as_mut_ptr(), self.length) };
        bytes
    }

    pub fn fill(&self, byte: u8) {
        // SAFETY: all of the allocation.
        unsafe { self.base.as_ptr().write_bytes(byte, self.length) };
    }

    /// All of it, in pieces of these many sectors, again and again.
    pub fn buffers(&self, pieces: &[usize]) -> Vec<Buffer> {
        self.buffers_from(0, pieces)
    }

    /// The same from byte `at` on.
    pub fn buffers_from(&self, mut at: usize, pieces: &[usize]) -> Vec<Buffer> {
        let mut buffers = Vec::new();
        for piece in pieces.iter().cycle() {
            if at == self.length {
                break;
            }
            let length = (piece * SECTOR).min(self.length - at);
            // SAFETY: within the allocation, which requests keep by their `memory`.
            buffers.push(unsafe { Buffer::new(self.base.add(at), length) });
            at += length;
        }
        buffers
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with the same layout.
        unsafe { dealloc(self.base.as_ptr(), Self::layout(self.length)) };
    }
}

pub fn request(
    token: u64,
    operation: Operation,
    offset: u64,
    memory: &Arc<Memory>,
    pieces: &[usize],
) -> Request {
    Request {
        token,
        operation,
        offset,
        buffers: memory.buffers(pieces),
        memory: Arc::clone(memory) as _,
    }
}

/// Waits until all that is in flight is complete.
pub fn drain(queue: &mut dyn Queue) -> Vec<Completion> {
    let mut all = Vec::new();
    while queue.in_flight() > 0 {
        queue.wait(None, None);
        queue.collect(&mut all);
    }
    all
}

pub fn one(queue: &mut dyn Queue, request: Request) -> Result<(), Failure> {
    queue.submit(request);
    let mut all = drain(queue);
    assert_eq!(all.len(), 1);
    all.pop().unwrap().result
}

pub fn read(queue: &mut dyn Queue, offset: u64, length: usize) -> Result<Vec<u8>, Failure> {
    let memory = Memory::new(&vec![0xee; length]);
    let request = request(1, Operation::Read, offset, &memory, &[3, 1]);
    one(queue, request).map(|()| memory.bytes())
}

pub fn write(queue: &mut dyn Queue, offset: u64, bytes: &[u8]) -> Result<(), Failure> {
    let memory = Memory::new(bytes);
    one(
        queue,
        request(2, Operation::Write, offset, &memory, &[2, 5]),
    )
}

pub fn simple(queue: &mut dyn Queue, operation: Operation, offset: u64) -> Result<(), Failure> {
    one(
        queue,
        request(3, operation, offset, &Memory::new(&[]), &[1]),
    )
}

/// All of a disk, through a queue.
pub fn contents(disk: &dyn Disk) -> Vec<u8> {
    let mut queue = disk.queue(4).unwrap();
    read(queue.as_mut(), 0, usize::try_from(disk.size()).unwrap()).unwrap()
}

/// Runs `qemu-img` in a directory; it is what images are compared with.
pub fn qemu_img(directory: &Path, arguments: &[&str]) -> String {
    let (verb, rest) = arguments.split_first().expect("a verb");
    // What it makes need not outlive a crash of the machine.
    let quick: &[&str] = if *verb == "convert" {
        &["-t", "unsafe"]
    } else {
        &[]
    };
    let output = Command::new("qemu-img")
        .arg(verb)
        .args(quick)
        .args(rest)
        .current_dir(directory)
        .output()
        .expect("qemu-img of the package qemu-utils: `cargo xtask setup` installs it");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "qemu-img {arguments:?}: {text}{errors}"
    );
    text
}

/// Bytes that look like data: parts repeat, parts are zero, parts cannot be packed.
pub fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let run = 1 + usize::try_from(state >> 48).unwrap() % 20_000;
        for step in 0..run as u64 {
            bytes.push(match state % 3 {
                0 => 0,
                1 => state.to_le_bytes()[1],
                _ => state.wrapping_mul(step | 1).to_le_bytes()[4],
            });
        }
    }
    bytes.truncate(length);
    bytes
}
