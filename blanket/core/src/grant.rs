//! Grant table, version 1 (`public/grant_table.h`, `xen/common/grant_table.c`).
//!
//! [`GrantTable`] answers the hypercalls of a guest that only has frontends: it sizes
//! its table and learns where the frames are; all that a backend would call is refused.
//! What the VMM's backends do with an entry is in `blanket-devices`.

use blanket_abi::Gfn;
use blanket_abi::xen::domid;
use blanket_abi::xen::errno::{EINVAL, ENOSYS, EPERM, ESRCH};
use blanket_abi::xen::grant::{PER_FRAME, op, status};

/// `GNTST_bad_gntref`: no such entry.
pub const BAD_GNTREF: i16 = -3;
/// `GNTST_bad_handle`: no such mapping.
pub const BAD_HANDLE: i16 = -4;
/// `GNTST_permission_denied`.
pub const PERMISSION_DENIED: i16 = -8;

/// The only version.
pub const VERSION: u32 = 1;

/// Frames that a table has from the start (`INITIAL_NR_GRANT_FRAMES`).
const INITIAL_FRAMES: u32 = 1;

/// A domain's grant table: consecutive frames above its RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GrantTable {
    base: Gfn,
    max_frames: u32,
    nr_frames: u32,
}

/// How a refused operation is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The whole hypercall fails.
    Call(i64),
    /// The hypercall succeeds, and each operand gets a status: Linux stops the
    /// machine if the call fails, but bears a failed operation.
    Each {
        /// Bytes of an operand.
        size: u64,
        /// Offset of its status, an i16.
        status_at: u64,
        /// `GNTST_*`.
        status: i16,
    },
}

impl GrantTable {
    /// A table that can grow to `max_frames` frames (at least one) from the frame
    /// with gfn `base` on.
    #[must_use]
    pub fn new(base: u64, max_frames: u64) -> Self {
        let max_frames = u32::try_from(max_frames)
            .unwrap_or(u32::MAX)
            .max(INITIAL_FRAMES);
        Self {
            base: Gfn(base),
            max_frames,
            nr_frames: INITIAL_FRAMES,
        }
    }

    /// Frames in use.
    #[must_use]
    pub const fn nr_frames(&self) -> u32 {
        self.nr_frames
    }

    /// Entries in use.
    #[must_use]
    pub const fn nr_entries(&self) -> u64 {
        self.nr_frames as u64 * PER_FRAME
    }

    /// Frame `index` of the table.
    #[must_use]
    pub const fn frame(&self, index: u32) -> Option<Gfn> {
        if index < self.nr_frames {
            Some(Gfn(self.base.0 + index as u64))
        } else {
            None
        }
    }

    /// `GNTTABOP_setup_table`: grows the table to `nr_frames`; it never shrinks.
    /// On success the caller writes frames 0 to `nr_frames` - 1 to the guest's list.
    ///
    /// # Errors
    /// The operation's status.
    pub fn setup(&mut self, dom: u16, nr_frames: u32) -> Result<(), i16> {
        own(dom)?;
        if nr_frames > self.max_frames {
            return Err(status::GENERAL_ERROR);
        }
        self.nr_frames = self.nr_frames.max(nr_frames);
        Ok(())
    }

    /// `GNTTABOP_query_size`: frames in use and most frames.
    ///
    /// # Errors
    /// The operation's status.
    pub fn query_size(&self, dom: u16) -> Result<(u32, u32), i16> {
        own(dom)?;
        Ok((self.nr_frames, self.max_frames))
    }

    /// `GNTTABOP_set_version`. The operand becomes [`VERSION`] also on failure.
    ///
    /// # Errors
    /// ENOSYS for version 2, EINVAL for another.
    pub fn set_version(&self, version: u32) -> Result<(), i64> {
        match version {
            VERSION => Ok(()),
            2 => Err(ENOSYS),
            _ => Err(EINVAL),
        }
    }

    /// `GNTTABOP_get_version`.
    ///
    /// # Errors
    /// EPERM or ESRCH for another domain.
    pub fn get_version(&self, dom: u16) -> Result<u32, i64> {
        own(dom).map(|()| VERSION).map_err(|status| {
            if status == PERMISSION_DENIED {
                EPERM
            } else {
                ESRCH
            }
        })
    }

    /// The answer to an operation that is not one of the four above.
    #[must_use]
    pub const fn refuse(cmd: u64) -> Refusal {
        match cmd {
            op::MAP => Refusal::Each {
                size: 32,
                status_at: 18,
                status: status::BAD_DOMAIN,
            },
            // unmap and (7) unmap_and_replace
            op::UNMAP | 7 => Refusal::Each {
                size: 24,
                status_at: 20,
                status: BAD_HANDLE,
            },
            op::TRANSFER => Refusal::Each {
                size: 24,
                status_at: 16,
                status: status::BAD_DOMAIN,
            },
            op::COPY => Refusal::Each {
                size: 40,
                status_at: 36,
                status: PERMISSION_DENIED,
            },
            op::GET_STATUS_FRAMES => Refusal::Each {
                size: 16,
                status_at: 6,
                status: status::GENERAL_ERROR,
            },
            _ => Refusal::Call(ENOSYS),
        }
    }
}

/// Whether a domain id in an operand names the caller.
const fn own(dom: u16) -> Result<(), i16> {
    match dom {
        domid::SELF | domid::GUEST => Ok(()),
        domid::BACKEND => Err(PERMISSION_DENIED),
        _ => Err(status::BAD_DOMAIN),
    }
}
