//! What is left undone in a packet: its checksum, and the cutting into segments. The host
//! says it in a header before the packet (`linux/virtio_net.h`, `struct virtio_net_hdr`),
//! the guest in flags and extra slots.

use super::headers::{Family, HEAD, Protocol, Transport};
use super::protocol::{Bad, Gso, GsoKind, rx_flag};

/// Bytes of the host's header.
pub const HEADER: usize = 10;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`.
const NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_F_DATA_VALID`.
const DATA_VALID: u8 = 2;
/// `VIRTIO_NET_HDR_GSO_TCPV4`.
const GSO_TCPV4: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_TCPV6`.
const GSO_TCPV6: u8 = 4;
/// `VIRTIO_NET_HDR_GSO_ECN`, a flag beside the type.
const GSO_ECN: u8 = 0x80;

/// What may be left undone in packets that somebody receives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Checksums over IPv4.
    pub csum4: bool,
    /// Checksums over IPv6.
    pub csum6: bool,
    /// Cutting of TCP over IPv4.
    pub tso4: bool,
    /// Cutting of TCP over IPv6.
    pub tso6: bool,
}

impl Offloads {
    /// Everything.
    pub const ALL: Self = Self {
        csum4: true,
        csum6: true,
        tso4: true,
        tso6: true,
    };

    /// Whether packets can be longer than the network's.
    #[must_use]
    pub const fn long(self) -> bool {
        self.tso4 || self.tso6
    }

    pub(super) const fn csum(self, family: Family) -> bool {
        match family {
            Family::V4 => self.csum4,
            Family::V6 => self.csum6,
        }
    }

    pub(super) const fn cut(self, kind: GsoKind) -> bool {
        match kind {
            GsoKind::TcpV4 => self.tso4,
            GsoKind::TcpV6 => self.tso6,
        }
    }
}

/// A checksum to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blank {
    /// Where the sum begins.
    pub start: u16,
    /// Where it is put, from there.
    pub offset: u16,
}

/// `struct virtio_net_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Undone {
    /// The checksum is to be made.
    pub blank: Option<Blank>,
    /// The data has been checked.
    pub validated: bool,
    /// The packet is to be cut, and its headers have so many bytes.
    pub cut: Option<(Gso, u16)>,
}

impl Undone {
    /// Understands the host's header. `None` if it leaves something undone that was not
    /// allowed.
    #[must_use]
    pub fn decode(bytes: &[u8; HEADER]) -> Option<Self> {
        let [flags, kind, l0, l1, s0, s1, c0, c1, o0, o1] = *bytes;
        let size = u16::from_le_bytes([s0, s1]);
        let kind = match kind & !GSO_ECN {
            0 => None,
            GSO_TCPV4 => Some(GsoKind::TcpV4),
            GSO_TCPV6 => Some(GsoKind::TcpV6),
            _ => return None,
        };
        let cut = match kind {
            Some(_) if size == 0 => return None,
            Some(kind) => Some((Gso { kind, size }, u16::from_le_bytes([l0, l1]))),
            None => None,
        };
        Some(Self {
            blank: (flags & NEEDS_CSUM != 0).then_some(Blank {
                start: u16::from_le_bytes([c0, c1]),
                offset: u16::from_le_bytes([o0, o1]),
            }),
            validated: flags & DATA_VALID != 0,
            cut,
        })
    }

    /// The host's header.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER] {
        let mut flags = if self.validated { DATA_VALID } else { 0 };
        let (mut start, mut offset) = (0, 0);
        if let Some(blank) = self.blank {
            flags = NEEDS_CSUM;
            (start, offset) = (blank.start, blank.offset);
        }
        let (kind, size, headers) = match self.cut {
            Some((gso, headers)) => {
                let kind = match gso.kind {
                    GsoKind::TcpV4 => GSO_TCPV4,
                    GsoKind::TcpV6 => GSO_TCPV6,
                };
                (kind, gso.size, headers)
            }
            None => (0, 0, 0),
        };
        let [l0, l1] = headers.to_le_bytes();
        let [s0, s1] = size.to_le_bytes();
        let [c0, c1] = start.to_le_bytes();
        let [o0, o1] = offset.to_le_bytes();
        [flags, kind, l0, l1, s0, s1, c0, c1, o0, o1]
    }

    /// What a packet from the guest leaves undone, by its first bytes (up to [`HEAD`]) and
    /// the guest's word. A packet that is to be cut and has its checksum gets a blank one.
    ///
    /// # Errors
    /// The headers do not fit.
    pub fn from_guest(
        head: &mut [u8],
        length: usize,
        csum_blank: bool,
        gso: Option<Gso>,
    ) -> Result<(Self, Option<Transport>), Bad> {
        if !csum_blank && gso.is_none() {
            return Ok((Self::default(), None));
        }
        let found = Transport::find(head, length).ok_or(Bad::Headers)?;
        let mut cut = None;
        if let Some(gso) = gso {
            let family = match gso.kind {
                GsoKind::TcpV4 => Family::V4,
                GsoKind::TcpV6 => Family::V6,
            };
            if found.protocol != Protocol::Tcp || found.family != family {
                return Err(Bad::Headers);
            }
            cut = Some((gso, short(found.payload)?));
        }
        if !csum_blank {
            let sum = found.pseudo(head).to_be_bytes();
            let at = found.checksum_at();
            head.get_mut(at..at + 2)
                .ok_or(Bad::Headers)?
                .copy_from_slice(&sum);
        }
        let undone = Self {
            blank: Some(Blank {
                start: short(found.start)?,
                offset: short(found.protocol.checksum())?,
            }),
            validated: false,
            cut,
        };
        Ok((undone, Some(found)))
    }

    /// How a packet from the host goes to a guest that takes `offloads`, by its first
    /// bytes (up to [`HEAD`]).
    #[must_use]
    pub fn to_guest(&self, head: &[u8], length: usize, offloads: Offloads) -> ToGuest {
        let found = self.blank.and_then(|blank| {
            // The guest finds the place by the outermost headers only.
            Transport::find(head, length).filter(|found| {
                found.start == usize::from(blank.start)
                    && found.protocol.checksum() == usize::from(blank.offset)
            })
        });
        let flags = if self.blank.is_some() {
            rx_flag::CSUM_BLANK | rx_flag::DATA_VALIDATED
        } else if self.validated {
            rx_flag::DATA_VALIDATED
        } else {
            0
        };
        if let Some((gso, _)) = self.cut {
            return if offloads.cut(gso.kind) && found.is_some() {
                ToGuest::Pass {
                    flags,
                    gso: Some(gso),
                }
            } else {
                ToGuest::Drop
            };
        }
        match (self.blank, found) {
            (None, _) => ToGuest::Pass { flags, gso: None },
            (Some(_), Some(found)) if offloads.csum(found.family) => {
                ToGuest::Pass { flags, gso: None }
            }
            (Some(blank), _) => ToGuest::Sum(blank),
        }
    }
}

/// What is done with a packet before a guest gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToGuest {
    /// Nothing: the guest does what is left.
    Pass {
        /// [`rx_flag`].
        flags: u16,
        /// It is to be cut, or is taken as a whole.
        gso: Option<Gso>,
    },
    /// The checksum is made; the guest is told that it is right.
    Sum(Blank),
    /// The guest cannot take it.
    Drop,
}

const _: () = assert!(HEAD <= u16::MAX as usize);

fn short(offset: usize) -> Result<u16, Bad> {
    u16::try_from(offset).map_err(|_| Bad::Headers)
}

#[cfg(test)]
mod tests;
