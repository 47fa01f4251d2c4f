//! The headers of a packet, as far as checksums and segmentation need them.

/// Bytes from the start of a packet that are looked at: Ethernet with two VLAN tags, the
/// longest IPv4 and TCP headers, and room for extension headers of IPv6.
pub const HEAD: usize = 256;

const ETHERNET: usize = 14;
const TYPE_IPV4: u16 = 0x0800;
const TYPE_IPV6: u16 = 0x86dd;
/// Tags of VLANs (802.1Q, 802.1ad).
const TYPE_VLAN: [u16; 2] = [0x8100, 0x88a8];
const MAX_TAGS: usize = 2;
/// Most extension headers of IPv6 that are stepped over.
const MAX_EXTENSIONS: usize = 8;

/// Which IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Version 4.
    V4,
    /// Version 6.
    V6,
}

/// What layer 4 is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    fn new(number: u8) -> Option<Self> {
        match number {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            _ => None,
        }
    }

    const fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// Where the checksum is in its header.
    #[must_use]
    pub const fn checksum(self) -> usize {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }
}

/// Where layer 4 of a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transport {
    /// Of layer 3.
    pub family: Family,
    /// Of layer 4.
    pub protocol: Protocol,
    /// Where the addresses of layer 3 begin.
    addresses: usize,
    /// Where its header begins.
    pub start: usize,
    /// Where its header ends.
    pub payload: usize,
    /// Where the packet ends: what is behind is padding.
    pub end: usize,
}

impl Transport {
    /// Finds layer 4 in the first bytes of a packet of `length` bytes. `None` if it is not
    /// TCP or UDP, a fragment, or its headers are not all in `head`.
    #[must_use]
    pub fn find(head: &[u8], length: usize) -> Option<Self> {
        let mut at = ETHERNET;
        let mut kind = u16_at(head, at - 2)?;
        for _ in 0..MAX_TAGS {
            if TYPE_VLAN.contains(&kind) {
                kind = u16_at(head, at + 2)?;
                at += 4;
            }
        }
        let mut found = match kind {
            TYPE_IPV4 => ipv4(head, at)?,
            TYPE_IPV6 => ipv6(head, at, length)?,
            _ => return None,
        };
        let start = found.start;
        let header = match found.protocol {
            Protocol::Tcp => usize::from(*head.get(start + 12)? >> 4) * 4,
            Protocol::Udp => 8,
        };
        if header
            < if found.protocol == Protocol::Tcp {
                20
            } else {
                8
            }
        {
            return None;
        }
        found.payload = start + header;
        (found.payload <= head.len() && found.payload <= found.end && found.end <= length)
            .then_some(found)
    }

    /// Where its checksum is.
    #[must_use]
    pub fn checksum_at(&self) -> usize {
        self.start + self.protocol.checksum()
    }

    /// The addresses of layer 3, the source's first.
    #[must_use]
    pub fn addresses<'a>(&self, head: &'a [u8]) -> &'a [u8] {
        head.get(self.addresses..self.addresses + self.addresses_length())
            .unwrap_or(&[])
    }

    /// The sum of the pseudo header, which a blank checksum holds.
    #[must_use]
    pub fn pseudo(&self, head: &[u8]) -> u16 {
        let mut sum = Sum::default();
        sum.add(self.addresses(head));
        sum.add(&[0, self.protocol.number()]);
        // Less than 64 KiB for anything that a ring can carry.
        let length = u32::try_from(self.end - self.start).unwrap_or(u32::MAX);
        sum.add(&length.to_be_bytes());
        sum.value()
    }

    const fn addresses_length(&self) -> usize {
        match self.family {
            Family::V4 => 8,
            Family::V6 => 32,
        }
    }
}

fn ipv4(head: &[u8], at: usize) -> Option<Transport> {
    let first = *head.get(at)?;
    let header = usize::from(first & 15) * 4;
    let total = usize::from(u16_at(head, at + 2)?);
    let fragment = u16_at(head, at + 6)? & 0x3fff;
    if first >> 4 != 4 || header < 20 || total < header || fragment != 0 {
        return None;
    }
    Some(Transport {
        family: Family::V4,
        protocol: Protocol::new(*head.get(at + 9)?)?,
        addresses: at + 12,
        start: at + header,
        payload: 0,
        end: at + total,
    })
}

fn ipv6(head: &[u8], at: usize, length: usize) -> Option<Transport> {
    if *head.get(at)? >> 4 != 6 {
        return None;
    }
    let mut next = *head.get(at + 6)?;
    let mut start = at + 40;
    for _ in 0..MAX_EXTENSIONS {
        match next {
            // Hop by hop, routing, destination; a fragment has no whole layer 4.
            0 | 43 | 60 => {
                next = *head.get(start)?;
                start += 8 + usize::from(*head.get(start + 1)?) * 8;
            }
            _ => break,
        }
    }
    // Zero: a jumbogram, or a packet to be cut that is longer than the field can say.
    let end = match u16_at(head, at + 4)? {
        0 => length,
        payload => at + 40 + usize::from(payload),
    };
    Some(Transport {
        family: Family::V6,
        protocol: Protocol::new(next)?,
        addresses: at + 8,
        start,
        payload: 0,
        end,
    })
}

/// The sum of the Internet's checksum (RFC 1071) over bytes that come piece by piece.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum {
    sum: u64,
    odd: bool,
}

impl Sum {
    /// Adds bytes.
    pub fn add(&mut self, mut bytes: &[u8]) {
        if self.odd
            && let Some((first, rest)) = bytes.split_first()
        {
            self.sum += u64::from(*first);
            self.odd = false;
            bytes = rest;
        }
        let (words, rest) = bytes.as_chunks::<4>();
        // A carry out of 32 bits is added back at the end.
        self.sum += words
            .iter()
            .map(|word| u64::from(u32::from_be_bytes(*word)))
            .sum::<u64>();
        let (words, rest) = rest.as_chunks::<2>();
        for word in words {
            self.sum += u64::from(u16::from_be_bytes(*word));
        }
        if let [last] = rest {
            self.sum += u64::from(*last) << 8;
            self.odd = true;
        }
    }

    /// The sum in 16 bits, not inverted.
    #[must_use]
    pub fn value(self) -> u16 {
        let mut sum = self.sum;
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        // At most 16 bits are left.
        u16::try_from(sum).unwrap_or(0)
    }

    /// What is put into a checksum's field; for UDP 0 would mean that there is none.
    #[must_use]
    pub fn checksum(self) -> u16 {
        match !self.value() {
            0 => 0xffff,
            sum => sum,
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let bytes = bytes.get(at..at + 2)?;
    Some(u16::from_be_bytes([bytes[0], bytes[1]]))
}

#[cfg(test)]
mod tests;
