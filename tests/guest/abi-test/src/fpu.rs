//! Floating point and vector state: kept over switches, signals and fork,
//! fresh after exec, and described truthfully by CPUID and XGETBV.

use crate::harness::{Check, Ctx, Note, Verdict, check, equal, require, slow};
use crate::probe::{self, Code, Ran};
use crate::sys::{self, Region, Status};
use std::arch::asm;
use std::arch::x86_64::__cpuid_count;

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    slow("fpu_preempt", 120, preempt),
    slow("fpu_migrate", 120, migrate),
    check("fpu_over_signal", over_signal),
    check("fpu_over_fork", over_fork),
    check("fpu_after_exec", after_exec),
    check("fpu_xgetbv_cpuid", xgetbv_cpuid),
    check("fpu_features_enabled", features_enabled),
    check("fpu_xsetbv_refused", xsetbv_refused),
    check("fpu_x87_exception", x87_exception),
    check("fpu_simd_exception", simd_exception),
    check("fpu_mxcsr_reserved", mxcsr_reserved),
    check("fpu_cpuid", cpuid_leaves),
];

/// Which registers the CPU and the kernel offer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd)]
enum Width {
    Xmm,
    Ymm,
    Zmm,
}

fn osxsave() -> bool {
    __cpuid_count(1, 0).ecx >> 27 & 1 == 1
}

/// XCR0; 3 (x87 and SSE) without XSAVE.
fn xcr0() -> u64 {
    if !osxsave() {
        return 3;
    }
    let (low, high): (u32, u32);
    // SAFETY: OSXSAVE says that the instruction is enabled.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high) };
    u64::from(low) | u64::from(high) << 32
}

fn width() -> Width {
    let enabled = xcr0();
    if enabled & 0xe6 == 0xe6 && __cpuid_count(7, 0).ebx >> 16 & 1 == 1 {
        Width::Zmm
    } else if enabled & 6 == 6 && __cpuid_count(1, 0).ecx >> 28 & 1 == 1 {
        Width::Ymm
    } else {
        Width::Xmm
    }
}

/// Size of the image that a state block loads and stores: 32 registers of 64
/// bytes, eight mask registers, eight x87 doubles.
const IMAGE: usize = 32 * 64 + 8 * 8 + 8 * 8;
const MASKS: usize = 32 * 64;
const X87: usize = MASKS + 8 * 8;

/// Machine code that loads or stores every register of `width` at `base`
/// (0: rdi, 1: rsi); made by hand because the set differs by CPU.
fn move_all(width: Width, store: bool, rsi: bool) -> Vec<u8> {
    let mut code = Vec::new();
    let rm = if rsi { 6 } else { 7 };
    let count = if width == Width::Zmm { 32 } else { 16 };
    for reg in 0..count as u32 {
        let disp = (reg * 64).to_le_bytes();
        let modrm = 0x80 | ((reg & 7) << 3) as u8 | rm;
        let high = reg >> 3 & 1;
        let opcode = if store { 0x11 } else { 0x10 };
        match width {
            Width::Xmm => {
                // movups
                if high == 1 {
                    code.push(0x44);
                }
                code.extend([0x0f, opcode, modrm]);
            }
            // vmovups ymm: VEX.256.0F
            Width::Ymm => code.extend([0xc5, if high == 1 { 0x7c } else { 0xfc }, opcode, modrm]),
            // vmovups zmm: EVEX.512.0F.W0; R and R' are inverted. A 32-bit
            // displacement is not scaled.
            Width::Zmm => {
                let r = (high ^ 1) << 7;
                let r_high = (reg >> 4 & 1 ^ 1) << 4;
                code.extend([0x62, (0x61 | r | r_high) as u8, 0x7c, 0x48, opcode, modrm]);
            }
        }
        code.extend(disp);
    }
    if width == Width::Zmm {
        for mask in 0..8_u32 {
            // kmovw k,[mem] 90 / kmovw [mem],k 91: VEX.L0.0F.W0
            let modrm = 0x80 | (mask << 3) as u8 | rm;
            code.extend([0xc5, 0xf8, if store { 0x91 } else { 0x90 }, modrm]);
            code.extend((MASKS as u32 + mask * 8).to_le_bytes());
        }
    }
    for slot in 0..8_u32 {
        // fld qword [mem] dd /0; fstp qword [mem] dd /3. Storing pops in reverse.
        let slot = if store { 7 - slot } else { slot };
        code.extend([0xdd, 0x80 | if store { 3 << 3 } else { 0 } | rm]);
        code.extend((X87 as u32 + slot * 8).to_le_bytes());
    }
    code
}

