//! An image's boot menu, and what its entries start.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::fs::Kind;
use crate::grub::eval::{EvalError, Interpreter, Item, Start};
use crate::grub::{Place, World};
use crate::partitions::Role;
use crate::source::Source;
use crate::volumes::Volumes;
use crate::{bls, extlinux};

/// Largest kernel or single initrd, bytes.
const MAX_FILE: u64 = 512 << 20;
/// Largest initrd of all files together, bytes.
const MAX_INITRD: usize = 1 << 30;
/// Directories of systems on an EFI system partition.
const MAX_SYSTEMS: usize = 16;
/// Levels of submenus.
const MAX_LEVELS: usize = 8;

/// Where GRUB's configuration is, in this order; a first directory for btrfs, where Ubuntu
/// and Fedora name their root's subvolume so.
const GRUB_FILES: &[&str] = &[
    "/boot/grub/grub.cfg",
    "/boot/grub2/grub.cfg",
    "/grub/grub.cfg",
    "/grub2/grub.cfg",
];
const SUBVOLUMES: &[&str] = &["", "/@", "/root"];
/// Where EXTLINUX's is.
const EXTLINUX_FILES: &[&str] = &[
    "/boot/extlinux/extlinux.conf",
    "/extlinux/extlinux.conf",
    "/boot/extlinux.conf",
    "/extlinux.conf",
    "/boot/syslinux/syslinux.cfg",
    "/syslinux/syslinux.cfg",
    "/syslinux.cfg",
];

/// Who wrote the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loader {
    /// GRUB 2: `grub.cfg`, with or without entries of the Boot Loader Specification.
    Grub,
    /// The Boot Loader Specification, as systemd-boot reads it.
    Bls,
    /// EXTLINUX or SYSLINUX.
    Extlinux,
}

/// Something that can be booted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// As the menu shows it, with the titles of submenus before it: `Advanced>Linux 6.1`.
    pub title: String,
    /// The configuration's own name for it, likewise; empty if it has none.
    pub id: String,
    /// The kernel command line.
    pub cmdline: String,
    start: Start,
}

impl Entry {
    /// The kernel's path, as the configuration has it.
    #[must_use]
    pub fn kernel(&self) -> &str {
        self.start.kernel.as_ref().map_or("", |place| &place.path)
    }

    /// The initrds' paths.
    pub fn initrds(&self) -> impl Iterator<Item = &str> {
        self.start.initrds.iter().map(|place| place.path.as_str())
    }
}

/// All that an image offers to boot.
#[derive(Clone, Debug)]
pub struct Menu {
    /// In the menu's order, submenus in their place. Never empty.
    pub entries: Vec<Entry>,
    /// The one that is booted when nobody chooses.
    default: std::result::Result<usize, String>,
    /// Whose configuration it is.
    pub loader: Loader,
    /// Where it is, for messages: `partition 1 (ext4): /boot/grub/grub.cfg`.
    pub config: String,
    /// What was passed over, one sentence each.
    pub notes: Vec<String>,
}

