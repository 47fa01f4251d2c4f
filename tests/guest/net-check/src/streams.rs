//! TCP: streams one way and both, in large and in small pieces.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Instant;

use crate::pattern::{give, take};
use crate::{PATIENCE, Result, failed};

/// The server takes a stream, and says with a byte that it was right.
const SINK: u8 = b's';
/// The server gives a stream.
const SOURCE: u8 = b'g';
/// Both at once.
const BOTH: u8 = b'b';
/// The server ends.
const STOP: u8 = b'q';
/// Says that a stream was right.
const RIGHT: u8 = b'+';
/// Bytes at the beginning of a connection: what it is, how long, in pieces of what size.
const HEADER: usize = 17;
/// Seeds of what clients and servers send.
const CLIENTS: u64 = 1;
const SERVERS: u64 = 2;

/// How a stream goes: its name, what the server does, and the size of writes. The small
/// ones are a hundredth as long.
const KINDS: [(&str, u8, usize); 5] = [
    ("to", SINK, 1 << 16),
    ("from", SOURCE, 1 << 16),
    ("both", BOTH, 1 << 16),
    ("to-small", SINK, 61),
    ("from-small", SOURCE, 61),
];

fn open(to: SocketAddr, what: u8, count: usize, piece: usize) -> Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE).map_err(failed("connect"))?;
    prepare(&stream)?;
    let mut header = [what; HEADER];
    header[1..9].copy_from_slice(&(count as u64).to_le_bytes());
    header[9..].copy_from_slice(&(piece as u64).to_le_bytes());
    stream.write_all(&header).map_err(failed("send"))?;
    Ok(stream)
}

fn prepare(stream: &TcpStream) -> Result<()> {
    stream
        .set_nodelay(true)
        .and_then(|()| stream.set_read_timeout(Some(PATIENCE)))
        .and_then(|()| stream.set_write_timeout(Some(PATIENCE)))
        .map_err(failed("a socket"))
}

fn confirm(mut stream: &TcpStream) -> Result<()> {
    let mut byte = [0];
    match stream.read(&mut byte).map_err(failed("the answer"))? {
        1 if byte == [RIGHT] => Ok(()),
        _ => Err("the other end did not get what was sent".into()),
    }
}

/// Runs both directions of a stream at once.
fn both(stream: &TcpStream, seeds: [u64; 2], count: usize, piece: usize) -> Result<()> {
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| give(stream, seeds[0], count, piece));
        take(stream, seeds[1], count)?;
        writer
            .join()
            .unwrap_or_else(|_| Err("the writer panicked".into()))
    })
}

/// Waits until somebody serves there.
pub fn wait(to: SocketAddr) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        // A forward takes connections before its guest does.
        let answer = open(to, SINK, 0, 1).and_then(|stream| confirm(&stream));
        match answer {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > until => return Err(format!("{to}: {error}")),
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(200)),
        }
    }
}

/// All kinds of streams to a server. What was done.
pub fn check(to: SocketAddr, length: usize) -> Result<String> {
    let mut text = format!("tcp bytes={length}");
    for (name, what, piece) in KINDS {
        let count = if piece < 1000 { length / 100 } else { length };
        let start = Instant::now();
        let done = open(to, what, count, piece).and_then(|stream| match what {
            SINK => give(&stream, CLIENTS, count, piece).and_then(|()| confirm(&stream)),
            SOURCE => take(&stream, SERVERS, count),
            _ => both(&stream, [CLIENTS, SERVERS], count, piece).and_then(|()| confirm(&stream)),
        });
        done.map_err(|error| format!("tcp {name}: {error}"))?;
        let _ = write!(text, " {name}={}ms", start.elapsed().as_millis());
    }
    Ok(text)
}

/// Tells a server to end.
pub fn stop(to: SocketAddr) -> Result<()> {
    let stream = open(to, STOP, 0, 1)?;
    confirm(&stream)
}

/// The server, until it is told to stop.
pub fn serve(listener: &TcpListener) -> Result<()> {
    loop {
        let (stream, from) = listener.accept().map_err(failed("accept"))?;
        let mut header = [0; HEADER];
        prepare(&stream)?;
        if let Err(error) = (&stream).read_exact(&mut header) {
            eprintln!("net-check: {from}: {error}");
            continue;
        }
        if header[0] == STOP {
            (&stream).write_all(&[RIGHT]).map_err(failed("send"))?;
            // The client has the answer when its end is seen.
            let _ = stream.shutdown(Shutdown::Write);
            let _ = (&stream).read(&mut [0]);
            return Ok(());
        }
        std::thread::spawn(move || {
            if let Err(error) = one(&stream, &header) {
                eprintln!("net-check: {from}: {error}");
            }
        });
    }
}

/// One connection, up to its end.
fn one(mut stream: &TcpStream, header: &[u8; HEADER]) -> Result<()> {
    let number = |at: usize| {
        let bytes = header[at..at + 8].try_into().unwrap_or_default();
        usize::try_from(u64::from_le_bytes(bytes)).unwrap_or(0)
    };
    let (count, piece) = (number(1), number(9));
    match header[0] {
        SOURCE => return give(stream, SERVERS, count, piece),
        BOTH => both(stream, [SERVERS, CLIENTS], count, piece)?,
        _ => take(stream, CLIENTS, count)?,
    }
    stream.write_all(&[RIGHT]).map_err(failed("send"))
}
