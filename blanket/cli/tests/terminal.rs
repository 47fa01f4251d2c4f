//! `blanket console` on a terminal: raw while attached, given back afterwards.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};

struct Terminal {
    master: File,
    slave: OwnedFd,
}

impl Terminal {
    fn new() -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pty");
        grantpt(&master).expect("granted");
        unlockpt(&master).expect("unlocked");
        let name = ptsname(&master, Vec::new()).expect("a name");
        let slave = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty());
        Self {
            master: master.into(),
            slave: slave.expect("the other side"),
        }
    }

    fn echoes(&self) -> bool {
        tcgetattr(&self.slave)
            .expect("a terminal")
            .local_modes
            .contains(LocalModes::ECHO)
    }

    fn type_in(&mut self, text: &[u8]) {
        self.master.write_all(text).expect("typed");
    }

    /// Reads output until it ends with `text`.
    fn expect(&mut self, text: &str) {
        let mut seen = Vec::new();
        let mut byte = [0];
        while !seen.ends_with(text.as_bytes()) {
            self.master.read_exact(&mut byte).expect("more output");
            seen.push(byte[0]);
        }
    }
}

/// A control socket that answers as a VM's does, and the client's stream behind it.
fn attach(directory: &Path, terminal: &Terminal) -> (Child, UnixStream) {
    let runtime: PathBuf = directory.join("run");
    std::fs::DirBuilder::new().create(&runtime).expect("made");
    let owner_only = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(&runtime, owner_only).expect("own");
    let listener = UnixListener::bind(runtime.join("vm.sock")).expect("bound");
    let side = || {
        Stdio::from(
            terminal
                .slave
                .as_fd()
                .try_clone_to_owned()
                .expect("a clone"),
        )
    };
    // A session of its own, with the pty as its terminal: as a login gives it.
    let child = Command::new("setsid")
        .args([
            "--ctty",
            "--wait",
            env!("CARGO_BIN_EXE_blanket"),
            "console",
            "vm",
        ])
        .env("BLANKET_RUNTIME_DIR", &runtime)
        .stdin(side())
        .stdout(side())
        .stderr(side())
        .spawn()
        .expect("setsid of util-linux");
    let (stream, _) = listener.accept().expect("it connects");
    let mut line = String::new();
    BufReader::new(&stream)
        .read_line(&mut line)
        .expect("a request");
    assert_eq!(line, "\"console\"\n");
    (&stream).write_all(b"\"done\"\n").expect("answered");
    (child, stream)
}

#[test]
fn a_terminal_is_raw_while_attached_and_as_before_afterwards() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut terminal = Terminal::new();
    assert!(terminal.echoes());
    let (mut child, mut vm) = attach(directory.path(), &terminal);
    terminal.expect("detaches]\r\n");
    assert!(!terminal.echoes());
    vm.write_all(b"login: ").expect("written");
    terminal.expect("login: ");
    // Ctrl-C is a byte for the guest, not a signal.
    terminal.type_in(b"root\x03");
    let mut seen = [0; 5];
    vm.read_exact(&mut seen).expect("typed");
    assert_eq!(&seen, b"root\x03");
    terminal.type_in(b"last\x1d");
    assert!(child.wait().expect("ended").success());
    assert!(terminal.echoes(), "given back");
    let mut rest = Vec::new();
    vm.read_to_end(&mut rest).expect("closed");
    assert_eq!(rest, b"last", "what was typed before Ctrl-] arrives");
}

#[test]
fn the_end_of_the_vm_gives_the_terminal_back() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut terminal = Terminal::new();
    let (mut child, vm) = attach(directory.path(), &terminal);
    terminal.expect("detaches]\r\n");
    drop(vm);
    assert!(child.wait().expect("ended").success());
    assert!(terminal.echoes());
}
