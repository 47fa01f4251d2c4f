//! The virtual machine control block (APM appendix B).

use core::mem::offset_of;

/// Intercepts of the vector at 0x00C.
pub struct Intercepts1;

impl Intercepts1 {
    /// A virtual interrupt could be taken now.
    pub const VINTR: u32 = 1 << 4;
    /// CPUID.
    pub const CPUID: u32 = 1 << 18;
    /// HLT.
    pub const HLT: u32 = 1 << 24;
    /// Ports that the I/O permission map names.
    pub const IOIO: u32 = 1 << 27;
    /// MSRs that the MSR permission map names.
    pub const MSR: u32 = 1 << 28;
    /// Triple fault.
    pub const SHUTDOWN: u32 = 1 << 31;
}

/// Intercepts of the vector at 0x010.
pub struct Intercepts2;

impl Intercepts2 {
    /// VMRUN; must be set.
    pub const VMRUN: u32 = 1 << 0;
    /// VMLOAD.
    pub const VMLOAD: u32 = 1 << 2;
    /// VMSAVE.
    pub const VMSAVE: u32 = 1 << 3;
    /// STGI.
    pub const STGI: u32 = 1 << 4;
    /// CLGI.
    pub const CLGI: u32 = 1 << 5;
    /// SKINIT.
    pub const SKINIT: u32 = 1 << 6;
}

/// Exit codes (APM appendix C).
pub mod exit {
    /// A virtual interrupt could be taken.
    pub const VINTR: u64 = 0x64;
    /// CPUID.
    pub const CPUID: u64 = 0x72;
    /// HLT.
    pub const HLT: u64 = 0x78;
    /// IN or OUT.
    pub const IOIO: u64 = 0x7b;
    /// RDMSR or WRMSR.
    pub const MSR: u64 = 0x7c;
    /// Triple fault.
    pub const SHUTDOWN: u64 = 0x7f;
    /// VMRUN, the first of SVM's own instructions.
    pub const VMRUN: u64 = 0x80;
    /// SKINIT, the last of them.
    pub const SKINIT: u64 = 0x86;
    /// Nested page fault.
    pub const NPF: u64 = 0x400;
    /// The VMCB is not consistent.
    pub const INVALID: u64 = u64::MAX;
}

/// What EXITINFO1 says of an IN or OUT (APM 15.10.2).
pub mod io_exit {
    /// An IN or OUT that has exited.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct IoExit {
        /// The port.
        pub port: u16,
        /// Bytes: 1, 2 or 4.
        pub width: u8,
        /// IN and not OUT.
        pub input: bool,
        /// INS or OUTS.
        pub string: bool,
    }

    impl IoExit {
        /// Reads it out of EXITINFO1.
        pub fn new(info: u64) -> Self {
            Self {
                port: u16::try_from(info >> 16 & 0xffff).unwrap_or(0),
                width: match info >> 4 & 7 {
                    1 => 1,
                    2 => 2,
                    _ => 4,
                },
                input: info & 1 != 0,
                string: info & 1 << 2 != 0,
            }
        }
    }
}

/// The control area.
#[repr(C)]
#[derive(Debug)]
pub struct Control {
    /// Reads of CR0 to CR15, then writes.
    pub intercept_cr: u32,
    /// Reads of DR0 to DR15, then writes.
    pub intercept_dr: u32,
    /// Exceptions by vector.
    pub intercept_exceptions: u32,
    /// [`Intercepts1`].
    pub intercepts1: u32,
    /// [`Intercepts2`].
    pub intercepts2: u32,
    reserved1: [u8; 0x2c],
    /// Physical address of the I/O permission map.
    pub iopm: u64,
    /// Physical address of the MSR permission map.
    pub msrpm: u64,
    /// Added to the TSC that the guest reads.
    pub tsc_offset: u64,
    /// Address space of the guest's TLB entries; not 0.
    pub asid: u32,
    /// 1: flush the whole TLB at the next entry.
    pub tlb_control: u32,
    /// Virtual interrupts: [`Control::V_IRQ`] and others.
    pub vintr: u64,
    /// Bit 0: the guest is in an interrupt shadow.
    pub interrupt_shadow: u64,
    /// Why it exited: [`exit`].
    pub exit_code: u64,
    /// More of it.
    pub exit_info1: u64,
    /// More of it: of a nested page fault the guest's physical address.
    pub exit_info2: u64,
    /// The event whose delivery was interrupted, if bit 31 is set.
    pub exit_int_info: u64,
    /// Bit 0: nested paging.
    pub nested_paging: u64,
    reserved2: [u8; 0x10],
    /// Event to inject, if bit 31 is set.
    pub event_injection: u64,
    /// Root of the nested page tables.
    pub nested_cr3: u64,
    reserved3: u64,
    /// What of the VMCB the CPU may have cached; 0: nothing.
    pub clean: u64,
    /// RIP of the next instruction, where the CPU has that feature.
    pub next_rip: u64,
    /// How many bytes of the instruction were fetched, where the CPU has decode assists.
    pub fetched: u8,
    /// These.
    pub instruction: [u8; 15],
    reserved4: [u8; 0x320],
}

impl Control {
    /// In [`vintr`](Self::vintr): a virtual interrupt is pending.
    pub const V_IRQ: u64 = 1 << 8;
    /// In [`vintr`](Self::vintr): whatever the priority of the task.
    pub const V_IGN_TPR: u64 = 1 << 20;
    /// In [`event_injection`](Self::event_injection): an invalid opcode.
    pub const INJECT_UD: u64 = 1 << 31 | 3 << 8 | 6;
    /// In [`event_injection`](Self::event_injection): a general protection fault, with error code 0.
    pub const INJECT_GP: u64 = 1 << 31 | 1 << 11 | 3 << 8 | 13;
}

