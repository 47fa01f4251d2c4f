//! What a walk of a VM's page tables found, with names.

use std::fmt;

use blanket_abi::device::{Audit, audit};
use serde::{Deserialize, Serialize};

/// The result of an audit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Guest roots that the core keeps.
    pub roots: u64,
    /// Roots that vCPUs use at the moment.
    pub loaded_roots: u64,
    /// Tables below the roots, outside of the hypervisor's part.
    pub tables: u64,
    /// Pages mapped by them, each time that one is.
    pub leaves: u64,
    /// Those that can be written.
    pub writable: u64,
    /// Pages mapped in the hypervisor's part.
    pub own_leaves: u64,
    /// Of these, those in the roots of an isolated guest; 0 for other guests.
    pub entry_area: u64,
    /// Pages that the host has taken back, and whose leaves go before the VM runs on.
    pub taken: u64,
    /// Frames of the guest that the host has given.
    pub frames: u64,
    /// Entries that break a rule.
    pub broken: u64,
    /// The first of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first: Option<First>,
}

/// An entry that breaks a rule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct First {
    /// The rule.
    pub rule: String,
    /// Level of the table.
    pub level: u32,
    /// First address that the entry translates.
    pub va: u64,
    /// Its bits, without those of the frame.
    pub entry: u64,
}

fn rule(number: u32) -> &'static str {
    match number {
        audit::FOREIGN => "a guest's page is not a frame of this VM",
        audit::TABLE => "a page that is no table is used as one",
        audit::ABSENT => "an entry that is not present is not zero",
        audit::BITS => "an entry has bits that none may have",
        audit::RIGHTS => "an entry allows what its place must not",
        audit::HOLE => "a root has other hypervisor's slots than this VM's",
        audit::WINDOW => "a window entry is not the owner's frame",
        audit::OWN => "a page of the hypervisor's part is in the wrong place",
        audit::M2P => "the identity table is not the identity",
        audit::ROOT => "a vCPU uses a root that is none",
        audit::TRANSITION => "a root of the world switch holds too much",
        _ => "a rule of another version",
    }
}

impl From<Audit> for Report {
    fn from(raw: Audit) -> Self {
        Self {
            roots: raw.roots,
            loaded_roots: raw.loaded,
            tables: raw.tables,
            leaves: raw.leaves,
            writable: raw.writable,
            own_leaves: raw.own,
            entry_area: raw.entry_area,
            taken: raw.taken,
            frames: raw.frames,
            broken: raw.broken,
            first: (raw.broken > 0).then(|| First {
                rule: rule(raw.rule).into(),
                level: raw.level,
                va: raw.va,
                entry: raw.entry,
            }),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} roots ({} in use), {} tables, {} pages mapped for the guest ({} writable), \
             {} for the hypervisor, {} frames",
            self.roots,
            self.loaded_roots,
            self.tables,
            self.leaves,
            self.writable,
            self.own_leaves,
            self.frames
        )?;
        if self.entry_area > 0 {
            writeln!(
                f,
                "isolated: the guest's roots show {} pages of the hypervisor",
                self.entry_area
            )?;
        }
        match &self.first {
            None => writeln!(f, "no entry maps what it must not"),
            Some(first) => writeln!(
                f,
                "{} ENTRIES BREAK A RULE; the first, for {:#018x} at level {}, with bits {:#x}: {}",
                self.broken, first.va, first.level, first.entry, first.rule
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_has_its_sentence() {
        let sentences: std::collections::BTreeSet<_> =
            (audit::FOREIGN..=audit::TRANSITION).map(rule).collect();
        assert_eq!(sentences.len(), audit::TRANSITION as usize);
        let report = Report::from(Audit {
            broken: 3,
            rule: audit::FOREIGN,
            va: 0x1000,
            ..Audit::default()
        });
        let text = report.to_string();
        assert!(
            text.contains("3 ENTRIES") && text.contains("not a frame"),
            "{text}"
        );
        let json = serde_json::to_string(&report).expect("plain data");
        let again: Report = serde_json::from_str(&json).expect("the same");
        assert_eq!(again, report);
        assert!(Report::default().to_string().contains("no entry maps"));
    }
}
