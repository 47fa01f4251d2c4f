//! What went wrong, and what to do.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Which kind of error it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The request is wrong in itself.
    BadRequest,
    /// There is no such node, VM, image or operation.
    NotFound,
    /// There is another one by that name, or it is in a state in which that cannot be.
    Conflict,
    /// The token is unknown, used or too old.
    Token,
    /// Who asks has no certificate, or may not ask that.
    NotAllowed,
    /// The node has not the memory.
    NoMemory,
    /// The VM cannot go on there: another CPU, another size, no such network.
    Unfit,
    /// A node cannot be reached, or its agent does not run.
    Unreachable,
    /// It is not known on which node the VM is.
    Doubt,
    /// It was cancelled.
    Cancelled,
    /// `blanket`, the node, or the agent failed.
    Failed,
}

impl Code {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::BadRequest,
        Self::NotFound,
        Self::Conflict,
        Self::Token,
        Self::NotAllowed,
        Self::NoMemory,
        Self::Unfit,
        Self::Unreachable,
        Self::Doubt,
        Self::Cancelled,
        Self::Failed,
    ];

    /// The HTTP status that it goes with.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Token | Self::NotAllowed => 403,
            Self::NotFound => 404,
            Self::Conflict | Self::Doubt | Self::Cancelled => 409,
            Self::Unfit => 422,
            Self::Failed => 500,
            Self::Unreachable => 502,
            Self::NoMemory => 507,
        }
    }

    /// The exit code of a command that ends with it.
    #[must_use]
    pub fn exit(self) -> u8 {
        match self {
            Self::Failed | Self::Cancelled => 1,
            Self::BadRequest => 2,
            Self::NotFound => 3,
            Self::Conflict => 4,
            Self::Unreachable => 5,
            Self::NoMemory | Self::Unfit => 6,
            Self::Token | Self::NotAllowed => 7,
            Self::Doubt => 9,
        }
    }
}

/// An error, as it is sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// Its kind.
    pub code: Code,
    /// What went wrong, on which object.
    pub message: String,
    /// What to do; empty if there is nothing to say.
    pub hint: String,
}

impl Error {
    /// An error with what to do about it.
    pub fn new(code: Code, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            hint: hint.into(),
        }
    }

    /// There is no such thing.
    pub fn not_found(what: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::new(Code::NotFound, what, hint)
    }

    /// Something failed that nobody can mend by asking otherwise.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Code::Failed, message, "")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_errors() {
        for code in Code::ALL {
            assert!((400..600).contains(&code.status()), "{code:?}");
            assert_ne!(code.exit(), 0, "{code:?}");
        }
    }
}