/// fninit; load all from rdi; `middle`; store all to rsi; vzeroupper or not.
fn state_block(middle: &[u8]) -> Result<Code, String> {
    let width = width();
    let mut code = vec![0xdb, 0xe3];
    code.extend(move_all(width, false, false));
    code.extend(middle);
    code.extend(move_all(width, true, true));
    if width != Width::Xmm {
        code.extend([0xc5, 0xf8, 0x77]);
    }
    Code::with_ret(&code)
}

/// Fills an image with a pattern that depends on `seed`.
fn pattern(region: &Region, seed: u64) {
    let zmm = width() == Width::Zmm;
    let lanes = match width() {
        Width::Xmm => 2,
        Width::Ymm => 4,
        Width::Zmm => 8,
    };
    for reg in 0..if zmm { 32 } else { 16 } {
        for lane in 0..lanes {
            let value = seed << 32 | (reg as u64) << 8 | lane as u64;
            region.store(reg * 64 + lane * 8, value);
        }
    }
    for i in 0..8 {
        if zmm {
            region.store(MASKS + i * 8, (seed * 8 + i as u64) & 0xffff);
        }
        region.store(X87 + i * 8, ((seed * 8 + i as u64) as f64).to_bits());
    }
}

fn compare(what: &str, got: &Region, want: &Region) -> Result<(), String> {
    for offset in (0..IMAGE).step_by(8) {
        equal(
            &format!("{what}: image offset {offset:#x}"),
            got.load(offset),
            want.load(offset),
        )?;
    }
    Ok(())
}

/// `push rdi; push rsi; mov ebx?`: yields `edx` times with all state loaded.
fn yields(times: u32) -> Vec<u8> {
    // push rdi; push rsi; mov r9d,times; L: mov eax,24; syscall; mov ecx,2000;
    // M: dec ecx; jnz M; dec r9d; jnz L; pop rsi; pop rdi
    let mut code = vec![0x57, 0x56, 0x41, 0xb9];
    code.extend(times.to_le_bytes());
    code.extend([
        0xb8, 24, 0, 0, 0, 0x0f, 0x05, 0xb9, 0xd0, 0x07, 0, 0, 0xff, 0xc9, 0x75, 0xfc,
    ]);
    code.extend([0x41, 0xff, 0xc9, 0x75, 0xeb, 0x5e, 0x5f]);
    code
}

/// Several processes on each CPU, each with its own pattern in every register.
fn preempt(ctx: &Ctx) -> Verdict {
    let cpus = sys::cpus();
    let rounds = ctx.n(100);
    let children: Vec<_> = (0..cpus.len() * 3)
        .map(|i| {
            let cpu = cpus[i % cpus.len()];
            sys::fork(move || report(hold_state(Some(cpu), i as u64 + 1, rounds)))
        })
        .collect::<Result<_, _>>()?;
    for child in children {
        child.wait_ok("process with its own registers")?;
    }
    Ok(Note::Pass)
}

fn report(result: Result<(), String>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(why) => {
            eprintln!("{why}");
            1
        }
    }
}

fn hold_state(cpu: Option<usize>, seed: u64, rounds: u32) -> Result<(), String> {
    if let Some(cpu) = cpu {
        sys::pin(cpu)?;
    }
    probe::install();
    let (want, got) = (Region::new(IMAGE)?, Region::new(IMAGE)?);
    let code = state_block(&yields(20))?;
    for round in 0..u64::from(rounds) {
        pattern(&want, seed * 1000 + round);
        code.run(want.addr(), got.addr()).value()?;
        compare("registers", &got, &want)?;
    }
    Ok(())
}

/// A process that is moved from CPU to CPU with its registers loaded.
fn migrate(ctx: &Ctx) -> Verdict {
    let cpus = sys::cpus();
    let worker = sys::fork(|| report(hold_state(None, 77, ctx.n(100))))?;
    let mover = sys::fork(|| {
        for round in 0.. {
            // SAFETY: an all-zero set is valid; the size is its own.
            let r = unsafe {
                let mut set: libc::cpu_set_t = std::mem::zeroed();
                libc::CPU_SET(cpus[round % cpus.len()], &mut set);
                libc::sched_setaffinity(worker.pid, size_of::<libc::cpu_set_t>(), &set)
            };
            if r != 0 {
                break;
            }
            sys::yield_now();
        }
        0
    })?;
    let result = worker.wait_ok("moved process");
    mover.kill(libc::SIGKILL);
    mover.wait();
    result.map(|()| Note::Pass)
}

