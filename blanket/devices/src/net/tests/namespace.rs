//! Network namespaces for tests of links.

use std::process::Command;

/// Runs `work` in a thread with a network of its own, which the threads and programs that
/// it starts share.
pub fn with_own_network(work: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        // SAFETY: the call takes a number, and changes this thread only.
        let unshared = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(
            unshared,
            0,
            "this test needs a network namespace of its own, and the right to make one (run it \
             as root): {}",
            std::io::Error::last_os_error()
        );
        ip("link set lo up");
        work();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` (package iproute2).
pub fn ip(arguments: &str) {
    let status = Command::new("ip")
        .args(arguments.split_whitespace())
        .status()
        .expect("this test needs the program ip (package iproute2)");
    assert!(status.success(), "ip {arguments}");
}
