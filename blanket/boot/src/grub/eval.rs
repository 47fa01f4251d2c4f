//! Runs GRUB's scripts far enough to know the menu and what each entry starts.
//!
//! A script is a stranger's: steps, values, entries and nesting are bounded, nothing is
//! written, and what only concerns screens and drivers succeeds without doing anything.

use std::collections::HashMap;
use std::io;

use super::parse::{self, Block, Node, Part, Word};
use super::{Place, World, env};
use crate::bls;

/// Commands that are run for one image, all entries together.
const MAX_STEPS: u32 = 500_000;
/// Longest value or word, bytes.
const MAX_VALUE: usize = 64 << 10;
/// Variables at a time.
const MAX_VARIABLES: usize = 4096;
/// Bytes of all their values, and of one command's words.
const MAX_BYTES: usize = 1 << 20;
/// So many bytes of words or of a file count as one step.
const BYTES_A_STEP: usize = 256;
/// Words of one command.
const MAX_WORDS: usize = 4096;
/// Functions calling functions, files including files.
const MAX_CALLS: u32 = 16;
/// Entries of all menus together.
pub const MAX_ENTRIES: usize = 512;
/// Largest configuration file, bytes.
pub const MAX_CONFIG: u64 = 4 << 20;

/// What an entry starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Start {
    /// The kernel's file.
    pub kernel: Option<Place>,
    /// Its command line.
    pub cmdline: String,
    /// Files to load as initrd, in order.
    pub initrds: Vec<Place>,
    /// A command that starts something else than Linux, or that cannot be followed.
    pub other: Option<String>,
}

/// What a menu shows.
#[derive(Clone, Debug)]
pub struct Item {
    /// Title.
    pub title: String,
    /// Id, for `default`; empty if it has none.
    pub id: String,
    /// Its commands, and the words that they may refer to as `$1`, ...
    body: Body,
    /// The items of a submenu; none for an entry.
    pub submenu: Option<Vec<Item>>,
}

#[derive(Clone, Debug)]
enum Body {
    Script(Block, Vec<String>),
    /// An entry file, and the directory where it is.
    Bls(Box<(bls::Entry, Place)>),
}

/// How a block ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flow {
    Next,
    /// The function returns, or the file is left for another one.
    Return,
    /// There were too many steps.
    Stop,
}

/// Why the script could not be run to its end.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The file cannot be read.
    #[error("{0}")]
    Read(#[from] io::Error),
    /// The file is not GRUB's language.
    #[error("{0}")]
    Syntax(#[from] parse::SyntaxError),
}

/// Variables with their values, which are bounded together.
#[derive(Clone, Default)]
pub(super) struct Variables {
    values: HashMap<String, String>,
    bytes: usize,
}

impl Variables {
    fn get(&self, name: &str) -> &str {
        self.values.get(name).map_or("", String::as_str)
    }

    /// Keeps the old value where the new one is too much.
    fn set(&mut self, name: &str, value: String) {
        let old = self.values.get(name).map(String::len);
        let bytes = self.bytes - old.unwrap_or(0) + value.len();
        let room = old.is_some() || self.values.len() < MAX_VARIABLES;
        if value.len() <= MAX_VALUE && name.len() <= MAX_VALUE && bytes <= MAX_BYTES && room {
            self.bytes = bytes;
            self.values.insert(name.to_owned(), value);
        }
    }

    pub(super) fn unset(&mut self, name: &str) {
        if let Some(old) = self.values.remove(name) {
            self.bytes -= old.len();
        }
    }
}

/// An interpreter with the variables that the script has set.
pub struct Interpreter<'a> {
    pub(super) world: &'a mut dyn World,
    pub(super) variables: Variables,
    functions: HashMap<String, Block>,
    /// `$1`, ...
    pub(super) words: Vec<String>,
    /// The menu so far.
    pub items: Vec<Item>,
    count: usize,
    pub(super) start: Start,
    steps: u32,
    calls: u32,
    /// Things that the user should know.
    pub notes: Vec<String>,
}

