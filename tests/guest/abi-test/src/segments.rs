//! Segment registers, descriptor tables and the FS and GS bases.

use crate::harness::{Check, Ctx, Note, Verdict, check, equal, require};
use crate::probe::{self, Code, Ran};
use crate::sys::{self, Region};
use std::arch::{asm, global_asm};

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("seg_load_good", load_good),
    check("seg_load_bad", load_bad),
    check("seg_load_kernel_and_reserved", load_reserved),
    check("seg_stack_selector", stack_selector),
    check("seg_cpu_number_by_lsl", lsl_cpu),
    check("seg_lar_lsl_verr", lar),
    check("seg_arch_prctl", arch_prctl),
    check("seg_fsgsbase_offered", fsgsbase_offered),
    check("seg_fsgsbase", fsgsbase),
    check("seg_non_canonical_base", non_canonical_base),
    check("seg_gs_base_preempt", gs_preempt),
    check("seg_thread_area", thread_area),
    check("seg_thread_area_preempt", thread_area_preempt),
    check("ldt_write_read", ldt_write_read),
    check("ldt_limit", ldt_limit),
    check("ldt_bad_entries", ldt_bad_entries),
    check("ldt_not_present", ldt_not_present),
    check("ldt_cleared", ldt_cleared),
    check("ldt_fork", ldt_fork),
    check("ldt_threads", ldt_threads),
    check("ldt_many_entries", ldt_many),
    check("ldt_code_and_stack", ldt_code),
    check("ldt_16_bit", ldt_16_bit),
    check("ldt_processes", ldt_processes),
];

const MOV_DS: [u8; 2] = [0x8e, 0xdf];
const MOV_ES: [u8; 2] = [0x8e, 0xc7];
const MOV_FS: [u8; 2] = [0x8e, 0xe7];
const MOV_GS: [u8; 2] = [0x8e, 0xef];
const MOV_SS: [u8; 2] = [0x8e, 0xd7];

const ALL: [(&str, [u8; 2], [u8; 2]); 4] = [
    ("ds", MOV_DS, [0x8c, 0xd8]),
    ("es", MOV_ES, [0x8c, 0xc0]),
    ("fs", MOV_FS, [0x8c, 0xe0]),
    ("gs", MOV_GS, [0x8c, 0xe8]),
];

/// Loads a selector into a register, reads the register back, clears it.
fn load_selector(load: [u8; 2], read: [u8; 2], selector: u64) -> Result<Ran, String> {
    // mov seg,edi; xor eax,eax; mov eax,seg; xor edi,edi; mov seg,edi
    let mut code = load.to_vec();
    code.extend([0x31, 0xc0]);
    code.extend(read);
    code.extend([0x31, 0xff]);
    code.extend(load);
    probe::snippet(&code, selector, 0)
}

fn load_good(_: &Ctx) -> Verdict {
    probe::install();
    for (name, load, read) in ALL {
        for selector in [0x2b_u64, 0x28, 0x29, 0x33, 0x23] {
            let got = load_selector(load, read, selector)?.value()?;
            equal(
                &format!("{name} after loading {selector:#x}"),
                got,
                selector,
            )?;
        }
        for null in 0..4 {
            let got = load_selector(load, read, null)?.value()?;
            require(got < 4, || {
                format!("{name} after null selector {null}: {got:#x}")
            })?;
        }
    }
    Ok(Note::Pass)
}

fn load_bad(_: &Ctx) -> Verdict {
    probe::install();
    let mut wrong = Vec::new();
    for (name, load, read) in ALL {
        // TSS, LDT without entries, a hole, past every table, and the ring 0
        // segments of a PV hypervisor, which a bare machine does not have.
        for selector in [
            0x40_u64, 0x43, 0x48, 0x07, 0x0f, 0xfff3, 0xffff, 0xe008, 0xe00b, 0xe010, 0xe013,
        ] {
            match load_selector(load, read, selector)? {
                Ran::Faulted(f) if f.sig == libc::SIGSEGV => {
                    equal("error code", f.err, selector & 0xfffc)?;
                }
                other => wrong.push(format!("{name}={selector:#x}: {}", other.brief())),
            }
        }
    }
    require(wrong.is_empty(), || wrong.join(", "))?;
    Ok(Note::Pass)
}

