//! The guest's console: from its ring to a terminal, a pty, a file, sockets, and
//! a history; and back.
//!
//! vCPU threads only move bytes between the ring and bounded queues, and never
//! wait. One thread moves bytes between the queues and the outside. If it fell behind,
//! the ring would fill up and the guest wait, as with a real line; so it waits for no
//! reader, and who reads too slowly misses something.

mod behind;
mod history;
mod io;
mod terminal;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};

use blanket_abi::xen::io::console as page;
use rustix::event::{EventfdFlags, eventfd};

use crate::builder::{CONSOLE_PORT, Domain};
use crate::hypervisor::Machine;
use crate::ring::{Place, Ring};
use crate::sync::lock;
use crate::vm::{Backend, EarlyConsole};

pub use history::History;
pub use io::{IoThread, Outlet, Sink, SinkError};
pub use terminal::{RawMode, restore_terminal};

/// Output that waits for the outside, bytes.
const OUTPUT_MAX: usize = 64 << 10;
/// Input that waits for the guest, bytes.
const INPUT_MAX: usize = 4 << 10;

/// A console that outlives the VMs (one after each reboot) that write to it.
#[derive(Debug)]
pub struct Console {
    state: Mutex<State>,
    /// Wakes the thread that serves the outside.
    wake: OwnedFd,
}

#[derive(Default)]
struct State {
    link: Option<Link>,
    output: VecDeque<u8>,
    input: VecDeque<u8>,
    history: History,
    /// Clients that the outside thread has not taken over yet.
    clients: Vec<OwnedFd>,
    closed: bool,
    dropped: u64,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} bytes to go out, {} to go in",
            self.output.len(),
            self.input.len()
        )
    }
}

/// The ring of the VM that runs now.
struct Link {
    machine: Arc<dyn Machine>,
    from_guest: Ring,
    to_guest: Ring,
    broken: bool,
    /// Whether a guest that breaks its ring was reported; once is enough.
    reported: bool,
}

impl Console {
    /// A console without a VM.
    ///
    /// # Errors
    /// The host has no descriptor left.
    pub fn new() -> std::io::Result<Arc<Self>> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Arc::new(Self {
            state: Mutex::default(),
            wake,
        }))
    }

    /// Connects the ring of a VM that is about to start or to go on, with our indices in
    /// it: of what comes from the guest, and of what goes to it.
    pub fn connect(
        &self,
        domain: &Domain,
        machine: Arc<dyn Machine>,
        [from_guest, to_guest]: [u32; 2],
    ) {
        let ring = |data, size, producer, consumer, index| {
            let place = Place {
                data,
                size,
                producer,
                consumer,
            };
            Ring::new(Arc::clone(&domain.memory), domain.console, place, index)
        };
        let link = Link {
            machine,
            from_guest: ring(
                page::OUT,
                page::OUT_SIZE,
                page::OUT_PROD,
                page::OUT_CONS,
                from_guest,
            ),
            to_guest: ring(
                page::IN,
                page::IN_SIZE,
                page::IN_PROD,
                page::IN_CONS,
                to_guest,
            ),
            broken: false,
            reported: false,
        };
        lock(&self.state).link = Some(link);
    }

    /// Does `work` with our indices in the ring, which stay as they are meanwhile.
    pub(crate) fn standing_still<T>(&self, work: impl FnOnce([u32; 2]) -> T) -> T {
        let state = lock(&self.state);
        let link = state.link.as_ref();
        work(link.map_or([0; 2], |link| {
            [link.from_guest.index(), link.to_guest.index()]
        }))
    }

    /// Takes what a VM has still written, and forgets its ring.
    pub fn disconnect(&self) {
        let mut state = lock(&self.state);
        // The ring holds less than the queue, which may grow once more here: the
        // last words of a guest are the most wanted ones.
        state.pump(usize::MAX, false);
        state.link = None;
        if state.dropped > 0 {
            tracing::warn!(bytes = state.dropped, "early console output was lost");
            state.dropped = 0;
        }
        drop(state);
        self.wake();
    }

    /// What was written lately.
    #[must_use]
    pub fn history(&self) -> Vec<u8> {
        lock(&self.state).history.bytes()
    }

    /// Adds a client that gets the history, then all output, and may type.
    pub fn attach(&self, client: OwnedFd) {
        lock(&self.state).clients.push(client);
        self.wake();
    }

    /// Types for the guest. Returns how much was taken; the rest must be offered
    /// again when the guest has read.
    pub fn type_in(&self, bytes: &[u8]) -> usize {
        let mut state = lock(&self.state);
        let count = bytes.len().min(INPUT_MAX.saturating_sub(state.input.len()));
        state.input.extend(&bytes[..count]);
        state.pump(OUTPUT_MAX, true);
        count
    }

    /// Ends the outside thread once everything is written.
    pub fn close(&self) {
        lock(&self.state).closed = true;
        self.wake();
    }

    fn wake(&self) {
        // Fails only if the counter is full, and then it is awake.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl State {
    /// Moves bytes between the ring and the queues; tells the guest if any moved.
    fn pump(&mut self, limit: usize, signal: bool) {
        let Some(link) = &mut self.link else { return };
        let mut moved = false;
        while self.output.len() < limit && !link.broken {
            match link.from_guest.consume(limit - self.output.len()) {
                Ok(bytes) if bytes.is_empty() => break,
                Ok(bytes) => {
                    self.history.add(&bytes);
                    self.output.extend(bytes);
                    moved = true;
                }
                Err(error) => {
                    // What the guest meant is lost, what it writes from now on is not.
                    if !std::mem::replace(&mut link.reported, true) {
                        tracing::warn!(%error, "the guest broke its console ring");
                    }

                    link.broken = matches!(error, crate::ring::RingError::Memory(_));
                    break;
                }
            }
        }
        if !self.input.is_empty() {
            match link.to_guest.produce(self.input.make_contiguous()) {
                Ok(0) => {}
                Ok(count) => {
                    self.input.drain(..count);
                    moved = true;
                }
                Err(error) => {
                    tracing::debug!(%error, "the guest's console input is lost");
                    self.input.clear();
                }
            }
        }
        if moved
            && signal
            && let Err(error) = link.machine.raise(CONSOLE_PORT)
        {
            tracing::warn!(%error, "cannot signal the console ring");
        }
    }
}

impl Backend for Console {
    fn notified(&self) {
        lock(&self.state).pump(OUTPUT_MAX, true);
        // Also when no output came: input that was taken makes room for more.
        self.wake();
    }
}

impl EarlyConsole for Console {
    fn write(&self, bytes: &[u8]) {
        let mut state = lock(&self.state);
        // A hypercall cannot be made to wait for the outside, so a guest that
        // writes faster than it is read loses the excess here.
        let room = (4 * OUTPUT_MAX).saturating_sub(state.output.len());
        let kept = &bytes[..bytes.len().min(room)];
        state.dropped += (bytes.len() - kept.len()) as u64;
        state.history.add(bytes);
        state.output.extend(kept);
        drop(state);
        self.wake();
    }
}

#[cfg(test)]
mod tests;
