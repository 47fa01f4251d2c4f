//! `bench --moves N`: what it costs to move a VM, beside QEMU's own live migration of the same
//! guest with the same work.

use std::fs;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::initramfs::{self, Files, Initramfs};
use crate::kernels::{self, Flavour, Kernel};
use crate::measured::{self, CPU};
use crate::monitor::Monitor;
use crate::project::Project;
use crate::qemu::{self, Machine};
use crate::scripts::{MOVE_COST, TICK};

/// What the page's section begins with.
pub const TITLE: &str = "\n## Moves\n";

/// RAM of the VM on both sides.
const MEMORY: &str = "128M";
/// Pieces of work that the guest has done before it moves, and between two moves.
const WORKED: usize = 5;
/// Longest time for anything of QEMU's.
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

/// Makes both, prints the section of the page, and writes it there.
pub fn run(project: &Project, moves: u32) -> Result<()> {
    ensure!(moves > 0, "at least one move is to be made");
    let kernel = kernels::fetch(project, Flavour::Cloud)?;
    let ours = ours(project, &kernel, moves)?;
    let theirs = (0..moves).map(|_| theirs(project, &kernel));
    let theirs = theirs.collect::<Result<_>>()?;
    let rows = [("Blanket, under the module", ours), ("QEMU", theirs)];
    let text = section(&rows, moves, &kernel.release);
    println!("{text}");
    crate::page::write_section(project, TITLE, &text)
}

fn ours(project: &Project, kernel: &Kernel, moves: u32) -> Result<Vec<Move>> {
    let script = format!("MOVES={moves}\n{MOVE_COST}");
    let timeout = PATIENCE * (1 + moves);
    let output = measured::in_instance(project, kernel, "1G", &script, timeout)?;
    let all: Vec<Move> = output
        .lines()
        .filter_map(|line| line.trim_end().strip_prefix("MOVE "))
        .map(blankets)
        .collect::<Result<_>>()?;
    ensure!(all.len() == moves as usize, "figures are missing");
    Ok(all)
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

/// What `query-migrate` says of one that is over (`qapi/migration.json`).
fn qemus(said: &Value) -> Result<Move> {
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

/// The guest as a machine of QEMU's own, which moves to another one over TCP.
fn theirs(project: &Project, kernel: &Kernel) -> Result<Move> {
    let initrd = initramfs::guest(project, Some(TICK), &Files::new())?;
    let machine = Machine {
        smp: 1,
        ..Machine::new(CPU, kernel.clone(), MEMORY)
    };
    let (here, there) = (qemu::run_dir(project)?, qemu::run_dir(project)?);
    let port = {
        // Free a moment later, and nobody else's on a machine that measures.
        let listener = TcpListener::bind("127.0.0.1:0").context("a port")?;
        listener.local_addr().context("a port")?.port()
    };
    let to = format!("tcp:127.0.0.1:{port}");
    let source = qemu::alone(project, &machine, &initrd, &here)?;
    let worked = |dir: &Path, count| {
        until(|| Ok(ticks(dir)? >= count))
            .with_context(|| format!("QEMU's guest does not work: see {}", dir.display()))
    };
    worked(&here, WORKED)?;
    let destination = waiting(project, &machine, &initrd, &there, &to)?;
    let mut monitor = Monitor::open(&here.join("qmp"))?;
    monitor.ask(&format!(
        r#"{{"execute":"migrate-set-parameters","arguments":{{"downtime-limit":{DOWNTIME}}}}}"#
    ))?;
    monitor.ask(&format!(
        r#"{{"execute":"migrate","arguments":{{"uri":"{to}"}}}}"#
    ))?;
    let mut cost = None;
    until(|| {
        let now = monitor.ask(r#"{"execute":"query-migrate"}"#)?;
        match now["status"].as_str() {
            Some("completed") => cost = Some(qemus(&now)?),
            Some("failed" | "cancelled") => bail!("QEMU's guest does not move: {now}"),
            _ => {}
        }
        Ok(cost.is_some())
    })?;
    worked(&there, 1)?;
    drop((source, destination));
    for dir in [here, there] {
        let _ = fs::remove_dir_all(dir);
    }
    cost.context("QEMU says nothing")
}

fn waiting(
    project: &Project,
    machine: &Machine,
    initrd: &Initramfs,
    dir: &Path,
    at: &str,
) -> Result<impl Drop> {
    let machine = Machine {
        extra: vec!["-incoming".into(), at.into()],
        ..machine.clone()
    };
    let running = qemu::alone(project, &machine, initrd, dir)?;
    until(|| {
        let Ok(mut monitor) = Monitor::open(&dir.join("qmp")) else {
            return Ok(false);
        };
        let status = monitor.ask(r#"{"execute":"query-status"}"#)?;
        Ok(status["status"] == "inmigrate")
    })?;
    Ok(running)
}

/// How often the guest has worked.
fn ticks(dir: &Path) -> Result<usize> {
    let console = match fs::read(dir.join("console.log")) {
        Ok(console) => console,
        // QEMU makes it when it begins.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error.into()),
    };
    let console = String::from_utf8_lossy(&console);
    ensure!(!console.contains("BAD"), "QEMU's guest computes wrong");
    Ok(console.matches("TICK ").count())
}

fn until(mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !holds()? {
        ensure!(begun.elapsed() < PATIENCE, "it takes too long");
        // QEMU has no event for what a guest writes.
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

fn section(rows: &[(&str, Vec<Move>)], moves: u32, release: &str) -> String {
    let mut text = format!(
        "{TITLE}\n\
         Made by `cargo xtask bench --moves {moves}`, which writes this section: a guest with the stock kernel {release}, \
         one vCPU and {MEMORY}, which computes sums without end, moves {moves} times while it runs. As a VM of Blanket from \
         one process to another on one emulated instance with two CPUs, compressed and by TLS; as a machine of QEMU's own \
         emulator from one process to another on this host, as QEMU does it if nothing else is said but the same \
         {DOWNTIME} ms. Both over the loopback of where they run. Emulated, and not the same: Blanket's source, destination and guest \
         share the instance's two emulated CPUs, QEMU's copying is native. Like with like, QEMU inside the instance, cannot be had here: with the \
         instance's KVM a stock kernel does not come up in it (it stops where interrupts begin, or PCI does; with the APIC in the \
         kernel or split), and without, its guest takes minutes for what others do in seconds.\n\n\
         | what moves | rounds | MiB sent | took, s | stood still, ms |\n|---|---:|---:|---:|---:|\n"
    );
    for (what, all) in rows {
        let list = |each: &dyn Fn(&Move) -> String| {
            let each: Vec<String> = all.iter().map(each).collect();
            each.join(", ")
        };
        text.push_str(&format!(
            "| {what} | {} | {} | {} | {} |\n",
            list(&|it| it.rounds.to_string()),
            list(&|it| it.bytes.div_ceil(1 << 20).to_string()),
            list(&|it| format!("{:.1}", Duration::from_millis(it.took_ms).as_secs_f64())),
            list(&|it| it.downtime_ms.to_string()),
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
        let rows = [("QEMU", vec![wanted, wanted])];
        let text = section(&rows, 2, "6.1");
        assert!(text.starts_with(TITLE) && text.contains("--moves 2"));
        assert!(
            text.contains("| QEMU | 3, 3 | 5, 5 | 1.5, 1.5 | 40, 40 |"),
            "{text}"
        );
    }
}
