//! Each test runs in a child, which is this program again: the box cannot be left.

use std::os::fd::AsRawFd as _;
use std::process::Command;

use super::*;

/// Set in a child: what it does.
const CHILD: &str = "BLANKET_SANDBOX_CHILD";

/// Runs a test's other half in a process of its own.
fn child(test: &str, directory: &Path) {
    let status = Command::new(std::env::current_exe().expect("this program"))
        .args([
            "--exact",
            &format!("tests::{test}"),
            "--test-threads=1",
            "--nocapture",
        ])
        .env(CHILD, directory)
        .output()
        .expect("a child");
    let text = String::from_utf8_lossy(&status.stdout);
    let errors = String::from_utf8_lossy(&status.stderr);
    assert!(
        status.status.success(),
        "{test}: {}\n{text}\n{errors}",
        status.status
    );
    assert!(text.contains("CHILD-DONE"), "{test} did nothing: {text}");
}

fn refused<T>(result: io::Result<T>, what: &str) {
    let error = result.err().unwrap_or_else(|| panic!("{what} is possible"));
    let expected = [libc::EPERM, libc::EACCES, libc::ENOSYS];
    let found = error.raw_os_error().unwrap_or_default();
    assert!(expected.contains(&found), "{what}: {error}");
}

#[test]
fn the_box_holds() {
    let Some(directory) = std::env::var_os(CHILD) else {
        let directory = tempfile::tempdir().expect("a directory");
        for name in ["read", "write", "secret"] {
            std::fs::write(directory.path().join(name), name).expect("written");
        }
        for name in ["manage", "sockets"] {
            std::fs::create_dir(directory.path().join(name)).expect("made");
        }
        std::fs::write(directory.path().join("sockets/file"), "x").expect("written");
        child("the_box_holds", directory.path());
        return;
    };
    let directory = PathBuf::from(directory);
    let at = |name: &str| directory.join(name);
    let open = std::fs::File::open(at("secret")).expect("before");
    // The harness has a second thread, which is not to be in the box: in a thread of its
    // own the file rules hold for that one, the filter for all.
    let policy = Policy {
        read: vec![at("read"), "/proc".into()],
        write: vec![at("write")],
        manage: vec![at("manage")],
        sockets: vec![at("sockets")],
        keep: CapabilitySet::empty(),
    };
    let report = enter(&policy).expect("the box");
    assert!(report.layers.contains(&"seccomp"), "{report:?}");
    let status = std::fs::read_to_string("/proc/thread-self/status").expect("allowed");
    for set in ["CapEff", "CapPrm", "CapInh"] {
        assert!(
            status.contains(&format!("{set}:\t0000000000000000")),
            "{status}"
        );
    }
    assert!(
        status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"),
        "{status}"
    );

    let landlock = report.layers.contains(&"landlock");
    assert_eq!(std::fs::read(at("read")).expect("allowed"), b"read");
    std::fs::write(at("write"), "x").expect("allowed");
    std::fs::write(at("manage/new"), "x").expect("allowed");
    std::fs::remove_file(at("manage/new")).expect("allowed");
    if landlock {
        refused(std::fs::read(at("secret")), "reading another file");
        refused(std::fs::write(at("read"), "x"), "writing what is only read");
        refused(std::fs::write(at("other"), "x"), "making a file elsewhere");
        refused(std::fs::read(at("sockets/file")), "reading beside sockets");
        refused(
            std::fs::write(at("sockets/new"), "x"),
            "making a file beside sockets",
        );
        refused(
            std::fs::remove_file(at("secret")),
            "removing a file elsewhere",
        );
        refused(std::fs::read("/etc/passwd"), "reading the system's files");
    } else {
        assert!(
            report.missing.iter().any(|what| what.contains("landlock")),
            "{report:?}"
        );
    }
    // What is open stays open.
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_at(&open, &mut byte, 0).expect("open");
    refused(Command::new("/bin/true").status(), "starting a program");
    refused(std::net::TcpListener::bind("127.0.0.1:0"), "a socket");
    refused(
        std::os::unix::net::UnixStream::connect("/x"),
        "a local socket",
    );
    // SAFETY: takes numbers; it is refused, as is what follows.
    let kill = unsafe { libc::kill(libc::getppid(), 0) };
    assert_eq!(kill, -1, "another process cannot be signalled");
    // SAFETY: as above; the address is not read.
    let ptrace = unsafe { libc::ptrace(libc::PTRACE_ATTACH, libc::getppid(), 0, 0) };
    assert_eq!(ptrace, -1);
    // SAFETY: as above.
    let mount = unsafe {
        libc::syscall(
            libc::SYS_mount,
            c"x".as_ptr(),
            c"/".as_ptr(),
            c"tmpfs".as_ptr(),
            0,
            0,
        )
    };
    assert_eq!(mount, -1);
    let fork = rustix_fork();
    assert_eq!(fork, -1, "no other process");
    // Threads are possible.
    let thread = std::thread::spawn(|| 7).join().expect("a thread");
    assert_eq!(thread, 7);
    assert!(open.as_raw_fd() >= 0);
    println!("CHILD-DONE");
}

fn rustix_fork() -> i64 {
    // SAFETY: no flags but the signal: a fork, which is refused.
    unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) }
}

#[test]
fn a_path_that_is_not_there_is_left_out() {
    let none = rule(Path::new("/no/such/path"), AccessFs::ReadFile.into());
    assert!(matches!(none, Ok(None)));
}
