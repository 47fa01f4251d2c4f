//! Instructions that a user program must not be able to execute, and
//! software interrupts.

use crate::harness::{Check, Ctx, Note, Verdict, check, equal, require};
use crate::probe::{self, Ran};
use crate::sys;

/// The checks of this file.
pub const CHECKS: &[Check] = &[
    check("priv_instructions", instructions),
    check("priv_undefined", undefined),
    check("priv_port_io", port_io),
    check("priv_iret_selectors", iret_selectors),
    check("priv_far_transfers", far_transfers),
    check("priv_int_n", int_n),
    check("priv_int_n_error_code", int_n_error_code),
    check("priv_popf", popf),
    check("priv_sti_popf_if", interrupt_flag),
    check("priv_store_tables", store_tables),
    check("priv_xen_prefix", xen_prefix),
    check("priv_vmcall", vmcall),
    check("priv_sysenter64", sysenter64),
];

/// Runs each snippet and fails with every one that does not end in `sig`.
fn all_end_in(sig: i32, cases: &[(&str, &[u8])]) -> Verdict {
    probe::install();
    let scratch = sys::Region::new(4096)?;
    let mut wrong = Vec::new();
    for (name, bytes) in cases {
        match probe::snippet(bytes, scratch.addr(), 0)? {
            Ran::Faulted(fault) if fault.sig == sig => {}
            other => wrong.push(format!("{name}: {}", other.brief())),
        }
    }
    require(wrong.is_empty(), || wrong.join(", "))?;
    Ok(Note::Pass)
}

fn instructions(_: &Ctx) -> Verdict {
    all_end_in(
        libc::SIGSEGV,
        &[
            ("cli", &[0xfa]),
            ("sti", &[0xfb]),
            ("hlt", &[0xf4]),
            ("mov cr0,rax", &[0x0f, 0x22, 0xc0]),
            ("mov rax,cr0", &[0x0f, 0x20, 0xc0]),
            ("mov rax,cr2", &[0x0f, 0x20, 0xd0]),
            ("mov cr2,rax", &[0x0f, 0x22, 0xd0]),
            ("mov rax,cr3", &[0x0f, 0x20, 0xd8]),
            ("mov cr3,rax", &[0x0f, 0x22, 0xd8]),
            ("mov rax,cr4", &[0x0f, 0x20, 0xe0]),
            ("mov cr4,rax", &[0x0f, 0x22, 0xe0]),
            ("mov rax,cr8", &[0x44, 0x0f, 0x20, 0xc0]),
            ("mov cr8,rax", &[0x44, 0x0f, 0x22, 0xc0]),
            ("mov rax,dr0", &[0x0f, 0x21, 0xc0]),
            ("mov dr0,rax", &[0x0f, 0x23, 0xc0]),
            ("mov rax,dr6", &[0x0f, 0x21, 0xf0]),
            ("mov dr7,rax", &[0x0f, 0x23, 0xf8]),
            ("rdmsr efer", &[0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32]),
            ("rdmsr lstar", &[0xb9, 0x82, 0x00, 0x00, 0xc0, 0x0f, 0x32]),
            ("wrmsr lstar", &[0xb9, 0x82, 0x00, 0x00, 0xc0, 0x0f, 0x30]),
            ("wrmsr gs base", &[0xb9, 0x01, 0x01, 0x00, 0xc0, 0x0f, 0x30]),
            ("lgdt", &[0x0f, 0x01, 0x17]),
            ("lidt", &[0x0f, 0x01, 0x1f]),
            ("lldt", &[0x31, 0xc0, 0x0f, 0x00, 0xd0]),
            ("ltr", &[0x31, 0xc0, 0x0f, 0x00, 0xd8]),
            ("lmsw", &[0x0f, 0x01, 0xf0]),
            ("clts", &[0x0f, 0x06]),
            ("invd", &[0x0f, 0x08]),
            ("wbinvd", &[0x0f, 0x09]),
            ("invlpg", &[0x0f, 0x01, 0x3f]),
            ("swapgs", &[0x0f, 0x01, 0xf8]),
            ("sysretq", &[0x48, 0x0f, 0x07]),
            ("sysretl", &[0x0f, 0x07]),
        ],
    )
}

/// Undefined opcodes and instructions that are #UD outside ring 0.
fn undefined(_: &Ctx) -> Verdict {
    all_end_in(
        libc::SIGILL,
        &[
            ("ud2", &[0x0f, 0x0b]),
            ("ud1", &[0x0f, 0xb9, 0xc0]),
            ("clac", &[0x0f, 0x01, 0xca]),
            ("stac", &[0x0f, 0x01, 0xcb]),
            ("rsm", &[0x0f, 0xaa]),
            ("push es", &[0x06]),
            ("aaa", &[0x37]),
            ("into", &[0xce]),
            ("lock nop", &[0xf0, 0x90]),
        ],
    )
}

