//! One stream of bytes over several links at once.
//!
//! A provider often allows less to one connection than to several, and what one link's TLS
//! takes of a CPU is taken by one thread. So the VM can be sent over lanes: the stream is cut
//! into segments, which go over the lanes in turn, each enciphered and deciphered by a thread
//! of its own. The order is kept, so that nothing above knows of it.
//!
//! ```text
//! segment: length u32 (little-endian, 1 to 65536), so many bytes
//! ```
//!
//! What both sides say to each other beside the stream goes over the first link, which is no
//! lane: it is the one that a migration stands or falls with.

use std::io::{self, ErrorKind, Read, Write};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crate::link::{Cutter, Link, PATIENCE};

/// Most lanes of a migration.
pub const MOST: u8 = 8;

/// Most bytes of a segment: a slow link is to have some of each lane within its patience.
const SEGMENT: usize = 64 << 10;

/// Segments that wait for a lane, or come before their turn.
const AHEAD: usize = 4;

/// Hangs up when it goes (and not before, whoever drops the link): whoever waits at the other end, or in a thread here, must not wait on.
#[derive(Debug)]
struct Cut(Vec<Cutter>);

impl Cut {
    fn of(links: &[Link]) -> io::Result<Self> {
        let cutters = links.iter().map(Link::cutter);
        cutters.collect::<io::Result<_>>().map(Self)
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        self.0.iter().for_each(Cutter::cut);
    }
}

// ---- the source ----

/// The end that is written to.
pub struct Spread {
    // Before the cutters: what was written is sent.
    lanes: Vec<Sends>,
    next: usize,
    cut: Cut,
}

/// Lanes over which all was sent. To be kept until the other side says that it has it: a link that
/// is hung up takes with it what is still under way.
#[derive(Debug)]
pub struct Sent {
    _cut: Cut,
}

/// A lane and the thread that sends over it.
struct Sends {
    /// None once nothing more is to come.
    segments: Option<SyncSender<Vec<u8>>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Spread {
    /// Over these links, in this order.
    ///
    /// # Errors
    /// The host has no descriptor or thread left.
    pub fn over(links: Vec<Link>) -> io::Result<Self> {
        let cut = Cut::of(&links)?;
        let lanes = links.into_iter().map(Sends::over);
        Ok(Self {
            lanes: lanes.collect::<io::Result<_>>()?,
            next: 0,
            cut,
        })
    }

    /// Waits until all that was written is in the host's hands.
    ///
    /// # Errors
    /// A lane is lost.
    pub fn finish(mut self) -> io::Result<Sent> {
        // All of them go on meanwhile.
        self.lanes.iter_mut().for_each(|lane| lane.segments = None);
        self.lanes.iter_mut().try_for_each(Sends::end)?;
        Ok(Sent { _cut: self.cut })
    }
}

impl Sends {
    fn over(mut link: impl Write + Send + 'static) -> io::Result<Self> {
        let (segments, wanted) = sync_channel::<Vec<u8>>(AHEAD);
        let sends = move || {
            for segment in wanted {
                let length = u32::try_from(segment.len()).map_err(io::Error::other)?;
                link.write_all(&length.to_le_bytes())?;
                link.write_all(&segment)?;
                link.flush()?;
            }
            Ok(())
        };
        Ok(Self {
            segments: Some(segments),
            thread: Some(Builder::new().name("lane".into()).spawn(sends)?),
        })
    }

    fn send(&mut self, segment: Vec<u8>) -> io::Result<()> {
        let taken = self.segments.as_ref().map(|it| it.send(segment));
        match taken {
            Some(Ok(())) => Ok(()),
            // The thread has ended: it says why.
            _ => self.end().and(Err(ErrorKind::BrokenPipe.into())),
        }
    }

    fn end(&mut self) -> io::Result<()> {
        self.segments = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(sent)) => sent,
            Some(Err(_)) => Err(io::Error::other("a lane's thread has panicked")),
            None => Ok(()),
        }
    }
}

