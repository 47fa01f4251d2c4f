//! How the rest of a VM's memory follows it: what the two sides say to each other from GO on,
//! and what each of them still has to do.
//!
//! ```text
//! destination: "MISS" length u32  set     what it does not have; first of all, on each link
//!              "WANT" page u64            needed at once
//!              "LEFT" pages u64           so many are missing still
//!              or a word of the handover
//! source:      "PAGE" length u32  run     pages, compressed
//!              "ZERO" page u64  count u32 pages that are zero
//!              or a word of the handover
//! ```
//!
//! The source sends every page of the set once, those that are wanted first, whether they are
//! asked for or not: so it always ends. Nothing that came over a link that was lost counts but
//! by the next link's set. Neither side believes the other: pages that are not below the number
//! of the VM's, or not in the set, end the link.

use std::collections::VecDeque;
use std::io::{self, Read, Write};

use crate::message::Message;
use crate::pages::Pages;

/// Pages that are sent together at most, so that one that is wanted does not wait for long.
pub const MOST: u64 = 32;

/// Pages that are sent with one that is wanted, if they are missing: those of its block. Whoever
/// needs one needs its neighbours soon, and the module fetches blocks of this size.
pub const BLOCK: u64 = 16;

/// Most bytes of a run, compressed: what does not get shorter gets little longer.
const MOST_BYTES: u32 = 2 * 4096 * 32;

/// Most bytes of a set, compressed: that of the largest VM there can be, and it is the other
/// side's memory that is spent for it.
const MOST_SET: u32 = 64 << 20;

const MISS: [u8; 4] = *b"MISS";
const WANT: [u8; 4] = *b"WANT";
const LEFT: [u8; 4] = *b"LEFT";
const PAGE: [u8; 4] = *b"PAGE";
const ZERO: [u8; 4] = *b"ZERO";

fn bad(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn word<const N: usize>(mut from: impl Read) -> io::Result<[u8; N]> {
    let mut word = [0; N];
    from.read_exact(&mut word)?;
    Ok(word)
}

/// So many bytes; those of a length that is only claimed cost nothing.
fn bytes(from: &mut impl Read, most: u32) -> io::Result<Vec<u8>> {
    let length = u32::from_le_bytes(word(&mut *from)?);
    if length > most {
        return Err(bad("more at once than there can be"));
    }
    let mut bytes = Vec::new();
    let got = from.take(length.into()).read_to_end(&mut bytes)?;
    if got != length as usize {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(bytes)
}

fn with_length(tag: [u8; 4], bytes: &[u8]) -> io::Result<Vec<u8>> {
    let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    Ok([&tag[..], &length.to_le_bytes(), bytes].concat())
}

/// What the destination says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// A word of the handover.
    Word(Message),
    /// What it does not have.
    Missing(Pages),
    /// It needs this page now.
    Want(u64),
    /// So many are missing still.
    Left(u64),
}

impl Ask {
    /// Says it, at once.
    ///
    /// # Errors
    /// The link's.
    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        let number = |tag: [u8; 4], number: u64| [&tag[..], &number.to_le_bytes()].concat();
        match self {
            Self::Word(message) => return message.write(to),
            Self::Missing(pages) => to.write_all(&with_length(MISS, &pages.pack()?)?)?,
            Self::Want(page) => to.write_all(&number(WANT, *page))?,
            Self::Left(pages) => to.write_all(&number(LEFT, *pages))?,
        }
        to.flush()
    }

    /// Hears it, of a VM with so many pages.
    ///
    /// # Errors
    /// The link's; what cannot be.
    pub fn read(mut from: impl Read, frames: u64) -> io::Result<Self> {
        let tag = word(&mut from)?;
        Ok(match tag {
            MISS => {
                let packed = bytes(&mut from, MOST_SET)?;
                let pages = Pages::unpack(&packed, frames);
                Self::Missing(pages.ok_or_else(|| bad("a set of pages that is none"))?)
            }
            WANT | LEFT => {
                let number = u64::from_le_bytes(word(&mut from)?);
                match tag {
                    WANT if number < frames => Self::Want(number),
                    LEFT if number <= frames => Self::Left(number),
                    _ => return Err(bad("a page that the VM does not have")),
                }
            }
            other => Self::Word(Message::of(other)?),
        })
    }
}

/// What the source says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// A word of the handover.
    Word(Message),
    /// Pages, as `blanket_snapshot` packs them.
    Pages(Vec<u8>),
    /// Pages that are zero.
    Zero {
        /// The first one.
        first: u64,
        /// How many, [`MOST`] at most.
        count: u32,
    },
}