/// Kernel selectors and a PV hypervisor's user selectors: a PV guest's own
/// descriptors have DPL 3, so these may load there. They lead nowhere.
fn load_reserved(_: &Ctx) -> Verdict {
    probe::install();
    let mut out = Vec::new();
    for selector in [0x08_u64, 0x10, 0x18, 0xe023, 0xe02b, 0xe033] {
        let end = match load_selector(MOV_GS, [0x8c, 0xe8], selector)? {
            Ran::Returned(_) => "loads".to_string(),
            Ran::Faulted(f) => format!("signal {}", f.sig),
        };
        out.push(format!("{selector:#x} {end}"));
    }
    Ok(Note::Info(out.join(", ")))
}

fn stack_selector(_: &Ctx) -> Verdict {
    probe::install();
    // mov ss,edi; mov eax,ss
    let code = Code::with_ret(&[MOV_SS[0], MOV_SS[1], 0x8c, 0xd0])?;
    equal("ss", code.run(0x2b, 0).value()? & 0xffff, 0x2b)?;
    let mut wrong = Vec::new();
    for selector in [0x00_u64, 0x03, 0x28, 0x33, 0x40, 0x07, 0xe010, 0xfff3] {
        match code.run(selector, 0) {
            Ran::Faulted(f) if f.sig == libc::SIGSEGV => {}
            other => wrong.push(format!("ss={selector:#x}: {}", other.brief())),
        }
    }
    require(wrong.is_empty(), || wrong.join(", "))?;
    Ok(Note::Pass)
}

/// Linux keeps the CPU number in the limit of selector 0x7b, and its vDSO's
/// getcpu reads it there; but since 5.14 a PV guest's kernel does not set it up
/// on any CPU but the first, on any hypervisor.
fn lsl_cpu(_: &Ctx) -> Verdict {
    probe::install();
    let code = Code::with_ret(&[0x31, 0xc0, 0x0f, 0x03, 0xc7])?; // xor eax,eax; lsl eax,edi
    let mut limits = Vec::new();
    let cpus = sys::cpus();
    for &cpu in &cpus {
        sys::pin(cpu)?;
        limits.push(code.run(0x7b, 0).value()? & 0xfff);
    }
    equal("limit of 0x7b on the first CPU", limits[0], cpus[0] as u64)?;
    Ok(Note::Info(format!("{limits:?}")))
}

fn lar(_: &Ctx) -> Verdict {
    probe::install();
    let lar = Code::with_ret(&[0x31, 0xc0, 0x0f, 0x02, 0xc7])?;
    let rights = lar.run(0x33, 0).value()?;
    equal(
        "present, DPL 3, code, long",
        rights & 0x0020_f800,
        0x0020_f800,
    )?;
    let rights = lar.run(0x2b, 0).value()?;
    equal("present, DPL 3, data, writable", rights & 0xfa00, 0xf200)?;
    // xor eax,eax; verr di; setz al
    let verr = Code::with_ret(&[0x31, 0xc0, 0x0f, 0x00, 0xe7, 0x0f, 0x94, 0xc0])?;
    let verw = Code::with_ret(&[0x31, 0xc0, 0x0f, 0x00, 0xef, 0x0f, 0x94, 0xc0])?;
    equal("verr 0x2b", verr.run(0x2b, 0).value()?, 1)?;
    equal("verw 0x2b", verw.run(0x2b, 0).value()?, 1)?;
    equal("verw 0x33 (code)", verw.run(0x33, 0).value()?, 0)?;
    equal("verr 0xfff3", verr.run(0xfff3, 0).value()?, 0)?;
    Ok(Note::Pass)
}

const ARCH_SET_GS: usize = 0x1001;
const ARCH_GET_FS: u64 = 0x1003;
const ARCH_GET_GS: u64 = 0x1004;

fn set_gs_base(base: u64) -> i64 {
    sys::syscall_int(libc::SYS_arch_prctl, ARCH_SET_GS, base as usize, 0)
}

fn read_gs(offset: u64) -> u64 {
    let value;
    // SAFETY: callers have pointed GS at a region that they own.
    unsafe { asm!("mov {v}, gs:[{o}]", v = out(reg) value, o = in(reg) offset) };
    value
}

