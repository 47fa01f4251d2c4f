//! One connection to the server: requests one behind the other, answers in their order.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;

use crate::client::{FetchError, Ticket};
use crate::response::{self, Head, MOST_HEAD};

/// Requests on a connection at once.
pub const DEPTH: usize = 4;

/// Something that is asked of the server.
pub struct Request {
    /// By which the caller knows it.
    pub ticket: Ticket,
    /// What is wanted.
    pub what: What,
}

/// What is wanted of the server.
pub enum What {
    /// A range of the image.
    Range {
        /// First byte.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// A file beside it.
    Get {
        /// Its name.
        name: String,
        /// Most bytes of it.
        most: usize,
    },
    /// To tell it something.
    Put {
        /// Where.
        name: String,
        /// JSON.
        body: Vec<u8>,
    },
}

impl Request {
    /// What goes to the server at `path`.
    fn write(&self, host: &str, path: &str, out: &mut Vec<u8>) {
        let text = match &self.what {
            What::Range { offset, length } => {
                let last = offset + u64::from(*length) - 1;
                alloc::format!(
                    "GET {path}/image HTTP/1.1\r\nhost: {host}\r\nrange: bytes={offset}-{last}\r\n\r\n"
                )
            }
            What::Get { name, .. } => {
                alloc::format!("GET {path}/{name} HTTP/1.1\r\nhost: {host}\r\n\r\n")
            }
            What::Put { name, body } => alloc::format!(
                "PUT {path}/{name} HTTP/1.1\r\nhost: {host}\r\n\
                 content-type: application/json\r\ncontent-length: {}\r\n\r\n",
                body.len()
            ),
        };
        out.extend_from_slice(text.as_bytes());
        if let What::Put { body, .. } = &self.what {
            out.extend_from_slice(body);
        }
    }

    /// Bytes that its body may have, if the answer is one to it.
    fn accepts(&self, head: &Head) -> Result<usize, FetchError> {
        let length = usize::try_from(head.length).unwrap_or(usize::MAX);
        match &self.what {
            What::Range {
                offset,
                length: wanted,
            } => {
                if head.status != 206 {
                    return Err(FetchError::Status(head.status));
                }
                if head.range != Some(*offset) || head.length != u64::from(*wanted) {
                    return Err(FetchError::OtherRange);
                }
            }
            What::Get { most, .. } => {
                if head.status != 200 {
                    return Err(FetchError::Status(head.status));
                }
                if length > *most {
                    return Err(FetchError::TooLong(head.length));
                }
            }
            What::Put { .. } => {
                if !(200..300).contains(&head.status) {
                    return Err(FetchError::Status(head.status));
                }
                if length > MOST_HEAD {
                    return Err(FetchError::TooLong(head.length));
                }
            }
        }
        Ok(length)
    }
}

/// A connection.
pub struct Connection {
    /// Its socket.
    pub handle: SocketHandle,
    /// Asked, and not answered.
    pub requests: VecDeque<Request>,
    out: Vec<u8>,
    head: Vec<u8>,
    body: Option<(usize, Vec<u8>, bool)>,
    /// When something last went on, in milliseconds.
    pub since: u64,
}

/// How a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It goes on.
    Goes,
    /// Nothing more comes by it.
    Ended,
}

impl Connection {
    /// Without anything asked.
    pub fn new(handle: SocketHandle) -> Self {
        Self {
            handle,
            requests: VecDeque::new(),
            out: Vec::new(),
            head: Vec::new(),
            body: None,
            since: 0,
        }
    }

    /// Asks for something.
    pub fn ask(&mut self, request: Request, host: &str, path: &str) {
        request.write(host, path, &mut self.out);
        self.requests.push_back(request);
    }

    /// Forgets what has come and what was to go; what was asked is the caller's again.
    pub fn forget(&mut self) -> VecDeque<Request> {
        self.out.clear();
        self.head.clear();
        self.body = None;
        core::mem::take(&mut self.requests)
    }

    /// Sends and receives; answers go to `done`.
    pub fn turn(
        &mut self,
        socket: &mut tcp::Socket<'_>,
        now: u64,
        done: &mut VecDeque<(Ticket, Result<Vec<u8>, FetchError>)>,
    ) -> Turn {
        if !self.out.is_empty()
            && socket.can_send()
            && let Ok(sent) = socket.send_slice(&self.out)
        {
            self.out.drain(..sent);
            self.since = now;
        }
        let mut turn = Turn::Goes;
        while turn == Turn::Goes && socket.can_recv() {
            let taken = socket.recv(|bytes| {
                let (taken, next) = self.take(bytes, done);
                turn = next;
                (taken, taken)
            });
            self.since = now;
            if !matches!(taken, Ok(taken) if taken > 0) {
                break;
            }
        }
        if turn == Turn::Goes && !socket.may_recv() && socket.state() != tcp::State::SynSent {
            return Turn::Ended;
        }
        turn
    }

    /// Takes bytes that have come: how many, and whether more may.
    fn take(
        &mut self,
        bytes: &[u8],
        done: &mut VecDeque<(Ticket, Result<Vec<u8>, FetchError>)>,
    ) -> (usize, Turn) {
        if let Some((wanted, body, closes)) = &mut self.body {
            let count = bytes.len().min(*wanted - body.len());
            body.extend_from_slice(&bytes[..count]);
            if body.len() < *wanted {
                return (count, Turn::Goes);
            }
            let (body, closes) = (core::mem::take(body), *closes);
            self.body = None;
            if let Some(request) = self.requests.pop_front() {
                done.push_back((request.ticket, Ok(body)));
            }
            return (count, if closes { Turn::Ended } else { Turn::Goes });
        }
        let before = self.head.len();
        let more = bytes.len().min(MOST_HEAD - before);
        self.head.extend_from_slice(&bytes[..more]);
        let parsed = response::parse(&self.head);
        let Some(request) = self.requests.front() else {
            // An answer to nothing.
            return (bytes.len(), Turn::Ended);
        };
        let accepted = match parsed {
            Ok(None) => return (more, Turn::Goes),
            Ok(Some(head)) => request.accepts(&head).map(|length| (head, length)),
            Err(bad) => Err(FetchError::Answer(bad.0)),
        };
        match accepted {
            Ok((head, length)) => {
                self.head.clear();
                self.body = Some((length, Vec::with_capacity(length), head.closes));
                let taken = head.bytes.saturating_sub(before);
                if length == 0 {
                    let (_, turn) = self.take(&[], done);
                    return (taken, turn);
                }
                (taken, Turn::Goes)
            }
            Err(error) => {
                // What follows belongs to that answer: another connection is cheaper than to skip it.
                if let Some(request) = self.requests.pop_front() {
                    done.push_back((request.ticket, Err(error)));
                }
                (bytes.len(), Turn::Ended)
            }
        }
    }
}
