//! Boot Loader Specification, type 1: one small file for each entry (uapi-group.org).

use std::cmp::Ordering;
use std::io;

use crate::grub::{Place, World};
use crate::version;

/// Largest entry file, bytes.
const MAX_FILE: u64 = 64 << 10;
/// Entry files of one directory.
const MAX_FILES: usize = 512;

/// One entry file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entry {
    /// The file's name without `.conf` and without the count of tries.
    pub id: String,
    /// All tries are used up.
    pub bad: bool,
    /// `title`, with the version if that is not in it.
    pub title: String,
    /// `version`.
    pub version: String,
    /// `machine-id`.
    pub machine: String,
    /// `sort-key`.
    pub sort_key: String,
    /// `linux`.
    pub linux: String,
    /// Each `initrd`.
    pub initrds: Vec<String>,
    /// Each `options`.
    pub options: Vec<String>,
    /// `architecture`.
    pub architecture: String,
    /// `efi` or `uki`: something else than a kernel with its initrd.
    pub efi: String,
}

/// Reads the text of the file `name`.
pub fn parse(name: &str, text: &str) -> Entry {
    let stem = name.strip_suffix(".conf").unwrap_or(name);
    let (id, bad) = tries(stem);
    let mut entry = Entry {
        id: id.to_owned(),
        bad,
        ..Entry::default()
    };
    for line in text.lines() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (key, value) = line
            .split_once(char::is_whitespace)
            .map_or((line, ""), |(key, value)| (key, value.trim()));
        match key {
            "title" => value.clone_into(&mut entry.title),
            "version" => value.clone_into(&mut entry.version),
            "machine-id" => value.clone_into(&mut entry.machine),
            "sort-key" => value.clone_into(&mut entry.sort_key),
            "linux" => value.clone_into(&mut entry.linux),
            "initrd" => entry.initrds.push(value.to_owned()),
            "options" => entry.options.push(value.to_owned()),
            "architecture" => value.clone_into(&mut entry.architecture),
            "efi" | "uki" | "uki-url" => value.clone_into(&mut entry.efi),
            _ => {}
        }
    }
    if entry.title.is_empty() {
        entry.title.clone_from(&entry.id);
    }
    entry
}

/// The name without `+LEFT` or `+LEFT-DONE` at its end, and whether LEFT is 0.
fn tries(stem: &str) -> (&str, bool) {
    let Some((id, count)) = stem.rsplit_once('+') else {
        return (stem, false);
    };
    let (left, done) = count.split_once('-').unwrap_or((count, "0"));
    match (left.parse::<u32>(), done.parse::<u32>()) {
        (Ok(left), Ok(_)) => (id, left == 0),
        _ => (stem, false),
    }
}

impl Entry {
    /// Whether it is for this architecture and starts a kernel.
    pub fn is_linux(&self) -> bool {
        let here = matches!(
            self.architecture.to_ascii_lowercase().as_str(),
            "" | "x64" | "x86-64" | "x86_64"
        );
        here && self.efi.is_empty() && !self.linux.is_empty()
    }
}

/// The order of a menu, best first (Boot Loader Specification, "Sorting").
pub fn order(a: &Entry, b: &Entry) -> Ordering {
    let keyed = |entry: &Entry| !entry.sort_key.is_empty();
    a.bad
        .cmp(&b.bad)
        .then_with(|| keyed(b).cmp(&keyed(a)))
        .then_with(|| {
            if keyed(a) && keyed(b) {
                (&a.sort_key, &a.machine)
                    .cmp(&(&b.sort_key, &b.machine))
                    .then_with(|| version::compare(&b.version, &a.version))
            } else {
                Ordering::Equal
            }
        })
        .then_with(|| version::compare(&b.id, &a.id))
        .then_with(|| b.id.cmp(&a.id))
}

/// All entries in the directory at `place`, unsorted, and what could not be used.
pub fn read_all(world: &mut dyn World, place: &Place) -> io::Result<(Vec<Entry>, Vec<String>)> {
    let mut entries = Vec::new();
    let mut notes = Vec::new();
    let names = world.list(place)?;
    let files = names
        .iter()
        .filter(|name| name.len() > ".conf".len() && name.ends_with(".conf"));
    for name in files.take(MAX_FILES) {
        let file = Place {
            path: format!("{}/{name}", place.path.trim_end_matches('/')),
            ..place.clone()
        };
        match world.read(&file, MAX_FILE) {
            Ok(bytes) => entries.push(parse(name, &String::from_utf8_lossy(&bytes))),
            Err(error) => notes.push(format!("({}){}: {error}", file.device, file.path)),
        }
    }
    Ok((entries, notes))
}

