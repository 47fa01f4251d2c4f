//! The last jump: this CPU runs the guest natively from here on.
//!
//! The guest's page tables have to be the CPU's when the guest's next instruction is fetched, and the VMM's code is
//! not in them. So a page with the last few instructions and all they need is put into one entry of the guest's
//! top-level table that is not used, and the last but one instruction takes it out again. Only that page and the table
//! itself are mapped there, for the kernel alone.
//!
//! Where in the guest it happens is for the CPU to say: a virtual interrupt is made pending, and the exit that
//! comes when it could be taken (`exit::VINTR`) is a moment in which IF is set, no interrupt shadow is there, no event is
//! half delivered and no NMI is being handled (a handler of NMIs runs with IF clear). An NMI or machine check that
//! comes between STGI and IRETQ finds the guest's own IDT, stacks, and page tables, and returns to that page, which is still mapped.

use core::arch::{asm, global_asm};
use core::mem::offset_of;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use super::cpu::{self, LMA, SVME, TablePointer};
use super::host;
use super::memory::{PAGE, address, pages, pointer};
use super::vcpu::Cpu;
use crate::say;

/// CPUs that have left.
pub static LEFT: AtomicU32 = AtomicU32::new(0);
/// That there was no memory for it has been said.
static STUCK: AtomicBool = AtomicBool::new(false);

/// What the last instructions need, at [`DATA`] of their page.
#[repr(C)]
struct Last {
    registers: [u64; 16],
    cr0: u64,
    cr2: u64,
    /// Without its PCID, which can be chosen only when CR4.PCIDE is set.
    cr3_plain: u64,
    cr3: u64,
    cr4: u64,
    dr6: u64,
    dr7: u64,
    efer: u64,
    pat: u64,
    ds: u64,
    es: u64,
    gdtr: TablePointer,
    idtr: TablePointer,
    /// Its low bytes, for the last instruction's stack: RIP, CS, RFLAGS, RSP, SS.
    frame: u64,
}

/// Where [`Last`] is in the page.
const DATA: usize = 0x400;
/// Where the stack of IRETQ is; below it there is room for an interrupt.
const FRAME: usize = 0xf00;

global_asm!(
    ".section .text",
    ".balign 16",
    ".global bmcast_leave",
    ".global bmcast_leave_slot",
    ".global bmcast_leave_end",
    // RDI: `Last`, by its address in the guest's tables.
    "bmcast_leave:",
    "mov rax, [rdi + {cr3_plain}]",
    "mov cr3, rax",
    "mov rax, [rdi + {cr4}]",
    "mov cr4, rax",
    "mov rax, [rdi + {cr3}]",
    "mov cr3, rax",
    "mov rax, [rdi + {cr0}]",
    "mov cr0, rax",
    "mov rax, [rdi + {cr2}]",
    "mov cr2, rax",
    "mov ecx, {PAT}",
    "mov eax, [rdi + {pat}]",
    "mov edx, [rdi + {pat} + 4]",
    "wrmsr",
    "xor eax, eax",
    "xor edx, edx",
    "mov ecx, {HSAVE}",
    "wrmsr",
    "lgdt [rdi + {gdtr}]",
    "lidt [rdi + {idtr}]",
    "mov eax, [rdi + {ds}]",
    "mov ds, eax",
    "mov eax, [rdi + {es}]",
    "mov es, eax",
    "mov rax, [rdi + {dr6}]",
    "mov dr6, rax",
    "mov rsp, [rdi + {frame}]",
    "mov ecx, {EFER}",
    "mov eax, [rdi + {efer}]",
    "mov edx, [rdi + {efer} + 4]",
    "stgi",
    "wrmsr",
    "mov rax, [rdi + {dr7}]",
    "mov dr7, rax",
    "mov rax, [rdi]",
    "mov rcx, [rdi + 8]",
    "mov rdx, [rdi + 16]",
    "mov rbx, [rdi + 24]",
    "mov rbp, [rdi + 40]",
    "mov rsi, [rdi + 48]",
    "mov r8, [rdi + 64]",
    "mov r9, [rdi + 72]",
    "mov r10, [rdi + 80]",
    "mov r11, [rdi + 88]",
    "mov r12, [rdi + 96]",
    "mov r13, [rdi + 104]",
    "mov r14, [rdi + 112]",
    "mov r15, [rdi + 120]",
    "mov rdi, [rdi + 56]",
    // `movq $0, displacement(%rip)`: the entry in the guest's table, by its address there. Written out, since the
    // displacement is put in when it is known.
    ".byte 0x48, 0xc7, 0x05",
    "bmcast_leave_slot:",
    ".long 0, 0",
    "iretq",
    "bmcast_leave_end:",
    cr0 = const offset_of!(Last, cr0),
    cr2 = const offset_of!(Last, cr2),
    cr3_plain = const offset_of!(Last, cr3_plain),
    cr3 = const offset_of!(Last, cr3),
    cr4 = const offset_of!(Last, cr4),
    dr6 = const offset_of!(Last, dr6),
    dr7 = const offset_of!(Last, dr7),
    efer = const offset_of!(Last, efer),
    pat = const offset_of!(Last, pat),
    ds = const offset_of!(Last, ds),
    es = const offset_of!(Last, es),
    gdtr = const offset_of!(Last, gdtr),
    idtr = const offset_of!(Last, idtr),
    frame = const offset_of!(Last, frame),
    PAT = const cpu::PAT,
    HSAVE = const cpu::HSAVE,
    EFER = const cpu::EFER,
);

