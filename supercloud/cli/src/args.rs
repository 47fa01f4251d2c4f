//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use supercloud_api::{MOST_STREAMS, PostCopy};

use crate::add::Target;
use crate::exit;

/// Several rented instances as nodes, and VMs on them that are run, listed and moved by name.
#[derive(Debug, Parser)]
#[command(
    name = "supercloud",
    version,
    after_help = exit::TABLE
)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// The node that is asked, instead of this one
    #[arg(long, global = true, value_name = "NAME", env = "SUPERCLOUD_NODE")]
    pub node: Option<String>,
    /// Write JSON
    #[arg(long, global = true)]
    pub json: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Nodes: instances with an agent
    Node {
        /// What to do
        #[command(subcommand)]
        command: NodeCommand,
    },
    /// VMs
    Vm {
        /// What to do
        #[command(subcommand)]
        command: VmCommand,
    },
    /// Virtual networks of VMs, the same on all nodes
    Net {
        /// What to do
        #[command(subcommand)]
        command: NetCommand,
    },
    /// Snapshots of VMs
    Snapshot {
        /// What to do
        #[command(subcommand)]
        command: SnapshotCommand,
    },
    /// Images that disks of VMs stand on
    Image {
        /// What to do
        #[command(subcommand)]
        command: ImageCommand,
    },
    /// Moves and drains
    Operation {
        /// What to do
        #[command(subcommand)]
        command: OperationCommand,
    },
    /// Show what happens on a node, as it happens
    Events,
    /// Show a node's figures, in Prometheus' format
    Metrics,
    /// Write the OpenAPI document
    Openapi,
    /// Write the man pages or completions
    #[command(hide = true)]
    Generate {
        /// What to write
        #[command(subcommand)]
        what: Generated,
    },
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

/// What `node start` is.
const START: &str = "\
Runs this node's agent until it is ended. The first start makes a cluster of this node alone, with a CA and a key; \
with --join it joins the cluster of a token instead. VMs go on when the agent ends, and the next one finds them.";

/// `node`.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// Run this node's agent
    #[command(long_about = START)]
    Start(Box<StartArgs>),
    /// Make a token by which another node joins this cluster
    Token {
        /// How many nodes may join with it
        #[arg(long, default_value = "1", value_name = "N")]
        uses: u32,
        /// For how long, such as 1h or 30m
        #[arg(long, default_value = "1h", value_name = "TIME", value_parser = time)]
        valid: Duration,
    },
    /// Have this node, which is alone, join a cluster
    Join {
        /// What `supercloud node token` printed there; - reads it from standard input, where nobody
        /// sees it in the list of processes
        token: String,
    },
    /// Have an instance that is reached by ssh become a node of this one's cluster
    Add {
        /// Where it is: ssh://[USER@]HOST[:PORT], as root
        #[arg(value_name = "TARGET")]
        target: Target,
        /// A package that is installed there before; may be given several times
        #[arg(long = "package", value_name = "FILE")]
        packages: Vec<PathBuf>,
    },
    /// List the nodes, and how they are
    #[command(visible_alias = "ls")]
    List,
    /// Remove a node: it is not let in any more
    Remove {
        /// The node
        name: String,
        /// Although it has VMs, or cannot be asked
        #[arg(long)]
        force: bool,
    },
    /// Move all VMs that run on a node to others with room
    Drain {
        /// The node
        name: String,
        /// How many at once
        #[arg(long, default_value = "1", value_name = "N")]
        at_once: u32,
        /// Do not show how far it is
        #[arg(long, short)]
        quiet: bool,
    },
    /// What is wrong, and what mends it; exits with 1 if something is
    Doctor,
}

/// Arguments of `node start`.
#[derive(Debug, Args)]
pub struct StartArgs {
    /// Where other nodes connect
    #[arg(long, value_name = "ADDRESS:PORT", default_value_t = SocketAddr::from(([0, 0, 0, 0], supercloud_node::config::PORT)))]
    pub listen: SocketAddr,
    /// Where they reach it, if that is another address
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise: Option<String>,
    /// What it remembers, its images and disks [default: /var/lib/supercloud, or below the
    /// user's home]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Its name, at its first start [default: the machine's]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// At its first start, join the cluster of this token
    #[arg(
        long,
        value_name = "TOKEN",
        env = "SUPERCLOUD_TOKEN",
        hide_env_values = true
    )]
    pub join: Option<String>,
    /// The blanket command [default: the one beside this program]
    #[arg(long, value_name = "FILE")]
    pub blanket: Option<PathBuf>,
}

