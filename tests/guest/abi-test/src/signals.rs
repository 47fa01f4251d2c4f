//! Faults as signals: numbers, codes, addresses, error codes; alternate
//! stacks and nesting.

use crate::harness::{Check, Ctx, Note, Verdict, check, equal, require};
use crate::probe::{self, Code, Fault, Ran};
use crate::sys::{self, Region};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::SeqCst};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("sig_segv_read", segv_read),
    check("sig_segv_write", segv_write),
    check("sig_segv_read_only", segv_read_only),
    check("sig_segv_exec_nx", segv_exec),
    check("sig_segv_prot_none", segv_prot_none),
    check("sig_segv_non_canonical", segv_non_canonical),
    check("sig_kernel_ranges", kernel_ranges),
    check("sig_fpe_divide", fpe),
    check("sig_ill_ud2", ill),
    check("sig_trap_int3", int3),
    check("sig_trap_icebp", icebp),
    check("sig_bus_past_eof", bus),
    check("sig_stack_fault", stack_fault),
    check("sig_alignment", alignment),
    check("sig_altstack", altstack),
    check("sig_nested", nested),
    check("sig_mask_pending", mask_pending),
    check("sig_queue_value", queue_value),
    check("sig_deliver_many", deliver_many),
    check("sig_restart_eintr", eintr),
    check("sig_registers_kept", registers_kept),
    check("sig_red_zone", red_zone),
    check("sig_fault_storm", fault_storm),
];

const SEGV_MAPERR: i32 = 1;
const SEGV_ACCERR: i32 = 2;
const SI_KERNEL: i32 = 0x80;

/// Error code bits of a page fault.
const PF_PROT: u64 = 1;
const PF_WRITE: u64 = 2;
const PF_USER: u64 = 4;
const PF_INSTR: u64 = 16;

fn expect_page_fault(fault: &Fault, code: i32, addr: u64, err: u64) -> Result<(), String> {
    equal("signal", fault.sig, libc::SIGSEGV)?;
    equal("si_code", fault.code, code)?;
    equal("si_addr", fault.addr, addr)?;
    equal("trapno", fault.trapno, 14)?;
    equal("cr2", fault.cr2, addr)?;
    equal("error code", fault.err, err)
}

fn segv_read(_: &Ctx) -> Verdict {
    probe::install();
    for addr in [0x0_u64, 0x18, 0x1000_0000_0ff8] {
        let fault = probe::load(addr)?.fault()?;
        expect_page_fault(&fault, SEGV_MAPERR, addr, PF_USER)?;
    }
    Ok(Note::Pass)
}

fn segv_write(_: &Ctx) -> Verdict {
    probe::install();
    for addr in [0x0_u64, 0x18, 0x1000_0000_0ff8] {
        let fault = probe::store(addr, 1)?.fault()?;
        expect_page_fault(&fault, SEGV_MAPERR, addr, PF_USER | PF_WRITE)?;
    }
    Ok(Note::Pass)
}

fn segv_read_only(_: &Ctx) -> Verdict {
    probe::install();
    let page = Region::new(4096)?;
    page.store(0, 7);
    page.protect(libc::PROT_READ)?;
    let fault = probe::store(page.addr() + 8, 1)?.fault()?;
    expect_page_fault(
        &fault,
        SEGV_ACCERR,
        page.addr() + 8,
        PF_PROT | PF_USER | PF_WRITE,
    )?;
    equal("value", page.load(0), 7)?;
    page.protect(libc::PROT_READ | libc::PROT_WRITE)?;
    probe::store(page.addr() + 8, 9)?.value()?;
    equal("value after PROT_WRITE", page.load(8), 9)?;
    Ok(Note::Pass)
}

fn segv_exec(_: &Ctx) -> Verdict {
    probe::install();
    let page = Region::new(4096)?;
    page.fill(0, &[0xb8, 5, 0, 0, 0, 0xc3]); // mov eax,5; ret
    let fault = probe::run(page.addr(), 0, 0).fault()?;
    expect_page_fault(
        &fault,
        SEGV_ACCERR,
        page.addr(),
        PF_PROT | PF_USER | PF_INSTR,
    )?;
    equal("rip", fault.rip, page.addr())?;
    page.protect(libc::PROT_READ | libc::PROT_EXEC)?;
    equal("after PROT_EXEC", probe::run(page.addr(), 0, 0).value()?, 5)?;
    page.protect(libc::PROT_READ)?;
    let fault = probe::run(page.addr(), 0, 0).fault()?;
    equal("error code again", fault.err, PF_PROT | PF_USER | PF_INSTR)?;
    let fault = probe::run(0x1000_0000_0000, 0, 0).fault()?;
    expect_page_fault(&fault, SEGV_MAPERR, 0x1000_0000_0000, PF_USER | PF_INSTR)?;
    Ok(Note::Pass)
}

