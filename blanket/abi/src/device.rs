//! The module's ABI: `/dev/blanket` for the VMM, the switch block for the core.
//! Inside KVM the VMM itself builds and serves what the module would
//! ([`VmPage::host`] says which); fields that one of the two does not need stay 0.
//!
//! `blanket/kmod/blanket.h` is the same contract in C; `cargo xtask test`
//! compiles a program that compares every size, offset and number of the two.
//! What the host does for each exit reason is written down in `docs/module-abi.md`.

use core::sync::atomic::{AtomicI8, AtomicU8, AtomicU32, AtomicU64};

use crate::cpuid::HIDDEN_WORDS;

/// Version of everything in this module. The VMM, the core and the module must
/// agree on it exactly.
pub const API_VERSION: u32 = 7;

/// `'B' << 8`, the ioctl type.
const IOC: u32 = 0xb7 << 8;
#[allow(clippy::cast_possible_truncation, reason = "sizes of small structures")]
const fn ior(nr: u32, size: usize) -> u32 {
    0x8000_0000 | ((size as u32) << 16) | IOC | nr
}
#[allow(clippy::cast_possible_truncation, reason = "sizes of small structures")]
const fn iow(nr: u32, size: usize) -> u32 {
    0x4000_0000 | ((size as u32) << 16) | IOC | nr
}

/// On the device: fills an [`Info`].
pub const GET_INFO: u32 = ior(0, size_of::<Info>());
/// On the device: takes a [`CreateVm`], returns a VM descriptor.
pub const CREATE_VM: u32 = iow(1, size_of::<CreateVm>());
/// On a VM: argument is the vCPU id, returns a vCPU descriptor.
pub const CREATE_VCPU: u32 = IOC | 2;
/// On a VM: argument is the event channel port to raise, as an interdomain
/// notification from the backend.
pub const RAISE: u32 = IOC | 3;
/// On a VM: fills a [`VmStats`].
pub const GET_STATS: u32 = ior(4, size_of::<VmStats>());
/// On a vCPU: enter the guest until something needs the VMM. Fails with EINTR on
/// a pending signal or [`Run::immediate_exit`].
pub const RUN: u32 = IOC | 5;
/// On a VM: raise a virtual interrupt line of the toolstack on vCPU 0 (argument: VIRQ number).
pub const RAISE_VIRQ: u32 = IOC | 6;
/// On a VM none of whose vCPUs is in RUN: walks all page tables that a CPU may use
/// for it and fills an [`Audit`].
pub const AUDIT: u32 = ior(8, size_of::<Audit>());
/// On a VM: argument 1 switches its trace on, 0 off. The rings are at offsets of
/// [`crate::layout::vcpu::TRACE_SIZE`] of the VM's descriptor, in the order of the
/// vCPUs, from the first time that it was on.
pub const TRACE: u32 = IOC | 7;
/// On a VM: argument is how many frames of RAM the guest may have at most; it gets no
/// more back of what it has given up. It keeps what it has.
pub const TARGET: u32 = IOC | 9;
/// On a VM: its core gives shadow pages that nothing uses back to the host, soon.
pub const RECLAIM: u32 = IOC | 10;
/// On a VM: argument is one of [`pause`]; all vCPUs are made to look at it.
pub const PAUSE: u32 = IOC | 11;

/// Answer to [`GET_INFO`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Info {
    /// [`API_VERSION`] of the module.
    pub api: u32,
    /// Most vCPUs of a VM.
    pub max_vcpus: u32,
    /// Largest VM in frames.
    pub max_frames: u64,
    /// Hash of the core image inside the module.
    pub build_id: [u8; 32],
    /// Bits of [`features`].
    pub features: u64,
    /// Frequency of the TSC, kHz.
    pub tsc_khz: u64,
    /// Mask of XCR0 bits that guests may use; 0 without XSAVE.
    pub xcr0_mask: u64,
}

