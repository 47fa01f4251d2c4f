//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use blanket_vmm::console::Sink;
use blanket_vmm::core_image;
use blanket_vmm::cpu::Wanted;
use blanket_vmm::migration::MOST_LANES;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::cloud_init::{self, CloudInit};
use crate::confine;
use crate::disk::{self, DiskCommand, DiskSpec};
use crate::exit;
use crate::group;
use crate::keeper;
use crate::net::{self, NetCommand, NetSpec};
use crate::user;

/// The program's version, and the core's that it carries.
static VERSION: LazyLock<String> = LazyLock::new(|| {
    let core = if core_image::is_present() {
        core_image::BUILD_ID_TEXT
    } else {
        "none"
    };
    format!("{} (core {core})", env!("CARGO_PKG_VERSION"))
});

/// Runs unmodified stock Linux kernels as VMs, on machines without nested
/// virtualization.
#[derive(Debug, Parser)]
#[command(
    name = "blanket",
    version = &**VERSION,
    after_help = "BLANKET_LOG sets what is logged to standard error, for instance \
                  BLANKET_LOG=debug. `blanket doctor` says whether this machine can run VMs."
)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What `trace` is.
const TRACE: &str = "\
Shows the last 256 records of each vCPU: hypercalls, faults and other entries into the core, and what the \
core asked of its host, with time, place and arguments. Without --follow it switches the trace on if it is \
off, shows what there is, and leaves it on. System calls and returns that take the core's fast paths are \
not recorded.";

/// What `balloon` is.
const MIGRATE: &str = "\
The VM runs on while its memory is sent, then stands still for as short a time as there is left to send, \
and runs on at the destination. Until the destination has it, whatever goes wrong leaves it running here. \
If the link breaks in the very moment in which it changes hands, it stands still until the destination can \
be asked again: `blanket migrate` does that by itself for a while, and again when it is called again.

With --post-copy it may run there before all of its memory is there, which follows it. Until all has come, \
the process here has a part of the VM: if it ends, the VM is lost.

Exit codes:
  0      it has moved, with all of its memory
  1      it has not moved, and runs here; or its process has ended
  9      it is not known; or a part of its memory is still here: see what is said then";

