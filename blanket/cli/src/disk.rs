//! Disks: `blanket run --disk`, and `blanket disk`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use blanket_devices::Limits;
use blanket_devices::block::{self, Config, Vbd, WhenFull};
use blanket_devices::bus::{Report, State};
use blanket_disk::{Backing, Cache, Format, Image, Options};
use blanket_vmm::devices::{AnyDevice, DiskFile};
use blanket_vmm::instance::Instance;
use blanket_vmm::saved::disks::AtRest;
use clap::Subcommand;
use serde::{Deserialize, Serialize};

use crate::args::{seconds, size};
use crate::cloud_init::{self, CloudInit};
use crate::control::{Answer, Request, ask_vm};
use crate::disk_save;
use crate::exit::{self, hint, output, show};
use crate::table::table;

/// Most disks of a VM: Linux numbers them in one byte.
const MOST: u32 = 256;

/// What `--disk` is.
pub const HELP: &str = "\
Adds a disk: PATH[,OPTION]..., an image or a block device. A comma in the path is written twice. Options: \
`ro` (refuse writes), `format=raw|qcow2|vmdk|vhd` (otherwise name and content must agree), `backing=DIR` \
(a directory outside the image's own whose files it may stand on), `base=CONTENT` (which content it stands on, by \
a name that tells it, such as blake3:...: a move to a disk with the same `base=` takes with it only what is above), \
`lock=off`, `queues=N`, \
`cache=none|writeback` (a raw image past the instance's page cache or through it; past it by default if it is a block \
device), \
`on-full=wait|fail` (what happens when the host has no space left; waits by default), `bps=SIZE` and \
`iops=N` (limits for each second), `persistent` (offer persistent grants). The guest calls them xvda, xvdb, \
... in their order.";

/// How an image is opened, what device it becomes, and what it is said to stand on.
type Understood = (Options, Config, Option<String>);

/// Whether it can be the name of a content: it is compared, and shown, on another host.
fn is_content(name: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || ":._-".contains(c);
    (1..=128).contains(&name.len()) && name.chars().all(known)
}

/// A disk as the user describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// The image.
    pub path: PathBuf,
    options: Vec<(String, Option<String>)>,
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts: Vec<String> = vec![String::new()];
        let mut rest = text.chars().peekable();
        while let Some(c) = rest.next() {
            if c == ',' && rest.next_if_eq(&',').is_none() {
                parts.push(String::new());
            } else if let Some(part) = parts.last_mut() {
                part.push(c);
            }
        }
        let mut parts = parts.into_iter();
        let path = parts.next().filter(|path| !path.is_empty());
        let spec = Self {
            path: path.ok_or("the path is missing")?.into(),
            options: parts
                .map(|part| match part.split_once('=') {
                    Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                    None => (part, None),
                })
                .collect(),
        };
        // Wrong options are wrong arguments.
        spec.understand(0)?;
        Ok(spec)
    }
}

impl DiskSpec {
    fn understand(&self, index: u32) -> Result<Understood, String> {
        let mut options = Options::default();
        let mut base = None;
        let mut config = Config {
            index,
            ..Config::default()
        };
        for (key, value) in &self.options {
            let number = |value: &str| {
                value
                    .parse()
                    .map_err(|_| format!("{key}={value} is no number"))
            };
            match (key.as_str(), value.as_deref()) {
                ("ro", None) => options.read_only = true,
                ("persistent", None) => config.persistent = true,
                ("format", Some(name)) => {
                    options.format = Some(name.parse::<Format>().map_err(|e| e.to_string())?);
                }
                ("backing", Some(path)) => options.backing.push(path.into()),
                ("base", Some(content)) if is_content(content) => base = Some(content.to_owned()),
                ("lock", Some("off")) => options.lock = false,
                ("lock", Some("on")) => options.lock = true,
                ("cache", Some("none")) => options.cache = Some(Cache::None),
                ("cache", Some("writeback")) => options.cache = Some(Cache::Writeback),
                ("queues", Some(n)) => config.queues = Some(number(n)?),
                ("on-full", Some("wait")) => config.when_full = WhenFull::Wait,
                ("on-full", Some("fail")) => config.when_full = WhenFull::Fail,
                ("bps", Some(rate)) => config.limits.bytes = Some(size(rate)?),
                ("iops", Some(rate)) => {
                    config.limits.operations = Some(u64::from(number(rate)?));
                }
                _ => {
                    let value = value.as_ref().map_or(String::new(), |v| format!("={v}"));
                    return Err(format!(
                        "{key}{value} is no option of a disk; there are ro, format=, backing=, \
                         base=, lock=, cache=, queues=, on-full=, bps=, iops= and persistent"
                    ));
                }
            }
        }
        config.origins = base.is_some();
        if config.limits != Limits::default()
            && (config.limits.bytes == Some(0) || config.limits.operations == Some(0))
        {
            return Err("a limit of 0 would let nothing through".into());
        }
        Ok((options, config, base))
    }

