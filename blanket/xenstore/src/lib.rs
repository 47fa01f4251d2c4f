#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod connection;
mod device;
mod domain;
mod error;
mod node;
mod ops;
mod path;
mod quota;
pub mod state;
mod store;
mod transaction;
mod watch;
pub mod wire;

#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use connection::{Connection, ProtocolError};
pub use device::DeviceId;
pub use domain::DomainSpec;
pub use error::Errno;
pub use node::{Access, Perm};
pub use path::{Path, Watched};
pub use quota::Quotas;
pub use store::{ConnId, DomId, Store, TxId};
pub use watch::Event;

#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    reason = "small numbers of the tests' own making"
)]
mod tests;
