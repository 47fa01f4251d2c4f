//! What asks the server before and after.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use crate::server::{DROP, MARK, PORT};
use crate::{Result, failed};

/// Times that a server is asked that does not answer yet.
const TRIES: u32 = 300;

/// Asks the server how much the CPU has worked.
pub struct Meter {
    /// To the server's datagrams.
    pub socket: UdpSocket,
    /// Of the server, by TCP too.
    pub address: SocketAddr,
    scale: f64,
    reps: usize,
    /// What the names of rows begin with that are measured; all are if there is none.
    only: Vec<String>,
    /// What asking twice costs by itself.
    empty: f64,
}

/// What one kind of operation costs.
pub struct Row {
    name: String,
    what: &'static str,
    /// Operations of a repetition.
    operations: u64,
    /// Bytes of a repetition.
    bytes: u64,
    /// Instructions of the median repetition, and of the least and the most.
    instructions: [f64; 3],
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [median, least, most] = self.instructions;
        write!(
            f,
            "IO-COST {} {} operations={} bytes={} instructions={median:.0} least={least:.0} most={most:.0}",
            self.name, self.what, self.operations, self.bytes
        )
    }
}

impl Meter {
    /// Waits for the server.
    pub fn new(address: Ipv4Addr, scale: f64, reps: usize, only: &[String]) -> Result<Self> {
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let socket = UdpSocket::bind(any).map_err(failed("bind"))?;
        crate::server::make_room(&socket)?;
        let address = SocketAddr::from((address, PORT));
        let timeout = |time| socket.set_read_timeout(Some(time));
        timeout(Duration::from_millis(100)).map_err(failed("a time limit"))?;
        socket.connect(address).map_err(failed("connect"))?;
        let mut this = Self {
            socket,
            address,
            scale,
            reps: reps.max(1),
            only: only.to_vec(),
            empty: 0.0,
        };
        let mut tries = 0;
        while let Err(error) = this.ask(MARK) {
            tries += 1;
            if tries == TRIES {
                return Err(format!("{address} does not answer: {error}"));
            }
        }
        let timeout = |time| this.socket.set_read_timeout(Some(time));
        timeout(Duration::from_secs(20)).map_err(failed("a time limit"))?;
        // Answers that came too late.
        this.socket
            .set_nonblocking(true)
            .map_err(failed("nonblocking"))?;
        while this.socket.recv(&mut [0; 8]).is_ok() {}
        this.socket
            .set_nonblocking(false)
            .map_err(failed("blocking"))?;
        let mut empty = Vec::new();
        for _ in 0..21 {
            let before = this.ask(MARK)?;
            empty.push(this.ask(MARK)? - before);
        }
        empty.sort_by(f64::total_cmp);
        this.empty = empty[empty.len() / 2];
        Ok(this)
    }

    /// Instructions up to now.
    fn ask(&self, what: u8) -> Result<f64> {
        self.socket.send(&[what]).map_err(failed("send"))?;
        let mut answer = [0; 8];
        match self.socket.recv(&mut answer).map_err(failed("an answer"))? {
            8 => Ok(f64::from_le_bytes(answer)),
            n => Err(format!("an answer of {n} bytes")),
        }
    }

    /// `count` operations, more or less as the command line says.
    pub fn scaled(&self, count: u64) -> u64 {
        ((count as f64 * self.scale) as u64).max(1)
    }

    /// Whether any row of a device is wanted.
    pub fn wants(&self, device: &str) -> bool {
        let all = format!("{device}/");
        let wanted = |only: &String| only.starts_with(&all) || all.starts_with(only);
        self.only.is_empty() || self.only.iter().any(wanted)
    }

    /// Measures `work`, which gets the number of the repetition, and of which the first
    /// one does not count. `bytes` of it are in all operations together. Nothing if the row
    /// is not wanted.
    pub fn row(
        &self,
        name: &str,
        what: &'static str,
        operations: u64,
        bytes: u64,
        mut work: impl FnMut(usize) -> Result<()>,
    ) -> Result<Option<Row>> {
        let full = format!("{name}/{what}");
        if !self.only.is_empty() && !self.only.iter().any(|only| full.starts_with(only)) {
            return Ok(None);
        }
        let mut all = Vec::new();
        for rep in 0..=self.reps {
            let before = self.ask(DROP)?;
            work(rep).map_err(|error| format!("{name} {what}: {error}"))?;
            let cost = self.ask(MARK)? - before - self.empty;
            if rep > 0 {
                all.push(cost);
            }
        }
        all.sort_by(f64::total_cmp);
        let instructions = [all[all.len() / 2], all[0], all[all.len() - 1]];
        Ok(Some(Row {
            name: name.into(),
            what,
            operations,
            bytes,
            instructions,
        }))
    }
}