fn segv_prot_none(_: &Ctx) -> Verdict {
    probe::install();
    let page = Region::new(4096)?;
    page.store(0, 3);
    page.protect(libc::PROT_NONE)?;
    let fault = probe::load(page.addr())?.fault()?;
    equal("signal", fault.sig, libc::SIGSEGV)?;
    equal("si_code", fault.code, SEGV_ACCERR)?;
    equal("si_addr", fault.addr, page.addr())?;
    page.protect(libc::PROT_READ)?;
    equal("value", probe::load(page.addr())?.value()?, 3)?;
    Ok(Note::Pass)
}

fn segv_non_canonical(_: &Ctx) -> Verdict {
    probe::install();
    // Not canonical with 48 bits nor with 57.
    for addr in [
        0x0100_0000_0000_0000_u64,
        0x1234_5678_9abc_def0,
        0xfff0_0000_0000_0000,
    ] {
        for (what, ran) in [
            ("load", probe::load(addr)?),
            ("store", probe::store(addr, 1)?),
            ("jump", probe::run(addr, 0, 0)),
        ] {
            let fault = ran.fault()?;
            equal(&format!("{what} {addr:#x}"), fault.sig, libc::SIGSEGV)?;
        }
    }
    let fault = probe::load(0xdead_0000_0000_0000)?.fault()?;
    equal("si_code", fault.code, SI_KERNEL)?;
    equal("trapno", fault.trapno, 13)?;
    Ok(Note::Pass)
}

/// Addresses of the kernel, of a PV hypervisor's hole and of its tables are
/// out of reach for loads, stores and jumps, and look like any kernel address.
fn kernel_ranges(_: &Ctx) -> Verdict {
    probe::install();
    let mut addrs = vec![
        0xffff_8000_0000_0000_u64, // hypervisor hole: M2P table under Xen PV
        0xffff_8000_0000_1000,
        0xffff_8040_0000_0000,
        0xffff_82d0_8000_0000,
        0xffff_87ff_ffff_f000,
        0xffff_8800_0000_0000, // direct map
        0xffff_8880_0000_1000,
        0xffff_c900_0000_0000,
        0xffff_ea00_0000_0000,
        0xffff_fe00_0000_0000, // CPU entry area
        0xffff_ffff_8100_0000, // kernel text
        0xffff_ffff_a000_0000,
        0xffff_ffff_ff57_8000, // fixmap
        0xffff_ffff_ffff_f000,
    ];
    addrs.extend((256..272_u64).map(|slot| 0xffff_0000_0000_0000 | slot << 39));
    let mut wrong = Vec::new();
    for addr in addrs {
        for (what, ran) in [
            ("load", probe::load(addr)?),
            ("store", probe::store(addr, 1)?),
            ("jump", probe::run(addr, 0, 0)),
        ] {
            match ran {
                Ran::Faulted(f) if f.sig == libc::SIGSEGV && f.addr == addr => {}
                other => wrong.push(format!("{what} {addr:#x}: {}", other.brief())),
            }
        }
    }
    require(wrong.is_empty(), || wrong.join(", "))?;
    Ok(Note::Pass)
}

fn fpe(_: &Ctx) -> Verdict {
    probe::install();
    // xor edx,edx; xor ecx,ecx; mov eax,1; div ecx
    let code = Code::with_ret(&[0x31, 0xd2, 0x31, 0xc9, 0xb8, 1, 0, 0, 0, 0xf7, 0xf1])?;
    let fault = code.run(0, 0).fault()?;
    equal("signal", fault.sig, libc::SIGFPE)?;
    equal("si_code FPE_INTDIV", fault.code, 1)?;
    equal("trapno", fault.trapno, 0)?;
    equal("si_addr", fault.addr, code.addr() + 9)?;
    equal("rip", fault.rip, code.addr() + 9)?;
    Ok(Note::Pass)
}

fn ill(_: &Ctx) -> Verdict {
    probe::install();
    let code = Code::with_ret(&[0x90, 0x0f, 0x0b])?;
    let fault = code.run(0, 0).fault()?;
    equal("signal", fault.sig, libc::SIGILL)?;
    equal("si_code ILL_ILLOPN", fault.code, 2)?;
    equal("trapno", fault.trapno, 6)?;
    equal("rip", fault.rip, code.addr() + 1)?;
    Ok(Note::Pass)
}

