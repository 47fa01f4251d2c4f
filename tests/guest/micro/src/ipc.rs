//! Pipes, sockets and context switches between two processes.

use crate::sys::{
    Bench, MB, close, fail, fork, get, map, pipe, put, socket_pair, timed, unmap, wait,
};
use std::hint::black_box;

fn echo(from: i32, to: i32) {
    while get(from) && put(to) {}
}

fn exchange(from: i32, to: i32, n: u64) {
    for _ in 0..n {
        if !put(to) || !get(from) {
            fail("exchange with the other process");
        }
    }
}

fn roundtrips(from: i32, to: i32, n: u64) -> f64 {
    exchange(from, to, 3);
    timed(|| exchange(from, to, n))
}

/// One byte to another process and back, by two pipes.
pub fn pipe_roundtrip(_: &Bench, n: u64) -> f64 {
    let (there, back) = (pipe(), pipe());
    let child = fork(|| {
        close(there.1);
        close(back.0);
        echo(there.0, back.1);
    });
    close(there.0);
    close(back.1);
    let time = roundtrips(back.0, there.1, n);
    close(there.1);
    close(back.0);
    wait(child);
    time
}

/// One byte to another process and back, by a Unix stream socket.
pub fn unix_roundtrip(_: &Bench, n: u64) -> f64 {
    let (ours, theirs) = socket_pair();
    let child = fork(|| {
        close(ours);
        echo(theirs, theirs);
    });
    close(theirs);
    let time = roundtrips(ours, ours, n);
    close(ours);
    wait(child);
    time
}

/// Memory that a process looks at between two switches.
struct Footprint {
    at: *mut u8,
    len: usize,
}

impl Footprint {
    fn new(len: usize) -> Self {
        if len == 0 {
            return Self {
                at: std::ptr::null_mut(),
                len,
            };
        }
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let at = map(len, prot, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1);
        let new = Self { at, len };
        new.fill();
        new
    }

    fn fill(&self) {
        if self.len > 0 {
            // SAFETY: the mapping is `len` bytes long.
            unsafe { libc::memset(self.at.cast(), 1, self.len) };
        }
    }

    /// One load from each cache line.
    fn look(&self) {
        let mut sum = 0_i64;
        for offset in (0..self.len).step_by(64) {
            // SAFETY: inside the mapping, aligned.
            sum += i64::from(unsafe { self.at.add(offset).cast::<i32>().read_volatile() });
        }
        if self.len > 0 {
            black_box(sum);
        }
    }
}

/// A token goes round two processes; the cost of the pipe calls, measured in
/// one process first, is taken off.
fn context_switch(n: u64, len: usize) -> f64 {
    let ours = Footprint::new(len);
    let (there, back) = (pipe(), pipe());
    let mut overhead = 0.0;
    for _ in 0..2 {
        overhead = timed(|| {
            for _ in 0..n {
                if !put(there.1) {
                    fail("write");
                }
                ours.look();
                if !get(there.0) {
                    fail("read");
                }
            }
        });
    }
    let child = fork(|| {
        let theirs = Footprint::new(len);
        close(there.1);
        close(back.0);
        while get(there.0) {
            theirs.look();
            if !put(back.1) {
                break;
            }
        }
    });
    close(there.0);
    close(back.1);
    ours.fill();
    exchange(back.0, there.1, 3);
    let time = timed(|| {
        for _ in 0..n {
            exchange(back.0, there.1, 1);
            ours.look();
        }
    });
    close(there.1);
    close(back.0);
    wait(child);
    if len > 0 {
        unmap(ours.at, len);
    }
    time / 2.0 - overhead
}

/// A switch between processes that touch nothing.
pub fn context_switch_0k(_: &Bench, n: u64) -> f64 {
    context_switch(n, 0)
}

/// A switch between processes that look at 64 KiB each.
pub fn context_switch_64k(_: &Bench, n: u64) -> f64 {
    context_switch(n, 64 << 10)
}

const CHUNK: usize = 64 << 10;

/// `n` MiB from a child to this process, 64 KiB at a time.
fn bandwidth(bench: &Bench, n: u64, (reader, writer): (i32, i32)) -> f64 {
    let child = fork(|| {
        close(reader);
        for _ in 0..n * 16 {
            // SAFETY: the buffer is longer than a chunk.
            let written = unsafe { libc::write(writer, bench.buffer_b.cast(), CHUNK) };
            if written != CHUNK as isize {
                fail("write");
            }
        }
    });
    close(writer);
    let mut total = 0_u64;
    let time = timed(|| {
        loop {
            // SAFETY: the buffer is longer than a chunk.
            let got = unsafe { libc::read(reader, bench.buffer_a.cast(), CHUNK) };
            if got <= 0 {
                break;
            }
            total += got as u64;
        }
    });
    if total != n * MB as u64 {
        fail("not everything arrived");
    }
    close(reader);
    wait(child);
    time
}

/// Bandwidth of a Unix stream socket.
pub fn unix_bandwidth(bench: &Bench, n: u64) -> f64 {
    bandwidth(bench, n, socket_pair())
}

/// Bandwidth of a pipe.
pub fn pipe_bandwidth(bench: &Bench, n: u64) -> f64 {
    bandwidth(bench, n, pipe())
}
