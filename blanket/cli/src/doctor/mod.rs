//! `blanket doctor`: can this machine run VMs, and if not, what mends it.

mod checks;
mod facts;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use blanket_vmm::kernel::Kernel;
use serde::Serialize;

use checks::{Check, State};
use facts::Facts;

use crate::exit::output;

/// Runs all checks. Exits with 0 only if VMs can run.
pub fn command(json: bool, force: bool, kernel: Option<&Path>) -> Result<ExitCode> {
    #[derive(Serialize)]
    struct Report<'a> {
        ok: bool,
        checks: &'a [Check],
        facts: &'a Facts,
    }
    let facts = Facts::gather();
    let mut checks = checks::all(&facts, force);
    checks.extend(kernel.map(|path| checks::guest_kernel(path, Kernel::load(path))));
    let ok = checks.iter().all(|check| check.state != State::Fail);
    if json {
        let report = Report {
            ok,
            checks: &checks,
            facts: &facts,
        };
        output(&format!("{}\n", serde_json::to_string_pretty(&report)?))?;
    } else {
        let mut text: String = checks.iter().map(|check| format!("{check}\n")).collect();
        text.push_str(if ok {
            "\nVMs can run here.\n"
        } else {
            "\nVMs cannot run here yet.\n"
        });
        output(&text)?;
    }
    Ok(if ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(crate::exit::FAILURE)
    })
}

/// What to do without permission for the device; the package's udev rule gives it
/// to this group.
pub const PERMISSION: &str =
    "sudo usermod -aG blanket $USER, then log in again; or run blanket as root";

/// What to do when there is no device: the mending command of the first failed
/// check, in the order in which they must be mended.
pub fn module_hint() -> Option<String> {
    checks::all(&Facts::gather(), true)
        .into_iter()
        .find(|check| check.state == State::Fail)
        .map(|check| match check.mend {
            Some(mend) => format!("{} -> {mend}", check.text),
            None => check.text,
        })
}
