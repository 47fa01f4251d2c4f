//! Event channels, 2-level ABI (`public/event_channel.h`).

/// Ports: 64 words of 64 bits.
pub const PORTS: u32 = 4096;

/// `EVTCHNOP_*` and operands.
pub mod op {
    /// Bind to a remote port.
    pub const BIND_INTERDOMAIN: u64 = 0;
    /// Bind a VIRQ.
    pub const BIND_VIRQ: u64 = 1;
    /// Bind a physical interrupt.
    pub const BIND_PIRQ: u64 = 2;
    /// Close.
    pub const CLOSE: u64 = 3;
    /// Notify the other end.
    pub const SEND: u64 = 4;
    /// Query.
    pub const STATUS: u64 = 5;
    /// Allocate an unbound port.
    pub const ALLOC_UNBOUND: u64 = 6;
    /// Bind an IPI.
    pub const BIND_IPI: u64 = 7;
    /// Move to another vCPU.
    pub const BIND_VCPU: u64 = 8;
    /// Unmask.
    pub const UNMASK: u64 = 9;
    /// Close all.
    pub const RESET: u64 = 10;
    /// FIFO ABI.
    pub const INIT_CONTROL: u64 = 11;
    /// FIFO ABI.
    pub const EXPAND_ARRAY: u64 = 12;
    /// FIFO ABI.
    pub const SET_PRIORITY: u64 = 13;
}

/// `EVTCHNSTAT_*`.
pub mod status {
    /// Free.
    pub const CLOSED: u32 = 0;
    /// Waits for a peer.
    pub const UNBOUND: u32 = 1;
    /// Connected to another domain.
    pub const INTERDOMAIN: u32 = 2;
    /// Physical interrupt.
    pub const PIRQ: u32 = 3;
    /// Virtual interrupt.
    pub const VIRQ: u32 = 4;
    /// Between vCPUs.
    pub const IPI: u32 = 5;
}

/// `VIRQ_*` (`public/xen.h`).
pub mod virq {
    /// Per-vCPU timer.
    pub const TIMER: u32 = 0;
    /// Per-vCPU debug.
    pub const DEBUG: u32 = 1;
    /// Per-vCPU profiling.
    pub const XENOPROF: u32 = 7;
    /// Per-vCPU PMU.
    pub const XENPMU: u32 = 13;
    /// Number of VIRQs.
    pub const COUNT: u32 = 24;
}
