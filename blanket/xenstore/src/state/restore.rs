//! From a state to a store, if the state could have come from one.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::error::{OUTPUT_MOST, RestoreError, place};
use super::transaction::restore_transaction;
use super::{ClientState, ConnectionState, EventState, NodeState, StoreState, VERSION, WatchState};
use crate::node::{Node, Perm};
use crate::path::{Path, Watched, is_special};
use crate::store::Client;
use crate::transaction::Tree;
use crate::watch::{Event, Watch, Watches};
use crate::wire::{HEADER, Header, PAYLOAD_MAX};
use crate::{ConnId, Connection, DomId, Quotas, Store, TxId};

/// Half of the numbers: a tree that changes a million times a second needs 300,000
/// years to get there, and then there is as much room again.
const GENERATION_MOST: u64 = u64::MAX / 2;

impl Store {
    /// A store as it was when it was saved, with these quotas from now on.
    ///
    /// # Errors
    /// The state was not saved by a store of this version, or a domain in it has more
    /// than the quotas allow. The error names the place.
    pub fn restore(state: StoreState, quotas: Quotas) -> Result<Self, RestoreError> {
        check_version(state.version)?;
        if state.next_client == 0 {
            return Err(RestoreError::Zero("the next client".to_owned()));
        }
        let tree = restore_tree(state.nodes, state.generation)?;
        check_usage(&tree, &quotas)?;
        let mut clients = BTreeMap::new();
        for client in state.clients {
            let number = client.number;
            let place = place::client(number, client.domain);
            if number == 0 {
                return Err(RestoreError::Zero(place));
            }
            let client = restore_client(client, &place, &tree, &quotas)?;
            if clients.insert(ConnId::of(number), client).is_some() {
                return Err(RestoreError::Twice(place));
            }
        }
        Ok(Self {
            tree,
            clients,
            next_client: state.next_client,
            quotas,
            // Whoever waited is gone.
            awaited: BTreeSet::new(),
        })
    }
}

impl Connection {
    /// A connection as it was when it was saved, of a client of the restored store.
    ///
    /// # Errors
    /// The store has no such client, or the bytes cannot have come about.
    pub fn restore(state: ConnectionState, store: &Store) -> Result<Self, RestoreError> {
        check_version(state.version)?;
        let client = state.client;
        let conn = store
            .client_by_number(client)
            .ok_or(RestoreError::Client(client))?;
        let length = state.input.len();
        // A message that is complete has been carried out. One that announces too
        // much is left as it is: the stream is lost, and stays so.
        let fits = match state.input.first_chunk::<HEADER>() {
            None => true,
            Some(bytes) => match usize::try_from(Header::decode(*bytes).length) {
                Ok(payload) if payload <= PAYLOAD_MAX => length < HEADER + payload,
                _ => length == HEADER,
            },
        };
        if !fits {
            return Err(RestoreError::Input { client, length });
        }
        let length = state.output.len();
        if length > OUTPUT_MOST {
            return Err(RestoreError::Output {
                client,
                length,
                limit: OUTPUT_MOST,
            });
        }
        Ok(Self {
            conn,
            input: state.input,
            output: state.output.into(),
        })
    }
}

fn check_version(version: u32) -> Result<(), RestoreError> {
    if version == VERSION {
        Ok(())
    } else {
        Err(RestoreError::Version(version))
    }
}

/// An absolute path.
pub(super) fn absolute(text: &str, place: &str) -> Result<Path, RestoreError> {
    if text.starts_with('/')
        && let Ok(path) = Path::parse(text, 0)
    {
        return Ok(path);
    }
    Err(RestoreError::Path {
        place: place.to_owned(),
        path: text.to_owned(),
    })
}

pub(super) fn permissions(entries: &[String], place: &str) -> Result<Vec<Perm>, RestoreError> {
    if entries.is_empty() {
        return Err(RestoreError::NoPerms(place.to_owned()));
    }
    let one = |entry: &String| {
        Perm::parse(entry).map_err(|_| RestoreError::Perm {
            place: place.to_owned(),
            entry: entry.clone(),
        })
    };
    entries.iter().map(one).collect()
}

pub(super) fn check_generation(
    found: u64,
    newest: u64,
    place: impl FnOnce() -> String,
) -> Result<(), RestoreError> {
    if (1..=newest).contains(&found) {
        return Ok(());
    }
    Err(RestoreError::Generation {
        place: place(),
        found,
        newest,
    })
}

pub(super) fn check_quota(
    place: &str,
    what: &'static str,
    found: usize,
    limit: usize,
) -> Result<(), RestoreError> {
    if found <= limit {
        return Ok(());
    }
    Err(RestoreError::Quota {
        place: place.to_owned(),
        what,
        found,
        limit,
    })
}

