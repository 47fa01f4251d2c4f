//! Grant table version 1 (`public/grant_table.h`).

/// Entries in a grant frame.
pub const PER_FRAME: u64 = 512;
/// Entry reserved for the console ring.
pub const RESERVED_CONSOLE: u32 = 0;
/// Entry reserved for the xenstore ring.
pub const RESERVED_XENSTORE: u32 = 1;

/// `grant_entry_v1`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// `GTF_*`.
    pub flags: u16,
    /// Who may use it.
    pub domid: u16,
    /// Granted frame.
    pub frame: u32,
}

/// `GTF_*`.
pub mod flag {
    /// Type mask.
    pub const TYPE_MASK: u16 = 3;
    /// Access is permitted.
    pub const PERMIT_ACCESS: u16 = 1;
    /// Only reading.
    pub const READONLY: u16 = 4;
    /// The other domain reads.
    pub const READING: u16 = 8;
    /// The other domain writes.
    pub const WRITING: u16 = 16;
}

/// `GNTTABOP_*`.
pub mod op {
    /// Map.
    pub const MAP: u64 = 0;
    /// Unmap.
    pub const UNMAP: u64 = 1;
    /// Size the table and list its frames.
    pub const SETUP_TABLE: u64 = 2;
    /// Dump.
    pub const DUMP: u64 = 3;
    /// Transfer.
    pub const TRANSFER: u64 = 4;
    /// Copy.
    pub const COPY: u64 = 5;
    /// Current and largest size.
    pub const QUERY_SIZE: u64 = 6;
    /// Choose a version.
    pub const SET_VERSION: u64 = 8;
    /// Version 2.
    pub const GET_STATUS_FRAMES: u64 = 9;
    /// The version in use.
    pub const GET_VERSION: u64 = 10;
    /// Swap two entries.
    pub const SWAP_REF: u64 = 11;
    /// Cache maintenance (Arm).
    pub const CACHE_FLUSH: u64 = 12;
}

/// `GNTST_*`.
pub mod status {
    /// Done.
    pub const OKAY: i16 = 0;
    /// Failed.
    pub const GENERAL_ERROR: i16 = -1;
    /// Bad domain.
    pub const BAD_DOMAIN: i16 = -2;
    /// Out of space.
    pub const NO_SPACE: i16 = -13;
}
