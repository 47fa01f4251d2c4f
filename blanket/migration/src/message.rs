//! What the two sides say to each other around the VM itself.
//!
//! ```text
//! source: "BLANKETM"  version u32  purpose u32  lanes u32  id [u8; 16]  secret [u8; 32]
//! if it moves or tries: what the VM is made of, as a saved VM that ends there
//! destination: a verdict
//! if it moves: the VM, in which there are marks; over its lanes, if it has any
//! destination: "ALL HERE"  its clock u64 at each mark
//! afterwards words of four bytes both ways
//! ```
//!
//! Numbers are little-endian. A word is one of [`Message`], a verdict a [`Verdict`].

use std::io::{self, Read, Write};

use crate::lanes;

/// Version of this protocol.
pub const VERSION: u32 = 5;

const MAGIC: &[u8; 8] = b"BLANKETM";

/// A word of the handover.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    /// Destination: all of the VM is here and can run.
    Ready,
    /// Source: run it. The source never runs it again, unless it hears [`Self::Gone`].
    Go,
    /// Destination: it runs, or did.
    Runs,
    /// Destination: it never ran here, and will not.
    Gone,
    /// Source: it has gone on there.
    Cancel,
    /// Source: it has heard [`Self::Runs`], or [`Self::Here`] where that comes, and will not ask
    /// again.
    Known,
    /// Destination: it needs nothing more of the memory that was not given with it.
    Here,
    /// Destination: it ran, and a part of its memory is nowhere.
    Lost,
}

impl Message {
    const ALL: [Self; 8] = [
        Self::Ready,
        Self::Go,
        Self::Runs,
        Self::Gone,
        Self::Cancel,
        Self::Known,
        Self::Here,
        Self::Lost,
    ];

    const fn word(self) -> [u8; 4] {
        *match self {
            Self::Ready => b"REDY",
            Self::Go => b"GO  ",
            Self::Runs => b"RUNS",
            Self::Gone => b"GONE",
            Self::Cancel => b"BACK",
            Self::Known => b"KNOW",
            Self::Here => b"HERE",
            Self::Lost => b"LOST",
        }
    }

    /// Says it.
    ///
    /// # Errors
    /// The link's.
    pub fn write(self, mut to: impl Write) -> io::Result<()> {
        to.write_all(&self.word())?;
        to.flush()
    }

    /// Hears one.
    ///
    /// # Errors
    /// The link's; a word that is none.
    pub fn read(mut from: impl Read) -> io::Result<Self> {
        let mut word = [0; 4];
        from.read_exact(&mut word)?;
        Self::of(word)
    }

    pub(crate) fn of(word: [u8; 4]) -> io::Result<Self> {
        let known = Self::ALL.into_iter().find(|it| it.word() == word);
        known.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a word that is none"))
    }
}

/// Longest reason that is read, bytes.
const REASON: u32 = 4096;

/// What the destination makes of what a VM is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It can be had here.
    Fits {
        /// Why it must come with all of its memory; empty if a part may follow.
        whole: String,
    },
    /// It cannot, and why: text of the other host, which is shown and not trusted.
    Unfit(String),
}

impl Verdict {
    const FITS: [u8; 4] = *b"FITS";
    const UNFIT: [u8; 4] = *b"NOT ";

    /// Says it: the word, then a text's length and the text.
    ///
    /// # Errors
    /// The link's.
    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        let (word, text) = match self {
            Self::Fits { whole } => (Self::FITS, whole),
            Self::Unfit(why) => (Self::UNFIT, why),
        };
        let end = text.floor_char_boundary(REASON as usize);
        let text = &text.as_bytes()[..end];
        let length = u32::try_from(text.len()).unwrap_or(REASON);
        let mut all = word.to_vec();
        all.extend(length.to_le_bytes());
        all.extend(text);
        to.write_all(&all)?;
        to.flush()
    }

    /// Hears it.
    ///
    /// # Errors
    /// The link's; something else.
    pub fn read(mut from: impl Read) -> io::Result<Self> {
        let bad = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        let (mut word, mut length) = ([0; 4], [0; 4]);
        from.read_exact(&mut word)?;
        if ![Self::FITS, Self::UNFIT].contains(&word) {
            return Err(bad("a verdict that is none"));
        }
        from.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length);
        if length > REASON {
            return Err(bad("a reason that is too long"));
        }
        let mut text = vec![0; length as usize];
        from.read_exact(&mut text)?;
        let printable = |c: char| if c.is_control() { ' ' } else { c };
        let text = String::from_utf8_lossy(&text);
        let text = text.chars().map(printable).collect();
        Ok(match word {
            Self::FITS => Self::Fits { whole: text },
            _ => Self::Unfit(text),
        })
    }
}