impl<'a> Interpreter<'a> {
    /// As GRUB is when it begins with the file at `config`.
    pub fn new(world: &'a mut dyn World, config: &Place) -> Self {
        let (directory, _) = config.path.rsplit_once('/').unwrap_or_default();
        let mut variables = Variables::default();
        for (name, value) in [
            ("root", config.device.clone()),
            ("prefix", format!("({}){directory}", config.device)),
            // What a PC with a BIOS has; some configurations ask.
            ("grub_platform", "pc".into()),
            ("grub_cpu", "i386".into()),
            // Ubuntu's cloud images first try without their initrd, and say here that it failed.
            ("initrdfail", "1".into()),
        ] {
            variables.set(name, value);
        }
        // What GRUB 2.06 and later can do (grub-core/normal/main.c).
        for feature in [
            "chainloader_bpb",
            "ntldr",
            "platform_search_hint",
            "default_font_path",
            "all_video_module",
            "menuentry_id",
            "menuentry_options",
            "200_final",
            "nativedisk_cmd",
            "timeout_style",
        ] {
            variables.set(&format!("feature_{feature}"), "y".into());
        }
        if config.relative {
            variables.set("btrfs_relative_path", "y".into());
        }
        Self {
            world,
            variables,
            functions: HashMap::new(),
            words: Vec::new(),
            items: Vec::new(),
            count: 0,
            start: Start::default(),
            steps: 0,
            calls: 0,
            notes: Vec::new(),
        }
    }

    /// Runs the file at `place`, as `configfile` does.
    pub fn run_file(&mut self, place: &Place) -> Result<(), EvalError> {
        let bytes = self.world.read(place, MAX_CONFIG)?;
        self.charge(bytes.len());
        let block = parse::parse(&String::from_utf8_lossy(&bytes))?;
        let (directory, _) = place.path.rsplit_once('/').unwrap_or_default();
        self.set("config_file", format!("({}){}", place.device, place.path));
        self.set("config_directory", format!("({}){directory}", place.device));
        self.block(&block);
        if self.steps >= MAX_STEPS {
            return Err(io::Error::other("it runs without end").into());
        }
        Ok(())
    }

    /// A variable's value; empty if it has none.
    pub fn get(&self, name: &str) -> &str {
        if let Ok(number) = name.parse::<usize>() {
            return match number.checked_sub(1) {
                Some(index) => self.words.get(index).map_or("", String::as_str),
                None => "",
            };
        }
        self.variables.get(name)
    }

    pub(super) fn set(&mut self, name: &str, value: String) {
        self.variables.set(name, value);
    }

    /// Counts work by its bytes.
    fn charge(&mut self, bytes: usize) {
        let steps = u32::try_from(bytes / BYTES_A_STEP).unwrap_or(MAX_STEPS);
        self.steps = self.steps.saturating_add(steps);
    }

    /// Takes the variables of an environment block.
    pub(super) fn load_env(&mut self, place: &Place, only: &[String]) -> bool {
        let Ok(bytes) = self.world.read(place, 64 << 10) else {
            return false;
        };
        for (name, value) in env::parse(&bytes) {
            if only.is_empty() || only.contains(&name) {
                self.set(&name, value);
            }
        }
        true
    }

    /// Adds entries of the Boot Loader Specification, which are in `directory`.
    pub(super) fn add_bls(&mut self, entries: Vec<bls::Entry>, directory: &Place) {
        for entry in entries {
            let (title, id) = (entry.title.clone(), entry.id.clone());
            self.add(Item {
                title,
                id,
                body: Body::Bls(Box::new((entry, directory.clone()))),
                submenu: None,
            });
        }
    }

    fn add(&mut self, item: Item) {
        self.count += 1;
        if self.count <= MAX_ENTRIES {
            self.items.push(item);
        }
    }

    /// Runs the blocks of submenus, to know what is in them.
    pub fn open_submenus(&mut self) {
        let mut items = std::mem::take(&mut self.items);
        self.open(&mut items, 0);
        self.items = items;
    }

    fn open(&mut self, items: &mut [Item], depth: u32) {
        for item in items {
            let (Some(_), Body::Script(block, words)) = (&item.submenu, &item.body) else {
                continue;
            };
            let (block, words) = (block.clone(), words.clone());
            let before = self.variables.clone();
            let outer = std::mem::replace(&mut self.words, words);
            self.block(&block);
            self.words = outer;
            let mut inner = std::mem::take(&mut self.items);
            if depth < MAX_CALLS {
                self.open(&mut inner, depth + 1);
            }
            item.submenu = Some(inner);
            self.variables = before;
        }
    }

    /// What an entry starts; the variables are afterwards as before.
    pub fn start(&mut self, item: &Item, chosen: &str) -> Start {
        self.start = Start::default();
        match &item.body {
            Body::Bls(bls) => self.start_bls(&bls.0, &bls.1),
            Body::Script(block, words) => {
                let before = self.variables.clone();
                let outer = std::mem::replace(&mut self.words, words.clone());
                self.set("chosen", chosen.to_owned());
                self.block(&block.clone());
                self.words = outer;
                self.variables = before;
            }
        }
        if self.steps >= MAX_STEPS {
            self.start.other = Some("a script that runs without end".into());
        }
        std::mem::take(&mut self.start)
    }

