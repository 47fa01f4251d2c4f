//! The control socket: one request as a line of JSON, one answer as another. After
//! a `console` request the socket is the console.

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use blanket_devices::block;
use blanket_vmm::balloon;
use blanket_vmm::instance::Instance;
use blanket_vmm::migration::Phase;
use blanket_vmm::trace::Record;
use serde::{Deserialize, Serialize};

use crate::audit::Report;
use crate::disk::{self, DiskInfo};
use crate::exit;
use crate::handing;
use crate::migrate::{self, Migrate, Migration};
use crate::net::{self, NetInfo};
use crate::registry::Registry;
use crate::saved;
use crate::setting::Confinement;
use crate::stats::Stats;

/// How long an ended VM's process stays for answers.
const SETTLE: Duration = Duration::from_secs(10);
/// Longest request.
const LINE_MAX: usize = 1 << 20;
/// Longest answer: a whole trace of as many vCPUs as there may be.
const ANSWER_MAX: u64 = 16 << 20;

/// What can be asked.
#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// What the VM is.
    Info,
    /// Its counters.
    Stats,
    /// Walk its page tables.
    Audit,
    /// Ask its guest to have so much memory.
    Balloon {
        /// Bytes.
        bytes: u64,
        /// Milliseconds to wait for it.
        timeout_ms: u64,
    },
    /// Write it to the file whose descriptor comes along.
    Save {
        /// End it then.
        end: bool,
        /// With what is in its disks.
        disks: bool,
    },
    /// Move it to the other end of the connection whose descriptor comes along.
    Migrate(Migrate),
    /// How far it has moved.
    Migration,
    /// Do not move it, if it is not too late.
    CancelMigration,
    /// It goes on here, by the user's word that it does not run where it was sent, or came from.
    KeepMigrating,
    /// Its disks.
    Disks,
    /// Give it another disk.
    AttachDisk {
        /// As for `--disk`.
        spec: String,
    },
    /// Take a disk away.
    DetachDisk {
        /// The guest's name for it.
        disk: String,
        /// Milliseconds that the guest has.
        timeout_ms: u64,
    },
    /// Make a disk larger.
    ResizeDisk {
        /// The guest's name for it.
        disk: String,
        /// Bytes.
        size: u64,
    },
    /// Its networks.
    Nets,
    /// Give it another network. The descriptors that its link is made of come along.
    AttachNet {
        /// As for `--net`.
        spec: String,
    },
    /// Take a network away.
    DetachNet {
        /// The guest's name for it.
        net: String,
        /// Milliseconds that the guest has.
        timeout_ms: u64,
    },
    /// Ask its guest to power off.
    Stop {
        /// Milliseconds that it has.
        timeout_ms: u64,
    },
    /// Ask its guest to reboot.
    Reboot {
        /// Milliseconds that it has to end.
        timeout_ms: u64,
    },
    /// End it.
    Kill,
    /// End it if it waits for a VM that was not given to it.
    Dismiss,
    /// Attach to its console.
    Console,
    /// Switch its trace on or off.
    Trace {
        /// On.
        on: bool,
    },
    /// The records of its trace.
    TraceRecords {
        /// Only those behind these numbers, by vCPU.
        after: Vec<u64>,
        /// Of which boot the numbers are.
        boots: u32,
    },
}

/// What is said of a VM that was saved.
#[derive(Debug, Serialize, Deserialize, PartialEq)]
pub struct Saved {
    /// Bytes of the file.
    pub bytes: u64,
    /// Pages of memory in it; the others are zero.
    pub pages: u64,
    /// Milliseconds for which the VM stood still.
    pub stood_ms: u64,
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Done.
    Done,
    /// What the VM is.
    Info(Box<Info>),
    /// Its counters.
    Stats(Box<Stats>),
    /// What its page tables map.
    Audit(Report),
    /// How far its guest came with its memory.
    Balloon(Memory),
    /// It was written.
    Saved(Saved),
    /// What its migration is at.
    Migration(Migration),
    /// Its disks.
    Disks(Vec<DiskInfo>),
    /// Its networks.
    Nets(Vec<NetInfo>),
    /// The guest's name for a device.
    Name(String),
    /// Its trace was switched.
    Trace {
        /// It was on before.
        was: bool,
    },
    /// Records of its trace, in the order of time.
    TraceRecords(Box<Trace>),
    /// Why not.
    Error(String),
    /// Not an answer: the VM's process was gone before it could give one.
    #[serde(skip)]
    Gone,
}

/// A part of a VM's trace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// Frequency of the time-stamps.
    pub tsc_khz: u64,
    /// Of which boot of the guest it is.
    pub boots: u32,
    /// The records, in the order of time.
    pub records: Vec<Record>,
}

