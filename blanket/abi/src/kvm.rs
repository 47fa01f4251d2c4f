//! What passes between the core and the VMM, and between the core and KVM, when
//! the core runs inside a KVM VM.
//!
//! The VMM builds the same hole ([`crate::layout`]) and fills the same switch block
//! ([`crate::device::Switch`]) as the module. KVM's own part follows
//! `Documentation/virt/kvm/x86/msr.rst` and `arch/x86/include/uapi/asm/kvm_para.h`.

use core::sync::atomic::{AtomicU8, AtomicU32, AtomicU64};

/// The port that the core writes to when it leaves for the VMM. Reason, arguments
/// and answer are in the switch block. Code at CPL 3 cannot reach it: IOPL is 0 and
/// the TSS has no I/O bitmap.
pub const EXIT_PORT: u16 = 0xb1a;

/// Guest-physical address of guest frame 0. Below it is what KVM itself may map
/// (its APIC page); above the guest's frames is the core's memory.
pub const RAM_BASE: u64 = 4 << 30;

/// Interrupt vectors of the local APIC.
pub mod vector {
    /// Look at the pending word: another vCPU or the VMM has set a bit in it.
    pub const KICK: u8 = 0xf1;
    /// The deadline has come.
    pub const TIMER: u8 = 0xf2;
    /// Spurious.
    pub const SPURIOUS: u8 = 0xff;
}

/// Bits of CPUID leaf 0x40000001, eax, that the core uses.
pub mod feature {
    /// kvmclock with the MSRs of [`super::msr`].
    pub const CLOCK: u32 = 1 << 3;
    /// Steal time, with the preempted byte.
    pub const STEAL_TIME: u32 = 1 << 5;
    /// End of interrupt without an exit.
    pub const PV_EOI: u32 = 1 << 6;
    /// A preempted vCPU's TLB is flushed when it is asked to be.
    pub const TLB_FLUSH: u32 = 1 << 9;
    /// The stable bit of kvmclock means something.
    pub const CLOCK_STABLE: u32 = 1 << 24;
}

/// Model-specific registers.
pub mod msr {
    /// TSC deadline of the local APIC (Intel SDM vol. 3, 11.5.4.1).
    pub const TSC_DEADLINE: u32 = 0x6e0;
    /// x2APIC end of interrupt.
    pub const X2APIC_EOI: u32 = 0x80b;
    /// x2APIC task priority.
    pub const X2APIC_TPR: u32 = 0x808;
    /// x2APIC spurious interrupt vector and enable.
    pub const X2APIC_SVR: u32 = 0x80f;
    /// x2APIC interrupt command.
    pub const X2APIC_ICR: u32 = 0x830;
    /// x2APIC timer entry of the local vector table.
    pub const X2APIC_LVT_TIMER: u32 = 0x832;
    /// KVM: where to write the wall clock.
    pub const WALL_CLOCK: u32 = 0x4b56_4d00;
    /// KVM: where the vCPU's clock is; bit 0 enables.
    pub const SYSTEM_TIME: u32 = 0x4b56_4d01;
    /// KVM: where steal time is; bit 0 enables.
    pub const STEAL_TIME: u32 = 0x4b56_4d03;
    /// KVM: where the end-of-interrupt word is; bit 0 enables.
    pub const PV_EOI: u32 = 0x4b56_4d04;
}

/// [`Pv::preempted`]: the vCPU does not run.
pub const PREEMPTED: u8 = 1;
/// [`Pv::preempted`]: flush its TLB before it runs again.
pub const PREEMPTED_FLUSH: u8 = 2;

/// The page at [`crate::layout::vcpu::PV`], which KVM writes.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Pv {
    // struct pvclock_vcpu_time_info
    /// Odd while the fields of the clock change.
    pub version: AtomicU32,
    /// Padding.
    pub pad: u32,
    /// TSC at `system_time`.
    pub tsc_timestamp: AtomicU64,
    /// ns.
    pub system_time: AtomicU64,
    /// Multiplier.
    pub tsc_mul: AtomicU32,
    /// Shift, a signed byte.
    pub tsc_shift: AtomicU8,
    /// Bit 0: stable.
    pub flags: AtomicU8,
    /// Padding.
    pub pad2: [u8; 2],
    // struct pvclock_wall_clock
    /// Version of the wall clock.
    pub wall_version: AtomicU32,
    /// Wall clock at system time 0, seconds.
    pub wall_sec: AtomicU32,
    /// And nanoseconds.
    pub wall_nsec: AtomicU32,
    /// Bit 0: the interrupt in service needs no end-of-interrupt write.
    pub eoi: AtomicU32,
    /// Padding.
    pub pad3: [u64; 2],
    // struct kvm_steal_time, 64-byte aligned
    /// ns that the vCPU waited for a CPU.
    pub steal: AtomicU64,
    /// Version of it.
    pub steal_version: AtomicU32,
    /// Flags, 0.
    pub steal_flags: u32,
    /// [`PREEMPTED`] and [`PREEMPTED_FLUSH`].
    pub preempted: AtomicU8,
    /// Padding.
    pub pad4: [u8; 47],
}

/// Offset of the wall clock in [`Pv`].
pub const PV_WALL: u64 = core::mem::offset_of!(Pv, wall_version) as u64;
/// Offset of the end-of-interrupt word in [`Pv`].
pub const PV_EOI: u64 = core::mem::offset_of!(Pv, eoi) as u64;
/// Offset of steal time in [`Pv`].
pub const PV_STEAL: u64 = core::mem::offset_of!(Pv, steal) as u64;

const _: () = assert!(PV_STEAL.is_multiple_of(64) && PV_WALL == 32 && size_of::<Pv>() == 128);
