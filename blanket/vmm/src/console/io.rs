//! The thread between the console's queues and the outside.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use super::behind::Behind;
use super::{Console, INPUT_MAX, OUTPUT_MAX, RawMode};
use crate::sync::lock;

/// Output that waits for one client. A client that is further behind is let go.
const CLIENT_MAX: usize = 256 << 10;
/// Ctrl-]: ends the session of a terminal.
const ESCAPE: u8 = 0x1d;
/// Bytes read from a terminal or client at once.
const READ: usize = 512;

/// Where a console goes, beside the clients that attach to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sink {
    /// Standard input and output.
    Stdio,
    /// A new pseudo-terminal.
    Pty,
    /// A file, output only; what it held is overwritten.
    File(PathBuf),
    /// A Unix socket that any number of clients may connect to.
    Socket(PathBuf),
    /// Nowhere; the history is kept all the same.
    None,
}

/// A console's place that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {what} for the console: {source}")]
pub struct SinkError {
    what: String,
    source: io::Error,
}

/// The running thread.
#[derive(Debug)]
pub struct IoThread {
    console: Arc<Console>,
    thread: Option<JoinHandle<()>>,
    pty: Option<PathBuf>,
    socket: Option<PathBuf>,
}

struct Outside {
    console: Arc<Console>,
    place: Outlet,
    clients: Vec<Client>,
    quit: Box<dyn Fn() + Send>,
}

/// A [`Sink`] that is open. Its paths are not needed any more, but to remove its socket.
#[derive(Debug, Default)]
pub struct Outlet {
    stdin: Option<io::Stdin>,
    /// Before `raw`: all is written before the terminal is given back.
    stdout: Option<Behind>,
    /// Also the sign that Ctrl-] is ours.
    raw: Option<RawMode>,
    file: Option<File>,
    /// The two sides of a pty; the slave, so that it never looks hung up to us.
    master: Option<OwnedFd>,
    _slave: Option<OwnedFd>,
    listener: Option<UnixListener>,
    pty: Option<PathBuf>,
    socket: Option<PathBuf>,
}

/// Somebody who reads and types: a socket, or the master side of a pty.
struct Client {
    fd: OwnedFd,
    output: VecDeque<u8>,
    /// A pty has no end; if nobody reads it, its newest output is kept instead.
    pty: bool,
}

impl Outlet {
    /// Opens a sink.
    ///
    /// # Errors
    /// What cannot be opened.
    pub fn open(sink: &Sink) -> Result<Self, SinkError> {
        let mut this = Self::default();
        let failed = |what: String| move |source: io::Error| SinkError { what, source };
        match sink {
            Sink::None => {}
            Sink::Stdio => {
                this.raw = RawMode::enable().map_err(failed("the terminal".into()))?;
                this.stdin = Some(io::stdin());
                let out = Behind::new(io::stdout()).map_err(failed("standard output".into()))?;
                this.stdout = Some(out);
            }
            Sink::File(path) => {
                let file = OpenOptions::new()
                    .create(true)
                    .write(true)
                    .truncate(true)
                    .open(path);
                this.file = Some(file.map_err(failed(path.display().to_string()))?);
            }
            Sink::Socket(path) => {
                let listener = listen(path).map_err(failed(path.display().to_string()))?;
                this.listener = Some(listener);
                this.socket = Some(path.clone());
            }
            Sink::Pty => {
                let (master, slave, path) =
                    open_pty().map_err(failed("a pseudo-terminal".into()))?;
                this.master = Some(master);
                this._slave = Some(slave);
                this.pty = Some(path);
            }
        }
        Ok(this)
    }
}

impl IoThread {
    /// Opens the sink and starts the thread. `quit` is called when the user leaves
    /// the terminal with Ctrl-].
    ///
    /// # Errors
    /// What cannot be opened.
    pub fn start(
        console: Arc<Console>,
        sink: &Sink,
        quit: Box<dyn Fn() + Send>,
    ) -> Result<Self, SinkError> {
        Self::start_at(console, Outlet::open(sink)?, quit)
    }

