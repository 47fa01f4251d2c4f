//! The store: the tree, its clients, and what each of them may do.

use std::collections::{BTreeMap, BTreeSet};

use crate::node::{Node, Perm};
use crate::path::{Path, Watched};
use crate::transaction::{Transaction, Tree, View};
use crate::watch::{Change, Event, Watch, Watches};
use crate::wire::PAYLOAD_MAX;
use crate::{Access, Errno, Quotas, ops};

/// A domain's number.
pub type DomId = u16;

/// A client of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnId(u32);

impl ConnId {
    pub(crate) const fn of(number: u32) -> Self {
        Self(number)
    }

    /// Its number, by which a saved state names it.
    #[must_use]
    pub const fn number(self) -> u32 {
        self.0
    }
}

/// A transaction of a client; never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TxId(pub u32);

#[derive(Debug)]
pub(crate) struct Client {
    pub domain: DomId,
    pub watches: Watches,
    pub transactions: BTreeMap<TxId, Transaction>,
    /// Where the search for a free number begins; never 0.
    pub next_transaction: u32,
}

/// The tree and its clients. Every request names its client; domain 0 may do
/// everything.
#[derive(Debug)]
pub struct Store {
    pub(crate) tree: Tree,
    pub(crate) clients: BTreeMap<ConnId, Client>,
    /// Where the search for a free number begins; never 0.
    pub(crate) next_client: u32,
    pub(crate) quotas: Quotas,
    /// Nodes that a client was told of, and has not looked at since.
    pub(crate) awaited: BTreeSet<(ConnId, Path)>,
}

impl Default for Store {
    fn default() -> Self {
        Self::new(Quotas::default())
    }
}

impl Store {
    /// An empty tree. Its root belongs to domain 0 and everyone may list it.
    #[must_use]
    pub fn new(quotas: Quotas) -> Self {
        let mut tree = Tree::default();
        tree.put(&Path::root(), Node::new(vec![Perm::new(0, Access::READ)]));
        Self {
            tree,
            clients: BTreeMap::new(),
            next_client: 1,
            quotas,
            awaited: BTreeSet::new(),
        }
    }

    /// Adds a client of a domain.
    pub fn connect(&mut self, domain: DomId) -> ConnId {
        let mut id = ConnId(self.next_client);
        while self.clients.contains_key(&id) {
            id = ConnId(following(id.0));
        }
        self.next_client = following(id.0);
        let client = Client {
            domain,
            watches: Watches::default(),
            transactions: BTreeMap::new(),
            next_transaction: 1,
        };
        self.clients.insert(id, client);
        id
    }

    /// Forgets a client, its watches and its open transactions.
    pub fn disconnect(&mut self, conn: ConnId) {
        self.clients.remove(&conn);
    }

    /// All clients with their domains, by number.
    pub fn clients(&self) -> impl Iterator<Item = (ConnId, DomId)> {
        self.clients.iter().map(|(id, client)| (*id, client.domain))
    }

    /// The client with this number; to find one's own again in a restored store.
    #[must_use]
    pub fn client_by_number(&self, number: u32) -> Option<ConnId> {
        let id = ConnId(number);
        self.clients.contains_key(&id).then_some(id)
    }

    /// The domain of a client.
    #[must_use]
    pub fn domain(&self, conn: ConnId) -> Option<DomId> {
        self.clients.get(&conn).map(|client| client.domain)
    }

    /// The value of a node.
    ///
    /// # Errors
    /// `ENOENT`, `EACCES`; `ENOENT` also for an unknown transaction, as all requests.
    pub fn read(&mut self, conn: ConnId, tx: Option<TxId>, path: &Path) -> Result<Vec<u8>, Errno> {
        self.request(conn, tx, |view, domain, _| ops::read(view, domain, path))
    }

    /// Names of a node's children, and a number that changes when they do.
    ///
    /// # Errors
    /// `ENOENT`, `EACCES`.
    pub fn directory(
        &mut self,
        conn: ConnId,
        tx: Option<TxId>,
        path: &Path,
    ) -> Result<(Vec<Box<str>>, u64), Errno> {
        if !self.awaited.is_empty() {
            self.awaited.remove(&(conn, path.clone()));
        }
        self.request(conn, tx, |view, domain, _| {
            ops::directory(view, domain, path)
        })
    }

