//! Hypercall numbers and their operands (`public/xen.h` and the header named at each).

macro_rules! numbers {
    ($($(#[$doc:meta])* $name:ident = $nr:literal;)*) => {
        $($(#[$doc])* pub const $name: u64 = $nr;)*
        /// Name of a hypercall number.
        #[must_use]
        pub const fn name(nr: u64) -> Option<&'static str> {
            match nr { $($nr => Some(stringify!($name)),)* _ => None }
        }
    };
}
numbers! {
    /// Register trap handlers.
    SET_TRAP_TABLE = 0;
    /// Change page-table entries.
    MMU_UPDATE = 1;
    /// Install a GDT.
    SET_GDT = 2;
    /// Stack for user-to-kernel entries.
    STACK_SWITCH = 3;
    /// Old form of callback_op.
    SET_CALLBACKS = 4;
    /// Set or clear TS.
    FPU_TASKSWITCH = 5;
    /// Control domain only.
    PLATFORM_OP = 7;
    /// Write a debug register.
    SET_DEBUGREG = 8;
    /// Read a debug register.
    GET_DEBUGREG = 9;
    /// Write a descriptor.
    UPDATE_DESCRIPTOR = 10;
    /// Memory map, reservation.
    MEMORY_OP = 12;
    /// Several calls in one.
    MULTICALL = 13;
    /// Change the entry that maps an address.
    UPDATE_VA_MAPPING = 14;
    /// One-shot timer, old form.
    SET_TIMER_OP = 15;
    /// Version and features.
    XEN_VERSION = 17;
    /// Emergency console.
    CONSOLE_IO = 18;
    /// Grant tables.
    GRANT_TABLE_OP = 20;
    /// Optional behaviours.
    VM_ASSIST = 21;
    /// Control domain only.
    UPDATE_VA_MAPPING_OTHERDOMAIN = 22;
    /// Return from a trap.
    IRET = 23;
    /// vCPU bring-up, timers, areas.
    VCPU_OP = 24;
    /// FS and GS bases.
    SET_SEGMENT_BASE = 25;
    /// Pinning, roots, TLB.
    MMUEXT_OP = 26;
    /// Security modules.
    XSM_OP = 27;
    /// NMI callback, old form.
    NMI_OP = 28;
    /// Yield, block, shut down, poll.
    SCHED_OP = 29;
    /// Register callbacks.
    CALLBACK_OP = 30;
    /// Profiling.
    XENOPROF_OP = 31;
    /// Event channels.
    EVENT_CHANNEL_OP = 32;
    /// Physical devices.
    PHYSDEV_OP = 33;
    /// HVM guests.
    HVM_OP = 34;
    /// Control domain only.
    SYSCTL = 35;
    /// Control domain only.
    DOMCTL = 36;
    /// Kexec.
    KEXEC_OP = 37;
    /// Transcendent memory, gone.
    TMEM_OP = 38;
    /// Argo.
    ARGO_OP = 39;
    /// Performance counters.
    XENPMU_OP = 40;
    /// Device models.
    DM_OP = 41;
}

/// One past the largest number that is counted and dispatched.
pub const COUNT: u64 = 48;

/// `XENVER_*` (`public/version.h`).
pub mod version {
    /// Major and minor.
    pub const VERSION: u64 = 0;
    /// Text after the version.
    pub const EXTRAVERSION: u64 = 1;
    /// Compiler.
    pub const COMPILE_INFO: u64 = 2;
    /// Supported guest types.
    pub const CAPABILITIES: u64 = 3;
    /// Change set.
    pub const CHANGESET: u64 = 4;
    /// Start of the hypervisor's range.
    pub const PLATFORM_PARAMETERS: u64 = 5;
    /// Feature bits.
    pub const GET_FEATURES: u64 = 6;
    /// Page size.
    pub const PAGESIZE: u64 = 7;
    /// Domain handle.
    pub const GUEST_HANDLE: u64 = 8;
    /// Hypervisor command line.
    pub const COMMANDLINE: u64 = 9;
    /// Build id.
    pub const BUILD_ID: u64 = 10;
}

/// `XENFEAT_*` (`public/features.h`), bit numbers of submap 0.
pub mod feature {
    /// Page tables of PAE guests may be above 4 GiB.
    pub const PAE_PGDIR_ABOVE_4GB: u32 = 4;
    /// mmu_update can preserve accessed and dirty bits. Linux demands it.
    pub const MMU_PT_UPDATE_PRESERVE_AD: u32 = 5;
    /// Grant maps take available bits. Linux demands it.
    pub const GNTTAB_MAP_AVAIL_BITS: u32 = 7;
    /// memory_op takes a virtual NUMA node.
    pub const MEMORY_OP_VNODE_SUPPORTED: u32 = 13;
}

/// `MMU_*` in the low bits of `mmu_update_t.ptr` (`public/xen.h`).
pub mod mmu {
    /// Plain update.
    pub const NORMAL: u64 = 0;
    /// Set a machine-to-physical entry.
    pub const MACHPHYS: u64 = 1;
    /// Keep the old accessed and dirty bits.
    pub const PRESERVE_AD: u64 = 2;
    /// No translation (unused for PV).
    pub const NO_TRANSLATE: u64 = 3;
}

/// `MMUEXT_*` (`public/xen.h`).
pub mod mmuext {
    /// Pin as a leaf table.
    pub const PIN_L1: u32 = 0;
    /// Pin as a level-2 table.
    pub const PIN_L2: u32 = 1;
    /// Pin as a level-3 table.
    pub const PIN_L3: u32 = 2;
    /// Pin as a root.
    pub const PIN_L4: u32 = 3;
    /// Unpin.
    pub const UNPIN: u32 = 4;
    /// Load the kernel root.
    pub const NEW_BASEPTR: u32 = 5;
    /// Flush the local TLB.
    pub const TLB_FLUSH_LOCAL: u32 = 6;
    /// Flush one address locally.
    pub const INVLPG_LOCAL: u32 = 7;
    /// Flush the TLBs of a set of vCPUs.
    pub const TLB_FLUSH_MULTI: u32 = 8;
    /// Flush one address on a set of vCPUs.
    pub const INVLPG_MULTI: u32 = 9;
    /// Flush all TLBs.
    pub const TLB_FLUSH_ALL: u32 = 10;
    /// Flush one address everywhere.
    pub const INVLPG_ALL: u32 = 11;
    /// Flush caches.
    pub const FLUSH_CACHE: u32 = 12;
    /// Load an LDT.
    pub const SET_LDT: u32 = 13;
    /// Load the user root.
    pub const NEW_USER_BASEPTR: u32 = 15;
    /// Zero a frame.
    pub const CLEAR_PAGE: u32 = 16;
    /// Copy a frame.
    pub const COPY_PAGE: u32 = 17;
    /// Flush caches everywhere.
    pub const FLUSH_CACHE_GLOBAL: u32 = 18;
}

/// `UVMF_*`, flags of update_va_mapping (`public/xen.h`).
pub mod uvmf {
    /// Which flush.
    pub const FLUSHTYPE_MASK: u64 = 3;
    /// No flush.
    pub const NONE: u64 = 0;
    /// Whole TLB.
    pub const TLB_FLUSH: u64 = 1;
    /// One address.
    pub const INVLPG: u64 = 2;
    /// On all vCPUs.
    pub const ALL: u64 = 4;
}

/// `VCPUOP_*` (`public/vcpu.h`).
pub mod vcpu {
    /// Give the first context.
    pub const INITIALISE: u64 = 0;
    /// Start.
    pub const UP: u64 = 1;
    /// Stop.
    pub const DOWN: u64 = 2;
    /// Query.
    pub const IS_UP: u64 = 3;
    /// Copy the run-state.
    pub const GET_RUNSTATE_INFO: u64 = 4;
    /// Keep the run-state in guest memory.
    pub const REGISTER_RUNSTATE_MEMORY_AREA: u64 = 5;
    /// Periodic timer.
    pub const SET_PERIODIC_TIMER: u64 = 6;
    /// No periodic timer.
    pub const STOP_PERIODIC_TIMER: u64 = 7;
    /// One-shot timer.
    pub const SET_SINGLESHOT_TIMER: u64 = 8;
    /// No one-shot timer.
    pub const STOP_SINGLESHOT_TIMER: u64 = 9;
    /// Move the vcpu_info.
    pub const REGISTER_VCPU_INFO: u64 = 10;
    /// Send an NMI.
    pub const SEND_NMI: u64 = 11;
    /// Physical id.
    pub const GET_PHYSID: u64 = 12;
    /// Second copy of the time parameters.
    pub const REGISTER_VCPU_TIME_MEMORY_AREA: u64 = 13;
}

/// `SCHEDOP_*` and shutdown reasons (`public/sched.h`).
pub mod sched {
    /// Yield.
    pub const YIELD: u64 = 0;
    /// Sleep until an event.
    pub const BLOCK: u64 = 1;
    /// End the domain.
    pub const SHUTDOWN: u64 = 2;
    /// Sleep until a port is pending.
    pub const POLL: u64 = 3;
    /// End another domain.
    pub const REMOTE_SHUTDOWN: u64 = 4;
    /// Remember a reason.
    pub const SHUTDOWN_CODE: u64 = 5;
    /// Watchdog.
    pub const WATCHDOG: u64 = 6;
    /// Pin (control domain).
    pub const PIN_OVERRIDE: u64 = 7;

    /// Power off.
    pub const SHUTDOWN_POWEROFF: u64 = 0;
    /// Reboot.
    pub const SHUTDOWN_REBOOT: u64 = 1;
    /// Suspend.
    pub const SHUTDOWN_SUSPEND: u64 = 2;
    /// Crash.
    pub const SHUTDOWN_CRASH: u64 = 3;
    /// Watchdog expired.
    pub const SHUTDOWN_WATCHDOG: u64 = 4;
    /// Soft reset.
    pub const SHUTDOWN_SOFT_RESET: u64 = 5;
}

/// `XENMEM_*` (`public/memory.h`).
pub mod memory {
    /// Add frames.
    pub const INCREASE_RESERVATION: u64 = 0;
    /// Give frames back.
    pub const DECREASE_RESERVATION: u64 = 1;
    /// Largest frame of the machine.
    pub const MAXIMUM_RAM_PAGE: u64 = 2;
    /// Frames of the domain.
    pub const CURRENT_RESERVATION: u64 = 3;
    /// Most frames of the domain.
    pub const MAXIMUM_RESERVATION: u64 = 4;
    /// Fill frames.
    pub const POPULATE_PHYSMAP: u64 = 6;
    /// E820.
    pub const MEMORY_MAP: u64 = 9;
    /// Swap frames.
    pub const EXCHANGE: u64 = 11;
    /// Where the M2P is.
    pub const MACHPHYS_MAPPING: u64 = 12;
}

/// Callback types (`public/callback.h`).
pub mod callback {
    /// `CALLBACKOP_register`.
    pub const REGISTER: u64 = 0;
    /// `CALLBACKOP_unregister`.
    pub const UNREGISTER: u64 = 1;
    /// Event upcall.
    pub const EVENT: u16 = 0;
    /// Failed return to the guest.
    pub const FAILSAFE: u16 = 1;
    /// 64-bit system call.
    pub const SYSCALL: u16 = 2;
    /// Non-maskable interrupt.
    pub const NMI: u16 = 4;
    /// 32-bit sysenter.
    pub const SYSENTER: u16 = 5;
    /// 32-bit system call.
    pub const SYSCALL32: u16 = 7;
}

/// `SEGBASE_*` (`public/xen.h`).
pub mod segbase {
    /// FS.
    pub const FS: u64 = 0;
    /// User GS.
    pub const GS_USER: u64 = 1;
    /// Kernel GS.
    pub const GS_KERNEL: u64 = 2;
    /// Load a user GS selector.
    pub const GS_USER_SEL: u64 = 3;
}

/// vm_assist types (`public/xen.h`).
pub mod assist {
    /// Emulate writes to page tables.
    pub const WRITABLE_PAGETABLES: u64 = 2;
    /// CR3 values with more than 32 bits.
    pub const PAE_EXTENDED_CR3: u64 = 3;
    /// IOPL as the architecture has it.
    pub const ARCHITECTURAL_IOPL: u64 = 4;
    /// Mark run-state updates.
    pub const RUNSTATE_UPDATE_FLAG: u64 = 5;
}

/// Bits of the flags in `vcpu_guest_context` (`public/arch-x86/xen.h`).
pub mod vgcf {
    /// The context starts in kernel mode.
    pub const IN_KERNEL: u64 = 1 << 2;
    /// Failsafe masks events.
    pub const FAILSAFE_DISABLES_EVENTS: u64 = 1 << 3;
    /// System calls mask events.
    pub const SYSCALL_DISABLES_EVENTS: u64 = 1 << 4;
    /// In the iret frame: return as from a system call.
    pub const IN_SYSCALL: u64 = 1 << 8;
}
