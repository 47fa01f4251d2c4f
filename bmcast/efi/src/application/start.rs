//! CPUs that the OS starts.
//!
//! INIT throws a CPU out of guest mode, and start-up has it begin in real mode at a page below 1 MiB. So the page
//! is the VMM's: there the CPU enters long mode, becomes a guest, and begins as that in real mode where the OS wanted
//! it to.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::arch::global_asm;
use core::sync::atomic::{AtomicPtr, AtomicU8, AtomicU64, Ordering};
use core::{ptr, slice};

use bmcast_svm::Segment;

use super::cpu;
use super::host;
use super::memory::{address, pointer};
use super::vcpu::Cpu;

/// CPUs by their APIC ID; those that are not there have none.
static CPUS: [AtomicPtr<Cpu>; 256] = [const { AtomicPtr::new(ptr::null_mut()) }; 256];
/// Ends of their stacks.
static STACKS: [AtomicU64; 256] = [const { AtomicU64::new(0) }; 256];
/// The page at which the OS last wanted a CPU to start.
static VECTORS: [AtomicU8; 256] = [const { AtomicU8::new(0) }; 256];
/// The VMM's page.
static PAGE: AtomicU8 = AtomicU8::new(0);

global_asm!(
    ".section .text",
    ".balign 16",
    ".global bmcast_start",
    ".global bmcast_start_end",
    ".global bmcast_start_gdt",
    ".global bmcast_start_far",
    ".global bmcast_start_data",
    ".code16",
    "bmcast_start:",
    "cli",
    "cld",
    "lgdtl %cs:(bmcast_start_gdt - bmcast_start)",
    // PAE, FXSAVE, SSE's exceptions.
    "movl $0x620, %eax",
    "movl %eax, %cr4",
    "movl %cs:(bmcast_start_data - bmcast_start), %eax",
    "movl %eax, %cr3",
    // Long mode, no-execute.
    "movl $0xc0000080, %ecx",
    "rdmsr",
    "orl $0x900, %eax",
    "wrmsr",
    // Paging, protection, the FPU's own errors; caches on.
    "movl $0x80000033, %eax",
    "movl %eax, %cr0",
    "ljmpl *%cs:(bmcast_start_far - bmcast_start)",
    ".code64",
    "3:",
    "movl $16, %eax",
    "movl %eax, %ss",
    "movl %eax, %ds",
    "movl %eax, %es",
    "movl $1, %eax",
    "cpuid",
    "shrl $24, %ebx",
    "movq bmcast_start_data+8(%rip), %rax",
    "movq (%rax, %rbx, 8), %rsp",
    "testq %rsp, %rsp",
    "jz 4f",
    "movl %ebx, %edi",
    "movq bmcast_start_data+16(%rip), %rax",
    "callq *%rax",
    "4:",
    "cli",
    "hlt",
    "jmp 4b",
    ".balign 8",
    "bmcast_start_gdt:",
    ".short 0",
    ".long 0",
    ".balign 8",
    "bmcast_start_far:",
    ".long 3b - bmcast_start",
    ".short 8",
    ".balign 8",
    // CR3, stacks, entry.
    "bmcast_start_data:",
    ".quad 0, 0, 0",
    "bmcast_start_end:",
    options(att_syntax)
);

unsafe extern "C" {
    static bmcast_start: u8;
    static bmcast_start_end: u8;
    static bmcast_start_gdt: u8;
    static bmcast_start_far: u8;
    static bmcast_start_data: u8;
}

/// Writes the code into the page at `at` below 1 MiB, which is reserved for good.
///
/// # Safety
///
/// The page is nobody else's.
pub unsafe fn prepare(at: u64) {
    let start = &raw const bmcast_start;
    let offset = |symbol: *const u8| symbol.addr() - start.addr();
    let bytes = offset(&raw const bmcast_start_end);
    // SAFETY: the symbols bound the code; the page is the caller's, and the code is smaller than a page.
    let page = unsafe {
        let page: *mut u8 = pointer(at);
        ptr::copy_nonoverlapping(start, page, bytes);
        slice::from_raw_parts_mut(page, bytes)
    };
    let mut put =
        |place: usize, value: &[u8]| page[place..place + value.len()].copy_from_slice(value);
    let gdt = host::gdt();
    let [base, _] = cpu::halves(gdt.base);
    let place = offset(&raw const bmcast_start_gdt);
    put(place, &{ gdt.limit }.to_le_bytes());
    put(place + 2, &base.to_le_bytes());
    let place = offset(&raw const bmcast_start_far);
    let far = u32::try_from(at).unwrap_or(0) + far_offset();
    put(place, &far.to_le_bytes());
    let place = offset(&raw const bmcast_start_data);
    put(place, &host::cr3().to_le_bytes());
    put(place + 8, &address(&raw const STACKS).to_le_bytes());
    put(place + 16, &address(started as *const ()).to_le_bytes());
    let [_, page, ..] = (u32::try_from(at).unwrap_or(0) >> 4).to_le_bytes();
    PAGE.store(page, Ordering::Release);
}

