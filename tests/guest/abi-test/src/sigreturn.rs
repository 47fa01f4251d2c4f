//! What happens when a signal handler returns to a context that it has spoilt:
//! the return path's exceptions must end in a signal and not in the kernel's death.

use crate::harness::{Check, Ctx, Note, Verdict, check, equal, require};
use crate::probe::{self, CSGSFS, Code, Fault, Ran};
use crate::sys::{self, Region};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::SeqCst};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("sigreturn_plain", plain),
    check("sigreturn_bad_cs", bad_cs),
    check("sigreturn_bad_ss", bad_ss),
    check("sigreturn_bad_fs_gs", bad_fs_gs),
    check("sigreturn_compat_cs", compat_cs),
    check("sigreturn_rip", bad_rip),
    check("sigreturn_rsp", bad_rsp),
    check("sigreturn_trap_flag", trap_flag),
    check("sigreturn_flags_filtered", flags_filtered),
    check("sigreturn_ac_flag", ac_flag),
    check("sigreturn_fp_pointer", fp_pointer),
    check("sigreturn_fp_garbage", fp_garbage),
    check("sigreturn_no_frame", no_frame),
    check("sigreturn_bad_storm", bad_storm),
];

/// Which part of the context the handler changes, and to what.
static WHAT: AtomicI32 = AtomicI32::new(0);
static VALUE: AtomicU64 = AtomicU64::new(0);

const NOTHING: i32 = 0;
const CS: i32 = 1;
const SS: i32 = 2;
const RIP: i32 = 3;
const RSP: i32 = 4;
const FLAGS_OR: i32 = 5;
const CS_AND_RIP: i32 = 6;
const FP_POINTER: i32 = 7;
const FP_HEADER: i32 = 8;
const FP_MXCSR: i32 = 9;
const FS_GS: i32 = 10;

static RIP_TOO: AtomicU64 = AtomicU64::new(0);

extern "C" fn spoil(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the argument of a running handler.
    let regs = unsafe { probe::saved_registers(context) };
    let value = VALUE.load(SeqCst);
    let selectors = regs[CSGSFS] as u64;
    match WHAT.load(SeqCst) {
        CS => regs[CSGSFS] = (selectors & !0xffff | value) as i64,
        SS => regs[CSGSFS] = (selectors & !(0xffff << 48) | value << 48) as i64,
        FS_GS => regs[CSGSFS] = (selectors & !(0xffff_ffff << 16) | value << 16) as i64,
        RIP => regs[libc::REG_RIP as usize] = value as i64,
        RSP => regs[libc::REG_RSP as usize] = value as i64,
        FLAGS_OR => regs[libc::REG_EFL as usize] |= value as i64,
        CS_AND_RIP => {
            regs[CSGSFS] = (selectors & !0xffff | value) as i64;
            regs[libc::REG_RIP as usize] = RIP_TOO.load(SeqCst) as i64;
        }
        what @ (FP_POINTER | FP_HEADER | FP_MXCSR) => {
            // SAFETY: the kernel's ucontext, and its FP state when there is one.
            unsafe {
                let machine = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext;
                let state = machine.fpregs.cast::<u8>();
                match what {
                    FP_POINTER => machine.fpregs = value as *mut _,
                    // The XSAVE header follows the 512-byte legacy area.
                    FP_HEADER => state.add(512).cast::<u64>().write_unaligned(value),
                    _ => state.add(24).cast::<u32>().write_unaligned(value as u32),
                }
            }
        }
        _ => {}
    }
}

/// `mov eax,tkill; syscall; pushf; pop rax; ret`: the signal comes at the end
/// of the call; what follows runs with the context that the handler left.
const SIGNAL_SELF: &[u8] = &[0xb8, 200, 0, 0, 0, 0x0f, 0x05, 0x9c, 0x58, 0xc3];

fn prepare() -> Result<Code, String> {
    probe::install();
    probe::set_handler(libc::SIGUSR1, spoil, 0);
    Code::new(SIGNAL_SELF)
}

fn spoilt(code: &Code, what: i32, value: u64) -> Ran {
    WHAT.store(what, SeqCst);
    VALUE.store(value, SeqCst);
    code.run(sys::gettid() as u64, libc::SIGUSR1 as u64)
}

/// Fails unless each value ends in one of the signals.
fn all_end_in(sigs: &[i32], what: i32, values: &[u64]) -> Verdict {
    let code = prepare()?;
    let mut wrong = Vec::new();
    for &value in values {
        match spoilt(&code, what, value) {
            Ran::Faulted(f) if sigs.contains(&f.sig) => {}
            other => wrong.push(format!("{value:#x}: {}", other.brief())),
        }
        // And the way back still works.
        spoilt(&code, NOTHING, 0).value()?;
    }
    require(wrong.is_empty(), || wrong.join(", "))?;
    Ok(Note::Pass)
}

