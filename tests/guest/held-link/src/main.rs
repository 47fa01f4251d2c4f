//! Stands between the source and the destination of a migration, and holds their link once,
//! at a step of the handover that is named; or makes it a long and narrow one.
//!
//! `held-link PORT TO slow MILLISECONDS BYTES` lets a byte take so long from one end to the
//! other, and so many pass in a second each way.
//!
//! `held-link PORT TO STEP` listens at 127.0.0.1:PORT and connects whoever comes with
//! 127.0.0.1:TO. At STEP of the first connection it prints `HELD`, and waits for a line on its
//! standard input: at `cut` both ends lose the connection; at anything else it goes on. Later
//! connections are left alone. STEP is `copy` (in the middle of memory), `pull` (in the middle of
//! what follows a VM that runs at the destination), or the word that is held and that the other
//! side has not heard yet: `ready`, `go`, `runs` or `known`.
//!
//! The link is TLS, so words are told by their length: one word is one record, and no other
//! record that comes after the VM has this length (RFC 8446, 5.2: content type and a tag of 16
//! bytes are added to the text).

use std::io::{self, BufRead as _, Read, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

mod slow;

use slow::Slow;

/// Bytes of a record's header: type, version, length.
const HEADER: usize = 5;
/// Length of the record of a word: four bytes of text, its type, its tag.
const WORD: usize = 4 + 1 + 16;
/// Application data, as all is after the greeting.
const DATA: u8 = 23;
/// Which of the destination's words says that it is ready: its verdict is longer than a word.
const READY: u32 = 1;
/// Bytes of memory after which `copy` holds.
const COPIED: usize = 1 << 20;
/// Bytes after which `pull` does, once the destination has said that it runs.
const PULLED: usize = 256 << 10;

#[derive(Clone, Copy, PartialEq)]
enum Step {
    Copy,
    Pull,
    /// The destination's word of this number.
    Destination(u32),
    /// The source's, counted from [`READY`] on.
    Source(u32),
}

#[derive(Clone, Copy, PartialEq)]
enum From {
    Source,
    Destination,
}

/// What has come so far.
#[derive(Default)]
struct Heard {
    bytes: usize,
    source: u32,
    destination: u32,
}

/// What is done to connections.
enum Link {
    Held(Held),
    Slow(Slow),
}

struct Held {
    step: Step,
    heard: Mutex<Heard>,
    once: AtomicBool,
}

impl Held {
    /// Whether a record is the one to hold.
    fn at(&self, from: From, record: &[u8]) -> bool {
        let Ok(mut heard) = self.heard.lock() else {
            return false;
        };
        let word = record[0] == DATA && record.len() == HEADER + WORD;
        let step = match from {
            From::Destination if word => {
                heard.destination += 1;
                if heard.destination == READY + 1 {
                    heard.bytes = 0;
                }
                Step::Destination(heard.destination)
            }
            From::Source if word && heard.destination >= READY => {
                heard.source += 1;
                Step::Source(heard.source)
            }
            From::Source => {
                heard.bytes += record.len();
                match heard.destination > READY {
                    true if heard.bytes >= PULLED => Step::Pull,
                    false if heard.bytes >= COPIED => Step::Copy,
                    _ => return false,
                }
            }
            From::Destination => return false,
        };
        step == self.step && !self.once.swap(true, Ordering::AcqRel)
    }
}

/// The next record, whole; none at the end.
fn record(from: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let mut record = vec![0; HEADER];
    match from.read_exact(&mut record) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let length = usize::from(u16::from_be_bytes([record[3], record[4]]));
    record.resize(HEADER + length, 0);
    from.read_exact(&mut record[HEADER..])?;
    Ok(Some(record))
}

/// Passes records on, until the end or the cut.
fn pass(held: &Held, side: From, from: &mut TcpStream, to: &mut TcpStream) -> io::Result<()> {
    while let Some(record) = record(from)? {
        if held.at(side, &record) {
            println!("HELD");
            let mut word = String::new();
            io::stdin().lock().read_line(&mut word)?;
            if word.trim() == "cut" {
                return Ok(());
            }
        }
        to.write_all(&record)?;
    }
    Ok(())
}

fn connection(link: &Link, mut source: TcpStream, to: u16) -> io::Result<()> {
    let mut destination = TcpStream::connect(("127.0.0.1", to))?;
    for end in [&source, &destination] {
        end.set_nodelay(true)?;
    }
    let held = match link {
        Link::Held(held) => held,
        Link::Slow(slow) => {
            slow.connection(&source, &destination);
            return Ok(());
        }
    };
    let (mut from_source, mut to_destination) = (source.try_clone()?, destination.try_clone()?);
    std::thread::scope(|s| {
        s.spawn(move || {
            let done = pass(held, From::Source, &mut from_source, &mut to_destination);
            let _ = (done, from_source.shutdown(Shutdown::Both));
            let _ = to_destination.shutdown(Shutdown::Both);
        });
        let done = pass(held, From::Destination, &mut destination, &mut source);
        let _ = (done, source.shutdown(Shutdown::Both));
        let _ = destination.shutdown(Shutdown::Both);
    });
    Ok(())
}

fn step(name: &str) -> Option<Step> {
    Some(match name {
        "copy" => Step::Copy,
        "pull" => Step::Pull,
        "ready" => Step::Destination(READY),
        "go" => Step::Source(1),
        "runs" => Step::Destination(READY + 1),
        "known" => Step::Source(2),
        _ => return None,
    })
}

/// The ports, and what is done between them.
fn arguments(words: &[String]) -> Option<(u16, u16, Link)> {
    let (port, to, link) = match words {
        [_, port, to, slow, delay, rate] if slow == "slow" => {
            let slow = Slow {
                delay: Duration::from_millis(delay.parse().ok()?),
                rate: rate.parse().ok()?,
            };
            (port, to, Link::Slow(slow))
        }
        [_, port, to, name] => {
            let held = Held {
                step: step(name)?,
                heard: Mutex::default(),
                once: AtomicBool::new(false),
            };
            (port, to, Link::Held(held))
        }
        _ => return None,
    };
    Some((port.parse().ok()?, to.parse().ok()?, link))
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().collect();
    let Some((port, to, link)) = arguments(&words) else {
        eprintln!(
            "usage: held-link PORT TO (copy|pull|ready|go|runs|known | slow MILLISECONDS BYTES)"
        );
        return ExitCode::from(2);
    };
    let listener = match TcpListener::bind(("127.0.0.1", port)) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("held-link: port {port}: {error}");
            return ExitCode::FAILURE;
        }
    };
    std::thread::scope(|s| {
        for source in listener.incoming().flatten() {
            let link = &link;
            s.spawn(move || {
                if let Err(error) = connection(link, source, to) {
                    eprintln!("held-link: {error}");
                }
            });
        }
    });
    ExitCode::SUCCESS
}
