//! Packets from the guest.

use std::sync::Arc;
use std::time::{Duration, Instant};

use blanket_disk::Buffer;

use super::headers::{HEAD, Sum, Transport};
use super::link::{NotSent, Port};
use super::offload::{Offloads, Undone};
use super::protocol::{self, Ask, Bad, Chain, Status, TX_SLOT};
use super::scratch::Scratch;
use super::streams::Streams;
use super::{Groups, Mac, Shared, count};
use crate::grant::{self, Mappings};
use crate::ring::{Overrun, Ring};
use crate::sync::lock;
use crate::{Guest, page};

/// Packets of one direction that are moved before the other has its turn.
pub(super) const BUDGET: usize = 64;

/// How long is waited before it is asked again whether the link has taken everything: it does not
/// tell.
const APART: Duration = Duration::from_millis(1);

/// Bytes that are summed up at a time.
const CHUNK: usize = 1024;

/// How far one direction of a queue came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// There may be more at once.
    More,
    /// There is nothing to move.
    Idle,
    /// The link takes no more now.
    Full,
    /// The guest has given no memory for more.
    Starved,
    /// The limits allow more after this time.
    Limited(Duration),
}

/// The guest broke its ring.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error(transparent)]
    Ring(#[from] Overrun),
    #[error(transparent)]
    Chain(#[from] protocol::Broken),
}

/// Why a packet gets an error for an answer.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Bad(#[from] Bad),
    #[error(transparent)]
    Grant(#[from] grant::Error),
    #[error(transparent)]
    Host(NotSent),
}

/// What became of a packet.
enum Fate {
    Answer(Status),
    Later(Progress),
}

/// The direction from the guest, of one queue.
pub(super) struct Tx {
    ring: Ring<TX_SLOT>,
    shared: Arc<Shared>,
    groups: Arc<Groups>,
    takes: Offloads,
    streams: Option<Streams>,
    /// The packet at hand; `pages` and `parts` are empty between two.
    chain: Chain,
    pages: Mappings,
    parts: Vec<Buffer>,
    /// Its first bytes, which the guest can no longer change.
    head: Scratch,
    /// The limits have counted the next packet already.
    counted: bool,
}

impl Tx {
    pub(super) fn new(
        guest: &Arc<dyn Guest>,
        ring: Ring<TX_SLOT>,
        shared: Arc<Shared>,
        groups: Arc<Groups>,
        takes: Offloads,
        room: Option<u32>,
    ) -> Self {
        Self {
            chain: Chain::new(ring.slots()),
            pages: Mappings::new(guest.grants()),
            parts: Vec::with_capacity(protocol::MAX_PIECES + 1),
            head: Scratch::new(HEAD),
            counted: false,
            ring,
            shared,
            groups,
            takes,
            streams: room.map(Streams::new),
        }
    }

    /// Sends what waits, up to a budget. Also whether the guest wants to be notified.
    pub(super) fn run(
        &mut self,
        port: &mut dyn Port,
        now: Instant,
    ) -> Result<(Progress, bool), Broken> {
        let mut progress = Progress::More;
        let mut waiting = self.ring.waiting()?;
        for _ in 0..BUDGET {
            if waiting == 0 {
                waiting = self.ring.waiting()?;
            }
            if waiting == 0 {
                progress = Progress::Idle;
                break;
            }
            let ring = &self.ring;
            let asked = self.chain.decode(waiting, |ahead| ring.peek(ahead))?;
            let status = match asked {
                Ok(Ask::Send) => match self.send(port, now) {
                    Ok(Fate::Answer(status)) => status,
                    Ok(Fate::Later(why)) => {
                        progress = why;
                        break;
                    }
                    Err(refused) => self.refuse(&refused),
                },
                Ok(Ask::Subscribe(group)) => match self.groups.add(group) {
                    true => Status::Okay,
                    false => Status::Error,
                },
                Ok(Ask::Unsubscribe(group)) => {
                    self.groups.remove(group);
                    Status::Okay
                }
                Err(bad) => self.refuse(&bad.into()),
            };
            self.counted = false;
            self.ring.take(self.chain.slots());
            waiting -= self.chain.slots();
            for response in self.chain.responses(status) {
                self.ring.respond(&response);
            }
        }
        let notify = self.ring.publish();
        if notify {
            count(&self.shared.counters.notifications, 1);
        }
        Ok((progress, notify))
    }

    /// Asks the guest to notify. Whether requests came meanwhile.
    pub(super) fn sleep(&mut self) -> Result<bool, Overrun> {
        self.ring.sleep()
    }

    fn refuse(&self, why: &Refused) -> Status {
        tracing::debug!("a packet is refused: {why}");
        count(&self.shared.counters.from_guest.errors, 1);
        Status::Error
    }

    fn send(&mut self, port: &mut dyn Port, now: Instant) -> Result<Fate, Refused> {
        let length = self.chain.length;
        if !self.counted
            && let Some(limiter) = &self.shared.from_guest
            && let Err(wait) = lock(limiter).take(now, length as u64)
        {
            return Ok(Fate::Later(Progress::Limited(wait)));
        }
        self.counted = true;
        let result = self.send_now(port, length);
        // Whatever became of it: no grant is in use when the guest hears of it.
        self.parts.clear();
        self.pages.clear();
        result
    }

    fn send_now(&mut self, port: &mut dyn Port, length: usize) -> Result<Fate, Refused> {
        for piece in &self.chain.pieces {
            self.pages.map(piece.gref, false)?;
        }
        let mut bytes = [0; HEAD];
        let head = self.gather(&mut bytes);
        let counters = &self.shared.counters.from_guest;
        if let Some(only) = self.shared.filter
            && source(head) != Some(only)
        {
            count(&counters.filtered, 1);
            return Ok(Fate::Answer(Status::Dropped));
        }
        let (csum_blank, gso) = (self.chain.csum_blank, self.chain.gso);
        let (mut undone, found) = Undone::from_guest(head, length, csum_blank, gso)?;
        let takes = self.takes;
        if gso.is_some_and(|gso| !takes.cut(gso.kind)) {
            return Err(Bad::Headers.into());
        }
        let mut segment = None;
        if let Some(streams) = &mut self.streams
            && let Some(found) = found.or_else(|| Transport::find(head, length))
        {
            segment = Streams::segment(head, &found);
            if let Some(segment) = segment {
                if streams.waits(segment, || port.has_taken_all()) {
                    return Ok(Fate::Later(Progress::Limited(APART)));
                }
                streams.limit(segment, head, &found, undone.blank.is_none());
            }
        }
        if let Some(found) = found
            && !takes.csum(found.family)
        {
            self.sum_up(head, &found);
            undone = Undone::default();
        }
        self.head.write(0, head);
        let whole = self.head.buffer(head.len());
        match self.parts.first_mut() {
            Some(first) => *first = whole,
            None => return Err(Bad::Short(0).into()),
        }
        match port.send(&undone, &self.parts) {
            Ok(()) => {
                count(&counters.packets, 1);
                count(&counters.bytes, length as u64);
                if let (Some(streams), Some(segment)) = (&mut self.streams, segment) {
                    streams.sent(segment);
                }
                Ok(Fate::Answer(Status::Okay))
            }
            Err(NotSent::Full) => Ok(Fate::Later(Progress::Full)),
            Err(NotSent::Down) => {
                count(&counters.dropped, 1);
                Ok(Fate::Answer(Status::Dropped))
            }
            Err(error) => Err(Refused::Host(error)),
        }
    }

    /// Copies the packet's first bytes into `head`, and makes parts of the others, behind
    /// one for those. The answer is what was copied.
    fn gather<'a>(&mut self, head: &'a mut [u8; HEAD]) -> &'a mut [u8] {
        let mut filled = 0;
        self.parts.push(self.head.buffer(0));
        for (piece, page) in self.chain.pieces.iter().zip(self.pages.pages()) {
            let now = piece.length.min(HEAD - filled);
            page.read(piece.offset, &mut head[filled..filled + now]);
            filled += now;
            if piece.length > now {
                let rest = page.buffer(piece.offset + now, piece.length - now);
                self.parts.push(rest);
            }
        }
        &mut head[..filled]
    }

    /// Makes the checksum of layer 4, which has the pseudo header's sum in its place.
    fn sum_up(&self, head: &mut [u8], found: &Transport) {
        let mut sum = Sum::default();
        let mut left = found.end - found.start;
        let own = head.get(found.start..).unwrap_or(&[]);
        let own = &own[..own.len().min(left)];
        sum.add(own);
        left -= own.len();
        // What of the packet is not in its copied head.
        let mut skip = head.len();
        let mut chunk = [0; CHUNK];
        for (piece, page) in self.chain.pieces.iter().zip(self.pages.pages()) {
            let gone = skip.min(piece.length);
            skip -= gone;
            let (mut at, end) = (piece.offset + gone, piece.offset + piece.length);
            while at < end && left > 0 {
                let now = (end - at).min(CHUNK).min(left);
                page.read(at, &mut chunk[..now]);
                sum.add(&chunk[..now]);
                at += now;
                left -= now;
            }
        }
        let at = found.checksum_at();
        if let Some(place) = head.get_mut(at..at + 2) {
            place.copy_from_slice(&sum.checksum().to_be_bytes());
        }
    }
}

fn source(head: &[u8]) -> Option<Mac> {
    let bytes = head.get(6..12)?;
    Some(Mac::new(bytes.try_into().ok()?))
}

const _: () = assert!(HEAD <= page::SIZE);