fn plain(ctx: &Ctx) -> Verdict {
    let code = prepare()?;
    for _ in 0..ctx.n(2000) {
        spoilt(&code, NOTHING, 0).value()?;
    }
    Ok(Note::Pass)
}

/// Ring 0 by value (Linux forces RPL 3), null, data, system, past the table,
/// LDT without entries, and a PV hypervisor's selectors.
fn bad_cs(_: &Ctx) -> Verdict {
    let values = [
        0x10, 0x13, 0x08, 0x0b, 0x00, 0x03, 0x2b, 0x18, 0x40, 0x43, 0x07, 0xfff3, 0xe008, 0xe00b,
    ];
    // 0x08 and 0x10 may be user code to a PV guest, where descriptors have
    // DPL 3; there the snippet goes on and returns. Nothing else may.
    let code = prepare()?;
    let mut wrong = Vec::new();
    for value in values {
        let kernel_code = matches!(value & !3, 0x08 | 0x10);
        match spoilt(&code, CS, value) {
            Ran::Faulted(f) if [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL].contains(&f.sig) => {}
            Ran::Returned(_) if kernel_code => {}
            other => wrong.push(format!("{value:#x}: {}", other.brief())),
        }
        spoilt(&code, NOTHING, 0).value()?;
    }
    require(wrong.is_empty(), || wrong.join(", "))?;
    Ok(Note::Pass)
}

fn bad_ss(_: &Ctx) -> Verdict {
    all_end_in(
        &[libc::SIGSEGV, libc::SIGBUS],
        SS,
        &[
            0x33, 0x23, 0x40, 0x43, 0x07, 0x0f, 0xfff3, 0xe008, 0xe00b, 0xe010, 0xe013,
        ],
    )
}

/// The 64-bit sigcontext carries fs and gs, but Linux does not load them.
fn bad_fs_gs(_: &Ctx) -> Verdict {
    let code = prepare()?;
    for value in [0xfff3_fff3, 0x0010_0010, 0x0007_0007, 0xe00b_e00b] {
        spoilt(&code, FS_GS, value).value()?;
    }
    Ok(Note::Pass)
}

/// Return to a compatibility-mode selector, below and above 4 GiB.
fn compat_cs(_: &Ctx) -> Verdict {
    let code = prepare()?;
    let target = Code::new(&[0x0f, 0x0b])?; // ud2
    RIP_TOO.store(target.addr(), SeqCst);
    let fault = spoilt(&code, CS_AND_RIP, 0x23).fault()?;
    equal("signal", fault.sig, libc::SIGILL)?;
    equal("cs in the frame", fault.selectors & 0xffff, 0x23)?;
    equal("rip", fault.rip, target.addr())?;
    RIP_TOO.store(0x7fff_0000_0000 | target.addr(), SeqCst);
    let fault = spoilt(&code, CS_AND_RIP, 0x23).fault()?;
    require([libc::SIGSEGV, libc::SIGILL].contains(&fault.sig), || {
        fault.brief()
    })?;
    Ok(Note::Pass)
}

fn segv_at(fault: &Fault, addr: u64) -> Result<(), String> {
    equal("signal", fault.sig, libc::SIGSEGV)?;
    equal("si_addr", fault.addr, addr)
}

fn bad_rip(_: &Ctx) -> Verdict {
    let code = prepare()?;
    for addr in [
        0,
        0x7fff_ffff_f000,
        0xffff_8000_0000_0000,
        0xffff_82d0_8000_0000,
        0xffff_ffff_8100_0000,
    ] {
        segv_at(&spoilt(&code, RIP, addr).fault()?, addr).map_err(|e| format!("{addr:#x}: {e}"))?;
    }
    for addr in [
        0x0100_0000_0000_0000,
        0x8000_0000_0000_0000,
        0xfffe_ffff_ffff_ffff,
    ] {
        let fault = spoilt(&code, RIP, addr).fault()?;
        equal(&format!("signal for {addr:#x}"), fault.sig, libc::SIGSEGV)?;
    }
    spoilt(&code, NOTHING, 0).value()?;
    Ok(Note::Pass)
}

fn bad_rsp(_: &Ctx) -> Verdict {
    all_end_in(
        &[libc::SIGSEGV, libc::SIGBUS],
        RSP,
        &[
            0,
            8,
            0x0100_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0xffff_8000_0000_0800,
            0xffff_ffff_8100_0000,
            0xffff_ffff_ffff_fff8,
        ],
    )
}

fn trap_flag(_: &Ctx) -> Verdict {
    let code = prepare()?;
    let fault = spoilt(&code, FLAGS_OR, 1 << 8).fault()?;
    equal("signal", fault.sig, libc::SIGTRAP)?;
    equal("trapno", fault.trapno, 1)?;
    // The step ends behind the first instruction after the system call.
    equal("rip", fault.rip, code.addr() + 8)?;
    Ok(Note::Pass)
}

