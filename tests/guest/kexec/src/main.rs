//! `kexec now|crash KERNEL INITRD CMDLINE`: loads a kernel, and starts it at once or
//! leaves it for the next panic (`kexec_file_load(2)`, `reboot(2)`).

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::process::ExitCode;

/// `KEXEC_FILE_ON_CRASH` of `linux/kexec.h`.
const ON_CRASH: libc::c_ulong = 2;

fn open(path: &str) -> io::Result<File> {
    File::open(path).map_err(|error| io::Error::other(format!("{path}: {error}")))
}

fn load(kernel: &str, initrd: &str, cmdline: &str, flags: libc::c_ulong) -> io::Result<()> {
    let (kernel, initrd) = (open(kernel)?, open(initrd)?);
    let cmdline = CString::new(cmdline)?;
    let bytes = cmdline.as_bytes_with_nul();
    // SAFETY: two open descriptors and a string of the length given, which includes
    // its end; all outlive the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initrd.as_raw_fd(),
            bytes.len(),
            bytes.as_ptr(),
            flags,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let (crash, [kernel, initrd, cmdline]) = match arguments[..] {
        ["now", kernel, initrd, cmdline] => (false, [kernel, initrd, cmdline]),
        ["crash", kernel, initrd, cmdline] => (true, [kernel, initrd, cmdline]),
        _ => {
            eprintln!("usage: kexec now|crash KERNEL INITRD CMDLINE");
            return ExitCode::from(2);
        }
    };
    let flags = if crash { ON_CRASH } else { 0 };
    if let Err(error) = load(kernel, initrd, cmdline, flags) {
        eprintln!("kexec: {error}");
        return ExitCode::FAILURE;
    }
    if crash {
        return ExitCode::SUCCESS;
    }
    // SAFETY: takes a number; returns only if it fails.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_KEXEC) };
    eprintln!("kexec: {}", io::Error::last_os_error());
    ExitCode::FAILURE
}
