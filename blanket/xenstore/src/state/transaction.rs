//! Open transactions, and whether a saved one may be let near the tree.

use std::collections::{BTreeMap, BTreeSet};

use super::error::{RestoreError, place};
use super::restore::{absolute, check_generation, check_quota, permissions};
use super::{ChangeState, TransactionState, WrittenNode};
use crate::node::Node;
use crate::path::Path;
use crate::store::transaction_limits;
use crate::transaction::{Transaction, Tree};
use crate::watch::Change;
use crate::{DomId, Quotas};

pub(super) fn restore_transaction(
    state: TransactionState,
    place: &str,
    domain: DomId,
    tree: &Tree,
    quotas: &Quotas,
) -> Result<Transaction, RestoreError> {
    let (nodes_limit, changes_limit) = transaction_limits(domain, quotas);
    check_quota(place, "nodes", state.seen.len(), nodes_limit)?;
    let mut seen = BTreeMap::new();
    for state in state.seen {
        let path = absolute(&state.path, place)?;
        if let Some(generation) = state.generation {
            let at = || format!("{place}, {}", place::node(&state.path));
            check_generation(generation, tree.generation, at)?;
        }
        if seen.insert(path, state.generation).is_some() {
            return Err(RestoreError::Twice(format!("{place}: {}", state.path)));
        }
    }
    let mut written = BTreeMap::new();
    for state in state.written {
        let path = absolute(&state.path, place)?;
        let node = match state.node {
            Some(node) => Some(restore_written(node, &path, place, tree.generation)?),
            None => None,
        };
        if written.insert(path, node).is_some() {
            return Err(RestoreError::Twice(format!("{place}: {}", state.path)));
        }
    }
    let mut changes: Vec<Change> = Vec::with_capacity(state.changes.len());
    let mut changes_size = 0;
    for state in state.changes {
        let change = restore_change(state, place)?;
        if changes.contains(&change) {
            let path = &change.path;
            return Err(RestoreError::Twice(format!("{place}: change of {path}")));
        }
        changes_size += change.size();
        check_quota(place, "changes", changes_size, changes_limit)?;
        changes.push(change);
    }
    let transaction = Transaction {
        seen,
        written,
        changes,
        changes_size,
    };
    check(&transaction, tree).map_err(|(path, why)| RestoreError::Transaction {
        place: place.to_owned(),
        path: path.to_string(),
        why,
    })?;
    Ok(transaction)
}

fn restore_written(
    state: WrittenNode,
    path: &Path,
    place: &str,
    newest: u64,
) -> Result<Node, RestoreError> {
    let place = format!("{place}, {}", place::node(path.as_str()));
    let mut node = Node::new(permissions(&state.perms, &place)?);
    node.value = state.value;
    node.generation = state.generation;
    if state.generation != 0 {
        check_generation(state.generation, newest, || place.clone())?;
    }
    for name in state.children {
        if !Path::is_name(&name) || path.is_too_long_with(&name) {
            return Err(RestoreError::Name { place, name });
        }
        if !node.children.insert(name.as_str().into()) {
            return Err(RestoreError::Twice(format!("{place}: child {name}")));
        }
    }
    Ok(node)
}

fn restore_change(state: ChangeState, place: &str) -> Result<Change, RestoreError> {
    let place = format!("{place}, change of {}", state.path);
    let path = absolute(&state.path, &place)?;
    let perms = state
        .perms
        .iter()
        .map(|list| permissions(list, &place))
        .collect::<Result<_, _>>()?;
    // A change has one list of permissions, or two: before and after.
    check_quota(&place, "lists of permissions", state.perms.len(), 2)?;
    let removed = match state.removed {
        None => None,
        Some(states) => {
            let mut removed = BTreeMap::new();
            for state in states {
                let below = absolute(&state.path, &place)?;
                let list = permissions(&state.perms, &place)?;
                if !below.is_within(&path) {
                    return Err(RestoreError::Path {
                        place,
                        path: state.path,
                    });
                }
                if removed.insert(below, list).is_some() {
                    return Err(RestoreError::Twice(format!("{place}: {}", state.path)));
                }
            }
            Some(removed)
        }
    };
    Ok(Change {
        path,
        perms,
        removed,
    })
}

/// Whether the transaction can do no harm: either it can never be committed, or
/// committing it leaves every node in a directory that lists it, and nothing else
/// listed. Holds for every transaction that came about by requests.
fn check<'a>(transaction: &'a Transaction, tree: &Tree) -> Result<(), (&'a Path, &'static str)> {
    let root = Path::root();
    for (path, generation) in &transaction.seen {
        if generation.is_none() {
            // Otherwise another client could make the node and its directory, and
            // remove them again, and nobody would know.
            let known = |parent| transaction.seen.contains_key(&parent);
            if !path.parent().is_some_and(known) {
                return Err((path, "was missing, but nobody looked for its directory"));
            }
        }
    }
    for (path, node) in &transaction.written {
        if !transaction.seen.contains_key(path) {
            return Err((path, "was written, but nobody looked at it before"));
        }
        if node.is_none() && *path == root {
            return Err((path, "the root was removed"));
        }
    }
    // Generations only grow: a node that was there and is another one now, or none,
    // will never again be the one that was seen. Such a transaction ends in EAGAIN.
    let current = |path: &Path| tree.get(path).map(|node| node.generation);
    let lost = |(path, seen): (&Path, &Option<u64>)| seen.is_some() && current(path) != *seen;
    if transaction.seen.iter().any(lost) {
        return Ok(());
    }
    for (path, seen) in &transaction.seen {
        if seen.is_none() && current(path).is_some() {
            return Err((
                path,
                "was missing, but is there, and its directory never changed",
            ));
        }
    }
    check_result(transaction, tree)
}

/// Whether the tree holds together once the transaction is committed.
fn check_result<'a>(
    transaction: &'a Transaction,
    tree: &Tree,
) -> Result<(), (&'a Path, &'static str)> {
    let after = |path: &Path| match transaction.written.get(path) {
        Some(node) => node.as_ref(),
        None => tree.get(path),
    };
    let none = BTreeSet::new();
    for (path, node) in &transaction.written {
        let name = path.name();
        let listed = path
            .parent()
            .is_none_or(|parent| after(&parent).is_some_and(|above| above.children.contains(name)));
        if node.is_some() && !listed {
            return Err((path, "was written, but its directory does not list it"));
        }
        if node.is_none() && listed {
            return Err((path, "was removed, but its directory lists it"));
        }
        let new = node.as_ref().map_or(&none, |node| &node.children);
        if new.iter().any(|name| after(&path.child(name)).is_none()) {
            return Err((path, "lists a child that is missing"));
        }
        let old = tree.get(path).map_or(&none, |node| &node.children);
        let stays = |name: &str| after(&path.child(name)).is_some();
        if old.difference(new).any(|name| stays(name)) {
            return Err((path, "does not list a child that is there"));
        }
    }
    Ok(())
}