extern "C" fn disturb(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: changes vector and x87 state only, which the frame restores.
    unsafe {
        asm!("fninit", "fldpi", "fstp st(0)", "pxor xmm0, xmm0", "pxor xmm7, xmm7",
             "pxor xmm15, xmm15", out("xmm0") _, out("xmm7") _, out("xmm15") _, out("st(0)") _);
        if osxsave() && xcr0() & 4 != 0 {
            asm!("vzeroall", out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                 out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _, out("xmm8") _,
                 out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _, out("xmm13") _,
                 out("xmm14") _, out("xmm15") _);
        }
    }
}

fn over_signal(ctx: &Ctx) -> Verdict {
    probe::install();
    probe::set_handler(libc::SIGUSR1, disturb, 0);
    let (want, got) = (Region::new(IMAGE)?, Region::new(IMAGE)?);
    // push rdi; push rsi; mov edi,tid; mov esi,SIGUSR1; mov eax,tkill; syscall; pop rsi; pop rdi
    let mut middle = vec![0x57, 0x56, 0xbf];
    middle.extend(sys::gettid().to_le_bytes());
    middle.push(0xbe);
    middle.extend(libc::SIGUSR1.to_le_bytes());
    middle.extend([0xb8, 200, 0, 0, 0, 0x0f, 0x05, 0x5e, 0x5f]);
    let code = state_block(&middle)?;
    for round in 0..ctx.n(200) {
        pattern(&want, u64::from(round) + 5);
        code.run(want.addr(), got.addr()).value()?;
        compare("after the handler", &got, &want)?;
    }
    Ok(Note::Pass)
}

/// A raw fork with all state loaded: both sides store what they have.
fn over_fork(_: &Ctx) -> Verdict {
    probe::install();
    let (want, got) = (Region::new(IMAGE)?, Region::new(IMAGE)?);
    pattern(&want, 3);
    // push rdi; push rsi; mov eax,57; syscall; mov r8,rax; pop rsi; pop rdi; ... store ...; rax = r8
    let width = width();
    let mut code = vec![0xdb, 0xe3];
    code.extend(move_all(width, false, false));
    code.extend([
        0x57, 0x56, 0xb8, 57, 0, 0, 0, 0x0f, 0x05, 0x49, 0x89, 0xc0, 0x5e, 0x5f,
    ]);
    code.extend(move_all(width, true, true));
    if width != Width::Xmm {
        code.extend([0xc5, 0xf8, 0x77]);
    }
    code.extend([0x4c, 0x89, 0xc0]); // mov rax,r8
    let pid = Code::with_ret(&code)?
        .run(want.addr(), got.addr())
        .value()?;
    let result = compare("registers", &got, &want);
    if pid == 0 {
        sys::exit_now(report(result));
    }
    result?;
    sys::Child { pid: pid as i32 }.wait_ok("child")?;
    Ok(Note::Pass)
}

/// What a fresh program finds: run as `abi-test exec-helper fp-state`.
pub fn fresh_state() -> bool {
    let (mut control, mut mxcsr) = (0_u16, 0_u32);
    // SAFETY: stores two control words.
    unsafe {
        asm!("fnstcw [{c}]", "stmxcsr [{m}]", c = in(reg) &raw mut control, m = in(reg) &raw mut mxcsr);
    }
    control == 0x37f && mxcsr & !0x3f == 0x1f80
}

fn after_exec(_: &Ctx) -> Verdict {
    let child = sys::fork(|| {
        let (control, mxcsr) = (0x27f_u16, 0x7f80_u32);
        // SAFETY: changes rounding and precision, which exec must reset.
        unsafe {
            asm!("fldcw [{c}]", "ldmxcsr [{m}]", c = in(reg) &raw const control, m = in(reg) &raw const mxcsr);
        }
        crate::procs::exec_self("fp-state")
    })?;
    equal(
        "control words after exec",
        child.wait(),
        Status::Exit(crate::procs::HELPER_OK),
    )?;
    Ok(Note::Pass)
}

