//! The command line.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use bmcast_image::{DEFAULT_CHUNK, Hash, MAX_CHUNK, MIN_CHUNK, Server};
use clap::{Args, Parser, Subcommand};

use crate::exit;

/// Bare-metal machines that start at once, while their image streams in.
#[derive(Debug, Parser)]
#[command(name = "bmcast", version, after_help = exit::TABLE)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Write JSON
    #[arg(long, global = true)]
    pub json: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve an image, and hear from the machines that become it
    Serve(ServeArgs),
    /// Write the manifest of an image, for another HTTP server
    #[command(long_about = MANIFEST)]
    Manifest(ManifestArgs),
    /// Get the order in which a machine wanted its image, for `bmcast manifest --profile`
    Profile(ProfileArgs),
    /// Make a medium that a machine boots from
    Image(Box<ImageArgs>),
    /// Show how far the machines are
    Status(StatusArgs),
    /// Write man pages or completions, for packages
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

/// Where the package has the VMM.
pub const EFI: &str = "/usr/lib/bmcast/bmcast.efi";

/// What `manifest` is for.
const MANIFEST: &str = "\
Writes the manifest of an image and prints its id. Any HTTP server that knows range requests can then serve \
the machines: the file `manifest`, and beside it the raw image as `image`.";

/// `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// The image: raw, qcow2, VMDK or VHD
    pub image: PathBuf,
    /// Where to listen
    #[arg(long, default_value = "0.0.0.0:8080", value_name = "ADDRESS:PORT")]
    pub listen: SocketAddr,
    #[command(flatten)]
    pub cut: CutArgs,
}

/// How an image is cut.
#[derive(Clone, Copy, Debug, Args)]
pub struct CutArgs {
    /// Size of a chunk, the piece in which the image is fetched: 16K to 1M
    #[arg(long, value_name = "SIZE", value_parser = chunk)]
    pub chunk: Option<u32>,
}

/// `manifest`.
#[derive(Debug, Args)]
pub struct ManifestArgs {
    /// The image: raw, qcow2, VMDK or VHD
    pub image: PathBuf,
    /// The file to write, instead of IMAGE.manifest
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
    /// The order in which a boot wanted the image, from `bmcast profile`: machines fetch it first
    #[arg(long, value_name = "FILE")]
    pub profile: Option<PathBuf>,
    #[command(flatten)]
    pub cut: CutArgs,
}

/// `profile`.
#[derive(Debug, Args)]
pub struct ProfileArgs {
    /// The machine
    #[arg(value_parser = machine)]
    pub machine: String,
    /// The server that it reported to
    #[arg(long, value_name = "URL", env = "BMCAST_SERVER", value_parser = server)]
    pub server: Server,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
}

/// `image`.
#[derive(Debug, Args)]
pub struct ImageArgs {
    /// Servers that have the image, such as http://10.0.0.1:8080, up to 8 with commas between them
    #[arg(long, required = true, value_name = "URL", value_delimiter = ',', value_parser = server)]
    pub server: Vec<Server>,
    /// The only image that the machine may become; the server is asked if it is not given
    #[arg(long, value_name = "ID", value_parser = hash)]
    pub manifest_id: Option<Hash>,
    /// The VMM, a UEFI application
    #[arg(long, value_name = "FILE", default_value = EFI)]
    pub efi: PathBuf,
    /// The medium to write, for `dd` to a USB stick or as a virtual disk
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// The VMM's own address, such as 10.0.2.15/24, instead of one by DHCP
    #[arg(long, value_name = "ADDRESS/BITS", value_parser = address)]
    pub address: Option<(Ipv4Addr, u8)>,
    /// The gateway
    #[arg(long, value_name = "ADDRESS", requires = "address")]
    pub gateway: Option<Ipv4Addr>,
    /// The server of names
    #[arg(long, value_name = "ADDRESS", requires = "address")]
    pub dns: Option<Ipv4Addr>,
    /// Serial number of the disk that the image goes to, instead of the first one
    #[arg(long, value_name = "NUMBER")]
    pub disk: Option<String>,
    /// Most bytes per second that are fetched while nobody waits for them, such as 50M
    #[arg(long, value_name = "SIZE", value_parser = rate)]
    pub rate: Option<u64>,
    /// A file with the key that the record on the disk is sealed with; it is made if it is not there. For
    /// machines whose disks others had before. With another key, an installation is begun anew
    #[arg(long, value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// The machine's name, instead of its card's address
    #[arg(long, value_name = "NAME", value_parser = machine)]
    pub machine: Option<String>,
    /// Have the VMM say what it does on the machine's first serial port
    #[arg(long)]
    pub log_serial: bool,
    /// Write over a disk that has something else on it
    #[arg(long)]
    pub erase: bool,
}

/// `status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The machine; all of them if none is named
    #[arg(value_parser = machine)]
    pub machine: Option<String>,
    /// The server that they report to
    #[arg(long, value_name = "URL", env = "BMCAST_SERVER", value_parser = server)]
    pub server: Server,
    /// Show it again each second, until all are done
    #[arg(long)]
    pub watch: bool,
}

impl CutArgs {
    /// Bytes of a chunk.
    pub fn chunk(self) -> u32 {
        self.chunk.unwrap_or(DEFAULT_CHUNK)
    }
}

fn server(text: &str) -> Result<Server, String> {
    Server::parse(text).map_err(str::to_owned)
}

fn hash(text: &str) -> Result<Hash, String> {
    text.parse().map_err(|error| format!("{error}"))
}

fn rate(text: &str) -> Result<u64, String> {
    bmcast_image::parse_rate(text).map_err(str::to_owned)
}

fn machine(text: &str) -> Result<String, String> {
    match bmcast_image::is_machine_name(text) {
        true => Ok(text.into()),
        false => Err("a name has 1 to 64 letters, digits, `-`, `_`, `.` and `:`".into()),
    }
}

fn address(text: &str) -> Result<(Ipv4Addr, u8), String> {
    let wrong = || "an address is like 10.0.2.15/24".to_owned();
    let (address, bits) = text.split_once('/').ok_or_else(wrong)?;
    match (address.parse(), bits.parse()) {
        (Ok(address), Ok(bits @ 1..=32)) => Ok((address, bits)),
        _ => Err(wrong()),
    }
}

fn chunk(text: &str) -> Result<u32, String> {
    let (digits, shift) = match text.strip_suffix('K') {
        Some(digits) => (digits, 10),
        None => match text.strip_suffix('M') {
            Some(digits) => (digits, 20),
            None => (text, 0),
        },
    };
    let bytes = digits
        .parse::<u32>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift));
    match bytes {
        Some(bytes) if bytes.is_power_of_two() && (MIN_CHUNK..=MAX_CHUNK).contains(&bytes) => {
            Ok(bytes)
        }
        _ => Err("a chunk has 16K, 32K, 64K, 128K, 256K, 512K or 1M".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
        assert_eq!(chunk("64K"), Ok(65536));
        assert_eq!(chunk("1M"), Ok(1 << 20));
        for wrong in ["", "K", "3K", "8K", "2M", "4097M", "48K"] {
            assert!(chunk(wrong).is_err(), "{wrong}");
        }
    }
}
