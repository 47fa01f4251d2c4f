//! Rings between the guest and the VMM: console and xenstore
//! (`public/io/console.h`, `public/io/xs_wire.h`).

/// Offsets in the console ring page.
pub mod console {
    /// Bytes to the guest.
    pub const IN: usize = 0;
    /// Size of the ring to the guest.
    pub const IN_SIZE: u32 = 1024;
    /// Bytes from the guest.
    pub const OUT: usize = 1024;
    /// Size of the ring from the guest.
    pub const OUT_SIZE: u32 = 2048;
    /// Consumer index of IN (guest).
    pub const IN_CONS: usize = 3072;
    /// Producer index of IN (VMM).
    pub const IN_PROD: usize = 3076;
    /// Consumer index of OUT (VMM).
    pub const OUT_CONS: usize = 3080;
    /// Producer index of OUT (guest).
    pub const OUT_PROD: usize = 3084;
}

/// Offsets in the xenstore ring page.
pub mod xenstore {
    /// Requests, guest to store.
    pub const REQ: usize = 0;
    /// Replies, store to guest.
    pub const RSP: usize = 1024;
    /// Size of each ring.
    pub const RING_SIZE: u32 = 1024;
    /// Consumer index of requests (store).
    pub const REQ_CONS: usize = 2048;
    /// Producer index of requests (guest).
    pub const REQ_PROD: usize = 2052;
    /// Consumer index of replies (guest).
    pub const RSP_CONS: usize = 2056;
    /// Producer index of replies (store).
    pub const RSP_PROD: usize = 2060;
    /// Feature bits of the store.
    pub const SERVER_FEATURES: usize = 2064;
    /// 0 = connected.
    pub const CONNECTION: usize = 2068;
    /// Error that the store found in the ring.
    pub const ERROR: usize = 2072;
    /// Longest payload of a message.
    pub const PAYLOAD_MAX: usize = 4096;
}
