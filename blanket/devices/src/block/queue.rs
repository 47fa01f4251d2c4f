//! A ring's requests on their way to the disk and back.

use std::any::Any;
use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use blanket_abi::PAGE_SIZE;
use blanket_disk::{Buffer, Completion, Failure, Operation};

use super::origins::Origins;
use super::protocol::{self, Ask, Bad, Request, SECTOR, SLOT, Segment, Segments, Status};
use super::written::Blocks;
use super::{Counters, WhenFull, count};
use crate::Guest;
use crate::grant::{self, Mapping, Mappings};
use crate::limit::Seldom;
use crate::ring::{Overrun, Ring};

/// Most pages that a queue keeps mapped for a frontend with persistent grants, beyond
/// which they are mapped for each request: 32 segments of each slot of a ring of a page.
const MOST_PERSISTENT: usize = 1056;

/// How a queue is set up.
pub(super) struct Setup {
    /// The disk, for the log.
    pub name: String,
    pub persistent: bool,
    pub read_only: bool,
    pub when_full: WhenFull,
    pub written: Arc<Blocks>,
    pub origins: Option<Arc<Origins>>,
}

/// A ring and a queue of the disk.
pub(super) struct Queue {
    guest: Arc<dyn Guest>,
    ring: Ring<SLOT>,
    // Dropped before all that keeps what it may still use.
    disk: Box<dyn blanket_disk::Queue>,
    /// What requests keep mapped.
    mapped: Arc<dyn Any + Send + Sync>,
    setup: Setup,
    counters: Arc<Counters>,
    /// Requests that the disk has, by token.
    in_flight: Vec<Option<InFlight>>,
    free: Vec<usize>,
    /// Tokens of requests that found no space.
    no_space: Vec<usize>,
    /// Pages of persistent grants.
    kept: HashMap<u32, Mapping>,
    /// What requests that are done had, for the next ones.
    spare: Vec<Memory>,
    segments: Vec<Segment>,
    done: Vec<Completion>,
    failed: bool,
    words: Seldom,
}

/// A request that the disk has, or that waits for space.
struct InFlight {
    id: u64,
    op: u8,
    operation: Operation,
    offset: u64,
    /// Bytes that are read or written.
    length: u64,
    memory: Memory,
    /// It found no space, and is not done.
    waits_for_space: bool,
    /// To be written once the flush before it is done.
    then: Option<(u64, Vec<Segment>)>,
}

/// The guest's memory that a request reads or writes.
struct Memory {
    /// Empty while the disk has the request.
    buffers: Vec<Buffer>,
    /// Keeps the guest's pages granted.
    pages: Mappings,
}

/// Why a request is answered with an error.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Bad(#[from] Bad),
    #[error(transparent)]
    Grant(#[from] grant::Error),
    #[error("the disk is read-only")]
    ReadOnly,
}

impl Queue {
    pub(super) fn new(
        guest: Arc<dyn Guest>,
        ring: Ring<SLOT>,
        disk: Box<dyn blanket_disk::Queue>,
        setup: Setup,
        counters: Arc<Counters>,
    ) -> Self {
        let slots = ring.slots() as usize;
        Self {
            mapped: Arc::clone(guest.grants().memory()) as _,
            guest,
            ring,
            disk,
            setup,
            counters,
            in_flight: (0..slots).map(|_| None).collect(),
            free: (0..slots).rev().collect(),
            no_space: Vec::new(),
            kept: HashMap::new(),
            spare: Vec::with_capacity(slots),
            segments: Vec::new(),
            done: Vec::with_capacity(slots),
            failed: false,
            words: Seldom::default(),
        }
    }

