//! A long, narrow link.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// Bytes that are passed on together.
const PIECE: usize = 16 << 10;
/// Pieces that are on their way at most: more than fit between two far ends.
const PIECES: usize = 1024;
/// How far the narrow place may be behind before no more is taken in: a router's queue.
const QUEUE: Duration = Duration::from_millis(20);

/// How long a byte takes, and how many pass in a second.
#[derive(Clone, Copy)]
pub struct Slow {
    pub delay: Duration,
    pub rate: u64,
}

type Piece = (Instant, Vec<u8>);

impl Slow {
    /// Both ways of a connection, until one end hangs up.
    pub fn connection(self, source: &TcpStream, destination: &TcpStream) {
        std::thread::scope(|s| {
            for (from, to) in [(source, destination), (destination, source)] {
                let (enters, leaves) = sync_channel(PIECES);
                s.spawn(move || {
                    let _ = self.take_in(from, &enters);
                });
                s.spawn(move || {
                    let _ = give_out(&leaves, to);
                    // What has come so far has been passed on; the other way ends, too.
                    let _ = to.shutdown(Shutdown::Both);
                    let _ = from.shutdown(Shutdown::Both);
                });
            }
        });
    }

    fn take_in(self, mut from: &TcpStream, enters: &SyncSender<Piece>) -> io::Result<()> {
        let mut passed = Instant::now();
        let mut buffer = [0; PIECE];
        loop {
            let count = from.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            let nanos = count as u64 * 1_000_000_000 / self.rate.max(1);
            passed = passed.max(Instant::now()) + Duration::from_nanos(nanos);
            if enters
                .send((passed + self.delay, buffer[..count].to_vec()))
                .is_err()
            {
                return Ok(());
            }
            let behind = passed.saturating_duration_since(Instant::now());
            std::thread::sleep(behind.saturating_sub(QUEUE));
        }
    }
}

fn give_out(leaves: &Receiver<Piece>, mut to: &TcpStream) -> io::Result<()> {
    for (due, bytes) in leaves {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        to.write_all(&bytes)?;
    }
    Ok(())
}
