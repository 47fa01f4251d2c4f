//! Requests, extra slots and responses of network devices (`public/io/netif.h`).
//!
//! From the guest, a packet is a chain of slots: a first request with the length of the
//! whole packet, extra slots if it says so, and further requests while one says that more
//! data follows. To the guest, each slot has its own length, and an extra slot comes
//! second.

use super::Mac;
use crate::page::SIZE as PAGE;

/// Bytes of a slot of the ring from the guest.
pub const TX_SLOT: usize = 12;
/// Bytes of a slot of the ring to the guest.
pub const RX_SLOT: usize = 8;
/// Most pieces of a packet from the guest. Every backend must take 18
/// (`XEN_NETIF_NR_SLOTS_MIN`).
pub const MAX_PIECES: usize = 32;
/// Shortest packet: an Ethernet header.
pub const MIN_LENGTH: usize = 14;
/// Longest packet (`XEN_NETIF_MAX_TX_SIZE`).
pub const MAX_LENGTH: usize = 0xffff;

/// `XEN_NETTXF_*`.
pub mod tx_flag {
    /// The checksum of layer 4 holds the sum of the pseudo header only.
    pub const CSUM_BLANK: u16 = 1;
    /// The data has been checked.
    pub const DATA_VALIDATED: u16 = 2;
    /// The packet goes on in the next request.
    pub const MORE_DATA: u16 = 4;
    /// Extra slots follow.
    pub const EXTRA_INFO: u16 = 8;
}

/// `XEN_NETRXF_*`.
pub mod rx_flag {
    /// The data has been checked.
    pub const DATA_VALIDATED: u16 = 1;
    /// The checksum of layer 4 holds the sum of the pseudo header only.
    pub const CSUM_BLANK: u16 = 2;
    /// The packet goes on in the next response.
    pub const MORE_DATA: u16 = 4;
    /// Extra slots follow.
    pub const EXTRA_INFO: u16 = 8;
}

/// `XEN_NETIF_EXTRA_TYPE_*`.
pub mod extra_type {
    /// Segmentation.
    pub const GSO: u8 = 1;
    /// Subscribe to a multicast address.
    pub const MCAST_ADD: u8 = 2;
    /// Cancel that.
    pub const MCAST_DEL: u8 = 3;
    /// A hash of the packet.
    pub const HASH: u8 = 4;
    /// Room before the data.
    pub const XDP: u8 = 5;
}

/// `XEN_NETIF_EXTRA_FLAG_MORE`.
pub const EXTRA_MORE: u8 = 1;

/// `XEN_NETIF_RSP_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i16)]
pub enum Status {
    /// Done.
    Okay = 0,
    /// The request was wrong, or failed.
    Error = -1,
    /// Not sent on purpose.
    Dropped = -2,
    /// In the slot of an extra.
    Null = 1,
}

/// Kinds of segmentation (`XEN_NETIF_GSO_TYPE_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum GsoKind {
    /// TCP over IPv4.
    TcpV4 = 1,
    /// TCP over IPv6.
    TcpV6 = 2,
}

/// A packet that is to be cut into segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    /// By which rules.
    pub kind: GsoKind,
    /// Bytes of payload in each segment; not 0.
    pub size: u16,
}

impl Gso {
    /// The extra slot that says so to the guest.
    #[must_use]
    pub fn encode(self) -> [u8; RX_SLOT] {
        let [low, high] = self.size.to_le_bytes();
        [extra_type::GSO, 0, low, high, self.kind as u8, 0, 0, 0]
    }
}

/// A piece of a packet in a page of the guest. It ends in that page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Grant of the page.
    pub gref: u32,
    /// Where it begins in the page, bytes.
    pub offset: usize,
    /// Bytes.
    pub length: usize,
}

impl Piece {
    fn new(gref: u32, offset: u16, length: usize) -> Result<Self, Bad> {
        let offset = usize::from(offset);
        if offset + length > PAGE {
            return Err(Bad::CrossesPage { offset, length });
        }
        Ok(Self {
            gref,
            offset,
            length,
        })
    }
}

/// What a chain of slots asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Send the packet.
    Send,
    /// Let a multicast address through.
    Subscribe(Mac),
    /// No longer.
    Unsubscribe(Mac),
}

