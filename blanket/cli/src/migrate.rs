//! `blanket migrate`, and what a VM's process does for it.

use std::fs;
use std::io::{ErrorKind, IsTerminal as _, Write as _};
use std::net::{TcpListener, TcpStream, ToSocketAddrs as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use blanket_vmm::instance::Instance;
use blanket_vmm::migration::{
    self, Incoming, Link, Message, Options, Outgoing, Pull, Stage, Token, UserFaults, Wishes,
};
use serde::{Deserialize, Serialize};

use crate::args::{MigrateArgs, PostCopy, Run};
use crate::control::{Answer, Request, ask_vm, ask_vm_with};
use crate::exit::{self, hint, show};
use crate::registry::Registry;

/// How often it is looked how far it is.
const LOOK: Duration = Duration::from_millis(250);
/// How often a lost destination is tried.
const RETRY: Duration = Duration::from_secs(1);
/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(10);

/// How a VM is to be moved.
#[derive(Debug, Serialize, Deserialize, PartialEq)]
pub struct Migrate {
    /// The destination's token.
    token: String,
    /// The destination is asked what became of the VM.
    again: bool,
    /// It is only asked whether it can have it.
    dry_run: bool,
    /// How long it may stand still, milliseconds.
    max_downtime_ms: u64,
    /// Rounds at most.
    rounds: u32,
    /// Bytes for each second.
    bandwidth: Option<u64>,
    /// Connections that it is sent over beside the first one, over which it is asked for.
    lanes: u8,
    /// Whether a part of its memory may follow it.
    post_copy: PostCopy,
}

impl PostCopy {
    fn wish(self) -> migration::PostCopy {
        match self {
            Self::Never => migration::PostCopy::Never,
            Self::Auto => migration::PostCopy::Auto,
            Self::Now => migration::PostCopy::Now,
        }
    }
}

/// What a migration is at.
#[derive(Clone, Debug, Default, Serialize, Deserialize, PartialEq)]
pub struct Migration {
    /// `copying`, `standing`, `doubt`, `pulling`, `cut`, `moved` or `kept`; `fits` if it was only
    /// tried. At the destination `pulling`, `cut`, `lost` or `here`.
    pub stage: String,
    /// Rounds that are over.
    pub rounds: u32,
    /// Pages that were sent.
    pub pages: u64,
    /// Pages that need not be sent: the destination has them in what a disk stands on.
    pub found: u64,
    /// Bytes that were sent.
    pub bytes: u64,
    /// Pages that the last round left.
    pub dirty: u64,
    /// The part of its time that the guest has, percent.
    pub share: u32,
    /// Milliseconds from the first byte to the last word; of a VM that has moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub took_ms: Option<u64>,
    /// Milliseconds for which it ran nowhere; of a VM that has moved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<u64>,
    /// Milliseconds for which its memory followed it, where it did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pull_ms: Option<u64>,
    /// Pages that are missing at the destination.
    pub left: u64,
    /// Touches of pages that were missing there.
    pub faults: u64,
}

impl Migration {
    fn of(out: &Outgoing) -> Self {
        let now = out.progress();
        let stage = match now.stage {
            Stage::Copying => "copying",
            Stage::Standing => "standing",
            Stage::Doubt => "doubt",
            Stage::Pulling => "pulling",
            Stage::Cut => "cut",
            Stage::Over if out.moved().is_some() => "moved",
            Stage::Over => "kept",
        };
        Self {
            stage: stage.into(),
            rounds: now.rounds,
            pages: now.pages,
            found: now.found,
            bytes: now.bytes,
            dirty: now.dirty,
            share: now.share,
            took_ms: out.moved().map(|moved| ms(moved.took)),
            downtime_ms: out.moved().map(|moved| ms(moved.downtime)),
            pull_ms: out.moved().and_then(|moved| moved.pull).map(ms),
            left: now.left,
            faults: now.wanted,
        }
    }

    /// At the destination.
    fn arrived(pull: &Pull) -> Self {
        let stage = match pull {
            Pull { lost: true, .. } => "lost",
            Pull { left: 0, .. } => "here",
            Pull { linked: true, .. } => "pulling",
            _ => "cut",
        };
        Self {
            stage: stage.into(),
            pages: pull.pages,
            left: pull.left,
            faults: pull.faults,
            pull_ms: pull.took.map(ms),
            share: 100,
            ..Self::default()
        }
    }
}

fn ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

// ---- the VM's process, at the source ----

/// Moves the VM, or asks where it is.
pub fn answer(instance: &Arc<Instance>, handed: Vec<OwnedFd>, wanted: &Migrate) -> Answer {
    match moved(instance, handed, wanted) {
        Ok(migration) => Answer::Migration(migration),
        Err(error) => Answer::Error(format!("{error:#}")),
    }
}

fn moved(instance: &Arc<Instance>, handed: Vec<OwnedFd>, wanted: &Migrate) -> Result<Migration> {
    let mut sockets = handed.into_iter().map(TcpStream::from);
    let socket = sockets.next();
    let socket = socket.context("there is no connection to the destination")?;
    let token: Token = wanted.token.parse()?;
    let link = || Link::to(socket, &token);
    if wanted.again {
        let out = instance.outgoing().context("no VM was sent from here")?;
        if !out.is_to(&token) {
            bail!(
                "it was sent to another destination: ask that one, with its token, or say with \
                 --keep that it does not run there"
            );
        }
        match out.progress().stage {
            Stage::Doubt | Stage::Cut => out.ask(link()?),
            // The destination waits for a VM that is not given.
            Stage::Over if out.moved().is_none() => out.tell_kept(link()?)?,
            _ => {}
        }
        return out
            .outcome()
            .map(|()| Migration::of(&out))
            .map_err(|why| anyhow!(why));
    }
    if wanted.dry_run {
        instance.try_at(link()?, &token, wanted.post_copy.wish())?;
        return Ok(Migration {
            stage: "fits".into(),
            ..Migration::default()
        });
    }
    let options = Options {
        wishes: Wishes {
            downtime: Duration::from_millis(wanted.max_downtime_ms),
            rounds: wanted.rounds,
            post_copy: wanted.post_copy.wish(),
        },
        bandwidth: wanted.bandwidth,
        lanes: wanted.lanes,
    };
    let out = Arc::new(Outgoing::new(options, &token)?);
    instance.begin_migration(Arc::clone(&out))?;
    let (instance, sent) = (Arc::clone(instance), Arc::clone(&out));
    let link = link().inspect_err(|_| out.give_up())?;
    // In a thread of its own: who asks may go away, and come back.
    let thread = blanket_vmm::thread::named("migration").spawn(move || {
        let more = sockets.map(|socket| Link::to(socket, &token));
        if let Err(error) = instance.send_to(link, more, &sent) {
            tracing::warn!(%error, "the VM has not moved");
        }
    });
    thread
        .inspect_err(|_| out.give_up())
        .context("cannot start a thread")?;
    out.wait();
    out.outcome()
        .map(|()| Migration::of(&out))
        .map_err(|why| anyhow!(why))
}

/// How far it is.
pub fn progress(instance: &Instance) -> Answer {
    match instance.outgoing() {
        Some(out) => Answer::Migration(Migration::of(&out)),
        None => match instance.pull() {
            Some(pull) => Answer::Migration(Migration::arrived(&pull)),
            None => Answer::Error("no VM is sent from here, nor is one followed here".into()),
        },
    }
}

/// It is to stay.
pub fn cancel(instance: &Instance) -> Answer {
    match instance.outgoing() {
        Some(out) if matches!(out.progress().stage, Stage::Copying | Stage::Standing) => {
            out.cancel();
            out.wait();
            Answer::Migration(Migration::of(&out))
        }
        _ => Answer::Error("it is not being moved".into()),
    }
}

/// It goes on here, by the user's word.
pub fn keep(instance: &Instance) -> Answer {
    match instance.outgoing() {
        Some(out) if out.claim() => {
            out.wait();
            Answer::Migration(Migration::of(&out))
        }
        _ if instance.claim_incoming() => Answer::Migration(Migration {
            stage: "kept".into(),
            ..Migration::default()
        }),
        _ => Answer::Error("there is no doubt where it is".into()),
    }
}

// ---- the command ----

/// `blanket migrate`.
pub fn command(args: &MigrateArgs) -> Result<ExitCode> {
    let name = &args.name;
    if args.cancel || args.keep || args.status {
        let request = match (args.cancel, args.keep) {
            (true, _) => Request::CancelMigration,
            (_, true) => Request::KeepMigrating,
            _ => Request::Migration,
        };
        return match ask_vm(name, &request)? {
            Answer::Migration(now) if args.status => {
                show(&now, args.json, |now| format!("{}\n", sentence(now)))?;
                Ok(ExitCode::SUCCESS)
            }
            Answer::Migration(migration) => done(args, &migration),
            other => bail!("{name} answers {other:?}"),
        };
    }
    if args.follow {
        return follow(args);
    }
    let token = token(args)?;
    // One that is not there now has not ended meanwhile.
    drop(Registry::open()?.connect(name)?);
    let wanted = |again| Migrate {
        token: token.to_string(),
        again,
        dry_run: args.dry_run,
        max_downtime_ms: args.max_downtime,
        rounds: args.rounds,
        bandwidth: args.bandwidth,
        // One that is only asked, or asked again, sends nothing.
        lanes: match args.streams {
            2.. if !again && !args.dry_run => args.streams,
            _ => 0,
        },
        post_copy: args.post_copy,
    };
    if args.dry_run {
        return done(args, &asked(args, &wanted(false), false)?);
    }
    let is_at = |stage: &str| {
        matches!(
            ask_vm(name, &Request::Migration),
            Ok(Answer::Migration(it)) if it.stage == stage
        )
    };
    // A VM whose whereabouts are in doubt is not sent again, but asked for.
    let again = is_at("doubt") || is_at("cut");
    let mut answer = asked(args, &wanted(again), !again).map_err(|error| {
        // The destination may have all of it, and wait to be given it. If it cannot be told,
        // it waits on, and runs nothing.
        if is_at("kept") {
            let _ = asked(args, &wanted(true), false);
        }
        ended(args, &token, error)
    })?;
    let since = Instant::now();
    if answer.stage == "doubt" {
        eprintln!("blanket: the link is lost; {name} stands still until its destination answers");
    }
    if answer.stage == "cut" {
        eprintln!(
            "blanket: the link is lost; {name} runs on there as far as it has its memory, of which \
             {} MiB are here",
            answer.left >> 8
        );
    }
    while ["doubt", "cut"].contains(&answer.stage.as_str()) && since.elapsed() < args.patience {
        // Nothing tells when a network is whole again.
        std::thread::sleep(RETRY);
        match asked(args, &wanted(true), false) {
            Ok(now) => answer = now,
            // It was reached, and does not have the VM: that is why it runs here.
            Err(error) if is_at("kept") => return Err(error),
            Err(error) if is_gone(name) => return Err(ended(args, &token, error)),
            Err(error) => tracing::info!("{error:#}"),
        }
    }
    done(args, &answer)
}

/// Whether a VM's process is not there: nothing less is a proof of it, for what is said then
/// ends the VM at its destination.
fn is_gone(name: &str) -> bool {
    let Ok(registry) = Registry::open() else {
        return false;
    };
    let gone = UnixStream::connect(registry.socket(name)).err();
    gone.is_some_and(|error| {
        matches!(
            error.kind(),
            ErrorKind::ConnectionRefused | ErrorKind::NotFound
        )
    })
}

/// A migration ended with `error`, perhaps with its process: then what the destination did not have
/// of its memory is lost, and nobody but this process has seen it.
fn ended(args: &MigrateArgs, token: &Token, error: anyhow::Error) -> anyhow::Error {
    if !is_gone(&args.name) {
        return error;
    }
    let to = args.to.as_deref().unwrap_or_default();
    let told = connect(to).and_then(|socket| {
        let mut link = Link::to(socket, token)?;
        Ok(migration::mourn(&mut link, token)?)
    });
    let next = match told {
        Ok(Message::Gone) => format!("{to} had not been given it: it is gone"),
        Ok(Message::Lost) => format!(
            "it ran at {to} and a part of its memory was here, which is lost: it does nothing more \
             there, and `blanket kill` ends it"
        ),
        Ok(Message::Ready) => format!(
            "{to} has all of it, and waits: `blanket migrate NAME --keep` there lets it run"
        ),
        Ok(_) => format!("it runs at {to}"),
        Err(error) => format!(
            "{to} could not be asked ({error:#}): `blanket migrate NAME --status` there says what is \
             left of it"
        ),
    };
    let text = format!(
        "the process of {} has ended while it was being moved",
        args.name
    );
    hint(&error.context(text), next)
}

/// Connects, has the VM move, and shows how far it is meanwhile.
fn asked(args: &MigrateArgs, wanted: &Migrate, show_it: bool) -> Result<Migration> {
    let name = &args.name;
    let to = args.to.as_deref().unwrap_or_default();
    let sockets = (0..=wanted.lanes).map(|_| connect(to));
    let sockets = sockets.collect::<Result<Vec<_>>>()?;
    let cancelled = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&cancelled))?;
    }
    let (said, hears) = mpsc::channel();
    std::thread::scope(|s| {
        s.spawn(|| {
            let request = Request::Migrate(Migrate {
                token: wanted.token.clone(),
                ..*wanted
            });
            // Nobody hears it only if this thread's scope has ended.
            let handed: Vec<_> = sockets.iter().map(|socket| socket.as_fd()).collect();
            let _ = said.send(ask_vm_with(name, &request, &handed));
        });
        let mut shown = Shown::new(args, show_it);
        loop {
            match hears.recv_timeout(LOOK) {
                Ok(answer) => {
                    shown.end();
                    return match answer? {
                        Answer::Migration(migration) => Ok(migration),
                        other => bail!("{name} answers {other:?}"),
                    };
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("{name} does not answer"),
            }
            if cancelled.swap(false, Ordering::AcqRel) {
                // Its own answer tells what came of it.
                let _ = ask_vm(name, &Request::CancelMigration);
            } else if shown.wanted()
                && let Ok(Answer::Migration(now)) = ask_vm(name, &Request::Migration)
            {
                shown.say(now)?;
            }
        }
    })
}

