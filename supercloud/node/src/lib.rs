//! The agent of a node.
mod agent;
mod archive;
mod arrivals;
pub mod blanket;
pub mod client;
mod cluster;
pub mod config;
mod disks;
mod doctor;
mod drain;
pub mod events;
mod everywhere;
mod fail;
pub mod http;
mod images;
pub mod logic;
mod moves;
mod nets;
pub mod networks;
pub mod pki;
mod record;
mod snapshots;
pub mod store;
pub mod tls;
mod vms;

pub use agent::Agent;
pub use nets::Virtual;
