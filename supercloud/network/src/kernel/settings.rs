//! Files under `/proc/sys/net`, of the network namespace of who opens them.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

/// What those that are there have.
pub fn read<'a>(paths: impl Iterator<Item = &'a String>) -> BTreeMap<String, String> {
    paths
        .filter_map(|path| {
            let value = std::fs::read_to_string(file(path)).ok()?;
            Some((path.clone(), value.trim().to_owned()))
        })
        .collect()
}

/// Sets one. A kernel without IPv6 has none of its settings, and needs none.
pub fn write(path: &str, value: &str) -> io::Result<()> {
    match std::fs::write(file(path), value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.starts_with("ipv6/") => {
            Ok(())
        }
        done => done,
    }
}

fn file(path: &str) -> PathBuf {
    // The namespace of the thread, not of the process's first.
    PathBuf::from("/proc/sys/net").join(path)
}
