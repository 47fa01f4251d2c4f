//! Whether the host is short of memory, by the kernel's own measure: the time that its
//! tasks have waited for memory (`Documentation/accounting/psi.rst`), of the whole
//! machine and of this process's memory cgroup.
//!
//! The totals are read now and then. The kernel would also wake a poll, but before Linux
//! 6.5 only for who has CAP_SYS_RESOURCE.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How often to look.
pub(crate) const EVERY: Duration = Duration::from_secs(5);
/// Waiting since the last look that counts as shortage: two per cent of the time.
const MUCH: Duration = Duration::from_millis(100);

/// The measures, and what they were.
pub(crate) struct Pressure(Vec<(PathBuf, Duration)>);

impl Pressure {
    /// Those below `root`, for this process. None on a kernel without them: it is then
    /// never short.
    pub(crate) fn new(root: &Path) -> Self {
        let mut files = vec![root.join("proc/pressure/memory")];
        let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
        // The line of the unified hierarchy (cgroups(7)).
        let own = groups.lines().find_map(|line| line.strip_prefix("0::/"));
        if let Some(own) = own {
            files.push(root.join("sys/fs/cgroup").join(own).join("memory.pressure"));
        }
        let found = files
            .into_iter()
            .filter_map(|file| Some((waited(&file)?, file)));
        Self(found.map(|(waited, file)| (file, waited)).collect())
    }

    /// Whether there was a shortage since the last look.
    pub(crate) fn rose(&mut self) -> bool {
        let mut rose = false;
        for (file, before) in &mut self.0 {
            if let Some(now) = waited(file) {
                rose |= now.saturating_sub(*before) >= MUCH;
                *before = now;
            }
        }
        rose
    }
}

/// The total of the line `some`.
fn waited(file: &Path) -> Option<Duration> {
    let text = fs::read_to_string(file).ok()?;
    let line = text.lines().find(|line| line.starts_with("some "))?;
    let (_, total) = line.split_once("total=")?;
    total.trim().parse().ok().map(Duration::from_micros)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_total_that_grows_fast_is_a_shortage() {
        let root = tempfile::tempdir().expect("a directory");
        let machine = root.path().join("proc/pressure/memory");
        let group = root.path().join("sys/fs/cgroup/vms/a/memory.pressure");
        for file in [&machine, &group, &root.path().join("proc/self/cgroup")] {
            fs::create_dir_all(file.parent().expect("below")).expect("made");
        }
        let say = |file: &Path, total: u64| {
            let text = format!(
                "some avg10=0.00 avg60=0.00 avg300=0.00 total={total}\n\
                 full avg10=0.00 avg60=0.00 avg300=0.00 total=9999999\n"
            );
            fs::write(file, text).expect("written");
        };
        // Neither is there.
        assert!(!Pressure::new(root.path()).rose());
        fs::write(
            root.path().join("proc/self/cgroup"),
            "1:name=x:/y\n0::/vms/a\n",
        )
        .expect("written");
        say(&machine, 5_000_000);
        say(&group, 7);
        let mut pressure = Pressure::new(root.path());
        assert!(!pressure.rose());
        say(&machine, 5_099_999);
        assert!(!pressure.rose());
        say(&machine, 5_200_000);
        assert!(pressure.rose() && !pressure.rose());
        say(&group, 200_000);
        assert!(pressure.rose() && !pressure.rose());
        fs::remove_file(&group).expect("gone");
        assert!(!pressure.rose());
    }
}