const BALLOON: &str = "\
Asks a VM's guest to have so much of its memory, and waits until it has. What the guest gives up goes to \
this machine; it gets it back, zeroed, when it is asked to have more. The guest's balloon driver does it, as \
fast as it finds pages that it can spare, and goes on after the command has given up waiting (exit code 1). \
The VM's reboots keep what was asked for.";

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Can this machine run VMs? What is missing, and the command that mends it
    Doctor {
        /// Write JSON
        #[arg(long)]
        json: bool,
        /// Accept kernel versions that Blanket was never tried on
        #[arg(long)]
        force: bool,
        /// Check also that this kernel can be run as a guest
        #[arg(long, value_name = "FILE")]
        kernel: Option<PathBuf>,
    },
    /// Run a VM in this process
    #[command(
        after_help = exit::TABLE,
        group = clap::ArgGroup::new("boot").args(["image", "kernel", "disk", "restore", "incoming"]).required(true).multiple(true)
    )]
    Run(Box<Run>),
    /// What VMs find in this machine's CPU, and what of it can be taken away from them
    Cpu {
        /// What they run on
        #[arg(
            long,
            value_enum,
            value_name = "HOST",
            default_value = "auto",
            env = "BLANKET_HOST"
        )]
        host: Host,
        /// Write JSON
        #[arg(long)]
        json: bool,
    },
    /// List running VMs
    Ps {
        /// Write JSON
        #[arg(long)]
        json: bool,
    },
    /// Attach to a VM's console; Ctrl-] detaches
    Console {
        /// The VM
        name: String,
    },
    /// Show a VM's counters
    Stats {
        /// The VM; without it, all that run (Prometheus' format only)
        #[arg(
            required_unless_present = "format",
            required_if_eq_any([("format", "text"), ("format", "json")])
        )]
        name: Option<String>,
        /// Write JSON, the same as --format json
        #[arg(long, conflicts_with = "format")]
        json: bool,
        /// How they are written
        #[arg(long, value_enum, value_name = "FORMAT")]
        format: Option<Format>,
    },
    /// Write a running VM to a file, from which `blanket run --restore` lets it go on, and end it
    Save {
        /// The VM
        name: String,
        /// The file; it must not be there
        file: PathBuf,
        /// With what is in its disks, but for the bases that they are said to stand on (base=) and
        /// those that it cannot write; it runs on while they are written
        #[arg(long)]
        disks: bool,
        /// Let the VM go on here afterwards
        #[arg(long)]
        keep_running: bool,
        /// Write JSON
        #[arg(long)]
        json: bool,
    },
    /// Move a running VM to another host, where `blanket run --incoming` waits for it
    #[command(after_help = MIGRATE)]
    Migrate(Box<MigrateArgs>),
    /// Ask a VM's guest to have so much memory, and wait until it has
    #[command(long_about = BALLOON)]
    Balloon {
        /// The VM
        name: String,
        /// Memory that the guest is to have, such as 64M; at most the --max-memory of its start
        #[arg(value_parser = size)]
        size: u64,
        /// Seconds to wait for the guest
        #[arg(long, default_value = "30", value_parser = seconds)]
        timeout: Duration,
        /// Write JSON
        #[arg(long)]
        json: bool,
    },
    /// Record what a VM's guest asks of the core and the core of its host, and show it
    #[command(long_about = TRACE)]
    Trace {
        /// The VM
        name: String,
        /// Go on showing new records until Ctrl-C, then leave the trace as it was
        #[arg(long, short)]
        follow: bool,
        /// Switch it off, and show what there is
        #[arg(long, conflicts_with = "follow")]
        off: bool,
        /// Write a line of JSON for each record
        #[arg(long)]
        json: bool,
    },
    /// Disks of VMs, and images
    Disk {
        /// What to do
        #[command(subcommand)]
        command: DiskCommand,
    },
    /// Networks of VMs
    Net {
        /// What to do
        #[command(subcommand)]
        command: NetCommand,
    },
    /// Walk a VM's page tables and say what they map; exits with 1 if that is too much
    ///
    /// The VM stands still meanwhile.
    Audit {
        /// The VM
        name: String,
        /// Write JSON
        #[arg(long)]
        json: bool,
    },
    /// Say whether a VM runs this blanket; a running VM cannot change to another one
    Upgrade {
        /// The VM
        name: String,
    },
    /// Ask a VM's guest to power off, and wait until it has
    Stop {
        /// The VM
        name: String,
        /// Seconds that the guest has
        #[arg(long, default_value = "60", value_parser = seconds)]
        timeout: Duration,
    },
    /// Ask a VM's guest to reboot, and wait until it has ended for it
    Reboot {
        /// The VM
        name: String,
        /// Seconds that the guest has
        #[arg(long, default_value = "60", value_parser = seconds)]
        timeout: Duration,
    },
    /// End a VM at once
    Kill {
        /// The VM
        name: String,
        /// Only if it waits for a VM of another host that was not given to it; exits with 1 if
        /// the VM runs
        #[arg(long)]
        waiting: bool,
    },
    /// Clear away what a VM has left behind when its process ends; a part of `run`
    #[command(hide = true)]
    Keep(keeper::Left),
    /// Write the man pages or completions
    #[command(hide = true)]
    Generate {
        /// What to write
        #[command(subcommand)]
        what: Generated,
    },
}

/// How counters are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    #[default]
    Text,
    /// One object
    Json,
    /// Prometheus' text format
    Prometheus,
}

