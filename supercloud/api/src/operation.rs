//! Work that takes a while: it has an identity, goes on when its node's agent is started
//! again, and can be looked at.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::Error;

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A VM moves.
    Migrate,
    /// All VMs of a node move.
    Drain,
}

/// How it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OperationState {
    /// It goes on.
    Runs,
    /// It is not known on which node the VM is; it is asked again and again.
    Doubt,
    /// It has come to its end.
    Done,
    /// It has not, and everything is as it was.
    Failed,
}

/// Where a move is. Each is on the disk before what belongs to it is begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// The destination is asked to make itself ready.
    Preparing,
    /// It waits for the VM, which may be moving.
    Moving,
    /// The VM has gone; the destination has to say that it has it.
    Leaving,
    /// The VM stays; the destination has to clear away what it has prepared.
    Clearing,
    /// Nothing is left to do.
    Over,
}

/// How far a move is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// `copying`, `standing`, `doubt`, `pulling`, `cut`, `moved`, `kept`, or `fits` of one that was
    /// only tried.
    pub stage: String,
    /// Rounds that are over.
    pub rounds: u32,
    /// Pages that were sent.
    pub pages: u64,
    /// Pages that the other node had already, in what a disk stands on.
    #[serde(default)]
    pub found: u64,
    /// Bytes that were sent.
    pub bytes: u64,
    /// Pages that the last round left.
    pub dirty: u64,
    /// The part of its time that the guest has, percent.
    pub share: u32,
    /// Milliseconds from the first byte to the last word.
    #[serde(default)]
    pub took_ms: Option<u64>,
    /// Milliseconds for which the VM ran nowhere.
    #[serde(default)]
    pub downtime_ms: Option<u64>,
    /// Milliseconds for which its memory followed it, where it did.
    #[serde(default)]
    pub pull_ms: Option<u64>,
    /// Pages that have not followed it yet.
    #[serde(default)]
    pub left: u64,
}

/// Whether a part of a VM's memory may follow it. Until all has, it is lost if its source's process
/// ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PostCopy {
    /// In no case.
    #[default]
    Never,
    /// If it writes so fast that it would be slowed down too much.
    Auto,
    /// After the first round.
    Now,
}

impl PostCopy {
    /// Its word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::Auto => "auto",
            Self::Now => "now",
        }
    }
}

/// One VM of a drain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Part {
    /// The VM.
    pub vm: String,
    /// Where to.
    pub to: Option<String>,
    /// The operation that moves it.
    pub operation: Option<String>,
    /// Why it was not moved.
    pub error: Option<Error>,
    /// How long it ran nowhere, milliseconds.
    pub downtime_ms: Option<u64>,
}

/// Work that takes a while.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    /// Its identity, which the user may choose.
    pub id: String,
    /// What is done.
    pub kind: Kind,
    /// The node that does it.
    pub node: String,
    /// The VM that moves.
    pub vm: Option<String>,
    /// Where to.
    pub to: Option<String>,
    /// How it stands.
    pub state: OperationState,
    /// Where a move is.
    pub step: Step,
    /// How far a move is.
    pub progress: Option<Progress>,
    /// What a drain has done.
    pub parts: Vec<Part>,
    /// Why it has not come to its end, or is in doubt.
    pub error: Option<Error>,
    /// When it began, milliseconds since 1970.
    pub begun_ms: u64,
    /// When something of it changed last.
    pub changed_ms: u64,
}

impl Operation {
    /// Whether nothing more will come of it.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.state, OperationState::Done | OperationState::Failed)
    }
}

/// Most connections that a VM moves over at once.
pub const MOST_STREAMS: u8 = 8;

/// A VM is to move.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Migrate {
    /// The operation's identity; the same one twice is the same operation.
    #[serde(default)]
    pub id: Option<String>,
    /// The node that is to have it.
    pub to: String,
    /// How long it may stand still, milliseconds.
    #[serde(default)]
    pub max_downtime_ms: Option<u64>,
    /// Bytes for each second, while it runs.
    #[serde(default)]
    pub bandwidth: Option<u64>,
    /// Over how many connections at once, up to [`MOST_STREAMS`]; over one if it is not said.
    #[serde(default)]
    pub streams: Option<u8>,
    /// Whether a part of its memory may follow it.
    #[serde(default)]
    pub post_copy: PostCopy,
    /// Only ask whether it can go on there.
    #[serde(default)]
    pub dry_run: bool,
}

/// All VMs of a node are to move.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Drain {
    /// The operation's identity; the same one twice is the same operation.
    #[serde(default)]
    pub id: Option<String>,
    /// How many at once.
    #[serde(default)]
    pub at_once: Option<u32>,
}

/// An identity of an operation or VM (RFC 9562, version 4) from 16 random bytes.
#[must_use]
pub fn new_id(mut random: [u8; 16]) -> String {
    random[6] = random[6] & 0x0f | 0x40;
    random[8] = random[8] & 0x3f | 0x80;
    let hex: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default().to_owned();
    [
        part(0, 8),
        part(8, 12),
        part(12, 16),
        part(16, 20),
        part(20, 32),
    ]
    .join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_uuids() {
        assert_eq!(new_id([0xff; 16]), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        assert_eq!(new_id([0; 16]), "00000000-0000-4000-8000-000000000000");
    }

    #[test]
    fn how_far_a_move_is_by_an_older_program_and_by_a_newer_one() {
        let plain = r#"{"stage":"copying","rounds":1,"pages":9,"bytes":5,"dirty":1,"share":100}"#;
        let older: Progress = serde_json::from_str(plain).expect("it is read");
        assert_eq!((older.pages, older.found), (9, 0));
        let more = plain.replace("\"bytes\"", "\"found\":7,\"faults\":2,\"bytes\"");
        let newer: Progress = serde_json::from_str(&more).expect("it is read");
        assert_eq!((newer.pages, newer.found), (9, 7));
    }
}