/// IOPL, NT, VM, VIF, VIP and a cleared IF do not come back from a frame.
fn flags_filtered(_: &Ctx) -> Verdict {
    let code = prepare()?;
    let privileged = 3 << 12 | 1 << 14 | 1 << 17 | 1 << 19 | 1 << 20;
    let flags = spoilt(&code, FLAGS_OR, privileged).value()?;
    equal("privileged flags", flags & privileged, 0)?;
    equal("IF", flags >> 9 & 1, 1)?;
    let fault = probe::snippet(&[0xfa], 0, 0)?.fault()?; // cli
    equal("cli afterwards", fault.sig, libc::SIGSEGV)?;
    let fault = probe::snippet(&[0xe4, 0x80], 0, 0)?.fault()?; // in al,0x80
    equal("in afterwards", fault.sig, libc::SIGSEGV)?;
    Ok(Note::Pass)
}

/// AC, DF and the arithmetic flags do come back.
fn ac_flag(_: &Ctx) -> Verdict {
    let code = Code::new(&[
        0xb8, 200, 0, 0, 0, 0x0f, 0x05, // as SIGNAL_SELF
        0x9c, 0x58, // pushf; pop rax
        0x9c, 0x81, 0x24, 0x24, 0xff, 0xfb, 0xfb, 0xff,
        0x9d, // pushf; and dword [rsp],~AC~DF; popf
        0xc3,
    ])?;
    prepare()?;
    let want = 1 << 18 | 1 << 10 | 1 << 11 | 1;
    let flags = spoilt(&code, FLAGS_OR, want).value()?;
    equal("AC, DF, OF, CF", flags & want, want)?;
    Ok(Note::Pass)
}

fn fp_pointer(_: &Ctx) -> Verdict {
    let page = Region::new(4096)?;
    page.protect(libc::PROT_NONE)?;
    all_end_in(
        &[libc::SIGSEGV],
        FP_POINTER,
        &[
            8,
            page.addr(),
            0xffff_8000_0000_0000,
            0xffff_ffff_8100_0000,
            0x1234_5678_9abc_def0,
        ],
    )
}

/// Feature bits that the CPU does not have, and bad MXCSR bits: refused, or
/// cleaned; the process and the kernel go on.
fn fp_garbage(_: &Ctx) -> Verdict {
    let code = prepare()?;
    let mut out = Vec::new();
    for (name, what, value) in [
        ("xstate_bv", FP_HEADER, u64::MAX),
        ("mxcsr", FP_MXCSR, 0xffff_ffff),
    ] {
        let end = match spoilt(&code, what, value) {
            Ran::Returned(_) => "cleaned".to_string(),
            Ran::Faulted(f) => format!("signal {}", f.sig),
        };
        out.push(format!("{name} {end}"));
        spoilt(&code, NOTHING, 0).value()?;
    }
    Ok(Note::Info(out.join(", ")))
}

/// rt_sigreturn called with no frame on the stack.
fn no_frame(_: &Ctx) -> Verdict {
    probe::install();
    let stack = Region::new(8192)?;
    // mov rsp,rdi; mov eax,15; syscall
    let code = Code::new(&[0x48, 0x89, 0xfc, 0xb8, 15, 0, 0, 0, 0x0f, 0x05, 0x0f, 0x0b])?;
    for rsp in [
        stack.addr() + 2048,
        0x1000,
        0xffff_8000_0000_0000,
        0x1234_5678_9abc_def0,
    ] {
        let fault = code.run(rsp, 0).fault()?;
        equal(
            &format!("signal for rsp {rsp:#x}"),
            fault.sig,
            libc::SIGSEGV,
        )?;
    }
    Ok(Note::Pass)
}

/// The failing return path again and again, with other processes about.
fn bad_storm(ctx: &Ctx) -> Verdict {
    let cpu = sys::cpus()[0];
    let rounds = ctx.n(1000);
    let children: Vec<_> = (0..3)
        .map(|i| {
            sys::fork(|| {
                let storm = || -> Result<(), String> {
                    sys::pin(cpu)?;
                    let code = prepare()?;
                    for _ in 0..rounds {
                        let (what, value) = [(CS, 0x2b), (SS, 0x33), (RIP, 1 << 47)][i];
                        let fault = spoilt(&code, what, value).fault()?;
                        require([libc::SIGSEGV, libc::SIGBUS].contains(&fault.sig), || {
                            fault.brief()
                        })?;
                        sys::yield_now();
                    }
                    Ok(())
                };
                i32::from(storm().is_err())
            })
        })
        .collect::<Result<_, _>>()?;
    for child in children {
        child.wait_ok("storm")?;
    }
    Ok(Note::Pass)
}
