//! What a machine is told beside the VMM: the file `bmcast.conf` on its boot medium.

use alloc::string::{String, ToString as _};
use alloc::vec::Vec;
use core::fmt;
use core::net::Ipv4Addr;

use crate::{Hash, Key, NoHash, is_machine_name};

/// Most bytes of the file.
const MOST: usize = 16 << 10;
/// Most servers in it.
const MOST_SERVERS: usize = 8;

/// An HTTP server that has an image, as `http://HOST[:PORT][/PATH]`: the manifest is at
/// `PATH/manifest`, the image at `PATH/image`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// A name or an IPv4 address.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// With `/` before it and none behind it, or empty.
    pub path: String,
}

impl Server {
    /// Reads a URL.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(url: &str) -> Result<Self, &'static str> {
        let Some(rest) = url.strip_prefix("http://") else {
            return Err("a server is http://HOST[:PORT][/PATH]");
        };
        if !rest.bytes().all(|byte| byte.is_ascii_graphic()) || rest.contains(['?', '#', '@']) {
            return Err("a URL of a server has no blanks, no query, no user");
        }
        let (authority, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        let (host, port) = match authority.split_once(':') {
            Some((host, port)) => (host, port.parse().map_err(|_| "its port is no number")?),
            None => (authority, 80),
        };
        let letters = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'.' || byte == b'-';
        if host.is_empty() || host.len() > 253 || !host.bytes().all(letters) {
            return Err("its host is no name and no IPv4 address");
        }
        if port == 0 {
            return Err("its port is 0");
        }
        Ok(Self {
            host: host.into(),
            port,
            path: path.trim_end_matches('/').into(),
        })
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}:{}{}", self.host, self.port, self.path)
    }
}

/// How the VMM's network card gets its address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// It asks for it.
    Dhcp,
    /// It is this one.
    Static {
        /// The address.
        address: Ipv4Addr,
        /// Bits of its network.
        prefix: u8,
        /// The gateway to others.
        gateway: Option<Ipv4Addr>,
        /// The server of names.
        dns: Option<Ipv4Addr>,
    },
}

/// The disk that the image goes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disk {
    /// The first one that the firmware names.
    First,
    /// The one with this serial number.
    Serial(String),
}

/// What a machine is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootConfig {
    /// Servers that have the image; the first one that answers is asked.
    pub servers: Vec<Server>,
    /// [`Manifest::id`](crate::Manifest::id) of the only image that it may become.
    pub manifest: Hash,
    /// Its network.
    pub network: Network,
    /// Its disk.
    pub disk: Disk,
    /// Most bytes per second that are fetched while nobody waits for them.
    pub rate: Option<u64>,
    /// What the record on its disk is sealed with.
    pub key: Option<Key>,
    /// The name that it reports itself by; its MAC address if there is none.
    pub machine: Option<String>,
    /// The VMM says what it does on the first serial port.
    pub serial: bool,
    /// A disk that has something else on it is written over.
    pub erase: bool,
}

/// Why a file is no boot configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A line is wrong.
    #[error("bmcast.conf, line {line}, {key}: {reason}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// The key, or what is there instead.
        key: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// A key is missing.
    #[error("bmcast.conf: there is no {0}")]
    Missing(&'static str),
    /// It is not text, or too long.
    #[error("bmcast.conf: it is no text of at most {MOST} bytes")]
    NoText,
}

const KEYS: [&str; 12] = [
    "server", "manifest", "network", "address", "gateway", "dns", "disk", "rate", "key", "machine",
    "log", "erase",
];

impl BootConfig {
    /// Reads the file: lines of `key = value`, and comments behind `#`.
    ///
    /// # Errors
    /// A line is wrong or a key is missing.
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        let text = core::str::from_utf8(bytes).map_err(|_| ConfigError::NoText)?;
        if bytes.len() > MOST {
            return Err(ConfigError::NoText);
        }
        let mut values: [Option<(usize, &str)>; KEYS.len()] = [None; KEYS.len()];
        for (n, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or("").trim();
            if line.is_empty() {
                continue;
            }
            let wrong = |key: &str, reason| ConfigError::Line {
                line: n + 1,
                key: key.chars().take(40).collect(),
                reason,
            };
            let (key, value) = line
                .split_once('=')
                .ok_or_else(|| wrong(line, "a line is `key = value`"))?;
            let (key, value) = (key.trim(), value.trim());
            let slot = KEYS.iter().position(|known| *known == key);
            match slot.map(|slot| &mut values[slot]) {
                None => return Err(wrong(key, "there is no such key")),
                Some(Some(_)) => return Err(wrong(key, "it is there twice")),
                Some(_) if value.is_empty() => return Err(wrong(key, "it has no value")),
                Some(slot) => *slot = Some((n + 1, value)),
            }
        }
        Values(values).config()
    }
}

