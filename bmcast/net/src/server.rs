//! Where an image is served.

use alloc::string::{String, ToString};
use core::net::Ipv4Addr;

/// Longest URL and longest path, in bytes: a request's head has to stay small.
const LONGEST: usize = 1024;

/// Why a URL is not one of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// It does not begin with `http://`.
    #[error("the URL does not begin with http://")]
    Scheme,
    /// The host is no IPv4 address of a host.
    #[error("the host of the URL is no IPv4 address (names are not looked up)")]
    Host,
    /// The port is not one.
    #[error("the port of the URL is not a number from 1 to 65535")]
    Port,
    /// There is a character that has no place in a request, or too many of them.
    #[error(
        "the URL has a space or another character that must be %-encoded, or is longer than {LONGEST} bytes"
    )]
    Path,
}

/// A server and the directory on it that has an image's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    pub(crate) address: Ipv4Addr,
    pub(crate) port: u16,
    /// What is said in `Host`.
    pub(crate) host: String,
    /// Begins and ends with a slash.
    directory: String,
}

impl Server {
    /// Of `http://ADDRESS[:PORT][/DIRECTORY[/]]`, with an IPv4 address.
    pub fn parse(url: &str) -> Result<Self, UrlError> {
        check(url)?;
        let rest = url.strip_prefix("http://").ok_or(UrlError::Scheme)?;
        let (host, path) = match rest.find('/') {
            Some(slash) => rest.split_at(slash),
            None => (rest, "/"),
        };
        let (name, port) = match host.split_once(':') {
            Some((name, port)) => (name, port.parse().map_err(|_| UrlError::Port)?),
            None => (host, 80),
        };
        if port == 0 {
            return Err(UrlError::Port);
        }
        let mut directory = path.to_string();
        if !directory.ends_with('/') {
            directory.push('/');
        }
        let address = name.parse().map_err(|_| UrlError::Host)?;
        if !is_host(address) {
            return Err(UrlError::Host);
        }
        Ok(Self {
            address,
            port,
            host: host.to_string(),
            directory,
        })
    }

    /// The path of a request: `path` from the directory on, or from the root if it begins with a slash.
    pub(crate) fn path(&self, path: &str) -> String {
        if path.starts_with('/') {
            return path.to_string();
        }
        let mut whole = self.directory.clone();
        whole.push_str(path);
        whole
    }
}

impl core::fmt::Display for Server {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "http://{}{}", self.host, self.directory)
    }
}

/// Whether it can be the address of one host.
pub(crate) fn is_host(address: Ipv4Addr) -> bool {
    !address.is_unspecified() && !address.is_broadcast() && !address.is_multicast()
}

/// Whether it can be said in the first line of a request.
pub(crate) fn check(path: &str) -> Result<(), UrlError> {
    let fine = path.len() <= LONGEST && path.bytes().all(|byte| byte.is_ascii_graphic());
    fine.then_some(()).ok_or(UrlError::Path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let server = Server::parse("http://10.0.2.2:8000/images/debian").unwrap();
        assert_eq!(server.address, Ipv4Addr::new(10, 0, 2, 2));
        assert_eq!(server.port, 8000);
        assert_eq!(server.path("manifest"), "/images/debian/manifest");
        assert_eq!(server.path("/status"), "/status");
        assert_eq!(server.to_string(), "http://10.0.2.2:8000/images/debian/");
        let server = Server::parse("http://192.0.2.1").unwrap();
        assert_eq!((server.port, server.path("m").as_str()), (80, "/m"));
        for (url, error) in [
            ("https://10.0.2.2/", UrlError::Scheme),
            ("http://example/", UrlError::Host),
            ("http:///", UrlError::Host),
            ("http://0.0.0.0/", UrlError::Host),
            ("http://224.0.0.1/", UrlError::Host),
            ("http://10.0.2.2:0/", UrlError::Port),
            ("http://10.0.2.2:65536/", UrlError::Port),
            ("http://10.0.2.2/a b", UrlError::Path),
            ("http://10.0.2.2/\r\nX: y", UrlError::Path),
        ] {
            assert_eq!(Server::parse(url), Err(error), "{url}");
        }
    }
}