    fn start_bls(&mut self, entry: &bls::Entry, directory: &Place) {
        if !entry.is_linux() {
            self.start.other = Some("an entry that is no kernel with its initrd".into());
            return;
        }
        let place = |path: &str| Place {
            path: path.to_owned(),
            ..directory.clone()
        };
        let kernel = self.expand_text(&entry.linux);
        let options = self.expand_text(&entry.options.join(" "));
        let image = format!("BOOT_IMAGE=({}){kernel}", directory.device);
        self.start.cmdline = join([image.as_str(), options.trim()].into_iter());
        for initrd in &entry.initrds {
            let files = self.expand_text(initrd);
            self.start
                .initrds
                .extend(files.split_whitespace().map(place));
        }
        self.start.kernel = Some(place(&kernel));
    }

    /// Text of an entry file, in which GRUB expands variables.
    fn expand_text(&self, text: &str) -> String {
        let mut out = String::new();
        let mut rest = text;
        while let Some(at) = rest.find('$') {
            out.push_str(&rest[..at]);
            rest = &rest[at + 1..];
            let braced = rest.starts_with('{');
            let inner = rest.strip_prefix('{').unwrap_or(rest);
            let end = inner
                .find(|next: char| !(next.is_ascii_alphanumeric() || next == '_'))
                .unwrap_or(inner.len());
            if out.len() < MAX_VALUE {
                out.push_str(self.get(&inner[..end]));
            }
            rest = &inner[end..];
            if braced {
                rest = rest.strip_prefix('}').unwrap_or(rest);
            }
        }
        out.push_str(rest);
        out
    }

    fn block(&mut self, block: &Block) -> (bool, Flow) {
        let mut status = true;
        for node in block.iter() {
            let (now, flow) = self.node(node);
            status = now;
            if flow != Flow::Next {
                return (status, flow);
            }
        }
        (status, Flow::Next)
    }

    fn node(&mut self, node: &Node) -> (bool, Flow) {
        if self.steps >= MAX_STEPS {
            return (false, Flow::Stop);
        }
        self.steps += 1;
        match node {
            Node::Command(words) => {
                let words = self.expand_words(words);
                self.command(&words)
            }
            Node::Menu(words, block) => {
                let words = self.expand_words(words);
                self.menu(&words, block);
                (true, Flow::Next)
            }
            Node::If(arms, other) => {
                for (condition, body) in arms {
                    match self.block(condition) {
                        (_, flow @ (Flow::Return | Flow::Stop)) => return (false, flow),
                        (true, Flow::Next) => return self.block(body),
                        (false, Flow::Next) => {}
                    }
                }
                self.block(other)
            }
            Node::While(until, condition, body) => loop {
                if self.steps >= MAX_STEPS {
                    return (false, Flow::Stop);
                }
                // An empty body and an empty condition are steps, too.
                self.steps += 1;
                match self.block(condition) {
                    (_, flow @ (Flow::Return | Flow::Stop)) => return (false, flow),
                    (status, Flow::Next) if status == *until => return (true, Flow::Next),
                    _ => {}
                }
                let (status, flow) = self.block(body);
                if flow != Flow::Next {
                    return (status, flow);
                }
            },
            Node::For(name, words, body) => {
                for word in self.expand_words(words) {
                    self.set(name, word);
                    let (status, flow) = self.block(body);
                    if flow != Flow::Next {
                        return (status, flow);
                    }
                }
                (true, Flow::Next)
            }
            Node::Function(name, body) => {
                if self.functions.len() < MAX_VARIABLES {
                    self.functions.insert(name.clone(), body.clone());
                }
                (true, Flow::Next)
            }
        }
    }

    /// As [`Self::expand`], and counts it.
    fn expand_words(&mut self, words: &[Word]) -> Vec<String> {
        let words = self.expand(words);
        self.charge(words.iter().map(String::len).sum());
        words
    }

    /// Words with their variables' values.
    fn expand(&self, words: &[Word]) -> Vec<String> {
        let mut out: Vec<String> = Vec::new();
        let mut bytes = 0;
        for word in words {
            let mut now = String::new();
            let mut there = word.quoted;
            for part in &word.parts {
                match part {
                    Part::Text(text) => {
                        now.push_str(text);
                        there = true;
                    }
                    Part::Variable { name, quoted: true } => now.push_str(&self.value(name)),
                    Part::Variable { name, .. } => {
                        let value = self.value(name);
                        let mut pieces = value.split_whitespace();
                        if value.starts_with(char::is_whitespace) && !now.is_empty() {
                            out.push(std::mem::take(&mut now));
                        }
                        if let Some(first) = pieces.next() {
                            now.push_str(first);
                            there = true;
                        }
                        for piece in pieces {
                            out.push(std::mem::replace(&mut now, piece.to_owned()));
                        }
                    }
                }
                if now.len() > MAX_VALUE {
                    now.clear();
                }
            }
            bytes += now.len();
            if there {
                out.push(now);
            }
            out.truncate(MAX_WORDS);
            if bytes > MAX_BYTES {
                break;
            }
        }
        out
    }

