//! The guest's TCP streams, for a link that is passt: what Debian 12's does not stand is kept
//! from it.
//!
//! It puts as much of a stream on the way as the guest's window allows. What its socket has no room
//! for it drops, and tries again after two seconds (passt, `tcp.c`, `ACK_TIMEOUT`). So the windows
//! that the guest announces are made smaller than that room.
//!
//! It takes all packets at once that its socket holds, and those of a stream together. If the first
//! of them begins or ends the stream, it counts those that are left wrongly, below zero, and does
//! nothing else any more (`tap.c`, `tap4_handler()`; `tcp.c`, `tcp_tap_handler()`, which answers 1 or
//! all of them). So such a packet is sent when it has taken what came before it of that stream.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use super::headers::{Protocol, Sum, Transport};

/// Streams that are remembered; two may share a place, and the last one counts.
const STREAMS: usize = 1 << 14;
/// The scale of a stream whose beginning was not seen.
const UNKNOWN: u8 = u8::MAX;
/// Largest scale (RFC 7323, section 2.3).
const MAX_SCALE: u8 = 14;
/// Bits of TCP's flags.
const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
/// Offsets in a TCP header (RFC 9293, section 3.1).
const FLAGS: usize = 13;
const WINDOW: usize = 14;
const OPTIONS: usize = 20;

/// Where a stream is, by what the guest has sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Its last packet was its first.
    Begins,
    Open,
    /// The guest has ended it.
    Ends,
}

#[derive(Clone, Copy, Debug)]
struct Stream {
    /// By how many bits its windows are shifted.
    scale: u8,
    state: State,
    /// When its last packet was sent.
    turn: u32,
}

/// A packet of a stream.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    /// The stream's place.
    place: usize,
    flags: u8,
}

/// What is known of a guest's streams.
pub(super) struct Streams {
    /// Most bytes that a stream's window may have.
    most: u32,
    /// A new one begins each time that the link was seen to have taken everything.
    turn: u32,
    known: Box<[Stream]>,
}

impl Streams {
    /// With windows of at most `most` bytes each.
    pub(super) fn new(most: u32) -> Self {
        let stream = Stream {
            scale: UNKNOWN,
            state: State::Open,
            turn: 0,
        };
        Self {
            most,
            turn: 1,
            known: vec![stream; STREAMS].into_boxed_slice(),
        }
    }

    /// Of which stream a packet is, if it is of one.
    pub(super) fn segment(head: &[u8], found: &Transport) -> Option<Segment> {
        if found.protocol != Protocol::Tcp {
            return None;
        }
        let header = head.get(found.start..found.payload)?;
        let mut hasher = DefaultHasher::new();
        found.addresses(head).hash(&mut hasher);
        header.get(..4).hash(&mut hasher);
        Some(Segment {
            // The remainder is below STREAMS.
            place: usize::try_from(hasher.finish() % STREAMS as u64).unwrap_or(0),
            flags: *header.get(FLAGS)?,
        })
    }

    /// Whether a packet has to wait until the link has taken what it was given before; `taken` asks
    /// whether it has.
    pub(super) fn waits(&mut self, segment: Segment, taken: impl FnOnce() -> bool) -> bool {
        let Some(stream) = self.known.get(segment.place) else {
            return false;
        };
        let first = segment.flags & SYN != 0;
        let last = segment.flags & RST != 0 && stream.state == State::Begins;
        let apart = first || last || stream.state == State::Ends;
        if !apart || stream.turn != self.turn {
            return false;
        }
        if taken() {
            // Nought is that of streams of which nothing was sent.
            self.turn = self.turn.wrapping_add(1).max(1);
            return false;
        }
        true
    }

    /// A packet was sent.
    pub(super) fn sent(&mut self, segment: Segment) {
        let Some(stream) = self.known.get_mut(segment.place) else {
            return;
        };
        stream.turn = self.turn;
        stream.state = match stream.state {
            _ if segment.flags & SYN != 0 => State::Begins,
            _ if segment.flags & (FIN | RST) != 0 => State::Ends,
            State::Ends => State::Ends,
            State::Begins | State::Open => State::Open,
        };
    }

    /// Makes the window of a packet from the guest smaller, if it has too large a one. With
    /// `summed` its checksum is there already, and is made to fit.
    pub(super) fn limit(
        &mut self,
        segment: Segment,
        head: &mut [u8],
        found: &Transport,
        summed: bool,
    ) {
        let Some(header) = head.get(found.start..found.payload) else {
            return;
        };
        let window = header.get(WINDOW..WINDOW + 2);
        let Some(&[high, low]) = window.and_then(<[u8]>::first_chunk::<2>) else {
            return;
        };
        let Some(stream) = self.known.get_mut(segment.place) else {
            return;
        };
        let scale = if segment.flags & SYN != 0 {
            // passt scales in any case, so that it is done if the guest asks for it. The
            // windows of these packets are not scaled.
            stream.scale = scale(header.get(OPTIONS..).unwrap_or(&[]));
            0
        } else if stream.scale == UNKNOWN {
            return;
        } else {
            stream.scale
        };
        let window = u16::from_be_bytes([high, low]);
        // Never none: that would stop the stream.
        let most = u16::try_from((self.most >> scale).max(1)).unwrap_or(u16::MAX);
        if window <= most {
            return;
        }
        let at = found.start + WINDOW;
        if let Some(place) = head.get_mut(at..at + 2) {
            place.copy_from_slice(&most.to_be_bytes());
        }
        let at = found.checksum_at();
        if summed && let Some(place) = head.get_mut(at..at + 2) {
            // RFC 1624, equation 3.
            let mut sum = Sum::default();
            for word in [!u16::from_be_bytes([place[0], place[1]]), !window, most] {
                sum.add(&word.to_be_bytes());
            }
            place.copy_from_slice(&(!sum.value()).to_be_bytes());
        }
    }
}

/// The scale in the options of a packet that begins a stream; 0 if there is none.
fn scale(mut options: &[u8]) -> u8 {
    while let [kind, rest @ ..] = options {
        options = match (kind, rest) {
            (0, _) => return 0,
            (1, rest) => rest,
            (3, [3, scale, ..]) => return (*scale).min(MAX_SCALE),
            (_, [length, ..]) => options.get(usize::from(*length).max(2)..).unwrap_or(&[]),
            (_, []) => return 0,
        };
    }
    0
}

#[cfg(test)]
mod tests;
