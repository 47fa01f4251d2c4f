//! The Xen PV ABI for 64-bit guests, as Linux uses it.
//!
//! Numbers and layouts follow Xen's public headers (`xen/include/public/`), which
//! each item names; values were compared with a stock Debian kernel.

pub mod boot;
pub mod cpuid;
pub mod event;
pub mod grant;
pub mod hypercall;
pub mod io;
pub mod shared;

/// Negative return values of hypercalls (`public/errno.h`).
pub mod errno {
    /// Not permitted.
    pub const EPERM: i64 = -1;
    /// No such entry.
    pub const ENOENT: i64 = -2;
    /// No such domain or vCPU.
    pub const ESRCH: i64 = -3;
    /// Try again.
    pub const EAGAIN: i64 = -11;
    /// Out of memory.
    pub const ENOMEM: i64 = -12;
    /// Access denied.
    pub const EACCES: i64 = -13;
    /// Bad address.
    pub const EFAULT: i64 = -14;
    /// Busy.
    pub const EBUSY: i64 = -16;
    /// Already exists.
    pub const EEXIST: i64 = -17;
    /// No such device.
    pub const ENODEV: i64 = -19;
    /// Invalid argument.
    pub const EINVAL: i64 = -22;
    /// No space.
    pub const ENOSPC: i64 = -28;
    /// Not implemented.
    pub const ENOSYS: i64 = -38;
    /// Not supported.
    pub const EOPNOTSUPP: i64 = -95;
}

/// Domain identifiers (`public/xen.h`).
pub mod domid {
    /// The calling domain.
    pub const SELF: u16 = 0x7ff0;
    /// The backend domain: the VMM plays it.
    pub const BACKEND: u16 = 0;
    /// The guest's own id as the toolstack sees it.
    pub const GUEST: u16 = 1;
}
