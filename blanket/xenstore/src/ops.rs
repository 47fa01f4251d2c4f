//! The requests on the tree, each against a [`View`].

use std::collections::BTreeMap;

use crate::node::{Access, Node, Perm, access};
use crate::path::Path;
use crate::transaction::View;
use crate::watch::Change;
use crate::{DomId, Errno, Quotas};

/// A node that the domain may use as `need` says.
///
/// A node that is not there is `ENOENT` for who may read the directory that would
/// hold it, and `EACCES` for others, so that nobody learns names he may not see.
pub(crate) fn find(
    view: &mut View<'_>,
    domain: DomId,
    path: &Path,
    need: Access,
) -> Result<Node, Errno> {
    if let Some(node) = view.get(path)? {
        return if access(&node.perms, domain).covers(need) {
            Ok(node)
        } else {
            Err(Errno::Acces)
        };
    }
    let (_, ancestor) = nearest(view, path)?;
    let may = access(&ancestor.perms, domain);
    Err(if may.covers(need) || may.read {
        Errno::NoEnt
    } else {
        Errno::Acces
    })
}

/// The closest existing directory above a path. The root always exists.
fn nearest(view: &mut View<'_>, path: &Path) -> Result<(Path, Node), Errno> {
    let mut at = path.clone();
    while let Some(parent) = at.parent() {
        if let Some(node) = view.get(&parent)? {
            return Ok((parent, node));
        }
        at = parent;
    }
    Err(Errno::Io)
}

/// Makes a node and its missing directories, each with its directory's
/// permissions; a guest owns what it makes.
fn create(view: &mut View<'_>, domain: DomId, path: &Path) -> Result<Node, Errno> {
    let (top, mut parent) = nearest(view, path)?;
    if !access(&parent.perms, domain).write {
        return Err(Errno::Acces);
    }
    let mut perms = parent.perms.clone();
    if domain != 0
        && let Some(first) = perms.first_mut()
    {
        first.domain = domain;
    }
    let mut missing = Vec::new();
    let mut at = path.clone();
    while at != top {
        let above = at.parent().ok_or(Errno::Io)?;
        missing.push(std::mem::replace(&mut at, above));
    }
    for (place, new) in missing.iter().rev().enumerate() {
        parent.children.insert(new.name().into());
        if place == 0 {
            view.put(&top, parent);
        } else {
            view.put(&missing[missing.len() - place], parent);
        }
        parent = Node::new(perms.clone());
    }
    view.put(path, parent.clone());
    Ok(parent)
}

/// READ.
pub(crate) fn read(view: &mut View<'_>, domain: DomId, path: &Path) -> Result<Vec<u8>, Errno> {
    Ok(find(view, domain, path, Access::READ)?.value)
}

/// DIRECTORY: names and the node's generation.
pub(crate) fn directory(
    view: &mut View<'_>,
    domain: DomId,
    path: &Path,
) -> Result<(Vec<Box<str>>, u64), Errno> {
    let node = find(view, domain, path, Access::READ)?;
    Ok((node.children.into_iter().collect(), node.generation))
}

/// GET_PERMS.
pub(crate) fn get_perms(
    view: &mut View<'_>,
    domain: DomId,
    path: &Path,
) -> Result<Vec<Perm>, Errno> {
    Ok(find(view, domain, path, Access::READ)?.perms)
}

/// WRITE.
pub(crate) fn write(
    view: &mut View<'_>,
    domain: DomId,
    path: &Path,
    value: &[u8],
    quotas: &Quotas,
) -> Result<(), Errno> {
    if domain != 0 && value.len() > quotas.value {
        return Err(Errno::NoSpc);
    }
    view.room_for(1)?;
    let mut node = match view.get(path)? {
        Some(node) if access(&node.perms, domain).write => node,
        Some(_) => return Err(Errno::Acces),
        None => create(view, domain, path)?,
    };
    node.value = value.to_vec();
    let perms = vec![node.perms.clone()];
    view.put(path, node);
    view.changed(Change {
        path: path.clone(),
        perms,
        removed: None,
    });
    Ok(())
}

/// MKDIR: nothing happens if the node exists.
pub(crate) fn mkdir(view: &mut View<'_>, domain: DomId, path: &Path) -> Result<(), Errno> {
    if let Some(node) = view.get(path)? {
        return if access(&node.perms, domain).write {
            Ok(())
        } else {
            Err(Errno::Acces)
        };
    }
    view.room_for(1)?;
    let node = create(view, domain, path)?;
    view.changed(Change {
        path: path.clone(),
        perms: vec![node.perms],
        removed: None,
    });
    Ok(())
}

/// RM: the node and all below it; nothing happens if only the directory exists.
pub(crate) fn remove(view: &mut View<'_>, domain: DomId, path: &Path) -> Result<(), Errno> {
    let Some(parent) = path.parent() else {
        return Err(Errno::Inval);
    };
    match find(view, domain, path, Access::WRITE) {
        Ok(_) => {}
        Err(Errno::NoEnt) => {
            return find(view, domain, &parent, Access::READ).map(|_| ());
        }
        Err(error) => return Err(error),
    }
    let mut removed = BTreeMap::new();
    let mut todo = vec![path.clone()];
    while let Some(at) = todo.pop() {
        let Some(node) = view.get(&at)? else { continue };
        todo.extend(node.children.iter().map(|name| at.child(name)));
        removed.insert(at, node.perms);
    }
    let above = view.get(&parent)?;
    view.room_for(removed.len())?;
    // Nothing fails from here on: half a removal would leave nodes without a
    // directory behind.
    for at in removed.keys() {
        view.remove(at);
    }
    if let Some(mut above) = above {
        above.children.remove(path.name());
        view.put(&parent, above);
    }
    let perms = removed.get(path).cloned().into_iter().collect();
    view.changed(Change {
        path: path.clone(),
        perms,
        removed: Some(removed),
    });
    Ok(())
}

/// SET_PERMS: for the owner, who cannot give the node away.
pub(crate) fn set_perms(
    view: &mut View<'_>,
    domain: DomId,
    path: &Path,
    perms: &[Perm],
    quotas: &Quotas,
) -> Result<(), Errno> {
    let Some(first) = perms.first() else {
        return Err(Errno::Inval);
    };
    if domain != 0 && perms.len() > quotas.perms {
        return Err(Errno::NoSpc);
    }
    let mut node = find(view, domain, path, Access::WRITE)?;
    if domain != 0 && node.owner() != domain {
        return Err(Errno::Acces);
    }
    if domain != 0 && first.domain != domain {
        return Err(Errno::Perm);
    }
    view.room_for(1)?;
    let before = std::mem::replace(&mut node.perms, perms.to_vec());
    view.put(path, node);
    let perms = vec![before, perms.to_vec()];
    view.changed(Change {
        path: path.clone(),
        perms,
        removed: None,
    });
    Ok(())
}
