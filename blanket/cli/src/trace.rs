//! `blanket trace`.

use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use blanket_vmm::trace;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::control::{Answer, Request, Trace, ask};
use crate::exit::output;
use crate::registry::Registry;

/// How often a trace that is followed is fetched. The core tells nobody that it has
/// written: that would cost it what the trace must not cost.
const INTERVAL: Duration = Duration::from_millis(200);

/// What was shown already.
#[derive(Default)]
struct Seen {
    numbers: Vec<u64>,
    boots: u32,
    begin: Option<u64>,
    lost: u64,
}

impl Seen {
    /// Notes new records; counts those that the ring had lost before they were fetched.
    fn note(&mut self, trace: &Trace) {
        if trace.boots != self.boots {
            self.boots = trace.boots;
            self.numbers.clear();
        }
        for record in &trace.records {
            let vcpu = record.vcpu as usize;
            if self.numbers.len() <= vcpu {
                self.numbers.resize(vcpu + 1, 0);
            }
            if let Some(last) = self.numbers.get_mut(vcpu) {
                if *last != 0 {
                    self.lost += record.number.saturating_sub(*last + 1);
                }
                *last = (*last).max(record.number);
            }
            self.begin.get_or_insert(record.tsc);
        }
    }
}

/// Shows a VM's trace.
pub fn command(name: &str, follow: bool, off: bool, json: bool) -> Result<ExitCode> {
    let was = switch(name, !off)?;
    let mut seen = Seen::default();
    if follow {
        let result = until_signal(name, &mut seen, json);
        if !was {
            // The VM may be gone by now.
            let _ = switch(name, false);
        }
        if seen.lost > 0 {
            eprintln!(
                "blanket: {} records were overwritten before they were shown",
                seen.lost
            );
        }
        return result.map(|()| ExitCode::SUCCESS);
    }
    if !was && !off {
        eprintln!("blanket: the trace of {name} is on now; `blanket trace {name} --off` ends it");
    }
    if let Some(trace) = fetch(name, &seen)? {
        show(&trace, &mut seen, json)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn until_signal(name: &str, seen: &mut Seen, json: bool) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot watch signals")?;
    let (sender, ended) = std::sync::mpsc::channel();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if signals.forever().next().is_some() {
                // Nobody listens any more where the VM ended first.
                let _ = sender.send(());
            }
        })
        .context("cannot start the signal thread")?;
    loop {
        let stop = ended.recv_timeout(INTERVAL).is_ok();
        let Some(trace) = fetch(name, seen)? else {
            return Ok(());
        };
        show(&trace, seen, json)?;
        if stop {
            return Ok(());
        }
    }
}

/// Switches the trace. Whether it was on before.
fn switch(name: &str, on: bool) -> Result<bool> {
    let stream = Registry::open()?.connect(name)?;
    match ask(&stream, &Request::Trace { on }).with_context(|| name.to_owned())? {
        Answer::Trace { was } => Ok(was),
        _ => bail!("{name} answered something else than its trace"),
    }
}

/// What is new; `None` when the VM has ended.
fn fetch(name: &str, seen: &Seen) -> Result<Option<Trace>> {
    let Ok(stream) = Registry::open()?.connect(name) else {
        return Ok(None);
    };
    let request = Request::TraceRecords {
        after: seen.numbers.clone(),
        boots: seen.boots,
    };
    match ask(&stream, &request).with_context(|| name.to_owned())? {
        Answer::TraceRecords(trace) => Ok(Some(*trace)),
        Answer::Gone => Ok(None),
        _ => bail!("{name} answered something else than its trace"),
    }
}

fn show(trace: &Trace, seen: &mut Seen, json: bool) -> Result<()> {
    seen.note(trace);
    let text = if json {
        let lines = trace.records.iter().map(serde_json::to_string);
        let lines: Vec<String> = lines.collect::<Result<_, _>>()?;
        lines.into_iter().map(|line| line + "\n").collect()
    } else {
        trace::text(&trace.records, seen.begin.unwrap_or(0), trace.tsc_khz)
    };
    output(&text)?;
    std::io::stdout().flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use blanket_vmm::trace::Record;

    use super::*;

    fn record(vcpu: u32, number: u64) -> Record {
        Record {
            vcpu,
            number,
            tsc: 100 + number,
            kind: 1,
            what: 0,
            kernel: true,
            rip: 0,
            args: [0; 4],
        }
    }

    #[test]
    fn what_was_lost_is_counted() {
        let mut seen = Seen::default();
        let part = |boots, records: &[Record]| Trace {
            tsc_khz: 1,
            boots,
            records: records.to_vec(),
        };
        seen.note(&part(1, &[record(0, 50), record(2, 7), record(0, 51)]));
        assert_eq!((seen.numbers.as_slice(), seen.lost), (&[51, 0, 7][..], 0));
        seen.note(&part(1, &[record(0, 60), record(2, 8), record(1, 1000)]));
        assert_eq!(
            (seen.numbers.as_slice(), seen.lost),
            (&[60, 1000, 8][..], 8)
        );
        assert_eq!(seen.begin, Some(150));
        // After a reboot the numbers begin again.
        seen.note(&part(2, &[record(0, 3)]));
        assert_eq!((seen.numbers.as_slice(), seen.lost), (&[3][..], 8));
    }
}
