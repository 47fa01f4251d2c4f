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
        keep_for_files: CapabilitySet::empty(),
        user: None,
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

/// The two users of the tests that need two.
const USERS: [User; 2] = [
    User {
        uid: user::FIRST + 70,
        gid: user::FIRST + 70,
    },
    User {
        uid: user::FIRST + 71,
        gid: user::FIRST + 71,
    },
];

#[test]
fn it_becomes_its_user_and_keeps_what_is_open() {
    if !rustix::process::geteuid().is_root() {
        // Whoever is not root stays who it is.
        let error = USERS[0].enter().expect_err("not root");
        assert_eq!(error, rustix::io::Errno::PERM);
        return;
    }
    let Some(directory) = std::env::var_os(CHILD) else {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(directory.path().join("later")).expect("made");
        std::fs::write(directory.path().join("later/disk"), "disk").expect("written");
        std::fs::write(directory.path().join("log"), "").expect("written");
        child(
            "it_becomes_its_user_and_keeps_what_is_open",
            directory.path(),
        );
        return;
    };
    // A directory that its user cannot even enter.
    let directory = PathBuf::from(directory);
    let mut log = std::fs::File::options()
        .write(true)
        .open(directory.join("log"))
        .expect("root's");
    let policy = Policy {
        read: vec!["/proc".into()],
        write: vec![directory.join("later")],
        manage: Vec::new(),
        sockets: Vec::new(),
        keep: CapabilitySet::SYS_RESOURCE,
        keep_for_files: CapabilitySet::DAC_OVERRIDE,
        user: Some(USERS[0]),
    };
    let report = enter(&policy).expect("the box");
    assert!(report.layers.contains(&"user"), "{report:?}");
    let status = std::fs::read_to_string("/proc/thread-self/status").expect("allowed");
    let uid = USERS[0].uid;
    let four = format!("\t{uid}\t{uid}\t{uid}\t{uid}\n");
    for what in [format!("Uid:{four}"), format!("Gid:{four}")] {
        assert!(status.contains(&what), "{status}");
    }
    let groups = status.lines().find(|line| line.starts_with("Groups:"));
    assert_eq!(groups.map(str::trim_end), Some("Groups:"), "{status}");
    std::io::Write::write_all(&mut log, b"still").expect("open");
    let keeps = if report.layers.contains(&"landlock") {
        let disk = std::fs::read(directory.join("later/disk")).expect("a directory of the policy");
        assert_eq!(disk, b"disk");
        CapabilitySet::SYS_RESOURCE | CapabilitySet::DAC_OVERRIDE
    } else {
        CapabilitySet::SYS_RESOURCE
    };
    refused(std::fs::read(directory.join("log")), "another file there");
    let sets: Vec<u64> = ["CapEff:", "CapPrm:", "CapBnd:"]
        .iter()
        .filter_map(|set| status.lines().find_map(|line| line.strip_prefix(*set)))
        .map(|set| u64::from_str_radix(set.trim(), 16).expect("a number"))
        .collect();
    assert_eq!(sets.len(), 3, "{status}");
    // A container may have given less.
    assert!(sets.iter().all(|set| set & !keeps.bits() == 0), "{status}");
    println!("CHILD-DONE");
}

#[test]
fn one_user_cannot_touch_the_process_of_another() {
    use std::os::unix::process::CommandExt as _;
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let Some(_) = std::env::var_os(CHILD) else {
        child(
            "one_user_cannot_touch_the_process_of_another",
            Path::new("/"),
        );
        return;
    };
    // It ends with this process, when its input does.
    let mut other = Command::new("cat")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .uid(USERS[1].uid)
        .gid(USERS[1].gid)
        .spawn()
        .expect("a process");
    let pid = i32::try_from(other.id()).expect("small");
    // By their users alone: without a filter of calls.
    let user = std::thread::spawn(move || {
        drop_capabilities(CapabilitySet::empty(), Some(USERS[0])).expect("root's right");
        // SAFETY: takes numbers.
        let kill = unsafe { libc::kill(pid, libc::SIGKILL) };
        refused(
            match kill {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            },
            "a signal",
        );
        // SAFETY: attaches to a process, and reads nothing.
        let ptrace = unsafe { libc::ptrace(libc::PTRACE_ATTACH, pid, 0, 0) };
        refused(
            match ptrace {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            },
            "ptrace",
        );
        for file in ["mem", "maps", "environ"] {
            refused(std::fs::read(format!("/proc/{pid}/{file}")), file);
        }
        refused(std::fs::read_dir(format!("/proc/{pid}/fd")), "descriptors");
    });
    let outcome = user.join();
    let ended = other.try_wait().expect("a child");
    assert!(ended.is_none(), "it lives: {ended:?}");
    outcome.expect("nothing was possible");
    println!("CHILD-DONE");
}
