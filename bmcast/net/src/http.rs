//! HTTP/1.1 (RFC 9110, RFC 9112), as much of it as fetching ranges needs.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use crate::Server;

/// Longest head of an answer, in bytes.
const HEAD: usize = 8 << 10;
/// Most fields of a head.
const FIELDS: usize = 64;
/// Most bytes of a body that does not matter which are read so that the connection can be used again.
const UNWANTED: u64 = 64 << 10;
/// Most interim answers (1xx) before an answer.
const INTERIM: u32 = 4;

/// Why an answer is not what was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// The server refuses, or answers something else.
    #[error("the server answers with status {0}")]
    Status(u16),
    /// The server does not say that this is the range that was asked for.
    #[error("the server answers with another range than was asked for")]
    Range,
    /// The body is not as long as the range, or its length is not said.
    #[error(
        "the server answers with a body of another length than was asked for, or of none that it names"
    )]
    Length,
    /// The body is longer than the caller wants.
    #[error("the file is {length} bytes long, more than the {limit} that are taken")]
    TooLong {
        /// What the server says.
        length: u64,
        /// What the caller has said.
        limit: u64,
    },
    /// Chunked or compressed, which is not taken: servers of images know the length.
    #[error("the server answers in a transfer or content coding, which is not taken")]
    Coding,
    /// No HTTP, or a head without end.
    #[error("the server's answer is not HTTP")]
    Malformed,
    /// There is no memory for it.
    #[error("no memory for {0} bytes")]
    Memory(u64),
}

/// What an answer has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// A range, 206.
    Range {
        /// Its first byte.
        offset: u64,
        /// How many, not 0.
        len: u32,
    },
    /// A whole file of at most `limit` bytes, 200.
    Whole {
        /// Bytes.
        limit: u64,
    },
    /// That something was taken, 2xx; the body does not matter.
    Taken,
}

/// An answer that has come whole, or as much of it as will be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The body, or what is wrong.
    pub result: Result<Vec<u8>, FetchError>,
    /// Whether the next answer follows on the same connection.
    pub reusable: bool,
}

enum State {
    Head {
        interim: u32,
    },
    Body {
        left: u64,
        /// Set if the body is not wanted.
        wrong: Option<FetchError>,
        reusable: bool,
    },
    Over,
}

/// Reads an answer from its bytes, in whatever pieces they come.
pub struct Answer {
    expect: Expect,
    state: State,
    head: Vec<u8>,
    body: Vec<u8>,
}

impl Answer {
    /// One that is to come.
    pub fn new(expect: Expect) -> Self {
        Self {
            expect,
            state: State::Head { interim: 0 },
            head: Vec::new(),
            body: Vec::new(),
        }
    }

    /// Takes from `input`: how many bytes of it were this answer's, and the answer if it is over. What
    /// is behind them is the next answer's.
    pub fn feed(&mut self, input: &[u8]) -> (usize, Option<Outcome>) {
        let mut used = 0;
        // A head, a body, and interim heads before them.
        for _ in 0..=INTERIM + 2 {
            let rest = &input[used..];
            let outcome = match &mut self.state {
                State::Head { .. } => {
                    if rest.is_empty() {
                        break;
                    }
                    let (taken, outcome) = self.feed_head(rest);
                    used += taken;
                    outcome
                }
                State::Body {
                    left,
                    wrong,
                    reusable,
                } => {
                    let taken = rest.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    if wrong.is_none() && !matches!(self.expect, Expect::Taken) {
                        // There is room: `begin` has seen to it.
                        self.body.extend_from_slice(&rest[..taken]);
                    }
                    used += taken;
                    *left -= taken as u64;
                    if *left > 0 {
                        // What is wrong is told at once, and not after a body that may never come.
                        let Some(wrong) = *wrong else { break };
                        self.state = State::Over;
                        return (used, Some(broken(wrong)));
                    }
                    let result = wrong.map_or_else(|| Ok(core::mem::take(&mut self.body)), Err);
                    Some(Outcome {
                        result,
                        reusable: *reusable,
                    })
                }
                State::Over => break,
            };
            if let Some(outcome) = outcome {
                self.state = State::Over;
                return (used, Some(outcome));
            }
        }
        (used, None)
    }

    fn feed_head(&mut self, input: &[u8]) -> (usize, Option<Outcome>) {
        let before = self.head.len();
        let taken = input.len().min(HEAD - before);
        self.head.extend_from_slice(&input[..taken]);
        // The end may have begun in what came before.
        let from = before.saturating_sub(3);
        let end = self.head[from..].windows(4).position(|w| w == b"\r\n\r\n");
        let Some(end) = end.map(|at| from + at + 4) else {
            if self.head.len() < HEAD {
                return (taken, None);
            }
            return (taken, Some(broken(FetchError::Malformed)));
        };
        self.head.truncate(end);
        let outcome = match Head::parse(&self.head) {
            Ok(head) => self.begin(&head),
            Err(error) => Some(broken(error)),
        };
        self.head.clear();
        (end - before, outcome)
    }

