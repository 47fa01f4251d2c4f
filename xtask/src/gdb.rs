//! A debugger of an instance's CPU, by QEMU's gdb stub (GDB manual, appendix E).

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

/// Longest time until the instance must have come to a breakpoint.
const PATIENCE: Duration = Duration::from_secs(60);
/// RIP, in the order of gdb's registers for x86-64.
const RIP: u32 = 16;
/// SS, in the same order.
const SS: u32 = 19;

/// A connection to the stub of an instance with one CPU, which is stopped unless it
/// is in [`Gdb::run_to`].
pub struct Gdb {
    stream: UnixStream,
    /// Bytes behind the packet that was read last.
    held: Vec<u8>,
}

impl Gdb {
    /// Connects, which stops the instance.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("no gdb stub at {}", socket.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            stream,
            held: Vec::new(),
        })
    }

    /// Lets the instance run until its CPU comes to `address`.
    pub fn run_to(&mut self, address: u64) -> Result<()> {
        self.expect(&format!("Z1,{address:x},1"), "OK")?;
        let stop = self.ask("c")?;
        self.expect(&format!("z1,{address:x},1"), "OK")?;
        ensure!(stop.starts_with('T'), "the instance ended: {stop}");
        let at = self.rip()?;
        ensure!(at == address, "stopped at {at:#x} instead of {address:#x}");
        Ok(())
    }

    /// One instruction; no interrupt comes before it.
    pub fn step(&mut self) -> Result<()> {
        let stop = self.ask("s")?;
        ensure!(stop.starts_with('T'), "the instance ended: {stop}");
        Ok(())
    }

    /// Where the CPU is.
    pub fn rip(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.register(RIP)?))
    }

    /// The stack's selector.
    pub fn ss(&mut self) -> Result<u64> {
        Ok(u32::from_le_bytes(self.register(SS)?).into())
    }

    /// A register of so many bytes.
    fn register<const BYTES: usize>(&mut self, number: u32) -> Result<[u8; BYTES]> {
        let text = self.ask(&format!("p{number:x}"))?;
        let mut bytes = [0; BYTES];
        ensure!(
            text.len() == 2 * BYTES,
            "register {number} is {text:?}, not {BYTES} bytes"
        );
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digits = str::from_utf8(digits)?;
            *byte = u8::from_str_radix(digits, 16)
                .with_context(|| format!("register {number} is {text:?}"))?;
        }
        Ok(bytes)
    }

    /// A command of QEMU's monitor that answers nothing.
    pub fn monitor(&mut self, command: &str) -> Result<()> {
        let hex: String = command.bytes().map(|byte| format!("{byte:02x}")).collect();
        self.expect(&format!("qRcmd,{hex}"), "OK")
    }

    /// Ends QEMU. An instance that runs is stopped first, by what the stub takes for an
    /// interrupt.
    pub fn quit(mut self) -> Result<()> {
        self.stream.write_all(b"\x03")?;
        self.monitor("quit")
    }

    /// Lets the instance go.
    pub fn detach(mut self) -> Result<()> {
        self.expect("D", "OK")
    }

    fn expect(&mut self, packet: &str, answer: &str) -> Result<()> {
        let got = self.ask(packet)?;
        ensure!(got == answer, "the gdb stub answers {got:?} to {packet:?}");
        Ok(())
    }

    fn ask(&mut self, packet: &str) -> Result<String> {
        let sum = packet.bytes().fold(0, u8::wrapping_add);
        write!(self.stream, "${packet}#{sum:02x}")?;
        self.answer()
            .with_context(|| format!("no answer to {packet:?}"))
    }

    /// The next packet `$...#xx`; acknowledgements before it are skipped.
    fn answer(&mut self) -> Result<String> {
        loop {
            if let Some(end) = self.held.iter().position(|&byte| byte == b'#')
                && self.held.len() >= end + 3
            {
                let start = self.held.iter().position(|&byte| byte == b'$');
                let start = start.context("an answer that does not begin")?;
                let text = String::from_utf8_lossy(&self.held[start + 1..end]).into_owned();
                self.held.drain(..end + 3);
                self.stream.write_all(b"+")?;
                return Ok(text);
            }
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer)? {
                0 => bail!("QEMU ended"),
                count => self.held.extend_from_slice(&buffer[..count]),
            }
        }
    }
}
