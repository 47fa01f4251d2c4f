//! A TCP connection to a server, with the requests that are on it.

use alloc::collections::VecDeque;
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp::{Socket, State};

use crate::{Answer, Expect, FetchError, Need, Server, Ticket, http};

/// Most requests on a connection: the one that is being answered, and one that the server may begin with at once.
pub(crate) const DEPTH: usize = 2;
/// A connection is given up if it is not there after this time (ms).
pub(crate) const CONNECT_MS: u64 = 3000;
/// ... or if less than `STALL_BYTES` of answers came in this time (ms), which doubles with each failure in
/// a row, `MOST_DOUBLED` times at most: a server that is slow is not one that is gone.
const STALL_MS: u64 = 6000;
const MOST_DOUBLED: u32 = 3;
const STALL_BYTES: usize = 16 << 10;

/// A request, up to its answer.
pub(crate) struct Job {
    pub(crate) ticket: Ticket,
    pub(crate) need: Need,
    pub(crate) what: What,
    /// How often a server did not give what was asked for.
    pub(crate) refused: u32,
    /// Not to be sent before (time of the client).
    pub(crate) not_before: u64,
}

/// What is asked for. Paths were checked.
pub(crate) enum What {
    Range { path: String, offset: u64, len: u32 },
    Get { path: String, limit: u64 },
    Put { path: String, body: Vec<u8> },
}

impl What {
    fn expect(&self) -> Expect {
        match *self {
            Self::Range { offset, len, .. } => Expect::Range { offset, len },
            Self::Get { limit, .. } => Expect::Whole { limit },
            Self::Put { .. } => Expect::Taken,
        }
    }

    /// Appends the request.
    fn write(&self, server: &Server, out: &mut Vec<u8>) {
        match self {
            Self::Range { path, offset, len } => {
                let last = offset + u64::from(*len) - 1;
                let fields = format!("Range: bytes={offset}-{last}\r\n");
                out.extend(http::request(server, "GET", path, &fields).into_bytes());
            }
            Self::Get { path, .. } => {
                out.extend(http::request(server, "GET", path, "").into_bytes());
            }
            Self::Put { path, body } => {
                let fields = format!("Content-Length: {}\r\n", body.len());
                out.extend(http::request(server, "PUT", path, &fields).into_bytes());
                out.extend_from_slice(body);
            }
        }
    }

    /// About how many bytes it moves: who has fewer is done earlier.
    fn weight(&self) -> u64 {
        match self {
            Self::Range { len, .. } => u64::from(*len),
            Self::Get { .. } => 64 << 10,
            Self::Put { body, .. } => body.len() as u64,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No connection.
    Idle,
    Connecting,
    Open,
}

/// Why a connection is of no use any more.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lost {
    /// A server may end a connection that it has answered on, or that it was not asked on.
    Ended,
    /// The server is not there, or has ended a connection on which it was asked and did not answer.
    Failed,
    /// It says nothing, or hardly anything.
    Silent,
}

pub(crate) struct Connection {
    pub(crate) handle: SocketHandle,
    /// Which of the list.
    pub(crate) server: usize,
    phase: Phase,
    /// The first one is being answered.
    jobs: VecDeque<Job>,
    /// Of how many jobs the request is in `out`, or was.
    written: usize,
    out: Vec<u8>,
    sent: usize,
    answer: Option<Answer>,
    /// How many answers came.
    answered: u64,
    /// When it last moved as it should, and how many bytes since.
    moved: u64,
    bytes: usize,
}

impl Connection {
    pub(crate) fn new(handle: SocketHandle) -> Self {
        Self {
            handle,
            server: 0,
            phase: Phase::Idle,
            jobs: VecDeque::new(),
            written: 0,
            out: Vec::new(),
            sent: 0,
            answer: None,
            answered: 0,
            moved: 0,
            bytes: 0,
        }
    }

    pub(crate) fn idle(&self) -> bool {
        self.phase == Phase::Idle
    }

    /// Whether there is a connection that nobody waits for.
    pub(crate) fn unused(&self) -> bool {
        self.phase != Phase::Idle && self.jobs.is_empty()
    }

    pub(crate) fn jobs(&self) -> usize {
        self.jobs.len()
    }

    /// About how many bytes are still to come.
    pub(crate) fn load(&self) -> u64 {
        self.jobs.iter().map(|job| job.what.weight()).sum()
    }

