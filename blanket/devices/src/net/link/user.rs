//! The host's own connections, as any of its users has them: passt (<https://passt.top>)
//! runs beside the VM, answers its DHCP, and makes of its TCP and UDP streams sockets of
//! the host's. It needs no privilege, and nothing set up.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read};
use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, SendFlags, Shutdown, SocketFlags, SocketType, socketpair, sockopt,
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::stream::Stream;
use super::{Error, Health, Link, LinkState, SharedPort};
use crate::net::Mac;
use crate::net::headers::Sum;
use crate::net::offload::Offloads;
use crate::sync::lock;

/// How long passt has to answer when it starts.
const PATIENCE: Duration = Duration::from_secs(10);
/// Lines that are kept of what it says.
const KEPT_LINES: usize = 8;
/// Bytes that its socket holds where this process may ask for so much: more than a Linux
/// guest's largest window (`net.ipv4.tcp_rmem`).
const SOCKET: usize = 4 << 20;
/// The program.
const PROGRAM: &str = "passt";

/// What is forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host's that leads to one of the guest's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Of which kind.
    pub transport: Transport,
    /// Address of the host's; all of them with `None`.
    pub address: Option<IpAddr>,
    /// The host's port.
    pub host: u16,
    /// The guest's.
    pub guest: u16,
}

impl Forward {
    /// As passt takes it: an option and its value.
    fn arguments(&self) -> [String; 2] {
        let option = match self.transport {
            Transport::Tcp => "-t",
            Transport::Udp => "-u",
        };
        [option.to_owned(), self.to_string()]
    }
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(address) = self.address {
            write!(f, "{address}/")?;
        }
        write!(f, "{}:{}", self.host, self.guest)
    }
}

/// A text that is no forward.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no forward of a port; write it as [tcp:|udp:][ADDRESS/]HOST-PORT:GUEST-PORT, for \
     example 2222:22 or udp:127.0.0.1/5353:53"
)]
pub struct BadForward(String);

impl FromStr for Forward {
    type Err = BadForward;

    /// `[tcp:|udp:][ADDRESS/]HOST-PORT:GUEST-PORT`.
    fn from_str(text: &str) -> Result<Self, BadForward> {
        let bad = || BadForward(text.to_owned());
        let (transport, rest) = match text.split_once(':') {
            Some(("tcp", rest)) => (Transport::Tcp, rest),
            Some(("udp", rest)) => (Transport::Udp, rest),
            _ => (Transport::Tcp, text),
        };
        let (address, ports) = match rest.split_once('/') {
            Some((address, ports)) => (Some(address.parse().map_err(|_| bad())?), ports),
            None => (None, rest),
        };
        let port = |text: &str| text.parse().ok().filter(|port| *port != 0).ok_or_else(bad);
        let (host, guest) = ports.split_once(':').ok_or_else(bad)?;
        Ok(Self {
            transport,
            address,
            host: port(host)?,
            guest: port(guest)?,
        })
    }
}

/// How a VM is connected in user mode.
#[derive(Clone, Debug, Default)]
pub struct Config {
    /// Ports that lead to the guest.
    pub forwards: Vec<Forward>,
    /// The MTU that the guest is told by DHCP; passt's own, 65520, with `None`.
    pub mtu: Option<u16>,
}

/// A passt that runs. It ends when this is dropped, and when this process ends: its socket
/// is closed then.
pub struct User {
    config: Config,
    port: Arc<Mutex<Stream>>,
    /// For the last word to passt.
    socket: OwnedFd,
    /// Most bytes of a stream that are on their way to the guest.
    room: u32,
    health: Health,
    lines: Arc<Mutex<VecDeque<String>>>,
    stopping: Arc<AtomicBool>,
    /// `None` if it is not this process's child.
    process: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

/// A passt that was started for another process, which gets its descriptors. It is ended
/// when this is dropped, unless it was let go.
#[derive(Debug)]
pub struct Outside {
    child: Option<Child>,
    socket: OwnedFd,
    said: OwnedFd,
}

impl Outside {
    /// Starts passt for the device with address `mac`, as a leader of a session of its own,
    /// and waits until it has all that it needs of the host.
    ///
    /// # Errors
    /// It is not there, or says why it cannot.
    pub fn start(config: &Config, mac: Mac) -> Result<Self, Error> {
        let (ours, theirs) = sockets(SOCKET)?;
        let mut command = command(PROGRAM, config, &theirs);
        // SAFETY: between fork and exec there are two system calls, and nothing else.
        unsafe {
            command.pre_exec(move || {
                rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())?;
                rustix::process::setsid()?;
                Ok(())
            });
        }
        let child = command.spawn();
        // The child's end of the socket: with it open here, its death would not be seen.
        drop(command);
        let mut child = child.map_err(|error| not_started(&error))?;
        let outcome = answers(&ours, mac);
        match (outcome, child.stderr.take()) {
            (Ok(()), Some(said)) => Ok(Self {
                child: Some(child),
                socket: ours,
                said: said.into(),
            }),
            (outcome, said) => {
                let _ = child.kill();
                let _ = child.wait();
                let lines = said.map(BufReader::new).into_iter();
                let lines = lines.flat_map(|said| said.lines().map_while(Result::ok));
                Err(Error::Passt {
                    how: outcome.err().unwrap_or("says nothing").to_owned(),
                    output: lines
                        .filter(|line| is_news(line))
                        .take(KEPT_LINES)
                        .collect(),
                })
            }
        }
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// What [`User::adopt`] takes, in its order.
    #[must_use]
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.socket.as_fd(), self.said.as_fd()]
    }

    /// Leaves it to who has its descriptors: it ends with them.
    pub fn let_go(mut self) {
        self.child = None;
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl fmt::Debug for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("User")
            .field("config", &self.config)
            .field("health", &self.health)
            .finish_non_exhaustive()
    }
}

