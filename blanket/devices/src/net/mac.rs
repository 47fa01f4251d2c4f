//! Addresses of network interfaces.

use std::fmt;
use std::io;
use std::str::FromStr;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac([u8; 6]);

/// A text that is no address that an interface can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no address of a network interface: {why}; write it as 00:16:3e:12:34:56")]
pub struct BadMac {
    text: String,
    why: &'static str,
}

/// The vendor's part of addresses that Xen's users make (`00:16:3e` is XenSource's).
const XEN: [u8; 3] = [0x00, 0x16, 0x3e];

impl Mac {
    /// Everybody.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// From its bytes.
    #[must_use]
    pub const fn new(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// Its bytes.
    #[must_use]
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// A packet by which a network learns where this address is, and nothing else: a reverse
    /// ARP request (RFC 903) that asks for its own protocol address, to all.
    #[must_use]
    pub fn announcement(&self) -> [u8; 60] {
        let mut packet = [0; 60];
        packet[..6].fill(0xff);
        packet[6..12].copy_from_slice(&self.0);
        // Ethernet, IPv4, lengths of addresses, request reverse.
        packet[12..22].copy_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        packet[22..28].copy_from_slice(&self.0);
        packet[32..38].copy_from_slice(&self.0);
        packet
    }

    /// A new one in the range that Xen's users make theirs in: 2^24 of them, so among 500
    /// on one network two are the same in fewer than one of a hundred cases.
    ///
    /// # Errors
    /// The host gives no random bytes.
    pub fn random() -> io::Result<Self> {
        let mut own = [0; 3];
        let got = rustix::rand::getrandom(&mut own, rustix::rand::GetRandomFlags::empty())?;
        if got != own.len() {
            return Err(io::Error::other("too few random bytes"));
        }
        let ([a, b, c], [d, e, f]) = (XEN, own);
        Ok(Self([a, b, c, d, e, f]))
    }

    /// Whether it names a group, or everybody.
    #[must_use]
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = BadMac;

    /// An address that an interface can have: of no group, and not all zero.
    fn from_str(text: &str) -> Result<Self, BadMac> {
        let bad = |why| BadMac {
            text: text.to_owned(),
            why,
        };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            *byte = parts
                .next()
                .filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))
                .and_then(|part| u8::from_str_radix(part, 16).ok())
                .ok_or_else(|| bad("it needs six bytes of two digits"))?;
        }
        if parts.next().is_some() {
            return Err(bad("it has more than six bytes"));
        }
        let mac = Self(bytes);
        if mac.is_multicast() {
            return Err(bad("it is of a group (its first byte is odd)"));
        }
        if bytes == [0; 6] {
            return Err(bad("it is all zero"));
        }
        Ok(mac)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_back() {
        let mac: Mac = "00:16:3E:0a:ff:01".parse().expect("an address");
        assert_eq!(mac.bytes(), [0, 0x16, 0x3e, 10, 255, 1]);
        assert_eq!(mac.to_string(), "00:16:3e:0a:ff:01");
        for (bad, why) in [
            ("", "six"),
            ("00:16:3e:0a:ff", "six"),
            ("00:16:3e:0a:ff:1", "two digits"),
            ("00:16:3e:0a:ff:+1", "two digits"),
            ("00:16:3e:0a:ff:01:02", "more"),
            ("01:16:3e:0a:ff:01", "group"),
            ("00:00:00:00:00:00", "zero"),
        ] {
            let error = bad.parse::<Mac>().expect_err("no address").to_string();
            assert!(
                error.contains(why) && error.contains("write it as"),
                "{error}"
            );
        }
    }

    #[test]
    fn made_ones_are_xens_and_differ() {
        let made: Vec<Mac> = (0..8).map(|_| Mac::random().expect("bytes")).collect();
        assert!(
            made.iter()
                .all(|mac| mac.bytes()[..3] == XEN && !mac.is_multicast())
        );
        assert!(made.iter().any(|mac| *mac != made[0]));
    }
}
