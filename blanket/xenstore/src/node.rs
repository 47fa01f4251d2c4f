//! Nodes and who may use them.

use std::collections::BTreeSet;

use crate::{DomId, Errno};

/// What a permission entry allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Reading.
    pub read: bool,
    /// Writing.
    pub write: bool,
}

impl Access {
    /// Nothing.
    pub const NONE: Self = Self {
        read: false,
        write: false,
    };
    /// Reading.
    pub const READ: Self = Self {
        read: true,
        write: false,
    };
    /// Writing.
    pub const WRITE: Self = Self {
        read: false,
        write: true,
    };
    /// Both.
    pub const BOTH: Self = Self {
        read: true,
        write: true,
    };

    const fn letter(self) -> char {
        match (self.read, self.write) {
            (false, false) => 'n',
            (true, false) => 'r',
            (false, true) => 'w',
            (true, true) => 'b',
        }
    }

    /// Whether this allows everything that `need` asks for.
    #[must_use]
    pub const fn covers(self, need: Self) -> bool {
        (self.read || !need.read) && (self.write || !need.write)
    }
}

/// A permission entry. The first entry of a node names its owner, and what
/// domains may do that no other entry names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Perm {
    /// The domain.
    pub domain: DomId,
    /// What it may do.
    pub access: Access,
}

impl Perm {
    /// An entry.
    #[must_use]
    pub const fn new(domain: DomId, access: Access) -> Self {
        Self { domain, access }
    }

    /// Reads an entry such as `r1`.
    pub(crate) fn parse(text: &str) -> Result<Self, Errno> {
        let access = match text.as_bytes().first() {
            Some(b'n') => Access::NONE,
            Some(b'r') => Access::READ,
            Some(b'w') => Access::WRITE,
            Some(b'b') => Access::BOTH,
            _ => return Err(Errno::Inval),
        };
        let domain = &text[1..];
        // `parse` would also take a sign.
        if !domain.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(Errno::Inval);
        }
        let domain = domain.parse().map_err(|_| Errno::Inval)?;
        Ok(Self { domain, access })
    }

    /// The entry as the protocol writes it.
    pub(crate) fn text(self) -> String {
        format!("{}{}", self.access.letter(), self.domain)
    }
}

/// What a domain may do with a node of these permissions.
pub(crate) fn access(perms: &[Perm], domain: DomId) -> Access {
    let Some((first, rest)) = perms.split_first() else {
        return Access::NONE;
    };
    if domain == 0 || domain == first.domain {
        return Access::BOTH;
    }
    rest.iter()
        .find(|perm| perm.domain == domain)
        .map_or(first.access, |perm| perm.access)
}

/// A node of the tree.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub value: Vec<u8>,
    /// Never empty.
    pub perms: Vec<Perm>,
    pub children: BTreeSet<Box<str>>,
    /// Set from the store's counter at each change of any of the above.
    pub generation: u64,
}

impl Node {
    pub fn new(perms: Vec<Perm>) -> Self {
        Self {
            value: Vec::new(),
            perms,
            children: BTreeSet::new(),
            generation: 0,
        }
    }

    pub fn owner(&self) -> DomId {
        self.perms.first().map_or(0, |perm| perm.domain)
    }

    /// Bytes that the owner is charged for a node at a path of this length.
    pub fn charge(&self, path: usize) -> usize {
        path + self.value.len() + self.perms.len() * size_of::<Perm>()
    }
}