    /// Opens the image as disk `index`.
    pub fn open(&self, index: u32, vcpus: u32) -> Result<AnyDevice> {
        self.open_as(self.path.clone(), index, vcpus)
    }

    /// As [`DiskSpec::open`], and has another name in listings.
    pub fn open_as(&self, name: PathBuf, index: u32, vcpus: u32) -> Result<AnyDevice> {
        let (options, config, base) = self.understand(index).map_err(anyhow::Error::msg)?;
        let image = self.opened(&options, base.as_deref())?;
        let file = DiskFile {
            path: name,
            reader: image.reader(),
            base,
        };
        let vbd = Vbd::new(Arc::new(image), config, vcpus);
        Ok(AnyDevice::Disk(Arc::new(vbd), file))
    }

    /// Opens the image where no VM uses it.
    pub fn at_rest(&self, read_only: bool) -> Result<AtRest> {
        let (options, _, base) = self.understand(0).map_err(anyhow::Error::msg)?;
        let options = Options {
            read_only: read_only || options.read_only,
            ..options
        };
        let image = self.opened(&options, base.as_deref())?;
        Ok(AtRest { image, base })
    }

    fn opened(&self, options: &Options, base: Option<&str>) -> Result<Image> {
        let image = blanket_disk::open(&self.path, options)?;
        if base.is_some() && !image.reader().has_backing() {
            let path = self.path.display();
            return Err(hint(
                &anyhow!("{path} stands on no other image, and base= says which one it is"),
                "leave base= out, or make an overlay with `blanket disk create --backing`",
            ));
        }
        Ok(image)
    }
}

/// `blanket disk`.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// List a VM's disks
    List {
        /// The VM
        name: String,
        /// Write JSON
        #[arg(long)]
        json: bool,
    },
    /// Give a running VM another disk
    Attach {
        /// The VM
        name: String,
        /// The image, as for `run --disk`
        disk: DiskSpec,
    },
    /// Take a disk from a running VM, once its guest lets go of it; unmount it there first
    Detach {
        /// The VM
        name: String,
        /// The guest's name for the disk, such as xvdb
        disk: String,
        /// Seconds that the guest has
        #[arg(long, default_value = "30", value_parser = seconds)]
        timeout: Duration,
    },
    /// Make a disk of a running VM, or an image that no VM uses, larger
    Resize {
        /// The VM and the guest's name for the disk (web xvdb), or an image file
        #[arg(required = true, num_args = 1..=2, value_names = ["VM|FILE", "DISK"])]
        which: Vec<String>,
        /// The new size, such as 20G
        #[arg(long, value_parser = size)]
        size: u64,
        /// Format of the image file, if its name does not say it
        #[arg(long)]
        format: Option<Format>,
    },
    /// Make an image; it takes space as it is written
    Create {
        /// The file, which must not exist
        file: PathBuf,
        /// Its size, such as 20G; that of the image below by default
        #[arg(long, value_parser = size, required_unless_present = "backing")]
        size: Option<u64>,
        /// raw or qcow2
        #[arg(long, default_value = "qcow2")]
        format: Format,
        /// An image that it stands on, and that nobody may change from now on
        #[arg(long)]
        backing: Option<PathBuf>,
        /// That one's format, if its name does not say it
        #[arg(long, requires = "backing")]
        backing_format: Option<Format>,
    },
    /// Write the disk by which a guest's cloud-init is told what it shall become, as `run
    /// --cloud-init` makes it
    Seed {
        /// The file, which must not exist; give it to the VM as a disk, with ro
        file: PathBuf,
        /// As for `run --cloud-init`
        #[arg(long, value_name = "FILE", long_help = cloud_init::HELP)]
        cloud_init: CloudInit,
        /// The VM's name
        #[arg(long)]
        name: String,
    },
    /// Keep an image as it is: what a VM writes from now on goes to a new one on top of it
    Snapshot {
        /// The image, which no VM may use
        file: PathBuf,
        /// The new image, which must not exist; the VM is to use it from now on
        overlay: PathBuf,
        /// Format of the image, if its name does not say it
        #[arg(long)]
        format: Option<Format>,
    },
    /// Write what is in disks that no VM uses to a file; of one with base=, only what is its own
    Save {
        /// The file, which must not exist
        file: PathBuf,
        /// The images, with options as for `run`; they are locked meanwhile
        disks: Vec<DiskSpec>,
        /// Write JSON
        #[arg(long)]
        json: bool,
    },
    /// Fill new images with what `disk save` has written
    Restore {
        /// The file
        file: PathBuf,
        /// As many new images, in the same order, each as large at least and with the same base=
        disks: Vec<DiskSpec>,
    },
    /// Say what an image would boot as a VM, and whether it can; exits with 1 if not
    Boot {
        /// The image, with options as for `run`
        image: DiskSpec,
        /// Another of its boot entries than its own default
        #[arg(long)]
        boot_entry: Option<String>,
    },
    /// Say what an image is, and what it stands on
    Info {
        /// The image
        file: PathBuf,
        /// Its format, if its name does not say it
        #[arg(long)]
        format: Option<Format>,
        /// A directory outside the image's own whose files it may stand on
        #[arg(long)]
        backing: Vec<PathBuf>,
        /// Write JSON
        #[arg(long)]
        json: bool,
    },
}