impl User {
    /// Starts passt for the device with address `mac`, and waits until it has all that it
    /// needs of the host.
    ///
    /// # Errors
    /// It is not there, or says why it cannot.
    pub fn start(config: Config, mac: Mac) -> Result<Self, Error> {
        Self::start_program(PROGRAM, SOCKET, config, mac)
    }

    /// The same with another program and another length of its socket, in bytes.
    fn start_program(
        program: &str,
        socket: usize,
        config: Config,
        mac: Mac,
    ) -> Result<Self, Error> {
        let mut user = Self::spawn(program, socket, config)?;
        if let Err(how) = answers(&user.socket, mac) {
            // Its thread has its last words when it has ended.
            user.end();
            let output = lock(&user.lines).iter().cloned().collect();
            let how = how.to_owned();
            return Err(Error::Passt { how, output });
        }
        Ok(user)
    }

    fn spawn(program: &str, length: usize, config: Config) -> Result<Self, Error> {
        let (ours, theirs) = sockets(length)?;
        let mut command = command(program, &config, &theirs);
        // SAFETY: between fork and exec there are two system calls, and nothing else.
        unsafe {
            command.pre_exec(move || {
                rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())?;
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                Ok(())
            });
        }

        let (started, wait) = channel();
        let watch = Watch::default();
        let watching = watch.clone();
        // The host ends the child with the thread that started it: one that stays.
        let thread = crate::thread::named("passt")
            .spawn(move || watching.run(command, &started))
            .map_err(host("a thread"))?;
        let spawned = wait
            .recv()
            .unwrap_or_else(|_| Err(io::Error::other("its thread ended")));
        let process = match spawned {
            Ok(process) => process,
            Err(error) => {
                let _ = thread.join();
                return Err(not_started(&error));
            }
        };
        Self::with(config, ours, watch, Some(process), thread)
    }

    /// Takes over a passt that somebody else has started: the socket that it is connected
    /// to, and the pipe that it says what it has to say to.
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn adopt(config: Config, socket: OwnedFd, said: OwnedFd) -> Result<Self, Error> {
        let watch = Watch::default();
        let watching = watch.clone();
        let thread = crate::thread::named("passt")
            .spawn(move || {
                watching.listen(File::from(said));
                watching.ended("passt ended");
            })
            .map_err(host("a thread"))?;
        Self::with(config, socket, watch, None, thread)
    }

    fn with(
        config: Config,
        ours: OwnedFd,
        watch: Watch,
        process: Option<OwnedFd>,
        thread: JoinHandle<()>,
    ) -> Result<Self, Error> {
        let socket = ours.try_clone().map_err(host("a socket"))?;
        let room = room(&ours).map_err(|error| host("a socket")(error.into()))?;
        let name = "user-mode network".to_owned();
        rustix::io::ioctl_fionbio(&ours, true).map_err(|error| host("a socket")(error.into()))?;
        let stream = Stream::new(ours, name, watch.health.clone());
        Ok(Self {
            config,
            port: Arc::new(Mutex::new(stream)),
            socket,
            room,
            health: watch.health,
            lines: watch.lines,
            stopping: watch.stopping,
            process,
            thread: Some(thread),
        })
    }

    /// passt's process, as a descriptor, if it is this process's child.
    #[must_use]
    pub fn process(&self) -> Option<&OwnedFd> {
        self.process.as_ref()
    }

    /// Ends passt, and waits until it has ended.
    fn end(&mut self) {
        self.stopping.store(true, Ordering::Release);
        self.health.down("it is not used any more");
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
        // One that is not ours ends by itself when its socket is closed.
        let Some(process) = &self.process else {
            return;
        };
        let _ = pidfd_send_signal(process, Signal::KILL);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that watches passt panicked");
        }
    }
}