/// A segment register with what it has cached.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Bits 40 to 47 and 52 to 55 of the descriptor.
    pub attributes: u16,
    /// Limit in bytes.
    pub limit: u32,
    /// Base.
    pub base: u64,
}

impl Segment {
    /// What the CPU has of a selector whose descriptor is `descriptor`, in bytes: the limit is expanded by its
    /// granularity (APM volume 2, 4.7).
    pub fn new(selector: u16, descriptor: u64) -> Self {
        let part = |low: u32, bits: u32| descriptor >> low & ((1 << bits) - 1);
        let attributes = part(40, 8) | part(52, 4) << 8;
        let limit = part(0, 16) | part(48, 4) << 16;
        let limit = if part(55, 1) == 1 {
            limit << 12 | 0xfff
        } else {
            limit
        };
        Self {
            selector,
            attributes: u16::try_from(attributes).unwrap_or(0),
            limit: u32::try_from(limit).unwrap_or(u32::MAX),
            base: part(16, 24) | part(56, 8) << 24,
        }
    }

    /// Its bit that makes code 64-bit code.
    pub const LONG: u16 = 1 << 9;
    /// Its bit that makes code or a stack 32-bit.
    pub const DEFAULT: u16 = 1 << 10;
}

/// GDTR or IDTR in the form of a segment.
pub type DescriptorTable = Segment;

/// The state save area.
#[repr(C)]
#[derive(Debug)]
pub struct Save {
    /// ES.
    pub es: Segment,
    /// CS.
    pub cs: Segment,
    /// SS.
    pub ss: Segment,
    /// DS.
    pub ds: Segment,
    /// FS; by VMLOAD and VMSAVE only.
    pub fs: Segment,
    /// GS; by VMLOAD and VMSAVE only.
    pub gs: Segment,
    /// GDTR.
    pub gdtr: DescriptorTable,
    /// LDTR; by VMLOAD and VMSAVE only.
    pub ldtr: Segment,
    /// IDTR.
    pub idtr: DescriptorTable,
    /// TR; by VMLOAD and VMSAVE only.
    pub tr: Segment,
    reserved1: [u8; 0x2b],
    /// Current privilege level.
    pub cpl: u8,
    reserved2: u32,
    /// EFER; SVME must be set.
    pub efer: u64,
    reserved3: [u8; 0x70],
    /// CR4.
    pub cr4: u64,
    /// CR3.
    pub cr3: u64,
    /// CR0.
    pub cr0: u64,
    /// DR7.
    pub dr7: u64,
    /// DR6.
    pub dr6: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RIP.
    pub rip: u64,
    reserved4: [u8; 0x58],
    /// RSP.
    pub rsp: u64,
    reserved5: [u8; 0x18],
    /// RAX.
    pub rax: u64,
    /// STAR, LSTAR, CSTAR, SFMASK, kernel GS base, SYSENTER's CS, ESP and EIP; by VMLOAD and VMSAVE only.
    pub syscall: [u64; 8],
    /// CR2.
    pub cr2: u64,
    reserved6: [u8; 0x20],
    /// The PAT, where there is nested paging.
    pub pat: u64,
    reserved7: [u8; 0x990],
}

/// A virtual machine control block: one page.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Vmcb {
    /// What the VMM asks, and what the CPU answers.
    pub control: Control,
    /// The guest's state.
    pub save: Save,
}

const _: () = {
    assert!(offset_of!(Control, iopm) == 0x40);
    assert!(offset_of!(Control, vintr) == 0x60);
    assert!(offset_of!(Control, exit_code) == 0x70);
    assert!(offset_of!(Control, nested_paging) == 0x90);
    assert!(offset_of!(Control, event_injection) == 0xa8);
    assert!(offset_of!(Control, clean) == 0xc0);
    assert!(offset_of!(Control, instruction) == 0xd1);
    assert!(offset_of!(Vmcb, save) == 0x400);
    assert!(offset_of!(Save, tr) == 0x90);
    assert!(offset_of!(Save, cpl) == 0xcb);
    assert!(offset_of!(Save, efer) == 0xd0);
    assert!(offset_of!(Save, cr4) == 0x148);
    assert!(offset_of!(Save, rip) == 0x178);
    assert!(offset_of!(Save, rsp) == 0x1d8);
    assert!(offset_of!(Save, rax) == 0x1f8);
    assert!(offset_of!(Save, cr2) == 0x240);
    assert!(offset_of!(Save, pat) == 0x268);
    assert!(size_of::<Vmcb>() == 4096);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_as_the_cpu_has_it() {
        // Linux' __KERNEL_CS.
        let code = Segment::new(0x10, 0x00af_9b00_0000_ffff);
        assert_eq!(code.attributes, 0xa9b);
        assert_eq!(code.limit, u32::MAX);
        assert_eq!(code.base, 0);
        assert_ne!(code.attributes & Segment::LONG, 0);
        let small = Segment::new(0x18, 0x1240_9334_5678_00ff);
        assert_eq!((small.base, small.limit), (0x1234_5678, 0xff));
    }

    #[test]
    fn an_out_to_the_configuration_address() {
        let exit = IoExit::new(0x0cf8_0040);
        assert_eq!(exit.port, 0xcf8);
        assert_eq!((exit.width, exit.input, exit.string), (4, false, false));
        assert!(IoExit::new(0x0cfc_0011).input);
        assert_eq!(IoExit::new(0x0cfc_0011).width, 1);
    }

    use super::io_exit::IoExit;
}