fn int3(_: &Ctx) -> Verdict {
    probe::install();
    let code = Code::with_ret(&[0x90, 0xcc])?;
    let fault = code.run(0, 0).fault()?;
    equal("signal", fault.sig, libc::SIGTRAP)?;
    equal("si_code", fault.code, SI_KERNEL)?;
    equal("trapno", fault.trapno, 3)?;
    equal("rip behind int3", fault.rip, code.addr() + 2)?;
    Ok(Note::Pass)
}

/// icebp is a debug trap behind the instruction; some emulators refuse it.
fn icebp(_: &Ctx) -> Verdict {
    probe::install();
    let code = Code::with_ret(&[0xf1])?;
    let fault = code.run(0, 0).fault()?;
    let past = fault.rip - code.addr();
    Ok(Note::Info(format!(
        "signal {} trap {}, rip {past} past it",
        fault.sig, fault.trapno
    )))
}

/// A file mapping that reaches past the end of its file.
fn bus(_: &Ctx) -> Verdict {
    probe::install();
    // SAFETY: a new memfd and a mapping of it, both released with the process.
    let at = unsafe {
        let fd = libc::memfd_create(c"abi-test".as_ptr(), 0);
        if fd < 0 || libc::ftruncate(fd, 4096) != 0 {
            return Err(format!("memfd: {}", sys::last_error()));
        }
        libc::mmap(
            std::ptr::null_mut(),
            8192,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            fd,
            0,
        )
    } as u64;
    equal("inside the file", probe::load(at)?.value()?, 0)?;
    let fault = probe::load(at + 4096)?.fault()?;
    equal("signal", fault.sig, libc::SIGBUS)?;
    equal("si_code BUS_ADRERR", fault.code, 2)?;
    equal("si_addr", fault.addr, at + 4096)?;
    Ok(Note::Pass)
}

/// A push through a non-canonical stack pointer is #SS, which Linux makes
/// SIGBUS; emulators that raise #GP for it make it SIGSEGV.
fn stack_fault(_: &Ctx) -> Verdict {
    probe::install();
    // mov rsp,rdi; push rax
    let fault = probe::snippet(&[0x48, 0x89, 0xfc, 0x50], 0x1234_5678_9abc_def0, 0)?.fault()?;
    let known = [(libc::SIGBUS, 12), (libc::SIGSEGV, 13)].contains(&(fault.sig, fault.trapno));
    require(known, || fault.brief())?;
    equal("rsp", fault.rsp, 0x1234_5678_9abc_def0)?;
    Ok(Note::Pass)
}

/// Alignment check with AC set; not every emulator implements it.
fn alignment(_: &Ctx) -> Verdict {
    probe::install();
    let page = Region::new(4096)?;
    // pushf; or dword [rsp],1<<18; popf; mov rax,[rdi]; pushf; and dword [rsp],~(1<<18); popf
    let code = [
        0x9c, 0x81, 0x0c, 0x24, 0, 0, 4, 0, 0x9d, 0x48, 0x8b, 0x07, 0x9c, 0x81, 0x24, 0x24, 0xff,
        0xff, 0xfb, 0xff, 0x9d,
    ];
    Ok(Note::Info(
        match probe::snippet(&code, page.addr() + 1, 0)? {
            Ran::Returned(_) => "no fault".to_string(),
            Ran::Faulted(f) => format!("signal {} code {} trap {}", f.sig, f.code, f.trapno),
        },
    ))
}

static SEEN: AtomicU64 = AtomicU64::new(0);
static DEPTH: AtomicI32 = AtomicI32::new(0);
static MAX_DEPTH: AtomicI32 = AtomicI32::new(0);

extern "C" fn note_stack(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let local = 0_u8;
    SEEN.store(&raw const local as u64, SeqCst);
}

fn altstack(_: &Ctx) -> Verdict {
    let stack = Region::new(64 * 1024)?;
    let setting = libc::stack_t {
        ss_sp: stack.addr() as *mut libc::c_void,
        ss_flags: 0,
        ss_size: stack.len(),
    };
    // SAFETY: the region lives until the end of this check.
    let r = unsafe { libc::sigaltstack(&setting, std::ptr::null_mut()) };
    equal("sigaltstack", r, 0)?;
    probe::set_handler(libc::SIGUSR1, note_stack, 0);
    raise(libc::SIGUSR1);
    let at = SEEN.load(SeqCst);
    require(
        at >= stack.addr() && at < stack.addr() + stack.len() as u64,
        || format!("handler ran at {at:#x}, outside the alternate stack"),
    )?;
    Ok(Note::Pass)
}

