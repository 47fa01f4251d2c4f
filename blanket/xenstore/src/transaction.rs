//! Transactions: a private view of the tree that is checked for conflicts when
//! it is committed.
//!
//! A transaction remembers the generation of each node when it first looked at
//! it. It may be committed if none of them has changed since, so that what it
//! read and wrote is what it would have read and written had it run as a whole at
//! the time of the commit.

use std::collections::{BTreeMap, HashMap};

use crate::node::Node;
use crate::path::Path;
use crate::quota::Usage;
use crate::watch::Change;
use crate::{DomId, Errno, Quotas};

/// The nodes, with what each domain has taken of them.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    pub nodes: BTreeMap<Path, Node>,
    usage: HashMap<DomId, Usage>,
    pub generation: u64,
}

impl Tree {
    pub fn get(&self, path: &Path) -> Option<&Node> {
        self.nodes.get(path)
    }

    pub fn usage(&self, domain: DomId) -> Usage {
        self.usage.get(&domain).copied().unwrap_or_default()
    }

    pub fn put(&mut self, path: &Path, mut node: Node) {
        self.generation += 1;
        node.generation = self.generation;
        self.insert(path, node);
    }

    /// Puts a node that has its generation already.
    pub fn insert(&mut self, path: &Path, node: Node) {
        self.charge(path, &node, 1);
        if let Some(old) = self.nodes.insert(path.clone(), node) {
            self.charge(path, &old, -1);
        }
    }

    pub fn remove(&mut self, path: &Path) {
        if let Some(old) = self.nodes.remove(path) {
            self.charge(path, &old, -1);
        }
    }

    fn charge(&mut self, path: &Path, node: &Node, sign: isize) {
        let usage = usage_of(path, node);
        *self.usage.entry(node.owner()).or_default() += if sign < 0 { -usage } else { usage };
    }

    /// What each domain has taken.
    pub fn usages(&self) -> impl Iterator<Item = (DomId, Usage)> {
        self.usage.iter().map(|(domain, usage)| (*domain, *usage))
    }
}

fn usage_of(path: &Path, node: &Node) -> Usage {
    let bytes = node.charge(path.as_str().len());
    Usage {
        nodes: 1,
        bytes: isize::try_from(bytes).unwrap_or(isize::MAX),
    }
}

/// An open transaction.
#[derive(Debug, Default)]
pub(crate) struct Transaction {
    /// Generation of each node when it was first looked at; `None` = absent.
    pub seen: BTreeMap<Path, Option<u64>>,
    /// Nodes written (`None` = removed). Each was looked at before.
    pub written: BTreeMap<Path, Option<Node>>,
    /// To be reported at commit. No two are alike, as the second would say nothing.
    pub changes: Vec<Change>,
    /// Sum of the changes' sizes.
    pub changes_size: usize,
}

impl Transaction {
    /// Applies the transaction, or says `EAGAIN`.
    pub fn commit(self, tree: &mut Tree, quotas: &Quotas) -> Result<Vec<Change>, Errno> {
        let same = |(path, generation): (&Path, &Option<u64>)| {
            tree.get(path).map(|node| node.generation) == *generation
        };
        if !self.seen.iter().all(same) {
            return Err(Errno::Again);
        }
        let mut grown: HashMap<DomId, Usage> = HashMap::new();
        for (path, node) in &self.written {
            if let Some(node) = node {
                *grown.entry(node.owner()).or_default() += usage_of(path, node);
            }
            if let Some(old) = tree.get(path) {
                *grown.entry(old.owner()).or_default() += -usage_of(path, old);
            }
        }
        for (domain, growth) in grown {
            check_quota(domain, tree.usage(domain), growth, quotas)?;
        }
        for (path, node) in self.written {
            match node {
                Some(node) => tree.put(&path, node),
                None => tree.remove(&path),
            }
        }
        Ok(self.changes)
    }
}

fn check_quota(
    domain: DomId,
    mut usage: Usage,
    growth: Usage,
    quotas: &Quotas,
) -> Result<(), Errno> {
    usage += growth;
    let over = |have: isize, limit: usize| isize::try_from(limit).is_ok_and(|limit| have > limit);
    let grows = growth.nodes > 0 || growth.bytes > 0;
    if domain != 0 && grows && (over(usage.nodes, quotas.nodes) || over(usage.bytes, quotas.bytes))
    {
        return Err(Errno::NoSpc);
    }
    Ok(())
}

/// The tree as a request sees it. A request outside of a transaction runs in one
/// of its own, so that it happens as a whole or not at all.
pub(crate) struct View<'a> {
    pub tree: &'a Tree,
    pub transaction: &'a mut Transaction,
    /// Most nodes that the transaction may look at.
    pub limit: usize,
    /// Most changes that it may remember.
    pub changes_limit: usize,
}

impl View<'_> {
    /// A node; looking is remembered. If there is none, so is that there are none
    /// of the directories above it that are missing too: as long as the nearest one
    /// that exists is the same, the node cannot have come into being.
    ///
    /// # Errors
    /// `ENOSPC` over the limit. Then nothing is remembered of it.
    pub fn get(&mut self, path: &Path) -> Result<Option<Node>, Errno> {
        if let Some(written) = self.transaction.written.get(path) {
            return Ok(written.clone());
        }
        let node = self.tree.get(path).cloned();
        let mut new = Vec::new();
        let mut at = Some(path.clone());
        while let Some(place) = at {
            let found = self.tree.get(&place).map(|node| node.generation);
            at = match found {
                Some(_) => None,
                None => place.parent(),
            };
            if !self.transaction.seen.contains_key(&place) {
                new.push((place, found));
            }
        }
        if self.transaction.seen.len() + new.len() > self.limit {
            return Err(Errno::NoSpc);
        }
        self.transaction.seen.extend(new);
        Ok(node)
    }

    /// Whether changes of this many nodes can be noted. Asked before anything is
    /// written, so that a request that fails leaves nothing behind.
    ///
    /// # Errors
    /// `ENOSPC`
    pub fn room_for(&self, changes: usize) -> Result<(), Errno> {
        if self.transaction.changes_size.saturating_add(changes) > self.changes_limit {
            return Err(Errno::NoSpc);
        }
        Ok(())
    }

    /// Writes a node that [`View::get`] has looked at.
    pub fn put(&mut self, path: &Path, node: Node) {
        self.transaction.written.insert(path.clone(), Some(node));
    }

    /// Removes a node that [`View::get`] has looked at.
    pub fn remove(&mut self, path: &Path) {
        self.transaction.written.insert(path.clone(), None);
    }

    /// Notes a change for the watches; [`View::room_for`] was asked before.
    pub fn changed(&mut self, change: Change) {
        let transaction = &mut *self.transaction;
        // From the back: a client that repeats itself mostly repeats its last words.
        if !transaction
            .changes
            .iter()
            .rev()
            .any(|other| *other == change)
        {
            transaction.changes_size += change.size();
            transaction.changes.push(change);
        }
    }
}