fn arch_prctl(ctx: &Ctx) -> Verdict {
    let page = Region::new(4096)?;
    page.store(0, 0x1111);
    page.store(16, 0x2222);
    equal("ARCH_SET_GS", set_gs_base(page.addr()), 0)?;
    equal("ARCH_GET_GS", probe::segment_base(ARCH_GET_GS), page.addr())?;
    equal("gs:0", read_gs(0), 0x1111)?;
    for _ in 0..ctx.n(200) {
        sys::yield_now();
        equal("gs:16", read_gs(16), 0x2222)?;
    }
    for bad in [
        0x0100_0000_0000_0000_u64,
        0xffff_8000_0000_0000,
        0xffff_ffff_8000_0000,
    ] {
        equal(&format!("ARCH_SET_GS {bad:#x}"), set_gs_base(bad), -1)?;
    }
    equal(
        "ARCH_GET_GS after refusals",
        probe::segment_base(ARCH_GET_GS),
        page.addr(),
    )?;
    require(probe::segment_base(ARCH_GET_FS) != 0, || {
        "FS base is 0".to_string()
    })?;
    Ok(Note::Pass)
}

/// Whether the kernel lets user programs use rdfsbase and its kin.
fn has_fsgsbase() -> bool {
    // SAFETY: no preconditions.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & 2 != 0 }
}

/// rdgsbase and wrgsbase work and keep their values, or are undefined.
fn fsgsbase(ctx: &Ctx) -> Verdict {
    probe::install();
    let wrgs = Code::with_ret(&[0xf3, 0x48, 0x0f, 0xae, 0xdf])?; // wrgsbase rdi
    let rdgs = Code::with_ret(&[0xf3, 0x48, 0x0f, 0xae, 0xc8])?; // rdgsbase rax
    if !has_fsgsbase() {
        let fault = wrgs.run(0, 0).fault()?;
        equal("wrgsbase without FSGSBASE", fault.sig, libc::SIGILL)?;
        return Ok(Note::Pass);
    }
    let page = Region::new(4096)?;
    // A base in the kernel's half is legal here; nothing must ever use it.
    for base in [
        page.addr(),
        0,
        0x7fff_ffff_f000,
        0xffff_8000_0000_0000,
        0xffff_ffff_ffff_fff8,
    ] {
        wrgs.run(base, 0).value()?;
        for _ in 0..ctx.n(50) {
            sys::yield_now();
            equal("rdgsbase after a switch", rdgs.run(0, 0).value()?, base)?;
            probe::load(8)?.fault()?;
            equal("rdgsbase after a fault", rdgs.run(0, 0).value()?, base)?;
        }
        equal("ARCH_GET_GS", probe::segment_base(ARCH_GET_GS), base)?;
    }
    Ok(Note::Pass)
}

fn fsgsbase_offered(_: &Ctx) -> Verdict {
    Ok(Note::Info(
        if has_fsgsbase() { "yes" } else { "no" }.to_string(),
    ))
}

/// Hardware refuses a non-canonical base; some emulators do not.
fn non_canonical_base(_: &Ctx) -> Verdict {
    probe::install();
    let mut code = vec![0xf3, 0x48, 0x0f, 0xae, 0xdf, 0x31, 0xff]; // wrgsbase rdi; xor edi,edi
    code.extend([0xf3, 0x48, 0x0f, 0xae, 0xdf]); // wrgsbase rdi
    Ok(Note::Info(
        match probe::snippet(&code, 0x1234_0000_0000_0000, 0)? {
            Ran::Returned(_) => "accepted".to_string(),
            Ran::Faulted(f) => format!("signal {}", f.sig),
        },
    ))
}

/// Runs `body(index)` in several processes that share one CPU.
fn competing(count: u64, body: impl Fn(u64) -> Result<(), String>) -> Result<(), String> {
    let cpu = sys::cpus()[0];
    let children: Vec<_> = (0..count)
        .map(|i| {
            sys::fork(|| match sys::pin(cpu).and_then(|()| body(i)) {
                Ok(()) => 0,
                Err(why) => {
                    eprintln!("process {i}: {why}");
                    1
                }
            })
        })
        .collect::<Result<_, _>>()?;
    for child in children {
        child.wait_ok("competing process")?;
    }
    Ok(())
}

fn gs_preempt(ctx: &Ctx) -> Verdict {
    competing(4, |i| {
        let page = Region::new(4096)?;
        page.store(0, 0xabc0 + i);
        set_gs_base(page.addr());
        for round in 0..ctx.n(2000) {
            equal("gs:0", read_gs(0), 0xabc0 + i)?;
            if round % 16 == 0 {
                equal("ARCH_GET_GS", probe::segment_base(ARCH_GET_GS), page.addr())?;
            }
            sys::yield_now();
        }
        Ok(())
    })?;
    Ok(Note::Pass)
}

/// The kernel's `struct user_desc`.
#[repr(C)]
#[derive(Default)]
struct Descriptor {
    entry: u32,
    base: u32,
    limit: u32,
    flags: u32,
}