/// CPUID leaf 0xd's sizes follow XCR0.
fn xgetbv_cpuid(_: &Ctx) -> Verdict {
    probe::install();
    if !osxsave() {
        // xor ecx,ecx; xgetbv
        let fault = probe::snippet(&[0x31, 0xc9, 0x0f, 0x01, 0xd0], 0, 0)?.fault()?;
        equal("xgetbv without OSXSAVE", fault.sig, libc::SIGILL)?;
        return Ok(Note::Pass);
    }
    let enabled = xcr0();
    let leaf = __cpuid_count(0xd, 0);
    let supported = u64::from(leaf.eax) | u64::from(leaf.edx) << 32;
    equal("enabled but not supported", enabled & !supported, 0)?;
    equal("x87 and SSE", enabled & 3, 3)?;
    let mut end = 576;
    for feature in (2..63).filter(|f| enabled >> f & 1 == 1) {
        let sub = __cpuid_count(0xd, feature);
        end = end.max(sub.ebx + sub.eax);
    }
    equal("size of the enabled features", leaf.ebx, end)?;
    require(leaf.ecx >= leaf.ebx, || {
        "largest size is below the enabled one".to_string()
    })?;
    Ok(Note::Pass)
}

/// Features that CPUID announces to programs must work.
fn features_enabled(_: &Ctx) -> Verdict {
    probe::install();
    let one = __cpuid_count(1, 0);
    let seven = __cpuid_count(7, 0);
    let enabled = xcr0();
    if osxsave() && one.ecx >> 28 & 1 == 1 {
        equal("XCR0 for AVX", enabled & 6, 6)?;
        probe::snippet(&[0xc5, 0xfc, 0x57, 0xc0, 0xc5, 0xf8, 0x77], 0, 0)?.value()?; // vxorps ymm0
    }
    if osxsave() && seven.ebx >> 16 & 1 == 1 && enabled & 0xe0 == 0xe0 {
        probe::snippet(&[0x62, 0xf1, 0x7c, 0x48, 0x57, 0xc0], 0, 0)?.value()?; // vxorps zmm0
    }
    for (name, has, code) in [
        (
            "rdtscp",
            __cpuid_count(0x8000_0001, 0).edx >> 27 & 1,
            &[0x0f, 0x01, 0xf9][..],
        ),
        ("rdrand", one.ecx >> 30 & 1, &[0x0f, 0xc7, 0xf0][..]),
        ("rdseed", seven.ebx >> 18 & 1, &[0x0f, 0xc7, 0xf8][..]),
        ("popcnt", one.ecx >> 23 & 1, &[0xf3, 0x0f, 0xb8, 0xc7][..]),
        ("rdpid", seven.ecx >> 22 & 1, &[0xf3, 0x0f, 0xc7, 0xf8][..]),
        ("clflush", one.edx >> 19 & 1, &[0x0f, 0xae, 0x3c, 0x24][..]),
    ] {
        if has == 1 {
            probe::snippet(code, 0, 0)?
                .value()
                .map_err(|e| format!("{name}: {e}"))?;
        }
    }
    Ok(Note::Pass)
}

fn xsetbv_refused(_: &Ctx) -> Verdict {
    probe::install();
    // mov eax,1; xor edx,edx; xor ecx,ecx; xsetbv
    let fault = probe::snippet(
        &[0xb8, 1, 0, 0, 0, 0x31, 0xd2, 0x31, 0xc9, 0x0f, 0x01, 0xd1],
        0,
        0,
    )?
    .fault()?;
    require([libc::SIGSEGV, libc::SIGILL].contains(&fault.sig), || {
        fault.brief()
    })?;
    let wanted = if osxsave() {
        libc::SIGSEGV
    } else {
        libc::SIGILL
    };
    equal("signal", fault.sig, wanted)?;
    Ok(Note::Pass)
}

/// An unmasked x87 division by zero.
fn x87_exception(_: &Ctx) -> Verdict {
    probe::install();
    let page = Region::new(4096)?;
    page.store(0, 0x37b);
    // fninit; fldcw [rdi]; fld1; fldz; fdivp; fwait; fninit
    let code = [
        0xdb, 0xe3, 0xd9, 0x2f, 0xd9, 0xe8, 0xd9, 0xee, 0xde, 0xf9, 0x9b, 0xdb, 0xe3,
    ];
    let fault = probe::snippet(&code, page.addr(), 0)?.fault()?;
    equal("signal", fault.sig, libc::SIGFPE)?;
    equal("trapno", fault.trapno, 16)?;
    equal("si_code FPE_FLTDIV", fault.code, 3)?;
    Ok(Note::Pass)
}

