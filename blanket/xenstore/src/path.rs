//! Paths of nodes.

use std::fmt;

use crate::{DomId, Errno};

/// Longest absolute path (`XENSTORE_ABS_PATH_MAX`).
const ABSOLUTE_MAX: usize = 3072;
/// Longest relative path (`XENSTORE_REL_PATH_MAX`).
const RELATIVE_MAX: usize = 2048;

/// An absolute, valid path.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Path(Box<str>);

impl Path {
    /// The path `/`.
    #[must_use]
    pub fn root() -> Self {
        Self("/".into())
    }

    /// The directory that relative paths of a domain start from.
    #[must_use]
    pub fn home(domain: DomId) -> Self {
        Self(format!("/local/domain/{domain}").into())
    }

    /// Checks a path as a domain names it: absolute, or relative to its home.
    ///
    /// # Errors
    /// `EINVAL` for a character that is not allowed, an empty component, a
    /// trailing `/`, or too long a path.
    pub fn parse(text: &str, domain: DomId) -> Result<Self, Errno> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-/_@".contains(c);
        if !text.chars().all(allowed) || text.contains("//") {
            return Err(Errno::Inval);
        }
        if text == "/" {
            return Ok(Self::root());
        }
        if text.is_empty() || text.ends_with('/') {
            return Err(Errno::Inval);
        }
        if text.starts_with('/') {
            if text.len() > ABSOLUTE_MAX {
                return Err(Errno::Inval);
            }
            return Ok(Self(text.into()));
        }
        if text.starts_with('@') || text.len() > RELATIVE_MAX {
            return Err(Errno::Inval);
        }
        Ok(Self(format!("{}/{text}", Self::home(domain)).into()))
    }

    /// The path as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The directory that holds this node; `None` for the root.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        match self.0.rsplit_once('/')? {
            ("", "") => None,
            ("", _) => Some(Self::root()),
            (parent, _) => Some(Self(parent.into())),
        }
    }

    /// The last component; empty for the root.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.rsplit_once('/').map_or("", |(_, name)| name)
    }

    /// A node in this directory. The name must be a valid component.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        if &*self.0 == "/" {
            Self(format!("/{name}").into())
        } else {
            Self(format!("{self}/{name}").into())
        }
    }

    /// Whether this is `ancestor` or lies below it.
    #[must_use]
    pub fn is_within(&self, ancestor: &Self) -> bool {
        self.levels_below(ancestor).is_some()
    }

    /// How many levels this lies below `ancestor`: 0 if it is the same node, `None`
    /// if it lies elsewhere.
    #[must_use]
    pub fn levels_below(&self, ancestor: &Self) -> Option<usize> {
        if &*ancestor.0 == "/" {
            let root = &*self.0 == "/";
            return Some(if root { 0 } else { self.0.matches('/').count() });
        }
        let rest = self.0.strip_prefix(&*ancestor.0)?;
        (rest.is_empty() || rest.starts_with('/')).then(|| rest.matches('/').count())
    }

    /// Whether a name can be a component of a path.
    pub(crate) fn is_name(text: &str) -> bool {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_@".contains(c);
        !text.is_empty() && text.chars().all(allowed)
    }

    /// Whether a node of this name in this directory would have a path that is
    /// too long.
    pub(crate) fn is_too_long_with(&self, name: &str) -> bool {
        self.0.len() + 1 + name.len() > ABSOLUTE_MAX
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether this is a special name that can be watched.
pub(crate) fn is_special(text: &str) -> bool {
    let (name, domain) = match text.split_once('/') {
        Some((name, domain)) => (name, Some(domain)),
        None => (text, None),
    };
    // One spelling for each number, so that equal names are equal texts.
    let plain = |text: &str| text.parse().is_ok_and(|n: DomId| n.to_string() == text);
    matches!(name, "@introduceDomain" | "@releaseDomain") && domain.is_none_or(plain)
}

/// What a watch looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Watched {
    /// A node and all below it, named absolutely.
    Absolute(Path),
    /// The same, named relative to the domain's home.
    Relative(Path),
    /// `@introduceDomain` or `@releaseDomain`, for all domains or, with `/` and a
    /// number behind it, for one.
    Special(Box<str>),
}

impl Watched {
    /// Checks the path of a WATCH request.
    ///
    /// # Errors
    /// `EINVAL`, as [`Path::parse`].
    pub fn parse(text: &str, domain: DomId) -> Result<Self, Errno> {
        if is_special(text) {
            return Ok(Self::Special(text.into()));
        }
        let path = Path::parse(text, domain)?;
        Ok(if text.starts_with('/') {
            Self::Absolute(path)
        } else {
            Self::Relative(path)
        })
    }

    /// Whether both look at the same thing, however they name it.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Special(name), Self::Special(other)) => name == other,
            _ => self.path().is_some() && self.path() == other.path(),
        }
    }

    /// The text that a client of this domain names it by.
    pub(crate) fn text(&self, domain: DomId) -> String {
        match self {
            Self::Special(name) => name.to_string(),
            Self::Absolute(path) | Self::Relative(path) => self.report(path, domain),
        }
    }

    /// The node, unless it is a special name.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Absolute(path) | Self::Relative(path) => Some(path),
            Self::Special(_) => None,
        }
    }

    /// How this watch reports `path`.
    pub(crate) fn report(&self, path: &Path, domain: DomId) -> String {
        let text = path.as_str();
        match self {
            Self::Relative(_) => text
                .strip_prefix(Path::home(domain).as_str())
                .and_then(|rest| rest.strip_prefix('/'))
                .unwrap_or(text)
                .to_owned(),
            _ => text.to_owned(),
        }
    }
}