const SEG_32BIT: u32 = 1;
const CODE: u32 = 2 << 1;
const LIMIT_IN_PAGES: u32 = 1 << 4;
const NOT_PRESENT: u32 = 1 << 5;
const USEABLE: u32 = 1 << 6;
const DATA32: u32 = SEG_32BIT | USEABLE;
const EMPTY: u32 = 1 << 3 | NOT_PRESENT;

fn modify_ldt(entry: u32, base: u64, limit: u32, flags: u32) -> Result<(), String> {
    let desc = Descriptor {
        entry,
        base: base as u32,
        limit,
        flags,
    };
    // SAFETY: the kernel reads the 16 bytes of the structure.
    let r = unsafe { libc::syscall(libc::SYS_modify_ldt, 0x11, &raw const desc, 16) };
    // The call returns an int: the upper half of rax means nothing.
    if r as i32 == 0 {
        Ok(())
    } else {
        Err(format!("modify_ldt: {}", sys::last_error()))
    }
}

/// set_thread_area exists for 32-bit callers only, so this calls it as one of
/// them does: by `int 0x80` with a structure below 4 GiB.
fn set_thread_area(entry: u32, base: u64) -> Result<u32, String> {
    let page = Region::low_code(4096)?;
    page.store(0, u64::from(entry) | base << 32);
    page.store(8, 0xfff | u64::from(DATA32) << 32);
    let result: u64;
    // SAFETY: the kernel reads the structure and writes its first field; rbx
    // is saved because the compiler keeps it to itself.
    unsafe {
        asm!("push rbx", "mov ebx, {p:e}", "int 0x80", "pop rbx", p = in(reg) page.addr(),
             inlateout("rax") 243_u64 => result, out("r8") _, out("r9") _, out("r10") _,
             out("r11") _);
    }
    if result == 0 {
        Ok(page.load(0) as u32)
    } else {
        Err(format!("set_thread_area: error {}", -(result as i32)))
    }
}

const fn ldt(entry: u32) -> u64 {
    entry as u64 * 8 + 7
}

/// Loads GS, reads a word through it, clears GS.
fn read_through_gs(selector: u64, offset: u64) -> Result<Ran, String> {
    // mov gs,edi; mov rax,gs:[rsi]; xor edi,edi; mov gs,edi
    probe::snippet(
        &[0x8e, 0xef, 0x65, 0x48, 0x8b, 0x06, 0x31, 0xff, 0x8e, 0xef],
        selector,
        offset,
    )
}

fn thread_area(_: &Ctx) -> Verdict {
    probe::install();
    let page = Region::low_code(4096)?;
    page.store(8, 0x7777);
    let entry = set_thread_area(u32::MAX, page.addr())?;
    require((6..32).contains(&entry), || format!("entry {entry}"))?;
    let selector = u64::from(entry) * 8 + 3;
    equal("through gs", read_through_gs(selector, 8)?.value()?, 0x7777)?;
    // The same through fs; run() brings the FS base back.
    let code = [0x8e, 0xe7, 0x64, 0x48, 0x8b, 0x06];
    equal(
        "through fs",
        probe::snippet(&code, selector, 8)?.value()?,
        0x7777,
    )?;
    Ok(Note::Pass)
}

fn thread_area_preempt(ctx: &Ctx) -> Verdict {
    competing(4, |i| {
        probe::install();
        let page = Region::low_code(4096)?;
        page.store(8, 0x9000 + i);
        let entry = set_thread_area(u32::MAX, page.addr())?;
        let selector = u64::from(entry) * 8 + 3;
        for _ in 0..ctx.n(300) {
            equal(
                "through gs",
                read_through_gs(selector, 8)?.value()?,
                0x9000 + i,
            )?;
            sys::yield_now();
        }
        Ok(())
    })?;
    Ok(Note::Pass)
}