/// `default` of a `loader.conf`; empty if there is none.
pub fn default_pattern(text: &str) -> &str {
    text.lines()
        .filter_map(|line| line.trim().split_once(char::is_whitespace))
        .find(|(key, _)| *key == "default")
        .map_or("", |(_, value)| value.trim())
}

/// Whether `id` is what the pattern of a `loader.conf` means: `*`, `?` and plain text.
pub fn matches(pattern: &str, id: &str) -> bool {
    let pattern: Vec<char> = pattern.trim_end_matches(".conf").chars().collect();
    let id: Vec<char> = id.chars().collect();
    // Only the last star has to be tried again.
    let (mut p, mut i) = (0, 0);
    let mut star = None;
    while i < id.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, i));
                p += 1;
            }
            Some('?') => (p, i) = (p + 1, i + 1),
            Some(same) if *same == id[i] => (p, i) = (p + 1, i + 1),
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    (p, i) = (at + 1, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|next| *next == '*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn keys() {
        let entry = parse(
            "abc-6.1.conf",
            "# made by hand\ntitle  Some Linux\nversion 6.1\nlinux\t/vmlinuz\ninitrd /a\n\
             initrd /b\noptions root=x ro\noptions quiet\nunknown y\nmachine-id abc\n",
        );
        assert_eq!((entry.id.as_str(), entry.bad), ("abc-6.1", false));
        assert_eq!(entry.title, "Some Linux");
        assert_eq!(entry.initrds, ["/a", "/b"]);
        assert_eq!(entry.options, ["root=x ro", "quiet"]);
        assert!(entry.is_linux());
        assert!(!parse("a.conf", "efi /EFI/shell.efi").is_linux());
        assert!(!parse("a.conf", "linux /v\narchitecture aa64").is_linux());
        assert_eq!(parse("a.conf", "linux /v").title, "a");
    }

    #[test]
    fn counted_tries() {
        assert_eq!(tries("a-6.1+3-1"), ("a-6.1", false));
        assert_eq!(tries("a-6.1+0-3"), ("a-6.1", true));
        assert_eq!(tries("a-6.1+2"), ("a-6.1", false));
        assert_eq!(tries("libstdc++"), ("libstdc++", false));
        assert_eq!(tries("6.1+deb12"), ("6.1+deb12", false));
    }

    #[test]
    fn the_menu_s_order() {
        let entry = |name: &str, key: &str, version: &str| {
            parse(
                name,
                &format!("sort-key {key}\nversion {version}\nlinux /v"),
            )
        };
        let mut entries = [
            parse("z-9.conf", "linux /v"),
            entry("a+0.conf", "a", "9"),
            entry("b1.conf", "b", "6.9"),
            entry("b2.conf", "b", "6.10"),
            entry("a1.conf", "a", "1"),
            parse("z-10.conf", "linux /v"),
        ];
        entries.sort_by(order);
        let ids: Vec<&str> = entries.iter().map(|entry| entry.id.as_str()).collect();
        assert_eq!(ids, ["a1", "b2", "b1", "z-10", "z-9", "a"]);
    }

    #[test]
    fn patterns() {
        assert!(matches("arch*", "arch-lts") && matches("a?c.conf", "abc"));
        assert!(matches("*-6.1*", "x-6.1-y") && matches("*", ""));
        assert!(!matches("arch", "arch-lts") && !matches("", "a") && !matches("a*b", "ac"));
        assert_eq!(default_pattern("timeout 3\ndefault  arch*\n"), "arch*");
        assert_eq!(default_pattern("timeout 3\n"), "");
    }

    proptest! {
        #[test]
        fn any_file_is_read(name in ".{0,20}", text in "(.|\n){0,200}") {
            let _ = parse(&name, &text);
        }

        #[test]
        fn patterns_end(pattern in "[a*?]{0,30}", id in "a{0,60}") {
            let _ = matches(&pattern, &id);
        }
    }
}
