//! Which life of a VM it is: a number that no other start has, by which a guest can see
//! that what it holds for unique (random state, names, tickets) may exist twice.
//!
//! It is what Microsoft's "Virtual Machine Generation ID" is: it stays the same over a
//! reboot of the guest, which begins nothing twice.

use std::fmt;
use std::io;
use std::num::ParseIntError;
use std::str::FromStr;

use crate::entropy;

/// 128 random bits. As text, two decimal numbers of 64 bits with a colon between, lower
/// half first: Xen's form (`docs/misc/xenstore-paths.pandoc`, `~/platform/generation-id`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generation([u64; 2]);

impl Generation {
    /// One that there was not before.
    ///
    /// # Errors
    /// The host gave no random bytes.
    pub fn fresh() -> io::Result<Self> {
        let number = u128::from_ne_bytes(entropy::bytes()?);
        let (low, high) = (number & u128::from(u64::MAX), number >> 64);
        Ok(Self(
            [low, high].map(|half| u64::try_from(half).unwrap_or_default()),
        ))
    }
}

impl FromStr for Generation {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<Self, ParseIntError> {
        let (low, high) = text.split_once(':').unwrap_or((text, ""));
        Ok(Self([low.parse()?, high.parse()?]))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.0[0], self.0[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_numbers_and_never_the_same() {
        let [one, two] = [(); 2].map(|()| Generation::fresh().expect("random bytes"));
        assert_ne!(one, two);
        assert_eq!(one.to_string().parse(), Ok(one));
        for bad in ["", "1", "1:", ":1", "1:x"] {
            assert!(bad.parse::<Generation>().is_err(), "{bad}");
        }
        let text = one.to_string();
        let (low, high) = text.split_once(':').expect("two");
        assert_eq!((low.parse(), high.parse()), (Ok(one.0[0]), Ok(one.0[1])));
        // By far the most have both halves.
        assert!(one.0[0] != 0 && one.0[1] != 0);
    }
}
