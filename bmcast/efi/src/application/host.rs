//! The CPU's state while the VMM runs: page tables, descriptors, and what tells of the VMM's own faults.

use core::arch::{asm, naked_asm};

use bmcast_svm::paging::{self, NoFrames, PRESENT, WRITABLE, Width};
use spin::Once;

use super::cpu::{self, TablePointer};
use super::memory::{Tables, address};
use crate::say;

/// Null, 64-bit code, data.
static GDT: [u64; 3] = [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
/// The selector of code.
pub const CODE: u16 = 8;
/// The selector of data.
pub const DATA: u16 = 16;

/// An entry of the IDT.
#[repr(C)]
#[derive(Clone, Copy)]
struct Gate {
    low: u16,
    selector: u16,
    kind: u16,
    middle: u16,
    high: u32,
    reserved: u32,
}

#[repr(C, align(16))]
struct Idt([Gate; 256]);

static IDT: Once<Idt> = Once::new();
static CR3: Once<u64> = Once::new();

/// The CPU's width of physical addresses, and whether it has pages of 1 GiB.
pub fn width() -> Width {
    let top = cpu::cpuid(0x8000_0000)[0];
    let bits = if top >= 0x8000_0008 {
        cpu::cpuid(0x8000_0008)[0] & 0xff
    } else {
        36
    };
    Width {
        bits,
        gigabytes: cpu::cpuid(0x8000_0001)[3] & 1 << 26 != 0,
    }
}

/// Makes the tables, once.
pub fn prepare() -> Result<(), NoFrames> {
    let root = paging::identity(&mut Tables, width(), PRESENT | WRITABLE)?;
    CR3.call_once(|| root);
    let handler = address(faulted as *const ());
    let [a, b, c, d, e, f, g, h] = handler.to_le_bytes();
    let gate = Gate {
        low: u16::from_le_bytes([a, b]),
        selector: CODE,
        // Present, an interrupt gate.
        kind: 0x8e00,
        middle: u16::from_le_bytes([c, d]),
        high: u32::from_le_bytes([e, f, g, h]),
        reserved: 0,
    };
    IDT.call_once(|| Idt([gate; 256]));
    Ok(())
}

/// The root of the VMM's page tables.
pub fn cr3() -> u64 {
    CR3.get().copied().unwrap_or(0)
}

/// A pointer to the VMM's GDT.
pub fn gdt() -> TablePointer {
    TablePointer {
        limit: 23,
        base: address(&raw const GDT),
    }
}

/// Makes the VMM's tables this CPU's.
///
/// # Safety
///
/// [`prepare`] has been called, interrupts are off, and the caller's code and stack are mapped to themselves.
pub unsafe fn enter() {
    let gdt = gdt();
    let idt = TablePointer {
        limit: 4095,
        base: IDT.get().map_or(0, |idt| address(idt)),
    };
    // Paging's features that the VMM needs: PAE, FXSAVE, SSE's exceptions.
    const CR4: u64 = 1 << 5 | 1 << 9 | 1 << 10;
    // SAFETY: the tables are there; the code segment is loaded by a far return to the next instruction. CR4 first, so
    // that neither SMEP nor PCIDs nor global pages are on.
    unsafe {
        asm!(
            "mov cr4, {cr4}",
            "mov cr3, {cr3}",
            "lgdt [{gdt}]",
            "lidt [{idt}]",
            "push {code}",
            "lea {scratch}, [rip + 2f]",
            "push {scratch}",
            "retfq",
            "2:",
            "mov ss, {data:x}",
            "mov ds, {data:x}",
            "mov es, {data:x}",
            cr4 = in(reg) CR4,
            cr3 = in(reg) cr3(),
            gdt = in(reg) &raw const gdt,
            idt = in(reg) &raw const idt,
            code = const CODE as u64,
            data = in(reg) u32::from(DATA),
            scratch = out(reg) _,
        );
        // Task switched and emulated FPU: off.
        let cr0 = cpu::cr0() & !(1 << 2 | 1 << 3) | 1 << 1;
        asm!("mov cr0, {}", in(reg) cr0, options(nostack, preserves_flags));
    }
}

/// The VMM's own fault, or an NMI where there can be none.
#[unsafe(naked)]
unsafe extern "sysv64" fn faulted() {
    naked_asm!(
        "mov rdi, rsp",
        "and rsp, -16",
        "call {report}",
        report = sym report,
    )
}

unsafe extern "sysv64" fn report(frame: *const u64) -> ! {
    // SAFETY: the CPU has pushed at least five words there.
    let words = unsafe { core::slice::from_raw_parts(frame, 6) };
    say!(
        "the VMM has faulted: cr2 {:#x}, stack {words:#x?}",
        cpu::cr2()
    );
    cpu::stop()
}
