//! `bench --moves N`: what it costs to move a VM, beside QEMU's own live migration of the same
//! guest with the same work.

mod peer;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::kernels::{self, Flavour};
use crate::measured;
use crate::project::Project;
use crate::scripts::MOVE_COST;

use peer::Peer;

/// What the page's section begins with.
pub const TITLE: &str = "\n## Moves\n";

/// RAM of the VM on both sides.
const MEMORY: &str = "128M";
/// Longest time for all in the instance, and for each move.
const PATIENCE: Duration = Duration::from_secs(300);
/// How long either may stand still, ms: what `blanket migrate` has by default.
const DOWNTIME: u64 = 300;

/// What one move cost.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Move {
    rounds: u64,
    bytes: u64,
    took_ms: u64,
    downtime_ms: u64,
}

/// How it went on one side.
struct Side {
    moves: Vec<Move>,
    /// Pieces of work that the guest does in a second where nobody moves it.
    pace: f64,
}

/// Makes both, prints the section of the page, and writes it there.
pub fn run(project: &Project, moves: u32) -> Result<()> {
    ensure!(moves > 0, "at least one move is to be made");
    let kernel = kernels::fetch(project, Flavour::Cloud)?;
    let peer = Peer::boot(project, &kernel, MEMORY)?;
    let qemu = peer::function(MEMORY)?;
    let script = format!("MOVES={moves} DOWNTIME={DOWNTIME}\n{qemu}{MOVE_COST}");
    let timeout = PATIENCE * (1 + moves);
    let output = measured::in_instance(project, &kernel, "3G", &script, &peer.files, timeout)?;
    let ours = side(&output, "blanket", "MOVE ", blankets)?;
    let mut theirs = side(&output, "qemu", "QEMU-MOVE ", |line| {
        let said: Value = serde_json::from_str(line).context("QEMU")?;
        qemus(&said["return"])
    })?;
    let moments = |mark| {
        marked(&output, mark)
            .map(moment)
            .collect::<Result<Vec<_>>>()
    };
    let (stopped, resumed) = (moments("QEMU-STOP ")?, moments("QEMU-RESUME ")?);
    let figures = [
        ours.moves.len(),
        theirs.moves.len(),
        stopped.len(),
        resumed.len(),
    ];
    ensure!(
        figures == [moves as usize; 4],
        "figures are missing: {figures:?}"
    );
    for (it, (stopped, resumed)) in theirs.moves.iter_mut().zip(stopped.iter().zip(resumed)) {
        let stood = resumed
            .checked_sub(*stopped)
            .context("it ran before it stopped")?;
        it.downtime_ms = stood / 1000;
    }
    let text = section(
        &[("Blanket", ours), ("QEMU", theirs)],
        moves,
        &kernel.release,
    );
    println!("{text}");
    crate::page::write_section(project, TITLE, &text)
}

/// What the script has said of a side.
fn side(output: &str, name: &str, mark: &str, read: impl Fn(&str) -> Result<Move>) -> Result<Side> {
    let paces = marked(output, "PACE ");
    let mut paces = paces.filter_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    Ok(Side {
        moves: marked(output, mark).map(read).collect::<Result<_>>()?,
        pace: paces.next().context("no pace")?,
    })
}

fn marked<'a>(output: &'a str, mark: &'a str) -> impl Iterator<Item = &'a str> {
    let lines = output.lines().map(str::trim_end);
    lines.filter_map(move |line| line.strip_prefix(mark))
}

/// When something happened that QEMU tells of, microseconds since 1970.
fn moment(event: &str) -> Result<u64> {
    let event: Value = serde_json::from_str(event).context("QEMU")?;
    let seconds = number(&event, "/timestamp/seconds")?;
    Ok(seconds * 1_000_000 + number(&event, "/timestamp/microseconds")?)
}

/// What `blanket migrate --json` says.
fn blankets(line: &str) -> Result<Move> {
    let said: Value = serde_json::from_str(line).context("blanket migrate")?;
    Ok(Move {
        rounds: number(&said, "/rounds")?,
        bytes: number(&said, "/bytes")?,
        took_ms: number(&said, "/took_ms")?,
        downtime_ms: number(&said, "/downtime_ms")?,
    })
}