/// An unmasked SSE division by zero; not every emulator implements it.
fn simd_exception(_: &Ctx) -> Verdict {
    probe::install();
    let page = Region::new(4096)?;
    page.store(0, 0x1d80);
    page.store(8, 0x1f80);
    // ldmxcsr [rdi]; xorps xmm0,xmm0; mov eax,0x3f800000; movd xmm1,eax; divss xmm1,xmm0; ldmxcsr [rdi+8]
    let code = [
        0x0f, 0xae, 0x17, 0x0f, 0x57, 0xc0, 0xb8, 0, 0, 0x80, 0x3f, 0x66, 0x0f, 0x6e, 0xc8, 0xf3,
        0x0f, 0x5e, 0xc8, 0x0f, 0xae, 0x57, 0x08,
    ];
    Ok(Note::Info(match probe::snippet(&code, page.addr(), 0)? {
        Ran::Returned(_) => "no fault".to_string(),
        Ran::Faulted(f) => format!("signal {} code {} trap {}", f.sig, f.code, f.trapno),
    }))
}

fn mxcsr_reserved(_: &Ctx) -> Verdict {
    probe::install();
    let page = Region::new(4096)?;
    page.store(0, 0xffff_0000_1f80 | 0x8000_0000);
    page.store(8, 0x1f80);
    let code = [0x0f, 0xae, 0x17, 0x0f, 0xae, 0x57, 0x08];
    Ok(Note::Info(match probe::snippet(&code, page.addr(), 0)? {
        Ran::Returned(_) => "accepted".to_string(),
        Ran::Faulted(f) => format!("signal {}", f.sig),
    }))
}

/// An instruction of each extension, and the bit by which CPUID tells of it.
const EXTENSIONS: &[(&str, &[u8], u32, usize, u32)] = &[
    // vaddps ymm0, ymm0, ymm0
    ("avx", &[0xc5, 0xfc, 0x58, 0xc0], 1, 2, 28),
    // vpaddd ymm0, ymm0, ymm0
    ("avx2", &[0xc5, 0xfd, 0xfe, 0xc0], 7, 1, 5),
    // vfmadd132ps xmm0, xmm0, xmm0
    ("fma", &[0xc4, 0xe2, 0x79, 0x98, 0xc0], 1, 2, 12),
    // andn eax, eax, eax: needs no state of XSAVE's (Intel SDM vol. 2A, 2.5.1)
    ("bmi1", &[0xc4, 0xe2, 0x78, 0xf2, 0xc0], 7, 1, 3),
    // mov eax, 7; xor edx, edx; xsave64 [rdi]
    (
        "xsave",
        &[0xb8, 7, 0, 0, 0, 0x31, 0xd2, 0x48, 0x0f, 0xae, 0x27],
        1,
        2,
        26,
    ),
    // xor ecx, ecx; xgetbv; by OSXSAVE
    ("xgetbv", &[0x31, 0xc9, 0x0f, 0x01, 0xd0], 1, 2, 27),
];

/// What a program finds of the CPU's extensions, and what comes of it when it executes one:
/// `NAME=BIT:ok` or `NAME=BIT:SIGNAL` each; and XCR0.
pub fn extensions() -> Result<String, String> {
    probe::install();
    let page = Region::new(8192)?;
    let mut line = String::new();
    for (name, code, leaf, register, bit) in EXTENSIONS {
        let found = __cpuid_count(*leaf, 0);
        let found = [found.eax, found.ebx, found.ecx, found.edx][*register] >> bit & 1;
        let ran = match probe::snippet(code, page.addr(), 0)? {
            Ran::Returned(_) => "ok".to_string(),
            Ran::Faulted(fault) => fault.sig.to_string(),
        };
        line.push_str(&format!("{name}={found}:{ran} "));
    }
    Ok(format!("{line}xcr0={:#x}", xcr0()))
}

/// What CPUID tells a program; the hypervisor leaf differs by nature.
fn cpuid_leaves(_: &Ctx) -> Verdict {
    let one = __cpuid_count(1, 0);
    let seven = __cpuid_count(7, 0);
    let vm = __cpuid_count(0x4000_0000, 0);
    let name: Vec<u8> = [vm.ebx, vm.ecx, vm.edx]
        .iter()
        .flat_map(|r| r.to_le_bytes())
        .collect();
    Ok(Note::Info(format!(
        "1: {:#x} {:#x}, 7: {:#x} {:#x} {:#x}, xcr0 {:#x}, widest {:?}, hypervisor {}",
        one.ecx,
        one.edx,
        seven.ebx,
        seven.ecx,
        seven.edx,
        xcr0(),
        width(),
        String::from_utf8_lossy(&name).trim_matches('\0')
    )))
}
