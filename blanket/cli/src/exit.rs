//! Exit codes, and hints that go with errors.

use std::fmt;
use std::io::Write as _;

use blanket_vmm::hypervisor::CrashKind;
use blanket_vmm::vm::End;

/// The command could not be carried out.
pub const FAILURE: u8 = 1;
/// The guest asked for a reboot and `--on-reboot exit` was given.
const REBOOT: u8 = 3;
/// The guest crashed.
const CRASH: u8 = 4;
/// The guest's watchdog expired.
const WATCHDOG: u8 = 5;
/// The VM was killed.
pub const KILLED: u8 = 6;
/// Blanket or its host failed under a running guest.
const BLANKET: u8 = 7;
/// The guest asked for something that is not supported.
const UNSUPPORTED: u8 = 8;

/// It is not known on which host a VM is.
pub const DOUBT: u8 = 9;

/// The table for `--help`.
pub const TABLE: &str = "\
Exit codes of `blanket run`:
  0      the guest powered itself off, or the VM was saved or has moved
  1      the VM could not be started, or not be started again
  2      wrong arguments
  3      the guest asked for a reboot (with --on-reboot exit)
  4      the guest crashed (kernel panic, or it did something undefined)
  5      the guest's watchdog expired
  6      the VM was killed (`blanket kill`, or Ctrl-] on its terminal)
  7      Blanket or the host failed while the guest ran
  8      the guest asked for something that is not supported (suspend)
  128+n  signal n asked blanket to end (130: Ctrl-C)";

/// The exit code for the way a VM ended.
pub fn code(end: &End) -> u8 {
    match end {
        End::Poweroff | End::Saved | End::Moved => 0,
        End::Reboot => REBOOT,
        End::Panic => CRASH,
        End::Watchdog => WATCHDOG,
        End::Unsupported(_) => UNSUPPORTED,
        End::Crash(crash) => match crash.kind {
            CrashKind::Guest => CRASH,
            CrashKind::Core | CrashKind::Memory | CrashKind::Other(_) => BLANKET,
        },
        End::Killed => KILLED,
        End::Failed(_) => BLANKET,
    }
}

/// One word for the way a VM ended.
pub fn word(end: &End) -> &'static str {
    match end {
        End::Poweroff => "poweroff",
        End::Reboot => "reboot",
        End::Panic => "guest-panic",
        End::Watchdog => "watchdog",
        End::Unsupported(_) => "unsupported",
        End::Crash(crash) => match crash.kind {
            CrashKind::Guest => "guest-crash",
            CrashKind::Core => "core-failure",
            CrashKind::Memory => "out-of-memory",
            CrashKind::Other(_) => "crash",
        },
        End::Killed => "killed",
        End::Saved => "saved",
        End::Moved => "moved",
        End::Failed(_) => "failed",
    }
}

/// What to say on standard error, if there is more to say than the code does.
pub fn sentence(end: &End) -> Option<String> {
    Some(match end {
        End::Poweroff | End::Reboot | End::Killed | End::Saved | End::Moved => {
            return None;
        }
        End::Panic => "the guest reported a crash (its kernel's panic message is above)".into(),
        End::Watchdog => "the guest's watchdog expired".into(),
        End::Unsupported(2) => "the guest asked to be suspended, which is not supported".into(),
        End::Unsupported(n) => format!("the guest shut down with the unsupported reason {n}"),
        End::Crash(crash) => {
            let whose = match crash.kind {
                CrashKind::Guest => "the guest did something that has no defined outcome",
                CrashKind::Core => "Blanket's core found its own state wrong (please report this)",
                CrashKind::Memory => "the host has no memory left for the VM",
                CrashKind::Other(_) => "the VM was ended for an unknown reason",
            };
            format!("{whose}:\n{}", crash.report.trim_end())
        }
        End::Failed(failure) => failure.to_string(),
    })
}

/// Writes what was found: as JSON, or as `text` has it for people.
pub fn show<T: serde::Serialize + ?Sized>(
    found: &T,
    json: bool,
    text: impl FnOnce(&T) -> String,
) -> anyhow::Result<()> {
    if json {
        output(&format!("{}\n", serde_json::to_string_pretty(found)?))
    } else {
        output(&text(found))
    }
}

/// Writes a command's result to standard output. A reader that has seen enough and
/// went away (`blanket ps | head -1`) is no error.
pub fn output(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// The next step after an error: the innermost cause of an error made by [`hint`].
#[derive(Debug)]
pub struct Hint(pub String);

/// Adds the next step to an error.
pub fn hint(error: &anyhow::Error, next: impl Into<String>) -> anyhow::Error {
    anyhow::Error::new(Hint(next.into())).context(text(error))
}

/// An error with its causes on one line. Errors that contain their cause's text
/// already do not repeat it.
pub fn text(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().filter(|cause| !cause.is::<Hint>()) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(&cause);
        }
    }
    text
}

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Hint {}

#[cfg(test)]
mod tests {
    use blanket_vmm::hypervisor::Crash;

    use super::*;

    #[test]
    fn hints_stay_apart_from_the_text() {
        let error = anyhow::anyhow!("inner")
            .context("outer: inner")
            .context("where");
        assert_eq!(text(&error), "where: outer: inner");
        let error = hint(&error, "do this").context("more");
        assert_eq!(text(&error), "more: where: outer: inner");
        assert_eq!(
            error.downcast_ref::<Hint>().map(|hint| &*hint.0),
            Some("do this")
        );
    }

    #[test]
    fn codes_are_those_of_the_table() {
        let crash = |kind| {
            End::Crash(Crash {
                kind,
                report: "report\n".into(),
            })
        };
        for (end, expected) in [
            (End::Poweroff, 0),
            (End::Reboot, 3),
            (End::Panic, 4),
            (crash(CrashKind::Guest), 4),
            (End::Watchdog, 5),
            (End::Killed, 6),
            (crash(CrashKind::Core), 7),
            (crash(CrashKind::Memory), 7),
            (End::Unsupported(2), 8),
        ] {
            assert_eq!(code(&end), expected, "{end:?}");
            assert!(
                TABLE.contains(&format!("\n  {expected}  ")),
                "{expected} is documented"
            );
        }
        assert!(sentence(&crash(CrashKind::Core)).is_some_and(|text| text.ends_with("report")));
    }
}
