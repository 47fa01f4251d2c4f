//! A queue of a raw image through io_uring: the kernel reads and writes the guest's memory.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::types::{Fd, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue};

use super::transfer::{Transfer, cut_short};
use super::{PUNCH, Raw};
use crate::workers::Engine as _;
use crate::{Completion, Failure, Operation, Queue, Request};

/// Most requests that the kernel has at a time; what is submitted beyond waits here.
const DEEPEST: u32 = 1024;

/// The number of the poll that is no slot's.
const WAKE: u64 = u64::MAX;

struct Slot {
    request: Request,
    /// Holds what the kernel is told, so it stays until the kernel is done.
    transfer: Transfer,
}

/// See the module.
pub(super) struct UringQueue {
    // Dropped before the slots.
    ring: IoUring,
    raw: Arc<Raw>,
    /// The kernel polls the descriptor that wakes us.
    armed: bool,
    /// It does so until it is told otherwise: Linux 5.13.
    for_good: bool,
    /// It was readable, and nobody was told yet.
    woken: bool,
    /// It has to be made unreadable before it is polled again.
    to_clear: bool,
    /// Requests that the kernel has, by the number that it knows them under.
    slots: Vec<Option<Slot>>,
    free: Vec<usize>,
    backlog: VecDeque<Request>,
    done: Vec<Completion>,
    /// Kept for their memory.
    completed: Vec<cqueue::Entry>,
    spare: Vec<Transfer>,
    in_flight: usize,
}

impl UringQueue {
    pub(super) fn new(raw: Arc<Raw>, depth: u32) -> io::Result<Self> {
        let entries = depth.clamp(1, DEEPEST).next_power_of_two();
        let ring = IoUring::builder().dontfork().build(entries)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
            opcode::PollAdd::CODE,
        ];
        // To wait no longer than for some time: Linux 5.11.
        let timed = ring.params().is_feature_ext_arg();
        if !timed || !needed.iter().all(|&code| probe.is_supported(code)) {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "the kernel's io_uring is too old",
            ));
        }
        let slots = entries as usize;
        Ok(Self {
            ring,
            raw,
            armed: false,
            for_good: true,
            woken: false,
            to_clear: false,
            slots: (0..slots).map(|_| None).collect(),
            free: (0..slots).rev().collect(),
            backlog: VecDeque::new(),
            done: Vec::new(),
            completed: Vec::new(),
            spare: Vec::new(),
            in_flight: 0,
        })
    }

    /// Puts a request into a slot and into the ring.
    fn start(&mut self, request: Request) {
        let Some(index) = self.free.pop() else {
            self.backlog.push_back(request);
            return;
        };
        let mut transfer = self.spare.pop().unwrap_or_default();
        transfer.begin(&request, self.raw.direct.is_some());
        let nothing = match request.operation {
            Operation::Read | Operation::Write => transfer.rest().is_none(),
            Operation::Discard { length } => length == 0,
            Operation::Flush => false,
        };
        if nothing {
            self.free.push(index);
            self.finish(request, Ok(()));
            return;
        }
        self.slots[index] = Some(Slot { request, transfer });
        self.push(index);
    }

    /// Puts what is left of a slot's request into the ring.
    fn push(&mut self, index: usize) {
        let Some(slot) = &self.slots[index] else {
            return;
        };
        let entry = entry(&self.raw, slot).user_data(index as u64);
        loop {
            // SAFETY: the memory that the entry names is kept by the slot until the kernel has
            // completed it, and by `drop` beyond that.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            if pushed.is_ok() {
                return;
            }
            // There are no more slots than entries, so room comes as soon as the kernel takes
            // what is there.
            if let Err(error) = self.ring.submit()
                && !again(&error)
            {
                tracing::error!(%error, "the kernel does not take requests");
                if let Some(slot) = self.slots[index].take() {
                    self.free.push(index);
                    self.finish(slot.request, Err(Failure::Host(error)));
                }
                return;
            }
        }
    }

    fn finish(&mut self, request: Request, result: Result<(), Failure>) {
        self.done.push(request.end(result));
    }

    /// Has the kernel poll what wakes us: each time that it is written to, or once. What is
    /// there already counts as well.
    fn arm(&mut self, wake: BorrowedFd<'_>) {
        // linux/poll.h: POLLIN.
        let poll = opcode::PollAdd::new(Fd(wake.as_raw_fd()), libc::POLLIN as u32);
        let poll = poll.multi(self.for_good);
        let entry = poll.build().user_data(WAKE);
        // SAFETY: the entry names no memory.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_ok() {
            self.armed = true;
        } else {
            // The ring is full of requests: look again when the kernel has them.
            self.woken = true;
            self.to_clear = true;
        }
    }

    /// Takes what the kernel has completed, and gives it what is left.
    fn reap(&mut self) {
        let entries = self.ring.completion();
        if entries.is_empty() && self.backlog.is_empty() {
            return;
        }
        let mut completed = std::mem::take(&mut self.completed);
        completed.extend(entries);
        for entry in completed.drain(..) {
            let (number, result) = (entry.user_data(), entry.result());
            if number == WAKE {
                self.armed = cqueue::more(entry.flags());
                self.woken = true;
                self.to_clear |= !self.armed;
                if result == -libc::EINVAL {
                    // An older kernel.
                    self.for_good = false;
                }
                continue;
            }
            let index = usize::try_from(number).unwrap_or(usize::MAX);
            let Some(Some(slot)) = self.slots.get_mut(index) else {
                tracing::error!(index, "the kernel completed what it was not given");
                continue;
            };
            let operation = slot.request.operation;
            let result = match usize::try_from(result) {
                Ok(moved) if matches!(operation, Operation::Read | Operation::Write) => {
                    if moved == 0 {
                        Err(cut_short(operation))
                    } else {
                        slot.transfer.advance(moved);
                        if slot.transfer.rest().is_some() {
                            self.push(index);
                            continue;
                        }
                        slot.transfer.end(&slot.request);
                        Ok(())
                    }
                }
                Ok(_) => Ok(()),
                Err(_) => {
                    let error = io::Error::from_raw_os_error(-result);
                    // Cancelled: the thread that submitted it has ended.
                    if again(&error) || error.raw_os_error() == Some(libc::ECANCELED) {
                        self.push(index);
                        continue;
                    }
                    Err(error)
                }
            };
            if let Some(slot) = self.slots[index].take() {
                self.free.push(index);
                let result = result.map_err(|error| self.raw.failure(operation, error));
                self.spare.push(slot.transfer);
                self.done.push(slot.request.end(result));
            }
        }
        self.completed = completed;
        while !self.free.is_empty()
            && let Some(request) = self.backlog.pop_front()
        {
            self.start(request);
        }
    }
}

