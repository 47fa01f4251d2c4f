//! The system call instruction itself: registers, flags, edges of the address
//! space, and stepping over it.

use crate::harness::{Check, Ctx, Note, Verdict, check, equal, require};
use crate::probe::{self, Code, Ran};
use crate::sys::{self, Region};
use std::arch::asm;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("syscall_rcx_r11", rcx_r11),
    check("syscall_registers_kept", registers_kept),
    check("syscall_unknown", unknown),
    check("syscall_flags_kept", flags_kept),
    check("syscall_nt_flag_fault", nt_fault),
    check("syscall_ac_df_fault", ac_df_fault),
    check("syscall_bad_pointers", bad_pointers),
    check("syscall_top_of_user_space", top_of_user_space),
    check("syscall_bad_stack", bad_stack),
    check("step_trap_flag_count", step_count),
    check("step_over_syscall", step_over_syscall),
    check("step_over_int80", step_over_int80),
    check("step_over_fault", step_over_fault),
    check("step_popf_mov_ss", step_mov_ss),
    check("vsyscall", vsyscall),
];

fn rcx_r11(ctx: &Ctx) -> Verdict {
    for _ in 0..ctx.n(1000) {
        let (rcx, r11, here, flags): (u64, u64, u64, u64);
        // SAFETY: getpid; every changed register is listed.
        unsafe {
            asm!("pushfq", "pop {f}", "lea {h}, [rip + 2f]", "mov eax, 39", "syscall", "2:",
                 f = out(reg) flags, h = out(reg) here, out("rax") _, out("rcx") rcx, out("r11") r11);
        }
        equal("rcx", rcx, here)?;
        // The lea and mov change no flags.
        equal("r11", r11, flags)?;
    }
    Ok(Note::Pass)
}

fn registers_kept(ctx: &Ctx) -> Verdict {
    for _ in 0..ctx.n(500) {
        let mut bad: u64;
        // SAFETY: sched_yield; every changed register is listed.
        unsafe {
            asm!(
                "push rbx", "push rbp",
                "mov rbx, -1", "mov rbp, -2", "mov rdx, -3", "mov rsi, -4", "mov rdi, -5",
                "mov r8, -6", "mov r9, -7", "mov r10, -8", "mov r12, -9", "mov r13, -10",
                "mov r14, -11", "mov r15, -12",
                "mov eax, 24", "syscall",
                "add rbx, 1", "add rbp, 2", "add rdx, 3", "add rsi, 4", "add rdi, 5",
                "add r8, 6", "add r9, 7", "add r10, 8", "add r12, 9", "add r13, 10",
                "add r14, 11", "add r15, 12",
                "or rax, rbx", "or rax, rbp", "or rax, rdx", "or rax, rsi", "or rax, rdi",
                "or rax, r8", "or rax, r9", "or rax, r10", "or rax, r12", "or rax, r13",
                "or rax, r14", "or rax, r15",
                "pop rbp", "pop rbx",
                out("rax") bad, out("rcx") _, out("rdx") _, out("rsi") _, out("rdi") _,
                out("r8") _, out("r9") _, out("r10") _, out("r11") _, out("r12") _,
                out("r13") _, out("r14") _, out("r15") _,
            );
        }
        equal("result and difference of registers", bad, 0)?;
    }
    Ok(Note::Pass)
}

fn unknown(_: &Ctx) -> Verdict {
    for nr in [1000_i64, 0x7fff_ffff, -1, 0x4000_0027] {
        let r = sys::syscall_int(nr, 0, 0, 0);
        equal(
            &format!("call {nr:#x}"),
            (r, sys::errno()),
            (-1, libc::ENOSYS),
        )?;
    }
    Ok(Note::Pass)
}

const NT: u64 = 1 << 14;
const AC: u64 = 1 << 18;
const DF: u64 = 1 << 10;
const TF: u64 = 1 << 8;

/// Runs `inner` with `flags` set; rax: the flags behind it.
fn with_flags(flags: u64, inner: &[u8]) -> Result<Code, String> {
    let set = (flags as u32).to_le_bytes();
    let clear = (!(flags as u32)).to_le_bytes();
    let mut code = vec![0x9c, 0x81, 0x0c, 0x24]; // pushf; or dword [rsp],flags
    code.extend(set);
    code.push(0x9d); // popf
    code.extend(inner);
    code.extend([0x9c, 0x58, 0x9c, 0x81, 0x24, 0x24]); // pushf; pop rax; pushf; and dword [rsp],~flags
    code.extend(clear);
    code.extend([0x9d, 0xc3]); // popf; ret
    Code::new(&code)
}