impl Menu {
    /// The entry that is called `wanted`, or the default.
    ///
    /// `wanted` is an id, a title, a number from 0, or what only one entry has in its
    /// title, id or kernel's name (a version), in this order.
    ///
    /// # Errors
    /// There is none, there are several, or the default starts no Linux.
    pub fn pick(&self, wanted: Option<&str>) -> Result<&Entry> {
        let Some(wanted) = wanted else {
            return match &self.default {
                Ok(index) => self.entries.get(*index).ok_or_else(|| self.unknown("")),
                Err(what) => Err(Error::Entry {
                    entry: what.clone(),
                    config: self.config.clone(),
                    problem: format!(
                        "it is the default, but starts no Linux; choose one of: {}",
                        self.names()
                    ),
                }),
            };
        };
        let last = |path: &str| path.rsplit('>').next().unwrap_or_default().to_owned();
        let exact = |entry: &&Entry| {
            entry.id == wanted
                || entry.title == wanted
                || last(&entry.id) == wanted
                || last(&entry.title) == wanted
        };
        if let Some(entry) = self.entries.iter().find(exact) {
            return Ok(entry);
        }
        if let Ok(index) = wanted.parse::<usize>() {
            return self.entries.get(index).ok_or_else(|| self.unknown(wanted));
        }
        let within = |entry: &&Entry| {
            entry.title.contains(wanted)
                || entry.id.contains(wanted)
                || entry.kernel().contains(wanted)
        };
        let mut candidates: Vec<&Entry> = self.entries.iter().filter(within).collect();
        // The same kernel with other words is another way to start it: the plain one is meant.
        if let [first, rest @ ..] = candidates.as_slice()
            && rest.iter().all(|entry| entry.kernel() == first.kernel())
        {
            candidates.truncate(1);
        }
        match candidates.as_slice() {
            [entry] => Ok(entry),
            _ => Err(self.unknown(wanted)),
        }
    }

    fn unknown(&self, wanted: &str) -> Error {
        Error::NoSuchEntry {
            wanted: wanted.to_owned(),
            known: self.names(),
        }
    }

    fn names(&self) -> String {
        let name = |(index, entry): (usize, &Entry)| format!("{index}: {}", entry.title);
        let names: Vec<String> = self.entries.iter().take(32).enumerate().map(name).collect();
        names.join("; ")
    }
}

/// What a VM is started with.
#[derive(Clone, PartialEq, Eq)]
pub struct Loaded {
    /// The kernel's file, unchanged.
    pub kernel: Vec<u8>,
    /// All initrds, one after the other, each padded to 4 bytes; empty if there is none.
    pub initrd: Vec<u8>,
    /// The command line, as the boot loader would pass it.
    pub cmdline: String,
    /// For messages: title, files, where from.
    pub description: String,
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loaded")
            .field("kernel", &self.kernel.len())
            .field("initrd", &self.initrd.len())
            .field("cmdline", &self.cmdline)
            .field("description", &self.description)
            .finish()
    }
}

/// An open disk image. It is only read.
pub struct Image {
    volumes: Volumes,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let volumes = self.volumes.all.iter().map(|volume| volume.describe());
        f.debug_list().entries(volumes).finish()
    }
}

/// A configuration that was understood, before it is known what it is good for.
struct Draft {
    entries: Vec<Entry>,
    default: std::result::Result<usize, String>,
    others: Vec<String>,
    notes: Vec<String>,
}

impl Image {
    /// Looks at the partitions and file systems of `source`.
    ///
    /// # Errors
    /// The disk cannot be read, or no file system on it can.
    pub fn open(source: Arc<dyn Source>) -> Result<Self> {
        Ok(Self {
            volumes: Volumes::open(source)?,
        })
    }

    /// Finds the boot configuration and all its entries that start Linux.
    ///
    /// # Errors
    /// There is no configuration, or none that starts Linux.
    pub fn menu(&mut self) -> Result<Menu> {
        let mut failed: Option<Error> = None;
        let mut notes = Vec::new();
        for (loader, place) in self.configurations() {
            let volume = self.volumes.describe_device(&place.device);
            let config = format!("{volume}: {}", place.path);
            let draft = match loader {
                Loader::Grub => self.grub(&place),
                Loader::Bls => self.bls(&place),
                Loader::Extlinux => self.extlinux(&place),
            };
            let draft = match draft {
                Ok(draft) => draft,
                Err(error) => {
                    notes.push(format!("{config}: {error}"));
                    failed.get_or_insert(Error::NoEntries {
                        config,
                        why: format!(": {error}"),
                    });
                    continue;
                }
            };
            notes.extend(draft.notes);
            if draft.entries.is_empty() {
                let why = match draft.others.as_slice() {
                    [] => String::new(),
                    some => format!(", only {}", some.join(", ")),
                };
                failed.get_or_insert(Error::NoEntries { config, why });
                continue;
            }
            return Ok(Menu {
                entries: draft.entries,
                default: draft.default,
                loader,
                config,
                notes,
            });
        }
        let looked = || {
            let mut looked: Vec<String> = self
                .volumes
                .all
                .iter()
                .map(|volume| volume.describe())
                .collect();
            looked.extend(
                self.volumes
                    .unreadable
                    .iter()
                    .map(|what| format!("not on others ({what})")),
            );
            looked.join(", ")
        };
        Err(failed.unwrap_or_else(|| Error::NoConfiguration { looked: looked() }))
    }

