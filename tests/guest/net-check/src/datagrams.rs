//! UDP: datagrams of many lengths, which come back with every bit turned over.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use crate::pattern::Pattern;
use crate::{PATIENCE, Result, failed};

/// Datagrams at once.
const BATCH: usize = 8;
/// How long one is waited for before it is sent again.
const WAIT: Duration = Duration::from_secs(3);
/// Longest datagram over IPv4.
const LONGEST: usize = 65_507;

/// Lengths around what headers, pages and frames have, and many more.
fn lengths(largest: usize) -> Vec<usize> {
    let edges = [
        1, 17, 18, 19, 200, 213, 214, 215, 1000, 1452, 1472, 1473, 4053, 4054, 4055, 8192, 16_000,
        40_000, 60_000,
    ];
    let many = (0..120).map(|n| 1 + n * 12);
    let all = edges.into_iter().chain(many);
    all.filter(|length| *length <= largest).collect()
}

/// The server.
pub fn answer(socket: &UdpSocket) {
    let mut buffer = vec![0; LONGEST];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((length, from)) => {
                let bytes = &mut buffer[..length];
                bytes.iter_mut().for_each(|byte| *byte = !*byte);
                if let Err(error) = socket.send_to(bytes, from) {
                    eprintln!("net-check: {from}: {error}");
                }
            }
            Err(error) => eprintln!("net-check: a datagram: {error}"),
        }
    }
}

/// A datagram and what must come back.
struct Sent {
    bytes: Vec<u8>,
    back: bool,
}

/// Sends all, and again those that got lost. What was done.
pub fn check(to: SocketAddr, largest: usize) -> Result<String> {
    let any = if to.is_ipv4() {
        SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))
    } else {
        SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))
    };
    let socket = UdpSocket::bind(any).map_err(failed("bind"))?;
    socket.connect(to).map_err(failed("connect"))?;
    let (start, mut again) = (Instant::now(), 0);
    let lengths = lengths(largest);
    let mut before = Vec::new();
    for (first, batch) in (0u64..).step_by(BATCH).zip(lengths.chunks(BATCH)) {
        let mut sent: Vec<Sent> = (first..)
            .zip(batch)
            .map(|(seed, length)| {
                let mut bytes = vec![0; *length];
                Pattern::new(seed).fill(&mut bytes);
                Sent { bytes, back: false }
            })
            .collect();
        again += exchange(&socket, &mut sent, &before).map_err(|error| format!("udp: {error}"))?;
        before = sent;
    }
    Ok(format!(
        "udp datagrams={} largest={largest} sent-again={again} {}ms",
        lengths.len(),
        start.elapsed().as_millis()
    ))
}

/// Sends a batch until all of it came back. How many were sent again.
fn exchange(socket: &UdpSocket, sent: &mut [Sent], before: &[Sent]) -> Result<usize> {
    let until = Instant::now() + PATIENCE;
    let mut again = 0;
    let mut buffer = vec![0; LONGEST];
    loop {
        let missing: Vec<&Sent> = sent.iter().filter(|it| !it.back).collect();
        for it in &missing {
            socket.send(&it.bytes).map_err(failed("send"))?;
        }
        let end = Instant::now() + WAIT;
        while sent.iter().any(|it| !it.back) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            socket
                .set_read_timeout(Some(left))
                .map_err(failed("a socket"))?;
            let length = match socket.recv(&mut buffer) {
                Ok(length) => length,
                Err(error)
                    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
                {
                    break;
                }
                Err(error) => return Err(format!("receive: {error}")),
            };
            let bytes = &mut buffer[..length];
            bytes.iter_mut().for_each(|byte| *byte = !*byte);
            match sent.iter_mut().find(|it| it.bytes == *bytes) {
                Some(it) => it.back = true,
                // One that was sent twice may come twice.
                None if before.iter().any(|it| it.bytes == *bytes) => {}
                None => return Err(format!("a datagram of {length} bytes is wrong")),
            }
        }
        let lost = sent.iter().filter(|it| !it.back).count();
        if lost == 0 {
            return Ok(again);
        }
        again += lost;
        if Instant::now() > until {
            let lengths: Vec<usize> = sent
                .iter()
                .filter(|it| !it.back)
                .map(|it| it.bytes.len())
                .collect();
            return Err(format!("datagrams of {lengths:?} bytes never come back"));
        }
    }
}
