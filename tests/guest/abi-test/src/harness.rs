//! Runs each check in a child process with a time limit, so that a crash or a
//! hang costs one line and not the run.

use crate::sys::{self, Status};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// What a check found when nothing was wrong.
pub enum Note {
    /// The behaviour is as it must be on every kernel and machine.
    Pass,
    /// A figure or a behaviour that may differ between machines.
    Info(String),
}

/// The result of one check; the error says what was wrong.
pub type Verdict = Result<Note, String>;

/// Settings of a run that checks look at.
pub struct Ctx {
    /// Factor for iteration counts: 1.0 is the full size.
    pub scale: f64,
}

impl Ctx {
    /// `full` scaled down (or up) by the run's factor; at least 1.
    pub fn n(&self, full: u32) -> u32 {
        ((f64::from(full) * self.scale) as u32).max(1)
    }
}

/// One named check.
pub struct Check {
    /// The name printed on its line, unique in the program.
    pub name: &'static str,
    /// Time limit in seconds before `--timeout-scale`.
    pub seconds: u32,
    /// The check itself; runs in a child process of its own.
    pub run: fn(&Ctx) -> Verdict,
}

/// A check with the usual time limit.
pub const fn check(name: &'static str, run: fn(&Ctx) -> Verdict) -> Check {
    Check {
        name,
        seconds: 30,
        run,
    }
}

/// A check that does a lot of work and may take `seconds`.
pub const fn slow(name: &'static str, seconds: u32, run: fn(&Ctx) -> Verdict) -> Check {
    Check { name, seconds, run }
}

/// Fails with a message that shows both values unless they are equal.
pub fn equal<T: PartialEq + std::fmt::Debug>(what: &str, got: T, want: T) -> Result<(), String> {
    if got == want {
        Ok(())
    } else {
        Err(format!("{what}: got {got:?}, want {want:?}"))
    }
}

/// Fails with `why` unless `holds`.
pub fn require(holds: bool, why: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(why()) }
}

/// How many checks ended which way.
#[derive(Default)]
pub struct Tally {
    /// Checks that passed.
    pub passed: u32,
    /// Checks that failed, were killed, or did not end in time.
    pub failed: u32,
}

/// Options of a whole run.
pub struct Options {
    /// See [`Ctx::scale`].
    pub scale: f64,
    /// Factor for every time limit.
    pub timeout_scale: f64,
    /// Run only checks whose name starts with one of these; empty means all.
    pub only: Vec<String>,
    /// Leave out checks whose name starts with one of these.
    pub except: Vec<String>,
    /// Print each check's duration in milliseconds on a comment line.
    pub timing: bool,
}

/// Runs every selected check in order and prints one line for each.
pub fn run_all(groups: &[&[Check]], options: &Options) -> Tally {
    let mut tally = Tally::default();
    let starts = |list: &[String], name: &str| list.iter().any(|p| name.starts_with(p.as_str()));
    for check in groups.iter().flat_map(|group| group.iter()) {
        let wanted = options.only.is_empty() || starts(&options.only, check.name);
        if !wanted || starts(&options.except, check.name) {
            continue;
        }
        let begun = Instant::now();
        match run_one(check, options) {
            Ok(Note::Pass) => {
                tally.passed += 1;
                println!("PASS {}", check.name);
            }
            Ok(Note::Info(value)) => println!("INFO {}: {value}", check.name),
            Err(why) => {
                tally.failed += 1;
                println!("FAIL {}: {}", check.name, why.replace('\n', "; "));
            }
        }
        if options.timing {
            println!("# {} {} ms", check.name, begun.elapsed().as_millis());
        }
    }
    tally
}

fn run_one(check: &Check, options: &Options) -> Verdict {
    let limit = Duration::from_secs_f64(f64::from(check.seconds) * options.timeout_scale);
    let (mut reader, writer) = std::io::pipe().map_err(|e| format!("pipe: {e}"))?;
    let ctx = Ctx {
        scale: options.scale,
    };
    let child = sys::fork(|| {
        sys::become_check_process();
        let line = match (check.run)(&ctx) {
            Ok(Note::Pass) => "P".to_string(),
            Ok(Note::Info(value)) => format!("I{value}"),
            Err(why) => format!("F{why}"),
        };
        // A raw write: the check may have left threads behind that hold locks.
        sys::write_all(writer.as_raw_fd(), line.as_bytes());
        0
    })?;
    drop(writer);
    let mut text = Vec::new();
    let in_time = read_until_end(&mut reader, &mut text, Instant::now() + limit);
    if !in_time {
        child.kill_group();
    }
    let status = child.wait();
    // Grandchildren that a failed check left behind must not disturb the next.
    child.kill_group();
    if !in_time {
        return Err(format!("not done after {:.0} s", limit.as_secs_f64()));
    }
    let text = String::from_utf8_lossy(&text).into_owned();
    match (status, text.chars().next()) {
        (Status::Exit(0), Some('P')) => Ok(Note::Pass),
        (Status::Exit(0), Some('I')) => Ok(Note::Info(text[1..].to_string())),
        (Status::Exit(0), Some('F')) => Err(text[1..].to_string()),
        (status, _) => Err(format!("the check's process ended with {status}")),
    }
}

/// Reads to the end of the pipe; false when the deadline comes first.
fn read_until_end(reader: &mut std::io::PipeReader, text: &mut Vec<u8>, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || !sys::wait_readable(reader.as_raw_fd(), left) {
            return false;
        }
        let mut chunk = [0; 4096];
        match reader.read(&mut chunk) {
            Ok(0) => return true,
            Ok(n) => text.extend_from_slice(&chunk[..n]),
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return true,
        }
    }
}