fn port_io(_: &Ctx) -> Verdict {
    all_end_in(
        libc::SIGSEGV,
        &[
            ("in al,0x80", &[0xe4, 0x80]),
            ("out 0x80,al", &[0xe6, 0x80]),
            ("in eax,dx cf8", &[0x66, 0xba, 0xf8, 0x0c, 0xed]),
            ("out dx,eax cf8", &[0x66, 0xba, 0xf8, 0x0c, 0xef]),
            ("in al,dx 3f8", &[0x66, 0xba, 0xf8, 0x03, 0xec]),
            ("insb", &[0x66, 0xba, 0xf8, 0x03, 0x6c]),
            ("outsb", &[0x48, 0x89, 0xfe, 0x66, 0xba, 0xf8, 0x03, 0x6e]),
            (
                "rep insd",
                &[0x66, 0xba, 0xf8, 0x03, 0xb9, 1, 0, 0, 0, 0xf3, 0x6d],
            ),
        ],
    )
}

/// `push rsi(ss); push rsp; pushf; push rdi(cs); lea rax,[rip+..]; push rax; iretq`
const IRET_TO: &[u8] = &[
    0x48, 0x89, 0xe0, // mov rax,rsp
    0x56, // push rsi
    0x50, // push rax
    0x9c, // pushf
    0x57, // push rdi
    0x48, 0x8d, 0x05, 0x03, 0x00, 0x00, 0x00, // lea rax,[rip+3]
    0x50, // push rax
    0x48, 0xcf, // iretq
    0xb8, 0x07, 0x00, 0x00, 0x00, // mov eax,7
    0xc3,
];

fn iret_selectors(_: &Ctx) -> Verdict {
    probe::install();
    let code = probe::Code::new(IRET_TO)?;
    equal("iretq to 0x33/0x2b", code.run(0x33, 0x2b).value()?, 7)?;
    // Ring 0 selectors by RPL, null, data as code, code as stack, selectors
    // past Linux's table (where a PV hypervisor keeps its own), TSS, LDT.
    let pairs = [
        (0x10, 0x18),
        (0x10, 0x2b),
        (0x33, 0x18),
        (0x00, 0x2b),
        (0x03, 0x2b),
        (0x33, 0x00),
        (0x2b, 0x2b),
        (0x33, 0x33),
        (0xe008, 0xe010),
        (0xe00b, 0xe013),
        (0x33, 0xe010),
        (0x40, 0x2b),
        (0x43, 0x2b),
        (0x07, 0x2b),
        (0x33, 0x07),
        (0xfff3, 0x2b),
        (0x33, 0xfff3),
    ];
    let mut wrong = Vec::new();
    for (cs, ss) in pairs {
        match code.run(cs, ss) {
            Ran::Faulted(f) if f.sig == libc::SIGSEGV || f.sig == libc::SIGBUS => {}
            other => wrong.push(format!("{cs:#x}/{ss:#x}: {}", other.brief())),
        }
    }
    require(wrong.is_empty(), || wrong.join(", "))?;
    Ok(Note::Pass)
}

/// Far returns and far jumps to selectors that must be refused.
fn far_transfers(_: &Ctx) -> Verdict {
    probe::install();
    // push rdi; lea rax,[rip+3]; push rax; retfq ; mov eax,7; ret
    let code = probe::Code::new(&[
        0x57, 0x48, 0x8d, 0x05, 0x03, 0, 0, 0, 0x50, 0x48, 0xcb, 0xb8, 7, 0, 0, 0, 0xc3,
    ])?;
    equal("retfq to 0x33", code.run(0x33, 0).value()?, 7)?;
    let mut wrong = Vec::new();
    for cs in [
        0x00_u64, 0x10, 0x18, 0x2b, 0x40, 0x43, 0x07, 0xe008, 0xe00b, 0xe030, 0xfff3,
    ] {
        match code.run(cs, 0) {
            Ran::Faulted(f) if f.sig == libc::SIGSEGV => {}
            other => wrong.push(format!("retf {cs:#x}: {}", other.brief())),
        }
    }
    require(wrong.is_empty(), || wrong.join(", "))?;
    Ok(Note::Pass)
}

/// What `int n` must do in a 64-bit Linux process.
fn expected_signal(vector: u8) -> i32 {
    match vector {
        3 => libc::SIGTRAP,
        _ => libc::SIGSEGV,
    }
}

fn int_n(_: &Ctx) -> Verdict {
    probe::install();
    let mut wrong = Vec::new();
    for vector in 0..=255_u8 {
        if vector == 0x80 {
            continue; // a system call; compat_int80 checks it
        }
        match probe::snippet(&[0xcd, vector], 0, 0)? {
            Ran::Faulted(f) if f.sig == expected_signal(vector) => {}
            other => wrong.push(format!("int {vector:#x}: {}", other.brief())),
        }
    }
    require(wrong.is_empty(), || wrong.join(", "))?;
    Ok(Note::Pass)
}

/// The error code of `int 0x21`: hardware says vector*8+2 (some emulators differ).
fn int_n_error_code(_: &Ctx) -> Verdict {
    probe::install();
    let fault = probe::snippet(&[0xcd, 0x21], 0, 0)?.fault()?;
    Ok(Note::Info(format!(
        "trap {} err {:#x}",
        fault.trapno, fault.err
    )))
}