impl Queue for UringQueue {
    fn submit(&mut self, request: Request) {
        self.in_flight += 1;
        if let Err(failure) = self.raw.check(&request) {
            self.finish(request, Err(failure));
        } else {
            self.start(request);
        }
    }

    fn flush_submissions(&mut self) {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(taken) if taken > 0 => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                refused => {
                    if let Err(error) = refused
                        && !again(&error)
                    {
                        tracing::error!(%error, "the kernel does not take requests");
                    }
                    // Short of memory: it is asked again when somebody waits.
                    return;
                }
            }
        }
    }

    /// In one call of the kernel that takes what was submitted as well.
    fn wait(&mut self, wake: Option<BorrowedFd<'_>>, timeout: Option<Duration>) -> bool {
        if let Some(wake) = wake
            && !self.armed
            && !self.woken
        {
            self.arm(wake);
        }
        if self.woken || !self.done.is_empty() {
            self.flush_submissions();
        } else {
            let submitter = self.ring.submitter();
            let waited = match timeout.map(Timespec::from) {
                None => submitter.submit_and_wait(1),
                Some(time) => submitter.submit_with_args(1, &SubmitArgs::new().timespec(&time)),
            };
            if let Err(error) = waited
                && !again(&error)
                && error.raw_os_error() != Some(libc::ETIME)
            {
                tracing::error!(%error, "the kernel does not take requests");
            }
        }
        self.reap();
        self.woken = false;
        std::mem::take(&mut self.to_clear)
    }

    fn collect(&mut self, into: &mut Vec<Completion>) {
        self.reap();
        self.in_flight -= self.done.len();
        into.append(&mut self.done);
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

impl Drop for UringQueue {
    /// Waits for what the kernel has: it may write to the memory until then. Requests that the
    /// kernel has not are not carried out.
    fn drop(&mut self) {
        self.backlog.clear();
        while self.free.len() < self.slots.len() {
            if let Err(error) = self.ring.submit_and_wait(1)
                && !again(&error)
            {
                tracing::error!(%error, "the kernel does not give requests back");
                // Memory that is never given back is better than memory that the kernel
                // writes to after somebody else has got it.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            for entry in self.ring.completion() {
                let index = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
                if self.slots.get_mut(index).and_then(Option::take).is_some() {
                    self.free.push(index);
                }
            }
        }
    }
}

/// Whether the same call can work a moment later.
fn again(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)
    )
}

fn entry(raw: &Raw, slot: &Slot) -> squeue::Entry {
    let file = Fd(raw.as_fd().as_raw_fd());
    let data = Fd(raw.data().as_raw_fd());
    let request = &slot.request;
    match request.operation {
        Operation::Flush => opcode::Fsync::new(file).flags(FsyncFlags::DATASYNC).build(),
        #[allow(clippy::cast_possible_wrap)]
        Operation::Discard { length } => opcode::Fallocate::new(file, length)
            .offset(request.offset)
            .mode(PUNCH.bits() as i32)
            .build(),
        Operation::Read | Operation::Write => {
            let (iovecs, offset) = slot.transfer.rest().unwrap_or((&[], request.offset));
            #[allow(clippy::cast_possible_truncation)]
            let count = iovecs.len() as u32;
            if request.operation == Operation::Read {
                opcode::Readv::new(data, iovecs.as_ptr(), count)
                    .offset(offset)
                    .build()
            } else {
                opcode::Writev::new(data, iovecs.as_ptr(), count)
                    .offset(offset)
                    .build()
            }
        }
    }
}