/// A VM's memory, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// The most that it can have.
    pub most_bytes: u64,
    /// What its guest is asked to have.
    pub target_bytes: u64,
    /// What its guest has.
    pub current_bytes: u64,
}

impl From<balloon::Memory> for Memory {
    fn from(memory: balloon::Memory) -> Self {
        Self {
            most_bytes: memory.most,
            target_bytes: memory.target,
            current_bytes: memory.current,
        }
    }
}

/// What a VM is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Info {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub uuid: String,
    /// Changes with each start: two numbers of 64 bits, as in the guest's xenstore.
    #[serde(default)]
    pub generation_id: String,
    /// The process that runs it.
    pub pid: u32,
    /// What it runs on: `module` or `kvm`.
    pub host: String,
    /// vCPUs.
    pub vcpus: u32,
    /// Memory at the start, bytes.
    pub memory: u64,
    /// How much the guest can have, has, and is to have.
    #[serde(default)]
    pub balloon: Memory,
    /// What its process does with it: starting, waiting (for one of another host, at
    /// `incoming`), receiving, received, running, sending, standing, doubt or ended.
    #[serde(default)]
    pub phase: String,
    /// Where it may come from another host, if it is to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incoming: Option<SocketAddr>,
    /// Seconds since it was started.
    pub uptime_seconds: f64,
    /// How often it was booted.
    pub boots: u32,
    /// Which kernel it runs.
    pub kernel: String,
    /// Initrd file.
    pub initrd: Option<String>,
    /// Kernel command line.
    pub cmdline: String,
    /// Where its console goes.
    pub console: String,
    /// In which box its process is.
    #[serde(default)]
    pub confinement: Confinement,
}

/// What a VM's process knows of it.
pub struct About {
    /// Its name.
    pub name: String,
    /// Where its console goes.
    pub console: String,
    /// Where it may come from another host.
    pub incoming: Option<SocketAddr>,
    /// Its control socket.
    pub socket: PathBuf,
    /// In which box it is.
    pub confinement: Confinement,
}

impl About {
    fn phase(&self, instance: &Instance) -> String {
        match instance.phase() {
            Phase::Starting if self.incoming.is_some() && instance.awaits() => "waiting".into(),
            phase => phase.word().into(),
        }
    }
}

/// The requests that have no answer yet.
#[derive(Clone, Default)]
pub struct Unanswered(Arc<(Mutex<usize>, Condvar)>);

impl Unanswered {
    fn change(&self, by: impl FnOnce(usize) -> usize) {
        let mut count = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        *count = by(*count);
        self.0.1.notify_all();
    }

    /// Waits until there are none, for a while at most: whoever has had the VM ended by what
    /// it asked for is to hear what came of it, before this process is gone.
    pub fn settle(&self) {
        let count = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = self
            .0
            .1
            .wait_timeout_while(count, SETTLE, |count| *count > 0);
    }
}

/// One of them, until it is dropped.
struct Asked<'a>(&'a Unanswered);

impl<'a> Asked<'a> {
    fn new(all: &'a Unanswered) -> Self {
        all.change(|count| count + 1);
        Self(all)
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.0.change(|count| count.saturating_sub(1));
    }
}

/// Serves a VM's socket for as long as the process lives.
pub fn serve(listener: UnixListener, instance: Arc<Instance>, about: About) -> Result<Unanswered> {
    let about = Arc::new(about);
    let unanswered = Unanswered::default();
    let all = unanswered.clone();
    blanket_vmm::thread::named("control")
        .spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { continue };
                let (instance, about) = (Arc::clone(&instance), Arc::clone(&about));
                let all = all.clone();
                let client = blanket_vmm::thread::named("control-client").spawn(move || {
                    if let Err(error) = answer(stream, &instance, &about, &all) {
                        tracing::debug!("a control client: {error:#}");
                    }
                });
                if let Err(error) = client {
                    tracing::warn!(%error, "cannot serve a control client");
                }
            }
        })
        .context("cannot start the control thread")?;
    Ok(unanswered)
}