    /// Gives waiting requests to the disk, as long as `allow` allows their bytes, and no
    /// more than the ring has slots: a guest can see to it that there is always one more.
    /// The time after which it allows more, if it did not.
    pub(super) fn accept(
        &mut self,
        mut allow: impl FnMut(u64) -> Result<(), Duration>,
    ) -> Result<Option<Duration>, Overrun> {
        let mut limited = None;
        let mut waiting = self.ring.waiting()?;
        let mut turn = self.ring.slots();
        while waiting > 0 && turn > 0 && !self.is_full() {
            turn -= 1;
            let request = Request::decode(&self.ring.peek(0));
            if let Err(wait) = allow(bytes(&request)) {
                limited = Some(wait);
                break;
            }
            self.ring.take(1);
            waiting -= 1;
            let (id, op) = (request.id, request.op);
            if let Err(refused) = self.begin(request) {
                tracing::debug!("a request is refused: {refused}");
                count(&self.counters.errors, 1);
                let status = match refused {
                    Refused::Bad(bad) => bad.status(),
                    _ => Status::Error,
                };
                self.ring.respond(&Request::response(id, op, status));
            }
            if waiting == 0 {
                waiting = self.ring.waiting()?;
            }
        }
        Ok(limited)
    }

    fn begin(&mut self, request: Request) -> Result<(), Refused> {
        let (id, op) = (request.id, request.op);
        match request.ask? {
            Ask::Transfer {
                write,
                sector,
                segments,
            } => {
                let mut own = std::mem::take(&mut self.segments);
                let begun = match &segments {
                    Segments::Direct(segments) => self.transfer(id, op, write, sector, segments),
                    Segments::Indirect { count, pages } => self
                        .indirect(*count, pages, &mut own)
                        .and_then(|()| self.transfer(id, op, write, sector, &own)),
                };
                own.clear();
                self.segments = own;
                begun
            }
            Ask::Flush { sector, segments } => {
                if !segments.is_empty() && self.setup.read_only {
                    return Err(Refused::ReadOnly);
                }
                count(&self.counters.flushes, 1);
                let memory = self.memory();
                self.start(InFlight {
                    id,
                    op,
                    operation: Operation::Flush,
                    offset: 0,
                    length: 0,
                    memory,
                    waits_for_space: false,
                    then: (!segments.is_empty()).then_some((sector, segments)),
                });
                Ok(())
            }
            Ask::Discard { sector, count: n } => {
                if self.setup.read_only {
                    return Err(Refused::ReadOnly);
                }
                count(&self.counters.discards, 1);
                let memory = self.memory();
                self.start(InFlight {
                    id,
                    op,
                    operation: Operation::Discard {
                        length: in_bytes(n)?,
                    },
                    offset: in_bytes(sector)?,
                    length: 0,
                    memory,
                    waits_for_space: false,
                    then: None,
                });
                Ok(())
            }
        }
    }

    /// The segments in the pages that a request names.
    fn indirect(
        &self,
        total: usize,
        grefs: &[u32],
        segments: &mut Vec<Segment>,
    ) -> Result<(), Refused> {
        for gref in grefs {
            let count = (total - segments.len()).min(protocol::SEGMENTS_PER_PAGE);
            let page = self.guest.grants().map(*gref, false)?;
            let mut bytes = [0; crate::page::SIZE];
            let used = &mut bytes[..count * 8];
            page.page().read(0, used);
            protocol::indirect(used, count, segments)?;
        }
        Ok(())
    }

    /// Memory of no page yet.
    fn memory(&mut self) -> Memory {
        self.spare.pop().unwrap_or_else(|| Memory {
            buffers: Vec::new(),
            pages: Mappings::new(self.guest.grants()),
        })
    }

    /// Ends the use of the guest's pages.
    fn give_back(&mut self, mut memory: Memory) {
        memory.pages.clear();
        memory.buffers.clear();
        if self.spare.len() < self.in_flight.len() {
            self.spare.push(memory);
        }
    }