/// A VM's disk, as it is told.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskInfo {
    /// The guest's name for it.
    pub name: String,
    /// The image.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// The guest cannot write it.
    pub read_only: bool,
    /// What the instance's page cache keeps of it: none, or all (writeback).
    pub cache: String,
    /// What it is doing: connected, waiting, closing, closed, or no-space.
    pub state: String,
    /// Why the guest's driver was shut out, if it was.
    pub fault: Option<String>,
    /// Requests that read.
    pub reads: u64,
    /// Bytes that they read.
    pub read_bytes: u64,
    /// Requests that wrote.
    pub writes: u64,
    /// Bytes that they wrote.
    pub written_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Discards.
    pub discards: u64,
    /// Requests that failed, or were none.
    pub errors: u64,
}

/// A VM's disks, for its control socket.
pub fn list(instance: &Instance) -> Vec<DiskInfo> {
    let disks = instance.disks();
    disks
        .iter()
        .map(|(vbd, path)| info(instance, vbd, path))
        .collect()
}

fn info(instance: &Instance, vbd: &Vbd, path: &Path) -> DiskInfo {
    let report = instance.device_report(block::CLASS, block::device_number(vbd.config().index));
    let counters = vbd.counters();
    let state = match &report {
        _ if counters.waiting_for_space.load(Ordering::Relaxed) > 0 => "no-space",
        report => state_word(report.as_ref()),
    };
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    DiskInfo {
        name: block::device_name(vbd.config().index),
        path: path.display().to_string(),
        size: vbd.disk().size(),
        read_only: vbd.disk().read_only(),
        cache: vbd.disk().cache().name().into(),
        state: state.into(),
        fault: report.and_then(|report| report.fault),
        reads: count(&counters.reads),
        read_bytes: count(&counters.read_bytes),
        writes: count(&counters.writes),
        written_bytes: count(&counters.written_bytes),
        flushes: count(&counters.flushes),
        discards: count(&counters.discards),
        errors: count(&counters.errors),
    }
}

/// What a device is doing, in a word.
pub fn state_word(report: Option<&Report>) -> &'static str {
    match report {
        None => "stopped",
        Some(report) if report.leaving => "leaving",
        Some(report) => match report.backend {
            State::Connected => "connected",
            State::Closing => "closing",
            State::Closed => "closed",
            _ => "waiting",
        },
    }
}

/// Attaches a disk to a VM, for its control socket; the guest's name for it.
pub fn attach(instance: &Instance, spec: &str) -> Result<String> {
    let spec: DiskSpec = spec.parse().map_err(anyhow::Error::msg)?;
    let used: Vec<u32> = instance
        .disks()
        .iter()
        .map(|(vbd, _)| vbd.config().index)
        .collect();
    let index = (0..MOST)
        .find(|index| !used.contains(index))
        .with_context(|| format!("a VM has at most {MOST} disks"))?;
    instance.attach(spec.open(index, instance.spec().vcpus)?)?;
    Ok(block::device_name(index))
}