fn ldt_write_read(_: &Ctx) -> Verdict {
    probe::install();
    let page = Region::low_code(4096)?;
    page.store(0, 0x1234_5678);
    page.store(8, 0x9abc);
    modify_ldt(0, page.addr(), 0xfff, DATA32)?;
    modify_ldt(3, page.addr() + 8, 0xfff, DATA32)?;
    equal("entry 0", read_through_gs(ldt(0), 0)?.value()?, 0x1234_5678)?;
    equal("entry 3", read_through_gs(ldt(3), 0)?.value()?, 0x9abc)?;
    let fs = probe::snippet(&[0x8e, 0xe7, 0x64, 0x48, 0x8b, 0x06], ldt(3), 0)?;
    equal("entry 3 by fs", fs.value()?, 0x9abc)?;
    equal(
        "entry 1, never written",
        read_through_gs(ldt(1), 0)?.fault()?.sig,
        libc::SIGSEGV,
    )?;
    equal(
        "entry 4, past the end",
        read_through_gs(ldt(4), 0)?.fault()?.sig,
        libc::SIGSEGV,
    )?;
    modify_ldt(0, page.addr() + 8, 0xfff, DATA32)?;
    equal(
        "entry 0 changed",
        read_through_gs(ldt(0), 0)?.value()?,
        0x9abc,
    )?;
    Ok(Note::Pass)
}

/// Limits as `lsl` reads them. (64-bit accesses do not check limits.)
fn ldt_limit(_: &Ctx) -> Verdict {
    probe::install();
    modify_ldt(0, 0, 0x123, DATA32)?;
    modify_ldt(1, 0, 0xfffff, DATA32 | LIMIT_IN_PAGES)?;
    let lsl = Code::with_ret(&[0x31, 0xc0, 0x0f, 0x03, 0xc7])?;
    equal("byte limit", lsl.run(ldt(0), 0).value()?, 0x123)?;
    equal("page limit", lsl.run(ldt(1), 0).value()?, 0xffff_ffff)?;
    Ok(Note::Pass)
}

fn ldt_bad_entries(_: &Ctx) -> Verdict {
    require(modify_ldt(8192, 0, 0xfff, DATA32).is_err(), || {
        "entry 8192 was taken".to_string()
    })?;
    // contents 3 (conforming code) must be not present
    let conforming = SEG_32BIT | 3 << 1;
    require(modify_ldt(0, 0, 0xfff, conforming).is_err(), || {
        "conforming code taken".to_string()
    })?;
    Ok(Note::Pass)
}

fn ldt_not_present(_: &Ctx) -> Verdict {
    probe::install();
    modify_ldt(0, 0, 0xfff, DATA32 | NOT_PRESENT)?;
    let fault = read_through_gs(ldt(0), 0)?.fault()?;
    equal("signal", fault.sig, libc::SIGBUS)?;
    equal("trapno", fault.trapno, 11)?;
    Ok(Note::Pass)
}

fn ldt_cleared(_: &Ctx) -> Verdict {
    probe::install();
    let page = Region::low_code(4096)?;
    modify_ldt(0, page.addr(), 0xfff, DATA32)?;
    read_through_gs(ldt(0), 0)?.value()?;
    modify_ldt(0, 0, 0, EMPTY)?;
    let fault = read_through_gs(ldt(0), 0)?.fault()?;
    equal("signal", fault.sig, libc::SIGSEGV)?;
    equal("trapno", fault.trapno, 13)?;
    equal("error code", fault.err, 4)?;
    Ok(Note::Pass)
}

fn ldt_fork(_: &Ctx) -> Verdict {
    probe::install();
    let page = Region::low_code(4096)?;
    page.store(0, 0x55);
    modify_ldt(2, page.addr(), 0xfff, DATA32)?;
    let child = sys::fork(|| {
        let inherited = matches!(read_through_gs(ldt(2), 0), Ok(Ran::Returned(0x55)));
        let cleared = modify_ldt(2, 0, 0, EMPTY).is_ok();
        let gone = matches!(read_through_gs(ldt(2), 0), Ok(Ran::Faulted(_)));
        i32::from(!(inherited && cleared && gone))
    })?;
    child.wait_ok("child with a copy of the LDT")?;
    equal(
        "ours is as it was",
        read_through_gs(ldt(2), 0)?.value()?,
        0x55,
    )?;
    Ok(Note::Pass)
}

/// An entry written by one thread works in another, on another CPU.
fn ldt_threads(ctx: &Ctx) -> Verdict {
    probe::install();
    let page = Region::low_code(4096)?;
    page.store(0, 0xaa);
    page.store(8, 0xbb);
    let cpus = sys::cpus();
    for round in 0..ctx.n(100) {
        let (offset, want) = if round % 2 == 0 { (0, 0xaa) } else { (8, 0xbb) };
        let (addr, cpus) = (page.addr(), cpus.clone());
        let write = move || {
            sys::pin(cpus[cpus.len() - 1])?;
            modify_ldt(5, addr + offset, 0xfff, DATA32)
        };
        sys::pin(sys::cpus()[0])?;
        std::thread::spawn(write)
            .join()
            .map_err(|_| "thread panicked".to_string())??;
        equal(
            "entry by another thread",
            read_through_gs(ldt(5), 0)?.value()?,
            want,
        )?;
    }
    Ok(Note::Pass)
}

