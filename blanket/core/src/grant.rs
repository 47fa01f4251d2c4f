//! Grant table, version 1 (`public/grant_table.h`, `xen/common/grant_table.c`).
//!
//! Two sides. [`GrantTable`] answers the hypercalls of a guest that only has
//! frontends: it sizes its table and learns where the frames are; all that a
//! backend would call is refused. [`acquire`] and [`release`] are what the VMM's
//! backends do with an entry before and after they use the granted frame, so that
//! a guest that revokes a grant sees whether it is in use.

use blanket_abi::Gfn;
use blanket_abi::xen::domid;
use blanket_abi::xen::errno::{EINVAL, ENOSYS, EPERM, ESRCH};
use blanket_abi::xen::grant::{PER_FRAME, flag, op, status};

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

/// A guest's grant entries as a backend sees them: shared memory that the guest
/// changes at any time. `gref` is below the number that [`acquire`] was given.
pub trait Entries {
    /// The entry's first word: flags in the low half, domain in the high half.
    fn head(&self, gref: u32) -> u32;
    /// Replaces the first word if it is still `old`, with acquire order on success.
    ///
    /// # Errors
    /// The word that was there instead.
    fn exchange_head(&self, gref: u32, old: u32, new: u32) -> Result<(), u32>;
    /// Clears bits of the flags atomically, with release order, leaving all others.
    fn clear_flags(&self, gref: u32, bits: u16);
    /// The entry's frame.
    fn frame(&self, gref: u32) -> u32;
}

/// Why a grant cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// No such entry.
    BadRef,
    /// The entry grants nothing, or to somebody else.
    NotGranted,
    /// Writing was asked for and the grant is read-only.
    ReadOnly,
    /// The guest changes the entry faster than it can be taken.
    Unstable,
}

impl Denied {
    /// As `GNTST_*`.
    #[must_use]
    pub const fn status(self) -> i16 {
        match self {
            Self::BadRef => BAD_GNTREF,
            Self::NotGranted | Self::ReadOnly | Self::Unstable => status::GENERAL_ERROR,
        }
    }
}

/// Times that an entry is tried, as in Xen.
const TRIES: u32 = 5;

/// Takes entry `gref` of a table with `nr_entries` for domain `dom` (the backend):
/// marks it as being read, and written if `write`, and returns the granted frame.
/// The frame number is the guest's word and must be checked against its memory.
/// The caller serialises uses of one entry, with a [`Pins`] for each.
///
/// # Errors
/// [`Denied`]; the entry is then as it was.
pub fn acquire(
    entries: &impl Entries,
    nr_entries: u64,
    gref: u32,
    dom: u16,
    write: bool,
) -> Result<Gfn, Denied> {
    if u64::from(gref) >= nr_entries {
        return Err(Denied::BadRef);
    }
    let mut head = entries.head(gref);
    for _ in 0..TRIES {
        let [f0, f1, d0, d1] = head.to_le_bytes();
        let flags = u16::from_le_bytes([f0, f1]);
        if flags & flag::TYPE_MASK != flag::PERMIT_ACCESS || u16::from_le_bytes([d0, d1]) != dom {
            return Err(Denied::NotGranted);
        }
        if write && flags & flag::READONLY != 0 {
            return Err(Denied::ReadOnly);
        }
        let mark = flag::READING | if write { flag::WRITING } else { 0 };
        if flags & mark == mark {
            // Already marked by another use of the same grant.
            return Ok(Gfn(u64::from(entries.frame(gref))));
        }
        match entries.exchange_head(gref, head, head | u32::from(mark)) {
            Ok(()) => return Ok(Gfn(u64::from(entries.frame(gref)))),
            Err(now) => head = now,
        }
    }
    Err(Denied::Unstable)
}

/// Gives an entry back: clears the marks that [`Pins::remove`] says.
pub fn release(entries: &impl Entries, gref: u32, marks: u16) {
    if marks != 0 {
        entries.clear_flags(gref, marks);
    }
}

/// Uses of one grant by a backend. The marks in the entry stay until the last use
/// of their kind ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pins {
    readers: u32,
    writers: u32,
}

impl Pins {
    /// Counts a use that [`acquire`] allowed.
    pub fn add(&mut self, write: bool) {
        let count = if write {
            &mut self.writers
        } else {
            &mut self.readers
        };
        *count = count.saturating_add(1);
    }

    /// Ends a use. Returns the marks to clear with [`release`].
    #[must_use]
    pub fn remove(&mut self, write: bool) -> u16 {
        let count = if write {
            &mut self.writers
        } else {
            &mut self.readers
        };
        if *count == 0 {
            return 0;
        }
        *count -= 1;
        let mut marks = 0;
        if write && self.writers == 0 {
            marks |= flag::WRITING;
        }
        if self.is_unused() {
            marks |= flag::READING;
        }
        marks
    }

    /// Whether no use is left.
    #[must_use]
    pub const fn is_unused(&self) -> bool {
        self.readers == 0 && self.writers == 0
    }
}
