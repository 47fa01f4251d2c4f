//! A place that may be slow, or never read: a thread of its own writes there, so that
//! neither the guest nor other readers of its console wait for it.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::sync::lock;

/// Output that waits for the place, bytes. What is older than that is left out.
const MOST: usize = 1 << 20;
/// Bytes that are written at once.
const PIECE: usize = 16 << 10;

/// The queue to a slow place. Dropping it waits until everything is written.
#[derive(Debug)]
pub(super) struct Behind {
    queue: Arc<Queue>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    bytes: VecDeque<u8>,
    /// Bytes left out before those that wait.
    left_out: u64,
    /// Nothing more comes.
    end: bool,
    /// Nobody reads it any more.
    gone: bool,
}

impl Behind {
    /// Starts the thread that writes to `place`.
    ///
    /// # Errors
    /// The host gives no thread.
    pub(super) fn new(place: impl Write + Send + 'static) -> io::Result<Self> {
        let queue = Arc::new(Queue::default());
        let theirs = Arc::clone(&queue);
        let thread =
            crate::thread::named("console-out").spawn(move || write_all(&theirs, place))?;
        Ok(Self {
            queue,
            thread: Some(thread),
        })
    }

    /// Adds output; never waits.
    pub(super) fn push(&self, bytes: &[u8]) {
        let mut state = lock(&self.queue.state);
        if state.gone {
            return;
        }
        state.bytes.extend(bytes);
        let excess = state.bytes.len().saturating_sub(MOST);
        if excess > 0 {
            state.bytes.drain(..excess);
            state.left_out += excess as u64;
        }
        self.queue.changed.notify_one();
    }
}

impl Drop for Behind {
    fn drop(&mut self) {
        lock(&self.queue.state).end = true;
        self.queue.changed.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread of the console's output panicked");
        }
    }
}

fn write_all(queue: &Queue, mut place: impl Write) {
    while let Some((left_out, piece)) = next(queue) {
        let word = if left_out > 0 {
            format!(
                "\r\n[blanket: {left_out} bytes of the console are left out here: nobody read them]\r\n"
            )
        } else {
            String::new()
        };
        let written = place
            .write_all(word.as_bytes())
            .and_then(|()| place.write_all(&piece))
            .and_then(|()| place.flush());
        if let Err(error) = written {
            tracing::debug!(%error, "nobody reads the console's output any more");
            let mut state = lock(&queue.state);
            state.gone = true;
            state.bytes = VecDeque::new();
            return;
        }
    }
}

/// Waits for what is to be written next, behind how much was left out.
fn next(queue: &Queue) -> Option<(u64, Vec<u8>)> {
    let mut state = lock(&queue.state);
    while state.bytes.is_empty() {
        if state.end {
            return None;
        }
        state = queue
            .changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner);
    }
    let left_out = std::mem::take(&mut state.left_out);
    let count = state.bytes.len().min(PIECE);
    Some((left_out, state.bytes.drain(..count).collect()))
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn who_does_not_read_holds_up_nobody_and_is_told() {
        let (mut reader, place) = UnixStream::pair().expect("a pair");
        let behind = Behind::new(place).expect("a thread");
        let line = [b'x'; 1000];
        // Far more than fits anywhere, before anybody reads.
        for _ in 0..4000 {
            behind.push(&line);
        }
        behind.push(b"end");
        let thread = std::thread::spawn(move || drop(behind));
        let mut all = Vec::new();
        reader.read_to_end(&mut all).expect("to the end");
        thread.join().expect("written");
        let text = String::from_utf8(all).expect("text");
        // More than one word if the thread wrote something in between.
        let mut parts = text.split("\r\n[blanket: ");
        let mut all = parts.next().map_or(0, str::len);
        let mut last = "";
        for part in parts {
            let word = " bytes of the console are left out here: nobody read them]\r\n";
            let (count, after) = part.split_once(word).expect("a word");
            all += count.parse::<usize>().expect("a number") + after.len();
            last = after;
        }
        assert_eq!(all, 4_000_003);
        assert!(last.ends_with("xend") && last.len() >= MOST - 2 * PIECE);
    }

    #[test]
    fn who_is_gone_is_forgotten() {
        let (reader, place) = UnixStream::pair().expect("a pair");
        drop(reader);
        let behind = Behind::new(place).expect("a thread");
        while !lock(&behind.queue.state).gone {
            behind.push(b"x");
            std::thread::yield_now();
        }
        behind.push(b"x");
        assert!(lock(&behind.queue.state).bytes.is_empty());
    }
}