/// A table of several pages.
fn ldt_many(ctx: &Ctx) -> Verdict {
    probe::install();
    let page = Region::low_code(4096)?;
    for i in 0..512 {
        page.store(i * 8, i as u64 + 1);
    }
    let step = (8192 / ctx.n(512)).max(1);
    for entry in (0..8192).step_by(step as usize) {
        modify_ldt(
            entry,
            page.addr() + u64::from(entry % 512) * 8,
            0xfff,
            DATA32,
        )?;
    }
    for entry in (0..8192).step_by(step as usize) {
        let want = u64::from(entry % 512) + 1;
        equal(
            &format!("entry {entry}"),
            read_through_gs(ldt(entry), 0)?.value()?,
            want,
        )?;
    }
    Ok(Note::Pass)
}

fn ldt_processes(ctx: &Ctx) -> Verdict {
    competing(4, |i| {
        probe::install();
        let page = Region::low_code(4096)?;
        page.store(0, 0x700 + i);
        modify_ldt(0, page.addr(), 0xfff, DATA32)?;
        for _ in 0..ctx.n(300) {
            equal(
                "through gs",
                read_through_gs(ldt(0), 0)?.value()?,
                0x700 + i,
            )?;
            sys::yield_now();
        }
        Ok(())
    })?;
    Ok(Note::Pass)
}

global_asm!(
    r#"
    .pushsection .rodata.ldt_visit, "a"
    .globl ldt_visit_start, ldt_visit_end
    ldt_visit_start:
        // rdi: code selector whose base is ldt_visit_start; rsi: stack top below
        // 4 GiB. Runs with a code and a stack segment of the LDT (entries 0
        // and 1), makes a system call and takes a page fault there.
        push rbx
        push rbp
        mov rbp, rsp
        lea rdx, [rip + 2f]
        mov rsp, rsi
        push rbp
        push rdi
        lea rax, [rip + 4f]
        lea rcx, [rip + ldt_visit_start]
        sub rax, rcx
        push rax
        mov ecx, 0x2b
        mov ds, ecx
        mov es, ecx
        .byte 0x48, 0xcb
    .code32
    4:  mov ecx, 0x0f
        mov ss, ecx
        push 77
        mov eax, 20
        int 0x80
        mov ebx, eax
        pop eax
        mov ecx, 0x2b
        mov ss, ecx
        cmp eax, 77
        jne 3f
        mov eax, ebx
        push 0x33
        push edx
        .byte 0xcb
    3:  ud2
    .code64
    2:  pop rsp
        pop rbp
        pop rbx
        xor ecx, ecx
        mov ds, ecx
        mov es, ecx
        mov eax, eax
        ret
    ldt_visit_end:
    .popsection
    "#
);

unsafe extern "C" {
    static ldt_visit_start: u8;
    static ldt_visit_end: u8;
}

fn ldt_code(ctx: &Ctx) -> Verdict {
    probe::install();
    // SAFETY: both labels are in one section of the program, in this order.
    let bytes = unsafe {
        let (start, end) = (&raw const ldt_visit_start, &raw const ldt_visit_end);
        std::slice::from_raw_parts(start, end as usize - start as usize)
    };
    let code = Code::new(bytes)?;
    let stack = Region::low_code(16 * 4096)?;
    let segment = SEG_32BIT | LIMIT_IN_PAGES | USEABLE;
    modify_ldt(0, code.addr(), 0xfffff, segment | CODE)?;
    modify_ldt(1, 0, 0xfffff, segment)?;
    for _ in 0..ctx.n(1000) {
        let pid = code.run(ldt(0), stack.addr() + 15 * 4096).value()?;
        equal("getpid from LDT code", pid, u64::from(std::process::id()))?;
    }
    modify_ldt(0, 0, 0, EMPTY)?;
    let fault = code.run(ldt(0), stack.addr() + 15 * 4096).fault()?;
    equal("without the code segment", fault.sig, libc::SIGSEGV)?;
    Ok(Note::Pass)
}

/// 16-bit segments need the kernel's espfix, which a PV guest does not have.
fn ldt_16_bit(_: &Ctx) -> Verdict {
    Ok(Note::Info(match modify_ldt(0, 0, 0xfff, USEABLE) {
        Ok(()) => "accepted".to_string(),
        Err(why) => why,
    }))
}