    /// Sets a value; makes the node and its directories if they are missing.
    ///
    /// # Errors
    /// `EACCES`; `ENOSPC` over a quota.
    pub fn write(
        &mut self,
        conn: ConnId,
        tx: Option<TxId>,
        path: &Path,
        value: &[u8],
    ) -> Result<(), Errno> {
        self.request(conn, tx, |view, domain, quotas| {
            ops::write(view, domain, path, value, quotas)
        })
    }

    /// Makes a node without a value, unless it exists.
    ///
    /// # Errors
    /// `EACCES`; `ENOSPC` over a quota.
    pub fn mkdir(&mut self, conn: ConnId, tx: Option<TxId>, path: &Path) -> Result<(), Errno> {
        self.request(conn, tx, |view, domain, _| ops::mkdir(view, domain, path))
    }

    /// Removes a node and all below it; succeeds too if only its directory exists.
    ///
    /// # Errors
    /// `ENOENT`, `EACCES`; `EINVAL` for the root.
    pub fn remove(&mut self, conn: ConnId, tx: Option<TxId>, path: &Path) -> Result<(), Errno> {
        self.request(conn, tx, |view, domain, _| ops::remove(view, domain, path))
    }

    /// Permissions of a node.
    ///
    /// # Errors
    /// `ENOENT`, `EACCES`.
    pub fn get_perms(
        &mut self,
        conn: ConnId,
        tx: Option<TxId>,
        path: &Path,
    ) -> Result<Vec<Perm>, Errno> {
        self.request(conn, tx, |view, domain, _| {
            ops::get_perms(view, domain, path)
        })
    }

    /// Sets the permissions of a node that the client's domain owns.
    ///
    /// # Errors
    /// `ENOENT`, `EACCES`; `EPERM` for giving it away; `EINVAL` for no entry.
    pub fn set_perms(
        &mut self,
        conn: ConnId,
        tx: Option<TxId>,
        path: &Path,
        perms: &[Perm],
    ) -> Result<(), Errno> {
        self.request(conn, tx, |view, domain, quotas| {
            ops::set_perms(view, domain, path, perms, quotas)
        })
    }

    /// Adds a watch; its first event comes at once.
    ///
    /// # Errors
    /// `EEXIST` if the client has it already, `EINVAL` for the path or the token,
    /// `E2BIG` over a quota.
    pub fn watch(&mut self, conn: ConnId, path: &str, token: &[u8]) -> Result<(), Errno> {
        self.watch_levels(conn, path, token, None)
    }

    /// Adds a watch that looks at most `depth` levels below its node: 0 for the node
    /// alone, 1 for its children too.
    ///
    /// # Errors
    /// As [`Store::watch`].
    pub fn watch_levels(
        &mut self,
        conn: ConnId,
        path: &str,
        token: &[u8],
        depth: Option<u32>,
    ) -> Result<(), Errno> {
        let quotas = self.quotas;
        let client = self.client(conn)?;
        let domain = client.domain;
        let watch = Watch {
            watched: Watched::parse(path, domain)?,
            token: token.to_vec(),
            depth,
        };
        // An event must be able to carry both.
        if token.contains(&0) || path.len() + token.len() + 2 > PAYLOAD_MAX {
            return Err(Errno::Inval);
        }
        if client.watches.contains(&watch) {
            return Err(Errno::Exist);
        }
        if domain != 0 && client.watches.len() >= quotas.watches {
            return Err(Errno::TooBig);
        }
        client.watches.add(watch, domain, &quotas);
        Ok(())
    }

    /// Removes a watch.
    ///
    /// # Errors
    /// `ENOENT` if the client has none like it, `EINVAL` for the path.
    pub fn unwatch(&mut self, conn: ConnId, path: &str, token: &[u8]) -> Result<(), Errno> {
        let client = self.client(conn)?;
        let watched = Watched::parse(path, client.domain)?;
        let watch = Watch {
            watched,
            token: token.to_vec(),
            depth: None,
        };
        if client.watches.remove(&watch) {
            Ok(())
        } else {
            Err(Errno::NoEnt)
        }
    }

    /// Removes all watches and open transactions of a client.
    ///
    /// # Errors
    /// `EIO` for an unknown client.
    pub fn reset_watches(&mut self, conn: ConnId) -> Result<(), Errno> {
        let client = self.client(conn)?;
        client.watches.clear();
        client.transactions.clear();
        Ok(())
    }

