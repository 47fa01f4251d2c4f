//! ptrace: registers, memory, stepping, system call stops, hardware
//! breakpoints and watchpoints.

use crate::harness::{Check, Ctx, Note, Verdict, check, equal, require};
use crate::probe::Code;
use crate::sys::{self, Child, Region, Status};
use std::mem::offset_of;

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("ptrace_single_step", single_step),
    check("ptrace_step_over_syscall", step_over_syscall),
    check("ptrace_step_over_signal", step_into_handler),
    check("ptrace_peek_poke", peek_poke),
    check("ptrace_registers", registers),
    check("ptrace_fp_registers", fp_registers),
    check("ptrace_syscall_stops", syscall_stops),
    check("ptrace_syscall_replaced", syscall_replaced),
    check("ptrace_bad_rip", bad_rip),
    check("ptrace_bad_selectors", bad_selectors),
    check("ptrace_fs_gs_base", fs_gs_base),
    check("hwbp_execute", breakpoint_execute),
    check("hwbp_watch_write", watch_write),
    check("hwbp_watch_read_write", watch_read_write),
    check("hwbp_four_at_once", four_at_once),
    check("hwbp_kernel_refused", kernel_refused),
    check("hwbp_other_process", other_process),
    check("hwbp_many_with_switches", many_with_switches),
    check("hwbp_kernel_access", kernel_access),
];

/// A traced child that is stopped.
struct Tracee {
    child: Child,
}

impl Tracee {
    /// Forks a child that asks to be traced and runs `body`, and waits until
    /// it stops at its first `int3`.
    fn at_int3(body: impl FnOnce() -> i32) -> Result<Self, String> {
        let child = sys::fork(|| {
            // SAFETY: the request has no arguments.
            unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) };
            body()
        })?;
        let tracee = Self { child };
        tracee.expect_stop(libc::SIGTRAP)?;
        Ok(tracee)
    }

    /// The same, running a snippet with two arguments; exits with 0.
    fn running(code: &Code, arg0: u64, arg1: u64) -> Result<Self, String> {
        Self::at_int3(|| {
            call(code, arg0, arg1);
            0
        })
    }

    fn request(&self, request: u32, addr: u64, data: u64) -> Result<i64, String> {
        // SAFETY: callers pass numbers, or pointers to the structure that the
        // request wants.
        let r = unsafe { libc::ptrace(request, self.child.pid, addr, data) };
        if r == -1 && sys::errno() != 0 {
            return Err(format!(
                "ptrace request {request:#x}: {}",
                sys::last_error()
            ));
        }
        Ok(r)
    }

    fn regs(&self) -> Result<libc::user_regs_struct, String> {
        // SAFETY: integers only, so all zero is valid.
        let mut regs: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        self.request(libc::PTRACE_GETREGS, 0, &raw mut regs as u64)?;
        Ok(regs)
    }

    fn set_regs(&self, regs: &libc::user_regs_struct) -> Result<(), String> {
        self.request(libc::PTRACE_SETREGS, 0, std::ptr::from_ref(regs) as u64)
            .map(drop)
    }

    fn resume(&self, request: u32, sig: i32) -> Result<(), String> {
        self.request(request, 0, sig as u64).map(drop)
    }

    fn expect_stop(&self, sig: i32) -> Result<(), String> {
        equal("tracee", self.child.wait(), Status::Stopped(sig))
    }

    /// Resumes by `request` and waits for a SIGTRAP stop.
    fn go(&self, request: u32) -> Result<libc::user_regs_struct, String> {
        self.resume(request, 0)?;
        self.expect_stop(libc::SIGTRAP)?;
        self.regs()
    }

    fn finish(self) -> Result<(), String> {
        self.resume(libc::PTRACE_CONT, 0)?;
        self.child.wait_ok("tracee")
    }

    fn set_debug(&self, index: usize, value: u64) -> Result<(), String> {
        let at = offset_of!(libc::user, u_debugreg) + index * 8;
        self.request(libc::PTRACE_POKEUSER, at as u64, value)
            .map(drop)
    }

    fn debug(&self, index: usize) -> Result<u64, String> {
        let at = offset_of!(libc::user, u_debugreg) + index * 8;
        let mut value = 0_u64;
        // glibc's wrapper returns the word; the raw call stores it.
        // SAFETY: the kernel writes one word to `value`.
        let r = unsafe {
            libc::syscall(
                libc::SYS_ptrace,
                libc::PTRACE_PEEKUSER,
                self.child.pid,
                at,
                &raw mut value,
            )
        };
        if r == 0 {
            Ok(value)
        } else {
            Err(format!("PEEKUSER: {}", sys::last_error()))
        }
    }

    /// The cause bits of DR6, which the next trap must find clear.
    fn take_causes(&self) -> Result<u64, String> {
        let causes = self.debug(6)? & 0xf;
        self.set_debug(6, 0)?;
        Ok(causes)
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        self.child.kill(libc::SIGKILL);
    }
}

