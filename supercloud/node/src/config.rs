//! Where an agent has what.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use supercloud_api::{Code, Error};

/// The port at which nodes listen for each other.
pub const PORT: u16 = 7700;

/// How an agent is started.
#[derive(Clone, Debug)]
pub struct Config {
    /// Its data.
    pub data: PathBuf,
    /// Its socket's directory.
    pub run: PathBuf,
    /// Where it listens for other nodes.
    pub listen: SocketAddr,
    /// Where they reach it, if that is another address.
    pub advertise: Option<String>,
    /// Its name, at its first start.
    pub name: Option<String>,
    /// The token of the cluster that it is to join, if it belongs nowhere yet.
    pub join: Option<String>,
    /// The `blanket` command.
    pub blanket: PathBuf,
}

impl Config {
    /// The agent's own socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        socket(&self.run)
    }

    /// Images, by their hash.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.data.join("images")
    }

    /// What a VM has on this node.
    #[must_use]
    pub fn vm(&self, name: &str) -> PathBuf {
        self.data.join("vms").join(name)
    }

    /// What a move says on its way.
    #[must_use]
    pub fn move_says(&self, operation: &str) -> PathBuf {
        self.data.join("moves").join(operation)
    }

    /// Where other nodes reach this one.
    ///
    /// # Errors
    /// It listens at all addresses and none of them can be told.
    pub fn address(&self) -> Result<String, Error> {
        if let Some(address) = &self.advertise {
            return Ok(address.clone());
        }
        if !self.listen.ip().is_unspecified() {
            return Ok(self.listen.to_string());
        }
        // No packet leaves for this: the kernel only chooses the address that one would have.
        let probe = std::net::UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
            socket.connect("192.0.2.1:9")?;
            socket.local_addr()
        });
        match probe {
            Ok(own) if !own.ip().is_unspecified() => {
                Ok(SocketAddr::new(own.ip(), self.listen.port()).to_string())
            }
            _ => Err(Error::new(
                Code::BadRequest,
                "there is no route from which this node's address could be told",
                "give it: supercloud node start --advertise ADDRESS:PORT",
            )),
        }
    }
}

/// The socket in a directory of sockets.
#[must_use]
pub fn socket(run: &Path) -> PathBuf {
    run.join("agent.sock")
}

/// The user's directory of sockets: `/run/supercloud` for root.
///
/// # Errors
/// There is none.
pub fn default_run() -> Result<PathBuf, Error> {
    directory(
        "SUPERCLOUD_RUNTIME_DIR",
        "/run/supercloud",
        "XDG_RUNTIME_DIR",
    )
}

/// The user's data: `/var/lib/supercloud` for root.
///
/// # Errors
/// There is none.
pub fn default_data() -> Result<PathBuf, Error> {
    directory(
        "SUPERCLOUD_DATA_DIR",
        "/var/lib/supercloud",
        "XDG_DATA_HOME",
    )
    .or_else(|error| match std::env::var_os("HOME") {
        Some(home) if !home.is_empty() => Ok(Path::new(&home).join(".local/share/supercloud")),
        _ => Err(error),
    })
}

fn directory(own: &str, of_root: &str, of_users: &str) -> Result<PathBuf, Error> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(path) = set(own) {
        return Ok(path.into());
    }
    if rustix::process::geteuid().is_root() {
        return Ok(of_root.into());
    }
    set(of_users)
        .map(|path| Path::new(&path).join("supercloud"))
        .ok_or_else(|| {
            Error::new(
                Code::BadRequest,
                format!("{of_users} is not set"),
                format!("set {own} to a directory of your own"),
            )
        })
}

/// `blanket` beside this program, else the one that is found by its name.
#[must_use]
pub fn find_blanket() -> PathBuf {
    if let Some(path) = std::env::var_os("SUPERCLOUD_BLANKET").filter(|path| !path.is_empty()) {
        return path.into();
    }
    std::env::current_exe()
        .ok()
        .map(|own| own.with_file_name("blanket"))
        .filter(|beside| beside.exists())
        .unwrap_or_else(|| "blanket".into())
}