fn raise(sig: i32) {
    // SAFETY: integers only.
    unsafe { libc::raise(sig) };
}

extern "C" fn nest(sig: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let depth = DEPTH.fetch_add(1, SeqCst) + 1;
    MAX_DEPTH.fetch_max(depth, SeqCst);
    if depth < 8 {
        raise(if sig == libc::SIGUSR1 {
            libc::SIGUSR2
        } else {
            libc::SIGUSR1
        });
    }
    SEEN.fetch_add(1, SeqCst);
    DEPTH.fetch_sub(1, SeqCst);
}

fn nested(_: &Ctx) -> Verdict {
    probe::alternate_stack();
    SEEN.store(0, SeqCst);
    probe::set_handler(libc::SIGUSR1, nest, libc::SA_NODEFER);
    probe::set_handler(libc::SIGUSR2, nest, libc::SA_NODEFER);
    raise(libc::SIGUSR1);
    equal("deepest nesting", MAX_DEPTH.load(SeqCst), 8)?;
    equal("handlers finished", SEEN.load(SeqCst), 8)?;
    Ok(Note::Pass)
}

extern "C" fn count(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    SEEN.fetch_add(1, SeqCst);
}

fn mask(how: i32, sig: i32) {
    // SAFETY: the sets are valid; the calls change only this thread's mask.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, sig);
        libc::sigprocmask(how, &set, std::ptr::null_mut());
    }
}

fn mask_pending(_: &Ctx) -> Verdict {
    SEEN.store(0, SeqCst);
    probe::set_handler(libc::SIGUSR1, count, 0);
    mask(libc::SIG_BLOCK, libc::SIGUSR1);
    raise(libc::SIGUSR1);
    raise(libc::SIGUSR1);
    equal("while blocked", SEEN.load(SeqCst), 0)?;
    mask(libc::SIG_UNBLOCK, libc::SIGUSR1);
    equal(
        "after unblocking (standard signals merge)",
        SEEN.load(SeqCst),
        1,
    )?;
    Ok(Note::Pass)
}

extern "C" fn take_value(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: a queued signal carries a value.
    let value = unsafe { (*info).si_value().sival_ptr } as u64;
    SEEN.fetch_add(value, SeqCst);
}

fn queue_value(_: &Ctx) -> Verdict {
    SEEN.store(0, SeqCst);
    let sig = libc::SIGRTMIN() + 1;
    probe::set_handler(sig, take_value, 0);
    mask(libc::SIG_BLOCK, sig);
    for i in 1..=10_usize {
        // SAFETY: signals this process; the value is a number.
        unsafe {
            let value = libc::sigval {
                sival_ptr: (i * 1000) as *mut libc::c_void,
            };
            libc::sigqueue(libc::getpid(), sig, value);
        }
    }
    mask(libc::SIG_UNBLOCK, sig);
    equal("sum of ten queued values", SEEN.load(SeqCst), 55_000)?;
    Ok(Note::Pass)
}

fn deliver_many(ctx: &Ctx) -> Verdict {
    SEEN.store(0, SeqCst);
    probe::set_handler(libc::SIGUSR1, count, 0);
    let n = ctx.n(20_000);
    for _ in 0..n {
        raise(libc::SIGUSR1);
    }
    equal("deliveries", SEEN.load(SeqCst), u64::from(n))?;
    Ok(Note::Pass)
}

fn eintr(_: &Ctx) -> Verdict {
    probe::set_handler(libc::SIGALRM, count, 0);
    let (reader, _writer) = std::io::pipe().map_err(|e| e.to_string())?;
    let timer = libc::itimerval {
        it_interval: libc::timeval {
            tv_sec: 0,
            tv_usec: 20_000,
        },
        it_value: libc::timeval {
            tv_sec: 0,
            tv_usec: 20_000,
        },
    };
    let mut byte = 0_u8;
    // SAFETY: a valid timer setting, and a read into one byte.
    let (n, error) = unsafe {
        libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut());
        let fd = std::os::fd::AsRawFd::as_raw_fd(&reader);
        (libc::read(fd, (&raw mut byte).cast(), 1), sys::errno())
    };
    equal("read", n, -1)?;
    equal("errno", error, libc::EINTR)?;
    Ok(Note::Pass)
}

