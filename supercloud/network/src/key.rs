//! WireGuard's keys (Curve25519), written as `wg` writes them.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use x25519_dalek::StaticSecret;

use crate::error::Invalid;

/// A node's secret. It is not printed by `{:?}`, and only [`PrivateKey::to_text`] gives it away.
#[derive(Clone)]
pub struct PrivateKey(StaticSecret);

impl PrivateKey {
    /// A new one, from the kernel's random numbers.
    #[must_use]
    pub fn generate() -> Self {
        Self(StaticSecret::random())
    }

    /// The key that others are told.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey(x25519_dalek::PublicKey::from(&self.0).to_bytes())
    }

    /// For the file that keeps it, which only its owner may read.
    #[must_use]
    pub fn to_text(&self) -> String {
        STANDARD.encode(self.0.as_bytes())
    }

    pub(crate) fn to_bytes(&self) -> [u8; 32] {
        self.0.to_bytes()
    }
}

impl FromStr for PrivateKey {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        // The text is a secret, so the error does not have it.
        Ok(Self(bytes(text).ok_or(Invalid::PrivateKey)?.into()))
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey(of {})", self.public())
    }
}

/// What a node is known by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublicKey(pub [u8; 32]);

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        match bytes(text) {
            Some(key) => Ok(Self(key)),
            None => Err(Invalid::PublicKey(text.chars().take(64).collect())),
        }
    }
}

impl TryFrom<String> for PublicKey {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> String {
        key.to_string()
    }
}

fn bytes(text: &str) -> Option<[u8; 32]> {
    STANDARD.decode(text.trim()).ok()?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 7748, section 6.1: Alice's keys.
    #[test]
    fn a_public_key_is_as_the_standard_says() {
        let secret = "dwdtCnMYpX08FsFyUbJmRd9ML4frwJkqsXf7pR25LCo=";
        let key: PrivateKey = secret.parse().unwrap();
        assert_eq!(
            key.public().to_string(),
            "hSDwCYkwp1R0i33ctD73Wg2/Og0mOBr066SpjqqbTmo="
        );
        assert_eq!(key.to_text(), secret);
        assert!(!format!("{key:?}").contains(secret));
    }

    #[test]
    fn generated_keys_differ_and_are_read_again() {
        let (a, b) = (PrivateKey::generate(), PrivateKey::generate());
        assert_ne!(a.public(), b.public());
        let again: PrivateKey = a.to_text().parse().unwrap();
        assert_eq!(again.public(), a.public());
        let public: PublicKey = a.public().to_string().parse().unwrap();
        assert_eq!(public, a.public());
    }

    #[test]
    fn what_is_no_key_is_refused() {
        for text in ["", "x", "AAAA", &"A".repeat(1000)] {
            assert!(text.parse::<PublicKey>().is_err());
            assert!(text.parse::<PrivateKey>().is_err());
        }
    }
}