struct Values<'a>([Option<(usize, &'a str)>; KEYS.len()]);

impl<'a> Values<'a> {
    /// A key's value, by `parse`.
    fn get<T>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&'a str) -> Result<T, &'static str>,
    ) -> Result<Option<T>, ConfigError> {
        let slot = KEYS.iter().position(|known| *known == key);
        let Some((line, value)) = slot.and_then(|slot| self.0[slot]) else {
            return Ok(None);
        };
        parse(value).map(Some).map_err(|reason| ConfigError::Line {
            line,
            key: key.into(),
            reason,
        })
    }

    fn config(&self) -> Result<BootConfig, ConfigError> {
        let servers = self
            .get("server", |list| {
                let servers: Result<Vec<_>, _> = list
                    .split(',')
                    .map(|url| Server::parse(url.trim()))
                    .collect();
                servers.and_then(|servers| match servers.len() {
                    1..=MOST_SERVERS => Ok(servers),
                    _ => Err("at most 8 servers"),
                })
            })?
            .ok_or(ConfigError::Missing("server"))?;
        let manifest = self
            .get("manifest", |id| {
                id.parse()
                    .map_err(|NoHash| "an id has 64 hexadecimal digits")
            })?
            .ok_or(ConfigError::Missing("manifest"))?;
        let disk = self.get("disk", |disk| match disk.split_once(' ') {
            None if disk == "first" => Ok(Disk::First),
            Some(("serial", serial)) => Ok(Disk::Serial(serial.trim().into())),
            _ => Err("a disk is `first` or `serial NUMBER`"),
        })?;
        Ok(BootConfig {
            servers,
            manifest,
            network: self.network()?,
            disk: disk.unwrap_or(Disk::First),
            rate: self.get("rate", parse_rate)?,
            key: self.get("key", |key| {
                key.parse()
                    .map_err(|NoHash| "a key has 64 hexadecimal digits")
            })?,
            machine: self.get("machine", |name| match is_machine_name(name) {
                true => Ok(name.into()),
                false => Err("a name has 1 to 64 letters, digits, `-`, `_`, `.` and `:`"),
            })?,
            serial: self
                .get("log", |to| match to {
                    "serial" => Ok(true),
                    "none" => Ok(false),
                    _ => Err("a log goes to `serial` or `none`"),
                })?
                .unwrap_or(false),
            erase: self
                .get("erase", |answer| match answer {
                    "yes" => Ok(true),
                    "no" => Ok(false),
                    _ => Err("it is `yes` or `no`"),
                })?
                .unwrap_or(false),
        })
    }

    fn network(&self) -> Result<Network, ConfigError> {
        let is_static = self.get("network", |kind| match kind {
            "dhcp" => Ok(false),
            "static" => Ok(true),
            _ => Err("a network is `dhcp` or `static`"),
        })?;
        let ip = |text: &str| {
            text.parse::<Ipv4Addr>()
                .map_err(|_| "it is no IPv4 address")
        };
        let address = self.get("address", |text| {
            let (address, prefix) = text
                .split_once('/')
                .ok_or("an address is like 10.0.2.15/24")?;
            let prefix: u8 = prefix.parse().map_err(|_| "its prefix is no number")?;
            match prefix {
                1..=32 => Ok((ip(address)?, prefix)),
                _ => Err("its prefix is not 1 to 32"),
            }
        })?;
        let (gateway, dns) = (self.get("gateway", ip)?, self.get("dns", ip)?);
        match (is_static, address) {
            (Some(true), None) => Err(ConfigError::Missing("address")),
            (Some(false), Some(_)) => self
                .get("address", |_| Err("with `network = dhcp` there is none"))
                .map(|_: Option<()>| Network::Dhcp),
            (_, Some((address, prefix))) => Ok(Network::Static {
                address,
                prefix,
                gateway,
                dns,
            }),
            (_, None) => {
                let only_static = |_| Err("it goes with `network = static`");
                self.get("gateway", only_static)?;
                self.get("dns", only_static)
                    .map(|_: Option<()>| Network::Dhcp)
            }
        }
    }
}

/// Bytes per second, with K, M or G behind the number.
///
/// # Errors
/// What is wrong with it.
pub fn parse_rate(text: &str) -> Result<u64, &'static str> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "a rate is like 50M, bytes per second")?;
    match number.checked_mul(1 << shift) {
        Some(rate) if rate >= 64 << 10 => Ok(rate),
        _ => Err("a rate is at least 64K, and less than 2^64"),
    }
}

