//! Watches and what they report.

use std::collections::{BTreeMap, VecDeque};

use crate::node::{Perm, access};
use crate::path::{Path, Watched};
use crate::wire::PAYLOAD_MAX;
use crate::{DomId, Quotas};

/// What the client of a watch is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The node that changed, in the form that the watch used.
    pub path: String,
    /// The client's own word for the watch.
    pub token: Vec<u8>,
}

impl Event {
    /// Whether a message can carry it; one that is too long is not sent, as the
    /// client could not take it.
    pub(crate) fn fits(&self) -> bool {
        self.path.len() + self.token.len() + 2 <= PAYLOAD_MAX
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Watch {
    pub watched: Watched,
    pub token: Vec<u8>,
    /// Most levels below the node that are looked at; all if there is no limit.
    pub depth: Option<u32>,
}

impl Watch {
    /// Whether a client would name both alike in UNWATCH.
    pub fn is_same(&self, other: &Self) -> bool {
        self.watched.is_same(&other.watched) && self.token == other.token
    }

    /// Whether a change of a node is reported to it.
    pub fn sees(&self, path: &Path) -> bool {
        let levels = self.watched.path().and_then(|own| path.levels_below(own));
        levels.is_some_and(|levels| self.reaches(levels))
    }

    fn reaches(&self, levels: usize) -> bool {
        self.depth
            .is_none_or(|depth| usize::try_from(depth).is_ok_and(|depth| levels <= depth))
    }
}

/// A change of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub path: Path,
    /// Permissions before and after, whichever exist: a client that may read with
    /// any of them learns of the change.
    pub perms: Vec<Vec<Perm>>,
    /// For a removal: the permissions of every node that went, by path.
    pub removed: Option<BTreeMap<Path, Vec<Perm>>>,
}

impl Change {
    /// How many nodes it tells of.
    pub fn size(&self) -> usize {
        self.removed
            .as_ref()
            .map_or(1, |removed| removed.len().max(1))
    }
}

/// Watches and unread events of one client.
#[derive(Debug, Default)]
pub(crate) struct Watches {
    pub list: Vec<Watch>,
    pub events: VecDeque<Event>,
    /// Events that were lost, for who looks with a debugger.
    pub dropped: u64,
}

impl Watches {
    pub fn len(&self) -> usize {
        self.list.len()
    }

    pub fn contains(&self, watch: &Watch) -> bool {
        self.list.iter().any(|other| other.is_same(watch))
    }

    /// Adds a watch and its first event, which comes at once.
    pub fn add(&mut self, watch: Watch, domain: DomId, quotas: &Quotas) {
        let event = Event {
            path: watch.watched.text(domain),
            token: watch.token.clone(),
        };
        self.list.push(watch);
        self.push(event, quotas);
    }

    pub fn remove(&mut self, watch: &Watch) -> bool {
        let before = self.list.len();
        self.list.retain(|other| !other.is_same(watch));
        self.list.len() != before
    }

    pub fn clear(&mut self) {
        self.list.clear();
        self.events.clear();
    }

    pub fn next(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    pub fn waiting(&self) -> bool {
        !self.events.is_empty()
    }

    /// Tells this client of a change, as far as it watches and may read.
    pub fn fire(&mut self, change: &Change, domain: DomId, quotas: &Quotas) {
        let mut found = Vec::new();
        for watch in &self.list {
            let Some(path) = watch.watched.path() else {
                continue;
            };
            if let Some(levels) = change.path.levels_below(path) {
                if watch.reaches(levels)
                    && change.perms.iter().any(|perms| access(perms, domain).read)
                {
                    found.push(Event {
                        path: watch.watched.report(&change.path, domain),
                        token: watch.token.clone(),
                    });
                }
            } else if let Some(removed) = &change.removed
                && path.is_within(&change.path)
            {
                let readable = match removed.get(path) {
                    Some(perms) => access(perms, domain).read,
                    None => change.perms.iter().any(|perms| access(perms, domain).read),
                };
                if readable {
                    found.push(Event {
                        path: watch.watched.report(path, domain),
                        token: watch.token.clone(),
                    });
                }
            }
        }
        for event in found {
            self.push(event, quotas);
        }
    }

    /// Tells this client that a domain came or went. Who watches with a depth is
    /// told which.
    pub fn fire_special(&mut self, name: &str, domain: DomId, quotas: &Quotas) {
        let full = format!("{name}/{domain}");
        let mut found = Vec::new();
        for watch in &self.list {
            let Watched::Special(watched) = &watch.watched else {
                continue;
            };
            let path = match &**watched {
                one if *one == full => &full,
                all if all == name && watch.depth.is_some_and(|depth| depth > 0) => &full,
                all if all == name => name,
                _ => continue,
            };
            found.push(Event {
                path: path.to_owned(),
                token: watch.token.clone(),
            });
        }
        for event in found {
            self.push(event, quotas);
        }
    }

    /// An event that waits already says all that a second one would.
    fn push(&mut self, event: Event, quotas: &Quotas) {
        if self.events.contains(&event) {
            return;
        }
        if !event.fits() || self.events.len() >= quotas.events {
            self.dropped += 1;
            return;
        }
        self.events.push_back(event);
    }
}
