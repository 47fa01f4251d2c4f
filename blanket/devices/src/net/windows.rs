//! Windows of the guest's TCP streams, for a link that cannot hold what they allow.
//!
//! passt puts as much of a stream on the way as the guest's window allows. What its socket
//! has no room for it drops, and tries again after two seconds (passt, `tcp.c`,
//! `ACK_TIMEOUT`). So the windows that the guest announces are made smaller than that room.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use super::headers::{Protocol, Sum, Transport};

/// Streams whose scales are remembered; two may share a place, and the last one counts.
const STREAMS: usize = 1 << 14;
/// A stream whose beginning was not seen.
const UNKNOWN: u8 = u8::MAX;
/// Largest scale (RFC 7323, section 2.3).
const MAX_SCALE: u8 = 14;
/// A bit of TCP's flags.
const SYN: u8 = 2;
/// Offsets in a TCP header (RFC 9293, section 3.1).
const FLAGS: usize = 13;
const WINDOW: usize = 14;
const OPTIONS: usize = 20;

/// What is known of a guest's streams.
pub(super) struct Windows {
    /// Most bytes that a stream's window may have.
    most: u32,
    /// By how many bits each stream's windows are shifted.
    scales: Box<[u8]>,
}

impl Windows {
    /// Of at most `most` bytes each.
    pub(super) fn new(most: u32) -> Self {
        Self {
            most,
            scales: vec![UNKNOWN; STREAMS].into_boxed_slice(),
        }
    }

    /// Makes the window of a packet from the guest smaller, if it is TCP and has too large a
    /// one. With `summed` its checksum is there already, and is made to fit.
    pub(super) fn limit(&mut self, head: &mut [u8], found: &Transport, summed: bool) {
        let Some(header) = head.get(found.start..found.payload) else {
            return;
        };
        if found.protocol != Protocol::Tcp {
            return;
        }
        let Some((&[high, low], flags)) = header
            .get(WINDOW..WINDOW + 2)
            .and_then(<[u8]>::first_chunk::<2>)
            .zip(header.get(FLAGS))
        else {
            return;
        };
        let mut hasher = DefaultHasher::new();
        found.addresses(head).hash(&mut hasher);
        header.get(..4).hash(&mut hasher);
        // The remainder is below STREAMS.
        let place = usize::try_from(hasher.finish() % STREAMS as u64).unwrap_or(0);
        let Some(known) = self.scales.get_mut(place) else {
            return;
        };
        let scale = if flags & SYN != 0 {
            // passt scales in any case, so that it is done if the guest asks for it. The
            // windows of these packets are not scaled.
            *known = scale(header.get(OPTIONS..).unwrap_or(&[]));
            0
        } else if *known == UNKNOWN {
            return;
        } else {
            *known
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