/// Bits of [`Info::features`].
pub mod features {
    /// The host's TSC is stable: guests get the stable flag in pvclock.
    pub const STABLE_TSC: u64 = 1 << 0;
    /// The host runs with 5-level paging.
    pub const LA57: u64 = 1 << 1;
    /// The host has XSAVE.
    pub const XSAVE: u64 = 1 << 2;
    /// Programs of guests see the VM's CPUID, not the host's.
    pub const CPUID_PROFILE: u64 = 1 << 3;
    /// The CPU has Meltdown: VMs are isolated from their core unless they are not to be.
    pub const ISOLATES: u64 = 1 << 4;
}

/// Argument of [`CREATE_VM`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct CreateVm {
    /// User address of the VM's memory, page aligned, a shared mapping.
    pub user_addr: u64,
    /// Frames of it: RAM and the hypervisor's frames above.
    pub nr_frames: u64,
    /// Most pages the shadow pool may take; 0 = the module's default.
    pub pool_limit: u64,
    /// vCPUs, 1 to [`Info::max_vcpus`].
    pub nr_vcpus: u32,
    /// Bits of [`create`].
    pub flags: u32,
    /// How the first vCPU starts.
    pub boot: Boot,
    /// XCR0 components that the guest may have, of [`Info::xcr0_mask`]; 0 takes XSAVE away,
    /// and CR4.OSXSAVE is clear then while the VM runs.
    pub xcr0_mask: u64,
    /// Features that its CPUID does not show: [`crate::cpuid::Hidden`].
    pub cpuid_hidden: [u32; HIDDEN_WORDS],
}

/// Bits of [`CreateVm::flags`]. With neither, VMs are isolated on CPUs with Meltdown.
pub mod create {
    /// The guest's roots hold the entry area only, and the core runs on a root of its own.
    pub const ISOLATE: u32 = 1 << 0;
    /// They do not. On a CPU with Meltdown this is for root only.
    pub const SHARE: u32 = 1 << 1;
}

/// What the core must know to start a domain: the result of the domain builder.
/// All of it is checked by the core, none of it is trusted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Boot {
    /// Frames of guest RAM, from gfn 0. Not all at once, see [`Self::most`].
    pub ram_frames: u64,
    /// gfn of the shared info page (above RAM).
    pub shared_info: u64,
    /// First gfn of the grant table (above RAM).
    pub grant_base: u64,
    /// Frames of the grant table.
    pub grant_frames: u64,
    /// gfn of the initial L4.
    pub cr3: u64,
    /// Initial instruction pointer (ELF note ENTRY).
    pub rip: u64,
    /// Initial stack pointer.
    pub rsp: u64,
    /// Virtual address of start_info.
    pub start_info: u64,
    /// Event channel port of the xenstore ring.
    pub store_port: u32,
    /// Event channel port of the console ring.
    pub console_port: u32,
    /// Bits of [`boot_flags`].
    pub flags: u64,
    /// Virtual address of the hypercall page that the builder filled, or 0.
    pub hypercall_page: u64,
    /// Frames of RAM, from gfn 0, that the guest has at the start, with the root among
    /// them; the others are as if it had given them up. 0 = all.
    pub start_frames: u64,
    /// First gfn of the frames for the VM's state ([`crate::state`]), above RAM.
    pub state_base: u64,
    /// Frames for it.
    pub state_frames: u64,
    /// How many of its frames of RAM the guest may have at once; 0 = all.
    pub most_frames: u64,
}

impl Boot {
    /// The most frames of RAM that the guest can have. A guest that may get some later has
    /// more frame numbers than that ([`crate::layout::added_later`]).
    #[must_use]
    pub const fn most(&self) -> u64 {
        match self.most_frames {
            0 => self.ram_frames,
            most => most,
        }
    }
}

/// Bits of [`Boot::flags`].
pub mod boot_flags {
    /// Write the core's own log lines for every refused hypercall.
    pub const VERBOSE: u64 = 1 << 0;
    /// The guest may break the core on purpose ([`super::inject`]). The module
    /// refuses it unless root has loaded it with `inject=1`.
    pub const INJECT: u64 = 1 << 1;
    /// The VM goes on as the frames from [`super::Boot::state_base`] on say, and not as
    /// the domain builder left it.
    pub const RESTORE: u64 = 1 << 2;
}

