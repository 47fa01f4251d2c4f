//! The command, and a server of it.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

pub fn bmcast(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bmcast"))
        .args(arguments)
        .output()
        .expect("the command runs")
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("text")
}

/// Bytes of which no two sectors are the same, and some chunks of zeros.
pub fn content(bytes: usize) -> Vec<u8> {
    let mut content = vec![0; bytes];
    for (n, sector) in content.chunks_mut(512).enumerate() {
        if n / 128 % 3 != 1 {
            sector.fill(u8::try_from(n % 251).expect("a byte"));
            sector[..8].copy_from_slice(&(n as u64).to_le_bytes());
        }
    }
    content
}

/// A running `bmcast serve`; it ends with this.
pub struct Serve {
    child: Child,
    pub address: SocketAddr,
    pub id: String,
}

impl Serve {
    pub fn start(image: &Path, more: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_bmcast"))
            .args(["serve", "--listen", "127.0.0.1:0"])
            .args(more)
            .arg(image)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the command runs");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("it was piped");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        let (head, address) = line
            .trim_end()
            .split_once(", at http://")
            .expect("its address");
        Self {
            child,
            address: address.parse().expect("an address"),
            id: head.rsplit(' ').next().expect("its id").to_owned(),
        }
    }

    /// The most memory that it had, KiB.
    pub fn memory(&self) -> u64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmHWM:"))
            .expect("a line");
        line.trim()
            .trim_end_matches(" kB")
            .parse()
            .expect("a number")
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