    /// As [`IoThread::start`], for a sink that is open.
    ///
    /// # Errors
    /// There is no thread.
    pub fn start_at(
        console: Arc<Console>,
        mut place: Outlet,
        quit: Box<dyn Fn() + Send>,
    ) -> Result<Self, SinkError> {
        let mut this = Self {
            console: Arc::clone(&console),
            thread: None,
            pty: place.pty.take(),
            socket: place.socket.take(),
        };
        let master = place.master.take().map(|fd| Client {
            fd,
            output: VecDeque::new(),
            pty: true,
        });
        let outside = Outside {
            console,
            place,
            clients: master.into_iter().collect(),
            quit,
        };
        let thread = crate::thread::named("console")
            .spawn(move || outside.run())
            .map_err(|source| SinkError {
                what: "a thread".into(),
                source,
            })?;
        this.thread = Some(thread);
        Ok(this)
    }

    /// The pseudo-terminal to connect to, for [`Sink::Pty`].
    #[must_use]
    pub fn pty(&self) -> Option<&Path> {
        self.pty.as_deref()
    }

    /// Writes everything that is left and ends the thread.
    pub fn finish(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        self.console.close();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the console thread panicked");
        }
        if let Some(path) = self.socket.take() {
            // Nothing is lost if somebody else removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Listens at a path; replaces a socket that nobody listens at any more.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => match UnixStream::connect(path) {
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path)?;
                UnixListener::bind(path)?
            }
            _ => return Err(error),
        },
        other => other?,
    };
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// A pty whose slave side does nothing to the bytes: its default, to echo, would
/// send the guest's output back to it as input.
fn open_pty() -> io::Result<(OwnedFd, OwnedFd, PathBuf)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let path = PathBuf::from(name.to_string_lossy().into_owned());
    let slave = rustix::fs::open(
        &path,
        OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    let mut raw = tcgetattr(&slave)?;
    raw.make_raw();
    tcsetattr(&slave, OptionalActions::Now, &raw)?;
    set_nonblocking(master.as_fd())?;
    Ok((master, slave, path))
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?;
    Ok(())
}

/// What a poll found.
#[derive(Default)]
struct Ready {
    stdin: bool,
    listener: bool,
    /// By client: may read, may write, is gone.
    clients: Vec<(bool, bool, bool)>,
}

