//! Watches and what they report.

use std::collections::{BTreeMap, VecDeque};

use crate::node::{Perm, access};
use crate::path::{Path, Watched};
use crate::{DomId, Quotas};

/// What the client of a watch is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The node that changed, in the form that the watch used.
    pub path: String,
    /// The client's own word for the watch.
    pub token: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Watch {
    pub watched: Watched,
    pub token: Vec<u8>,
}

/// A change of the tree.
#[derive(Clone, Debug)]
pub(crate) struct Change {
    pub path: Path,
    /// Permissions before and after, whichever exist: a client that may read with
    /// any of them learns of the change.
    pub perms: Vec<Vec<Perm>>,
    /// For a removal: the permissions of every node that went, by path.
    pub removed: Option<BTreeMap<Path, Vec<Perm>>>,
}

/// Watches and unread events of one client.
#[derive(Debug, Default)]
pub(crate) struct Watches {
    list: Vec<Watch>,
    events: VecDeque<Event>,
    dropped: u64,
}

impl Watches {
    pub fn len(&self) -> usize {
        self.list.len()
    }

    pub fn contains(&self, watch: &Watch) -> bool {
        self.list.contains(watch)
    }

    /// Adds a watch and its first event, which comes at once.
    pub fn add(&mut self, watch: Watch, domain: DomId, quotas: &Quotas) {
        let path = match &watch.watched {
            Watched::Special(name) => name.to_string(),
            other => other
                .path()
                .map_or_else(String::new, |path| other.report(path, domain)),
        };
        let event = Event {
            path,
            token: watch.token.clone(),
        };
        self.list.push(watch);
        self.push(event, quotas);
    }

    pub fn remove(&mut self, watch: &Watch) -> bool {
        let before = self.list.len();
        self.list.retain(|other| other != watch);
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
            if change.path.is_within(path) {
                if change.perms.iter().any(|perms| access(perms, domain).read) {
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

    /// Tells this client that domains came or went.
    pub fn fire_special(&mut self, name: &str, quotas: &Quotas) {
        let tokens: Vec<_> = self
            .list
            .iter()
            .filter(|watch| matches!(&watch.watched, Watched::Special(n) if **n == *name))
            .map(|watch| watch.token.clone())
            .collect();
        for token in tokens {
            self.push(
                Event {
                    path: name.to_owned(),
                    token,
                },
                quotas,
            );
        }
    }

    /// An event that waits already says all that a second one would.
    fn push(&mut self, event: Event, quotas: &Quotas) {
        if self.events.contains(&event) {
            return;
        }
        if self.events.len() >= quotas.events {
            self.dropped += 1;
            return;
        }
        self.events.push_back(event);
    }
}
