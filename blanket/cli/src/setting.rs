//! What a VM's process needs and cannot open once it is in its box: files by descriptor, its
//! user, its control group, and who clears away after it.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use blanket_sandbox::user::Claim;
use blanket_vmm::console::{Outlet, Sink};
use blanket_vmm::instance::Opened;
use serde::{Deserialize, Serialize};

use crate::args::Run;
use crate::group::{self, Limited};
use crate::keeper::Left;
use crate::registry::{Entry, Registry};
use crate::{crash, user};

/// What was opened, claimed and made for a VM.
pub struct Setting {
    /// Where its console goes.
    pub sink: Sink,
    /// That, open.
    pub place: Outlet,
    /// Its log, if it runs in the background.
    pub log: Option<File>,
    /// The file for the report of a crash, if it has a user of its own.
    pub crash: Option<crash::Report>,
    /// Kernel and initrd, if it has a user of its own.
    pub files: Opened,
    /// Its user, if it gets one; held as long as the VM lives.
    pub user: Option<Claim>,
    /// Its limits.
    pub limited: Limited,
}

/// In which box a VM's process is, as it is told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// The number of the user that it runs as.
    pub uid: u32,
    /// It is in its box (not `--no-sandbox`).
    pub sandbox: bool,
    /// Its limits.
    #[serde(flatten)]
    pub limits: Limited,
}

impl Setting {
    /// Opens, claims and makes it, and moves this process into its control group.
    pub fn new(run: &Run, detached: bool, registry: &Registry, entry: &Entry) -> Result<Self> {
        let otherwise = if detached { Sink::None } else { Sink::Stdio };
        let sink = run.console.clone().unwrap_or(otherwise);
        let place = Outlet::open(&sink)?;
        let log = registry.log(&entry.name);
        let log = detached
            .then(|| File::create(&log).with_context(|| format!("cannot create {}", log.display())))
            .transpose()?;
        let user = user::claim(run)?;
        let report = registry.crash(&entry.name);
        let mut crash = None;
        let mut files = Opened::default();
        if user.is_some() {
            let made = crash::Report::new(&report);
            crash = Some(made.with_context(|| format!("cannot create {}", report.display()))?);
            files.kernel = run.kernel.as_ref().map(opened).transpose()?;
            files.initrd = run.initrd.as_ref().map(opened).transpose()?;
        }
        let group = group::prepare(run, &entry.name)?;
        let mut left = Left {
            group: group.left(),
            ..Left::default()
        };
        if let Some(claim) = &user {
            left.locks = Some(user::LOCKS.into());
            left.uid = Some(claim.user.uid);
            left.socket.push(registry.socket(&entry.name));
            if let Sink::Socket(path) = &sink {
                left.socket.push(path.clone());
            }
            left.empty.push(report);
        }
        // It must not be in the group that it waits for, and not wait for nothing.
        if left != Left::default()
            && let Err(error) = left.keep()
        {
            if let Some(group) = &left.group {
                let _ = std::fs::remove_dir(group);
            }
            return Err(error);
        }
        Ok(Self {
            sink,
            place,
            log,
            crash,
            files,
            user,
            limited: group.enter(run)?,
        })
    }

    /// What to tell of it.
    pub fn confinement(&self, run: &Run) -> Confinement {
        let own = rustix::process::geteuid().as_raw();
        Confinement {
            uid: self.user.as_ref().map_or(own, |claim| claim.user.uid),
            sandbox: !run.no_sandbox,
            limits: self.limited.clone(),
        }
    }
}

fn opened(path: &PathBuf) -> Result<Arc<File>> {
    let file = File::open(path).with_context(|| path.display().to_string())?;
    Ok(Arc::new(file))
}