unsafe extern "C" {
    static bmcast_leave: u8;
    static bmcast_leave_slot: u8;
    static bmcast_leave_end: u8;
}

const PAGING: u64 = 1 << 31;
const LA57: u64 = 1 << 12;
const TABLE: u64 = 0x000f_ffff_ffff_f000;
/// Present, writable, accessed, dirty; not for users, not global.
const KERNELS: u64 = 0x63;

/// Whether this CPU is in a mode that can be left: 64-bit paging of four levels. Firmware, GRUB and the OS after its
/// first moments are.
pub fn possible(cpu: &Cpu) -> bool {
    let save = &cpu.vmcb.save;
    save.cr0 & PAGING != 0 && save.efer & LMA != 0 && save.cr4 & LA57 == 0
}

/// Leaves, if there is memory and an unused entry for it; else the guest goes on as one.
pub fn leave(cpu: &mut Cpu) {
    if !possible(cpu) {
        return;
    }
    let save = &cpu.vmcb.save;
    let root = save.cr3 & TABLE;
    let Some(tables) = pages(4) else {
        if !STUCK.swap(true, Ordering::Relaxed) {
            say!("CPU {} has no memory to leave with", cpu.id);
        }
        return;
    };
    let page = |number: usize| tables.as_ptr().wrapping_add(number * PAGE);
    let entry = |number: usize| address(page(number)) | KERNELS;
    // SAFETY: four pages of zeros of our own.
    unsafe {
        page(0).cast::<u64>().write(entry(1));
        page(1).cast::<u64>().write(entry(2));
        page(2).cast::<u64>().write(entry(3));
        page(2).cast::<u64>().wrapping_add(1).write(root | KERNELS);
    }
    let Some(slot) = take_slot(root, entry(0)) else {
        return;
    };
    let base = 0xffff_0000_0000_0000 | u64::try_from(slot).unwrap_or(0) << 39;
    let last = Last {
        registers: cpu.registers,
        cr0: save.cr0,
        cr2: save.cr2,
        cr3_plain: save.cr3 & TABLE,
        cr3: save.cr3,
        cr4: save.cr4,
        dr6: save.dr6,
        dr7: save.dr7,
        efer: save.efer & !SVME,
        pat: save.pat,
        ds: u64::from(save.ds.selector),
        es: u64::from(save.es.selector),
        gdtr: table(save.gdtr),
        idtr: table(save.idtr),
        frame: base + at(FRAME),
    };
    let frame = [
        save.rip,
        u64::from(save.cs.selector),
        save.rflags,
        save.rsp,
        u64::from(save.ss.selector),
    ];
    let last = Last {
        registers: {
            let mut registers = last.registers;
            registers[0] = save.rax;
            registers
        },
        ..last
    };
    let code = &raw const bmcast_leave;
    let code_end = &raw const bmcast_leave_end;
    let hole = (&raw const bmcast_leave_slot).addr() - code.addr();
    // From behind the instruction, 8 bytes behind the hole's begin, to the entry in the next page.
    let displacement = PAGE + slot * 8 - (hole + 8);
    // SAFETY: the page is ours, and code, data and frame lie in it apart from each other.
    unsafe {
        ptr::copy_nonoverlapping(code, page(3), code_end.addr() - code.addr());
        page(3)
            .wrapping_add(hole)
            .cast::<u32>()
            .write_unaligned(u32::try_from(displacement).unwrap_or(0));
        page(3).wrapping_add(DATA).cast::<Last>().write(last);
        page(3).wrapping_add(FRAME).cast::<[u64; 5]>().write(frame);
    }
    LEFT.fetch_add(1, Ordering::AcqRel);
    // SAFETY: the page is mapped at `base` by the VMM's tables and by the guest's; from there on everything is as the
    // guest's state says.
    unsafe {
        asm!(
            "fxrstor64 [{fx}]",
            "jmp {code}",
            fx = in(reg) &raw const *cpu.fx,
            code = in(reg) base,
            in("rdi") base + at(DATA),
            options(noreturn),
        );
    }
}

fn at(offset: usize) -> u64 {
    u64::try_from(offset).unwrap_or(0)
}

fn table(of: bmcast_svm::DescriptorTable) -> TablePointer {
    TablePointer {
        limit: u16::try_from(of.limit & 0xffff).unwrap_or(0xffff),
        base: of.base,
    }
}

/// Puts `entry` into an entry that is unused in the table at `root` and in the VMM's own, by which other CPUs may be leaving
/// just now. Linux leaves 256 to 271 to hypervisors (`Documentation/x86/x86_64/mm.rst`), so they are first.
fn take_slot(root: u64, entry: u64) -> Option<usize> {
    let take = |table: u64, slot: usize| {
        let place: *mut u64 = pointer::<u64>(table).wrapping_add(slot);
        // SAFETY: a top-level table that is in use: aligned, mapped to itself. Other CPUs may change it, hence atomic.
        let place = unsafe { AtomicU64::from_ptr(place) };
        place
            .compare_exchange(0, entry, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    };
    // What is taken of the VMM's own stays so: nobody needs it any more.
    (256..511).find(|slot| take(host::cr3(), *slot) && take(root, *slot))
}