/// What can be generated.
#[derive(Debug, Subcommand)]
pub enum Generated {
    /// The man pages, one for each command
    Man {
        /// Directory to write them to
        directory: PathBuf,
    },
    /// Completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// When a VM goes on before all of its memory is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PostCopy {
    /// Never.
    Never,
    /// When it would be slowed down too much.
    Auto,
    /// After the first round.
    Now,
}

/// Arguments of `migrate`.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// The VM
    pub name: String,
    /// Where `blanket run --incoming` waits for it
    #[arg(long, value_name = "HOST:PORT", required_unless_present_any = ["cancel", "keep", "follow", "status"])]
    pub to: Option<String>,
    /// The token that was printed there
    #[arg(long, env = "BLANKET_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// A file that the token is in
    #[arg(long, value_name = "FILE", conflicts_with = "token")]
    pub token_file: Option<PathBuf>,
    /// How long it may stand still, in milliseconds. One that would do so for longer is sent
    /// on and slowed down
    #[arg(long, value_name = "MS", default_value = "300")]
    pub max_downtime: u64,
    /// After so many rounds it is stopped in any case
    #[arg(long, value_name = "N", default_value = "30", value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// How much is sent in a second at most while it runs, such as 100M
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub bandwidth: Option<u64>,
    /// Over how many connections at once, 1 to 8. Several help where a provider allows less to one
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u8).range(1..=i64::from(MOST_LANES)))]
    pub streams: u8,
    /// Let it go on there before all of its memory is there, which follows: never; when it writes
    /// so fast that it would be slowed down to less than a quarter; or after the first round.
    /// If this process or its host ends before all has followed, the VM is lost
    #[arg(long, value_enum, value_name = "WHEN", default_value = "never")]
    pub post_copy: PostCopy,
    /// Seconds to try to reach a destination that is lost when the VM changes hands
    #[arg(long, default_value = "60", value_parser = seconds)]
    pub patience: Duration,
    /// Only ask whether it can go on there: nothing is moved, and the destination waits on
    #[arg(long)]
    pub dry_run: bool,
    /// Do not move it after all
    #[arg(long, conflicts_with_all = ["to", "keep", "dry_run"])]
    pub cancel: bool,
    /// Let it go on here: you know that the other host does not have it, and never will
    #[arg(long, conflicts_with_all = ["to", "dry_run"])]
    pub keep: bool,
    /// Begin nothing: show how far a migration is that was begun by somebody else, until it is
    /// over
    #[arg(long, conflicts_with_all = ["to", "keep", "cancel", "dry_run"])]
    pub follow: bool,
    /// Say how far it is, here where it is sent from or where it is followed by its memory
    #[arg(long, conflicts_with_all = ["to", "cancel", "keep", "dry_run"])]
    pub status: bool,
    /// Write JSON
    #[arg(long)]
    pub json: bool,
    /// Write a line of JSON each time that it has come further, and another when it is over
    #[arg(long, conflicts_with_all = ["json", "quiet"])]
    pub lines: bool,
    /// Do not show how far it is
    #[arg(long, short)]
    pub quiet: bool,
}

const CPU_HELP: &str = "\
The CPU: host[,-FEATURE]... or LEVEL[,-FEATURE]...

  host        all that guests may have of the host's
  x86-64-v2   a level of x86-64 and nothing else; also x86-64-v3 and x86-64-v4
  -avx        takes AVX away, and what is built on it; features have Linux' names, as in
              /proc/cpuinfo

A VM goes only to hosts whose CPU has what its guest has found. With less than the host's it can go
to hosts that have less, and finds no more than that anywhere. Inside KVM all features can be taken
away. Under the module, on CPUs whose CPUID cannot be made to fault (blanket doctor says so),
programs see the hardware's, and only what needs a component of XSAVE can be: avx, avx512f or xsave,
with what is built on them. All else is refused there. A VM that goes on from a file, or comes from
another host, has the CPU that it had";