fn answer(
    stream: UnixStream,
    instance: &Arc<Instance>,
    about: &About,
    all: &Unanswered,
) -> Result<()> {
    let (line, handed) = handing::receive(&stream, LINE_MAX)?;
    if line.is_empty() {
        // Somebody who only looked whether we are here.
        return Ok(());
    }
    let asked = Asked::new(all);
    let request = serde_json::from_slice(&line);
    let answer = match &request {
        Ok(Request::Info) => {
            let spec = instance.spec();
            Answer::Info(Box::new(Info {
                name: about.name.clone(),
                uuid: instance.uuid(),
                generation_id: instance.generation().to_string(),
                pid: std::process::id(),
                host: instance.host().to_owned(),
                vcpus: spec.vcpus,
                memory: spec.memory,
                balloon: instance.memory().into(),
                phase: about.phase(instance),
                incoming: about.incoming,
                uptime_seconds: instance.uptime().as_secs_f64(),
                boots: instance.boots(),
                kernel: instance.booted(),
                initrd: spec.initrd.as_ref().map(|path| path.display().to_string()),
                cmdline: spec.cmdline.clone(),
                console: about.console.clone(),
                confinement: about.confinement.clone(),
            }))
        }
        Ok(Request::Stats) => match instance.stats() {
            Ok(Some(stats)) => Answer::Stats(Box::new(Stats {
                confinement: Some(about.confinement.clone()),
                ..Stats::from(stats)
            })),
            Ok(None) => Answer::Error("there are no counters yet".into()),
            Err(error) => Answer::Error(error.to_string()),
        },
        Ok(Request::Audit) => match instance.audit() {
            Ok(Some(found)) => Answer::Audit(found.into()),
            Ok(None) => Answer::Error("the VM does not run, or never stands still".into()),
            Err(error) => Answer::Error(error.to_string()),
        },
        Ok(Request::Balloon { bytes, timeout_ms }) => {
            match instance.balloon(*bytes, Duration::from_millis(*timeout_ms)) {
                Ok(memory) => Answer::Balloon(memory.into()),
                Err(error) => Answer::Error(error.to_string()),
            }
        }
        Ok(Request::Save { end, disks }) => saved::answer(instance, handed, *end, *disks),
        Ok(Request::Migrate(wanted)) => migrate::answer(instance, handed, wanted),
        Ok(Request::Migration) => migrate::progress(instance),
        Ok(Request::CancelMigration) => migrate::cancel(instance),
        Ok(Request::KeepMigrating) => migrate::keep(instance),
        Ok(Request::Disks) => Answer::Disks(disk::list(instance)),
        Ok(Request::AttachDisk { spec }) => match disk::attach(instance, spec) {
            Ok(name) => Answer::Name(name),
            Err(error) => Answer::Error(format!("{error:#}")),
        },
        Ok(Request::DetachDisk { disk, timeout_ms }) => {
            let timeout = Duration::from_millis(*timeout_ms);
            let done = disk::number(instance, disk)
                .and_then(|number| Ok(instance.detach(block::CLASS, number, timeout)?));
            answered(done)
        }
        Ok(Request::ResizeDisk { disk, size }) => {
            let done =
                disk::number(instance, disk).and_then(|number| Ok(instance.resize(number, *size)?));
            answered(done)
        }
        Ok(Request::Nets) => Answer::Nets(net::list(instance)),
        Ok(Request::AttachNet { spec }) => match net::attach(instance, spec, handed) {
            Ok(name) => Answer::Name(name),
            Err(error) => Answer::Error(format!("{error:#}")),
        },
        Ok(Request::DetachNet { net, timeout_ms }) => {
            let timeout = Duration::from_millis(*timeout_ms);
            let done = net::number(instance, net).and_then(|number| {
                Ok(instance.detach(blanket_devices::net::CLASS, number, timeout)?)
            });
            answered(done)
        }
        Ok(Request::Stop { timeout_ms }) => {
            match instance.stop(Duration::from_millis(*timeout_ms)) {
                Ok(()) => Answer::Done,
                Err(error) => Answer::Error(error.to_string()),
            }
        }
        Ok(Request::Reboot { timeout_ms }) => {
            match instance.reboot(Duration::from_millis(*timeout_ms)) {
                Ok(()) => Answer::Done,
                Err(error) => Answer::Error(error.to_string()),
            }
        }
        Ok(Request::Kill) => {
            instance.kill();
            Answer::Done
        }
        Ok(Request::Dismiss) => {
            if about.incoming.is_some() && instance.dismiss() {
                Answer::Done
            } else {
                Answer::Error("it runs, or is being started".into())
            }
        }
        Ok(Request::Trace { on }) => match instance.trace(*on) {
            Ok(was) => Answer::Trace { was },
            Err(error) => Answer::Error(error.to_string()),
        },
        Ok(Request::TraceRecords { after, boots }) => match instance.trace_records() {
            Ok((now, mut records)) => {
                if now == *boots {
                    records.retain(|r| after.get(r.vcpu as usize).is_none_or(|a| r.number > *a));
                }
                Answer::TraceRecords(Box::new(Trace {
                    tsc_khz: instance.tsc_khz(),
                    boots: now,
                    records,
                }))
            }
            Err(error) => Answer::Error(error.to_string()),
        },
        Ok(Request::Console) => Answer::Done,
        Err(error) => Answer::Error(format!("not a request: {error}")),
    };
    send(&stream, &answer)?;
    drop(asked);
    match request {
        Ok(Request::Console) => instance.console().attach(stream.into()),
        // It may be in the middle of what it receives, and nothing of that is to be kept.
        Ok(Request::Dismiss) if answer == Answer::Done => {
            let _ = std::fs::remove_file(&about.socket);
            std::process::exit(i32::from(exit::KILLED));
        }
        // Held until this process, and with it the VM's memory and name, is gone,
        // or the client does not wait for that.
        Ok(Request::Stop { .. } | Request::Kill | Request::Save { end: true, .. })
            if matches!(answer, Answer::Done | Answer::Saved(_)) =>
        {
            std::io::copy(&mut &stream, &mut std::io::sink())?;
        }
        _ => {}
    }
    Ok(())
}