impl Link for User {
    fn describe(&self) -> String {
        let forwards: Vec<String> = self
            .config
            .forwards
            .iter()
            .map(Forward::to_string)
            .collect();
        if forwards.is_empty() {
            "user".into()
        } else {
            format!("user, forwards {}", forwards.join(" "))
        }
    }

    fn max_queues(&self) -> u32 {
        1
    }

    /// It takes long packets as they are: to it they are long segments.
    fn takes(&self) -> Offloads {
        Offloads {
            csum4: false,
            csum6: false,
            tso4: true,
            tso6: true,
        }
    }

    fn room(&self) -> Option<u32> {
        Some(self.room)
    }

    fn open(&self, _queues: u32, _offloads: Offloads) -> io::Result<Vec<SharedPort>> {
        Ok(vec![Arc::clone(&self.port) as SharedPort])
    }

    fn state(&self) -> LinkState {
        self.health.state()
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.end();
    }
}

/// A pair of connected sockets, ours and passt's, whose queues hold `length` bytes if this
/// process may ask for so much.
fn sockets(length: usize) -> Result<(OwnedFd, OwnedFd), Error> {
    let pair = || {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        widen(&ours, length)?;
        widen(&theirs, length)?;
        Ok((ours, theirs))
    };
    pair().map_err(|error: rustix::io::Errno| host("a socket")(error.into()))
}

/// How passt is started; its socket is still to be left open for it.
fn command(program: &str, config: &Config, socket: &OwnedFd) -> Command {
    let mut command = Command::new(program);
    command
        .args(["-f", "-e", "--fd", &socket.as_raw_fd().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    for forward in &config.forwards {
        command.args(forward.arguments());
    }
    if let Some(mtu) = config.mtu {
        command.args(["-m", &mtu.to_string()]);
    }
    command
}

fn host(what: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Host {
        name: "user-mode networking".into(),
        what,
        source,
    }
}

fn not_started(error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound => Error::NoPasst,
        _ => Error::Passt {
            how: format!("cannot be started: {error}"),
            output: Vec::new(),
        },
    }
}

/// Waits until passt answers the device: it has then bound all ports, and knows the guest's
/// address. What it answers is read and no more, since somebody else may go on reading.
fn answers(socket: &OwnedFd, mac: Mac) -> Result<(), &'static str> {
    const ENDED: &str = "ended when it was started";
    let until = Instant::now() + PATIENCE;
    let mut probes = Vec::new();
    // One for each IP that the host may have.
    for probe in [arp_probe(mac), neighbour_probe(mac)] {
        // The length of a packet.
        let length = u32::try_from(probe.len()).unwrap_or(u32::MAX);
        probes.extend(length.to_be_bytes());
        probes.extend(probe);
    }
    // Some hundred bytes into an empty socket.
    match rustix::net::send(socket, &probes, SendFlags::NOSIGNAL) {
        Ok(sent) if sent == probes.len() => {}
        _ => return Err(ENDED),
    }
    let exactly = |into: &mut [u8]| {
        let mut filled = 0;
        while filled < into.len() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err("does not answer");
            }
            let mut fds = [PollFd::new(socket, PollFlags::IN)];
            let timeout = Timespec::try_from(left).ok();
            if !matches!(poll(&mut fds, timeout.as_ref()), Ok(1)) {
                continue;
            }
            match rustix::io::read(socket, &mut into[filled..]) {
                Ok(0) => return Err(ENDED),
                Ok(count) => filled += count,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(_) => return Err(ENDED),
            }
        }
        Ok(())
    };
    let mut length = [0; 4];
    exactly(&mut length)?;
    let length = u32::from_be_bytes(length) as usize;
    if length > 1 << 17 {
        return Err("does not speak as passt does");
    }
    exactly(&mut vec![0; length])
}

/// The thread that starts passt, logs what it says, and notes its end.
#[derive(Clone, Default)]
struct Watch {
    health: Health,
    lines: Arc<Mutex<VecDeque<String>>>,
    stopping: Arc<AtomicBool>,
}