    fn transfer(
        &mut self,
        id: u64,
        op: u8,
        write: bool,
        sector: u64,
        segments: &[Segment],
    ) -> Result<(), Refused> {
        if write && self.setup.read_only {
            return Err(Refused::ReadOnly);
        }
        let offset = in_bytes(sector)?;
        let mut memory = self.memory();
        if let Err(error) = self.map(segments, !write, &mut memory) {
            self.give_back(memory);
            return Err(error.into());
        }
        let length = segments.iter().map(|segment| segment.length() as u64).sum();
        let operation = if write {
            count(&self.counters.writes, 1);
            count(&self.counters.written_bytes, length);
            Operation::Write
        } else {
            count(&self.counters.reads, 1);
            count(&self.counters.read_bytes, length);
            Operation::Read
        };
        self.start(InFlight {
            id,
            op,
            operation,
            offset,
            length,
            memory,
            waits_for_space: false,
            then: None,
        });
        Ok(())
    }

    /// Maps granted pages, or finds them mapped. A persistent grant is mapped for writing
    /// whatever it is used for first.
    fn map(
        &mut self,
        segments: &[Segment],
        write: bool,
        memory: &mut Memory,
    ) -> Result<(), grant::Error> {
        let Memory { buffers, pages } = memory;
        buffers.reserve(segments.len());
        for segment in segments {
            let (gref, offset, length) = (segment.gref, segment.offset(), segment.length());
            let buffer = if !self.setup.persistent {
                pages.map(gref, write)?.buffer(offset, length)
            } else if let Some(page) = self.kept.get(&gref) {
                page.page().buffer(offset, length)
            } else if self.kept.len() < MOST_PERSISTENT {
                let page = self.guest.grants().map(gref, true)?;
                let buffer = page.page().buffer(offset, length);
                self.kept.insert(gref, page);
                buffer
            } else {
                pages.map(gref, true)?.buffer(offset, length)
            };
            // Frames beside each other are beside each other here.
            match buffers.last_mut() {
                Some(last) if let Some(joined) = last.join(&buffer) => *last = joined,
                _ => buffers.push(buffer),
            }
        }
        Ok(())
    }

    /// Gives a request to the disk. There is room: the caller looked.
    fn start(&mut self, request: InFlight) {
        let Some(token) = self.free.pop() else {
            // One for each slot of the ring, and a request holds its slot.
            return;
        };
        self.in_flight[token] = Some(request);
        self.submit(token);
    }

    fn submit(&mut self, token: usize) {
        if let Some(request) = self.in_flight.get_mut(token).and_then(Option::as_mut) {
            self.disk.submit(blanket_disk::Request {
                token: token as u64,
                operation: request.operation,
                offset: request.offset,
                buffers: std::mem::take(&mut request.memory.buffers),
                memory: Arc::clone(&self.mapped),
            });
        }
    }

    /// Answers what the disk has done. Whether the guest wants to be notified.
    pub(super) fn complete(&mut self) -> bool {
        let mut done = std::mem::take(&mut self.done);
        self.disk.collect(&mut done);
        for completion in done.drain(..) {
            self.finish(completion);
        }
        self.done = done;
        let notify = self.ring.publish();
        if notify {
            count(&self.counters.notifications, 1);
        }
        notify
    }

    fn finish(&mut self, completion: Completion) {
        let Ok(token) = usize::try_from(completion.token) else {
            return;
        };
        if let Some(Some(request)) = self.in_flight.get_mut(token) {
            request.memory.buffers = completion.buffers;
        }
        if matches!(completion.result, Err(Failure::NoSpace))
            && self.setup.when_full == WhenFull::Wait
            && !self.failed
        {
            self.no_space.push(token);
            if let Some(Some(request)) = self.in_flight.get_mut(token)
                && !std::mem::replace(&mut request.waits_for_space, true)
                && self
                    .counters
                    .waiting_for_space
                    .fetch_add(1, Ordering::Relaxed)
                    == 0
            {
                let name = &self.setup.name;
                tracing::warn!("{name}: the host has no space left for its image: writes wait");
            }
            return;
        }
        let Some(request) = self.in_flight.get_mut(token).and_then(Option::take) else {
            return;
        };
        self.free.push(token);
        // Of one that failed, a part may have been.
        match request.operation {
            Operation::Write => self.setup.written.note(request.offset, request.length),
            Operation::Discard { length } => self.setup.written.note(request.offset, length),
            Operation::Read if completion.result.is_ok() => self.note_origins(&request),
            Operation::Read | Operation::Flush => {}
        }
        if request.waits_for_space
            && self
                .counters
                .waiting_for_space
                .fetch_sub(1, Ordering::Relaxed)
                == 1
        {
            tracing::warn!("{}: no write waits for space any more", self.setup.name);
        }
        let (id, op) = (request.id, request.op);
        let mut status = match &completion.result {
            Ok(()) => Status::Okay,
            Err(Failure::Unsupported) => Status::Unsupported,
            Err(failure) => {
                self.speak_of(failure);
                count(&self.counters.errors, 1);
                Status::Error
            }
        };
        if let (Status::Okay, Some((sector, segments))) = (status, &request.then) {
            match self.transfer(id, op, true, *sector, segments) {
                Ok(()) => return,
                Err(refused) => {
                    tracing::debug!("a write after a flush is refused: {refused}");
                    count(&self.counters.errors, 1);
                    status = Status::Error;
                }
            }
        }
        // Before the guest hears that it is done: it takes its grants back then.
        self.give_back(request.memory);
        self.ring.respond(&Request::response(id, op, status));
    }