/// Calls a snippet directly: signals go to the tracer.
fn call(code: &Code, arg0: u64, arg1: u64) -> u64 {
    // SAFETY: snippets follow the C calling convention.
    unsafe {
        let f: extern "C" fn(u64, u64) -> u64 = std::mem::transmute(code.addr() as usize);
        f(arg0, arg1)
    }
}

/// `int3`, `inner`, `ret`.
fn traced(inner: &[u8]) -> Result<Code, String> {
    let mut code = vec![0xcc];
    code.extend(inner);
    code.push(0xc3);
    Code::new(&code)
}

fn single_step(ctx: &Ctx) -> Verdict {
    let n = u64::from(ctx.n(1000)).min(4000);
    let code = traced(&vec![0x90; n as usize])?;
    let tracee = Tracee::running(&code, 0, 0)?;
    equal("rip at int3", tracee.regs()?.rip, code.addr() + 1)?;
    for i in 1..=n {
        equal(
            "rip",
            tracee.go(libc::PTRACE_SINGLESTEP)?.rip,
            code.addr() + 1 + i,
        )?;
    }
    tracee.finish()?;
    Ok(Note::Pass)
}

fn step_over_syscall(_: &Ctx) -> Verdict {
    // mov eax,39; syscall; nop; mov eax,20; int 0x80; nop
    let code = traced(&[
        0xb8, 39, 0, 0, 0, 0x0f, 0x05, 0x90, 0xb8, 20, 0, 0, 0, 0xcd, 0x80, 0x90,
    ])?;
    let tracee = Tracee::running(&code, 0, 0)?;
    let pid = tracee.child.pid as u64;
    let mut ends = Vec::new();
    for _ in 0..6 {
        let regs = tracee.go(libc::PTRACE_SINGLESTEP)?;
        ends.push(regs.rip - code.addr() - 1);
        if [7, 15].contains(&(regs.rip - code.addr() - 1)) {
            equal("rax behind the call", regs.rax, pid)?;
        }
    }
    equal("ends of steps", ends, vec![5, 7, 8, 13, 15, 16])?;
    tracee.finish()?;
    Ok(Note::Pass)
}