/// NT, AC and DF live through a system call of either kind; NT in the flags
/// must not reach the return path's iret.
fn flags_kept(ctx: &Ctx) -> Verdict {
    probe::install();
    let by_syscall: &[u8] = &[0xb8, 39, 0, 0, 0, 0x0f, 0x05];
    let by_int80: &[u8] = &[0xb8, 20, 0, 0, 0, 0xcd, 0x80];
    let yields: &[u8] = &[0xb8, 24, 0, 0, 0, 0x0f, 0x05];
    for (name, inner) in [
        ("syscall", by_syscall),
        ("int 0x80", by_int80),
        ("yield", yields),
    ] {
        for flags in [NT, AC, DF, NT | AC | DF, 1 << 21] {
            let code = with_flags(flags, inner)?;
            for _ in 0..ctx.n(50) {
                let got = code.run(0, 0).value()?;
                equal(&format!("{name} with {flags:#x}"), got & flags, flags)?;
            }
        }
    }
    Ok(Note::Pass)
}

/// Page faults that the kernel resolves, with odd flags set.
fn fault_with(flags: u64, ctx: &Ctx) -> Verdict {
    probe::install();
    let code = with_flags(flags, &[0x48, 0x89, 0x37])?; // mov [rdi],rsi
    let region = Region::new(4096 * 256)?;
    for i in 0..u64::from(ctx.n(256)).min(256) {
        let got = code.run(region.addr() + i * 4096, i + 1).value()?;
        equal("flags behind the fault", got & flags, flags)?;
        equal("value", region.load(i as usize * 4096), i + 1)?;
    }
    // A fault that becomes a signal: the flags are in its frame.
    let fault = code.run(0x10, 1).fault()?;
    equal("flags in the frame", fault.flags & flags, flags)?;
    Ok(Note::Pass)
}

fn nt_fault(ctx: &Ctx) -> Verdict {
    fault_with(NT, ctx)
}

fn ac_df_fault(ctx: &Ctx) -> Verdict {
    fault_with(AC | DF, ctx)
}

/// Bad user pointers are EFAULT, wherever they point.
fn bad_pointers(_: &Ctx) -> Verdict {
    let (_reader, writer) = std::io::pipe().map_err(|e| e.to_string())?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&writer) as usize;
    for addr in [
        0x10_usize,
        0x1000_0000_0000,
        0x7fff_ffff_f000,
        0x0100_0000_0000_0000,
        0x1234_5678_9abc_def0,
        0xffff_8000_0000_0000,
        0xffff_82d0_8000_0000,
        0xffff_8880_0000_0000,
        0xffff_ffff_8100_0000,
    ] {
        let r = sys::syscall_int(libc::SYS_write, fd, addr, 8);
        equal(
            &format!("write from {addr:#x}"),
            (r, sys::errno()),
            (-1, libc::EFAULT),
        )?;
        let r = sys::syscall_int(libc::SYS_pipe, addr, 0, 0);
        equal(
            &format!("pipe to {addr:#x}"),
            (r, sys::errno()),
            (-1, libc::EFAULT),
        )?;
    }
    Ok(Note::Pass)
}

/// Maps one page of code at `addr`, never over anything else.
fn map_code_at(addr: u64) -> bool {
    let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
    // SAFETY: NOREPLACE never touches an existing mapping.
    unsafe { libc::mmap(addr as *mut libc::c_void, 4096, prot, flags, -1, 0) as u64 == addr }
}

/// A system call in the last bytes of the last page that a process may map:
/// the return address is the first one it may not.
fn top_of_user_space(_: &Ctx) -> Verdict {
    probe::install();
    // With 5-level page tables user space ends at 56 bits, else at 47.
    let wide = map_code_at((1 << 56) - 8192);
    let top = if wide { 1_u64 << 56 } else { 1 << 47 };
    require(wide || map_code_at(top - 8192), || {
        "the last page cannot be mapped".to_string()
    })?;
    require(!map_code_at(top - 4096), || {
        "the guard page can be mapped".to_string()
    })?;
    require(!map_code_at(0xffff_8000_0000_0000), || {
        "the hole can be mapped".to_string()
    })?;
    // SAFETY: the page was just mapped writable; the bytes end with it.
    unsafe {
        let code: [u8; 2] = [0x0f, 0x05];
        std::ptr::copy_nonoverlapping(code.as_ptr(), (top - 4098) as *mut u8, 2);
    }
    // mov eax,39; jmp rdi
    let jump = Code::new(&[0xb8, 39, 0, 0, 0, 0xff, 0xe7])?;
    let fault = jump.run(top - 4098, 0).fault()?;
    equal("signal", fault.sig, libc::SIGSEGV)?;
    equal("si_addr", fault.addr, top - 4096)?;
    equal("rip", fault.rip, top - 4096)?;
    Ok(Note::Pass)
}