    /// Remembers from where the pages were read that a request has read as a whole.
    fn note_origins(&self, request: &InFlight) {
        let Some(origins) = &self.setup.origins else {
            return;
        };
        let mut offset = request.offset;
        for buffer in &request.memory.buffers {
            if let Some((gfn, skipped, count)) = self.guest.grants().frames_in(buffer) {
                origins.note(gfn, offset.saturating_add(skipped as u64), count);
            }
            offset = offset.saturating_add(buffer.length() as u64);
        }
    }

    /// The guest asks for what fails as often as it likes, and the log is the host's.
    fn speak_of(&mut self, failure: &Failure) {
        if matches!(failure, Failure::Host(_)) && self.words.may_speak(Instant::now()) {
            tracing::warn!("a disk request fails: {failure}");
        } else {
            tracing::debug!("a disk request fails: {failure}");
        }
    }

    /// Requests that find no space fail from now on.
    pub(super) fn give_up_space(&mut self) {
        self.failed = true;
        self.try_space_again();
    }

    /// Has the disk try again what found no space.
    pub(super) fn try_space_again(&mut self) {
        for token in std::mem::take(&mut self.no_space) {
            self.submit(token);
        }
    }

    /// Whether the disk has requests, or some wait for space.
    pub(super) fn busy(&self) -> bool {
        self.free.len() < self.in_flight.len()
    }

    /// Whether no further request can be taken.
    pub(super) fn is_full(&self) -> bool {
        self.free.is_empty()
    }

    pub(super) fn waits_for_space(&self) -> bool {
        !self.no_space.is_empty()
    }

    /// Asks the guest to notify. Whether requests came meanwhile.
    pub(super) fn sleep(&mut self) -> Result<bool, Overrun> {
        self.ring.sleep()
    }

    /// Has the disk begin what it was given.
    pub(super) fn begin_submitted(&mut self) {
        self.disk.flush_submissions();
    }

    /// The same, and waits for the disk or for `wake`; see [`blanket_disk::Queue::wait`].
    pub(super) fn wait(&mut self, wake: Option<BorrowedFd<'_>>, timeout: Option<Duration>) -> bool {
        self.disk.wait(wake, timeout)
    }
}

fn in_bytes(sectors: u64) -> Result<u64, Bad> {
    sectors.checked_mul(SECTOR as u64).ok_or(Bad::Sector)
}

/// What a request costs by the limits.
fn bytes(request: &Request) -> u64 {
    match &request.ask {
        Ok(Ask::Transfer { segments, .. }) => match segments {
            Segments::Direct(segments) => segments.iter().map(|s| s.length() as u64).sum(),
            // What they name is not read yet.
            Segments::Indirect { count, .. } => *count as u64 * PAGE_SIZE,
        },
        Ok(Ask::Flush { segments, .. }) => segments.iter().map(|s| s.length() as u64).sum(),
        _ => 0,
    }
}
