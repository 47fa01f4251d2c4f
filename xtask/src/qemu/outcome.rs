//! How a run ended, and what is left of it.

use std::fs;
use std::path::PathBuf;

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

/// Assertions of the emulator's own that fail now and then, whatever runs in it, and end it.
const FAULTS: [&str; 1] = [
    // A thread of a CPU looks up a section of the map of addresses which another one has just
    // replaced; seen while firmware and kernel place the PCI devices.
    "iotlb_to_section: Assertion",
];

/// The line of a log of the emulator's in which it falls over one of its [`FAULTS`].
fn fault_in(log: &str) -> Option<&str> {
    let fell = |line: &&str| FAULTS.iter().any(|fault| line.contains(fault));
    log.lines().find(fell)
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

    /// What the emulator said when it fell over one of its own [`FAULTS`], if it did.
    pub fn emulator_fault(&self) -> Option<String> {
        let companions = (2..).map(|node| self.dir.join(format!("node{node}")));
        let companions = companions.take_while(|dir| dir.exists());
        std::iter::once(self.dir.clone())
            .chain(companions)
            .find_map(|dir| {
                let bytes = fs::read(dir.join("qemu.log")).ok()?;
                fault_in(&String::from_utf8_lossy(&bytes)).map(str::to_owned)
            })
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
    fn only_the_emulators_own_faults_are_known() {
        let log = "qemu-system-x86_64: warning: TCG doesn't support requested feature\n\
            qemu-system-x86_64: system/physmem.c:2678: iotlb_to_section: Assertion \
            `section_index < d->map.sections_nb' failed.\n";
        assert_eq!(fault_in(log), log.lines().nth(1));
        assert_eq!(
            fault_in("qemu-system-x86_64: terminating on signal 15"),
            None
        );
    }
}
