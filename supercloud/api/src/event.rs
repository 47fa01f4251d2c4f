//! What happens on a node.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Something has happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Its number, which grows by one with each event of an agent's life.
    pub number: u64,
    /// When, milliseconds since 1970.
    pub at_ms: u64,
    /// On which node.
    pub node: String,
    /// What: `vm.started`, `vm.ended`, `vm.arrived`, `operation.step`, ...
    pub kind: String,
    /// The VM, node, image or operation that it is about.
    pub about: String,
    /// In words.
    pub text: String,
}
