//! The token by which a node joins: `SECRET.CA@ADDRESS:PORT`.

use std::fmt;
use std::str::FromStr;

use crate::{Code, Error};

/// Bytes of the secret.
const SECRET: usize = 16;
/// Bytes of the CA certificate's sum.
const SUM: usize = 32;

/// A token in its parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinToken {
    /// What only its holder knows, hexadecimal.
    pub secret: String,
    /// SHA-256 of the CA's certificate (DER), hexadecimal.
    pub ca: String,
    /// Where the node that lets others in is reached.
    pub address: String,
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}@{}", self.secret, self.ca, self.address)
    }
}

impl FromStr for JoinToken {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || {
            Error::new(
                Code::BadRequest,
                "that is no join token",
                "give what `supercloud node token` printed, all of it",
            )
        };
        let hex = |text: &str, bytes: usize| {
            text.len() == 2 * bytes
                && text
                    .bytes()
                    .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        let (keys, address) = text.trim().split_once('@').ok_or_else(wrong)?;
        let (secret, ca) = keys.split_once('.').ok_or_else(wrong)?;
        let (host, port) = address.rsplit_once(':').ok_or_else(wrong)?;
        // An address with colons of its own is in brackets.
        let inside = host.strip_prefix('[').map(|rest| rest.strip_suffix(']'));
        let is_host = match inside {
            Some(inside) => inside.is_some(),
            None => !host.is_empty() && !host.contains(':'),
        };
        let is_port = port.parse::<u16>().is_ok_and(|port| port > 0);
        if !hex(secret, SECRET) || !hex(ca, SUM) || !is_host || !is_port || address.len() > 300 {
            return Err(wrong());
        }
        Ok(Self {
            secret: secret.into(),
            ca: ca.into(),
            address: address.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_token_is_read_as_it_is_written() {
        let token = JoinToken {
            secret: "0f".repeat(SECRET),
            ca: "a1".repeat(SUM),
            address: "[2001:db8::1]:7700".into(),
        };
        assert_eq!(token.to_string().parse::<JoinToken>(), Ok(token.clone()));
        let text = token.to_string();
        for end in 0..text.len() {
            // A port that lost its last digits is still one.
            if end < text.len() - 3 {
                assert!(text[..end].parse::<JoinToken>().is_err(), "{end}");
            }
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_is_no_panic(text in ".{0,200}") {
            let _ = text.parse::<JoinToken>();
        }
    }
}