    /// Reads the files of an entry of [`Image::menu`].
    ///
    /// # Errors
    /// A file is missing, too large, or cannot be read.
    pub fn load(&mut self, entry: &Entry) -> Result<Loaded> {
        let Some(place) = &entry.start.kernel else {
            return Err(Error::Entry {
                entry: entry.title.clone(),
                config: "the boot menu".into(),
                problem: "it names no kernel".into(),
            });
        };
        let kernel = self.file(place)?;
        let mut initrd = Vec::new();
        for place in &entry.start.initrds {
            initrd.append(&mut self.file(place)?);
            initrd.resize(initrd.len().next_multiple_of(4), 0);
            if initrd.len() > MAX_INITRD {
                return Err(self.file_error(place, "all initrds together have more than 1 GiB"));
            }
        }
        let volume = self.volumes.describe_device(&place.device);
        Ok(Loaded {
            kernel,
            initrd,
            cmdline: entry.cmdline.clone(),
            description: format!("{:?}: {} on {volume}", entry.title, place.path),
        })
    }

    fn file(&mut self, place: &Place) -> Result<Vec<u8>> {
        self.volumes.read(place, MAX_FILE).map_err(|error| {
            let problem = match error.kind() {
                io::ErrorKind::NotFound => "the boot entry names it, but it is not there".into(),
                _ => error.to_string(),
            };
            self.file_error(place, &problem)
        })
    }

    fn file_error(&mut self, place: &Place, problem: &str) -> Error {
        Error::File {
            volume: self.volumes.describe_device(&place.device),
            path: place.path.clone(),
            problem: problem.to_owned(),
        }
    }

    /// All files that may be a configuration, best first.
    fn configurations(&mut self) -> Vec<(Loader, Place)> {
        let mut found = Vec::new();
        let devices: Vec<(String, bool)> = self
            .volumes
            .all
            .iter()
            .map(|volume| (volume.device.clone(), volume.has_default_subvolume()))
            .collect();
        let boot = self
            .volumes
            .with_role(Role::Xbootldr)
            .or_else(|| self.volumes.with_role(Role::Esp))
            .map(|volume| volume.device.clone());
        let mut directories: HashMap<String, Vec<String>> = HashMap::new();
        for (device, _) in &devices {
            let efi = Place {
                device: device.clone(),
                path: "/EFI".into(),
                relative: false,
            };
            let mut names = self.volumes.list(&efi).unwrap_or_default();
            names.truncate(MAX_SYSTEMS);
            directories.insert(device.clone(), names);
        }
        let mut look = |loader, device: &str, path: String, relative: bool, directory: bool| {
            let place = Place {
                device: device.to_owned(),
                path,
                relative,
            };
            let there = match self.volumes.kind(&place) {
                Ok(Kind::File(_)) => !directory,
                Ok(Kind::Directory) => {
                    directory
                        && self
                            .volumes
                            .list(&place)
                            .is_ok_and(|names| names.iter().any(|name| name.ends_with(".conf")))
                }
                _ => false,
            };
            if there {
                found.push((loader, place));
            }
        };
        for (device, two_roots) in &devices {
            for file in GRUB_FILES {
                if *two_roots {
                    look(Loader::Grub, device, (*file).to_owned(), true, false);
                }
                for above in SUBVOLUMES {
                    look(Loader::Grub, device, format!("{above}{file}"), false, false);
                }
            }
        }
        // An EFI system partition has a directory for each system; some keep all of theirs there.
        for (device, _) in &devices {
            for directory in directories.get(device).into_iter().flatten() {
                let file = format!("/EFI/{directory}/grub.cfg");
                look(Loader::Grub, device, file, false, false);
            }
        }
        // A partition that is marked for it, then any.
        let marked = boot.iter().map(|device| (device, "/loader/entries"));
        let others = devices.iter().flat_map(|(device, _)| {
            ["/loader/entries", "/boot/loader/entries"].map(|path| (device, path))
        });
        for (device, path) in marked.chain(others) {
            look(Loader::Bls, device, path.to_owned(), true, true);
        }
        for (device, _) in &devices {
            for file in EXTLINUX_FILES {
                look(Loader::Extlinux, device, (*file).to_owned(), true, false);
            }
        }
        found
    }

