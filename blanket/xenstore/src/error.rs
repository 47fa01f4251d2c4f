//! Errors as the protocol knows them: names, not numbers.

/// Why a request failed (`xsd_errors`, `public/io/xs_wire.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.name())]
#[allow(missing_docs, reason = "the names are those of errno.h")]
pub enum Errno {
    Inval,
    Acces,
    Exist,
    NoEnt,
    NoMem,
    NoSpc,
    Io,
    NoSys,
    Busy,
    Again,
    TooBig,
    Perm,
}

impl Errno {
    /// The text that an ERROR reply carries.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Inval => "EINVAL",
            Self::Acces => "EACCES",
            Self::Exist => "EEXIST",
            Self::NoEnt => "ENOENT",
            Self::NoMem => "ENOMEM",
            Self::NoSpc => "ENOSPC",
            Self::Io => "EIO",
            Self::NoSys => "ENOSYS",
            Self::Busy => "EBUSY",
            Self::Again => "EAGAIN",
            Self::TooBig => "E2BIG",
            Self::Perm => "EPERM",
        }
    }
}