/// Shows a migration that somebody else has begun, until it is over.
fn follow(args: &MigrateArgs) -> Result<ExitCode> {
    let name = &args.name;
    let mut shown = Shown::new(args, true);
    loop {
        let Answer::Migration(now) = ask_vm(name, &Request::Migration)? else {
            bail!("{name} answers something else than how far it is");
        };
        // Of one that is in doubt somebody has to ask.
        if !matches!(now.stage.as_str(), "copying" | "standing" | "pulling") {
            shown.end();
            return done(args, &now);
        }
        shown.say(now)?;
        std::thread::sleep(LOOK);
    }
}

/// What its user sees of it on the way.
struct Shown {
    terminal: bool,
    lines: bool,
    last: Migration,
}

impl Shown {
    fn new(args: &MigrateArgs, show_it: bool) -> Self {
        let plain = !args.quiet && !args.json && !args.lines;
        Self {
            terminal: show_it && plain && std::io::stderr().is_terminal(),
            lines: show_it && args.lines,
            last: Migration::default(),
        }
    }

    fn wanted(&self) -> bool {
        self.terminal || self.lines
    }

    fn say(&mut self, now: Migration) -> Result<()> {
        if self.terminal {
            eprint!("\r\x1b[K{}", sentence(&now));
            let _ = std::io::stderr().flush();
        }
        if self.lines && now != self.last {
            line(&now)?;
        }
        self.last = now;
        Ok(())
    }

