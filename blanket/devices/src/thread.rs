//! Threads of a VM's process.

/// Bytes of a thread's stack. Rust's own default is 2 MiB, which is a huge page: on a
/// host that gives those unasked, a stack that happens to be aligned is one at its first
/// touch, and a VM costs 2 MiB more than its neighbour.
const STACK: usize = 512 << 10;

/// A thread to be, with a name (15 bytes of it are shown, `prctl(2)`) and a small stack.
pub fn named(name: impl Into<String>) -> std::thread::Builder {
    std::thread::Builder::new()
        .name(name.into())
        .stack_size(STACK)
}