/// Asks the VM of a name something.
pub fn ask_vm(name: &str, request: &Request) -> Result<Answer> {
    ask_vm_with(name, request, &[])
}

/// Asks the VM of a name something, and hands it descriptors.
pub fn ask_vm_with(name: &str, request: &Request, handed: &[BorrowedFd<'_>]) -> Result<Answer> {
    let stream = Registry::open()?.connect(name)?;
    match ask_with(&stream, request, handed).with_context(|| name.to_owned())? {
        Answer::Gone => bail!("{name} ended before it could answer"),
        answer => Ok(answer),
    }
}

fn answered(done: Result<()>) -> Answer {
    match done {
        Ok(()) => Answer::Done,
        Err(error) => Answer::Error(format!("{error:#}")),
    }
}

fn send(mut stream: &UnixStream, message: &impl Serialize) -> Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    Ok(())
}

/// Asks a VM something.
pub fn ask(stream: &UnixStream, request: &Request) -> Result<Answer> {
    ask_with(stream, request, &[])
}

/// What a VM answers that does not do what it is asked for.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(String);

/// Asks a VM something, and hands it descriptors. [`Refused`] is among the errors.
pub fn ask_with(
    stream: &UnixStream,
    request: &Request,
    handed: &[BorrowedFd<'_>],
) -> Result<Answer> {
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    handing::send(stream, &line, handed).context("the VM does not listen")?;
    let mut line = Vec::new();
    if !matches!(request, Request::Console) {
        return match BufReader::new(stream.take(ANSWER_MAX)).read_until(b'\n', &mut line) {
            Err(error) if error.kind() != ErrorKind::ConnectionReset => {
                Err(error).context("no answer")
            }
            _ if line.is_empty() => Ok(Answer::Gone),
            _ if line.ends_with(b"\n") => understood(&line),
            _ => Err(anyhow!("the VM ended while it answered")),
        };
    }
    // Byte by byte, because what follows a console's answer is not ours to buffer.
    let mut byte = [0];
    let mut reader = stream;
    while line.len() <= LINE_MAX {
        match reader.read(&mut byte) {
            Ok(1) => {}
            Ok(_) => break,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => break,
            Err(error) => return Err(error).context("no answer"),
        }
        if byte[0] == b'\n' {
            return understood(&line);
        }
        line.push(byte[0]);
    }
    if line.is_empty() {
        Ok(Answer::Gone)
    } else {
        Err(anyhow!("the VM ended while it answered"))
    }
}

fn understood(line: &[u8]) -> Result<Answer> {
    match serde_json::from_slice(line).context("an answer of another version")? {
        Answer::Error(text) => Err(Refused(text).into()),
        answer => Ok(answer),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use blanket_vmm::console::{Console, IoThread, Sink};
    use blanket_vmm::hypervisor::Exit;
    use blanket_vmm::instance::{OnReboot, Spec};
    use blanket_vmm::testing::{Fake, Guest, Program, Synthetic};
    use blanket_vmm::vm::End;

    use super::*;

    /// A served VM whose guest writes "hello", then waits until it is killed.
    fn vm(directory: &std::path::Path) -> (std::path::PathBuf, std::thread::JoinHandle<End>) {
        let kernel = directory.join("kernel");
        std::fs::write(&kernel, Synthetic::default().elf()).expect("written");
        let spec = Spec {
            name: "test".into(),
            kernel: Some(kernel),
            memory: 64 << 20,
            vcpus: 2,
            cmdline: "quiet".into(),
            on_reboot: OnReboot::Exit,
            ..Spec::default()
        };
        let fake = Fake::new(|_, id| {
            let mut first = id == 0;
            Box::new(move |guest: &Guest| {
                if std::mem::take(&mut first) {
                    return Ok(Exit::Console(b"hello".to_vec()));
                }
                while guest.wait().is_some() {}
                Ok(Exit::Interrupted)
            }) as Program
        });
        let console = Console::new().expect("a console");
        let io = IoThread::start(Arc::clone(&console), &Sink::None, Box::new(|| {}));
        let io = io.expect("a thread");
        let instance = Instance::new(spec, fake, console).expect("an instance");
        let socket = directory.join("test.sock");
        let listener = UnixListener::bind(&socket).expect("bound");
        serve(
            listener,
            Arc::clone(&instance),
            About {
                name: "test".into(),
                console: "none".into(),
                incoming: None,
                socket: socket.clone(),
                confinement: Confinement::default(),
            },
        )
        .expect("served");
        let vm = instance.boot().expect("boots");
        let thread = std::thread::spawn(move || {
            let end = instance.run(vm).expect("no reboot");
            io.finish();
            end
        });
        (socket, thread)
    }

    #[test]
    fn everything_that_can_be_asked() {
        let directory = tempfile::tempdir().expect("a directory");
        let (socket, thread) = vm(directory.path());
        let connect = || UnixStream::connect(&socket).expect("listens");

        let Ok(Answer::Info(info)) = ask(&connect(), &Request::Info) else {
            panic!("no info")
        };
        assert_eq!(
            (&*info.name, info.vcpus, info.memory),
            ("test", 2, 64 << 20)
        );
        assert_eq!((info.pid, info.boots), (std::process::id(), 1));
        assert_eq!((&*info.phase, info.incoming), ("running", None));
        // It waits for nobody.
        assert!(ask(&connect(), &Request::Dismiss).is_err());
        let halves: Vec<_> = info
            .generation_id
            .split(':')
            .map(str::parse::<u64>)
            .collect();
        assert!(matches!(halves[..], [Ok(_), Ok(_)]), "{halves:?}");

        let Ok(Answer::Stats(stats)) = ask(&connect(), &Request::Stats) else {
            panic!("none")
        };
        assert_eq!(stats.guest_ns, 5);

        // The VM runs on afterwards, and can be asked again.
        for _ in 0..2 {
            let Ok(Answer::Audit(report)) = ask(&connect(), &Request::Audit) else {
                panic!("no audit")
            };
            assert_eq!((report.roots, report.broken), (2, 0));
        }
        let records = |after: Vec<u64>, boots| {
            let request = Request::TraceRecords { after, boots };
            let Ok(Answer::TraceRecords(trace)) = ask(&connect(), &request) else {
                panic!("no trace")
            };
            assert_eq!(trace.boots, 1);
            trace.records.iter().map(|r| r.number).collect::<Vec<_>>()
        };
        assert_eq!(records(vec![], 0), [0; 0]);
        for was in [false, true] {
            let answer = ask(&connect(), &Request::Trace { on: true });
            assert_eq!(answer.expect("an answer"), Answer::Trace { was });
        }
        assert_eq!(records(vec![], 0), [1]);
        assert_eq!(records(vec![1], 1), [2]);
        assert_eq!(records(vec![9], 1), [0; 0]);
        // The numbers of another boot say nothing.
        assert_eq!(records(vec![9], 7), [1, 2, 3, 4]);

        let mut console = connect();
        assert!(matches!(ask(&console, &Request::Console), Ok(Answer::Done)));
        let mut seen = [0; 5];
        console.read_exact(&mut seen).expect("the history");
        assert_eq!(&seen, b"hello");

        let error = ask(&connect(), &Request::Stop { timeout_ms: 10 }).expect_err("it is deaf");
        assert!(error.to_string().contains("did not shut down"), "{error}");

        for nonsense in ["\n", "{}\n", "\"reboot\"\n", "\u{0}\n"] {
            let mut stream = connect();
            stream.write_all(nonsense.as_bytes()).expect("taken");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).expect("answered");
            assert!(answer.contains("not a request"), "{answer}");
        }
        // Somebody who leaves without a word disturbs nobody.
        drop(connect());

        assert!(matches!(ask(&connect(), &Request::Kill), Ok(Answer::Done)));
        assert!(matches!(thread.join(), Ok(End::Killed)));
        let mut rest = Vec::new();
        console.read_to_end(&mut rest).expect("closed");
        assert!(
            ask(&connect(), &Request::Stop { timeout_ms: 10 })
                .expect_err("gone")
                .to_string()
                .contains("ended already")
        );
    }
}
