//! QEMU's control socket (QMP).

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

pub struct Monitor {
    stream: UnixStream,
    reader: BufReader<UnixStream>,
}

impl Monitor {
    pub fn open(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let reader = BufReader::new(stream.try_clone()?);
        let mut this = Self { stream, reader };
        this.ask(r#"{"execute":"qmp_capabilities"}"#)?;
        Ok(this)
    }

    /// Waits for an event that `wanted` is true of.
    pub fn event(&mut self, wanted: impl Fn(&Value) -> bool) -> Result<()> {
        while !wanted(&self.read()?) {}
        Ok(())
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(
            self.reader.read_line(&mut line)? > 0,
            "QEMU closed its control socket"
        );
        serde_json::from_str(&line).context("QEMU's control socket")
    }

    /// The answer to a request, as QEMU writes it; events are passed over.
    pub fn ask(&mut self, request: &str) -> Result<Value> {
        writeln!(self.stream, "{request}")?;
        loop {
            let mut answer = self.read()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU does not do {request}: {error}");
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }
}