/// Arguments of `run`.
#[derive(Debug, Args)]
pub struct Run {
    /// Disk image to boot as a whole: the first disk, with the kernel that it has inside.
    /// Options may follow as for --disk
    #[arg(value_name = "IMAGE")]
    pub image: Option<DiskSpec>,
    /// Kernel, instead of the image's: a vmlinuz, as distributions ship it, or an ELF vmlinux
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Which of the image's boot entries: its title, id, number from 0, or a kernel version
    /// [default: the image's own]
    #[arg(long, value_name = "ENTRY", conflicts_with = "kernel")]
    pub boot_entry: Option<String>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// A disk: PATH[,OPTION]...; may be given several times
    #[arg(long, value_name = "DISK", long_help = disk::HELP)]
    pub disk: Vec<DiskSpec>,
    /// A network: user, or tap=NAME, with [,OPTION]...; may be given several times
    #[arg(long, value_name = "NET", long_help = net::HELP)]
    pub net: Vec<NetSpec>,
    /// Tell the guest's cloud-init what to do: FILE[,meta=FILE][,network=FILE]
    #[arg(long, value_name = "FILE", long_help = cloud_init::HELP)]
    pub cloud_init: Option<CloudInit>,
    /// Let disks in this directory be attached later; may be given several times
    #[arg(long, value_name = "DIR")]
    pub attach_from: Vec<PathBuf>,
    /// Do not confine the VM's process
    #[arg(long, long_help = confine::HELP)]
    pub no_sandbox: bool,
    /// As root: who the VM's process is once it is set up: auto, root, or a user's name or number
    #[arg(
        long,
        value_name = "USER",
        default_value = "auto",
        conflicts_with = "no_sandbox",
        long_help = user::HELP
    )]
    pub user: user::Choice,
    /// The control group whose limits the VM's process has: auto, none, or below PATH
    #[arg(long, value_name = "WHERE", default_value = "auto", long_help = group::HELP)]
    pub cgroup: group::Choice,
    /// Most memory of the VM's process, all in all
    /// [default: its memory at its largest, and what it may use beside it]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub memory_max: Option<u64>,
    /// Most CPU time, per cent of one CPU, such as 150 [default: no limit]
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u32).range(1..))]
    pub cpu_max: Option<u32>,
    /// Most threads and processes [default: 1024]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub pids_max: Option<u64>,
    /// Go on where a VM was when `blanket save` wrote this file, instead of a boot. Its memory,
    /// vCPUs come from the file; give its disks and networks as at its start, or, if it was
    /// saved with --disks, new images of the same size
    #[arg(long, value_name = "FILE", conflicts_with_all = ["memory", "max_memory", "cpus", "balloon", "cloud_init"])]
    pub restore: Option<PathBuf>,
    /// Let it go on at once: all of the file is looked at, but the VM's memory comes from it when
    /// it is needed, and in the background. The file must stay as it is until then (`migrate --status`)
    #[arg(long, requires = "restore")]
    pub lazy: bool,
    /// Wait at this address (port 0: any that is free, see `ps --json`) for a VM that
    /// `blanket migrate` moves here from another host, instead of a boot. Give the same memory, vCPUs, disks and networks as it has there, and
    /// the kernel too if it is to reboot by one
    #[arg(long, value_name = "ADDRESS:PORT", conflicts_with_all = ["restore", "balloon", "cloud_init"])]
    pub incoming: Option<SocketAddr>,
    /// Write the token that `blanket migrate` needs to this file, for its owner alone; it is emptied
    /// when the VM is given, before it runs [default: the token is printed]
    #[arg(long, value_name = "FILE", requires = "incoming")]
    pub token_file: Option<PathBuf>,
    /// The VM's identity; with --incoming, the only VM that is taken [default: a new one, or
    /// whichever comes; with --restore, the one that it had]
    #[arg(long, value_name = "UUID", value_parser = uuid)]
    pub uuid: Option<String>,
    /// Memory, such as 256M or 2G
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size)]
    pub memory: u64,
    /// The most memory that the guest can be given while it runs, by `blanket balloon`; what
    /// it has not taken yet costs the host none [default: as --memory]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_memory: Option<u64>,
    /// How much memory the guest is asked to have from the start, such as 64M;
    /// `blanket balloon` changes it [default: as --memory]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub balloon: Option<u64>,
    /// Let the host merge pages of the memory with equal ones of other VMs (KSM)
    #[arg(long)]
    pub mergeable: bool,
    /// Number of vCPUs
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..))]
    pub cpus: u32,
    /// The CPU: host, or a level (x86-64-v2, x86-64-v3, x86-64-v4), with ,-FEATURE for each that is
    /// taken away. What is not there is not there where the VM moves either
    #[arg(long, value_name = "CPU", default_value = "host", long_help = CPU_HELP, conflicts_with_all = ["restore", "incoming"])]
    pub cpu: Wanted,
    /// Kernel command line, appended to the image's if that is what is booted; console=hvc0
    /// is added if it is not there
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        allow_hyphen_values = true
    )]
    pub cmdline: String,
    /// Name for ps, console, stats, stop and kill [default: vm1, vm2, ...]
    #[arg(long, value_parser = name)]
    pub name: Option<String>,
    /// Where the console goes: stdio, pty, file:PATH, socket:PATH or none
    /// [default: stdio, with --detach none]
    #[arg(long, value_name = "WHERE", value_parser = sink)]
    pub console: Option<Sink>,
    /// Return once the VM runs, and leave it in the background
    #[arg(long)]
    pub detach: bool,
    /// What a reboot of the guest does
    #[arg(long, value_enum, value_name = "ACTION", default_value = "restart")]
    pub on_reboot: OnReboot,
    /// What the VM runs on
    #[arg(
        long,
        value_enum,
        value_name = "HOST",
        default_value = "auto",
        env = "BLANKET_HOST"
    )]
    pub host: Host,
    /// Keep the core out of the guest's address spaces, so that a CPU with Meltdown does
    /// not show it to the guest
    #[arg(
        long,
        value_enum,
        value_name = "WHEN",
        default_value = "auto",
        env = "BLANKET_ISOLATE"
    )]
    pub isolate: Isolate,
    /// Write the VM's counters to standard error when it has ended
    #[arg(long)]
    pub stats_on_exit: bool,
    /// Write how the VM ended to standard error, as one line of JSON
    #[arg(long)]
    pub json: bool,
    /// Have every hypercall that is refused reported on the console
    #[arg(long)]
    pub verbose_core: bool,
    /// Trace it from the start; if the core fails, its report ends with the last records
    #[arg(long)]
    pub trace: bool,
    /// Let the guest break the core on purpose: for Blanket's own tests
    #[arg(long, hide = true)]
    pub inject: bool,
    /// Most memory for shadow page tables [default: the module's]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub shadow_memory: Option<u64>,
}