    /// Begins a transaction.
    ///
    /// # Errors
    /// `ENOSPC` if the client has too many open.
    pub fn begin(&mut self, conn: ConnId) -> Result<TxId, Errno> {
        let limit = self.quotas.transactions;
        let client = self.client(conn)?;
        if client.domain != 0 && client.transactions.len() >= limit {
            return Err(Errno::NoSpc);
        }
        // Numbers may wrap around in a client's life; an open one is not reused.
        loop {
            let id = TxId(client.next_transaction);
            client.next_transaction = following(client.next_transaction);
            if let std::collections::btree_map::Entry::Vacant(entry) = client.transactions.entry(id)
            {
                entry.insert(Transaction::default());
                return Ok(id);
            }
        }
    }

    /// Ends a transaction: applies it, or drops it.
    ///
    /// # Errors
    /// `EAGAIN` if another client changed what it looked at; `ENOENT` for an
    /// unknown transaction; `ENOSPC` over a quota. It is gone in every case.
    pub fn end(&mut self, conn: ConnId, tx: TxId, commit: bool) -> Result<(), Errno> {
        let transaction = self
            .client(conn)?
            .transactions
            .remove(&tx)
            .ok_or(Errno::NoEnt)?;
        if commit {
            let changes = transaction.commit(&mut self.tree, &self.quotas)?;
            self.fire(&changes);
        }
        Ok(())
    }

    /// The next event for a client.
    pub fn next_event(&mut self, conn: ConnId) -> Option<Event> {
        self.clients.get_mut(&conn)?.watches.next()
    }

    /// Whether a client has an event to read.
    #[must_use]
    pub fn has_event(&self, conn: ConnId) -> bool {
        self.clients
            .get(&conn)
            .is_some_and(|client| client.watches.waiting())
    }

    /// Whether a client has this transaction open.
    pub(crate) fn has_transaction(&self, conn: ConnId, tx: TxId) -> bool {
        self.clients
            .get(&conn)
            .is_some_and(|client| client.transactions.contains_key(&tx))
    }

    /// Tells all who watch `@introduceDomain` or `@releaseDomain` and may know: other
    /// domains are no guest's business.
    pub(crate) fn announce(&mut self, special: &str, domain: DomId) {
        for client in self.clients.values_mut() {
            if client.domain == 0 {
                client.watches.fire_special(special, domain, &self.quotas);
            }
        }
    }

    fn client(&mut self, conn: ConnId) -> Result<&mut Client, Errno> {
        self.clients.get_mut(&conn).ok_or(Errno::Io)
    }

    /// Runs a request in its transaction, or in one of its own.
    fn request<T>(
        &mut self,
        conn: ConnId,
        tx: Option<TxId>,
        run: impl FnOnce(&mut View<'_>, DomId, &Quotas) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let client = self.clients.get_mut(&conn).ok_or(Errno::Io)?;
        let domain = client.domain;
        let (limit, changes_limit) = transaction_limits(domain, &self.quotas);
        match tx {
            Some(id) => {
                let transaction = client.transactions.get_mut(&id).ok_or(Errno::NoEnt)?;
                let mut view = View {
                    tree: &self.tree,
                    transaction,
                    limit,
                    changes_limit,
                };
                run(&mut view, domain, &self.quotas)
            }
            None => {
                let mut transaction = Transaction::default();
                let mut view = View {
                    tree: &self.tree,
                    transaction: &mut transaction,
                    limit: usize::MAX,
                    changes_limit: usize::MAX,
                };
                let result = run(&mut view, domain, &self.quotas)?;
                let changes = transaction.commit(&mut self.tree, &self.quotas)?;
                self.fire(&changes);
                Ok(result)
            }
        }
    }

    fn fire(&mut self, changes: &[Change]) {
        for change in changes {
            for client in self.clients.values_mut() {
                client.watches.fire(change, client.domain, &self.quotas);
            }
        }
    }

    pub(crate) fn tree(&self) -> &Tree {
        &self.tree
    }
}

/// How many nodes a domain's transaction may look at, and how many changes it may
/// remember.
pub(crate) fn transaction_limits(domain: DomId, quotas: &Quotas) -> (usize, usize) {
    if domain == 0 {
        (usize::MAX, usize::MAX)
    } else {
        (quotas.transaction_nodes, quotas.transaction_changes)
    }
}

/// The number behind this one. Numbers may wrap around in a store's life; 0 is none.
fn following(number: u32) -> u32 {
    number.checked_add(1).unwrap_or(1)
}
