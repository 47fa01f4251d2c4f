//! The calls, with whatever arguments.

use std::ffi::CStr;

use blanket_abi::device::{Boot, CreateVm};

const PATH: &CStr = c"/dev/blanket";

/// The answer of a call: a number, or the errno.
pub type Answer = Result<i64, i32>;

fn answer(ret: i64) -> Answer {
    if ret < 0 {
        Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
    } else {
        Ok(ret)
    }
}

/// Opens the device.
pub fn open() -> Answer {
    // SAFETY: the path is a C string.
    answer(unsafe { libc::open(PATH.as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) }.into())
}

/// An ioctl with any number and any argument, which may be an address.
pub fn ioctl(fd: i32, cmd: u32, arg: u64) -> Answer {
    // SAFETY: addresses that are passed are of memory which this program only uses
    // through system calls, or none; what the kernel writes there does no harm.
    answer(unsafe { libc::ioctl(fd, cmd.into(), arg) }.into())
}

/// Maps pages, anonymous ones for `fd` -1.
pub fn mmap(fd: i32, length: usize, offset: i64, prot: i32, flags: i32) -> Answer {
    // SAFETY: a new mapping at an address that the kernel chooses.
    answer(unsafe { libc::mmap(std::ptr::null_mut(), length, prot, flags, fd, offset) } as i64)
}

/// Anonymous shared memory of `pages` pages.
pub fn memory(pages: u64) -> Answer {
    let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    mmap(-1, (pages * 4096) as usize, 0, prot, flags)
}

/// A range of addresses that stays this caller's: nothing is there, and nothing else
/// comes there.
pub fn reserve(pages: u64) -> Answer {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    mmap(-1, (pages * 4096) as usize, 0, libc::PROT_NONE, flags)
}

/// In place of what there is in a reserved range: new memory as of [`memory`], or nothing
/// again. It is unmapped, and its addresses are nobody else's meanwhile.
pub fn replace(address: u64, pages: u64, with_memory: bool) {
    let (prot, kind) = if with_memory {
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED)
    } else {
        (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_NORESERVE)
    };
    let flags = kind | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: the caller passes a part of what `reserve` gave, which nothing of this
    // program refers to.
    unsafe {
        libc::mmap(
            address as *mut libc::c_void,
            (pages * 4096) as usize,
            prot,
            flags,
            -1,
            0,
        )
    };
}

/// Unmaps what [`mmap`] has mapped.
pub fn munmap(address: u64, length: usize) {
    // SAFETY: the caller passes a mapping made by `mmap`, which nothing of this program
    // refers to.
    unsafe { libc::munmap(address as *mut libc::c_void, length) };
}

/// Changes the rights of such a mapping.
pub fn mprotect(address: u64, length: usize, prot: i32) {
    // SAFETY: as for `munmap`.
    unsafe { libc::mprotect(address as *mut libc::c_void, length, prot) };
}

/// Gives such a mapping's pages back.
pub fn discard(address: u64, length: usize) {
    // SAFETY: as for `munmap`.
    unsafe { libc::madvise(address as *mut libc::c_void, length, libc::MADV_REMOVE) };
}

/// Closes a descriptor.
pub fn close(fd: i32) {
    // SAFETY: descriptors of the device, which nothing but this program's own calls use.
    unsafe { libc::close(fd) };
}

/// A VM that would be made: `pages` at `address`, with a first vCPU that begins in
/// them, in tables that are not there.
pub fn vm(address: u64, pages: u64, vcpus: u32) -> CreateVm {
    CreateVm {
        user_addr: address,
        nr_frames: pages,
        pool_limit: 256,
        nr_vcpus: vcpus,
        flags: 0,
        boot: Boot {
            ram_frames: pages.saturating_sub(33),
            shared_info: pages.saturating_sub(33),
            grant_base: pages.saturating_sub(32),
            grant_frames: 32,
            ..Boot::default()
        },
        xcr0_mask: 0,
        cpuid_hidden: [0; 16],
    }
}

/// Runs `work` in a child process and answers with its exit code, or -1.
pub fn in_child(work: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child of this process, which may have other threads, makes nothing
    // but system calls until it exits.
    unsafe {
        match libc::fork() {
            -1 => -1,
            0 => libc::_exit(work()),
            child => {
                let mut status = 0;
                if libc::waitpid(child, &raw mut status, 0) == child && libc::WIFEXITED(status) {
                    libc::WEXITSTATUS(status)
                } else {
                    -1
                }
            }
        }
    }
}
