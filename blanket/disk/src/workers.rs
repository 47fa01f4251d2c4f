//! A queue whose requests are carried out by threads of its own, one call at a time each.

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use crate::event::Event;
use crate::{Completion, Failure, Queue, Request};

/// Threads of one queue. More only wait for the same medium.
const THREADS: u32 = 4;

/// Bytes of a thread's stack. Rust's own default is a huge page on some hosts, at its first
/// touch.
const STACK: usize = 512 << 10;

/// Carries out requests, and waits while the medium works.
pub(crate) trait Engine: Send + Sync {
    /// Says at once what cannot be carried out.
    fn check(&self, request: &Request) -> Result<(), Failure>;

    /// Carries out one request. `scratch` is memory that the thread keeps between calls.
    fn run(&self, request: &Request, scratch: &mut Vec<u8>) -> Result<(), Failure>;
}

struct Work {
    waiting: VecDeque<Request>,
    closing: bool,
}

struct Shared {
    engine: Arc<dyn Engine>,
    work: Mutex<Work>,
    wake: Condvar,
    done: Mutex<Vec<Completion>>,
    event: Event,
}

/// See the module.
pub(crate) struct WorkerQueue {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    in_flight: usize,
}

impl WorkerQueue {
    pub(crate) fn new(engine: Arc<dyn Engine>, depth: u32) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            engine,
            work: Mutex::new(Work {
                waiting: VecDeque::new(),
                closing: false,
            }),
            wake: Condvar::new(),
            done: Mutex::new(Vec::new()),
            event: Event::new()?,
        });
        let mut queue = Self {
            shared: Arc::clone(&shared),
            threads: Vec::new(),
            in_flight: 0,
        };
        for _ in 0..depth.clamp(1, THREADS) {
            let shared = Arc::clone(&shared);
            let thread = Builder::new()
                .name("blanket-disk".into())
                .stack_size(STACK)
                .spawn(move || shared.serve())?;
            queue.threads.push(thread);
        }
        Ok(queue)
    }
}

impl Shared {
    fn work(&self) -> MutexGuard<'_, Work> {
        // Nothing that can panic runs under this lock.
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn complete(&self, completion: Completion) {
        self.done
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(completion);
        self.event.signal();
    }

    fn serve(&self) {
        let mut scratch = Vec::new();
        loop {
            let request = {
                let mut work = self.work();
                loop {
                    if work.closing {
                        return;
                    }
                    if let Some(request) = work.waiting.pop_front() {
                        break request;
                    }
                    work = self.wake.wait(work).unwrap_or_else(PoisonError::into_inner);
                }
            };
            // A format's driver that panics on a broken image must not take the VM's other
            // disks along.
            let run = AssertUnwindSafe(|| self.engine.run(&request, &mut scratch));
            let result = catch_unwind(run).unwrap_or_else(|_| {
                tracing::error!("the driver of an image panicked");
                let broken = "the driver of the image's format gave up: the image is damaged";
                Err(Failure::Host(io::Error::other(broken)))
            });
            self.complete(request.end(result));
        }
    }
}

impl Queue for WorkerQueue {
    fn submit(&mut self, request: Request) {
        self.in_flight += 1;
        if let Err(failure) = self.shared.engine.check(&request) {
            self.shared.complete(request.end(Err(failure)));
            return;
        }
        self.shared.work().waiting.push_back(request);
        self.shared.wake.notify_one();
    }

    fn flush_submissions(&mut self) {}

    fn wait(&mut self, wake: Option<BorrowedFd<'_>>, timeout: Option<Duration>) -> bool {
        self.shared.event.wait(wake, timeout)
    }

    fn collect(&mut self, into: &mut Vec<Completion>) {
        let mut done = self
            .shared
            .done
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.in_flight -= done.len();
        into.append(&mut done);
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl Drop for WorkerQueue {
    /// Waits for what the threads are doing; requests that wait are not carried out.
    fn drop(&mut self) {
        let mut work = self.shared.work();
        work.closing = true;
        let dropped = std::mem::take(&mut work.waiting);
        drop(work);
        drop(dropped);
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A panic was caught in the thread; there is nothing more to say about it here.
            let _ = thread.join();
        }
    }
}