    fn end(&self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }
}

/// One line of JSON.
fn line(now: &Migration) -> Result<()> {
    exit::output(&format!("{}\n", serde_json::to_string(now)?))
}

fn sentence(now: &Migration) -> String {
    if now.stage == "pulling" {
        return format!(
            "pulling: {} MiB left, {} pages waited for",
            now.left >> 8,
            now.faults
        );
    }
    let slow = match now.share {
        0 | 100.. => String::new(),
        share => format!(", the guest has {share} % of its time"),
    };
    let found = match now.found {
        0 => String::new(),
        found => format!(", {} MiB found there", found >> 8),
    };
    format!(
        "{}: round {}, {} MiB sent{found}, {} MiB left{slow}",
        now.stage,
        now.rounds + 1,
        now.bytes >> 20,
        now.dirty >> 8,
    )
}

/// Says what came of it.
fn done(args: &MigrateArgs, migration: &Migration) -> Result<ExitCode> {
    let name = &args.name;
    let to = args.to.as_deref().unwrap_or("its destination");
    if args.lines {
        line(migration)?;
    }
    let show = |text: &dyn Fn(&Migration) -> String| {
        if args.lines {
            return Ok(());
        }
        show(migration, args.json, text)
    };
    match migration.stage.as_str() {
        "moved" => {
            show(&|it| {
                let followed = it.pull_ms.map_or_else(String::new, |took| {
                    format!(
                        ", and the rest of its memory followed within {took} ms, {} pages before \
                         they came by themselves",
                        it.faults
                    )
                });
                let found = match it.found {
                    0 => String::new(),
                    found => format!(" and {found} found there"),
                };
                format!(
                    "{name} runs at {to}; {} pages{found} in {} rounds, {} MiB in {:.1} s; it stood still for {} ms{followed}\n",
                    it.pages,
                    it.rounds,
                    it.bytes.div_ceil(1 << 20),
                    Duration::from_millis(it.took_ms.unwrap_or(0)).as_secs_f64(),
                    it.downtime_ms.unwrap_or(0),
                )
            })?;
            Ok(ExitCode::SUCCESS)
        }
        "fits" => {
            show(&|_| format!("{name} can move to {to}\n"))?;
            Ok(ExitCode::SUCCESS)
        }
        "kept" => {
            show(&|_| format!("{name} runs here\n"))?;
            Ok(ExitCode::SUCCESS)
        }
        "cut" => {
            if args.json {
                show(&|_| String::new())?;
            }
            eprintln!(
                "blanket: {name} runs at {to}, but {} MiB of its memory are still here: it waits \
                 there where it needs them\n  \
                 call `blanket migrate {name}` again when {to} can be reached, with the same token; \
                 do not end {name} here, or it is lost there",
                migration.left >> 8
            );
            Ok(ExitCode::from(exit::DOUBT))
        }
        _ => {
            if args.json {
                show(&|_| String::new())?;
            }
            eprintln!(
                "blanket: {name} stands still, and may run at {to}: the link broke when it changed hands\n  \
                 call `blanket migrate {name}` again when {to} can be reached, with the same token; \
                 if you know that it does not run there and never will, `blanket migrate {name} --keep`"
            );
            Ok(ExitCode::from(exit::DOUBT))
        }
    }
}

