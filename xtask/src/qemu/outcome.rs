//! How a run ended, and what is left of it.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Sender;

use super::Heard;

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The command in the instance ended with this code.
    Exit(i32),
    /// The machine stopped before the command had ended: a panic, an oops.
    Died,
    /// The time was over.
    TimedOut,
}

/// The line of a log of the emulator's in which one of its own assertions fails, which ends it.
///
/// No instance may do that to its emulator, whatever runs in it: the words are those of C's
/// `assert` and of GLib's `g_assert`. What the emulator's threads do to one another
/// (docs/testing.md) shows in more than one place, so that a list of places is never whole.
fn fault_in(log: &str) -> Option<&str> {
    let fell = |line: &&str| {
        (line.contains(": Assertion `") && line.ends_with("' failed."))
            || line.starts_with("Bail out! ERROR:")
    };
    log.lines().find(fell)
}

/// As [`fault_in`] of the log of the emulator in `dir`.
pub fn fault_of(dir: &Path) -> Option<String> {
    let bytes = fs::read(dir.join("qemu.log")).ok()?;
    fault_in(&String::from_utf8_lossy(&bytes)).map(str::to_owned)
}

/// Says when the companion with this `output`, in `dir`, has fallen over its own assertion:
/// nobody else would notice before the time is over. One that powers off is the case's to judge.
pub(super) fn watch(mut output: impl Read + Send + 'static, dir: PathBuf, over: Sender<Heard>) {
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok(1..) = output.read(&mut buffer) {}
        if fault_of(&dir).is_some() {
            let _ = over.send(Heard::Over);
        }
    });
}

/// What is left of a run.
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// Lines of the instance's kernel log that report a bug or a warning.
    pub complaints: u32,
    /// Directory of the run; removed by [`Outcome::discard`].
    pub dir: PathBuf,
}

impl Outcome {
    /// The instance's console log.
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// Last lines of the console log and QEMU's own messages.
    pub fn console_tail(&self, lines: usize) -> String {
        let mut text = String::new();
        for name in ["qemu.log", "console.log"] {
            let bytes = fs::read(self.dir.join(name)).unwrap_or_default();
            let log = String::from_utf8_lossy(&bytes);
            let all: Vec<&str> = log
                .lines()
                .filter(|line| !line.contains("TCG doesn't support requested feature"))
                .collect();
            for line in &all[all.len().saturating_sub(lines)..] {
                text.push_str(line.trim_end_matches('\r'));
                text.push('\n');
            }
        }
        text
    }

    /// What the emulator said when it fell over one of its own assertions, if it did.
    pub fn emulator_fault(&self) -> Option<String> {
        let companions = (2..).map(|node| self.dir.join(format!("node{node}")));
        let companions = companions.take_while(|dir| dir.exists());
        std::iter::once(self.dir.clone())
            .chain(companions)
            .find_map(|dir| fault_of(&dir))
    }

    /// Removes the run's directory.
    pub fn discard(self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_assertion_of_the_emulators_is_its_own_fault() {
        let fell = [
            "qemu-system-x86_64: system/physmem.c:2678: iotlb_to_section: Assertion \
             `section_index < d->map.sections_nb' failed.",
            "qemu-system-x86_64: hw/pci/msix.c:228: msix_table_mmio_write: Assertion \
             `addr + size <= dev->msix_entries_nr * PCI_MSIX_ENTRY_SIZE' failed.",
            "Bail out! ERROR:../accel/tcg/tcg-accel-ops.c:79:tcg_handle_interrupt: assertion \
             failed: (bql_locked())",
        ];
        for line in fell {
            let log = format!(
                "qemu-system-x86_64: warning: TCG doesn't support requested feature\n{line}\n"
            );
            assert_eq!(fault_in(&log), Some(line));
        }
    }

    #[test]
    fn an_emulator_that_was_ended_or_refuses_its_options_has_no_fault() {
        for line in [
            "qemu-system-x86_64: terminating on signal 15",
            "qemu-system-x86_64: -device nvme: drive with bus=0, unit=0 (index=0) exists",
            "qemu-system-x86_64: cannot set up guest memory 'pc.ram': Cannot allocate memory",
        ] {
            assert_eq!(fault_in(line), None);
        }
    }

    #[test]
    fn a_companion_that_falls_over_is_told_of_and_one_that_powers_off_is_not() {
        let dir = std::env::temp_dir().join(format!("outcome-{}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        let told = |log: &str| {
            fs::write(dir.join("qemu.log"), log).unwrap();
            let (over, heard) = std::sync::mpsc::channel();
            watch(std::io::empty(), dir.clone(), over);
            heard.recv().is_ok()
        };
        assert!(told("qemu: a.c:1: f: Assertion `x' failed.\n"));
        assert!(!told("qemu: terminating on signal 15\n"));
        fs::remove_dir_all(&dir).unwrap();
    }
}