/// `vm`.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Make a VM, and run it
    Run(Box<RunArgs>),
    /// List the VMs of all nodes, or with --node of one
    #[command(visible_alias = "ls")]
    List,
    /// Show a VM
    Show {
        /// The VM
        name: String,
    },
    /// Show what a VM has written to its console on its node
    Logs {
        /// The VM
        name: String,
    },
    /// Attach to a VM's console; Ctrl-] detaches
    Console {
        /// The VM
        name: String,
    },
    /// Start a VM that does not run
    Start {
        /// The VM
        name: String,
    },
    /// Ask a VM's guest to power off, and wait until it has
    Stop {
        /// The VM
        name: String,
        /// End it at once
        #[arg(long)]
        now: bool,
        /// Seconds that the guest has
        #[arg(long, default_value = "60", value_name = "SECONDS")]
        timeout: u64,
    },
    /// Remove a VM that does not run, with the disks that are its node's
    Rm {
        /// The VM
        name: String,
    },
    /// Take a snapshot of a VM: its memory, and what is in its disks, and it runs on; of one that is
    /// stopped, what is in its disks
    Snapshot {
        /// The VM
        name: String,
        /// The snapshot's name [default: the VM's, and the time]
        #[arg(long = "as", value_name = "SNAPSHOT")]
        called: Option<String>,
    },
    /// Have a VM go on from a snapshot, on this node or with --node on another; one that was stopped
    /// boots
    Restore {
        /// The snapshot, whichever node has it
        snapshot: String,
        /// As another VM of this name, with an identity and addresses of its own [default: as the
        /// VM that it was, which must be gone]
        #[arg(long)]
        name: Option<String>,
        /// Let it go on before its memory is unpacked: what it touches comes from the snapshot at
        /// once, the rest in the background. Until all has come it can be neither saved nor moved.
        /// Not for one that was stopped
        #[arg(long)]
        lazy: bool,
    },
    /// Make another VM that goes on from where a VM is, with an identity and addresses of its own; of
    /// one that is stopped, one that boots
    Clone {
        /// The VM, which runs on, or stays stopped
        name: String,
        /// The other one's name
        #[arg(long = "name", value_name = "NAME")]
        other: String,
    },
    /// Write a snapshot to a file, with all that it needs
    Export {
        /// The snapshot
        snapshot: String,
        /// The file; it must not be there
        file: String,
    },
    /// Read a snapshot from a file, for `vm restore`
    Import {
        /// The file
        file: String,
        /// The snapshot's name here [default: the one that it had]
        #[arg(long = "as", value_name = "SNAPSHOT")]
        called: Option<String>,
    },
    /// Move a VM to another node while it runs
    Migrate(Box<MigrateArgs>),
    /// Leave a VM where it is that is being moved
    Cancel {
        /// The VM
        name: String,
    },
    /// A VM whose place is in doubt is here: you know that it does not run at the other node,
    /// and never will
    Keep {
        /// The VM
        name: String,
    },
}

/// `snapshot`.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// List the snapshots of all nodes, or with --node of one
    #[command(visible_alias = "ls")]
    List,
    /// Remove a snapshot
    Rm {
        /// Its name
        name: String,
    },
}

/// Arguments of `vm run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The first disk: an image by its name, or a file by its path (with a slash)
    pub image: Option<String>,
    /// Its name
    #[arg(long)]
    pub name: String,
    /// Memory, such as 256M or 2G
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = size)]
    pub memory: u64,
    /// vCPUs
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..))]
    pub cpus: u32,
    /// Its CPU, as for `blanket run --cpu`: host, or a level (x86-64-v2, ...), with ,-FEATURE for each that
    /// is taken away, so that it can go to nodes that have less
    #[arg(long, value_name = "CPU")]
    pub cpu: Option<String>,
    /// Give it what the CPUs of these nodes have as well, so that it can go to each of them, and back
    #[arg(
        long,
        value_name = "NODE,...",
        value_delimiter = ',',
        conflicts_with = "cpu"
    )]
    pub cpu_for: Vec<String>,
    /// A further disk, as for IMAGE; may be given several times
    #[arg(long, value_name = "DISK")]
    pub disk: Vec<String>,
    /// A network: a virtual one by its name, a tap that each node has, tap=NAME, or user; options as for
    /// `blanket run --net`; may be given several times
    #[arg(long, value_name = "NET")]
    pub net: Vec<String>,
    /// Tell its guest's cloud-init what it shall become: FILE[,meta=FILE][,network=FILE]; the node
    /// keeps a copy
    #[arg(long, value_name = "FILE")]
    pub cloud_init: Option<String>,
    /// A port of all nodes that leads to it in its first virtual network, such as 8080:80 or 53/udp; may be
    /// given several times
    #[arg(long, value_name = "PORT:PORT", requires = "net")]
    pub publish: Vec<String>,
    /// A kernel instead of the image's; the node keeps a copy
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<String>,
    /// Initial RAM disk; the node keeps a copy
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<String>,
    /// Kernel command line
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        allow_hyphen_values = true
    )]
    pub cmdline: String,
    /// What it runs on, on each node: auto, module or kvm
    #[arg(long, value_name = "HOST")]
    pub host: Option<String>,
}

