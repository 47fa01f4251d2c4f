//! How much a domain may take. Domain 0, the VMM, is not limited.

/// Limits of one guest domain.
#[derive(Clone, Copy, Debug)]
pub struct Quotas {
    /// Nodes that it owns.
    pub nodes: usize,
    /// Bytes of paths, values and permissions of nodes that it owns.
    pub bytes: usize,
    /// Bytes of a value.
    pub value: usize,
    /// Permission entries of a node.
    pub perms: usize,
    /// Watches.
    pub watches: usize,
    /// Open transactions.
    pub transactions: usize,
    /// Nodes that a transaction looks at or changes.
    pub transaction_nodes: usize,
    /// Changes that an open transaction remembers for the watches; a removal counts
    /// as one for each node that goes.
    pub transaction_changes: usize,
    /// Watch events that wait for the domain to read them. More are dropped:
    /// a guest that does not read has lost them for itself only.
    pub events: usize,
}

impl Default for Quotas {
    /// The order of magnitude of Xen's own defaults (`docs/man/xenstored`), with a
    /// byte limit in addition.
    fn default() -> Self {
        Self {
            nodes: 1000,
            bytes: 512 << 10,
            value: 2048,
            perms: 5,
            watches: 128,
            transactions: 10,
            transaction_nodes: 1024,
            transaction_changes: 4096,
            events: 2048,
        }
    }
}

/// What a domain has taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub nodes: isize,
    pub bytes: isize,
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.nodes += other.nodes;
        self.bytes += other.bytes;
    }
}

impl std::ops::Neg for Usage {
    type Output = Self;
    fn neg(self) -> Self {
        Self {
            nodes: -self.nodes,
            bytes: -self.bytes,
        }
    }
}
