//! The user that a VM's process becomes.

use std::path::Path;
use std::str::FromStr;

use anyhow::{Context as _, Result, bail};
use blanket_sandbox::user::{self, Claim};

use crate::args::Run;
use crate::exit::hint;

/// Where the locks of users are, on all the machine.
pub const LOCKS: &str = "/run/blanket/users";

/// What `--user` is.
pub const HELP: &str = "\
Started by root: the user that the VM's process becomes once it has opened all that its VM needs. `auto`: one \
of its own, without a name, from 1879048192 on, the first that no other VM has. `root`: it stays root. Otherwise a \
user's name or number, which no other VM may have. Started by others, it stays who it is (docs/confinement.md).";

/// Who the VM's process becomes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// As root, one of its own.
    #[default]
    Auto,
    /// It stays root.
    Root,
    /// This one.
    Named(String),
}

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "" => return Err("auto, root, or a user's name or number".into()),
            "auto" => Self::Auto,
            "root" => Self::Root,
            name => Self::Named(name.into()),
        })
    }
}

/// The VM's user, if it gets one.
pub fn claim(run: &Run) -> Result<Option<Claim>> {
    let root = rustix::process::geteuid().is_root();
    if run.no_sandbox {
        return Ok(None);
    }
    match (&run.user, root) {
        (Choice::Root, true) | (Choice::Auto, false) => return Ok(None),
        (choice, false) => bail!(
            "--user {}: only root can run a VM as another user",
            match choice {
                Choice::Named(name) => name,
                _ => "root",
            }
        ),
        (Choice::Auto | Choice::Named(_), true) => {}
    }
    let locks = Path::new(LOCKS);
    if let Some(parent) = locks.parent()
        && !parent.exists()
    {
        crate::registry::Registry::at(parent.to_owned())?;
    }
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    let claimed = match &run.user {
        Choice::Named(name) => {
            let user = user::look_up(&passwd, name)
                .with_context(|| format!("--user {name}: /etc/passwd has no such user"))?;
            if user.uid == 0 {
                bail!("--user {name}: that is root; `--user root` leaves the VM's process root's");
            }
            user::claim(locks, user)
        }
        _ => {
            let taken = |uid: u32| {
                let uid = format!("{uid}");
                passwd
                    .lines()
                    .any(|line| line.split(':').nth(2) == Some(uid.as_str()))
            };
            user::claim_any(locks, taken)
        }
    };
    claimed.map(Some).map_err(|error| match error {
        user::Error::Taken(_) => hint(
            &anyhow::Error::new(error),
            "each VM has a user of its own: name another one, or leave --user out",
        ),
        error => error.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices() {
        assert_eq!("auto".parse(), Ok(Choice::Auto));
        assert_eq!("root".parse(), Ok(Choice::Root));
        assert_eq!("vm".parse(), Ok(Choice::Named("vm".into())));
        assert!("".parse::<Choice>().is_err());
    }
}