/// Faults of the core on purpose, for tests: a hypercall that exists only in VMs
/// with [`boot_flags::INJECT`].
pub mod inject {
    /// Number of the hypercall (`__HYPERVISOR_arch_7` of `public/xen.h`, which no
    /// x86 guest uses). Argument 0 is one of the following.
    pub const CALL: u64 = 55;
    /// A panic.
    pub const PANIC: u64 = 1;
    /// A page fault in ring 0.
    pub const FAULT: u64 = 2;
    /// A loop without end, with interrupts off and the MMU's lock held.
    pub const LOOP: u64 = 3;
    /// A loop without end that lets interrupts in.
    pub const OPEN_LOOP: u64 = 4;
}

/// Shared page of a vCPU, mapped by the VMM at offset 0 of the vCPU descriptor.
/// Everything here except `immediate_exit` is written by the module.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Why RUN returned: one of [`exit`].
    pub exit: u32,
    /// Set by the VMM (any thread): RUN returns EINTR as soon as it can.
    pub immediate_exit: u32,
    /// Arguments of the exit.
    pub args: [u64; 4],
    /// Bytes used in `data`.
    pub data_len: u32,
    /// Unused.
    pub pad: u32,
    /// Console bytes, or the text of a crash report.
    pub data: [u8; RUN_DATA],
}

/// Bytes of [`Run::data`].
pub const RUN_DATA: usize = 2048;

/// Exit reasons. Those below [`exit::USER`] are between the core and the module
/// and never reach the VMM.
pub mod exit {
    /// A host interrupt arrived; arg 0 = vector.
    pub const INTR: u32 = 1;
    /// An NMI arrived.
    pub const NMI: u32 = 2;
    /// A machine check arrived.
    pub const MCE: u32 = 3;
    /// Nothing to run until an event, or the deadline in the switch block.
    pub const IDLE: u32 = 4;
    /// Guest frame arg 0 has no window entry: find it through the host's page
    /// tables and write the entry. Return value 0, or a negative errno.
    pub const FRAME: u32 = 5;
    /// Make the vCPUs in mask arg 0 leave the guest or wake up.
    pub const KICK: u32 = 6;
    /// As KICK, and return only when each has reloaded CR3.
    pub const FLUSH: u32 = 7;
    /// The deadline moved earlier than the armed host timer.
    pub const DEADLINE: u32 = 8;
    /// Add arg 0 pages to the shadow pool. Returns the number added.
    pub const POOL: u32 = 9;
    /// Let others run: the vCPU spins for something that another holds.
    pub const YIELD: u32 = 10;
    /// A long operation lets the host's interrupts in.
    pub const BREATH: u32 = 11;
    /// Set XCR0 to arg 0. Only inside KVM: under the module the core does it itself.
    pub const XCR0: u32 = 12;
    /// `data` has arg 0 page numbers of 32 bits of the shadow pool: zeroed pages whose
    /// memory the host takes. It must not use it before every vCPU has been outside.
    pub const TRIM: u32 = 13;
    /// `data` has arg 0 page numbers of 32 bits, whose memory the host has taken: give
    /// zeroed pages. Returns how many it has given, the first of the list.
    pub const FILL: u32 = 14;

    /// First reason that the VMM sees.
    pub const USER: u32 = 16;
    /// The guest notified backend port arg 0.
    pub const SEND: u32 = 16;
    /// The guest wrote `data` with console_io.
    pub const CONSOLE: u32 = 17;
    /// The guest shut down; arg 0 = `SHUTDOWN_*` of the Xen ABI.
    pub const SHUTDOWN: u32 = 18;
    /// The guest cannot go on; `data` is the report, arg 0 one of [`super::crash`].
    pub const CRASH: u32 = 19;
    /// The guest has given frames up, or has got some back. `data` has arg 0 frame
    /// numbers of 32 bits that it has given up, whose memory the VMM gives to the
    /// host; arg 1 = frames of RAM that the guest has now.
    pub const BALLOON: u32 = 20;
    /// The vCPU stands still, as [`super::VmPage::pause`] asks. It goes on when it is
    /// run with 0 there.
    pub const PAUSED: u32 = 21;

