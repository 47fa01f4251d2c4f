//! Several requests of a file at once: Linux' native asynchronous I/O (io_submit(2)).

use std::fs::File;
use std::os::fd::AsRawFd as _;

use crate::{Result, failed};

/// `struct iocb` of `linux/aio_abi.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Block {
    data: u64,
    key: u32,
    flags_of_transfer: u32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    length: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event: u32,
}

/// `struct io_event` of `linux/aio_abi.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Event {
    data: u64,
    block: u64,
    result: i64,
    result2: i64,
}

/// `IOCB_CMD_PREAD` and `IOCB_CMD_PWRITE`.
const OPCODES: [u16; 2] = [0, 1];

/// Gives all of `offsets` to `file`, so many at once as there are `buffers`.
pub fn transfer(
    file: &File,
    write: bool,
    length: usize,
    buffers: &mut [&mut [u8]],
    offsets: &[u64],
) -> Result<()> {
    let depth = buffers.len();
    let mut context: u64 = 0;
    // SAFETY: the word is valid and zero, as io_setup(2) wants it.
    check("io_setup", unsafe {
        libc::syscall(libc::SYS_io_setup, depth, &raw mut context)
    })?;
    let mut blocks: Vec<Block> = vec![Block::default(); depth];
    let mut events = vec![Event::default(); depth];
    let mut idle: Vec<usize> = (0..depth).collect();
    let mut left = offsets.iter();
    let mut busy = 0;
    loop {
        let mut list: Vec<*mut Block> = Vec::with_capacity(depth);
        while let Some(slot) = idle.last().copied() {
            let Some(&offset) = left.next() else { break };
            idle.pop();
            let buffer = &mut buffers[slot];
            if buffer.len() < length {
                return Err("a buffer is too short".into());
            }
            blocks[slot] = Block {
                data: slot as u64,
                opcode: OPCODES[usize::from(write)],
                file: file.as_raw_fd().cast_unsigned(),
                buffer: buffer.as_mut_ptr() as u64,
                length: length as u64,
                offset: offset.cast_signed(),
                ..Block::default()
            };
            list.push(&raw mut blocks[slot]);
        }
        if !list.is_empty() {
            // SAFETY: the blocks are whole, and each names a buffer of its own that is long
            // enough and stays until its event has come.
            let taken = check("io_submit", unsafe {
                libc::syscall(libc::SYS_io_submit, context, list.len(), list.as_ptr())
            })?;
            if taken != list.len() {
                return Err(format!("io_submit took {taken} of {}", list.len()));
            }
            busy += taken;
        }
        if busy == 0 {
            break;
        }
        let none: *const libc::timespec = std::ptr::null();
        // SAFETY: there is room for as many events as is said.
        let came = check("io_getevents", unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                context,
                1,
                depth,
                events.as_mut_ptr(),
                none,
            )
        })?;
        for event in &events[..came] {
            if event.result != length as i64 {
                return Err(format!("a transfer ended with {}", event.result));
            }
            idle.push(event.data as usize);
        }
        busy -= came;
    }
    // SAFETY: no request is under way.
    check("io_destroy", unsafe {
        libc::syscall(libc::SYS_io_destroy, context)
    })?;
    Ok(())
}

fn check(what: &str, result: libc::c_long) -> Result<usize> {
    usize::try_from(result).map_err(|_| failed(what)(std::io::Error::last_os_error()))
}