/// The destination has all up to a mark. Longer than the words of the handover, so that nobody
/// takes the one for the other.
const HERE: [u8; 8] = *b"ALL HERE";

/// Says that all up to a mark is here, and that it is `now`: ns since 1970.
///
/// # Errors
/// The link's.
pub fn acknowledge(mut to: impl Write, now: u64) -> io::Result<()> {
    let mut all = HERE.to_vec();
    all.extend(now.to_le_bytes());
    to.write_all(&all)?;
    to.flush()
}

/// Waits until the other side has all up to a mark. Its clock when it said so, ns since 1970.
///
/// # Errors
/// The link's; something else.
pub fn acknowledged(mut from: impl Read) -> io::Result<u64> {
    let (mut word, mut now) = ([0; 8], [0; 8]);
    from.read_exact(&mut word)?;
    let bad = || io::Error::new(io::ErrorKind::InvalidData, "no answer to a mark");
    (word == HERE).then_some(()).ok_or_else(bad)?;
    from.read_exact(&mut now)?;
    Ok(u64::from_le_bytes(now))
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To bring a VM.
    Moves {
        /// Over so many more connections ([`crate::lanes`]), which come once it fits; over this
        /// one if 0.
        lanes: u8,
    },
    /// To ask what became of it, after it was sent.
    Asks,
    /// To learn whether it could come.
    Tries,
    /// To say that the process is gone that had the VM, and what was left of its memory: by
    /// whoever saw it end. A word is the answer.
    Mourns,
    /// To be a lane of a VM that comes. There is no answer.
    Joins {
        /// Which, from 0.
        lane: u8,
    },
}

impl Purpose {
    /// As it is written: what for, and how many lanes or which.
    const fn numbers(self) -> (u32, u8) {
        match self {
            Self::Moves { lanes } => (0, lanes),
            Self::Asks => (1, 0),
            Self::Tries => (2, 0),
            Self::Mourns => (3, 0),
            Self::Joins { lane } => (4, lane),
        }
    }

    fn of(purpose: u32, lanes: u32) -> Option<Self> {
        let lanes = u8::try_from(lanes).ok()?;
        let known = match purpose {
            0 if lanes <= lanes::MOST => Self::Moves { lanes },
            1 => Self::Asks,
            2 => Self::Tries,
            3 => Self::Mourns,
            4 if lanes < lanes::MOST => Self::Joins { lane: lanes },
            _ => return None,
        };
        // What means nothing is zero.
        (known.numbers().1 == lanes).then_some(known)
    }
}

/// Which migration it is, over as many connections as it takes.
pub type Id = [u8; 16];

/// How the source begins a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Which migration.
    pub id: Id,
    /// Proves that the source was told of the destination.
    pub secret: [u8; 32],
    /// What it is for.
    pub purpose: Purpose,
}

/// Why a connection does not begin.
#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    /// The link.
    #[error("the link broke: {0}")]
    Link(#[from] io::Error),
    /// Something else.
    #[error("what connects sends no VM")]
    Foreign,
    /// Another version's.
    #[error(
        "the source speaks version {0}, and this program version {VERSION}: use the same version on both sides"
    )]
    Version(u32),
}

