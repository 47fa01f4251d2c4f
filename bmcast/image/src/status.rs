//! What a machine tells the server about its installation.

use alloc::string::String;
use core::fmt;

use crate::Hash;

/// What a machine does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineState {
    /// Chunks are still to come.
    Streaming,
    /// All have come, and some are still to be written.
    Installing,
    /// All is on the disk, and the VMM is gone, or is about to be.
    DeVirtualized,
}

impl MachineState {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Streaming, Self::Installing, Self::DeVirtualized];

    /// As it is sent.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Streaming => "streaming",
            Self::Installing => "installing",
            Self::DeVirtualized => "de-virtualized",
        }
    }
}

/// What a machine tells the server. Its text is JSON, the body of `PUT /machines/NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineStatus {
    /// The machine's name, [`is_machine_name`].
    pub machine: String,
    /// The image that it becomes.
    pub manifest: Hash,
    /// What it does.
    pub state: MachineState,
    /// Sectors of the image.
    pub sectors: u64,
    /// Those that are not on the disk yet.
    pub sectors_left: u64,
    /// Bytes that were fetched.
    pub fetched_bytes: u64,
    /// Bytes of the image that were written.
    pub written_bytes: u64,
    /// Chunks that the guest waited for.
    pub demand_chunks: u64,
    /// Chunks that nobody waited for.
    pub background_chunks: u64,
    /// Chunks that were not what the manifest says.
    pub wrong_chunks: u64,
    /// Bytes per second that are fetched.
    pub rate: u64,
    /// What does not work, if something does not.
    pub error: Option<String>,
}

impl fmt::Display for MachineStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{\"machine\":")?;
        text(f, &self.machine)?;
        write!(f, ",\"manifest\":\"{}\"", self.manifest)?;
        write!(f, ",\"state\":\"{}\"", self.state.name())?;
        for (key, number) in [
            ("sectors", self.sectors),
            ("sectors_left", self.sectors_left),
            ("fetched_bytes", self.fetched_bytes),
            ("written_bytes", self.written_bytes),
            ("demand_chunks", self.demand_chunks),
            ("background_chunks", self.background_chunks),
            ("wrong_chunks", self.wrong_chunks),
            ("rate", self.rate),
        ] {
            write!(f, ",\"{key}\":{number}")?;
        }
        f.write_str(",\"error\":")?;
        match &self.error {
            Some(error) => text(f, error)?,
            None => f.write_str("null")?,
        }
        f.write_str("}")
    }
}

/// A string of JSON (RFC 8259, section 7).
fn text(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    f.write_str("\"")?;
    for character in text.chars() {
        match character {
            '"' | '\\' => write!(f, "\\{character}")?,
            '\0'..='\x1f' => write!(f, "\\u{:04x}", u32::from(character))?,
            _ => f.write_str(character.encode_utf8(&mut [0; 4]))?,
        }
    }
    f.write_str("\"")
}

/// Whether a machine can have this name, which is part of a URL: 1 to 64 letters, digits, `-`, `_`,
/// `.` and `:`, the first of which is no `.`.
#[must_use]
pub fn is_machine_name(name: &str) -> bool {
    let letters = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
    (1..=64).contains(&name.len()) && name.bytes().all(letters) && !name.starts_with('.')
}

/// The name of a machine that was given none: its card's address.
#[must_use]
pub fn machine_name_of_mac(mac: [u8; 6]) -> String {
    let [a, b, c, d, e, f] = mac;
    alloc::format!("{a:02x}-{b:02x}-{c:02x}-{d:02x}-{e:02x}-{f:02x}")
}

#[cfg(test)]
mod tests {
    use alloc::string::ToString as _;

    use super::*;

    #[test]
    fn names() {
        assert!(is_machine_name("rack-1.a_b"));
        assert!(is_machine_name(&machine_name_of_mac([0, 1, 2, 0xab, 4, 5])));
        for wrong in ["", ".", "..", "a/b", "a b", "é", &"a".repeat(65)] {
            assert!(!is_machine_name(wrong), "{wrong}");
        }
    }

    #[test]
    fn strings_are_escaped() {
        let status = MachineStatus {
            machine: "a".into(),
            manifest: Hash([0xab; 32]),
            state: MachineState::DeVirtualized,
            sectors: 1,
            sectors_left: 2,
            fetched_bytes: 3,
            written_bytes: 4,
            demand_chunks: 5,
            background_chunks: 6,
            wrong_chunks: 7,
            rate: 8,
            error: Some("a \"disk\"\n\\ é".into()),
        };
        let text = status.to_string();
        assert!(
            text.starts_with("{\"machine\":\"a\",\"manifest\":\"abab"),
            "{text}"
        );
        assert!(
            text.contains(",\"state\":\"de-virtualized\",\"sectors\":1,"),
            "{text}"
        );
        assert!(
            text.ends_with(",\"error\":\"a \\\"disk\\\"\\u000a\\\\ é\"}"),
            "{text}"
        );
    }
}