impl Piece {
    /// Says it, at once.
    ///
    /// # Errors
    /// The link's.
    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        match self {
            Self::Word(message) => return message.write(to),
            Self::Pages(packed) => to.write_all(&with_length(PAGE, packed)?)?,
            Self::Zero { first, count } => {
                let all = [&ZERO[..], &first.to_le_bytes(), &count.to_le_bytes()].concat();
                to.write_all(&all)?;
            }
        }
        to.flush()
    }

    /// Hears it. What is in the pages is not looked at.
    ///
    /// # Errors
    /// The link's; what cannot be.
    pub fn read(mut from: impl Read) -> io::Result<Self> {
        let tag = word(&mut from)?;
        Ok(match tag {
            PAGE => Self::Pages(bytes(&mut from, MOST_BYTES)?),
            ZERO => {
                let first = u64::from_le_bytes(word(&mut from)?);
                let count = u32::from_le_bytes(word(&mut from)?);
                if count == 0 || u64::from(count) > MOST {
                    return Err(bad("more pages at once than there can be"));
                }
                Self::Zero { first, count }
            }
            other => Self::Word(Message::of(other)?),
        })
    }
}

/// What the source has to send.
#[derive(Debug)]
pub struct Serving {
    /// Pages that were not given with the VM.
    kept: Pages,
    /// Those of them that the destination does not have, and that were not sent over this link.
    left: Pages,
    /// Runs that are wanted.
    wanted: VecDeque<(u64, u64)>,
    /// Pages in them, so that each is there once.
    queued: Pages,
    /// Where to go on with the others.
    at: u64,
}

impl Serving {
    /// Nothing yet, of these.
    #[must_use]
    pub fn new(kept: Pages) -> Self {
        let none = Pages::none(kept.frames());
        Self {
            left: none.clone(),
            queued: none,
            wanted: VecDeque::new(),
            at: 0,
            kept,
        }
    }

    /// How many pages the VM has.
    #[must_use]
    pub fn frames(&self) -> u64 {
        self.kept.frames()
    }

    /// How many are to be sent.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left.count()
    }

    /// The link is lost: nothing is sent before the destination has said over the next one what
    /// it misses.
    pub fn loses(&mut self) {
        self.queued = Pages::none(self.frames());
        self.left = self.queued.clone();
        self.wanted.clear();
        self.at = 0;
    }

    /// The destination says what it misses: on each link first of all, and once.
    ///
    /// # Errors
    /// It has some of that already.
    pub fn misses(&mut self, pages: Pages) -> io::Result<()> {
        if !pages.is_in(&self.kept) {
            return Err(bad("a page that was given with the VM"));
        }
        self.loses();
        self.left = pages;
        Ok(())
    }

    /// It needs a page at once. One that was sent is on its way.
    pub fn wants(&mut self, page: u64) {
        if !self.left.has(page) || self.queued.has(page) {
            return;
        }
        let block = page - page % BLOCK;
        let mut runs = Vec::new();
        let mut at = block;
        while let Some(first) = self.left.next(at).filter(|first| *first < block + BLOCK) {
            let count = self.left.run(first, block + BLOCK - first);
            runs.push((first, count));
            at = first + count;
        }
        // The run with the page itself comes first.
        runs.sort_by_key(|(first, count)| !(*first..first + count).contains(&page));
        for (first, count) in runs {
            if !self.queued.has(first) {
                (first..first + count).for_each(|page| self.queued.add(page));
                self.wanted.push_back((first, count));
            }
        }
    }

    /// What to send next: the first page and how many. It counts as sent.
    pub fn sends(&mut self) -> Option<(u64, u64)> {
        while let Some((first, count)) = self.wanted.pop_front() {
            // The others may have come to it, too.
            let end = first + count;
            let Some(first) = self.left.next(first).filter(|found| *found < end) else {
                continue;
            };
            let count = self.left.run(first, end - first);
            if first + count < end {
                self.wanted.push_front((first + count, end - first - count));
            }
            return Some(self.taken(first, count));
        }
        let first = self.left.next(self.at)?;
        let count = self.left.run(first, MOST);
        self.at = first + count;
        Some(self.taken(first, count))
    }

    fn taken(&mut self, first: u64, count: u64) -> (u64, u64) {
        (first..first + count).for_each(|page| self.left.remove(page));
        (first, count)
    }
}

/// What the destination is to do about a page that somebody needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needed {
    /// Ask for it.
    Ask,
    /// It was asked for.
    Wait,
    /// It is zero, unless it has come meanwhile.
    Zero,
}

/// What the destination does not have.
#[derive(Debug)]
pub struct Pulling {
    /// What will come, or was lost with a link.
    missing: Pages,
    /// Pages of these that the guest has given up: what comes of them is not wanted.
    given_up: Pages,
    /// Pages that were asked for over this link.
    asked: Pages,
}