impl Write for Spread {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let segment = &from[..from.len().min(SEGMENT)];
        if segment.is_empty() {
            return Ok(0);
        }
        let lane = self.lanes.get_mut(self.next).ok_or(ErrorKind::BrokenPipe)?;
        lane.send(segment.to_vec())?;
        self.next = (self.next + 1) % self.lanes.len();
        Ok(segment.len())
    }

    /// Nothing is held back here; what the other side has, it says itself.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

// ---- the destination ----

/// The end that is read from. What comes behind the stream is nobody's: it is dropped before.
pub struct Gathered {
    lanes: Vec<Receiver<io::Result<Vec<u8>>>>,
    next: usize,
    now: io::Cursor<Vec<u8>>,
    _cut: Cut,
}

impl Gathered {
    /// Of these links, in this order.
    ///
    /// # Errors
    /// The host has no descriptor or thread left.
    pub fn of(links: Vec<Link>) -> io::Result<Self> {
        let cut = Cut::of(&links)?;
        Self::from(links, cut)
    }

    fn from(links: Vec<impl Read + Send + 'static>, cut: Cut) -> io::Result<Self> {
        let heard = Heard::now();
        let lanes = links.into_iter().map(|link| hears(link, heard.clone()));
        Ok(Self {
            lanes: lanes.collect::<io::Result<_>>()?,
            next: 0,
            now: io::Cursor::default(),
            _cut: cut,
        })
    }

    /// Of any bytes, for checks of what must hold.
    ///
    /// # Errors
    /// As [`Self::of`].
    #[cfg(any(test, feature = "testing"))]
    pub fn of_bytes(lanes: Vec<Vec<u8>>) -> io::Result<Self> {
        let lanes = lanes.into_iter().map(io::Cursor::new);
        Self::from(lanes.collect(), Cut(Vec::new()))
    }
}

impl Read for Gathered {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.now.read(into)?;
            if count > 0 || into.is_empty() {
                return Ok(count);
            }
            let lane = self.lanes.get(self.next).ok_or(ErrorKind::UnexpectedEof)?;
            // Its thread has ended after an error that was told already.
            let segment = lane.recv().map_err(|_| ErrorKind::UnexpectedEof)?;
            self.now = io::Cursor::new(segment?);
            self.next = (self.next + 1) % self.lanes.len();
        }
    }
}

/// When anything was heard last, over any lane: one may have to wait long for its turn.
#[derive(Clone)]
struct Heard(Arc<Mutex<Instant>>);

impl Heard {
    fn now() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    fn silent_for(&self) -> Duration {
        let last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.elapsed()
    }

    /// Fills `into`, however long it takes, as long as something is heard.
    fn read_exact(&self, from: &mut impl Read, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            match from.read(into) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    self.note();
                    into = &mut into[count..];
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
                        && self.silent_for() < PATIENCE => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// A thread that reads a lane ahead.
fn hears(
    mut link: impl Read + Send + 'static,
    heard: Heard,
) -> io::Result<Receiver<io::Result<Vec<u8>>>> {
    let (says, segments) = sync_channel(AHEAD);
    let mut segment = move || {
        let mut length = [0; 4];
        heard.read_exact(&mut link, &mut length)?;
        let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
        if length == 0 || length > SEGMENT {
            return Err(ErrorKind::InvalidData.into());
        }
        let mut bytes = vec![0; length];
        heard.read_exact(&mut link, &mut bytes)?;
        Ok(bytes)
    };
    let reads = move || {
        loop {
            let segment = segment();
            let ends = segment.is_err();
            if says.send(segment).is_err() || ends {
                return;
            }
        }
    };
    Builder::new().name("lane".into()).spawn(reads)?;
    Ok(segments)
}

impl std::fmt::Debug for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Spread")
    }
}