    /// A connection to `server` was begun.
    pub(crate) fn connecting(&mut self, server: usize, now: u64) {
        self.server = server;
        self.phase = Phase::Connecting;
        self.answered = 0;
        self.moved = now;
        self.bytes = 0;
    }

    pub(crate) fn give(&mut self, job: Job, now: u64) {
        if self.jobs.is_empty() && self.phase == Phase::Open {
            self.moved = now;
            self.bytes = 0;
        }
        self.jobs.push_back(job);
    }

    /// Ends it; what was asked for is to be asked for again.
    pub(crate) fn end(&mut self, socket: &mut Socket<'_>) -> VecDeque<Job> {
        socket.abort();
        self.phase = Phase::Idle;
        self.written = 0;
        self.out.clear();
        self.sent = 0;
        self.answer = None;
        core::mem::take(&mut self.jobs)
    }

    /// Writes and reads what can be without waiting, after this many `failures` in a row. Answers that
    /// are over go to `over`.
    pub(crate) fn step(
        &mut self,
        socket: &mut Socket<'_>,
        servers: &[Server],
        now: u64,
        failures: u32,
        over: &mut Vec<(Job, Result<Vec<u8>, FetchError>)>,
    ) -> Result<(), Lost> {
        if self.phase == Phase::Connecting {
            match socket.state() {
                State::SynSent if now.saturating_sub(self.moved) < CONNECT_MS => return Ok(()),
                State::SynSent | State::Closed => return Err(Lost::Failed),
                _ => {
                    self.phase = Phase::Open;
                    self.moved = now;
                }
            }
        }
        if self.phase == Phase::Idle {
            return Ok(());
        }
        let written = match servers.get(self.server) {
            Some(server) => self.write(socket, server).is_ok(),
            None => false,
        };
        if !written {
            return Err(self.lost());
        }
        self.read(socket, now, over)?;
        if !socket.may_recv() && !socket.can_recv() {
            return Err(self.lost());
        }
        if self.bytes >= STALL_BYTES {
            self.moved = now;
            self.bytes = 0;
        }
        let patience = STALL_MS << failures.min(MOST_DOUBLED);
        if !self.jobs.is_empty() && now.saturating_sub(self.moved) >= patience {
            return Err(Lost::Silent);
        }
        Ok(())
    }

    fn lost(&self) -> Lost {
        if self.answered == 0 && !self.jobs.is_empty() {
            Lost::Failed
        } else {
            Lost::Ended
        }
    }

    fn write(
        &mut self,
        socket: &mut Socket<'_>,
        server: &Server,
    ) -> Result<(), smoltcp::socket::tcp::SendError> {
        for job in self.jobs.iter().skip(self.written) {
            job.what.write(server, &mut self.out);
        }
        self.written = self.jobs.len();
        if self.sent < self.out.len() {
            let sent = socket.send_slice(&self.out[self.sent..])?;
            self.sent += sent;
            self.bytes += sent;
        }
        if self.sent == self.out.len() {
            self.out.clear();
            self.sent = 0;
        }
        Ok(())
    }

    /// No more than is in the socket's buffer, which nobody fills meanwhile.
    fn read(
        &mut self,
        socket: &mut Socket<'_>,
        now: u64,
        over: &mut Vec<(Job, Result<Vec<u8>, FetchError>)>,
    ) -> Result<(), Lost> {
        while socket.can_recv() {
            // Nothing was asked for, or not all of it was: this is no answer.
            let Some(job) = self.jobs.front().filter(|_| self.written > 0) else {
                return Err(self.lost());
            };
            let expect = job.what.expect();
            let answer = self.answer.get_or_insert_with(|| Answer::new(expect));
            let fed = socket.recv(|bytes| {
                let (used, outcome) = answer.feed(bytes);
                (used, (used, outcome))
            });
            let Ok((used, outcome)) = fed else {
                break;
            };
            self.bytes += used;
            let Some(outcome) = outcome else {
                continue;
            };
            self.answer = None;
            self.written -= 1;
            self.answered += 1;
            self.moved = now;
            self.bytes = 0;
            if let Some(job) = self.jobs.pop_front() {
                over.push((job, outcome.result));
            }
            if !outcome.reusable {
                return Err(Lost::Ended);
            }
        }
        Ok(())
    }
}
