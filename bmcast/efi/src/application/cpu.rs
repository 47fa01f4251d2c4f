//! Instructions that Rust has no name for.

use core::arch::asm;

/// EFER.
pub const EFER: u32 = 0xc000_0080;
/// VM_HSAVE_PA: where VMRUN saves the host's state (APM 15.30.4).
pub const HSAVE: u32 = 0xc001_0117;
/// VM_CR: whether SVM may be used (APM 15.30.1).
pub const VM_CR: u32 = 0xc001_0114;
/// The PAT.
pub const PAT: u32 = 0x277;
/// Where the local APIC is, and in which mode.
pub const APIC_BASE: u32 = 0x1b;
/// In EFER: SVM is on.
pub const SVME: u64 = 1 << 12;
/// In EFER: long mode is active.
pub const LMA: u64 = 1 << 10;
/// In EFER: no-execute.
pub const NXE: u64 = 1 << 11;

/// Reads an MSR.
///
/// # Safety
///
/// The CPU must have it.
pub unsafe fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: as the caller says.
    unsafe {
        asm!("rdmsr", in("ecx") msr, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes an MSR.
///
/// # Safety
///
/// The CPU must have it, take the value, and go on as the caller expects.
pub unsafe fn wrmsr(msr: u32, value: u64) {
    let [low, high] = halves(value);
    // SAFETY: as the caller says.
    unsafe {
        asm!("wrmsr", in("ecx") msr, in("eax") low, in("edx") high, options(nostack, preserves_flags));
    }
}

/// The lower and the upper half.
pub fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}

/// Reads a port.
///
/// # Safety
///
/// Reading must have no effect that matters to others.
pub unsafe fn inb(port: u16) -> u8 {
    let value;
    // SAFETY: as the caller says.
    unsafe {
        asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags))
    };
    value
}

/// Writes a port.
///
/// # Safety
///
/// Writing must have no effect that others do not expect.
pub unsafe fn outb(port: u16, value: u8) {
    // SAFETY: as the caller says.
    unsafe {
        asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags))
    };
}

/// Reads `width` (1, 2 or 4) bytes of a port.
///
/// # Safety
///
/// As [`inb`].
pub unsafe fn port_in(port: u16, width: u8) -> u32 {
    let value: u32;
    // SAFETY: as the caller says.
    unsafe {
        match width {
            1 => value = u32::from(inb(port)),
            2 => {
                let word: u16;
                asm!("in ax, dx", in("dx") port, out("ax") word, options(nomem, nostack, preserves_flags));
                value = u32::from(word);
            }
            _ => {
                asm!("in eax, dx", in("dx") port, out("eax") value, options(nomem, nostack, preserves_flags))
            }
        }
    }
    value
}

/// Writes `width` (1, 2 or 4) bytes to a port.
///
/// # Safety
///
/// As [`outb`].
pub unsafe fn port_out(port: u16, width: u8, value: u32) {
    let [low, second, ..] = value.to_le_bytes();
    // SAFETY: as the caller says.
    unsafe {
        match width {
            1 => outb(port, low),
            2 => {
                let word = u16::from_le_bytes([low, second]);
                asm!("out dx, ax", in("dx") port, in("ax") word, options(nomem, nostack, preserves_flags));
            }
            _ => {
                asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags))
            }
        }
    }
}

macro_rules! control_register {
    ($read:ident, $name:literal) => {
        #[doc = concat!("Reads ", $name, ".")]
        pub fn $read() -> u64 {
            let value;
            // SAFETY: reading has no effect.
            unsafe {
                asm!(concat!("mov {}, ", $name), out(reg) value, options(nomem, nostack, preserves_flags));
            }
            value
        }
    };
}
control_register!(cr0, "cr0");
control_register!(cr2, "cr2");
control_register!(cr3, "cr3");
control_register!(cr4, "cr4");
control_register!(dr6, "dr6");
control_register!(dr7, "dr7");

/// A pointer to a descriptor table, as LGDT and SGDT have it.
#[repr(C, packed)]
#[derive(Clone, Copy, Default)]
pub struct TablePointer {
    /// Bytes less one.
    pub limit: u16,
    /// Where it is.
    pub base: u64,
}

/// GDTR.
pub fn gdtr() -> TablePointer {
    let mut pointer = TablePointer::default();
    // SAFETY: SGDT writes the ten bytes of `pointer`.
    unsafe { asm!("sgdt [{}]", in(reg) &raw mut pointer, options(nostack, preserves_flags)) };
    pointer
}

/// IDTR.
pub fn idtr() -> TablePointer {
    let mut pointer = TablePointer::default();
    // SAFETY: SIDT writes the ten bytes of `pointer`.
    unsafe { asm!("sidt [{}]", in(reg) &raw mut pointer, options(nostack, preserves_flags)) };
    pointer
}

macro_rules! selector {
    ($($name:ident),*) => {$(
        #[doc = concat!("The selector in ", stringify!($name), ".")]
        pub fn $name() -> u16 {
            let value: u16;
            // SAFETY: reading has no effect.
            unsafe {
                asm!(concat!("mov {:x}, ", stringify!($name)), out(reg) value, options(nomem, nostack, preserves_flags));
            }
            value
        }
    )*};
}
selector!(cs, ss, ds, es);

/// Cycles.
pub fn tsc() -> u64 {
    // SAFETY: every CPU in 64-bit mode has RDTSC.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// EAX, EBX, ECX and EDX of a leaf of CPUID.
pub fn cpuid(leaf: u32) -> [u32; 4] {
    let found = core::arch::x86_64::__cpuid(leaf);
    [found.eax, found.ebx, found.ecx, found.edx]
}

/// The same of a leaf and a subleaf.
pub fn cpuid_at(leaf: u32, subleaf: u32) -> [u32; 4] {
    let found = core::arch::x86_64::__cpuid_count(leaf, subleaf);
    [found.eax, found.ebx, found.ecx, found.edx]
}

/// This CPU's APIC ID of 8 bits.
pub fn apic_id() -> u8 {
    cpuid(1)[1].to_le_bytes()[3]
}

/// Stops this CPU for good.
pub fn stop() -> ! {
    loop {
        // SAFETY: interrupts are off; nothing is to go on.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) };
    }
}