/// What a VM runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Host {
    /// KVM where a guest really runs in it, else the module
    Auto,
    /// Blanket's kernel module, which needs no virtualization
    Module,
    /// This machine's KVM, which needs no module
    Kvm,
}

/// When the core is kept out of the guest's address spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Isolate {
    /// On CPUs with Meltdown
    Auto,
    /// Always; system calls and interrupts cost more
    On,
    /// Never; under the module, on a CPU with Meltdown, for root only
    Off,
}

/// What a reboot of the guest does.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum OnReboot {
    /// Start it again
    Restart,
    /// End with exit code 3
    Exit,
}

/// Reads a size with its unit.
pub fn size(text: &str) -> Result<u64, String> {
    let unit = text.trim_start_matches(|c: char| c.is_ascii_digit());
    let number = &text[..text.len() - unit.len()];
    let shift = match unit
        .to_ascii_lowercase()
        .trim_end_matches("ib")
        .trim_end_matches('b')
    {
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "" => return Err(format!("a size needs a unit, such as {number}M")),
        _ => return Err(format!("unknown unit {unit:?}; K, M, G and T are known")),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "a size is a number and a unit".to_owned())?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "the size is too large".to_owned())
}

pub fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string())
}

/// Checks a VM's name: it becomes a file name.
fn name(text: &str) -> Result<String, String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    let starts_well = text.starts_with(|c: char| c.is_ascii_alphanumeric());
    if !starts_well || text.len() > 64 || !text.chars().all(allowed) {
        return Err(
            "a name has 1 to 64 letters, digits, dots, dashes and underscores, \
             and starts with a letter or digit"
                .to_owned(),
        );
    }
    Ok(text.to_owned())
}