impl Hello {
    /// Says it.
    ///
    /// # Errors
    /// The link's.
    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        let mut all = MAGIC.to_vec();
        all.extend(VERSION.to_le_bytes());
        let (purpose, lanes) = self.purpose.numbers();
        all.extend(purpose.to_le_bytes());
        all.extend(u32::from(lanes).to_le_bytes());
        all.extend(self.id);
        all.extend(self.secret);
        to.write_all(&all)?;
        to.flush()
    }

    /// Hears it.
    ///
    /// # Errors
    /// It is none, or another version's.
    pub fn read(mut from: impl Read) -> Result<Self, HelloError> {
        let (mut magic, mut version, mut purpose) = ([0; 8], [0; 4], [0; 4]);
        from.read_exact(&mut magic)?;
        if magic != *MAGIC {
            return Err(HelloError::Foreign);
        }
        from.read_exact(&mut version)?;
        let version = u32::from_le_bytes(version);
        if version != VERSION {
            return Err(HelloError::Version(version));
        }
        let mut lanes = [0; 4];
        from.read_exact(&mut purpose)?;
        from.read_exact(&mut lanes)?;
        let purpose = Purpose::of(u32::from_le_bytes(purpose), u32::from_le_bytes(lanes));
        let purpose = purpose.ok_or(HelloError::Foreign)?;
        let (mut id, mut secret) = ([0; 16], [0; 32]);
        from.read_exact(&mut id)?;
        from.read_exact(&mut secret)?;
        Ok(Self {
            id,
            secret,
            purpose,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_heard() {
        for message in Message::ALL {
            let mut bytes = Vec::new();
            message.write(&mut bytes).expect("written");
            assert_eq!(Message::read(&bytes[..]).expect("a word"), message);
        }
        assert!(Message::read(&b"NONE"[..]).is_err());
        for purpose in [
            Purpose::Moves { lanes: 0 },
            Purpose::Moves { lanes: lanes::MOST },
            Purpose::Asks,
            Purpose::Tries,
            Purpose::Mourns,
            Purpose::Joins { lane: 0 },
            Purpose::Joins {
                lane: lanes::MOST - 1,
            },
        ] {
            let hello = Hello {
                id: [7; 16],
                secret: [9; 32],
                purpose,
            };
            let mut bytes = Vec::new();
            hello.write(&mut bytes).expect("written");
            assert_eq!(Hello::read(&bytes[..]).expect("whole"), hello);
            for (at, byte) in [(12, 5), (16, lanes::MOST + 1), (17, 1)] {
                let mut bytes = bytes.clone();
                bytes[at] = byte;
                assert!(matches!(Hello::read(&bytes[..]), Err(HelloError::Foreign)));
            }
            bytes[8] = 1;
            assert!(matches!(
                Hello::read(&bytes[..]),
                Err(HelloError::Version(1))
            ));
            bytes[0] = 0;
            assert!(matches!(Hello::read(&bytes[..]), Err(HelloError::Foreign)));
            assert!(matches!(Hello::read(&bytes[..5]), Err(HelloError::Link(_))));
        }
    }

    #[test]
    fn marks_are_answered() {
        let mut bytes = Vec::new();
        acknowledge(&mut bytes, 77).expect("written");
        assert_eq!(acknowledged(&bytes[..]).expect("an answer"), 77);
        assert!(acknowledged(&bytes[..15]).is_err());
        bytes[0] = b'N';
        assert!(acknowledged(&bytes[..]).is_err());
    }

    #[test]
    fn verdicts_are_heard_and_bounded() {
        let long = "é".repeat(REASON as usize);
        for verdict in [
            Verdict::Fits {
                whole: String::new(),
            },
            Verdict::Fits {
                whole: "it has no userfaultfd".into(),
            },
            Verdict::Unfit("it has no disk".into()),
            Verdict::Unfit(String::new()),
        ] {
            let mut bytes = Vec::new();
            verdict.write(&mut bytes).expect("written");
            assert_eq!(Verdict::read(&bytes[..]).expect("one"), verdict);
            assert!(Verdict::read(&bytes[..bytes.len() - 1]).is_err());
        }
        let mut bytes = Vec::new();
        Verdict::Unfit(long).write(&mut bytes).expect("written");
        assert_eq!(bytes.len(), 8 + REASON as usize);
        assert!(matches!(Verdict::read(&bytes[..]), Ok(Verdict::Unfit(_))));
        bytes[4..8].copy_from_slice(&(REASON + 1).to_le_bytes());
        assert!(Verdict::read(&bytes[..]).is_err(), "too long");
        assert!(Verdict::read(&b"MAYB"[..]).is_err());
        let mut bytes = Vec::new();
        let escape = Verdict::Unfit("\u{1b}[31mred\n".into());
        escape.write(&mut bytes).expect("written");
        let heard = Verdict::read(&bytes[..]).expect("one");
        assert_eq!(heard, Verdict::Unfit(" [31mred ".into()));
    }
}
