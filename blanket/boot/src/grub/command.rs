//! GRUB's commands, as far as they decide what is started.

use super::eval::{Interpreter, join};
use super::{Place, Search};
use crate::bls;

/// Commands that only concern screens, drivers and keys. They succeed.
const HARMLESS: &[&str] = &[
    "true",
    "insmod",
    "rmmod",
    "export",
    "echo",
    "serial",
    "terminal_input",
    "terminal_output",
    "loadfont",
    "background_image",
    "background_color",
    "play",
    "clear",
    "sleep",
    "videoinfo",
    "save_env",
    "increment",
    "boot",
    "nativedisk",
    "password",
    "password_pbkdf2",
    "gfxmode",
    "fakebios",
    "cryptomount",
    "tpm",
    "clear_menu",
];

/// Commands that start something that is not a Linux kernel by itself.
const OTHER: &[&str] = &[
    "chainloader",
    "multiboot",
    "multiboot2",
    "xen_hypervisor",
    "knetbsd",
    "kfreebsd",
    "kopenbsd",
    "ntldr",
    "fwsetup",
    "halt",
    "reboot",
    "exit",
    "appleloader",
    "loopback",
];

impl Interpreter<'_> {
    /// Runs one command; whether it succeeded.
    pub(super) fn builtin(&mut self, name: &str, arguments: &[String]) -> bool {
        match name {
            "set" => {
                if let Some((name, value)) = arguments.first().and_then(|a| a.split_once('=')) {
                    self.set(name, value.to_owned());
                }
                true
            }
            "unset" => {
                for name in arguments {
                    self.variables.unset(name);
                }
                true
            }
            "setparams" => {
                self.words = arguments.to_vec();
                true
            }
            "[" => match arguments.split_last() {
                Some((last, rest)) if last == "]" => self.test(rest),
                _ => false,
            },
            "test" => self.test(arguments),
            "load_env" => self.load_env_command(arguments),
            "search" | "search.fs_uuid" | "search.fs_label" | "search.file" => {
                self.search(name, arguments)
            }
            "search_fs_uuid" | "search_fs_label" | "search_fs_file" => {
                self.search(&name.replace("search_fs_", "search.fs_"), arguments)
            }
            "probe" => self.probe(arguments),
            "linux" | "linux16" | "linuxefi" | "kernel" => self.linux(arguments),
            "initrd" | "initrd16" | "initrdefi" => self.initrd(arguments),
            "blscfg" => self.blscfg(),
            name if OTHER.contains(&name) => {
                self.start.other = Some(format!("the command {name}"));
                true
            }
            name => HARMLESS.contains(&name),
        }
    }

    fn load_env_command(&mut self, arguments: &[String]) -> bool {
        let mut file = format!("{}/grubenv", self.get("prefix"));
        let mut only = Vec::new();
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--file" | "-f" => file = arguments.next().cloned().unwrap_or_default(),
                "--skip-sig" | "-s" => {}
                other => match other.strip_prefix("--file=") {
                    Some(path) => path.clone_into(&mut file),
                    None => only.push(other.to_owned()),
                },
            }
        }
        let place = self.place(&file);
        self.load_env(&place, &only)
    }

    /// `search` in all spellings (grub-core/commands/search_wrap.c).
    fn search(&mut self, name: &str, arguments: &[String]) -> bool {
        let mut kind = match name {
            "search.fs_label" => 'l',
            "search.file" | "search.fs_file" => 'f',
            "search.fs_uuid" => 'u',
            _ => 'f',
        };
        let plain = name == "search";
        let mut variable = None;
        let mut names = Vec::new();
        let mut arguments = arguments.iter().peekable();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--fs-uuid" | "-u" => kind = 'u',
                "--label" | "--fs-label" | "-l" => kind = 'l',
                "--file" | "-f" => kind = 'f',
                "--part-uuid" | "--partuuid" | "-p" => kind = 'p',
                "--no-floppy" | "-n" | "--efidisk-only" | "--cryptodisk-only" => {}
                "--set" | "-s" => {
                    // Its value is a word of its own only where more words come.
                    variable = Some("root".to_owned());
                    let is_word = |next: &&String| !next.starts_with('-');
                    let words = arguments.clone().filter(|next| is_word(next)).count();
                    if words > usize::from(names.is_empty())
                        && let Some(next) = arguments.next_if(|next| is_word(next))
                    {
                        variable = Some(next.clone());
                    }
                }
                option if option.starts_with("--set=") => {
                    variable = Some(option["--set=".len()..].to_owned());
                }
                "--hint" | "-h" | "--hint-bios" | "--hint-efi" | "--hint-baremetal"
                | "--hint-ieee1275" | "--hint-arc" => {
                    arguments.next();
                }
                option if option.starts_with("--") => {}
                name => names.push(name.to_owned()),
            }
        }
        if !plain && names.len() > 1 {
            variable = Some(names.remove(1));
        }
        let Some(name) = names.first() else {
            return false;
        };
        let what = match kind {
            'u' => Search::Uuid(name),
            'l' => Search::Label(name),
            'p' => Search::Partition(name),
            _ => Search::File(name),
        };
        let relative = self.place("/").relative;
        let Some(device) = self.world.search(what, relative) else {
            return false;
        };
        if let Some(variable) = variable.or_else(|| (!plain).then(|| "root".to_owned())) {
            self.set(&variable, device);
        }
        true
    }

    fn probe(&mut self, arguments: &[String]) -> bool {
        let mut variable = None;
        let mut kind = "";
        let mut device = "";
        let mut arguments = arguments.iter();
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--set" | "-s" => variable = arguments.next().cloned(),
                "--fs-uuid" | "-u" => kind = "uuid",
                "--label" | "-l" => kind = "label",
                "--fs" | "-f" => kind = "fs",
                option if option.starts_with("--set=") => {
                    variable = Some(option["--set=".len()..].to_owned());
                }
                option if option.starts_with('-') => {}
                name => device = name,
            }
        }
        let device = device.trim_start_matches('(').trim_end_matches(')');
        let Some((uuid, label, fs)) = self.world.describe(device) else {
            return false;
        };
        let value = match kind {
            "uuid" => uuid,
            "label" => label,
            "fs" => fs.to_owned(),
            _ => return false,
        };
        if let Some(variable) = variable {
            self.set(&variable, value);
        }
        true
    }

    fn linux(&mut self, arguments: &[String]) -> bool {
        let Some((file, rest)) = arguments.split_first() else {
            return false;
        };
        let first = format!("BOOT_IMAGE={file}");
        let words = std::iter::once(&first).chain(rest).map(|word| quote(word));
        let words: Vec<String> = words.collect();
        self.start.kernel = Some(self.place(file));
        self.start.cmdline = join(words.iter().map(String::as_str));
        self.start.initrds.clear();
        true
    }

    fn initrd(&mut self, arguments: &[String]) -> bool {
        let mut places = Vec::new();
        for file in arguments.iter().filter(|file| !file.is_empty()) {
            if file.starts_with("newc:") {
                self.start.other = Some(format!("the initrd {file}, which is not a whole file,"));
                return false;
            }
            places.push(self.place(file));
        }
        // GRUB takes the last command's files.
        self.start.initrds = places;
        true
    }

    /// Entries of the Boot Loader Specification, as Fedora's GRUB takes them.
    fn blscfg(&mut self) -> bool {
        let device = match self.get("boot") {
            "" => self.get("root"),
            device => device,
        };
        let device = device.to_owned();
        let own = self.get("blsdir").to_owned();
        for directory in [own.as_str(), "/loader/entries", "/boot/loader/entries"] {
            if directory.is_empty() {
                continue;
            }
            for relative in [false, true] {
                let place = Place {
                    device: device.clone(),
                    path: directory.to_owned(),
                    relative,
                };
                let Ok((mut entries, notes)) = bls::read_all(self.world, &place) else {
                    continue;
                };
                self.notes.extend(notes);
                if !entries.is_empty() {
                    // Newest first, by file name.
                    entries.sort_by(|a, b| crate::version::compare(&b.id, &a.id));
                    self.add_bls(entries, &place);
                    return true;
                }
            }
        }
        false
    }
}

/// A word of a command line as GRUB passes it on (grub-core/lib/cmdline.c).
fn quote(word: &str) -> String {
    let space = word.contains(' ');
    let mut out = String::new();
    if space {
        out.push('"');
    }
    for next in word.chars() {
        if matches!(next, '\\' | '\'' | '"') {
            out.push('\\');
        }
        out.push(next);
    }
    if space {
        out.push('"');
    }
    out
}