    /// A reason in a word.
    #[must_use]
    pub const fn name(reason: u32) -> Option<&'static str> {
        Some(match reason {
            INTR => "interrupt",
            NMI => "nmi",
            MCE => "machine-check",
            IDLE => "idle",
            FRAME => "frame",
            KICK => "kick",
            FLUSH => "flush",
            DEADLINE => "deadline",
            POOL => "pool",
            YIELD => "yield",
            BREATH => "breath",
            XCR0 => "xcr0",
            TRIM => "trim",
            FILL => "fill",
            SEND => "send",
            CONSOLE => "console",
            SHUTDOWN => "shutdown",
            CRASH => "crash",
            BALLOON => "balloon",
            PAUSED => "paused",
            _ => return None,
        })
    }
}

/// Why a VM was ended (argument of [`exit::CRASH`]).
pub mod crash {
    /// The guest did something that has no defined outcome, for instance an
    /// event frame that does not fit its stack.
    pub const GUEST: u64 = 1;
    /// The core found its own state wrong. A bug of ours; the report says where.
    pub const CORE: u64 = 2;
    /// The host could not give memory.
    pub const MEMORY: u64 = 3;
}

/// Number of exit reasons that are counted.
pub const EXIT_REASONS: usize = 32;

/// Answer to [`GET_STATS`]: sums over the VM's vCPUs.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct VmStats {
    /// World switches by exit reason.
    pub exits: [u64; EXIT_REASONS],
    /// Counters of the core, see [`counter`].
    pub counters: [u64; COUNTERS],
    /// Frames of guest memory present.
    pub frames: u64,
    /// Pages in the shadow pool.
    pub pool: u64,
    /// Nanoseconds spent in the core world.
    pub guest_ns: u64,
    /// Times that the host took frames back.
    pub revocations: u64,
    /// Frames that the host took back.
    pub revoked: u64,
}

/// Answer to [`AUDIT`]: what a VM's page tables map, found by walking them as the CPU
/// does and asking others than the tables whose each frame is.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Guest roots that the core keeps.
    pub roots: u64,
    /// Roots that a vCPU goes back to when it runs on.
    pub loaded: u64,
    /// Tables of the guest's part of the address spaces.
    pub tables: u64,
    /// Leaves in them.
    pub leaves: u64,
    /// Leaves that may be written through.
    pub writable: u64,
    /// Leaves in the hypervisor's part.
    pub own: u64,
    /// Leaves of the entry area, the only part of the hypervisor's that the roots of an
    /// isolated guest hold; 0 for other guests.
    pub entry_area: u64,
    /// Leaves of frames that the host has taken back: the core removes them before any
    /// vCPU loads a root. Always 0 inside KVM.
    pub taken: u64,
    /// Guest frames that the host has given, by the owner's address space.
    pub frames: u64,
    /// Entries that break a rule.
    pub broken: u64,
    /// The first of them: which of [`audit`].
    pub rule: u32,
    /// Level of its table.
    pub level: u32,
    /// First address that it translates.
    pub va: u64,
    /// The entry, without the bits of the frame.
    pub entry: u64,
}

/// Rules of [`Audit::rule`].
pub mod audit {
    /// A guest's leaf maps a frame that is not one of this VM's.
    pub const FOREIGN: u32 = 1;
    /// An entry points at a page that is not a page of tables.
    pub const TABLE: u32 = 2;
    /// An entry that is not present is not zero.
    pub const ABSENT: u32 = 3;
    /// An entry has bits that none may have: reserved, global, large page.
    pub const BITS: u32 = 4;
    /// An entry allows more, or less, than its place should.
    pub const RIGHTS: u32 = 5;
    /// The hypervisor's slots of a root are not this VM's.
    pub const HOLE: u32 = 6;
    /// A window entry is not the frame that the owner has there.
    pub const WINDOW: u32 = 7;
    /// A page of the hypervisor's part is not what belongs there.
    pub const OWN: u32 = 8;
    /// The identity table is not the identity.
    pub const M2P: u32 = 9;
    /// A vCPU's root is none of the core's roots.
    pub const ROOT: u32 = 10;
    /// A root of the world switch holds something besides the hypervisor's slots and
    /// the host's kernel half.
    pub const TRANSITION: u32 = 11;
}