impl std::fmt::Debug for Gathered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gathered")
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use proptest::prelude::*;

    use super::*;
    use crate::link::Server;

    /// Both ends of so many links.
    fn links(count: u8) -> (Vec<Link>, Vec<Link>) {
        let server = Server::new().expect("made");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let at = listener.local_addr().expect("an address");
        let pair = |_| {
            std::thread::scope(|s| {
                let there = s.spawn(|| server.answer(listener.accept().expect("a connection").0));
                let socket = TcpStream::connect(at).expect("connected");
                let here = Link::to(socket, server.token()).expect("the right one");
                (here, there.join().expect("no panic").expect("TLS"))
            })
        };
        (0..count).map(pair).unzip()
    }

    /// Bytes of which each is told from those around it.
    fn bytes(count: u32) -> Vec<u8> {
        let byte = |at: u32| at.wrapping_mul(2_654_435_761).to_le_bytes()[3];
        (0..count).map(byte).collect()
    }

    #[test]
    fn what_is_spread_is_gathered_in_its_order() {
        for count in [1, 3, MOST] {
            let (here, there) = links(count);
            let sent = bytes(3_000_000);
            let wanted = sent.clone();
            let source = std::thread::spawn(move || {
                let mut spread = Spread::over(here).expect("threads");
                for part in sent.chunks(200_001) {
                    spread.write_all(part).expect("written");
                    spread.flush().expect("flushed");
                }
                spread.finish().expect("sent")
            });
            let mut gathered = Gathered::of(there).expect("threads");
            let mut come = vec![0; wanted.len()];
            gathered.read_exact(&mut come).expect("all of it");
            assert!(come == wanted, "{count} lanes");
            drop(source.join().expect("no panic"));
            assert!(gathered.read(&mut [0]).is_err(), "nothing more comes");
        }
    }

    #[test]
    fn one_lost_lane_loses_the_stream() {
        let (here, mut there) = links(3);
        let lost = there.pop().expect("three");
        lost.cutter().expect("a descriptor").cut();
        let (more, _) = links(1);
        there.extend(more);
        let mut spread = Spread::over(here).expect("threads");
        let mut gathered = Gathered::of(there).expect("threads");
        let read = std::thread::spawn(move || {
            let mut all = Vec::new();
            gathered.read_to_end(&mut all).map(|_| all)
        });
        let sent = bytes(1 << 20);
        let written = (0..100).try_for_each(|_| spread.write_all(&sent));
        assert!(written.is_err(), "the source finds it lost");
        drop(spread);
        assert!(read.join().expect("no panic").is_err(), "so does the other");
    }

    #[test]
    fn whoever_drops_an_end_ends_the_other_one() {
        let (here, there) = links(2);
        drop(Gathered::of(there).expect("threads"));
        let mut spread = Spread::over(here).expect("threads");
        let sent = bytes(1 << 20);
        let written = (0..100).try_for_each(|_| spread.write_all(&sent));
        assert!(written.is_err());

        let (here, there) = links(2);
        drop(Spread::over(here).expect("threads"));
        let mut gathered = Gathered::of(there).expect("threads");
        assert!(gathered.read(&mut [0]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes(lanes in prop::collection::vec(
            prop::collection::vec(any::<u8>(), 0..60), 0..5)) {
            let most: usize = lanes.iter().map(Vec::len).sum();
            let mut gathered = Gathered::of_bytes(lanes).expect("threads");
            let mut all = Vec::new();
            // There is no end but a lost lane.
            prop_assert!(gathered.read_to_end(&mut all).is_err());
            prop_assert!(all.len() <= most);
        }

        #[test]
        fn segments_come_in_turn(parts in prop::collection::vec(
            prop::collection::vec(any::<u8>(), 1..40), 1..12), count in 1usize..5) {
            let mut lanes = vec![Vec::new(); count];
            for (part, lane) in parts.iter().zip((0..count).cycle()) {
                let length = u32::try_from(part.len()).expect("short");
                lanes[lane].extend(length.to_le_bytes());
                lanes[lane].extend(part);
            }
            let wanted = parts.concat();
            let mut come = vec![0; wanted.len()];
            let mut gathered = Gathered::of_bytes(lanes).expect("threads");
            gathered.read_exact(&mut come).expect("all of it");
            prop_assert_eq!(come, wanted);
        }
    }
}
