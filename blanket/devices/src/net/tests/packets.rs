//! Packets for tests.

use crate::net::headers::{Protocol, Sum, Transport};

/// A packet to be built.
#[derive(Clone, Copy, Debug)]
pub struct Build {
    pub to: [u8; 6],
    pub from: [u8; 6],
    pub tags: usize,
    pub v6: bool,
    pub udp: bool,
    /// Extension headers of IPv6.
    pub extensions: usize,
    pub source: ([u8; 4], u16),
    pub target: ([u8; 4], u16),
    /// Of TCP.
    pub flags: u8,
    /// Of TCP, in whole words.
    pub options: &'static [u8],
    pub sequence: u32,
    pub acknowledge: u32,
}

impl Build {
    /// TCP over IPv4.
    pub fn tcp4() -> Self {
        Self {
            to: [0x02, 0, 0, 0, 0, 1],
            from: [0x00, 0x16, 0x3e, 0, 0, 2],
            tags: 0,
            v6: false,
            udp: false,
            extensions: 0,
            source: ([10, 0, 0, 2], 4000),
            target: ([10, 0, 0, 1], 80),
            flags: 0x10,
            options: &[],
            sequence: 1,
            acknowledge: 1,
        }
    }

    /// UDP over IPv4.
    pub fn udp4() -> Self {
        Self {
            udp: true,
            ..Self::tcp4()
        }
    }

    /// The packet, with all its checksums.
    pub fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let mut packet = self.blank(payload);
        let found = Transport::find(&packet, packet.len()).expect("TCP or UDP");
        let mut sum = Sum::default();
        sum.add(&packet[found.start..]);
        let at = found.checksum_at();
        packet[at..at + 2].copy_from_slice(&sum.checksum().to_be_bytes());
        packet
    }

    /// The packet, whose checksum of layer 4 has the pseudo header's sum.
    pub fn blank(&self, payload: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        packet.extend(self.to);
        packet.extend(self.from);
        for tag in 0..self.tags {
            packet.extend(if tag == 0 { [0x81, 0] } else { [0x88, 0xa8] });
            packet.extend([0, 5]);
        }
        let mut l4 = Vec::new();
        l4.extend(self.source.1.to_be_bytes());
        l4.extend(self.target.1.to_be_bytes());
        if self.udp {
            let length = u16::try_from(8 + payload.len()).expect("short");
            l4.extend(length.to_be_bytes());
            l4.extend([0, 0]);
        } else {
            l4.extend(self.sequence.to_be_bytes());
            l4.extend(self.acknowledge.to_be_bytes());
            let words = u8::try_from(5 + self.options.len() / 4).expect("short");
            l4.extend([words << 4, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
            l4.extend(self.options);
        }
        l4.extend(payload);
        let protocol = if self.udp { 17 } else { 6 };
        if self.v6 {
            packet.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            let length = u16::try_from(l4.len() + 8 * self.extensions).expect("short");
            packet.extend(length.to_be_bytes());
            packet.extend([if self.extensions > 0 { 60 } else { protocol }, 64]);
            for end in [self.source.0, self.target.0] {
                packet.extend([0xfd; 12]);
                packet.extend(end);
            }
            for left in (0..self.extensions).rev() {
                packet.extend([if left > 0 { 60 } else { protocol }, 0]);
                packet.extend([1, 4, 0, 0, 0, 0]);
            }
        } else {
            packet.extend([0x08, 0x00]);
            let at = packet.len();
            let length = u16::try_from(20 + l4.len()).expect("short");
            packet.extend([0x45, 0]);
            packet.extend(length.to_be_bytes());
            packet.extend([0, 1, 0x40, 0, 64, protocol, 0, 0]);
            packet.extend(self.source.0);
            packet.extend(self.target.0);
            let mut sum = Sum::default();
            sum.add(&packet[at..]);
            packet[at + 10..at + 12].copy_from_slice(&sum.checksum().to_be_bytes());
        }
        packet.extend(l4);
        let found = Transport::find(&packet, packet.len()).expect("TCP or UDP");
        let pseudo = found.pseudo(&packet).to_be_bytes();
        let at = found.checksum_at();
        packet[at..at + 2].copy_from_slice(&pseudo);
        packet
    }
}

/// Whether the checksum of layer 4 is right.
pub fn checksum_is_right(packet: &[u8]) -> bool {
    let found = Transport::find(packet, packet.len()).expect("TCP or UDP");
    let mut sum = Sum::default();
    // Counted by hand here, as another way than the one under test.
    let (addresses, length) = match found.family {
        crate::net::headers::Family::V4 => (&packet[26..34], found.end - found.start),
        crate::net::headers::Family::V6 => (&packet[22..54], found.end - found.start),
    };
    sum.add(addresses);
    let number = if found.protocol == Protocol::Tcp {
        6
    } else {
        17
    };
    sum.add(&[0, number]);
    sum.add(&u32::try_from(length).expect("short").to_be_bytes());
    sum.add(&packet[found.start..found.end]);
    sum.value() == 0xffff
}

/// Bytes that differ from place to place.
pub fn pattern(length: usize, seed: u32) -> Vec<u8> {
    let mut state = seed | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state.to_le_bytes()[1]
        })
        .collect()
}

/// A packet of no known kind.
pub fn plain(length: usize, seed: u32) -> Vec<u8> {
    let mut packet = pattern(length, seed);
    packet[..6].copy_from_slice(&[0x02, 0, 0, 0, 0, 1]);
    packet[6..12].copy_from_slice(&[0x00, 0x16, 0x3e, 0, 0, 2]);
    packet[12..14].copy_from_slice(&[0x88, 0xb5]);
    packet
}
