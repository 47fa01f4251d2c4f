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
    nodes: BTreeMap<Path, Node>,
    usage: HashMap<DomId, Usage>,
    generation: u64,
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

    #[cfg(test)]
    pub fn nodes(&self) -> impl Iterator<Item = (&Path, &Node)> {
        self.nodes.iter()
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
    seen: BTreeMap<Path, Option<u64>>,
    /// Nodes written (`None` = removed).
    written: BTreeMap<Path, Option<Node>>,
    /// To be reported at commit.
    changes: Vec<Change>,
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
}

impl View<'_> {
    /// A node; looking is remembered.
    pub fn get(&mut self, path: &Path) -> Result<Option<Node>, Errno> {
        if let Some(written) = self.transaction.written.get(path) {
            return Ok(written.clone());
        }
        let node = self.tree.get(path);
        if !self.transaction.seen.contains_key(path) {
            if self.transaction.seen.len() >= self.limit {
                return Err(Errno::NoSpc);
            }
            self.transaction
                .seen
                .insert(path.clone(), node.map(|node| node.generation));
        }
        Ok(node.cloned())
    }

    /// Writes a node that [`View::get`] has looked at.
    pub fn put(&mut self, path: &Path, node: Node) {
        self.transaction.written.insert(path.clone(), Some(node));
    }

    /// Removes a node that [`View::get`] has looked at.
    pub fn remove(&mut self, path: &Path) {
        self.transaction.written.insert(path.clone(), None);
    }

    /// Notes a change for the watches.
    pub fn changed(&mut self, change: Change) {
        self.transaction.changes.push(change);
    }
}