    fn grub(&mut self, config: &Place) -> std::result::Result<Draft, EvalError> {
        let mut grub = Interpreter::new(&mut self.volumes, config);
        grub.run_file(config)?;
        grub.open_submenus();
        let items = std::mem::take(&mut grub.items);
        if grub.get("boot_once") == "true" {
            grub.notes.push(
                "the image chose its entry for one boot only (next_entry in grubenv); nothing is \
                 written here, so it stays chosen"
                    .into(),
            );
        }
        let wanted = grub.get("default").to_owned();
        let default_path = find_default(&items, &wanted);
        let mut draft = Draft {
            entries: Vec::new(),
            default: Ok(0),
            others: Vec::new(),
            notes: Vec::new(),
        };
        collect(
            &mut grub,
            &items,
            &mut Vec::new(),
            &default_path,
            &mut draft,
        );
        draft.notes.append(&mut grub.notes);
        Ok(draft)
    }

    fn bls(&mut self, directory: &Place) -> std::result::Result<Draft, EvalError> {
        let (mut all, notes) = bls::read_all(&mut self.volumes, directory)?;
        all.sort_by(bls::order);
        let loader = Place {
            path: directory.path.replace("/entries", "/loader.conf"),
            ..directory.clone()
        };
        let pattern = match self.volumes.read(&loader, 64 << 10) {
            Ok(text) => bls::default_pattern(&String::from_utf8_lossy(&text)).to_owned(),
            Err(_) => String::new(),
        };
        let (linux, others): (Vec<_>, Vec<_>) = all.into_iter().partition(bls::Entry::is_linux);
        let place = |path: &str| Place {
            path: path.to_owned(),
            ..directory.clone()
        };
        let default = linux
            .iter()
            .position(|entry| !pattern.is_empty() && bls::matches(&pattern, &entry.id));
        let entries = linux.into_iter().map(|entry| {
            let cmdline = entry.options.join(" ").trim().to_owned();
            Entry {
                title: entry.title,
                id: entry.id,
                cmdline: cmdline.clone(),
                start: Start {
                    kernel: Some(place(&entry.linux)),
                    cmdline,
                    initrds: entry.initrds.iter().map(|path| place(path)).collect(),
                    other: None,
                },
            }
        });
        Ok(Draft {
            entries: entries.collect(),
            default: Ok(default.unwrap_or(0)),
            others: others
                .into_iter()
                .map(|entry| format!("{:?}, which is no kernel with its initrd", entry.title))
                .collect(),
            notes,
        })
    }