/// What `query-migrate` says of one that is over (`qapi/migration.json`). Its downtime is that of the
/// source alone.
fn qemus(said: &Value) -> Result<Move> {
    ensure!(
        said["status"] == "completed",
        "QEMU's guest did not move: {said}"
    );
    Ok(Move {
        rounds: number(said, "/ram/dirty-sync-count")?,
        bytes: number(said, "/ram/transferred")?,
        took_ms: number(said, "/total-time")?,
        downtime_ms: number(said, "/downtime")?,
    })
}

fn number(said: &Value, name: &str) -> Result<u64> {
    let number = said.pointer(name).and_then(Value::as_u64);
    number.with_context(|| format!("there is no {name} in {said}"))
}

fn section(rows: &[(&str, Side)], moves: u32, release: &str) -> String {
    let mut text = format!(
        "{TITLE}\n\
         Made by `cargo xtask bench --moves {moves}`, which writes this section: a guest with the stock kernel {release}, \
         one vCPU and {MEMORY}, which computes sums without end, moves {moves} times while it runs, from one process to another in one \
         emulated instance with two CPUs, over its loopback. First as a VM of Blanket under the module, compressed and by TLS; then as a \
         machine of QEMU's, as QEMU does it if nothing else is said but the same {DOWNTIME} ms. QEMU has no KVM there, as on any instance \
         without virtualization, and translates: its guest works slower, and so writes less meanwhile (the last column is what either \
         does when it is not moved). It has booted outside, and goes on from a file. Either stood still from when its vCPUs \
         stopped at the source until they ran at the destination (QEMU: from its event STOP to its event RESUME). All of it emulated.\n\n\
         | what moves | rounds | MiB sent | took, s | stood still, ms | works each second |\n|---|---:|---:|---:|---:|---:|\n"
    );
    for (what, side) in rows {
        let list = |each: &dyn Fn(&Move) -> String| {
            let each: Vec<String> = side.moves.iter().map(each).collect();
            each.join(", ")
        };
        text.push_str(&format!(
            "| {what} | {} | {} | {} | {} | {:.2} |\n",
            list(&|it| it.rounds.to_string()),
            list(&|it| it.bytes.div_ceil(1 << 20).to_string()),
            list(&|it| format!("{:.1}", Duration::from_millis(it.took_ms).as_secs_f64())),
            list(&|it| it.downtime_ms.to_string()),
            side.pace,
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_say_what_it_cost() {
        let wanted = Move {
            rounds: 3,
            bytes: 5 << 20,
            took_ms: 1500,
            downtime_ms: 40,
        };
        let ours = r#"{"stage":"moved","rounds":3,"pages":9,"bytes":5242880,"dirty":1,"share":100,"took_ms":1500,"downtime_ms":40}"#;
        assert_eq!(blankets(ours).expect("figures"), wanted);
        assert!(blankets(r#"{"stage":"kept"}"#).is_err());
        let theirs = r#"{"status":"completed","total-time":1500,"downtime":40,"ram":{"transferred":5242880,"dirty-sync-count":3}}"#;
        let theirs = serde_json::from_str(theirs).expect("JSON");
        assert_eq!(qemus(&theirs).expect("figures"), wanted);
        assert!(qemus(&serde_json::json!({"status": "failed"})).is_err());
        let event = r#"{"timestamp":{"seconds":3,"microseconds":250},"event":"STOP"}"#;
        assert_eq!(moment(event).expect("a time"), 3_000_250);
        let moves = vec![wanted, wanted];
        let rows = [("QEMU", Side { moves, pace: 0.5 })];
        let text = section(&rows, 2, "6.1");
        assert!(text.starts_with(TITLE) && text.contains("--moves 2"));
        assert!(
            text.contains("| QEMU | 3, 3 | 5, 5 | 1.5, 1.5 | 40, 40 | 0.50 |"),
            "{text}"
        );
    }
}
