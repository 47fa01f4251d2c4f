//! Structures in memory that guest and hypervisor share (`public/xen.h`,
//! `public/arch-x86/xen.h`, `public/vcpu.h`).

/// `struct vcpu_time_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct VcpuTimeInfo {
    /// Odd while being changed.
    pub version: u32,
    /// Padding.
    pub pad0: u32,
    /// TSC at `system_time`.
    pub tsc_timestamp: u64,
    /// ns since boot.
    pub system_time: u64,
    /// Multiplier.
    pub tsc_to_system_mul: u32,
    /// Shift.
    pub tsc_shift: i8,
    /// Bit 0: stable across vCPUs.
    pub flags: u8,
    /// Padding.
    pub pad1: [u8; 2],
}

/// `struct vcpu_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct VcpuInfo {
    /// An event waits.
    pub evtchn_upcall_pending: u8,
    /// Events are masked.
    pub evtchn_upcall_mask: u8,
    /// Padding.
    pub pad: [u8; 6],
    /// Which words of the pending array to look at.
    pub evtchn_pending_sel: u64,
    /// Fault address.
    pub cr2: u64,
    /// Padding.
    pub arch_pad: u64,
    /// Clock.
    pub time: VcpuTimeInfo,
}

/// Offsets in `struct vcpu_info`.
pub mod vcpu_info {
    /// `evtchn_upcall_pending`.
    pub const PENDING: u64 = 0;
    /// `evtchn_upcall_mask`.
    pub const MASK: u64 = 1;
    /// `evtchn_pending_sel`.
    pub const PENDING_SEL: u64 = 8;
    /// `arch.cr2`.
    pub const CR2: u64 = 16;
    /// `time`.
    pub const TIME: u64 = 32;
    /// Bytes.
    pub const SIZE: u64 = 64;
}

/// Offsets in `struct shared_info`.
pub mod shared_info {
    /// `vcpu_info[32]`.
    pub const VCPU_INFO: u64 = 0;
    /// `evtchn_pending[64]`.
    pub const EVTCHN_PENDING: u64 = 2048;
    /// `evtchn_mask[64]`.
    pub const EVTCHN_MASK: u64 = 2560;
    /// `wc_version`.
    pub const WC_VERSION: u64 = 3072;
    /// `wc_sec`.
    pub const WC_SEC: u64 = 3076;
    /// `wc_nsec`.
    pub const WC_NSEC: u64 = 3080;
    /// `wc_sec_hi`.
    pub const WC_SEC_HI: u64 = 3084;
    /// vCPUs that have a vcpu_info here.
    pub const LEGACY_VCPUS: u32 = 32;
}

/// `RUNSTATE_*` (`public/vcpu.h`).
pub mod runstate {
    /// On a CPU.
    pub const RUNNING: u32 = 0;
    /// Waits for a CPU.
    pub const RUNNABLE: u32 = 1;
    /// Idle.
    pub const BLOCKED: u32 = 2;
    /// Not up.
    pub const OFFLINE: u32 = 3;
    /// Bit in `state_entry_time` while an update is under way.
    pub const UPDATE: u64 = 1 << 63;
    /// Bytes of the area.
    pub const SIZE: u64 = 48;
}

/// `struct cpu_user_regs`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "register names")]
pub struct CpuUserRegs {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub error_code: u32,
    pub entry_vector: u32,
    pub rip: u64,
    pub cs: u16,
    pub pad0: u16,
    pub saved_upcall_mask: u8,
    pub pad1: [u8; 3],
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub es: u64,
    pub ds: u64,
    pub fs: u64,
    pub gs: u64,
}

/// Offsets in `struct vcpu_guest_context`.
pub mod guest_context {
    /// FXSAVE image.
    pub const FPU: u64 = 0;
    /// `VGCF_*`.
    pub const FLAGS: u64 = 512;
    /// [`super::CpuUserRegs`].
    pub const USER_REGS: u64 = 520;
    /// 256 trap table entries of 16 bytes.
    pub const TRAP_CTXT: u64 = 720;
    /// LDT base.
    pub const LDT_BASE: u64 = 4816;
    /// LDT entries.
    pub const LDT_ENTS: u64 = 4824;
    /// 16 GDT frames.
    pub const GDT_FRAMES: u64 = 4832;
    /// GDT entries.
    pub const GDT_ENTS: u64 = 4960;
    /// Kernel stack segment.
    pub const KERNEL_SS: u64 = 4968;
    /// Kernel stack pointer.
    pub const KERNEL_SP: u64 = 4976;
    /// Control registers 0 to 7.
    pub const CTRLREG: u64 = 4984;
    /// Debug registers 0 to 7.
    pub const DEBUGREG: u64 = 5048;
    /// Event callback.
    pub const EVENT_CALLBACK: u64 = 5112;
    /// Failsafe callback.
    pub const FAILSAFE_CALLBACK: u64 = 5120;
    /// System call callback.
    pub const SYSCALL_CALLBACK: u64 = 5128;
    /// vm_assist bits.
    pub const VM_ASSIST: u64 = 5136;
    /// FS base.
    pub const FS_BASE: u64 = 5144;
    /// Kernel GS base.
    pub const GS_BASE_KERNEL: u64 = 5152;
    /// User GS base.
    pub const GS_BASE_USER: u64 = 5160;
    /// Bytes.
    pub const SIZE: usize = 5168;
}

const _: () = {
    assert!(size_of::<VcpuInfo>() == 64);
    assert!(size_of::<VcpuTimeInfo>() == 32);
    assert!(size_of::<CpuUserRegs>() == 200);
};
