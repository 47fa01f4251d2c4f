//! What the two sides say to each other around the VM itself.
//!
//! ```text
//! source: "BLANKETM"  version u32  again u32  id [u8; 16]  secret [u8; 32]
//! then, if `again` is 0, the VM; afterwards words of four bytes both ways
//! ```
//!
//! Numbers are little-endian. A word is one of [`Message`].

use std::io::{self, Read, Write};

/// Version of this protocol.
pub const VERSION: u32 = 1;

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
    /// Source: it has heard [`Self::Runs`], and will not ask again.
    Known,
}

impl Message {
    const ALL: [Self; 6] = [
        Self::Ready,
        Self::Go,
        Self::Runs,
        Self::Gone,
        Self::Cancel,
        Self::Known,
    ];

    const fn word(self) -> [u8; 4] {
        *match self {
            Self::Ready => b"REDY",
            Self::Go => b"GO  ",
            Self::Runs => b"RUNS",
            Self::Gone => b"GONE",
            Self::Cancel => b"BACK",
            Self::Known => b"KNOW",
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
        let known = Self::ALL.into_iter().find(|it| it.word() == word);
        known.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a word that is none"))
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
    /// It asks what became of the VM, which it has sent before.
    pub again: bool,
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
        all.extend(u32::from(self.again).to_le_bytes());
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
        let (mut magic, mut version, mut again) = ([0; 8], [0; 4], [0; 4]);
        from.read_exact(&mut magic)?;
        if magic != *MAGIC {
            return Err(HelloError::Foreign);
        }
        from.read_exact(&mut version)?;
        let version = u32::from_le_bytes(version);
        if version != VERSION {
            return Err(HelloError::Version(version));
        }
        from.read_exact(&mut again)?;
        let again = match u32::from_le_bytes(again) {
            0 => false,
            1 => true,
            _ => return Err(HelloError::Foreign),
        };
        let (mut id, mut secret) = ([0; 16], [0; 32]);
        from.read_exact(&mut id)?;
        from.read_exact(&mut secret)?;
        Ok(Self { id, secret, again })
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
        for again in [false, true] {
            let hello = Hello {
                id: [7; 16],
                secret: [9; 32],
                again,
            };
            let mut bytes = Vec::new();
            hello.write(&mut bytes).expect("written");
            assert_eq!(Hello::read(&bytes[..]).expect("whole"), hello);
            bytes[8] = 2;
            assert!(matches!(
                Hello::read(&bytes[..]),
                Err(HelloError::Version(2))
            ));
            bytes[0] = 0;
            assert!(matches!(Hello::read(&bytes[..]), Err(HelloError::Foreign)));
            assert!(matches!(Hello::read(&bytes[..5]), Err(HelloError::Link(_))));
        }
    }
}