/// As the file.
impl fmt::Display for BootConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let servers: Vec<String> = self.servers.iter().map(|one| one.to_string()).collect();
        writeln!(f, "server = {}", servers.join(", "))?;
        writeln!(f, "manifest = {}", self.manifest)?;
        match &self.network {
            Network::Dhcp => writeln!(f, "network = dhcp")?,
            Network::Static {
                address,
                prefix,
                gateway,
                dns,
            } => {
                writeln!(f, "network = static\naddress = {address}/{prefix}")?;
                if let Some(gateway) = gateway {
                    writeln!(f, "gateway = {gateway}")?;
                }
                if let Some(dns) = dns {
                    writeln!(f, "dns = {dns}")?;
                }
            }
        }
        match &self.disk {
            Disk::First => writeln!(f, "disk = first")?,
            Disk::Serial(serial) => writeln!(f, "disk = serial {serial}")?,
        }
        if let Some(rate) = self.rate {
            writeln!(f, "rate = {rate}")?;
        }
        if let Some(key) = &self.key {
            writeln!(f, "key = {key}")?;
        }
        if let Some(machine) = &self.machine {
            writeln!(f, "machine = {machine}")?;
        }
        if self.serial {
            writeln!(f, "log = serial")?;
        }
        if self.erase {
            writeln!(f, "erase = yes")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use alloc::format;

    use proptest::prelude::*;

    use super::*;

    const ID: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

    fn parse(text: &str) -> Result<BootConfig, ConfigError> {
        BootConfig::parse(text.as_bytes())
    }

    #[test]
    fn the_shortest() {
        let text =
            format!("# by hand\nserver = http://10.0.2.2:8080\r\n\nmanifest={ID} # pinned\n");
        let config = parse(&text).unwrap();
        assert_eq!(config.servers[0].host, "10.0.2.2");
        assert_eq!(config.servers[0].port, 8080);
        assert_eq!(config.network, Network::Dhcp);
        assert_eq!(config.disk, Disk::First);
        assert_eq!(parse(&config.to_string()).unwrap(), config);
    }

    #[test]
    fn the_longest() {
        let text = format!(
            "server = http://a.example/images/debian/, http://10.0.0.1:81\nmanifest = {ID}\n\
             network = static\naddress = 10.0.2.15/24\ngateway = 10.0.2.2\ndns = 10.0.2.3\n\
             disk = serial WD-1 2\nrate = 50M\nkey = {ID}\nmachine = rack-1.a\n"
        );
        let config = parse(&text).unwrap();
        assert_eq!(config.servers[0].path, "/images/debian");
        assert_eq!(config.rate, Some(50 << 20));
        assert_eq!(config.key.map(|key| key.to_string()), Some(ID.into()));
        assert!(!format!("{config:?}").contains("0405, 6"));
        assert_eq!(config.disk, Disk::Serial("WD-1 2".into()));
        assert_eq!(parse(&config.to_string()).unwrap(), config);
    }

    #[test]
    fn errors_name_line_and_key() {
        let base = format!("server = http://a\nmanifest = {ID}\n");
        for (line, key) in [
            ("colour = blue", "colour"),
            ("nonsense", "nonsense"),
            ("disk =", "disk"),
            ("disk = second", "disk"),
            ("rate = much", "rate"),
            ("rate = 1", "rate"),
            ("rate = 99999999999999G", "rate"),
            ("machine = a/b", "machine"),
            ("address = 10.0.0.1", "address"),
            ("address = 10.0.0.1/33", "address"),
            ("gateway = 10.0.0.1", "gateway"),
            ("network = wlan", "network"),
            ("key = 00", "key"),
            ("manifest = 00", "manifest"),
        ] {
            let error = parse(&format!("{base}{line}\n")).unwrap_err();
            let text = error.to_string();
            assert!(
                text.starts_with(&format!("bmcast.conf, line 3, {key}: ")),
                "{text}"
            );
        }
        for url in [
            "https://a",
            "http://",
            "http://a:0",
            "http://a:x",
            "http://a:70000",
            "http://a b",
            "http://u@a",
            "http://a?b",
            "http://[::1]",
            "http://a,",
            "ftp://a",
        ] {
            let error = parse(&format!("manifest = {ID}\nserver = {url}")).unwrap_err();
            assert!(
                matches!(error, ConfigError::Line { line: 2, .. }),
                "{url}: {error}"
            );
        }
        assert_eq!(parse(""), Err(ConfigError::Missing("server")));
        assert_eq!(
            parse("server = http://a"),
            Err(ConfigError::Missing("manifest"))
        );
        let dhcp = format!("{base}network = dhcp\naddress = 10.0.0.1/8");
        assert!(matches!(
            parse(&dhcp),
            Err(ConfigError::Line { line: 4, .. })
        ));
        let no_address = format!("{base}network = static");
        assert_eq!(parse(&no_address), Err(ConfigError::Missing("address")));
        assert_eq!(BootConfig::parse(&[0xff]), Err(ConfigError::NoText));
    }

    proptest! {
        #[test]
        fn any_text(text in "([a-z]{0,9} ?=? ?[ -~]{0,20}\n?){0,8}") {
            let _ = parse(&text);
        }
    }
}