impl Pulling {
    /// All of these.
    #[must_use]
    pub fn new(missing: Pages) -> Self {
        let none = Pages::none(missing.frames());
        Self {
            given_up: none.clone(),
            asked: none,
            missing,
        }
    }

    /// What is missing.
    #[must_use]
    pub fn missing(&self) -> &Pages {
        &self.missing
    }

    /// Somebody needs a page.
    pub fn needs(&mut self, page: u64) -> Needed {
        if !self.missing.has(page) || self.given_up.has(page) {
            return Needed::Zero;
        }
        if self.asked.has(page) {
            return Needed::Wait;
        }
        self.asked.add(page);
        Needed::Ask
    }

    /// Whether somebody waits for a page.
    #[must_use]
    pub fn is_asked(&self, page: u64) -> bool {
        self.asked.has(page)
    }

    /// The guest has given up a page: what is there next is zero.
    pub fn gives_up(&mut self, page: u64) {
        if self.missing.has(page) {
            self.given_up.add(page);
        }
    }

    /// There is another link: what was asked for is to be asked for again.
    #[must_use]
    pub fn asks_again(&self) -> Vec<u64> {
        self.asked.runs(1).map(|(page, _)| page).collect()
    }

    /// A run has come: whether each page of it is to be placed. They are not missing any more
    /// once this is [`Self::placed`].
    ///
    /// # Errors
    /// One of them is none that is missing.
    pub fn comes(&self, first: u64, count: u64) -> io::Result<Vec<bool>> {
        let end = first.checked_add(count);
        let end = end.filter(|end| *end <= self.missing.frames() && count <= MOST);
        let end = end.ok_or_else(|| bad("pages that the VM does not have"))?;
        if !(first..end).all(|page| self.missing.has(page)) {
            return Err(bad("a page that is here already"));
        }
        Ok((first..end).map(|page| !self.given_up.has(page)).collect())
    }