/// Checks a UUID: 32 lower-case hexadecimal digits in five groups.
fn uuid(text: &str) -> Result<String, String> {
    let groups: Vec<usize> = text.split('-').map(str::len).collect();
    let digit = |c: char| c == '-' || c.is_ascii_digit() || ('a'..='f').contains(&c);
    if groups != [8, 4, 4, 4, 12] || !text.chars().all(digit) {
        return Err("a UUID is written like 0f8fad5b-d9cb-469f-a165-70867728950e".to_owned());
    }
    Ok(text.to_owned())
}

fn sink(text: &str) -> Result<Sink, String> {
    let path = |path: &str| match path {
        "" => Err("the path is missing".to_owned()),
        path => Ok(PathBuf::from(path)),
    };
    Ok(match text {
        "stdio" => Sink::Stdio,
        "pty" => Sink::Pty,
        "none" => Sink::None,
        _ => match text.split_once(':') {
            Some(("file", rest)) => Sink::File(path(rest)?),
            Some(("socket", rest)) => Sink::Socket(path(rest)?),
            _ => return Err("one of stdio, pty, file:PATH, socket:PATH and none".to_owned()),
        },
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn sizes() {
        assert_eq!(size("256M"), Ok(256 << 20));
        assert_eq!(size("2g"), Ok(2 << 30));
        assert_eq!(size("64KiB"), Ok(64 << 10));
        for wrong in [
            "256",
            "",
            "M",
            "-1M",
            "1.5G",
            "12Q",
            "99999999999999T",
            "1é",
        ] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_and_sinks() {
        assert!(name("web-1.a_b").is_ok());
        for wrong in ["", "-a", ".hidden", "a/b", "a b", &"x".repeat(65)] {
            assert!(name(wrong).is_err(), "{wrong}");
        }
        assert_eq!(sink("file:/tmp/x"), Ok(Sink::File("/tmp/x".into())));
        assert_eq!(sink("socket:a:b"), Ok(Sink::Socket("a:b".into())));
        assert!(sink("file:").is_err() && sink("tcp:1").is_err());
    }

    #[test]
    fn uuids() {
        assert!(uuid("0f8fad5b-d9cb-469f-a165-70867728950e").is_ok());
        for wrong in [
            "",
            "0F8FAD5B-d9cb-469f-a165-70867728950e",
            "0f8fad5b-d9cb-469f-a165-70867728950",
            "0f8fad5b-d9cb-469f-a165-7086772895é",
        ] {
            assert!(uuid(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn wrong_arguments_exit_with_2() {
        for arguments in [
            &["blanket", "run"][..],
            &["blanket", "run", "--memory", "1G"],
            &["blanket", "run", "a.img", "--initrd", "i"],
            &["blanket", "run", "--kernel", "k", "--boot-entry", "0"],
            &["blanket", "run", "--kernel", "k", "--cpus", "0"],
            &["blanket", "run", "--kernel", "k", "--memory", "12"],
            &["blanket", "stop"],
            &["blanket", "stats"],
            &["blanket", "stats", "--format", "json"],
            &["blanket", "stats", "a", "--json", "--format", "text"],
            &["blanket", "unknown"],
        ] {
            let error = Arguments::try_parse_from(arguments).expect_err("wrong");
            assert_eq!(error.exit_code(), 2, "{arguments:?}");
        }
    }
}