/// Arguments of `vm migrate`.
#[derive(Debug, Args)]
pub struct MigrateArgs {
    /// The VM
    pub name: String,
    /// The node that is to have it
    #[arg(long, value_name = "NODE")]
    pub to: String,
    /// How long it may stand still, such as 300ms
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub max_downtime: Option<Duration>,
    /// How much is sent in a second at most while it runs, such as 100M
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub bandwidth: Option<u64>,
    /// Over how many connections at once, 1 to 8. Several help where a provider allows less to one
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=i64::from(MOST_STREAMS)))]
    pub streams: Option<u8>,
    /// Let it go on there before all of its memory is there, which follows: never; auto, when it
    /// writes so fast that it would be slowed down to less than a quarter; or now, after the first
    /// round. If its process here or this node ends before all has followed, it is ended there
    #[arg(long, value_name = "WHEN", default_value = "never", value_parser = post_copy)]
    pub post_copy: PostCopy,
    /// Only ask whether it can go on there
    #[arg(long)]
    pub dry_run: bool,
    /// The operation's identity, if you choose it: the same one twice is the same move
    #[arg(long, value_name = "ID")]
    pub id: Option<String>,
    /// Seconds to wait for a VM that is in doubt; it is asked for after that, too
    #[arg(long, value_name = "SECONDS", default_value = "60")]
    pub patience: u64,
    /// Do not show how far it is
    #[arg(long, short)]
    pub quiet: bool,
}

/// `net`.
#[derive(Debug, Subcommand)]
pub enum NetCommand {
    /// Make a network
    Create {
        /// Its name; VMs in it are called VM.NETWORK.internal
        name: String,
        /// Its addresses, such as 10.5.0.0/16 [default: the first free ones of 10.64.0.0/16 and so on]
        #[arg(long, value_name = "ADDRESS/BITS")]
        subnet: Option<String>,
    },
    /// List the networks, and the VMs in them
    #[command(visible_alias = "ls")]
    List,
    /// Remove a network that has no VMs
    Rm {
        /// Its name
        name: String,
    },
}

/// `image`.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Keep a disk image for VMs to stand on; it is copied, and never changes
    Add {
        /// The file, on the node
        file: String,
        /// Its name [default: the file's]
        #[arg(long)]
        name: Option<String>,
    },
    /// List the images of a node
    #[command(visible_alias = "ls")]
    List,
    /// Forget an image
    Rm {
        /// Its name
        name: String,
    },
}

/// `operation`.
#[derive(Debug, Subcommand)]
pub enum OperationCommand {
    /// List the operations of a node
    #[command(visible_alias = "ls")]
    List,
    /// Show one
    Show {
        /// Its identity
        id: String,
    },
    /// Cancel one, if it is not too late
    Cancel {
        /// Its identity
        id: String,
    },
}

/// Reads a size with its unit.
fn post_copy(text: &str) -> Result<PostCopy, String> {
    let all = [PostCopy::Never, PostCopy::Auto, PostCopy::Now];
    let found = all.into_iter().find(|it| it.word() == text);
    found.ok_or_else(|| "it is never, auto or now".into())
}

fn size(text: &str) -> Result<u64, String> {
    let unit = text.trim_start_matches(|c: char| c.is_ascii_digit());
    let number = text.strip_suffix(unit).unwrap_or_default();
    let shift = match unit.to_ascii_lowercase().as_str() {
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err("a size is a number and a unit, such as 256M or 2G".into()),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "a size is a number and a unit".to_owned())?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "the size is too large".to_owned())
}

/// Reads a time with its unit; milliseconds if it has none.
fn time(text: &str) -> Result<Duration, String> {
    let unit = text.trim_start_matches(|c: char| c.is_ascii_digit());
    let number = text.strip_suffix(unit).unwrap_or_default();
    let number: u64 = number
        .parse()
        .map_err(|_| "a time is a number and a unit, such as 300ms or 1h".to_owned())?;
    let seconds = |each: u64| number.checked_mul(each).map(Duration::from_secs);
    let time = match unit {
        "" | "ms" => Some(Duration::from_millis(number)),
        "s" => seconds(1),
        "m" => seconds(60),
        "h" => seconds(3600),
        "d" => seconds(86_400),
        _ => return Err("the units are ms, s, m, h and d".into()),
    };
    time.ok_or_else(|| "the time is too long".to_owned())
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
    fn sizes_and_times() {
        assert_eq!(size("256M"), Ok(256 << 20));
        for wrong in ["", "M", "12", "-1M", "1é", "99999999999999T"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
        assert_eq!(time("300"), Ok(Duration::from_millis(300)));
        assert_eq!(time("2h"), Ok(Duration::from_secs(7200)));
        for wrong in ["", "h", "1w", "1.5s", "99999999999999999d"] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn wrong_arguments_exit_with_2() {
        for arguments in [
            &["supercloud"][..],
            &["supercloud", "vm", "run", "x"],
            &[
                "supercloud",
                "vm",
                "run",
                "x",
                "--name",
                "a",
                "--memory",
                "12",
            ],
            &["supercloud", "vm", "migrate", "a"],
            &["supercloud", "node", "start", "--listen", "nowhere"],
        ] {
            let error = Arguments::try_parse_from(arguments).expect_err("wrong");
            assert_eq!(error.exit_code(), 2, "{arguments:?}");
        }
    }
}