/// Number of counters that the core keeps for each vCPU.
pub const COUNTERS: usize = 72;

/// Indices into [`VmStats::counters`].
pub mod counter {
    /// Hypercalls by number: index = hypercall number (below 48).
    pub const HYPERCALL: usize = 0;
    /// Page faults handed to the guest.
    pub const PF_GUEST: usize = 48;
    /// Page faults that filled a shadow.
    pub const PF_SHADOW: usize = 49;
    /// Page-table writes emulated.
    pub const PT_WRITE: usize = 50;
    /// Privileged instructions emulated.
    pub const PRIV_OP: usize = 51;
    /// Events delivered.
    pub const UPCALL: usize = 52;
    /// Shadow pages made.
    pub const SHADOW_MADE: usize = 53;
    /// Times that all shadows were dropped.
    pub const SHADOW_DROP_ALL: usize = 54;
    /// CR3 loads of the slow paths.
    pub const CR3_LOAD: usize = 55;
    /// System calls that took the slow path.
    pub const SLOW_SYSCALL: usize = 56;
    /// Iret hypercalls that took the slow path.
    pub const SLOW_IRET: usize = 57;
    /// Exceptions handed to the guest, other than page faults.
    pub const TRAP: usize = 58;
    /// System calls that never left the entry code.
    pub const FAST_SYSCALL: usize = 59;
    /// Iret hypercalls that never left the entry code.
    pub const FAST_IRET: usize = 60;
    /// Times that the lock of the shadow MMU was held by another vCPU.
    pub const LOCK_CONTENDED: usize = 64;
    /// TSC cycles spent spinning for it.
    pub const LOCK_WAITED: usize = 65;
    /// Times that the wait was so long that the host was asked to run others.
    pub const LOCK_YIELDED: usize = 66;
    /// Times that the lock was taken. Only in a core that was built to measure.
    pub const LOCK_TAKEN: usize = 67;
    /// TSC cycles for which it was held. Only in a core that was built to measure.
    pub const LOCK_HELD: usize = 68;
    /// Times that a vCPU waited so long while the holder's vCPU did not run, by the
    /// word of the host. Only in a core that was built to measure, inside KVM.
    pub const LOCK_PREEMPTED: usize = 69;
}