fn token(args: &MigrateArgs) -> Result<Token> {
    let text = match (&args.token, &args.token_file) {
        (Some(token), _) => token.clone(),
        (None, Some(file)) => {
            fs::read_to_string(file).with_context(|| file.display().to_string())?
        }
        (None, None) => {
            let error = anyhow!("the destination's token is missing");
            return Err(hint(
                &error,
                "give what `blanket run --incoming` printed there with --token",
            ));
        }
    };
    Ok(text.parse()?)
}

fn connect(to: &str) -> Result<TcpStream> {
    let failed = |error: anyhow::Error| {
        hint(
            &error.context(to.to_owned()),
            "give the address and port at which `blanket run --incoming` waits",
        )
    };
    let addresses = to.to_socket_addrs().map_err(|error| failed(error.into()))?;
    let mut last = anyhow!("there is no such address");
    for address in addresses {
        match TcpStream::connect_timeout(&address, CONNECT) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error.into(),
        }
    }
    Err(failed(last))
}

// ---- the VM's process, at the destination ----

/// Where the VM is to come from, and how its user says so to the source.
pub fn incoming(run: &Run) -> Result<Option<Incoming>> {
    let Some(address) = run.incoming else {
        return Ok(None);
    };
    let listener = TcpListener::bind(address).with_context(|| address.to_string())?;
    // While this process may.
    let incoming = Incoming::new(listener, UserFaults::open())?;
    let address = incoming.address().context("its address")?;
    let token = incoming.token();
    match &run.token_file {
        Some(path) => {
            let file = fs::File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(path);
            let written = file.and_then(|mut file| writeln!(file, "{token}").map(|()| file));
            let file = written.with_context(|| path.display().to_string())?;
            // Whoever finds it empty, and no process, knows that the VM may have run here.
            incoming.when_given(move || file.set_len(0));
            eprintln!("blanket: waits for a VM at {address}");
        }
        None => eprintln!(
            "blanket: waits for a VM at {address}; on the host that has it:\n  \
             blanket migrate NAME --to {address} --token {token}"
        ),
    }
    Ok(Some(incoming))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_found_is_said_where_something_was() {
        let mut now = Migration {
            stage: "copying".into(),
            rounds: 1,
            bytes: 5 << 20,
            dirty: 512,
            share: 100,
            ..Migration::default()
        };
        assert_eq!(sentence(&now), "copying: round 2, 5 MiB sent, 2 MiB left");
        now.found = 1024;
        assert_eq!(
            sentence(&now),
            "copying: round 2, 5 MiB sent, 4 MiB found there, 2 MiB left"
        );
        let text = serde_json::to_string(&now).expect("plain data");
        assert!(text.contains(r#""found":1024"#), "{text}");
    }
}