/// The kernel does not look at the user's stack pointer.
fn bad_stack(ctx: &Ctx) -> Verdict {
    probe::install();
    // mov rdx,rsp; mov rsp,rdi; mov eax,39; syscall; mov rsp,rdx
    let code = Code::with_ret(&[
        0x48, 0x89, 0xe2, 0x48, 0x89, 0xfc, 0xb8, 39, 0, 0, 0, 0x0f, 0x05, 0x48, 0x89, 0xd4,
    ])?;
    let pid = u64::from(std::process::id());
    for _ in 0..ctx.n(100) {
        for rsp in [0, 1, 0x1234_5678_9abc_def0, 0xffff_8000_0000_0000, u64::MAX] {
            equal(
                &format!("getpid with rsp {rsp:#x}"),
                code.run(rsp, 0).value()?,
                pid,
            )?;
        }
    }
    Ok(Note::Pass)
}

static STEPS: AtomicU64 = AtomicU64::new(0);

extern "C" fn count_step(_: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    STEPS.fetch_add(1, SeqCst);
    // SAFETY: arguments of a running handler.
    unsafe {
        if (*info).si_code != 2 || probe::saved_registers(context)[libc::REG_TRAPNO as usize] != 1 {
            STEPS.fetch_add(1 << 32, SeqCst);
        }
    }
}

/// Sets TF, runs `inner`, clears TF; returns the number of steps between.
fn steps(inner: &[u8]) -> Result<u64, String> {
    probe::install();
    probe::set_handler(libc::SIGTRAP, count_step, 0);
    STEPS.store(0, SeqCst);
    with_flags(TF, inner)?.run(0, 0).value()?;
    let counted = STEPS.load(SeqCst);
    require(counted >> 32 == 0, || {
        "a step had the wrong si_code or trapno".to_string()
    })?;
    // pushf; pop rax; pushf; and; popf are stepped too.
    Ok(counted - 5)
}

fn step_count(ctx: &Ctx) -> Verdict {
    for _ in 0..ctx.n(100) {
        equal("steps over 100 nops", steps(&[0x90; 100])?, 100)?;
    }
    Ok(Note::Pass)
}

/// Steps over `mov eax; syscall; nop`: the call masks TF and may swallow a step.
fn step_over_syscall(_: &Ctx) -> Verdict {
    let n = steps(&[0xb8, 39, 0, 0, 0, 0x0f, 0x05, 0x90, 0x90])?;
    Ok(Note::Info(format!("{n} steps over 4 instructions")))
}

fn step_over_int80(_: &Ctx) -> Verdict {
    let n = steps(&[0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0x90, 0x90])?;
    Ok(Note::Info(format!("{n} steps over 4 instructions")))
}

/// A page fault in the middle of stepping neither adds nor loses a step.
fn step_over_fault(_: &Ctx) -> Verdict {
    let region = Region::new(4096 * 8)?;
    let mut inner = vec![0x48, 0xb8]; // mov rax,addr
    inner.extend(region.addr().to_le_bytes());
    for _ in 0..8 {
        inner.extend([0x48, 0x89, 0x00]); // mov [rax],rax
        inner.extend([0x48, 0x05, 0, 0x10, 0, 0]); // add rax,4096
    }
    equal("steps", steps(&inner)?, 17)?;
    for page in 0..8 {
        equal(
            "stored",
            region.load(page * 4096),
            region.addr() + page as u64 * 4096,
        )?;
    }
    Ok(Note::Pass)
}

/// `mov ss` holds the trap back for one instruction.
fn step_mov_ss(_: &Ctx) -> Verdict {
    let n = steps(&[0xb8, 0x2b, 0, 0, 0, 0x8e, 0xd0, 0x90, 0x90])?;
    Ok(Note::Info(format!(
        "{n} steps over 4 instructions with mov ss"
    )))
}

/// The legacy vsyscall page, by call and by read.
fn vsyscall(_: &Ctx) -> Verdict {
    probe::install();
    let region = Region::new(4096)?;
    let call = match probe::run(0xffff_ffff_ff60_0000, region.addr(), 0) {
        Ran::Returned(r) => format!("gettimeofday {r}"),
        Ran::Faulted(f) => f.brief(),
    };
    let read = match probe::load(0xffff_ffff_ff60_0000)? {
        Ran::Returned(_) => "readable".to_string(),
        Ran::Faulted(f) => format!("signal {}", f.sig),
    };
    Ok(Note::Info(format!("{call}, {read}")))
}