/// The number of the disk that a guest knows by `name`.
pub fn number(instance: &Instance, name: &str) -> Result<u32> {
    let disks = instance.disks();
    let named = |index| block::device_name(index);
    disks
        .iter()
        .map(|(vbd, _)| vbd.config().index)
        .find(|index| named(*index) == name)
        .map(block::device_number)
        .with_context(|| {
            let all: Vec<String> = disks
                .iter()
                .map(|(vbd, _)| named(vbd.config().index))
                .collect();
            match all.is_empty() {
                true => format!("there is no disk {name}; the VM has none"),
                false => format!("there is no disk {name}; there are {}", all.join(", ")),
            }
        })
}

/// Carries out a command.
pub fn command(command: &DiskCommand) -> Result<ExitCode> {
    match command {
        DiskCommand::List { name, json } => {
            let Answer::Disks(disks) = ask_vm(name, &Request::Disks)? else {
                bail!("{name} answered something else than its disks");
            };
            show(&disks[..], *json, listing)?;
        }
        DiskCommand::Attach { name, disk } => {
            let spec = absolute(disk)?;
            let Answer::Name(disk) = ask_vm(name, &Request::AttachDisk { spec })? else {
                bail!("{name} answered something else");
            };
            output(&format!("{disk}\n"))?;
        }
        DiskCommand::Seed {
            file,
            cloud_init,
            name,
        } => cloud_init.write(file, name)?,
        DiskCommand::Detach {
            name,
            disk,
            timeout,
        } => {
            let request = Request::DetachDisk {
                disk: disk.clone(),
                timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
            };
            ask_vm(name, &request)?;
        }
        DiskCommand::Resize {
            which,
            size,
            format,
        } => match &which[..] {
            [name, disk] => {
                let request = Request::ResizeDisk {
                    disk: disk.clone(),
                    size: *size,
                };
                ask_vm(name, &request)?;
            }
            [file] => {
                let options = Options {
                    format: *format,
                    ..Options::default()
                };
                blanket_disk::resize(file, &options, *size)?;
            }
            _ => bail!("give a VM and its disk, or an image file"),
        },
        DiskCommand::Create {
            file,
            size,
            format,
            backing,
            backing_format,
        } => {
            let backing = backing.as_deref().map(|path| Backing {
                path,
                format: *backing_format,
            });
            blanket_disk::create(file, *format, *size, backing)?;
        }
        DiskCommand::Snapshot {
            file,
            overlay,
            format,
        } => {
            blanket_disk::snapshot(file, *format, overlay)?;
        }
        DiskCommand::Save { file, disks, json } => disk_save::save(file, disks, *json)?,
        DiskCommand::Restore { file, disks } => disk_save::restore(file, disks)?,
        DiskCommand::Boot { image, boot_entry } => return boot(image, boot_entry.as_deref()),
        DiskCommand::Info {
            file,
            format,
            backing,
            json,
        } => image_info(file, *format, backing, *json)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn boot(image: &DiskSpec, entry: Option<&str>) -> Result<ExitCode> {
    let (options, ..) = image.understand(0).map_err(anyhow::Error::msg)?;
    let options = Options {
        read_only: true,
        ..options
    };
    let opened = blanket_disk::open(&image.path, &options)?;
    let path = image.path.display();
    let offer =
        blanket_vmm::boot::look(opened.reader(), entry).with_context(|| path.to_string())?;
    let mut text = format!("{path}: {}\n", offer.config);
    for (index, (title, kernel)) in offer.entries.iter().enumerate() {
        text.push_str(&format!("  {index}: {title}  ({kernel})\n"));
    }
    for note in &offer.notes {
        text.push_str(&format!("  note: {note}\n"));
    }
    let (files, cmdline) = &offer.chosen;
    text.push_str(&format!("boots {files}\n  {cmdline}\n"));
    output(&text)?;
    if offer.problems.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    for problem in &offer.problems {
        eprintln!("blanket: {problem}");
    }
    Ok(ExitCode::from(exit::FAILURE))
}

/// The same disk for a process with another working directory.
fn absolute(disk: &DiskSpec) -> Result<String> {
    let path = std::path::absolute(&disk.path)
        .with_context(|| format!("cannot find {}", disk.path.display()))?;
    let text = path
        .to_str()
        .with_context(|| format!("{} is no text", path.display()))?;
    let mut spec = text.replace(',', ",,");
    for (key, value) in &disk.options {
        spec.push(',');
        spec.push_str(key);
        if let Some(value) = value {
            spec.push('=');
            spec.push_str(&value.replace(',', ",,"));
        }
    }
    Ok(spec)
}

fn listing(disks: &[DiskInfo]) -> String {
    let header = [
        "DISK", "SIZE", "STATE", "CACHE", "READ", "WRITTEN", "FLUSHES", "ERRORS", "IMAGE",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(disks.iter().map(|disk| {
        [
            disk.name.clone(),
            mib(disk.size),
            disk.state.clone(),
            disk.cache.clone(),
            mib(disk.read_bytes),
            mib(disk.written_bytes),
            disk.flushes.to_string(),
            disk.errors.to_string(),
            match disk.read_only {
                true => format!("{} (read-only)", disk.path),
                false => disk.path.clone(),
            },
        ]
    }));
    let reasons = disks.iter().map(|disk| (&disk.name, &disk.fault));
    table(&rows) + &with_reasons(reasons)
}

/// Why devices are in the state that they are in, below their table.
pub fn with_reasons<'a>(
    devices: impl IntoIterator<Item = (&'a String, &'a Option<String>)>,
) -> String {
    let reasons = devices
        .into_iter()
        .filter_map(|(name, fault)| Some(format!("{name}: {}\n", fault.as_ref()?)));
    reasons.collect()
}

/// Bytes for people.
pub fn mib(bytes: u64) -> String {
    format!("{}M", bytes >> 20)
}

#[derive(Serialize)]
struct ImageInfo {
    path: String,
    format: String,
    size: u64,
    allocated: u64,
    in_use: bool,
    internal_snapshots: u32,
    backing: Option<String>,
}

fn image_info(file: &Path, format: Option<Format>, backing: &[PathBuf], json: bool) -> Result<()> {
    let options = Options {
        format,
        backing: backing.to_vec(),
        ..Options::read_only()
    };
    let images: Vec<ImageInfo> = blanket_disk::info(file, &options)?
        .into_iter()
        .map(|info| ImageInfo {
            path: info.path.display().to_string(),
            format: info.format.to_string(),
            size: info.size,
            allocated: info.allocated,
            in_use: info.in_use,
            internal_snapshots: info.internal_snapshots,
            backing: info.backing,
        })
        .collect();
    show(&images[..], json, described)
}

fn described(images: &[ImageInfo]) -> String {
    let mut text = String::new();
    for image in images {
        let used = if image.in_use { ", in use" } else { "" };
        text.push_str(&format!(
            "{}: {}, {} for the guest, {} on this machine{used}\n",
            image.path,
            image.format,
            mib(image.size),
            mib(image.allocated),
        ));
        if let Some(backing) = &image.backing {
            text.push_str(&format!("  stands on {backing}\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptions_of_disks() {
        let spec: DiskSpec = "a,,b.img,ro,format=raw,bps=1M,on-full=fail,queues=2"
            .parse()
            .expect("right");
        assert_eq!(spec.path, Path::new("a,b.img"));
        let (options, config, base) = spec.understand(3).expect("right");
        assert!(options.read_only && options.format == Some(Format::Raw));
        assert_eq!((config.index, config.queues), (3, Some(2)));
        assert_eq!(config.limits.bytes, Some(1 << 20));
        assert_eq!(config.when_full, WhenFull::Fail);
        assert_eq!(base, None);
        let based: DiskSpec = "a.qcow2,base=blake3:00ff".parse().expect("right");
        let (.., base) = based.understand(0).expect("right");
        assert_eq!(base.as_deref(), Some("blake3:00ff"));
        for wrong in [
            "",
            ",ro",
            "a,ro=1",
            "a,format=vdi",
            "a,queues=x",
            "a,bps=0K",
            "a,bps=5",
            "a,on-full=stop",
            "a,cache=much",
            "a,base",
            "a,base=",
            "a,base=not one",
            "a,",
        ] {
            let error = wrong.parse::<DiskSpec>().expect_err(wrong);
            assert!(!error.is_empty());
        }
    }

    #[test]
    fn the_list_says_why_a_disk_is_closed() {
        let disk = |name: &str, fault: Option<&str>| DiskInfo {
            name: name.into(),
            fault: fault.map(Into::into),
            ..DiskInfo::default()
        };
        let text = listing(&[disk("xvda", Some("its ring is wrong")), disk("xvdb", None)]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[3], "xvda: its ring is wrong");
    }

    #[test]
    fn a_spec_survives_its_journey() {
        let spec: DiskSpec = "/x,,y/a.img,ro,backing=/b,,c".parse().expect("right");
        let text = absolute(&spec).expect("a path");
        assert_eq!(text.parse::<DiskSpec>().expect("right"), spec);
    }
}
