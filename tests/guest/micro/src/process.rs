//! Making processes and programs.

use crate::sys::{Bench, fail, fork, timed, wait};
use std::ffi::CStr;

/// fork, exit, wait.
pub fn fork_exit(_: &Bench, n: u64) -> f64 {
    timed(|| {
        for _ in 0..n {
            wait(fork(|| {}));
        }
    })
}

/// fork, execve of `argv[0]`'s program, wait; the program must succeed.
fn run_program(path: &CStr, argv: &[*const libc::c_char], n: u64) -> f64 {
    let environment = [std::ptr::null()];
    timed(|| {
        for _ in 0..n {
            let child = fork(|| {
                // SAFETY: null-terminated arrays of C strings. When the call
                // fails the child ends with 9, below.
                unsafe {
                    libc::execve(path.as_ptr(), argv.as_ptr(), environment.as_ptr());
                    libc::_exit(9);
                }
            });
            if wait(child) != 0 {
                eprintln!("micro: {} did not run well", path.to_string_lossy());
                fail("program");
            }
        }
    })
}

/// fork, exec of a tiny static program, wait.
pub fn fork_exec(bench: &Bench, n: u64) -> f64 {
    run_program(&bench.hello, &[bench.hello.as_ptr(), std::ptr::null()], n)
}

/// fork, `sh -c` of the same program, wait.
pub fn fork_shell(bench: &Bench, n: u64) -> f64 {
    let argv = [
        c"sh".as_ptr(),
        c"-c".as_ptr(),
        bench.hello.as_ptr(),
        std::ptr::null(),
    ];
    run_program(c"/bin/sh", &argv, n)
}