/// Page shared by the module and the core of one VM (at [`crate::layout::VM_PAGE`]).
#[repr(C)]
#[derive(Debug)]
pub struct VmPage {
    /// Copy of [`CreateVm::boot`].
    pub boot: Boot,
    /// Frames of the VM.
    pub nr_frames: u64,
    /// vCPUs of the VM.
    pub nr_vcpus: u32,
    /// Nonzero on a host with 5-level paging.
    pub la57: u32,
    /// Pool pages that exist (grows; the module stores it with release order).
    pub pool_pages: AtomicU64,
    /// Sequence count of the time parameters: odd while they change.
    pub time_version: AtomicU32,
    /// pvclock shift.
    pub tsc_shift: AtomicI8,
    /// pvclock flags (bit 0: stable).
    pub time_flags: AtomicU8,
    /// Padding.
    pub pad: u16,
    /// pvclock multiplier.
    pub tsc_mul: AtomicU32,
    /// What the host does wrong, bits of [`quirk`]. 0 under the module.
    pub quirks: u32,
    /// TSC at `system_time`.
    pub tsc_timestamp: AtomicU64,
    /// Guest system time, ns.
    pub system_time: AtomicU64,
    /// Wall clock at system time 0, seconds.
    pub wall_sec: AtomicU64,
    /// Wall clock at system time 0, nanoseconds of the second.
    pub wall_nsec: AtomicU32,
    /// Mask of XCR0 bits that the guest may use; 0 without XSAVE.
    pub xcr0_mask: u32,
    /// Frequency of the TSC, kHz.
    pub tsc_khz: u64,
    /// Bit per port: notifications from backends that the core has not seen.
    pub raised: [AtomicU64; 64],
    /// Bit per VIRQ raised by the toolstack for vCPU 0.
    pub raised_virqs: AtomicU64,
    /// Which vCPU each port is bound to, for the module to choose whom to kick.
    pub port_vcpu: [AtomicU8; 2048],
    /// Most pages that the pool may ever have: the length of the array at
    /// [`crate::layout::POOL_INFO`].
    pub pool_limit: u64,
    /// Level-4 entries 256 to 271 that every root of the guest needs: the tables
    /// of [`crate::layout`], built by the module, or the part of them that an isolated
    /// guest's roots hold.
    pub hole: [u64; 16],
    /// What the core runs on, one of [`host`].
    pub host: u32,
    /// KVM's paravirtual features that the core may use: CPUID leaf 0x40000001,
    /// eax (`Documentation/virt/kvm/x86/cpuid.rst`). 0 under the module.
    pub kvm_features: u32,
    /// Entries of the table at [`crate::layout::CPUID_TABLE`]. 0 under the module.
    pub cpuid_entries: u32,
    /// Nonzero: CPUID faults at CPL 3, so the core answers the guest's programs too.
    pub cpuid_faults: u32,
    /// Counts up whenever the host takes frames back. It changes only while no vCPU
    /// is in the core world. Always 0 inside KVM.
    pub revocations: AtomicU64,
    /// Bit per block of [`crate::layout::REVOKED_BLOCK`] frames in which some were
    /// taken back whose leaves the core has not removed yet. Which ones is said by
    /// the bits at [`crate::layout::REVOKED`]. The module sets bits while no vCPU is
    /// in the core world, the core clears them.
    pub revoked: [AtomicU64; 64],
    /// CR3 of the root that the core runs on, if the guest's roots hold the entry area
    /// only; else 0.
    pub core_cr3: u64,
    /// Nonzero: the core records what it does ([`crate::trace`]). It looks when a bit
    /// of [`Switch::pending`] makes it look at anything.
    pub trace: AtomicU32,
    /// Nonzero: the host wants shadow pages back. The core looks as at `trace`, and
    /// writes 0.
    pub reclaim: AtomicU32,
    /// Frames of RAM that the guest may have at most; 0 = all of [`Boot::ram_frames`].
    pub target: AtomicU64,
    /// Pages below `pool_pages` whose memory the host has, by the core.
    pub pool_gone: AtomicU64,
    /// One of [`pause`]. The core looks as at `trace`.
    pub pause: AtomicU32,
    /// Padding.
    pub pad2: u32,
    /// Copy of [`CreateVm::cpuid_hidden`].
    pub cpuid_hidden: [u32; HIDDEN_WORDS],
}

/// Values of [`VmPage::pause`].
pub mod pause {
    /// Nothing is asked for.
    pub const NONE: u32 = 0;
    /// Each vCPU writes its own state down and leaves with [`super::exit::PAUSED`].
    pub const VCPUS: u32 = 1;
    /// All vCPUs have: vCPU 0, run once more, writes down what they share.
    pub const VM: u32 = 2;
    /// All vCPUs have: vCPU 0, run once more, writes down which frames of RAM were written
    /// since it did so last. The first time it begins to note that.
    pub const LOG: u32 = 3;
    /// All vCPUs have: vCPU 0, run once more, ceases to note what is written.
    pub const NO_LOG: u32 = 4;
}

/// Values of [`VmPage::host`].
pub mod host {
    /// `blanket.ko`: the core is one of two worlds of a physical CPU.
    pub const MODULE: u32 = 0;
    /// A KVM VM, in which the core is alone at CPL 0.
    pub const KVM: u32 = 1;
}