/// A step with a signal to deliver stops at the handler's first instruction.
fn step_into_handler(_: &Ctx) -> Verdict {
    extern "C" fn ignore(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    // Taken once: two mentions of a function may have two addresses.
    let handler: crate::probe::Handler = ignore;
    let code = traced(&[0x90; 4])?;
    let tracee = Tracee::at_int3(|| {
        crate::probe::alternate_stack();
        crate::probe::set_handler(libc::SIGUSR1, handler, 0);
        call(&code, 0, 0);
        0
    })?;
    tracee.resume(libc::PTRACE_SINGLESTEP, libc::SIGUSR1)?;
    tracee.expect_stop(libc::SIGTRAP)?;
    equal("rip", tracee.regs()?.rip, handler as usize as u64)?;
    equal("first argument", tracee.regs()?.rdi, libc::SIGUSR1 as u64)?;
    tracee.finish()?;
    Ok(Note::Pass)
}

fn peek_poke(_: &Ctx) -> Verdict {
    let page = Region::new(4096)?;
    page.store(0, 0x1111_2222_3333_4444);
    // mov rax,[rdi]; add [rdi+8],rax
    let code = traced(&[0x48, 0x8b, 0x07, 0x48, 0x01, 0x47, 0x08])?;
    let tracee = Tracee::at_int3(|| {
        call(&code, page.addr(), 0);
        i32::from(page.load(8) != 0x5555)
    })?;
    tracee.request(libc::PTRACE_POKEDATA, page.addr(), 0x5555)?;
    equal("our own copy", page.load(0), 0x1111_2222_3333_4444)?;
    // Poking the executable page of the tracee works as well.
    tracee.request(libc::PTRACE_POKETEXT, code.addr() + 32, 0x90)?;
    tracee.finish()?;
    Ok(Note::Pass)
}

fn registers(_: &Ctx) -> Verdict {
    // mov rbx(pushed),imm ... reads back what the tracer sets: returns in memory
    // push rbx; int3; mov [rdi],rax; mov [rdi+8],rbx; mov [rdi+16],r15; pop rbx; ret
    let code = Code::new(&[
        0x53, 0x41, 0x57, 0xcc, 0x48, 0x89, 0x07, 0x48, 0x89, 0x5f, 0x08, 0x4c, 0x89, 0x7f, 0x10,
        0x41, 0x5f, 0x5b, 0xc3,
    ])?;
    let page = Region::shared(4096)?;
    let tracee = Tracee::running(&code, page.addr(), 0)?;
    let mut regs = tracee.regs()?;
    equal("rdi", regs.rdi, page.addr())?;
    equal("cs", regs.cs, 0x33)?;
    equal("ss", regs.ss, 0x2b)?;
    (regs.rax, regs.rbx, regs.r15) = (0x1234_5678_9abc_def0, u64::MAX, 42);
    tracee.set_regs(&regs)?;
    let again = tracee.regs()?;
    equal("rax read back", again.rax, 0x1234_5678_9abc_def0)?;
    tracee.finish()?;
    let seen = (page.load(0), page.load(8), page.load(16));
    equal(
        "registers in the tracee",
        seen,
        (0x1234_5678_9abc_def0, u64::MAX, 42),
    )?;
    Ok(Note::Pass)
}

fn fp_registers(_: &Ctx) -> Verdict {
    // movq xmm5,rdi; int3; movq rax,xmm5; mov [rsi],rax; ret
    let code = Code::new(&[
        0x66, 0x48, 0x0f, 0x6e, 0xef, 0xcc, 0x66, 0x48, 0x0f, 0x7e, 0xe8, 0x48, 0x89, 0x06, 0xc3,
    ])?;
    let page = Region::shared(4096)?;
    let tracee = Tracee::running(&code, 0xfeed_face_cafe_beef, page.addr())?;
    // SAFETY: integers only, so all zero is valid.
    let mut fp: libc::user_fpregs_struct = unsafe { std::mem::zeroed() };
    tracee.request(libc::PTRACE_GETFPREGS, 0, &raw mut fp as u64)?;
    let low = u64::from(fp.xmm_space[20]) | u64::from(fp.xmm_space[21]) << 32;
    equal("xmm5", low, 0xfeed_face_cafe_beef)?;
    equal("mxcsr without sticky flags", fp.mxcsr & !0x3f, 0x1f80)?;
    fp.xmm_space[20] = 0x7777;
    fp.xmm_space[21] = 0;
    tracee.request(libc::PTRACE_SETFPREGS, 0, &raw mut fp as u64)?;
    tracee.finish()?;
    equal("xmm5 in the tracee", page.load(0), 0x7777)?;
    Ok(Note::Pass)
}

fn syscall_stops(ctx: &Ctx) -> Verdict {
    // int3; L: mov eax,110 (getppid); syscall; dec edi; jnz L; ret
    let code = traced(&[0xb8, 110, 0, 0, 0, 0x0f, 0x05, 0xff, 0xcf, 0x75, 0xf5])?;
    let n = ctx.n(200);
    let tracee = Tracee::running(&code, u64::from(n), 0)?;
    for _ in 0..n {
        let entry = tracee.go(libc::PTRACE_SYSCALL)?;
        equal("orig_rax at entry", entry.orig_rax, 110)?;
        equal("rax at entry", entry.rax, (-i64::from(libc::ENOSYS)) as u64)?;
        let exit = tracee.go(libc::PTRACE_SYSCALL)?;
        equal("rax at exit", exit.rax, u64::from(std::process::id()))?;
        equal("rip at exit", exit.rip, code.addr() + 8)?;
    }
    tracee.finish()?;
    Ok(Note::Pass)
}

fn syscall_replaced(_: &Ctx) -> Verdict {
    // int3; mov eax,110; syscall; mov [rdi],rax; ret
    let code = traced(&[0xb8, 110, 0, 0, 0, 0x0f, 0x05, 0x48, 0x89, 0x07])?;
    let page = Region::shared(4096)?;
    let tracee = Tracee::running(&code, page.addr(), 0)?;
    let mut entry = tracee.go(libc::PTRACE_SYSCALL)?;
    entry.orig_rax = libc::SYS_getpid as u64;
    tracee.set_regs(&entry)?;
    let mut exit = tracee.go(libc::PTRACE_SYSCALL)?;
    equal("the other call's result", exit.rax, tracee.child.pid as u64)?;
    exit.rax = 0x1_0000_0001;
    // Different rcx and r11 force the slow return path.
    exit.rcx = 0x1111;
    exit.r11 = 0x2222;
    tracee.set_regs(&exit)?;
    tracee.finish()?;
    equal(
        "the result that the tracer set",
        page.load(0),
        0x1_0000_0001,
    )?;
    Ok(Note::Pass)
}

/// A tracer sets a return address out of reach while the tracee is in a system
/// call: the way out must neither use it unchecked nor kill the kernel.
fn bad_rip(_: &Ctx) -> Verdict {
    let code = traced(&[0xb8, 110, 0, 0, 0, 0x0f, 0x05])?;
    for rip in [
        0x0100_0000_0000_0000_u64,
        0x7fff_ffff_f000,
        0xffff_8000_0000_0000,
        0xffff_ffff_8100_0000,
        0x8000_0000_0000_0000,
    ] {
        let tracee = Tracee::running(&code, 0, 0)?;
        tracee.go(libc::PTRACE_SYSCALL)?;
        let mut exit = tracee.go(libc::PTRACE_SYSCALL)?;
        exit.rip = rip;
        exit.rcx = rip;
        tracee.set_regs(&exit)?;
        tracee.resume(libc::PTRACE_CONT, 0)?;
        tracee
            .expect_stop(libc::SIGSEGV)
            .map_err(|e| format!("rip {rip:#x}: {e}"))?;
        tracee.resume(libc::PTRACE_CONT, libc::SIGSEGV)?;
        equal(
            "end of the tracee",
            tracee.child.wait(),
            Status::Signal(libc::SIGSEGV),
        )?;
    }
    Ok(Note::Pass)
}

/// Linux refuses selectors without RPL 3 (but null data selectors pass).
fn bad_selectors(_: &Ctx) -> Verdict {
    let code = traced(&[0x90])?;
    let tracee = Tracee::running(&code, 0, 0)?;
    for (cs, ss) in [(0x10, 0x2b), (0x33, 0x18), (0, 0x2b), (0xe030, 0x2b)] {
        let mut regs = tracee.regs()?;
        (regs.cs, regs.ss) = (cs, ss);
        require(tracee.set_regs(&regs).is_err(), || {
            format!("cs {cs:#x} ss {ss:#x} accepted")
        })?;
    }
    // RPL 3 but no such segment: accepted, and the return to it fails.
    let mut regs = tracee.regs()?;
    regs.cs = 0xfff3;
    tracee.set_regs(&regs)?;
    tracee.resume(libc::PTRACE_CONT, 0)?;
    tracee.expect_stop(libc::SIGSEGV)?;
    Ok(Note::Pass)
}

fn fs_gs_base(_: &Ctx) -> Verdict {
    // int3; mov rax,gs:[0]; mov [rdi],rax; ret
    let code = traced(&[0x65, 0x48, 0x8b, 0x04, 0x25, 0, 0, 0, 0, 0x48, 0x89, 0x07])?;
    let page = Region::shared(4096)?;
    page.store(64, 0x6161);
    let tracee = Tracee::running(&code, page.addr(), 0)?;
    let mut regs = tracee.regs()?;
    require(regs.fs_base != 0, || "fs_base is 0".to_string())?;
    regs.gs_base = page.addr() + 64;
    tracee.set_regs(&regs)?;
    equal(
        "gs_base read back",
        tracee.regs()?.gs_base,
        page.addr() + 64,
    )?;
    for bad in [0x0100_0000_0000_0000, 0xffff_8000_0000_0000_u64] {
        let mut regs = tracee.regs()?;
        regs.gs_base = bad;
        require(tracee.set_regs(&regs).is_err(), || {
            format!("gs_base {bad:#x} accepted")
        })?;
    }
    tracee.finish()?;
    equal("through gs", page.load(0), 0x6161)?;
    Ok(Note::Pass)
}

/// DR7: local enable of one breakpoint, with type and length.
const fn enable(index: u64, kind: u64, length: u64) -> u64 {
    let code = match length {
        2 => 1,
        4 => 3,
        8 => 2,
        _ => 0,
    };
    1 << (index * 2) | (kind | code << 2) << (16 + index * 4)
}

const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const READ_WRITE: u64 = 3;

fn breakpoint_execute(ctx: &Ctx) -> Verdict {
    // int3; L: nop x8; dec edi; jnz L; ret
    let code = traced(&[
        0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xff, 0xcf, 0x75, 0xf4,
    ])?;
    let rounds = ctx.n(100);
    let tracee = Tracee::running(&code, u64::from(rounds), 0)?;
    tracee.set_debug(0, code.addr() + 5)?;
    tracee.set_debug(7, enable(0, EXECUTE, 1))?;
    equal("DR0 read back", tracee.debug(0)?, code.addr() + 5)?;
    for _ in 0..rounds {
        let regs = tracee.go(libc::PTRACE_CONT)?;
        equal("rip at the breakpoint", regs.rip, code.addr() + 5)?;
        equal("DR6", tracee.take_causes()?, 1)?;
    }
    tracee.finish()?;
    Ok(Note::Pass)
}

/// Byte stores around watched places of 1, 2, 4 and 8 bytes.
fn watch_write(_: &Ctx) -> Verdict {
    // int3; L: mov byte [rdi],1; inc rdi; dec esi; jnz L; ret
    let code = traced(&[0xc6, 0x07, 0x01, 0x48, 0xff, 0xc7, 0xff, 0xce, 0x75, 0xf6])?;
    let page = Region::new(4096)?;
    for length in [1_u64, 2, 4, 8] {
        let tracee = Tracee::running(&code, page.addr(), 32)?;
        tracee.set_debug(1, page.addr() + 16)?;
        tracee.set_debug(7, enable(1, WRITE, length))?;
        for byte in 0..length {
            let regs = tracee.go(libc::PTRACE_CONT)?;
            equal("address of the store", regs.rdi, page.addr() + 16 + byte)?;
            equal("rip behind the store", regs.rip, code.addr() + 4)?;
            equal("DR6", tracee.take_causes()?, 2)?;
        }
        tracee.finish()?;
    }
    Ok(Note::Pass)
}

fn watch_read_write(_: &Ctx) -> Verdict {
    // int3; mov rax,[rdi]; mov [rdi],rax; mov rax,[rdi+8]; ret
    let code = traced(&[0x48, 0x8b, 0x07, 0x48, 0x89, 0x07, 0x48, 0x8b, 0x47, 0x08])?;
    let page = Region::new(4096)?;
    let tracee = Tracee::running(&code, page.addr(), 0)?;
    tracee.set_debug(2, page.addr())?;
    tracee.set_debug(7, enable(2, READ_WRITE, 8))?;
    equal(
        "rip behind the load",
        tracee.go(libc::PTRACE_CONT)?.rip,
        code.addr() + 4,
    )?;
    equal("DR6", tracee.take_causes()?, 4)?;
    equal(
        "rip behind the store",
        tracee.go(libc::PTRACE_CONT)?.rip,
        code.addr() + 7,
    )?;
    equal("DR6 again", tracee.take_causes()?, 4)?;
    tracee.finish()?;
    Ok(Note::Pass)
}

fn four_at_once(_: &Ctx) -> Verdict {
    // int3; nop; nop; mov [rdi],rsi; mov [rdi+64],rsi; nop; ret
    let code = traced(&[0x90, 0x90, 0x48, 0x89, 0x37, 0x48, 0x89, 0x77, 0x40, 0x90])?;
    let page = Region::new(4096)?;
    let tracee = Tracee::running(&code, page.addr(), 7)?;
    tracee.set_debug(0, code.addr() + 2)?;
    tracee.set_debug(1, page.addr())?;
    tracee.set_debug(2, page.addr() + 64)?;
    tracee.set_debug(3, code.addr() + 10)?;
    let all =
        enable(0, EXECUTE, 1) | enable(1, WRITE, 8) | enable(2, WRITE, 4) | enable(3, EXECUTE, 1);
    tracee.set_debug(7, all)?;
    for (rip, cause) in [(2, 1), (6, 2), (10, 4), (10, 8)] {
        let regs = tracee.go(libc::PTRACE_CONT)?;
        let causes = tracee.take_causes()?;
        if cause == 4 && causes == 12 {
            // Both in one trap: allowed, since the store ends at the other's address.
            break;
        }
        equal(
            "rip and DR6",
            (regs.rip - code.addr(), causes),
            (rip, cause),
        )?;
    }
    tracee.finish()?;
    Ok(Note::Pass)
}

fn kernel_refused(_: &Ctx) -> Verdict {
    let code = traced(&[0x90])?;
    let tracee = Tracee::running(&code, 0, 0)?;
    for addr in [
        0xffff_8000_0000_0000_u64,
        0xffff_82d0_8000_0000,
        0xffff_8880_0000_0000,
        0xffff_ffff_8100_0000,
        0xffff_fe00_0000_0000,
        0x0100_0000_0000_0000,
    ] {
        for kind in [EXECUTE, WRITE] {
            let set = tracee
                .set_debug(0, addr)
                .and_then(|()| tracee.set_debug(7, enable(0, kind, 1)));
            require(set.is_err(), || {
                format!("a breakpoint at {addr:#x} was accepted")
            })?;
        }
    }
    tracee.set_debug(0, 0)?;
    tracee.finish()?;
    Ok(Note::Pass)
}

/// A watchpoint in one process is not seen by another that stores to the same
/// address on the same CPU.
fn other_process(ctx: &Ctx) -> Verdict {
    sys::pin(sys::cpus()[0])?;
    // int3; L: mov [rdi],rsi; mov eax,24; syscall; dec rsi; jnz L; ret
    let code = traced(&[
        0x48, 0x89, 0x37, 0xb8, 24, 0, 0, 0, 0x0f, 0x05, 0x48, 0xff, 0xce, 0x75, 0xf1,
    ])?;
    let page = Region::new(4096)?;
    let rounds = u64::from(ctx.n(100));
    let busy = sys::fork(|| {
        for _ in 0..rounds * 50 {
            page.store(0, 1);
            sys::yield_now();
        }
        0
    })?;
    let tracee = Tracee::running(&code, page.addr(), rounds)?;
    tracee.set_debug(0, page.addr())?;
    tracee.set_debug(7, enable(0, WRITE, 8))?;
    for left in (1..=rounds).rev() {
        let regs = tracee.go(libc::PTRACE_CONT)?;
        equal("counter at the store", regs.rsi, left)?;
        tracee.take_causes()?;
    }
    tracee.finish()?;
    busy.wait_ok("the process without a watchpoint")?;
    Ok(Note::Pass)
}

fn many_with_switches(ctx: &Ctx) -> Verdict {
    // int3; L: mov [rdi],rsi; dec rsi; jnz L; ret
    let code = traced(&[0x48, 0x89, 0x37, 0x48, 0xff, 0xce, 0x75, 0xf8])?;
    let page = Region::new(4096)?;
    let rounds = u64::from(ctx.n(500));
    let tracees: Vec<_> = (0..3)
        .map(|_| Tracee::running(&code, page.addr(), rounds))
        .collect::<Result<_, _>>()?;
    for (i, tracee) in tracees.iter().enumerate() {
        tracee.set_debug(i, page.addr())?;
        tracee.set_debug(7, enable(i as u64, WRITE, 8))?;
    }
    for left in (1..=rounds).rev() {
        for (i, tracee) in tracees.iter().enumerate() {
            let regs = tracee.go(libc::PTRACE_CONT)?;
            equal("counter", regs.rsi, left)?;
            equal("DR6", tracee.take_causes()?, 1 << i)?;
        }
    }
    for tracee in tracees {
        tracee.finish()?;
    }
    Ok(Note::Pass)
}

/// The kernel's own store to a watched address (here by pipe) may or may not
/// be reported; it must not be fatal.
fn kernel_access(_: &Ctx) -> Verdict {
    // int3; mov eax,22 (pipe); syscall; nop; ret
    let code = traced(&[0xb8, 22, 0, 0, 0, 0x0f, 0x05, 0x90])?;
    let page = Region::new(4096)?;
    let tracee = Tracee::running(&code, page.addr(), 0)?;
    tracee.set_debug(0, page.addr())?;
    tracee.set_debug(7, enable(0, WRITE, 4))?;
    tracee.resume(libc::PTRACE_CONT, 0)?;
    Ok(Note::Info(match tracee.child.wait() {
        Status::Stopped(libc::SIGTRAP) => "reported".to_string(),
        Status::Exit(0) => "not reported".to_string(),
        status => return Err(format!("tracee: {status}")),
    }))
}