    fn value(&self, name: &str) -> String {
        match name {
            "@" | "*" => self.words.join(" "),
            "#" => self.words.len().to_string(),
            "?" => "0".into(),
            _ => self.get(name).to_owned(),
        }
    }

    fn command(&mut self, words: &[String]) -> (bool, Flow) {
        let Some((name, arguments)) = words.split_first() else {
            return (true, Flow::Next);
        };
        if let Some((variable, value)) = name.split_once('=')
            && words.len() == 1
            && !variable.is_empty()
        {
            self.set(variable, value.to_owned());
            return (true, Flow::Next);
        }
        if let Some(body) = self.functions.get(name).cloned() {
            if self.calls >= MAX_CALLS {
                return (false, Flow::Next);
            }
            self.calls += 1;
            let outer = std::mem::replace(&mut self.words, arguments.to_vec());
            let (status, flow) = self.block(&body);
            self.words = outer;
            self.calls -= 1;
            let flow = if flow == Flow::Stop { flow } else { Flow::Next };
            return (status, flow);
        }
        match name.as_str() {
            "return" => (
                arguments.first().is_none_or(|status| status == "0"),
                Flow::Return,
            ),
            "source" | "." => (self.include(arguments), Flow::Next),
            "configfile" | "extract_entries_configfile" => {
                // Its menu takes the place of this one.
                let status = self.include(arguments);
                let flow = if status { Flow::Return } else { Flow::Next };
                (status, flow)
            }
            _ => (self.builtin(name, arguments), Flow::Next),
        }
    }

    fn include(&mut self, arguments: &[String]) -> bool {
        let Some(place) = arguments.first().map(|file| self.place(file)) else {
            return false;
        };
        if self.calls >= MAX_CALLS {
            return false;
        }
        self.calls += 1;
        let result = self.run_file(&place);
        self.calls -= 1;
        if let Err(EvalError::Syntax(error)) = &result {
            self.notes
                .push(format!("({}){}: {error}", place.device, place.path));
        }
        result.is_ok()
    }

    /// `menuentry` and `submenu` (GRUB manual, "menuentry").
    fn menu(&mut self, words: &[String], block: &Block) {
        let mut title = None;
        let mut id = String::new();
        let mut rest = Vec::new();
        let mut arguments = words.iter().skip(1);
        while let Some(word) = arguments.next() {
            let (option, value) = match word.split_once('=') {
                Some((option, value)) if word.starts_with("--") => (option, Some(value)),
                _ => (word.as_str(), None),
            };
            match option {
                "--unrestricted" => {}
                "--class" | "--users" | "--hotkey" | "--source" | "--id" => {
                    let value = value
                        .map(str::to_owned)
                        .or_else(|| arguments.next().cloned())
                        .unwrap_or_default();
                    if option == "--id" {
                        id = value;
                    }
                }
                _ if title.is_none() => title = Some(word.clone()),
                _ => rest.push(word.clone()),
            }
        }
        let title = title.unwrap_or_default();
        // `$1` in an entry is its title.
        rest.insert(0, title.clone());
        let submenu = (words.first().map(String::as_str) == Some("submenu")).then(Vec::new);
        self.add(Item {
            title,
            id,
            body: Body::Script(block.clone(), rest),
            submenu,
        });
    }

    /// `(device)/path`, or a path on `$root`.
    pub(super) fn place(&self, file: &str) -> Place {
        let (device, path) = match file.strip_prefix('(').and_then(|rest| rest.split_once(')')) {
            Some((device, path)) => (device, path),
            None => (self.get("root"), file),
        };
        let relative = matches!(self.get("btrfs_relative_path"), "y" | "yes" | "1");
        Place {
            device: device
                .trim_start_matches('(')
                .trim_end_matches(')')
                .to_owned(),
            path: path.to_owned(),
            relative,
        }
    }
}

/// Words to a command line, with single spaces.
pub(super) fn join<'a>(words: impl Iterator<Item = &'a str>) -> String {
    let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
    words.join(" ")
}