/// pushf; or [rsp],rdi ; popf ; pushf ; pop rax ; clean flags again
const SET_FLAGS: &[u8] = &[
    0x9c, 0x48, 0x09, 0x3c, 0x24, 0x9d, // pushf; or [rsp],rdi; popf
    0x9c, 0x58, // pushf; pop rax
    0x9c, 0x48, 0xf7, 0xd7, 0x48, 0x21, 0x3c, 0x24,
    0x9d, // pushf; not rdi; and [rsp],rdi; popf
    0xc3,
];

/// popf changes what a user may change and leaves IOPL, IF, VM and VIP alone.
fn popf(_: &Ctx) -> Verdict {
    probe::install();
    let code = probe::Code::new(SET_FLAGS)?;
    for (name, bit, may) in [
        ("AC", 18, true),
        ("ID", 21, true),
        ("NT", 14, true),
        ("DF", 10, true),
        ("IOPL", 12, false),
        ("IOPL high", 13, false),
        ("VM", 17, false),
        ("VIF", 19, false),
        ("VIP", 20, false),
    ] {
        let flags = code.run(1 << bit, 0).value()?;
        equal(name, flags >> bit & 1 == 1, may)?;
    }
    Ok(Note::Pass)
}

/// The interrupt flag reads as set and cannot be cleared by popf.
fn interrupt_flag(_: &Ctx) -> Verdict {
    probe::install();
    // pushf; and qword [rsp], ~0x200; popf; pushf; pop rax
    let code = [
        0x9c, 0x48, 0x81, 0x24, 0x24, 0xff, 0xfd, 0xff, 0xff, 0x9d, 0x9c, 0x58,
    ];
    let flags = probe::snippet(&code, 0, 0)?.value()?;
    equal("IF after popf without it", flags >> 9 & 1, 1)?;
    Ok(Note::Pass)
}

/// sgdt, sidt, sldt, str, smsw: allowed, emulated or refused (UMIP), never fatal.
fn store_tables(_: &Ctx) -> Verdict {
    probe::install();
    let mut out = Vec::new();
    for (name, bytes) in [
        ("sgdt", [0x0f, 0x01, 0x07, 0x90]),
        ("sidt", [0x0f, 0x01, 0x0f, 0x90]),
        ("sldt", [0x0f, 0x00, 0xc0, 0x90]),
        ("str", [0x0f, 0x00, 0xc8, 0x90]),
        ("smsw", [0x0f, 0x01, 0xe0, 0x90]),
    ] {
        let buffer = sys::Region::new(4096)?;
        let end = match probe::snippet(&bytes, buffer.addr(), 0)? {
            Ran::Returned(_) if bytes[2] & 0xc0 == 0 => {
                format!(
                    "limit {:#x} base {:#x}",
                    buffer.load(0) & 0xffff,
                    buffer.load(2)
                )
            }
            Ran::Returned(value) => format!("{:#x}", value & 0xffff_ffff),
            Ran::Faulted(fault) => fault.brief(),
        };
        out.push(format!("{name} {end}"));
    }
    Ok(Note::Info(out.join(", ")))
}

/// Xen's forced-emulation CPUID (`ud2; "xen"; cpuid`): SIGILL on bare Linux.
fn xen_prefix(_: &Ctx) -> Verdict {
    probe::install();
    // push rbx; mov eax,0x40000000; xor ecx,ecx; ud2 "xen" cpuid; mov eax,ebx; pop rbx
    let code = [
        0x53, 0xb8, 0, 0, 0, 0x40, 0x31, 0xc9, 0x0f, 0x0b, 0x78, 0x65, 0x6e, 0x0f, 0xa2, 0x89,
        0xd8, 0x5b,
    ];
    Ok(Note::Info(probe::snippet(&code, 0, 0)?.brief()))
}

/// vmcall and vmmcall from ring 3 may be undefined or answered by the host.
fn vmcall(_: &Ctx) -> Verdict {
    probe::install();
    let intel = probe::snippet(&[0x53, 0x0f, 0x01, 0xc1, 0x5b], 0, 0)?.brief();
    let amd = probe::snippet(&[0x53, 0x0f, 0x01, 0xd9, 0x5b], 0, 0)?.brief();
    Ok(Note::Info(format!("vmcall {intel}, vmmcall {amd}")))
}

/// sysenter from 64-bit mode: any end of the process will do, the kernel must live.
fn sysenter64(_: &Ctx) -> Verdict {
    let child = sys::fork(|| {
        let Ok(code) = probe::Code::with_ret(&[0xb8, 20, 0, 0, 0, 0x0f, 0x34]) else {
            return 1;
        };
        probe::install();
        match code.run(0, 0) {
            Ran::Returned(_) => 10,
            Ran::Faulted(fault) => 20 + fault.sig,
        }
    })?;
    Ok(Note::Info(format!("{}", child.wait())))
}
