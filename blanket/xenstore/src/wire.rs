//! Message formats (`public/io/xs_wire.h`).

/// Bytes of a header.
pub const HEADER: usize = 16;
/// Longest payload.
pub const PAYLOAD_MAX: usize = 4096;

/// Bits of the ring page's field `server_features` and of the reply to GET_FEATURE.
pub mod feature {
    /// The store can connect to a guest anew.
    pub const RECONNECTION: u32 = 1;
    /// The ring page's error field tells why the store gave a ring up.
    pub const ERROR: u32 = 2;
    /// WATCH takes a depth.
    pub const WATCH_DEPTH: u32 = 4;
}

/// What this store can do. [`feature::ERROR`] is kept by who carries the bytes: he
/// gets a [`ProtocolError`](crate::ProtocolError) and writes it to the ring page.
pub const FEATURES: u32 = feature::ERROR | feature::WATCH_DEPTH;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs, reason = "the names are those of the protocol")]
pub enum Kind {
    Control = 0,
    Directory = 1,
    Read = 2,
    GetPerms = 3,
    Watch = 4,
    Unwatch = 5,
    TransactionStart = 6,
    TransactionEnd = 7,
    Introduce = 8,
    Release = 9,
    GetDomainPath = 10,
    Write = 11,
    Mkdir = 12,
    Rm = 13,
    SetPerms = 14,
    WatchEvent = 15,
    Error = 16,
    IsDomainIntroduced = 17,
    Resume = 18,
    SetTarget = 19,
    ResetWatches = 21,
    DirectoryPart = 22,
    GetFeature = 23,
    SetFeature = 24,
    GetQuota = 25,
    SetQuota = 26,
}

impl Kind {
    /// The kind with this number.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            0 => Self::Control,
            1 => Self::Directory,
            2 => Self::Read,
            3 => Self::GetPerms,
            4 => Self::Watch,
            5 => Self::Unwatch,
            6 => Self::TransactionStart,
            7 => Self::TransactionEnd,
            8 => Self::Introduce,
            9 => Self::Release,
            10 => Self::GetDomainPath,
            11 => Self::Write,
            12 => Self::Mkdir,
            13 => Self::Rm,
            14 => Self::SetPerms,
            15 => Self::WatchEvent,
            16 => Self::Error,
            17 => Self::IsDomainIntroduced,
            18 => Self::Resume,
            19 => Self::SetTarget,
            21 => Self::ResetWatches,
            22 => Self::DirectoryPart,
            23 => Self::GetFeature,
            24 => Self::SetFeature,
            25 => Self::GetQuota,
            26 => Self::SetQuota,
            _ => return None,
        })
    }
}

/// The 16 bytes before a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Number of the [`Kind`].
    pub kind: u32,
    /// The client's number for the request, repeated in the reply.
    pub request: u32,
    /// The transaction, or 0.
    pub transaction: u32,
    /// Bytes of payload.
    pub length: u32,
}

impl Header {
    /// Reads a header.
    #[must_use]
    pub fn decode(bytes: [u8; HEADER]) -> Self {
        let word =
            |n: usize| u32::from_le_bytes([bytes[n], bytes[n + 1], bytes[n + 2], bytes[n + 3]]);
        Self {
            kind: word(0),
            request: word(4),
            transaction: word(8),
            length: word(12),
        }
    }

    /// Writes a header.
    #[must_use]
    pub fn encode(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        for (at, word) in [self.kind, self.request, self.transaction, self.length]
            .into_iter()
            .enumerate()
        {
            bytes[at * 4..at * 4 + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}
