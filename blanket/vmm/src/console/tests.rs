use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use super::*;

fn console() -> Arc<Console> {
    Console::new().expect("a descriptor")
}

fn start(console: &Arc<Console>, sink: &Sink) -> IoThread {
    IoThread::start(Arc::clone(console), sink, Box::new(|| {})).expect("opens")
}

#[test]
fn a_file_gets_everything() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("log");
    let console = console();
    let io = start(&console, &Sink::File(path.clone()));
    for _ in 0..100 {
        EarlyConsole::write(&*console, b"0123456789");
    }
    io.finish();
    assert_eq!(std::fs::read(path).expect("written").len(), 1000);
}

#[test]
fn clients_of_a_socket_get_the_history_then_the_rest() {
    let directory = tempfile::tempdir().expect("a directory");
    let path: PathBuf = directory.path().join("socket");
    // A socket that nobody listens at any more is replaced.
    drop(std::os::unix::net::UnixListener::bind(&path).expect("bound"));
    let console = console();
    let io = start(&console, &Sink::Socket(path.clone()));
    EarlyConsole::write(&*console, b"before ");
    let mut client = UnixStream::connect(&path).expect("listens");
    let mut first = [0; 7];
    client.read_exact(&mut first).expect("the history");
    assert_eq!(&first, b"before ");
    EarlyConsole::write(&*console, b"after");
    // One that is in use is not.
    let busy = IoThread::start(
        Arc::clone(&console),
        &Sink::Socket(path.clone()),
        Box::new(|| {}),
    );
    assert!(busy.is_err_and(|e| e.to_string().contains("socket")));
    io.finish();
    let mut rest = String::new();
    client.read_to_string(&mut rest).expect("to the end");
    assert_eq!(rest, "after");
    assert!(!path.exists());
}

#[test]
fn a_client_that_never_reads_is_let_go_and_holds_up_nobody() {
    let console = console();
    let io = start(&console, &Sink::None);
    let (mut reader, ours) = UnixStream::pair().expect("a pair");
    let (lazy, theirs) = UnixStream::pair().expect("a pair");
    console.attach(ours.into());
    console.attach(theirs.into());
    let chunk = [b'x'; 1000];
    let mut seen = [0; 1000];
    for _ in 0..2000 {
        EarlyConsole::write(&*console, &chunk);
        reader.read_exact(&mut seen).expect("served");
    }
    io.finish();
    drop(lazy);
}

#[test]
fn a_pty_does_not_echo() {
    let console = console();
    let io = start(&console, &Sink::Pty);
    let path = io.pty().expect("a path").to_owned();
    let mut terminal = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .expect("opens");
    EarlyConsole::write(&*console, b"login: ");
    let mut seen = [0; 7];
    terminal.read_exact(&mut seen).expect("output");
    assert_eq!(&seen, b"login: ");
    terminal.write_all(b"root").expect("typed");
    EarlyConsole::write(&*console, b"end");
    let mut seen = [0; 3];
    terminal.read_exact(&mut seen).expect("output");
    assert_eq!(&seen, b"end");
    // Without a VM the typing waits; it must be the typing and nothing echoed.
    let input: Vec<u8> = loop {
        let input: Vec<u8> = lock(&console.state).input.iter().copied().collect();
        if input.len() >= 4 {
            break input;
        }
        std::thread::yield_now();
    };
    assert_eq!(input, b"root");
    io.finish();
}

#[test]
fn a_missing_directory_is_named() {
    let path = PathBuf::from("/does/not/exist/log");
    let error = IoThread::start(console(), &Sink::File(path), Box::new(|| {})).expect_err("no");
    assert!(error.to_string().contains("/does/not/exist/log"));
}