    /// A run that came is where it belongs.
    pub fn placed(&mut self, first: u64, count: u64) {
        for page in first..first.saturating_add(count) {
            self.missing.remove(page);
            self.asked.remove(page);
            self.given_up.remove(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(frames: u64, pages: impl IntoIterator<Item = u64>) -> Pages {
        let mut set = Pages::none(frames);
        pages.into_iter().for_each(|page| set.add(page));
        set
    }

    #[test]
    fn what_is_said_is_heard() {
        for ask in [
            Ask::Word(Message::Here),
            Ask::Missing(set(100, [0, 7, 99])),
            Ask::Want(99),
            Ask::Left(100),
        ] {
            let mut bytes = Vec::new();
            ask.write(&mut bytes).expect("written");
            assert_eq!(Ask::read(&bytes[..], 100).expect("whole"), ask);
            assert!(Ask::read(&bytes[..bytes.len() - 1], 100).is_err());
            if !matches!(ask, Ask::Word(_)) {
                assert!(Ask::read(&bytes[..], 35).is_err(), "beyond its end");
            }
        }
        for piece in [
            Piece::Word(Message::Known),
            Piece::Pages(vec![1, 2, 3]),
            Piece::Zero { first: 5, count: 9 },
        ] {
            let mut bytes = Vec::new();
            piece.write(&mut bytes).expect("written");
            assert_eq!(Piece::read(&bytes[..]).expect("whole"), piece);
            assert!(Piece::read(&bytes[..bytes.len() - 1]).is_err());
        }
        let long = [&PAGE[..], &u32::MAX.to_le_bytes()].concat();
        assert!(Piece::read(&long[..]).is_err());
        let none = [&ZERO[..], &[0; 12]].concat();
        assert!(Piece::read(&none[..]).is_err());
    }

    #[test]
    fn what_is_wanted_comes_first_and_with_its_block() {
        let mut serving = Serving::new(set(200, 0..150));
        assert!(serving.misses(set(200, [150])).is_err(), "it has it");
        serving
            .misses(set(200, (0..100).chain([112, 116, 117])))
            .expect("missing");
        assert_eq!(serving.sends(), Some((0, MOST)));
        serving.wants(116);
        serving.wants(117);
        serving.wants(5);
        serving.wants(u64::MAX);
        assert_eq!(serving.sends(), Some((116, 2)));
        assert_eq!(serving.sends(), Some((112, 1)));
        assert_eq!(serving.sends(), Some((32, MOST)));
        // The background comes to a part of a block that is wanted.
        serving.wants(98);
        assert_eq!(serving.sends(), Some((96, 4)));
        assert_eq!(serving.sends(), Some((64, MOST)));
        assert_eq!((serving.sends(), serving.left()), (None, 0));
    }

    #[test]
    fn what_was_given_up_is_zero_and_not_placed() {
        let mut pulling = Pulling::new(set(64, [1, 2, 3]));
        assert_eq!(pulling.needs(0), Needed::Zero);
        assert_eq!(pulling.needs(2), Needed::Ask);
        assert_eq!(pulling.needs(2), Needed::Wait);
        pulling.gives_up(3);
        pulling.gives_up(9);
        assert_eq!(pulling.needs(3), Needed::Zero);
        assert_eq!(pulling.asks_again(), [2]);
        assert_eq!(pulling.comes(1, 3).expect("missing"), [true, true, false]);
        assert!(pulling.comes(1, 4).is_err());
        assert!(pulling.comes(63, 2).is_err());
        assert!(pulling.comes(u64::MAX, 2).is_err());
        pulling.placed(1, 3);
        assert!(pulling.comes(1, 1).is_err(), "twice");
        assert_eq!(pulling.missing().count(), 0);
        assert!(pulling.asks_again().is_empty());
    }

    #[derive(Clone, Debug)]
    enum Event {
        Needs(u64),
        GivesUp(u64),
        Hears,
        Sends,
        Arrives,
        Lost,
    }

    fn event(frames: u64) -> impl Strategy<Value = Event> {
        prop_oneof![
            3 => (0..frames).prop_map(Event::Needs),
            1 => (0..frames).prop_map(Event::GivesUp),
            3 => Just(Event::Hears),
            3 => Just(Event::Sends),
            3 => Just(Event::Arrives),
            1 => Just(Event::Lost),
        ]
    }

    /// Both sides and a link that holds what is said until it is heard, or loses it.
    struct Both {
        serving: Serving,
        pulling: Pulling,
        asks: VecDeque<Ask>,
        pieces: VecDeque<(u64, u64)>,
        placed: Vec<u32>,
    }

    impl Both {
        fn connects(&mut self) {
            self.asks.clear();
            self.pieces.clear();
            self.serving.loses();
            self.asks
                .push_back(Ask::Missing(self.pulling.missing().clone()));
            let again = self.pulling.asks_again();
            self.asks.extend(again.into_iter().map(Ask::Want));
        }

        fn hears(&mut self) {
            match self.asks.pop_front() {
                Some(Ask::Missing(pages)) => self.serving.misses(pages).expect("missing"),
                Some(Ask::Want(page)) => self.serving.wants(page),
                _ => {}
            }
        }

        fn arrives(&mut self) {
            let Some((first, count)) = self.pieces.pop_front() else {
                return;
            };
            let wanted = self.pulling.comes(first, count).expect("missing");
            for (page, wanted) in (first..).zip(wanted) {
                self.placed[usize::try_from(page).expect("small")] += u32::from(wanted);
            }
            self.pulling.placed(first, count);
        }
    }

    proptest! {
        #[test]
        fn all_comes_once_over_as_many_links_as_it_takes(
            missing in prop::collection::btree_set(0u64..150, 1..150),
            events in prop::collection::vec(event(150), 0..200),
        ) {
            let missing_set = set(150, missing.iter().copied());
            let mut both = Both {
                serving: Serving::new(missing_set.clone()),
                pulling: Pulling::new(missing_set),
                asks: VecDeque::new(),
                pieces: VecDeque::new(),
                placed: vec![0; 150],
            };
            both.connects();
            let mut given_up = Vec::new();
            for event in events {
                match event {
                    Event::Needs(page) => {
                        if both.pulling.needs(page) == Needed::Ask {
                            both.asks.push_back(Ask::Want(page));
                        }
                    }
                    Event::GivesUp(page) => {
                        both.pulling.gives_up(page);
                        given_up.push(page);
                    }
                    Event::Hears => both.hears(),
                    Event::Sends => both.pieces.extend(both.serving.sends()),
                    Event::Arrives => both.arrives(),
                    Event::Lost => both.connects(),
                }
            }
            while !both.asks.is_empty() {
                both.hears();
            }
            while let Some(run) = both.serving.sends() {
                both.pieces.push_back(run);
            }
            while !both.pieces.is_empty() {
                both.arrives();
            }
            prop_assert_eq!(both.pulling.missing().count(), 0);
            for (page, times) in (0..).zip(both.placed) {
                let once = missing.contains(&page) && !given_up.contains(&page);
                prop_assert!(times <= 1 && (!once || times == 1), "page {} came {} times", page, times);
                prop_assert!(missing.contains(&page) || times == 0);
            }
        }

        #[test]
        fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = Ask::read(&bytes[..], 1000);
            let _ = Piece::read(&bytes[..]);
        }
    }
}