    fn extlinux(&mut self, file: &Place) -> std::result::Result<Draft, EvalError> {
        let text = self.volumes.read(file, 1 << 20)?;
        let (labels, default) = extlinux::parse(&String::from_utf8_lossy(&text));
        let directory = file.path.rsplit_once('/').map_or("", |(path, _)| path);
        let place = |path: &str| Place {
            path: if path.starts_with('/') {
                path.to_owned()
            } else {
                format!("{directory}/{path}")
            },
            ..file.clone()
        };
        let mut draft = Draft {
            entries: Vec::new(),
            default: Ok(0),
            others: Vec::new(),
            notes: Vec::new(),
        };
        for (index, label) in labels.into_iter().enumerate() {
            let linux = !label.linux.is_empty()
                && ![".c32", ".com", ".bin", ".img"]
                    .iter()
                    .any(|end| label.linux.to_ascii_lowercase().ends_with(end));
            if !linux {
                if index == default {
                    draft.default = Err(label.title.clone());
                }
                draft.others.push(format!("{:?}", label.title));
                continue;
            }
            if index == default {
                draft.default = Ok(draft.entries.len());
            }
            let cmdline = format!("BOOT_IMAGE={} {}", label.linux, label.append);
            let cmdline = cmdline.trim().to_owned();
            draft.entries.push(Entry {
                title: label.title,
                id: label.name,
                cmdline: cmdline.clone(),
                start: Start {
                    kernel: Some(place(&label.linux)),
                    cmdline,
                    initrds: label.initrds.iter().map(|path| place(path)).collect(),
                    other: None,
                },
            });
        }
        Ok(draft)
    }
}

/// Indices from the top of the item that `default` means: numbers, ids or titles, with `>`
/// between the levels (`>>` is one that belongs to a title). As in GRUB, the first item where
/// it means none.
fn find_default(items: &[Item], default: &str) -> Vec<usize> {
    let text = default.replace(">>", "\0");
    let mut path = Vec::new();
    let mut items = items;
    let mut parts = text.split('>').map(|part| part.replace('\0', ">"));
    while path.len() < MAX_LEVELS && !items.is_empty() {
        let part = parts.next().unwrap_or_default();
        let index = match part.trim().parse::<usize>() {
            Ok(number) => Some(number).filter(|number| *number < items.len()),
            Err(_) => items
                .iter()
                .position(|item| !part.is_empty() && (item.id == part || item.title == part)),
        };
        let index = index.unwrap_or(0);
        path.push(index);
        match items.get(index).and_then(|item| item.submenu.as_ref()) {
            Some(inner) => items = inner,
            None => break,
        }
    }
    path
}

/// Runs every entry and keeps those that start Linux.
fn collect(
    grub: &mut Interpreter<'_>,
    items: &[Item],
    above: &mut Vec<(String, String, usize)>,
    default: &[usize],
    draft: &mut Draft,
) {
    for (index, item) in items.iter().enumerate() {
        above.push((item.title.clone(), item.id.clone(), index));
        let titles: Vec<&str> = above.iter().map(|(title, ..)| title.as_str()).collect();
        let title = titles.join(">");
        let is_default = above.iter().map(|(.., index)| index).eq(default);
        if let Some(inner) = &item.submenu {
            if inner.is_empty() && is_default {
                draft.default = Err(title);
            } else if above.len() < MAX_LEVELS {
                collect(grub, inner, above, default, draft);
            }
            above.pop();
            continue;
        }
        let start = grub.start(item, &title);
        match (&start.kernel, &start.other) {
            (Some(_), None) => {
                if is_default {
                    draft.default = Ok(draft.entries.len());
                }
                let ids: Vec<&str> = above.iter().map(|(_, id, _)| id.as_str()).collect();
                draft.entries.push(Entry {
                    id: if item.id.is_empty() {
                        String::new()
                    } else {
                        ids.join(">")
                    },
                    title,
                    cmdline: start.cmdline.clone(),
                    start,
                });
            }
            (_, other) => {
                if is_default {
                    draft.default = Err(title.clone());
                }
                let what = other.as_deref().unwrap_or("nothing to start");
                draft.others.push(format!("{title:?} ({what})"));
            }
        }
        above.pop();
    }
}
