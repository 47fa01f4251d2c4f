//! Streams, round trips and small packets between this machine and the server.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use crate::client::{Meter, Row};
use crate::server::{ECHO, HEADER, RETURN, SINK, SOURCE, give, take};
use crate::{Result, failed};

/// Bytes of a stream.
const STREAM: u64 = 32 << 20;
/// Packets at once.
const BURST: u64 = 32;
/// Bytes of a small packet's content.
const PACKET: usize = 64;

/// A connection that begins so.
fn open(meter: &Meter, what: u8, count: u64) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(meter.address).map_err(failed("connect"))?;
    stream.set_nodelay(true).map_err(failed("nodelay"))?;
    let mut header = [what; HEADER];
    header[1..].copy_from_slice(&count.to_le_bytes());
    stream.write_all(&header).map_err(failed("send"))?;
    Ok(stream)
}

/// All rows of one network; `without` may name the stream from the server.
pub fn rows(meter: &Meter, name: &str, without: &[&str], rows: &mut Vec<Row>) -> Result<()> {
    if !meter.wants(name) {
        return Ok(());
    }
    let bytes = meter.scaled(STREAM);
    rows.extend(meter.row(name, "tcp-send", 1, bytes, |_| {
        let mut stream = open(meter, SINK, bytes)?;
        give(&mut stream, bytes).map_err(failed("send"))?;
        take(&mut stream, 1).map_err(failed("receive"))
    })?);
    if !without.contains(&"tcp-receive") {
        rows.extend(meter.row(name, "tcp-receive", 1, bytes, |_| {
            let mut stream = open(meter, SOURCE, bytes)?;
            take(&mut stream, bytes).map_err(failed("receive"))
        })?);
    }

    let count = meter.scaled(1000);
    rows.extend(meter.row(name, "tcp-round-trip", count, count, |_| {
        let mut stream = open(meter, RETURN, 0)?;
        let mut byte = [0];
        for _ in 0..count {
            stream.write_all(&byte).map_err(failed("send"))?;
            stream.read_exact(&mut byte).map_err(failed("receive"))?;
        }
        Ok(())
    })?);

    let mut packet = [0; PACKET];
    let mut exchange = |silent: u64, answers: u8| {
        for n in 0..=silent {
            packet[..2].copy_from_slice(&[ECHO, if n == silent { answers } else { 0 }]);
            meter.socket.send(&packet).map_err(failed("send"))?;
        }
        for _ in 0..answers {
            let received = meter.socket.recv(&mut [0; PACKET]);
            received.map_err(failed("receive"))?;
        }
        Ok(())
    };
    let bytes = |count: u64| count * PACKET as u64;
    rows.extend(meter.row(name, "udp-round-trip", count, bytes(count), |_| {
        (0..count).try_for_each(|_| exchange(0, 1))
    })?);
    let bursts = meter.scaled(64);
    let count = bursts * BURST;
    rows.extend(meter.row(name, "udp-send", count, bytes(count), |_| {
        (0..bursts).try_for_each(|_| exchange(BURST - 1, 1))
    })?);
    rows.extend(meter.row(name, "udp-receive", count, bytes(count), |_| {
        (0..bursts).try_for_each(|_| exchange(0, BURST as u8))
    })?);
    Ok(())
}
