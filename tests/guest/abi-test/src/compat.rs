//! 32-bit compatibility: `int 0x80` from 64-bit code, 32-bit processes, and
//! compatibility mode entered by a far return.

use crate::harness::{Check, Ctx, Note, Verdict, check, equal, require};
use crate::probe::{self, Code};
use crate::sys::{self, Region, Status};
use std::arch::{asm, global_asm};
use std::ffi::CString;
use std::io::Read;
use std::os::fd::AsRawFd;

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("compat_int80", int80),
    check("compat_int80_registers", int80_registers),
    check("compat_visit", visit),
    check("compat_exec_write", exec_write),
    check("compat_vdso_sysinfo", |_| program("v")),
    check("compat_set_thread_area", |_| program("t")),
    check("compat_signal", |_| program("s")),
    check("compat_old_signal", |_| program("o")),
    check("compat_faults", |_| program("f")),
    check("compat_fork", |_| program("k")),
    check("compat_long_mode_jumps", |_| program("l")),
    check("compat_mmap", |_| program("m")),
    check("compat_x87_sse", |_| program("x")),
    check("compat_modify_ldt", |_| program("d")),
    check("compat_exec_loop", exec_loop),
];

global_asm!(include_str!("compat32.s"), options(att_syntax));

unsafe extern "C" {
    static c32_start: u8;
    static c32_end: u8;
    static compat_visit_start: u8;
    static compat_visit_end: u8;
}

fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: both labels are in one section of the program, in this order.
    unsafe { std::slice::from_raw_parts(start, end as usize - start as usize) }
}

fn int80_call(nr: u64) -> u64 {
    let mut rax = nr;
    // SAFETY: getpid takes no arguments; int 0x80 may clear r8 to r11.
    unsafe {
        asm!("int 0x80", inout("rax") rax, lateout("r8") _, lateout("r9") _, lateout("r10") _,
             lateout("r11") _);
    }
    rax
}

fn int80(ctx: &Ctx) -> Verdict {
    let pid = u64::from(std::process::id());
    for _ in 0..ctx.n(1000) {
        equal("getpid by int 0x80", int80_call(20), pid)?;
    }
    equal(
        "unknown call",
        int80_call(0xffff),
        (-i64::from(libc::ENOSYS)) as u64,
    )?;
    Ok(Note::Pass)
}

fn int80_registers(_: &Ctx) -> Verdict {
    let mut bad: u64;
    // SAFETY: getpid takes no arguments; changed registers are listed.
    unsafe {
        asm!(
            "push rbx", "push rbp",
            "mov rbx, 0x1111111122222222", "mov rbp, 0x3333333344444444",
            "mov rcx, 0x5555555566666666", "mov rdx, 0x7777777711111111",
            "mov rsi, 0x2222222233333333", "mov rdi, 0x4444444455555555",
            "mov r12, rbx", "mov r13, rcx", "mov r14, rdx", "mov r15, rsi",
            "mov eax, 20",
            "int 0x80",
            "mov rax, 0x4444444455555555", "xor rdi, rax",
            "xor rsi, r15", "xor rdx, r14", "xor rcx, r13",
            "mov rax, 0x1111111122222222", "xor r12, rax", "xor rbx, rax",
            "mov rax, 0x3333333344444444", "xor rbp, rax",
            "mov rax, rdi", "or rax, rsi", "or rax, rdx", "or rax, rcx", "or rax, r12",
            "or rax, rbx", "or rax, rbp",
            "pop rbp", "pop rbx",
            out("rax") bad, out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _, out("r12") _, out("r13") _,
            out("r14") _, out("r15") _,
        );
    }
    equal("difference of registers", bad, 0)?;
    Ok(Note::Pass)
}

/// Far return to 0x23 in this 64-bit process, `int 0x80` there, and back.
fn visit(ctx: &Ctx) -> Verdict {
    probe::install();
    let (start, end) = (&raw const compat_visit_start, &raw const compat_visit_end);
    let code = Code::new(between(start, end))?;
    let stack = Region::low_code(16 * 4096)?;
    let top = stack.addr() + 15 * 4096;
    for _ in 0..ctx.n(2000) {
        let pid = code.run(0x23, top).value()?;
        equal(
            "getpid from compatibility mode",
            pid,
            u64::from(std::process::id()),
        )?;
    }
    Ok(Note::Pass)
}

/// The 32-bit program as a complete ELF file.
fn elf32() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    let code = between(&raw const c32_start, &raw const c32_end);
    let size = 0x54 + code.len() as u32;
    let mut file = vec![0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    file.extend([2, 0, 3, 0]); // executable, i386
    for word in [1, BASE + 0x54, 0x34, 0, 0] {
        file.extend(u32::to_le_bytes(word)); // version, entry, phoff, shoff, flags
    }
    for half in [0x34_u16, 0x20, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes()); // sizes and counts
    }
    for word in [1, 0, BASE, BASE, size, size + 4096, 7, 4096] {
        file.extend(u32::to_le_bytes(word)); // PT_LOAD, readable, writable, executable
    }
    file.extend(code);
    file
}

/// Puts the 32-bit program into a memory file and returns its path.
fn elf32_path() -> Result<CString, String> {
    // SAFETY: a constant name.
    let fd = unsafe { libc::memfd_create(c"i386".as_ptr(), 0) };
    if fd < 0 {
        return Err(format!("memfd_create: {}", sys::last_error()));
    }
    sys::write_all(fd, &elf32());
    CString::new(format!("/proc/self/fd/{fd}")).map_err(|e| e.to_string())
}

fn exec32(path: &CString, letter: &str, stdout: Option<i32>) -> i32 {
    let Ok(arg) = CString::new(letter) else {
        return 97;
    };
    let argv = [path.as_ptr(), arg.as_ptr(), std::ptr::null()];
    let envp = [std::ptr::null()];
    // SAFETY: null-terminated arrays of C strings that live until the call.
    unsafe {
        if let Some(fd) = stdout {
            libc::dup2(fd, 1);
        }
        libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr());
    }
    96
}

/// Runs one test of the 32-bit program.
fn program(letter: &str) -> Verdict {
    let path = elf32_path()?;
    match sys::fork(|| exec32(&path, letter, None))?.wait() {
        Status::Exit(0) => Ok(Note::Pass),
        Status::Exit(77) => Ok(Note::Info("not offered by this kernel".to_string())),
        Status::Exit(96) => Err("the kernel does not run i386 programs".to_string()),
        Status::Exit(step) => Err(format!("step {step} failed")),
        status => Err(format!("ended with {status}")),
    }
}

fn exec_write(_: &Ctx) -> Verdict {
    let path = elf32_path()?;
    let (mut reader, writer) = std::io::pipe().map_err(|e| e.to_string())?;
    let child = sys::fork(|| exec32(&path, "w", Some(writer.as_raw_fd())))?;
    drop(writer);
    let mut text = String::new();
    reader
        .read_to_string(&mut text)
        .map_err(|e| e.to_string())?;
    equal("status", child.wait(), Status::Exit(42))?;
    equal("output", text.as_str(), "hello from 32 bits\n")?;
    Ok(Note::Pass)
}

fn exec_loop(ctx: &Ctx) -> Verdict {
    let path = elf32_path()?;
    for i in 0..ctx.n(200) {
        let status = sys::fork(|| exec32(&path, "e", None))?.wait();
        require(status == Status::Exit(5), || {
            format!("run {i} ended with {status}")
        })?;
    }
    Ok(Note::Pass)
}