/// A fault inside a snippet leaves every general register as it was.
fn registers_kept(_: &Ctx) -> Verdict {
    let page = Region::new(4096)?;
    probe::alternate_stack();
    FIX_PAGE.store(page.addr(), SeqCst);
    probe::set_handler(libc::SIGSEGV, make_readable, 0);
    page.protect(libc::PROT_NONE)?;
    let mut bad = 0_u64;
    // SAFETY: loads from a page that the handler makes readable; every
    // register that is changed is listed.
    unsafe {
        std::arch::asm!(
            "push rbx", "push rbp",
            "mov rax, 1", "mov rbx, 2", "mov rcx, 3", "mov rdx, 4", "mov rsi, 5", "mov rbp, 7",
            "mov r8, 8", "mov r9, 9", "mov r10, 10", "mov r11, 11", "mov r12, 12", "mov r13, 13",
            "mov r14, 14",
            "add r15, [rdi]",
            "sub rax, 1", "sub rbx, 2", "sub rcx, 3", "sub rdx, 4", "sub rsi, 5", "sub rbp, 7",
            "sub r8, 8", "sub r9, 9", "sub r10, 10", "sub r11, 11", "sub r12, 12", "sub r13, 13",
            "sub r14, 14",
            "or rax, rbx", "or rax, rcx", "or rax, rdx", "or rax, rsi", "or rax, rbp",
            "or rax, r8", "or rax, r9", "or rax, r10", "or rax, r11", "or rax, r12",
            "or rax, r13", "or rax, r14",
            "pop rbp", "pop rbx",
            inout("rdi") page.addr() => _, inout("r15") 0_u64 => _, lateout("rax") bad,
            out("rcx") _, out("rdx") _, out("rsi") _, out("r8") _, out("r9") _, out("r10") _,
            out("r11") _, out("r12") _, out("r13") _, out("r14") _,
        );
    }
    equal("difference of registers", bad, 0)?;
    Ok(Note::Pass)
}

static FIX_PAGE: AtomicU64 = AtomicU64::new(0);

extern "C" fn make_readable(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the page belongs to the check that runs.
    unsafe { libc::mprotect(FIX_PAGE.load(SeqCst) as *mut _, 4096, libc::PROT_READ) };
}

/// Signals must not touch the 128 bytes below the stack pointer.
fn red_zone(ctx: &Ctx) -> Verdict {
    probe::set_handler(libc::SIGALRM, count, 0);
    SEEN.store(0, SeqCst);
    let timer = libc::itimerval {
        it_interval: libc::timeval {
            tv_sec: 0,
            tv_usec: 1000,
        },
        it_value: libc::timeval {
            tv_sec: 0,
            tv_usec: 1000,
        },
    };
    // SAFETY: a valid timer setting.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()) };
    // Fills the red zone, waits in it, and compares: rdi counts down.
    // 1: mov [rsp-128],rdi; mov [rsp-8],rdi; mov ecx,10000; 2: dec ecx; jnz 2b
    //    cmp [rsp-128],rdi; jne 3f; cmp [rsp-8],rdi; jne 3f; dec rdi; jnz 1b
    //    xor eax,eax; ret; 3: mov eax,1; ret
    let code = Code::new(&[
        0x48, 0x89, 0x7c, 0x24, 0x80, 0x48, 0x89, 0x7c, 0x24, 0xf8, 0xb9, 0x10, 0x27, 0, 0, 0xff,
        0xc9, 0x75, 0xfc, 0x48, 0x39, 0x7c, 0x24, 0x80, 0x75, 0x0f, 0x48, 0x39, 0x7c, 0x24, 0xf8,
        0x75, 0x08, 0x48, 0xff, 0xcf, 0x75, 0xda, 0x31, 0xc0, 0xc3, 0xb8, 1, 0, 0, 0, 0xc3,
    ])?;
    let rounds = u64::from(ctx.n(20_000));
    equal(
        "red zone damaged",
        probe::run(code.addr(), rounds, 0).value()?,
        0,
    )?;
    require(SEEN.load(SeqCst) > 0, || {
        "no timer signal arrived".to_string()
    })?;
    Ok(Note::Pass)
}

/// Thousands of faults in a row, each with the right address.
fn fault_storm(ctx: &Ctx) -> Verdict {
    probe::install();
    let code = Code::with_ret(probe::STORE)?;
    for i in 0..u64::from(ctx.n(5000)) {
        let addr = 0x2000_0000_0000 + i * 0x1234_5008;
        let fault = code.run(addr, 1).fault()?;
        equal("si_addr", fault.addr, addr)?;
    }
    Ok(Note::Pass)
}