impl Watch {
    fn run(&self, mut command: Command, started: &Sender<io::Result<OwnedFd>>) {
        let child = command.spawn();
        // The child's end of the socket: with it open here, its death would not be seen.
        drop(command);
        let mut child = match child {
            Ok(child) => child,
            Err(error) => {
                let _ = started.send(Err(error));
                return;
            }
        };
        let _ = started.send(pidfd(&child));
        if let Some(stderr) = child.stderr.take() {
            self.listen(stderr);
        }
        self.ended(&match child.wait() {
            Ok(status) => format!("passt ended: {status}"),
            Err(error) => format!("passt is lost: {error}"),
        });
    }

    /// Logs what it says, until it has ended.
    fn listen(&self, said: impl Read) {
        for line in BufReader::new(said).split(b'\n').map_while(Result::ok) {
            self.said(&String::from_utf8_lossy(&line));
        }
    }

    fn ended(&self, how: &str) {
        if !self.stopping.load(Ordering::Acquire) {
            tracing::error!("user-mode network: {how}: the VM is cut off from it");
            self.health.down(how);
        }
    }

    fn said(&self, line: &str) {
        let line = line.trim();
        if !is_news(line) {
            return;
        }
        tracing::info!("passt: {line}");
        let mut lines = lock(&self.lines);
        if lines.len() == KEPT_LINES {
            lines.pop_front();
        }
        lines.push_back(line.to_owned());
    }
}

/// What is said for each line where the host has no system log is none.
fn is_news(line: &str) -> bool {
    let line = line.trim();
    !(line.is_empty() || (line.starts_with("Failed to send ") && line.ends_with("syslog")))
}

/// Makes the queue of a socket long: passt drops what does not fit, and does not notice
/// before two seconds have passed. It widens sockets that it accepts, not one that it is
/// given.
fn widen(socket: &OwnedFd, length: usize) -> rustix::io::Result<()> {
    // The first needs a privilege; the second is cut off at net.core.wmem_max.
    sockopt::set_socket_send_buffer_size_force(socket, length)
        .or_else(|_| sockopt::set_socket_send_buffer_size(socket, length))
}

/// The room for one stream in the queue that leads to the other end: both were made by
/// [`sockets`], with the same length.
fn room(ours: &OwnedFd) -> rustix::io::Result<u32> {
    // The kernel says twice what was asked for, since it counts its bookkeeping (socket(7)).
    // Two streams fit, and that.
    let holds = sockopt::socket_send_buffer_size(ours)?;
    Ok(u32::try_from(holds / 8 * 3).unwrap_or(u32::MAX))
}

fn pidfd(child: &Child) -> io::Result<OwnedFd> {
    let pid = Pid::from_child(child);
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Asks who has an address of a documentation's network (RFC 826, RFC 5227): passt says
/// that it is itself.
pub(super) fn arp_probe(mac: Mac) -> Vec<u8> {
    let mut packet = Vec::with_capacity(42);
    packet.extend(Mac::BROADCAST.bytes());
    packet.extend(mac.bytes());
    packet.extend([0x08, 0x06, 0, 1, 0x08, 0x00, 6, 4, 0, 1]);
    packet.extend(mac.bytes());
    packet.extend([0; 4]);
    packet.extend([0; 6]);
    packet.extend([192, 0, 2, 1]);
    packet
}

/// The same of IPv6 (RFC 4861).
fn neighbour_probe(mac: Mac) -> Vec<u8> {
    let [a, b, c, d, e, f] = mac.bytes();
    // The link-local address made of the hardware's.
    let mut source = [0; 16];
    source[..2].copy_from_slice(&[0xfe, 0x80]);
    source[8..].copy_from_slice(&[a ^ 2, b, c, 0xff, 0xfe, d, e, f]);
    let mut target = [0; 16];
    target[..4].copy_from_slice(&[0x20, 0x01, 0x0d, 0xb8]);
    target[15] = 1;
    let mut group = [0; 16];
    group[..2].copy_from_slice(&[0xff, 0x02]);
    group[11..].copy_from_slice(&[1, 0xff, 0, 0, 1]);

    let mut solicitation = vec![135, 0, 0, 0, 0, 0, 0, 0];
    solicitation.extend(target);
    solicitation.extend([1, 1]);
    solicitation.extend(mac.bytes());
    let mut sum = Sum::default();
    sum.add(&source);
    sum.add(&group);
    sum.add(&[0, 0, 0, 32, 0, 0, 0, 58]);
    sum.add(&solicitation);
    solicitation[2..4].copy_from_slice(&sum.checksum().to_be_bytes());

    let mut packet = Vec::with_capacity(86);
    packet.extend([0x33, 0x33, 0xff, 0, 0, 1]);
    packet.extend(mac.bytes());
    packet.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 58, 255]);
    packet.extend(source);
    packet.extend(group);
    packet.extend(solicitation);
    packet
}

#[cfg(test)]
mod tests;