    /// A head is there.
    fn begin(&mut self, head: &Head) -> Option<Outcome> {
        if let (State::Head { interim }, 100..=199) = (&mut self.state, head.status) {
            *interim += 1;
            // 101 would be another protocol, which nobody asked for.
            let fine = *interim <= INTERIM && head.status != 101;
            return (!fine).then(|| broken(FetchError::Malformed));
        }
        if head.coded {
            return Some(broken(FetchError::Coding));
        }
        // These have no body whatever their fields say (RFC 9112, section 6.3).
        let length = match head.status {
            204 | 304 => Some(0),
            _ => head.length,
        };
        let wrong = self.judge(head, length).err();
        let (Some(left), keep) = (length, head.keep) else {
            // A body up to the end of the connection: it is not read.
            let result = wrong.map_or_else(|| Ok(Vec::new()), Err);
            return Some(Outcome {
                result,
                reusable: false,
            });
        };
        if wrong.is_none() {
            match self.expect {
                Expect::Taken if left > UNWANTED => {
                    return Some(Outcome {
                        result: Ok(Vec::new()),
                        reusable: false,
                    });
                }
                Expect::Taken => {}
                // No longer than the caller has said, as `judge` has seen.
                _ => {
                    let room = usize::try_from(left).unwrap_or(usize::MAX);
                    if self.body.try_reserve_exact(room).is_err() {
                        return Some(broken(FetchError::Memory(left)));
                    }
                }
            }
        }
        self.state = State::Body {
            left,
            wrong,
            reusable: keep,
        };
        None
    }

    /// Whether the head is that of what was asked for.
    fn judge(&self, head: &Head, length: Option<u64>) -> Result<(), FetchError> {
        match (self.expect, head.status) {
            (Expect::Range { offset, len }, 206) => {
                let last = offset.saturating_add(u64::from(len)).saturating_sub(1);
                if head.range != Some((offset, last)) {
                    return Err(FetchError::Range);
                }
                if length != Some(u64::from(len)) {
                    return Err(FetchError::Length);
                }
                Ok(())
            }
            (Expect::Whole { limit }, 200) => {
                let length = length.ok_or(FetchError::Length)?;
                if length > limit {
                    return Err(FetchError::TooLong { length, limit });
                }
                Ok(())
            }
            (Expect::Taken, 200..=299) => Ok(()),
            (_, status) => Err(FetchError::Status(status)),
        }
    }
}

/// An answer that nothing can follow.
fn broken(error: FetchError) -> Outcome {
    Outcome {
        result: Err(error),
        reusable: false,
    }
}

/// What matters of a head.
struct Head {
    status: u16,
    length: Option<u64>,
    /// First and last byte.
    range: Option<(u64, u64)>,
    coded: bool,
    keep: bool,
}

impl Head {
    fn parse(bytes: &[u8]) -> Result<Self, FetchError> {
        let mut fields = [httparse::EMPTY_HEADER; FIELDS];
        let mut response = httparse::Response::new(&mut fields);
        match response.parse(bytes) {
            Ok(httparse::Status::Complete(_)) => {}
            _ => return Err(FetchError::Malformed),
        }
        let mut head = Self {
            status: response.code.ok_or(FetchError::Malformed)?,
            length: None,
            range: None,
            coded: false,
            // HTTP/1.0 closes.
            keep: response.version == Some(1),
        };
        for field in response.headers.iter() {
            let value = field.value.trim_ascii();
            if field.name.eq_ignore_ascii_case("content-length") {
                let length = number(value).ok_or(FetchError::Malformed)?;
                if head.length.is_some_and(|other| other != length) {
                    return Err(FetchError::Malformed);
                }
                head.length = Some(length);
            } else if field.name.eq_ignore_ascii_case("content-range") {
                let range = range(value).ok_or(FetchError::Range)?;
                if head.range.is_some_and(|other| other != range) {
                    return Err(FetchError::Range);
                }
                head.range = Some(range);
            } else if field.name.eq_ignore_ascii_case("transfer-encoding") {
                head.coded = true;
            } else if field.name.eq_ignore_ascii_case("content-encoding") {
                head.coded |= !value.eq_ignore_ascii_case(b"identity");
            } else if field.name.eq_ignore_ascii_case("connection") {
                let mut options = value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
                if options.any(|option| option.eq_ignore_ascii_case(b"close")) {
                    head.keep = false;
                }
            }
        }
        Ok(head)
    }
}

/// Digits and nothing else.
fn number(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    core::str::from_utf8(digits).ok()?.parse().ok()
}

/// First and last byte of `bytes FIRST-LAST/LENGTH` (RFC 9110, section 14.4).
fn range(value: &[u8]) -> Option<(u64, u64)> {
    let value = core::str::from_utf8(value).ok()?;
    let (unit, rest) = value.split_once(' ')?;
    let (range, length) = rest.trim_start().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let (first, last) = (number(first.as_bytes())?, number(last.as_bytes())?);
    let fits = length == "*" || number(length.as_bytes())? > last;
    (unit.eq_ignore_ascii_case("bytes") && first <= last && fits).then_some((first, last))
}

/// A request's head. `path` was checked.
pub(crate) fn request(server: &Server, method: &str, path: &str, fields: &str) -> String {
    format!(
        "{method} {} HTTP/1.1\r\nHost: {}\r\nUser-Agent: bmcast/{}\r\nAccept-Encoding: identity\r\n{fields}\r\n",
        server.path(path),
        server.host,
        env!("CARGO_PKG_VERSION"),
    )
}