fn restore_tree(states: Vec<NodeState>, generation: u64) -> Result<Tree, RestoreError> {
    if generation > GENERATION_MOST {
        return Err(RestoreError::Counter("the tree's generation"));
    }
    let mut nodes = BTreeMap::new();
    for state in states {
        let place = place::node(&state.path);
        let path = absolute(&state.path, &place)?;
        check_generation(state.generation, generation, || place.clone())?;
        let mut node = Node::new(permissions(&state.perms, &place)?);
        node.value = state.value;
        node.generation = state.generation;
        if nodes.insert(path, node).is_some() {
            return Err(RestoreError::Twice(place));
        }
    }
    if !nodes.contains_key(&Path::root()) {
        return Err(RestoreError::NoRoot);
    }
    let children: Vec<_> = nodes
        .keys()
        .filter_map(|path| Some((path.parent()?, path.clone())))
        .collect();
    for (parent, path) in children {
        let directory = nodes
            .get_mut(&parent)
            .ok_or_else(|| RestoreError::Orphan(path.to_string()))?;
        directory.children.insert(path.name().into());
    }
    let mut tree = Tree::default();
    tree.generation = generation;
    for (path, node) in nodes {
        tree.insert(&path, node);
    }
    Ok(tree)
}

fn check_usage(tree: &Tree, quotas: &Quotas) -> Result<(), RestoreError> {
    for (domain, usage) in tree.usages().filter(|(domain, _)| *domain != 0) {
        let place = format!("domain {domain}");
        for (what, found, limit) in [
            ("nodes", usage.nodes, quotas.nodes),
            ("bytes of nodes", usage.bytes, quotas.bytes),
        ] {
            let found = usize::try_from(found).unwrap_or(0);
            check_quota(&place, what, found, limit)?;
        }
    }
    Ok(())
}

fn restore_client(
    state: ClientState,
    place: &str,
    tree: &Tree,
    quotas: &Quotas,
) -> Result<Client, RestoreError> {
    let (domain, number) = (state.domain, state.number);
    if state.next_transaction == 0 {
        return Err(RestoreError::Zero(format!("{place}: the next transaction")));
    }
    if domain != 0 {
        let (open, watches) = (state.transactions.len(), state.watches.len());
        check_quota(place, "watches", watches, quotas.watches)?;
        check_quota(place, "open transactions", open, quotas.transactions)?;
    }
    let watches = Watches {
        list: restore_watches(state.watches, place, domain)?,
        events: restore_events(state.events, place, domain, quotas)?,
        dropped: state.dropped,
    };
    let mut transactions = BTreeMap::new();
    for transaction in state.transactions {
        let id = transaction.number;
        let place = place::transaction(number, id);
        if id == 0 {
            return Err(RestoreError::Zero(place));
        }
        let transaction = restore_transaction(transaction, &place, domain, tree, quotas)?;
        if transactions.insert(TxId(id), transaction).is_some() {
            return Err(RestoreError::Twice(place));
        }
    }
    Ok(Client {
        domain,
        watches,
        transactions,
        next_transaction: state.next_transaction,
    })
}

fn restore_watches(
    states: Vec<WatchState>,
    place: &str,
    domain: DomId,
) -> Result<Vec<Watch>, RestoreError> {
    let mut list: Vec<Watch> = Vec::with_capacity(states.len());
    for state in states {
        let place = format!("{place}, watch of {}", state.path);
        let watched = Watched::parse(&state.path, domain).map_err(|_| RestoreError::Path {
            place: place.clone(),
            path: state.path.clone(),
        })?;
        check_token(&state.path, &state.token, &place)?;
        let watch = Watch {
            watched,
            token: state.token,
            depth: state.depth,
        };
        if list.iter().any(|other| other.is_same(&watch)) {
            return Err(RestoreError::Twice(place));
        }
        list.push(watch);
    }
    Ok(list)
}

fn restore_events(
    states: Vec<EventState>,
    place: &str,
    domain: DomId,
    quotas: &Quotas,
) -> Result<VecDeque<Event>, RestoreError> {
    check_quota(place, "waiting events", states.len(), quotas.events)?;
    let mut events = VecDeque::with_capacity(states.len());
    for state in states {
        let place = format!("{place}, event of {}", state.path);
        if !is_reportable(&state.path, domain) {
            return Err(RestoreError::Path {
                place,
                path: state.path,
            });
        }
        check_token(&state.path, &state.token, &place)?;
        let event = Event {
            path: state.path,
            token: state.token,
        };
        if events.contains(&event) {
            return Err(RestoreError::Twice(place));
        }
        events.push_back(event);
    }
    Ok(events)
}

/// Whether an event can tell of this path. A relative one may be longer than one
/// that a request may name, as it may lie far below the watch.
fn is_reportable(text: &str, domain: DomId) -> bool {
    is_special(text)
        || if text.starts_with('/') {
            Path::parse(text, domain).is_ok()
        } else {
            !text.starts_with('@')
                && Path::parse(&format!("{}/{text}", Path::home(domain)), domain).is_ok()
        }
}

fn check_token(path: &str, token: &[u8], place: &str) -> Result<(), RestoreError> {
    if token.contains(&0) || path.len() + token.len() + 2 > PAYLOAD_MAX {
        return Err(RestoreError::Token {
            place: place.to_owned(),
        });
    }
    Ok(())
}
