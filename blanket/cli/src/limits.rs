//! What the host has for a VM's memory, before the VM wants it. A process that asks
//! for more is killed by the kernel and cannot say why, so it is said at the start.

use std::path::{Path, PathBuf};

/// What the core, the VMM and shadow tables need beside a VM's memory, about.
const BESIDE: u64 = 16 << 20;

/// Why a VM of `memory` bytes may be killed once it uses them, a sentence for each
/// reason. `root` is `/`, or that of a test.
pub fn warnings(root: &Path, memory: u64) -> Vec<String> {
    let mut all = Vec::new();
    let needed = memory + BESIDE;
    let mib = |bytes: u64| bytes >> 20;
    let rest = format!(
        "the VM may use {} MiB, and the kernel kills it when there is no more",
        mib(needed)
    );
    if let Some((group, room)) = tightest(root)
        && room < needed
    {
        all.push(format!(
            "the memory cgroup {} leaves it {} MiB; {rest}",
            group.display(),
            mib(room)
        ));
    }
    let meminfo = std::fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
    if let Some(available) = field(&meminfo, "MemAvailable:").map(|kib| kib << 10)
        && available < needed
    {
        all.push(format!(
            "{} MiB of memory are available here; {rest}",
            mib(available)
        ));
    }
    all
}

/// The number behind a word.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// The cgroup (version 2) of this process, or one above it, that leaves least, and how
/// much that is.
fn tightest(root: &Path) -> Option<(PathBuf, u64)> {
    let own = std::fs::read_to_string(root.join("proc/self/cgroup")).ok()?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let number = |group: &Path, file: &str| -> Option<u64> {
        let path = root.join("sys/fs/cgroup").join(group).join(file);
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    Path::new(own)
        .ancestors()
        .filter_map(|group| {
            // "max" is no number, and no limit.
            let limit = number(group, "memory.max")?;
            let used = number(group, "memory.current")?;
            Some((Path::new("/").join(group), limit.saturating_sub(used)))
        })
        .min_by_key(|(_, room)| *room)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().expect("a directory");
        for (path, text) in files {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("not /")).expect("created");
            std::fs::write(path, text).expect("written");
        }
        root
    }

    #[test]
    fn enough_is_no_warning_and_neither_is_a_host_that_says_nothing() {
        assert!(warnings(host(&[]).path(), 1 << 40).is_empty());
        let root = host(&[
            (
                "proc/meminfo",
                "MemTotal: 9 kB\nMemAvailable:  2097152 kB\n",
            ),
            ("proc/self/cgroup", "0::/\n"),
        ]);
        assert!(warnings(root.path(), 1 << 30).is_empty());
        let all = warnings(root.path(), 4 << 30);
        assert_eq!(all.len(), 1);
        assert!(
            all[0].starts_with("2048 MiB of memory are available"),
            "{all:?}"
        );
    }

    #[test]
    fn the_tightest_cgroup_is_named() {
        let root = host(&[
            ("proc/self/cgroup", "1:name=x:/y\n0::/a/b/c\n"),
            ("sys/fs/cgroup/a/memory.max", "max\n"),
            ("sys/fs/cgroup/a/memory.current", "5\n"),
            ("sys/fs/cgroup/a/b/memory.max", "209715200\n"),
            ("sys/fs/cgroup/a/b/memory.current", "104857600\n"),
            ("sys/fs/cgroup/a/b/c/memory.max", "209715200\n"),
            ("sys/fs/cgroup/a/b/c/memory.current", "1048576\n"),
        ]);
        let all = warnings(root.path(), 128 << 20);
        assert_eq!(all.len(), 1);
        let want = "the memory cgroup /a/b leaves it 100 MiB; the VM may use 144 MiB";
        assert!(all[0].starts_with(want), "{all:?}");
        assert!(warnings(root.path(), 64 << 20).is_empty());
    }
}