impl Outside {
    fn run(mut self) {
        loop {
            let closed = self.exchange();
            if closed {
                self.last_words();
                return;
            }
            match self.wait() {
                Ok(ready) => self.serve(&ready),
                Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "the console cannot go on");
                    return;
                }
            }
        }
    }

    /// Passes the guest's output on, until there is none. Returns whether the
    /// console is closed.
    fn exchange(&mut self) -> bool {
        loop {
            let mut state = lock(&self.console.state);
            for fd in std::mem::take(&mut state.clients) {
                // What waits to go out is in the history already.
                let mut output = VecDeque::from(state.history.bytes());
                output.truncate(output.len().saturating_sub(state.output.len()));
                if set_nonblocking(fd.as_fd()).is_ok() {
                    self.clients.push(Client {
                        fd,
                        output,
                        pty: false,
                    });
                }
            }
            let output = std::mem::take(&mut state.output);
            let closed = state.closed;
            if output.is_empty() {
                return closed;
            }
            // There is room again: let the guest go on before we write.
            state.pump(OUTPUT_MAX, true);
            drop(state);
            let (a, b) = output.as_slices();
            for part in [a, b] {
                self.write_out(part);
            }
        }
    }

    fn write_out(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        if let Some(stdout) = &self.place.stdout {
            stdout.push(bytes);
        }
        if let Some(file) = &mut self.place.file
            && let Err(error) = file.write_all(bytes)
        {
            tracing::warn!(%error, "cannot write the console file any more");
            self.place.file = None;
        }
        for client in &mut self.clients {
            client.output.extend(bytes);
        }
        self.clients.retain_mut(Client::flush);
    }

    /// Waits for something to do. A client with output to take is polled for it.
    fn wait(&self) -> Result<Ready, Errno> {
        // Only what will be taken is read: the rest waits outside.
        let takes_input = lock(&self.console.state).input.len() + READ <= INPUT_MAX;
        let input = if takes_input {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        let mut fds = vec![PollFd::new(&self.console.wake, PollFlags::IN)];
        if let Some(stdin) = &self.place.stdin
            && takes_input
        {
            fds.push(PollFd::new(stdin, PollFlags::IN));
        }
        if let Some(listener) = &self.place.listener {
            fds.push(PollFd::new(listener, PollFlags::IN));
        }
        let first_client = fds.len();
        for client in &self.clients {
            let output = if client.output.is_empty() {
                PollFlags::empty()
            } else {
                PollFlags::OUT
            };
            fds.push(PollFd::new(&client.fd, input | output));
        }
        poll(&mut fds, None)?;

        let mut ready = Ready::default();
        let mut next = 1;
        if fds[0].revents().contains(PollFlags::IN) {
            // Resets the counter; it does not matter who wrote how often.
            let _ = rustix::io::read(&self.console.wake, &mut [0u8; 8]);
        }
        if self.place.stdin.is_some() && takes_input {
            ready.stdin = !fds[next].revents().is_empty();
            next += 1;
        }
        if self.place.listener.is_some() {
            ready.listener = !fds[next].revents().is_empty();
        }
        for fd in &fds[first_client..] {
            let events = fd.revents();
            ready.clients.push((
                events.contains(PollFlags::IN),
                events.contains(PollFlags::OUT),
                events.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL),
            ));
        }
        Ok(ready)
    }

    fn serve(&mut self, ready: &Ready) {
        if ready.stdin {
            self.read_stdin();
        }
        let mut kept = Vec::new();
        for (n, mut client) in std::mem::take(&mut self.clients).into_iter().enumerate() {
            let (read, write, gone) = ready.clients.get(n).copied().unwrap_or_default();
            let alive = (!read || self.read_client(&client))
                && (!write || client.flush())
                && (!gone || read || client.pty);
            if alive {
                kept.push(client);
            }
        }
        self.clients = kept;
        if ready.listener
            && let Some(listener) = &self.place.listener
            && let Ok((stream, _)) = listener.accept()
        {
            self.console.attach(stream.into());
        }
    }

    fn read_stdin(&mut self) {
        let Some(stdin) = &self.place.stdin else {
            return;
        };
        let mut bytes = [0; READ];
        match rustix::io::read(stdin, &mut bytes) {
            Ok(0) => self.place.stdin = None,
            Ok(count) => {
                let typed = &bytes[..count];
                match typed.iter().position(|&b| b == ESCAPE) {
                    Some(end) if self.place.raw.is_some() => {
                        self.console.type_in(&typed[..end]);
                        (self.quit)();
                    }
                    _ => {
                        self.console.type_in(typed);
                    }
                }
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            // For instance EIO of a background job: no input, that is all.
            Err(_) => self.place.stdin = None,
        }
    }

    /// Returns whether the client is still there.
    fn read_client(&self, client: &Client) -> bool {
        let mut bytes = [0; READ];
        match rustix::io::read(&client.fd, &mut bytes) {
            Ok(0) => client.pty,
            Ok(count) => {
                self.console.type_in(&bytes[..count]);
                true
            }
            Err(Errno::AGAIN | Errno::INTR) => true,
            Err(_) => client.pty,
        }
    }

    /// Lets clients take what they are owed, as long as they do.
    fn last_words(&mut self) {
        let patience = rustix::event::Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        };
        loop {
            self.clients
                .retain_mut(|client| client.flush() && !client.output.is_empty());
            self.clients.retain(|client| !client.pty);
            let mut fds: Vec<_> = self
                .clients
                .iter()
                .map(|c| PollFd::new(&c.fd, PollFlags::OUT))
                .collect();
            if fds.is_empty() || !matches!(poll(&mut fds, Some(&patience)), Ok(1..)) {
                return;
            }
        }
    }
}

impl Client {
    /// Writes what it takes. Returns whether it is still worth serving.
    fn flush(&mut self) -> bool {
        while !self.output.is_empty() {
            match rustix::io::write(&self.fd, self.output.as_slices().0) {
                Ok(count) => {
                    self.output.drain(..count);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => return self.pty,
            }
        }
        if self.output.len() <= CLIENT_MAX {
            return true;
        }
        if self.pty {
            let excess = self.output.len() - CLIENT_MAX;
            self.output.drain(..excess);
        }
        self.pty
    }
}
