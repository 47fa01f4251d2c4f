//! GRUB's configuration: the language, an interpreter for it, the environment block.

mod command;
pub mod env;
pub mod eval;
pub mod parse;
mod test_command;
#[cfg(test)]
mod tests;

use std::io;

use crate::fs::Kind;

/// A file on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// GRUB's name, such as `hd0,gpt2`.
    pub device: String,
    /// Absolute path.
    pub path: String,
    /// On btrfs the path starts in the default subvolume, not at the top level.
    pub relative: bool,
}

/// What `search` looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Search<'a> {
    /// A file system's UUID.
    Uuid(&'a str),
    /// A file system's label.
    Label(&'a str),
    /// A partition's UUID.
    Partition(&'a str),
    /// A file that is there.
    File(&'a str),
}

/// The disk as GRUB sees it.
pub trait World {
    /// What is at `place`, after links.
    fn kind(&mut self, place: &Place) -> io::Result<Kind>;
    /// The file at `place`, of at most `limit` bytes.
    fn read(&mut self, place: &Place, limit: u64) -> io::Result<Vec<u8>>;
    /// Names in the directory at `place`, sorted.
    fn list(&mut self, place: &Place) -> io::Result<Vec<String>>;
    /// The device that has what is looked for; `relative` as in [`Place`].
    fn search(&mut self, what: Search<'_>, relative: bool) -> Option<String>;
    /// UUID, label and name of the file system on `device`.
    fn describe(&mut self, device: &str) -> Option<(String, String, &'static str)>;
}