/// What is wrong with a packet. Its slots are answered with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Bad {
    /// A piece that is not in its page.
    #[error("{length} bytes at {offset} go beyond their page")]
    CrossesPage {
        /// Where it begins.
        offset: usize,
        /// Bytes.
        length: usize,
    },
    /// The pieces are longer than the packet.
    #[error("the pieces of a packet of {0} bytes have {1}")]
    Sizes(usize, usize),
    /// Too many pieces.
    #[error("the packet has more than {MAX_PIECES} pieces")]
    Pieces,
    /// Shorter than an Ethernet header.
    #[error("a packet of {0} bytes is too short")]
    Short(usize),
    /// An extra slot that is not known, or not understood.
    #[error("an extra slot of type {0} is wrong")]
    Extra(u8),
    /// Segmentation or checksum that the packet's headers do not allow.
    #[error("its headers do not fit the segmentation or checksum that it asks for")]
    Headers,
}

/// The guest breaks the rules of the ring: nothing in it can be believed any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// A request says that more follows, and nothing does.
    #[error("the guest has a packet of which {0} slots are there and the next is missing")]
    Cut(u32),
}

/// The chain of slots of one packet, copied out of the ring.
#[derive(Debug, Default)]
pub struct Chain {
    /// Its pieces, in order; those of no length are left out.
    pub pieces: Vec<Piece>,
    /// Length of the packet, bytes.
    pub length: usize,
    /// The checksum of layer 4 is to be made.
    pub csum_blank: bool,
    /// It is to be cut.
    pub gso: Option<Gso>,
    /// For each slot the id to answer with; `None` for an extra.
    ids: Vec<Option<u16>>,
}

impl Chain {
    /// Room for any chain, so that decoding takes no memory.
    #[must_use]
    pub fn new(slots: u32) -> Self {
        Self {
            pieces: Vec::with_capacity(MAX_PIECES),
            ids: Vec::with_capacity(slots as usize),
            ..Self::default()
        }
    }

    /// Understands the chain that begins with the next request, when `waiting` slots
    /// wait, at least one. `slot` copies one out and is called once for each. A chain
    /// that is wrong has its slots counted all the same.
    ///
    /// # Errors
    /// Outside: the ring is broken. Inside: the packet is wrong.
    pub fn decode(
        &mut self,
        waiting: u32,
        mut slot: impl FnMut(u32) -> [u8; TX_SLOT],
    ) -> Result<Result<Ask, Bad>, Broken> {
        self.pieces.clear();
        self.ids.clear();
        self.gso = None;
        let mut taken = 0;
        let mut next = || {
            if taken >= waiting {
                return Err(Broken::Cut(taken));
            }
            taken += 1;
            Ok(slot(taken - 1))
        };
        let mut ask = Ask::Send;
        let mut bad = None;

        let first = TxRequest::decode(&next()?);
        self.ids.push(Some(first.id));
        self.length = usize::from(first.size);
        self.csum_blank = first.flags & tx_flag::CSUM_BLANK != 0;
        let mut extra = first.flags & tx_flag::EXTRA_INFO != 0;
        while extra {
            let bytes = next()?;
            self.ids.push(None);
            extra = bytes[1] & EXTRA_MORE != 0;
            match Extra::decode(&bytes) {
                Ok(Extra::Gso(gso)) => self.gso = Some(gso),
                Ok(Extra::Ask(what)) => ask = what,
                Ok(Extra::Hash) => {}
                Err(error) => bad = bad.or(Some(error)),
            }
        }

        // The first piece has what the others leave; its length is known at the end.
        self.pieces.push(Piece {
            gref: first.gref,
            offset: 0,
            length: 0,
        });
        let mut rest = 0;
        let mut more = first.flags & tx_flag::MORE_DATA != 0;
        while more {
            let request = TxRequest::decode(&next()?);
            self.ids.push(Some(request.id));
            more = request.flags & tx_flag::MORE_DATA != 0;
            let length = usize::from(request.size);
            rest += length;
            match Piece::new(request.gref, request.offset, length) {
                Ok(_) if self.pieces.len() == MAX_PIECES => bad = bad.or(Some(Bad::Pieces)),
                Ok(piece) => self.pieces.push(piece),
                Err(error) => bad = bad.or(Some(error)),
            }
        }
        if let Some(bad) = bad {
            return Ok(Err(bad));
        }
        if ask == Ask::Send {
            if let Err(bad) = self.measure(&first, rest) {
                return Ok(Err(bad));
            }
        } else {
            self.pieces.clear();
        }
        Ok(Ok(ask))
    }