/// Bits of [`VmPage::quirks`].
pub mod quirk {
    /// An interrupt may be delivered again, at any time until the next exit of the VM.
    pub const INTERRUPTS_TWICE: u32 = 1;
}

/// An answer of CPUID, in the table that the core uses inside KVM.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuidEntry {
    /// Leaf.
    pub leaf: u32,
    /// Subleaf; [`CPUID_ANY`] where the leaf has none.
    pub subleaf: u32,
    /// eax, ebx, ecx, edx.
    pub regs: [u32; 4],
}

/// [`CpuidEntry::subleaf`] of a leaf without subleaves.
pub const CPUID_ANY: u32 = u32::MAX;
/// Entries that the table at [`crate::layout::CPUID_TABLE`] has room for.
pub const CPUID_MAX: usize = 4096 / size_of::<CpuidEntry>();

/// NMIs of the watchdog, each taken, during one visit to the core world, at which
/// the core is in a loop that will not end.
pub const WATCH_LIMIT: u32 = 3;

/// Flags of [`Switch::pending`].
pub mod pending {
    /// The vCPU was asked to look at its events.
    pub const KICK: u32 = 1 << 0;
    /// Something is in [`super::VmPage::raised`].
    pub const RAISED: u32 = 1 << 1;
    /// An NMI hit ring 0 of the core world. Set by the core's NMI stub, which
    /// returns with `popfq; ret` (not `iretq`: NMIs must stay blocked); cleared
    /// by the module, which gives the NMI to the host.
    pub const NMI: u32 = 1 << 2;
    /// As [`NMI`], for a machine check.
    pub const MCE: u32 = 1 << 3;
    /// Another vCPU waits until this one has flushed its TLB. Only inside KVM: the
    /// module answers [`super::exit::FLUSH`] itself.
    pub const FLUSH: u32 = 1 << 4;
}

/// Descriptor-table register image, padded to 16 bytes. The CPU reads ten bytes
/// from `limit` on.
#[repr(C, align(16))]
#[derive(Clone, Copy, Debug, Default)]
pub struct Dtr {
    /// Padding that lets `limit` and `base` be contiguous and `base` aligned.
    pub pad: [u16; 3],
    /// Limit.
    pub limit: u16,
    /// Linear base address.
    pub base: u64,
}