/// Where the 64-bit code begins.
fn far_offset() -> u32 {
    // SAFETY: the assembler has put the number there.
    unsafe { (&raw const bmcast_start_far).cast::<u32>().read_unaligned() }
}

/// Makes CPUs known, so that they can be started.
pub fn know(ids: &[u8]) -> Option<()> {
    for id in ids {
        let cpu = Cpu::new(*id)?;
        STACKS[usize::from(*id)].store(cpu.stack, Ordering::Relaxed);
        CPUS[usize::from(*id)].store(Box::into_raw(cpu), Ordering::Release);
    }
    Some(())
}

/// The guest sends a start-up with `icr` to the APIC ID `target`: what is to be sent instead.
pub fn redirect(icr: u32, target: u32) -> u32 {
    let [vector, ..] = icr.to_le_bytes();
    // No shorthand: one CPU; else all, or all others, of which those that run take no notice.
    let targets: Vec<usize> = if icr >> 18 & 3 == 0 {
        usize::try_from(target).into_iter().collect()
    } else {
        (0..VECTORS.len()).collect()
    };
    for target in targets {
        if let Some(wanted) = VECTORS.get(target) {
            wanted.store(vector, Ordering::Release);
        }
    }
    icr & !0xff | u32::from(PAGE.load(Ordering::Acquire))
}

/// A CPU in long mode, on its stack.
unsafe extern "sysv64" fn started(id: u32) -> ! {
    let id = usize::try_from(id & 0xff).unwrap_or(0);
    let cpu = CPUS[id].load(Ordering::Acquire);
    // SAFETY: a CPU whose stack is there is there, by `know`; nobody but the CPU itself uses it, and it starts anew.
    let Some(cpu) = (unsafe { cpu.as_mut() }) else {
        cpu::stop()
    };
    // SAFETY: this CPU is in long mode on the VMM's page tables; the firmware and the OS have given it up.
    unsafe {
        host::enter();
        cpu.turn_on();
    }
    reset_state(cpu, VECTORS[id].load(Ordering::Acquire));
    // SAFETY: loads what VMRUN does not (APM 15.5.1): FS, GS, TR, LDTR and MSRs, as after INIT.
    unsafe {
        core::arch::asm!("vmload rax", in("rax") address(&raw const *cpu.vmcb), options(nostack));
    }
    cpu.run()
}

/// A CPU as it is after INIT and start-up (APM volume 2, table 14-1 and 15.27).
fn reset_state(cpu: &mut Cpu, vector: u8) {
    let data = Segment {
        selector: 0,
        attributes: 0x93,
        limit: 0xffff,
        base: 0,
    };
    let save = &mut cpu.vmcb.save;
    save.es = data;
    save.ss = data;
    save.ds = data;
    save.fs = data;
    save.gs = data;
    save.cs = Segment {
        selector: u16::from(vector) << 8,
        attributes: 0x9b,
        limit: 0xffff,
        base: u64::from(vector) << 12,
    };
    let table = Segment {
        selector: 0,
        attributes: 0,
        limit: 0xffff,
        base: 0,
    };
    save.gdtr = table;
    save.idtr = table;
    save.ldtr = Segment {
        attributes: 0x82,
        ..table
    };
    save.tr = Segment {
        attributes: 0x8b,
        ..table
    };
    save.cpl = 0;
    save.efer = cpu::SVME;
    save.cr0 = 0x6000_0010;
    save.cr2 = 0;
    save.cr3 = 0;
    save.cr4 = 0;
    save.dr6 = 0xffff_0ff0;
    save.dr7 = 0x400;
    save.rflags = 2;
    save.rip = 0;
    save.rsp = 0;
    save.rax = 0;
    save.syscall = [0; 8];
    // SAFETY: every CPU with long mode has the PAT.
    save.pat = unsafe { cpu::rdmsr(cpu::PAT) };
    cpu.registers = [0; 16];
    cpu.registers[2] = u64::from(cpu::cpuid(1)[0]);
    cpu.leaving = false;
    let control = &mut cpu.vmcb.control;
    control.vintr = 0;
    control.intercepts1 &= !bmcast_svm::Intercepts1::VINTR;
    control.interrupt_shadow = 0;
    control.event_injection = 0;
    control.tlb_control = 1;
}