    fn measure(&mut self, first: &TxRequest, rest: usize) -> Result<(), Bad> {
        if self.length < MIN_LENGTH {
            return Err(Bad::Short(self.length));
        }
        let length = self
            .length
            .checked_sub(rest)
            .ok_or(Bad::Sizes(self.length, rest))?;
        self.pieces[0] = Piece::new(first.gref, first.offset, length)?;
        self.pieces.retain(|piece| piece.length > 0);
        Ok(())
    }

    /// Slots of the chain.
    #[must_use]
    pub fn slots(&self) -> u32 {
        // As many as a ring has, at most.
        u32::try_from(self.ids.len()).unwrap_or(u32::MAX)
    }

    /// The responses to its slots, in order.
    pub fn responses(&self, status: Status) -> impl Iterator<Item = [u8; 4]> {
        self.ids.iter().map(move |id| match id {
            Some(id) => tx_response(*id, status),
            None => tx_response(0, Status::Null),
        })
    }
}

/// `netif_tx_request`.
struct TxRequest {
    gref: u32,
    offset: u16,
    flags: u16,
    id: u16,
    size: u16,
}

impl TxRequest {
    fn decode(slot: &[u8; TX_SLOT]) -> Self {
        let [a, b, c, d, o0, o1, f0, f1, i0, i1, s0, s1] = *slot;
        Self {
            gref: u32::from_le_bytes([a, b, c, d]),
            offset: u16::from_le_bytes([o0, o1]),
            flags: u16::from_le_bytes([f0, f1]),
            id: u16::from_le_bytes([i0, i1]),
            size: u16::from_le_bytes([s0, s1]),
        }
    }
}

/// `netif_tx_response`.
fn tx_response(id: u16, status: Status) -> [u8; 4] {
    let [i0, i1] = id.to_le_bytes();
    let [s0, s1] = (status as i16).to_le_bytes();
    [i0, i1, s0, s1]
}

/// `netif_extra_info`.
enum Extra {
    Gso(Gso),
    Ask(Ask),
    /// Allowed beside a packet, and of no use here.
    Hash,
}

impl Extra {
    fn decode(slot: &[u8; TX_SLOT]) -> Result<Self, Bad> {
        let [kind, _, a, b, c, d, e, f, ..] = *slot;
        let mac = Mac::new([a, b, c, d, e, f]);
        match kind {
            extra_type::GSO => {
                let size = u16::from_le_bytes([a, b]);
                let kind = match c {
                    1 => GsoKind::TcpV4,
                    2 => GsoKind::TcpV6,
                    _ => return Err(Bad::Extra(kind)),
                };
                if size == 0 {
                    return Err(Bad::Extra(extra_type::GSO));
                }
                Ok(Self::Gso(Gso { kind, size }))
            }
            extra_type::MCAST_ADD if mac.is_multicast() => Ok(Self::Ask(Ask::Subscribe(mac))),
            extra_type::MCAST_DEL if mac.is_multicast() => Ok(Self::Ask(Ask::Unsubscribe(mac))),
            extra_type::HASH => Ok(Self::Hash),
            other => Err(Bad::Extra(other)),
        }
    }
}

/// `netif_rx_request`: a page for data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RxRequest {
    /// The guest's own word for it.
    pub id: u16,
    /// Grant of the page.
    pub gref: u32,
}

impl RxRequest {
    /// Understands a slot; any is one.
    #[must_use]
    pub fn decode(slot: &[u8; RX_SLOT]) -> Self {
        let [i0, i1, _, _, a, b, c, d] = *slot;
        Self {
            id: u16::from_le_bytes([i0, i1]),
            gref: u32::from_le_bytes([a, b, c, d]),
        }
    }
}

/// `netif_rx_response`: data from the start of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RxResponse {
    /// Of the request in the same slot.
    pub id: u16,
    /// [`rx_flag`].
    pub flags: u16,
    /// Bytes, at most a page; `None` if the request failed.
    pub length: Option<u16>,
}

impl RxResponse {
    /// Its slot.
    #[must_use]
    pub fn encode(self) -> [u8; RX_SLOT] {
        let [i0, i1] = self.id.to_le_bytes();
        let [f0, f1] = self.flags.to_le_bytes();
        let status = match self.length {
            Some(length) => length.to_le_bytes(),
            None => (Status::Error as i16).to_le_bytes(),
        };
        [i0, i1, 0, 0, f0, f1, status[0], status[1]]
    }
}

#[cfg(test)]
mod tests;