/// The switch block at the start of a vCPU's hardware page: all that passes
/// between the worlds. The assembly on both sides knows these offsets.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Switch {
    /// Core stack pointer while in the host world.
    pub core_rsp: u64,
    /// Host stack pointer while in the core world.
    pub host_rsp: u64,
    /// Root of the transition address space.
    pub trans_cr3: u64,
    /// Host CR3.
    pub host_cr3: u64,
    /// Host CR4.
    pub host_cr4: u64,
    /// CR4 of the core world.
    pub core_cr4: u64,
    /// Host FS base.
    pub host_fs_base: u64,
    /// Host GS base.
    pub host_gs_base: u64,
    /// Host inactive GS base.
    pub host_kgs_base: u64,
    /// Host TR.
    pub host_tr: u16,
    /// Host LDTR.
    pub host_ldt: u16,
    /// Host DS.
    pub host_ds: u16,
    /// Host ES.
    pub host_es: u16,
    /// Host FS.
    pub host_fs: u16,
    /// Host GS.
    pub host_gs: u16,
    /// Host SS.
    pub host_ss: u16,
    /// Host CS.
    pub host_cs: u16,
    /// Core GDT.
    pub core_gdtr: Dtr,
    /// Core IDT.
    pub core_idtr: Dtr,
    /// Transition GDT.
    pub trans_gdtr: Dtr,
    /// Host GDT.
    pub host_gdtr: Dtr,
    /// Host IDT.
    pub host_idtr: Dtr,
    /// Exit reason (core to host).
    pub exit: u32,
    /// Bits of [`pending`], set by others atomically.
    pub pending: AtomicU32,
    /// Arguments of the exit.
    pub args: [u64; 4],
    /// Answer to the exit (host to core).
    pub ret: i64,
    /// Absolute guest system time at which the core wants to be entered, ns;
    /// `u64::MAX` = none. The module arms its timer with it before each entry.
    pub deadline: AtomicU64,
    /// Deadline that the module's timer is armed for.
    pub armed: AtomicU64,
    /// Values for STAR, LSTAR, CSTAR, SFMASK in the core world.
    pub syscall_msrs: [u64; 4],
    /// XCR0 of the guest; 0 without XSAVE.
    pub guest_xcr0: u64,
    /// TSC_AUX of the guest.
    pub guest_tsc_aux: u64,
    /// Guest DR7; the module saves its own debug registers only if this or its own is armed.
    pub guest_dr7: u64,
    /// The vCPU's id.
    pub vcpu_id: u32,
    /// Set before the module's watchdog sends an NMI to a CPU that has not left the
    /// core world for long: how many it has sent during this visit. The core's NMI
    /// stub takes it, and gives up at [`WATCH_LIMIT`]. 0 at each entry.
    pub watch: AtomicU32,
    /// Where the core jumps to leave: module text, mapped in the transition root.
    /// By then it has loaded `trans_cr3`, pushed rbx, rbp, r12, r13, r14, r15 in
    /// this order onto its return address, stored rsp in `core_rsp`, and `rdi`
    /// is the address of this block (the core's). Interrupts are off, DF is clear.
    pub exit_entry: u64,
    /// Address of this block in the host's address space, valid on `trans_cr3`.
    pub host_self: u64,
    /// Guest-physical address of the page at [`crate::layout::vcpu::PV`]. 0 under
    /// the module.
    pub pv_address: u64,
    /// Exits that the core answered itself, by reason. Only inside KVM.
    pub in_place: [AtomicU64; EXIT_REASONS],
    /// Counters, see [`counter`].
    pub counters: [AtomicU64; COUNTERS],
    /// Text for CONSOLE and CRASH exits; its length is argument 3 of the exit.
    pub data: [u8; RUN_DATA],
}

/// Header at the start of the core image (`blanket.ko` carries the image and
/// maps each section with its own rights). Offsets are from the image base.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ImageHeader {
    /// [`IMAGE_MAGIC`].
    pub magic: u64,
    /// [`API_VERSION`].
    pub api: u32,
    /// `size_of::<Switch>()`, a cheap check that both were built from one tree.
    pub switch_size: u32,
    /// Entry section (read, execute; mapped again in each vCPU area).
    pub entry_start: u64,
    /// End of the entry section, page aligned.
    pub entry_end: u64,
    /// End of text (read, execute), page aligned; text begins at the header.
    pub text_end: u64,
    /// End of read-only data, page aligned.
    pub rodata_end: u64,
    /// End of writable data and zeroed data, page aligned: pages of the image.
    pub data_end: u64,
    /// Bytes in the file; the rest up to `data_end` is zero.
    pub file_end: u64,
    /// First instruction of a vCPU, on its main stack.
    pub start: u64,
    /// A page of the writable data that the module fills with the IDT.
    pub idt: u64,
    /// First of 256 entry stubs in the entry section, [`STUB_STRIDE`] apart.
    pub stubs: u64,
    /// Array of u64: where NOPs of three bytes become STAC or, with [`SMAP_CLAC`]
    /// set, CLAC for a core that runs with SMAP. The module leaves them as they are.
    pub smap: u64,
    /// End of the array.
    pub smap_end: u64,
    /// Array of pairs of u64, all in the entry section: where a NOP of five bytes
    /// becomes a jump, and where to, for a core that runs on a root of its own.
    pub isolate: u64,
    /// End of the array.
    pub isolate_end: u64,
}

/// Bit in an entry of [`ImageHeader::smap`]: the place gets CLAC.
pub const SMAP_CLAC: u64 = 1 << 63;

/// Bytes from one entry stub of the image to the next.
pub const STUB_STRIDE: u64 = 16;

/// `"BLKTCORE"`, little endian.
pub const IMAGE_MAGIC: u64 = 0x4552_4f43_544b_4c42;
